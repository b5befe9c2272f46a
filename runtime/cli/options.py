"""The parser of every command, and the options that several commands of the runtime have."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from vzip.runtime import console
from vzip.runtime.console import Verbosity
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine import process

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_MANIFEST = "manifest.json"  # as in a bundle's format; its module takes long to import

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Parser(argparse.ArgumentParser):
    """A command's parser: it has ``-v`` and ``-q``, and every mistake is an error of one line.

    There are no abbreviations: a new option would change what an old script says.

    Args:
        prog: The command's name, such as ``vzip plan``.
        description: What the command does.
        table: Whether it prints a table, which ``--json`` prints as JSON.
        renamed: Old name of an option → what is written today.
        epilog: What the help ends with.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        *,
        table: bool = False,
        renamed: Mapping[str, str] = _NOTHING,
        epilog: str | None = None,
    ) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self._renamed = renamed
        loudness = self.add_mutually_exclusive_group()
        loudness.add_argument(
            "-v",
            "--verbose",
            action="count",
            default=0,
            help="say more on standard error; twice: all that is logged",
        )
        loudness.add_argument(
            "-q", "--quiet", action="store_true", help="say nothing but results and errors"
        )
        if table:
            self.add_argument("--json", action="store_true", help="print the same as JSON")

    def read(self, argv: Sequence[str], *, intermixed: bool = False) -> argparse.Namespace:
        """Return the options; set from now on how much is said and how many threads graphs get.

        Args:
            argv: The arguments.
            intermixed: Whether options may stand between the values of one positional argument.

        Raises:
            InvalidInputError: An option that there is not or that has another name today, a value
                of the wrong form, or a lack of either.
        """
        self._refuse_unknown(argv)
        parse = self.parse_intermixed_args if intermixed else self.parse_args
        arguments = parse(list(argv))
        if arguments.quiet:
            console.set_verbosity(Verbosity.QUIET)
        else:
            console.set_verbosity(Verbosity(min(Verbosity.NORMAL + arguments.verbose, 3)))
        if "threads" in arguments:
            process.limit_threads(arguments.threads)
        return arguments

    def _refuse_unknown(self, argv: Sequence[str]) -> None:
        """Name an option that there is not before argparse asks for what was meant by it."""
        if "-h" in argv or "--help" in argv:
            return
        known = self._option_string_actions
        for word in argv:
            if word == "--":
                return
            name = word.partition("=")[0]
            one_dash = f"-{name}" in known and name not in known  # argparse takes -m and a value
            if not (name.startswith("--") or one_dash) or " " in name or name in known:
                continue
            if name in self._renamed:
                raise InvalidInputError(
                    f"'{self.prog}' has no option {name} any more",
                    cure=f"write {self._renamed[name]}",
                )
            close = f"-{name}" if one_dash else _close(name, known)
            raise InvalidInputError(
                f"unrecognized arguments: {name}",
                cure=f"did you mean '{close}'?" if close else self._help(),
            )

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help where results go, whatever characters the terminal lacks."""
        if file is None:
            console.emit(self.format_help(), end="")
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found."""
        raise InvalidInputError(message, cure=self._help())

    def _help(self) -> str:
        return f"'{self.prog} -h' lists the options"


def _close(name: str, known: Iterable[str]) -> str | None:
    """Return the option that a mistyped one was meant for; the dashes make none of them close."""
    names = sorted(each[2:] for each in known if each.startswith("--"))
    begun = [each for each in names if each.startswith(name[2:])]
    found = begun or difflib.get_close_matches(name[2:], names, n=1, cutoff=0.7)
    return f"--{found[0]}" if found else None


def numbers(
    text: str, *, of: str = "numbers", example: str = "64,128,192", least: int | None = None
) -> tuple[int, ...]:
    """Return the numbers of a list with commas, for argparse's ``type``."""
    parts = text.split(",")
    if all(re.fullmatch(r"-?[0-9]+", part) for part in parts):
        found = tuple(map(int, parts))
        if least is None or min(found) >= least:
            return found
    raise argparse.ArgumentTypeError(f"got {text!r}, expected {of} with commas, such as {example}")


def names(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Return argparse's ``type`` for a list with commas of known names, or of any names."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [each for each in found if known and each not in known]:
            raise argparse.ArgumentTypeError(
                f"got {unknown[0]!r}, expected {' or '.join(known)}, or several with commas"
            )
        return found

    return parse


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Add the bundle, which is the first thing that a command takes."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, help="the folder that 'vzip export' wrote"
    )


def refuse_swapped(bundle: Path, images: Sequence[Path]) -> None:
    """Name the right order where an image was given first and the bundle after it.

    Raises:
        InvalidInputError: The bundle is a file, and one of the images is a bundle.
    """
    behind = next((each for each in images if os.path.isfile(each / _MANIFEST)), None)  # noqa: PTH113
    if behind is not None and os.path.isfile(bundle):  # noqa: PTH113  Path's fails on long names
        raise InvalidInputError(
            f"the first argument is the file '{bundle}'",
            expected="the bundle",
            cause=f"'{behind}' is one",
            cure="give the bundle first, then the images",
        )


def add_output(
    parser: argparse.ArgumentParser, metavar: str, text: str, *, required: bool = True
) -> None:
    """Add ``-o``; `vzip.runtime.files.outputs` says whether it can be written."""
    parser.add_argument("-o", "--output", metavar=metavar, type=Path, required=required, help=text)


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add ``--tokens``: a budget below the bundle's, which nested selections have."""
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of each image, tile or frame, where the bundle's selection is nested, such as "
        "coverage (default: the bundle's)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, which bounds every graph that the command runs on the CPU."""
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that run a graph on the CPU (default: as many as this process may use cores, "
        "of which a container's quota counts too)",
    )


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Add what says how the vision encoder is run: backend, engine, precision and threads."""
    add_threads(parser)
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="what runs the vision encoder (default: auto, the best that is installed)",
    )
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="which of the bundle's engines is run (default: the only one that fits)",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="int8 or fp8: run the graph that 'vzip calibrate' made, or an engine built from it; "
        "fastest: run a CPU engine and nothing else; the bundle's own, fp32 or fp16: run no CPU "
        "engine (default: the bundle's own graph, or an engine of it that fits)",
    )
