"""Options that several commands share: which checkpoint, and how it is compressed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Final, get_args

from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Merge
from vzip.runtime.errors import InvalidInputError

COVERAGE: Final[Mapping[str, tuple[type[float | str], str, str]]] = {
    "place": (float, "SHARE", "the share of nearness in the grid, 0 to 1 (default: 0)"),
    "radius": (float, "PATCHES", "how far nearness reaches (default: .107 of the grid's side)"),
    "alpha": (float, "POWER", "the power of the attention score: 0, 0.5 or 1 (default: 0.5)"),
    "features": (str, "{keys,tower}", "what patches are compared by (default: keys)"),
}
"""Option of `vzip.export.algorithm.selections.coverage` → type, and what the help says of it."""


def add_model(parser: argparse.ArgumentParser, *, revision: bool = True) -> None:
    """Add ``--model`` and, if a command takes it, ``--revision``."""
    parser.add_argument(
        "--model",
        required=True,
        help="an alias that 'vzip models' lists, a hub id, or a local folder",
    )
    if revision:
        parser.add_argument("--revision", help="commit, branch or tag of a hub id")


def add_compression(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Add the budget (``--tokens``, or its parts), ``--merge``, ``--no-cls``, ``--selection``.

    Args:
        parser: Of the command.
        default: What the help says of a budget that isn't given.
    """
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="K",
        help=f"tokens of an image, a tile or a frame, split 27:5 as in the paper{default}",
    )
    parser.add_argument("--dominant", type=int, metavar="N", help="tokens kept as they are")
    parser.add_argument("--contextual", type=int, metavar="N", help="tokens merged from the rest")
    parser.add_argument(
        "--merge",
        choices=get_args(Merge),
        default="average",
        help="average: the paper's; sum: the published code's (default: average)",
    )
    parser.add_argument(
        "--no-cls",
        action="store_true",
        help="drop the CLS token (default: keep it, if there is one)",
    )
    parser.add_argument(
        "--selection",
        choices=selections.names(),
        default=selections.DEFAULT,
        help="which tokens are kept; docs/selections.md has them all (default: visionzip)",
    )
    for name, (kind, metavar, what) in COVERAGE.items():
        parser.add_argument(
            f"--coverage-{name}", type=kind, metavar=metavar, help=f"with coverage, {what}"
        )


def selection_options(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Take the options of the selection out of the arguments, and return those that were given.

    Raises:
        InvalidInputError: They are another selection's.
    """
    given = {name: vars(arguments).pop(f"coverage_{name}") for name in COVERAGE}
    found = {name: value for name, value in given.items() if value is not None}
    if found and arguments.selection != "coverage":
        raise InvalidInputError(
            f"got --coverage-{next(iter(found))} with --selection {arguments.selection}",
            expected="--selection coverage",
            cure="leave out one of the two",
        )
    return found
