"""The command `vzip triton`: a bundle as a model repository of Triton Inference Server."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.runtime.cli.options import Parser, add_bundle, add_output
from vzip.runtime.console import emit
from vzip.runtime.files import outputs


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip triton``: write a repository, and print the names of its models."""
    parser = Parser(
        prog,
        "Write a bundle as a model repository of Triton Inference Server: the encoder, the "
        "preparation of pictures, and the ensemble of both.",
        epilog="Triton's Python needs vzip for the preparation: pip install vzip.",
    )
    add_bundle(parser)
    add_output(parser, "REPOSITORY", "the folder to write")
    parser.add_argument("--name", metavar="NAME", help="the ensemble's (default: the bundle's)")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="a TensorRT engine of the bundle, built with the TensorRT of Triton's container "
        "(default: the graph, by ONNX Runtime)",
    )
    parser.add_argument(
        "--precision", metavar="NAME", help="the graph's: int8 or fp8 (default: the bundle's own)"
    )
    parser.add_argument(
        "--instances", type=int, default=1, metavar="N",
        help="encoders side by side on each GPU, or on the CPU (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.read(argv)
    outputs.check_folder(arguments.output)

    from vzip.runtime.service.adapters.triton_repository import write_repository

    for name in write_repository(
        arguments.bundle,
        arguments.output,
        name=arguments.name,
        engine=arguments.engine,
        precision=arguments.precision,
        instances=arguments.instances,
    ):
        emit(name)
    return 0
