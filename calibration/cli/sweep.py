"""`vzip sweep`: cost and agreement of several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from vzip.calibration.cli.options import add_images
from vzip.calibration.samples import DEMO_IMAGES
from vzip.calibration.sweeping.sweep import TEXT_TOKENS, sweep
from vzip.export.algorithm.budget import Merge
from vzip.export.cli.options import add_model
from vzip.runtime.cli.options import Parser, add_output, add_threads, names, numbers
from vzip.runtime.console import emit, emit_json, say

NONE_MEETS = 1

RENAMED = {"--budgets": "--tokens"}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure budgets and merges of a model, write table and plot, and recommend one.

    Returns:
        0; 1 if limits were given and no budget meets them.
    """
    arguments = _parser(prog).read(argv)
    found = sweep(
        arguments.model,
        arguments.tokens,
        merges=arguments.merges,
        images=arguments.images,
        count=arguments.count,
        text_tokens=arguments.text_tokens,
        max_latency_ms=arguments.max_latency_ms,
        max_prefill_gflops=arguments.max_prefill_gflops,
        min_accuracy=arguments.min_accuracy,
        min_agreement=arguments.min_agreement,
        output=arguments.output,
        revision=arguments.revision,
    )
    tell = say if arguments.json else emit
    for path in found.files:
        tell(str(path))
    if found.advice is not None:
        tell(("recommended: " if found.advice.met else "") + found.advice.text)
    if arguments.json:
        emit_json(found.to_json())
    return 0 if found.advice is None or found.advice.met else NONE_MEETS


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Measure several budgets and merges of a model side by side: cost and agreement. With "
        "limits, recommend one. Exit status 1 if none meets the limits.",
        table=True,
        renamed=RENAMED,
    )
    add_model(parser)
    parser.add_argument(
        "--tokens",
        required=True,
        type=numbers,
        metavar="K,K,…",
        help="tokens of an image, a tile or a frame, split 27:5 as in the paper",
    )
    parser.add_argument(
        "--merges",
        type=names(*get_args(Merge)),
        default=("average",),
        metavar="average,sum",
        help="how contextual tokens are formed (default: average)",
    )
    add_images(parser, default=" (default: vzip's two photographs; demo for the demo model)")
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"how many of the images (default: all; {DEMO_IMAGES} of the demo's generator)",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=TEXT_TOKENS,
        metavar="N",
        help="tokens of prompt and question beside the image's (default: %(default)s)",
    )
    group = parser.add_argument_group("limits, of which a recommendation meets all")
    for name, what in (
        ("--max-latency-ms", "median latency of the encoder on this machine"),
        ("--max-prefill-gflops", "predicted work of the LLM's prefill"),
        ("--min-accuracy", "share of the demo's questions, from 0 to 1"),
        ("--min-agreement", "agreement with all tokens, from 0 to 1"),
    ):
        group.add_argument(name, type=float, metavar="X", help=what)
    add_output(parser, "FOLDER", "where sweep.md, sweep.json, sweep.svg and sweep.png go")
    add_threads(parser)
    return parser
