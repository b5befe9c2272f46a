"""`vzip sweep`: what budgets cost and keep; nothing heavy is imported for `-h`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vzip.calibration.sweeping.advice import Advice, Limits, advise
from vzip.export import EXPORT_PACKAGES
from vzip.export.algorithm.budget import Merge, split_tokens
from vzip.export.cli.options import add_model
from vzip.runtime.cli.options import Parser, add_output, names, numbers
from vzip.runtime.console import emit, emit_json, say
from vzip.runtime.errors import InvalidInputError, MissingDependencyError, require
from vzip.runtime.files import outputs
from vzip.runtime.models import DEMO, locate

if TYPE_CHECKING:
    from vzip.calibration.sweeping.sweep import Sweep
    from vzip.calibration.variant import Variant
    from vzip.runtime.pictures.images import ImageSource

TEXT_TOKENS = 64
"""LLaVA-1.5's prompt without its image has about forty tokens, a question some twenty."""

DEMO_IMAGES = 16
"""Scenes that the demo's generator is asked for; it has no end."""

NONE_MEETS = 1


RENAMED = {
    "--budgets": "--tokens",
}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure budgets and merges of a model, write table and plot, and recommend one.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        0; 1 if limits were given and no budget meets them.
    """
    arguments = _parser(prog).read(argv)
    limits = Limits(
        max_latency_ms=arguments.max_latency_ms,
        max_prefill_gflops=arguments.max_prefill_gflops,
        min_accuracy=arguments.min_accuracy,
        min_agreement=arguments.min_agreement,
    )
    if limits.min_accuracy is not None and locate(arguments.model).model_id != DEMO:
        raise InvalidInputError(
            f"--min-accuracy {limits.min_accuracy:g} was given for '{arguments.model}', but "
            f"only the model '{DEMO}' comes with questions to answer",
            cure="give --min-agreement",
        )
    if arguments.text_tokens < 0:
        raise InvalidInputError(
            f"got --text-tokens {arguments.text_tokens}",
            expected="0 or more",
        )
    outputs.check_folder(arguments.output)
    require(*EXPORT_PACKAGES, needed_for=f"'{prog}'", extra="export")
    from vzip.calibration.sweeping.sweep import sweep

    variants = _variants(arguments)
    source, images = _images(arguments)
    result = sweep(
        arguments.model,
        variants,
        images,
        revision=arguments.revision,
        source=source,
        text_tokens=arguments.text_tokens,
        step=lambda name: say(f"{name} …"),
    )
    advice = advise(result.rows, limits) if limits.any else None
    record = {**result.to_json(), "advice": None if advice is None else advice.to_json()}
    tell = say if arguments.json else emit
    for path in _write(result, advice, record, arguments.output):
        tell(str(path))
    if advice is not None:
        tell(("recommended: " if advice.met else "") + advice.text)
    if arguments.json:
        emit_json(record)
    return 0 if advice is None or advice.met else NONE_MEETS


def _variants(arguments: argparse.Namespace) -> list[Variant]:
    """Return the budgets by size, each with every merge, as far as the tower takes CLS along."""
    from vzip.calibration.variant import Variant
    from vzip.export import defaults
    from vzip.export.checkpoint.reader import Checkpoint

    config = Checkpoint.open(arguments.model, revision=arguments.revision).vision()
    found = []
    for tokens in sorted(set(arguments.tokens)):
        budget = defaults.keeps_cls(split_tokens(tokens), config)
        budget.check_fits(config.tokens, tower_has_cls=config.tower.cls_token)
        found += [Variant(budget, merge) for merge in dict.fromkeys(arguments.merges)]
    return found


def _images(
    arguments: argparse.Namespace,
) -> tuple[str, list[tuple[str, Callable[[], ImageSource]]]]:
    """Return what the images are, and each one's name and reader."""
    from vzip.calibration.samples import Samples

    source = arguments.images
    if source is None and locate(arguments.model).model_id == DEMO:
        source = DEMO
    if source is None:
        from vzip.export.pictures import reference_images

        return "vzip's own photographs", [(p.name, _opened(p)) for p in reference_images()]
    count = arguments.count
    if source == DEMO and count is None:
        count = DEMO_IMAGES
    samples = Samples.open(source, count=count)
    if samples.left_out:
        say(samples.describe_left_out())
    return f"{source}, SHA-256 {samples.digest[:16]}", [(each.name, each.read) for each in samples]


def _opened(path: Path) -> Callable[[], ImageSource]:
    return lambda: path


def _write(
    result: Sweep, advice: Advice | None, record: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Write table, JSON and plots; each file is there whole or not at all."""
    from vzip.calibration.sweeping.output import plot, table

    files = {
        "sweep.md": table(result, advice).encode(),
        "sweep.json": json.dumps(record, indent=1, allow_nan=False).encode() + b"\n",
    }
    try:
        files["sweep.svg"] = plot(result, advice, "svg")
        files["sweep.png"] = plot(result, advice, "png")
    except MissingDependencyError as error:
        say(f"no plot was drawn: {error}")
    return outputs.write_folder(folder, files)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Measure what budgets and merges of a model cost and keep, side by side, and "
        "recommend one for a limit. Exit status 1 if none meets the limits.",
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
    parser.add_argument(
        "--images",
        metavar="FOLDER|LIST|demo",
        help="images like those that will be asked about: a folder, a text file with one path a "
        "line, or the demo's generator (default: vzip's two photographs; demo for the demo model)",
    )
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
    return parser
