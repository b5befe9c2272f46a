"""`vzip tune`: a projector that knows compressed tokens.

Nothing heavy is imported before the arguments are understood.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.calibration.tuning.data import DEMO, DEMO_SCENES
from vzip.export.algorithm.budget import Budget, split_tokens
from vzip.export.cli.options import add_compression, add_model
from vzip.runtime.cli.options import Parser, add_output
from vzip.runtime.console import emit, say
from vzip.runtime.errors import BudgetError, InvalidInputError, require
from vzip.runtime.files import outputs

if TYPE_CHECKING:
    import torch

    from vzip.calibration.tuning.data import Data
    from vzip.calibration.tuning.tune import Recipe
    from vzip.export.architecture import VisionConfig

SUFFIX = ".safetensors"


RENAMED = {
    "--rate": "--learning-rate",
    "--decay": "--weight-decay",
    "--accumulate": "--gradient-accumulation-steps",
    "--warmup": "--warmup-ratio",
    "--epochs": "--num-train-epochs",
    "--norm": "--max-grad-norm",
    "--batch": "--per-device-train-batch-size",
    "--save-every": "--save-steps",
}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Tune a projector.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        The exit status.
    """
    arguments = _parser(prog).read(argv)
    output = outputs.check_file(arguments.output, SUFFIX)
    asked = _asked_budget(arguments)
    _check_data(arguments)
    require("torch", "transformers", "safetensors", needed_for=f"'{prog}'", extra="export")
    from vzip.calibration.tuning.features import Tower, check_tunable
    from vzip.calibration.tuning.job import Job, run_of, tune_projector
    from vzip.calibration.tuning.session import Session
    from vzip.calibration.tuning.workers import Workers
    from vzip.export import defaults
    from vzip.export.pipeline import Method, WeightSource
    from vzip.runtime.llm.local.transformers import TransformersLLM

    workers = Workers.of_environment()
    device = _device(arguments.device, workers.local)
    recipe = _recipe(arguments, device)
    source = WeightSource(arguments.model, arguments.revision)
    config = source.config()
    check_tunable(config, arguments.model)
    budget = defaults.keeps_cls(asked, config)
    budget.check_fits(config.tokens, tower_has_cls=config.tower.cls_token)
    data = _data(arguments, config, recipe.seed)
    weights, model = source.load()
    job = Job(
        model=model,
        weights=weights,
        method=Method(budget, arguments.merge, arguments.selection),
        data=data,
        count=None if arguments.data == DEMO else arguments.count,
        recipe=recipe,
        features=arguments.features,
        save_every=arguments.save_steps,
    )
    with workers.joined(device):
        tower = Tower(weights, job.method, device)
        run = run_of(job, tower, workers)
        with Session(output, run, resume=arguments.resume, workers=workers) as session:
            llm = TransformersLLM.open(
                arguments.model,
                revision=arguments.revision,
                device=str(device),
                dtype={"fp32": "float32", "bf16": "bfloat16"}[recipe.dtype],
            )
            tune_projector(job, tower, llm, session=session, workers=workers, say=say)
    if workers.first:
        emit(str(output))
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Train a model's projector alone on compressed tokens, with the tower and the "
        "LLM frozen, and write it for 'vzip export --projector'. On several GPUs: torchrun "
        "--nproc-per-node N -m vzip.runtime tune ...",
        renamed=RENAMED,
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help=f"LLaVA's instruction JSON, or '{DEMO}' for the demo's scenes",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="what the JSON's images are relative to"
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"take N records, drawn by the seed (default: all; of the demo {DEMO_SCENES} scenes)",
    )
    add_compression(parser)
    parser.add_argument("--num-train-epochs", type=int, metavar="N", help="default: 1")
    parser.add_argument(
        "--per-device-train-batch-size",
        type=int,
        metavar="N",
        help="records a process runs at once (default: 16)",
    )
    parser.add_argument(
        "--gradient-accumulation-steps",
        type=int,
        metavar="N",
        help="batches that make a step (default: 1)",
    )
    parser.add_argument(
        "--learning-rate", type=float, metavar="X", help="peak learning rate (default: 2e-5)"
    )
    parser.add_argument(
        "--warmup-ratio", type=float, metavar="X", help="share of steps it rises in (default: 0.03)"
    )
    parser.add_argument("--weight-decay", type=float, metavar="X", help="weight decay (default: 0)")
    parser.add_argument(
        "--max-grad-norm", type=float, metavar="X", help="largest gradient (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the records and their order (default: 0)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of the LLM (default: bf16 on a GPU that has it, else fp32)",
    )
    parser.add_argument(
        "--device", default="auto", help="torch's name (default: cuda where there is a GPU)"
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="keep the tower's features here, for other runs too (default: in FILE.work)",
    )
    parser.add_argument(
        "--save-steps", type=int, default=100, metavar="N", help="steps (default: 100)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run of this output")
    add_output(parser, f"FILE{SUFFIX}", "the projector to write")
    return parser


def _asked_budget(arguments: argparse.Namespace) -> Budget:
    """Return the budget as asked for."""
    parts = (arguments.dominant, arguments.contextual)
    if (arguments.tokens is None) == (parts == (None, None)) or (None in parts) != (
        parts == (None, None)
    ):
        raise BudgetError(
            f"got --tokens {arguments.tokens}, --dominant {parts[0]} and --contextual {parts[1]}",
            expected="either --tokens or the other two, as the export will have them",
        )
    if arguments.tokens is not None:
        return split_tokens(arguments.tokens, cls_token=not arguments.no_cls)
    return Budget(*parts, not arguments.no_cls)


def _check_data(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is read."""
    if (arguments.data == DEMO) != (arguments.images is None):
        cure = "leave it out" if arguments.images is not None else "give --images FOLDER"
        raise InvalidInputError(
            f"got --data {arguments.data} with --images {arguments.images}",
            expected=f"a folder for a JSON file and none for '{DEMO}'",
            cure=cure,
        )
    for name in ("count", "save_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise InvalidInputError(
                f"got --{option} {value}",
                expected="at least 1",
            )


def _data(arguments: argparse.Namespace, config: VisionConfig, seed: int) -> Data:
    from vzip.calibration.tuning.data import DemoData, InstructionData

    if arguments.data == DEMO:
        return DemoData(arguments.count or DEMO_SCENES, seed, config.tower.image_size)
    return InstructionData(Path(arguments.data), arguments.images)


def _device(name: str, local: int) -> torch.device:
    """Return where everything runs; of several processes on one machine each has a GPU."""
    import torch

    try:
        device = torch.device(name if name != "auto" else "cuda" if _cuda() else "cpu")
    except RuntimeError as error:
        raise InvalidInputError(
            f"got --device {name}",
            expected="torch's name of one, such as cpu or cuda",
        ) from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return device


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _recipe(arguments: argparse.Namespace, device: torch.device) -> Recipe:
    import torch

    from vzip.calibration.tuning.tune import Recipe

    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Recipe)
        if getattr(arguments, field.name) is not None
    }
    if "dtype" not in given:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        given["dtype"] = "bf16" if fast else "fp32"
    return Recipe(**given)
