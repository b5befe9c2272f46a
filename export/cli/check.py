"""`vzip check`: a bundle beside the untouched model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vzip.runtime.cli.options import Parser, add_bundle, add_threads
from vzip.runtime.console import complain, emit, emit_json

BELOW_THE_GATE = 1


def main(argv: Sequence[str], *, prog: str) -> int:
    """Check a bundle against the untouched model.

    Returns:
        0 if the gate is met, 1 if it is not.
    """
    parser = Parser(
        prog,
        "Run a bundle's graph beside the untouched Hugging Face tower and projector and a slow "
        "oracle of VisionZip; write the numbers into its manifest. Exit status 1 below the gate.",
        table=True,
    )
    add_bundle(parser)
    parser.add_argument(
        "images", metavar="IMAGE", nargs="*", help="images to check on (default: vzip's own)"
    )
    parser.add_argument(
        "--projector", type=Path, metavar="FILE", help="the tuned projector that it was made with"
    )
    add_threads(parser)
    arguments = parser.read(argv)
    from vzip.export import check

    bundle = check(
        arguments.bundle,
        arguments.images or None,
        projector=arguments.projector,
        say=lambda line: complain(f"{prog}: {line}"),  # with --quiet too: it is the verdict
    )
    parity = bundle.manifest.parity
    assert parity is not None
    if arguments.json:
        emit_json(dict(parity))
    else:
        for name, value in parity.items():
            emit(f"{name}: {value}")
    return 0 if parity["passed"] else BELOW_THE_GATE
