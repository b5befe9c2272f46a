"""`vzip export`, also `vzip-export`.

Nothing heavy is imported before the arguments are understood: `-h` and a mistyped option answer at
once, and on a machine without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.export import EXPORT_PACKAGES
from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Budget, split_tokens
from vzip.export.cli.options import add_compression, add_model
from vzip.export.hardware import Choice, find, resolve
from vzip.runtime.cli.options import Parser
from vzip.runtime.console import emit, run_command, say
from vzip.runtime.errors import BudgetError, InvalidInputError, require

if TYPE_CHECKING:
    from vzip.export.architecture import VisionConfig
    from vzip.export.defaults import Batch
    from vzip.runtime.bundle.reader import Bundle


RENAMED = {
    "--precision": "--dtype",
}
"""Old name of an option → its name today."""


def vzip_export() -> int:
    """Run the command line `vzip-export`."""
    return run_command(lambda: main(sys.argv[1:], prog="vzip-export"), prog="vzip-export")


def main(argv: Sequence[str], *, prog: str) -> int:
    """Export a bundle.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        The exit status.
    """
    arguments = _parser(prog).read(argv)
    _check_options(arguments)
    require(*EXPORT_PACKAGES, needed_for=f"'{prog}'", extra="export")
    from vzip.export.graph.trace import GraphOptions
    from vzip.export.pictures import reference_images
    from vzip.export.pipeline import Method, WeightSource, export_bundle

    source = WeightSource(
        arguments.model,
        arguments.revision,
        arguments.seed if arguments.weights == "random" else None,
        arguments.projector,
        arguments.media,
    )
    config = source.config()
    budget = _budget(arguments, config)
    if arguments.tiles is not None and config.tiling is None:
        raise InvalidInputError(
            f"--tiles {arguments.tiles} was given, but '{arguments.model}' cuts no tiles here",
            cure="leave it out",
        )
    batch = _batch(arguments, config)
    choice = _resolve_target(arguments, batch.size)
    output = Path(_output(arguments, budget))
    say(f"budget: {describe_budget(budget)}")
    for note in choice.notes:
        say(note)
    bundle = export_bundle(
        source,
        output,
        method=Method(budget, arguments.merge, arguments.selection, arguments.tiles or "reference"),
        precision=arguments.dtype,
        options=GraphOptions(
            graph_input=arguments.input,
            batch=batch.size,
            dynamic_batch=batch.dynamic,
            opset=arguments.opset,
        ),
        check_images=() if arguments.no_check else reference_images(),
        step=lambda name: say(f"{name} …"),
        with_llm=arguments.with_llm,
    )
    if bundle.manifest.parity is not None:
        say(describe_parity(bundle))
    emit(str(output))
    return 0


def describe_budget(budget: Budget) -> str:
    """Return a budget as one reads it: the sum and its parts."""
    cls = "CLS among the dominant" if budget.cls_token else "without CLS"
    return (
        f"{budget.tokens} tokens = {budget.dominant} dominant + {budget.contextual} contextual, "
        f"{cls}"
    )


def describe_parity(bundle: Bundle) -> str:
    """Return the line about a bundle's parity that follows an export."""
    parity = bundle.manifest.parity
    assert parity is not None
    return (
        f"parity on {parity['images']} images: kept overlap {parity['kept_overlap']:.4f}, "
        f"lowest cosine {parity['min_cosine']:.6f}, largest error {parity['max_error']:.1e}"
    )


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
        choices=("checkpoint", "random"),
        default="checkpoint",
        help="random: the architecture at its true size without a hub (default: checkpoint)",
    )
    parser.add_argument("--seed", type=int, help="of random weights (default: 0)")
    add_compression(parser, default=" (default: 64, or 17 for a graph made for video)")
    parser.add_argument(
        "--media",
        choices=("image", "video"),
        help="for models that see images and video in different ways, which of them (default: the "
        "model's own choice; 'vzip models' says it)",
    )
    parser.add_argument(
        "--tiles",
        choices=("reference", "newline"),
        help="for models that cut images into tiles, the tokens' order: reference: the published "
        "code's; newline: rows ended by newlines and patches of the padding left out, as the LLM "
        "was trained (OneVision: up to nine tiles) (default: reference)",
    )
    parser.add_argument(
        "--target",
        metavar="NAME",
        help="the machine it is for; 'vzip targets' lists them (sets opset and precision)",
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
        help="static batch (default: 1; for tiles and video open, up to those of one input, 10 at "
        "most)",
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
        "--with-llm",
        action="store_true",
        help="put the language model into the bundle too, in the same precision: 'vzip ask' then "
        "runs it with ONNX Runtime on the CPU, without torch (for small models)",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="skip the parity check against the PyTorch model"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where the bundle goes")
    return parser


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read or imported."""
    if arguments.seed is not None and arguments.weights != "random":
        raise InvalidInputError(
            f"--seed {arguments.seed} was given without --weights random",
            cause="a checkpoint has no seed",
            cure="drop one or add the other",
        )
    if arguments.weights == "random":
        arguments.seed = arguments.seed or 0
        if arguments.with_llm:
            raise InvalidInputError(
                "--with-llm and --weights random were both given",
                cause="the answers of an LLM to random tokens mean nothing",
                cure="leave out one of the two",
            )
    parts = (arguments.dominant, arguments.contextual)
    if arguments.tokens is not None and parts != (None, None):
        raise BudgetError(
            "--tokens and --dominant/--contextual were both given",
            expected="either the sum or its parts",
        )
    if arguments.tokens is not None:
        split_tokens(arguments.tokens)
    elif None not in parts:
        Budget(*parts)
    elif parts != (None, None):
        raise BudgetError(
            "expected --dominant and --contextual together",
            cause="or --tokens for the sum",
        )
    _resolve_target(arguments, arguments.batch or arguments.max_batch or 1)
    if arguments.output is not None and not arguments.output.strip():
        raise InvalidInputError(
            "-o is empty",
            expected="a folder to write the bundle to",
        )


def _budget(arguments: argparse.Namespace, config: VisionConfig) -> Budget:
    """Return the budget: as asked for, else the model's default; it fits the tower."""
    from vzip.export import defaults

    if arguments.dominant is not None:
        budget = Budget(arguments.dominant, arguments.contextual, not arguments.no_cls)
    else:
        tokens = defaults.tokens(config) if arguments.tokens is None else arguments.tokens
        budget = split_tokens(tokens, cls_token=not arguments.no_cls)
    budget = defaults.keeps_cls(budget, config)
    budget.check_fits(config.tokens, tower_has_cls=config.tower.cls_token)
    return budget


def _batch(arguments: argparse.Namespace, config: VisionConfig) -> Batch:
    """Return the batch: as asked for, else the model's default as far as the target takes it."""
    from vzip.export import defaults

    if arguments.max_batch is not None:
        return defaults.Batch(arguments.max_batch, dynamic=True)
    if arguments.batch is not None:
        return defaults.Batch(arguments.batch, dynamic=False)
    batch = defaults.batch(config)
    if arguments.target is None:
        return batch
    largest = find(arguments.target).largest_batch(arguments.dtype)
    return defaults.Batch(min(batch.size, largest), batch.dynamic)


def _resolve_target(arguments: argparse.Namespace, batch: int) -> Choice:
    """Fill in opset and precision, and refuse what contradicts the target."""
    choice = resolve(
        arguments.target, opset=arguments.opset, precision=arguments.dtype, batch=batch
    )
    arguments.opset, arguments.dtype = choice.opset, choice.precision
    return choice


def _output(arguments: argparse.Namespace, budget: Budget) -> str:
    """Return -o, or a name made of model, tokens, precision and what else was asked for."""
    if arguments.output is not None:
        return str(arguments.output)
    parts = [Path(arguments.model).resolve().name, str(budget.tokens), arguments.dtype]
    parts += [part for part in (arguments.media, arguments.tiles) if part is not None]
    if arguments.selection != selections.DEFAULT:
        parts.append(arguments.selection)
    return "-".join(parts)
