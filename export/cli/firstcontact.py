"""`vzip firstcontact`: everything that vzip does on a GPU, tried, in one file to send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vzip.runtime.cli.options import Parser
from vzip.runtime.console import emit, emit_json
from vzip.runtime.errors import InvalidInputError


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run first contact, or make what it needs.

    Returns:
        How many steps failed.
    """
    parser = Parser(
        prog,
        "Try on this machine everything that vzip does on a GPU: build, prove and time engines of "
        "small demo bundles, each step in a process of its own with a time limit. Nothing stops at "
        "a failure. Writes one archive below 3 MB, without this machine's paths and user, and "
        "prints fifteen lines to paste. Needs no PyTorch and no network. The exit status is the "
        "number of failed steps.",
        table=True,
    )
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("-o", "--output", metavar="FILE.zip", type=Path, help="the archive")
    work.add_argument(
        "--prepare",
        metavar="FOLDER",
        type=Path,
        help="make the demo bundles instead, 12 MB, on a machine with PyTorch",
    )
    parser.add_argument(
        "--demo", metavar="FOLDER", type=Path, help="the demo bundles that --prepare made"
    )
    parser.add_argument(
        "--bundle",
        metavar="BUNDLE",
        type=Path,
        help="a bundle of true size to build and time too; it is not changed",
    )
    arguments = parser.read(argv)
    if arguments.prepare is not None:
        if arguments.demo is not None or arguments.bundle is not None:
            raise InvalidInputError(
                "got --prepare together with --demo or --bundle", cure="give --prepare alone"
            )
        from vzip.export.contact.preparing import prepare

        emit(str(prepare(arguments.prepare)))
        return 0
    from vzip.export import firstcontact

    found = firstcontact(arguments.output, demo=arguments.demo, bundle=arguments.bundle)
    if arguments.json:
        emit_json({name: dict(each) for name, each in found.results.items()})
    else:
        for line in found.summary:
            emit(line)
    return min(found.failed, 255)
