"""`vzip debug`: where an engine first differs from ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.runtime.cli.options import Parser, add_bundle, add_output
from vzip.runtime.console import emit, emit_json

DIFFERS = 1


def main(argv: Sequence[str], *, prog: str) -> int:
    """Compare a bundle's graph in two stacks.

    Returns:
        0 if they agree, 1 if they differ or could not be compared.
    """
    parser = Parser(
        prog,
        "Compare a bundle's graph in ONNX Runtime with the same graph in TensorRT on the bundle's "
        "own pictures, with Polygraphy: outputs, then every tensor; then look for the smallest "
        "part that differs, and cut out one operator. Writes a folder that can be sent to others. "
        "Exit status 1 if the two differ.",
        table=True,
    )
    add_bundle(parser)
    add_output(parser, "FOLDER", "an empty folder, or one that is not there yet")
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="int8 or fp8: the graph that 'vzip calibrate' made (default: the bundle's own)",
    )
    parser.add_argument(
        "--with",
        dest="side",
        choices=("tensorrt", "tensorrt-rtx", "onnxruntime"),
        help="what is compared with ONNX Runtime; onnxruntime is the same without its "
        "optimisations (default: the first that is installed)",
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="the operator to cut out, by its name or that of a tensor that it makes (default: the "
        "first that differs)",
    )
    arguments = parser.read(argv)
    from vzip.export import debug
    from vzip.export.debugging.comparing import findings

    found = debug(
        arguments.bundle,
        arguments.output,
        precision=arguments.precision,
        side=arguments.side,
        layer=arguments.layer,
    )
    if arguments.json:
        emit_json(dict(found.stages))
    else:
        for line in findings(found.stages):
            emit(line)
        emit(str(found.folder))
    return 0 if found.differs is False else DIFFERS
