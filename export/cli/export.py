"""`vzip export`, also `vzip-export`.

Nothing heavy is imported before the arguments are understood: `-h` and a mistyped option answer at
once, and on a machine without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from vzip.export.cli.options import add_compression, add_model, selection_options
from vzip.runtime.bundle.origin import Weights
from vzip.runtime.cli.options import Parser, add_threads
from vzip.runtime.console import emit, run_command

RENAMED = {
    "--precision": "--dtype",
}
"""Old name of an option → its name today."""


def vzip_export() -> int:
    """Run the command line `vzip-export`."""
    return run_command(lambda: main(sys.argv[1:], prog="vzip-export"), prog="vzip-export")


def main(argv: Sequence[str], *, prog: str) -> int:
    """Export a bundle."""
    arguments = _parser(prog).read(argv)
    from vzip.export import export

    bundle = export(
        arguments.model,
        arguments.output,
        tokens=arguments.tokens,
        dominant=arguments.dominant,
        contextual=arguments.contextual,
        merge=arguments.merge,
        cls_token=not arguments.no_cls,
        selection=arguments.selection,
        selection_options=selection_options(arguments),
        revision=arguments.revision,
        weights=arguments.weights,
        seed=arguments.seed,
        projector=arguments.projector,
        vision_tower=arguments.vision_tower,
        media=arguments.media,
        tiles=arguments.tiles,
        target=arguments.target,
        dtype=arguments.dtype,
        batch=arguments.batch,
        max_batch=arguments.max_batch,
        graph_input=arguments.input,
        opset=arguments.opset,
        with_llm=arguments.with_llm,
        replace=arguments.replace,
        check_images=() if arguments.no_check else None,
    )
    emit(str(arguments.output or bundle.path.name))  # as it was asked for
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Trace a vision tower, VisionZip's selection and merging, and the projector "
        "into one static ONNX graph, check it against the untouched model, and write a bundle.",
        renamed=RENAMED,
    )
    add_model(parser)
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="checkpoint",
        help="random: the architecture at its true size without a hub; random-outliers: with "
        "outliers and attention sinks as bad as real towers' (default: checkpoint)",
    )
    parser.add_argument("--seed", type=int, help="of random weights (default: 0)")
    add_compression(parser, default=" (default: 64, or 17 for a graph made for video)")
    parser.add_argument(
        "--media",
        choices=("image", "video"),
        help="what the graph is made for, where a model sees images and video in different ways "
        "(default: the model's own choice; 'vzip models' says it)",
    )
    parser.add_argument(
        "--tiles",
        choices=("reference", "newline"),
        help="for models that cut images into tiles, the tokens' order: reference: the published "
        "code's; newline: rows ended by newlines and patches of the padding left out, as the LLM "
        "was trained (default: reference)",
    )
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="the machine it is for; 'vzip targets' lists them (sets opset and dtype)",
    )
    parser.add_argument(
        "--dtype",
        metavar="{fp32,fp16}",
        help="what numbers are stored in (default: the target's, or fp32 without one)",
    )
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="static batch (default: 1; for tiles and video an open batch, as large as one input "
        "needs, at most 10)",
    )
    batch.add_argument(
        "--max-batch", type=int, metavar="N", help="leave the batch axis open, up to N"
    )
    parser.add_argument(
        "--input",
        choices=("image", "pixel_values"),
        default="image",
        help="image: uint8 [B, H, W, 3], normalised in the graph; "
        "pixel_values: float [B, 3, H, W] as the processor makes it (default: image)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=(17, 18),
        help="17 for TensorRT 8.6 (default: the target's, or 18 without one)",
    )
    parser.add_argument("--projector", type=Path, metavar="FILE", help="a tuned projector")
    parser.add_argument(
        "--vision-tower",
        metavar="TOWER",
        help="folder or hub id of original LLaVA's tower, in the place of what mm_vision_tower in "
        "its config.json names",
    )
    parser.add_argument(
        "--with-llm",
        action="store_true",
        help="put the language model into the bundle too, in the same dtype: 'vzip ask' then "
        "runs it with ONNX Runtime on the CPU, without torch (for small models)",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="skip the parity check against the PyTorch model"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where the bundle goes")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace a bundle there even if its engines, quantised graphs or language model are "
        "lost by it",
    )
    add_threads(parser)
    return parser
