"""`vzip build`: ONNX to an engine; nothing heavy is imported before the arguments are read."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.runtime.cli.options import Parser, add_bundle, add_threads
from vzip.runtime.console import emit

RENAMED = {
    "--level": "--builder-optimization-level",
}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Build an engine from a bundle; print its path."""
    arguments = _parser(prog).read(argv)
    from vzip.export.engines import build

    engine = build(
        arguments.bundle,
        cpu=arguments.cpu,
        name=arguments.name,
        precision=arguments.precision,
        workspace_mib=arguments.workspace,
        builder_optimization_level=arguments.builder_optimization_level,
        opt_batch=arguments.opt_batch,
        low_memory=arguments.low_memory,
        safer=arguments.safer,
        rtx=arguments.rtx,
        unproven=arguments.unproven,
        log=arguments.log,
    )
    emit(str(engine.path))
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Build a TensorRT engine, or one for the CPU, from a bundle on the machine that will run "
        "it, compare its tokens with PyTorch's, and put it into the bundle. An engine whose tokens "
        "differ is not kept.",
        renamed=RENAMED,
    )
    add_bundle(parser)
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="make an engine for this machine's CPU instead: the form of the graph that is "
        "measured to be the fastest of those whose tokens agree",
    )
    parser.add_argument("--name", help="the engine's name (default: after what it is for)")
    parser.add_argument(
        "--workspace", type=int, metavar="MIB", help="limit for the builder's scratch memory"
    )
    parser.add_argument(
        "--builder-optimization-level",
        type=int,
        metavar="N",
        help="builder optimisation level, 0 (quick) to 5 (default: TensorRT's own, 3)",
    )
    parser.add_argument(
        "--opt-batch",
        type=int,
        metavar="N",
        help="the batch to tune for, where it is open (default: the largest; on a CPU 1 and 8)",
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="for modules with 4 or 8 GB: a small workspace, optimisation level 2, neither cuBLAS "
        "nor cuDNN; a build that can't fit is not started",
    )
    parser.add_argument(
        "--safer",
        action="store_true",
        help="if the tokens differ from PyTorch's, try settings that are slower and safer",
    )
    parser.add_argument(
        "--unproven",
        action="store_true",
        help="build from a bundle whose graph failed 'vzip check'",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="build from the graph that 'vzip calibrate' made: int8 or fp8; or auto, which keeps "
        "such an engine only if it runs faster on this machine and its tokens agree (default: the "
        "bundle's own graph)",
    )
    parser.add_argument(
        "--rtx",
        metavar="SM,…",
        help="build with TensorRT-RTX for these GPUs, such as sm86,sm89, without having one; "
        "such an engine is not compared with PyTorch",
    )
    parser.add_argument(
        "--log",
        metavar="FILE",
        help="write all that TensorRT says into this file, *.log or *.txt (default: "
        "engines/NAME.log in the bundle, kept only if the build fails)",
    )
    add_threads(parser)
    return parser
