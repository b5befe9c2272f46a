"""Options that several commands share: which checkpoint, and how it is compressed."""

from __future__ import annotations

import argparse
from typing import get_args

from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Merge


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
        help="which tokens are kept: visionzip, or a baseline that looks at nothing "
        "(default: visionzip)",
    )
