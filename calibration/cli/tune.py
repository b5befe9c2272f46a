"""`vzip tune`: a projector that knows compressed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vzip.calibration.tuning.data import DEMO, DEMO_SCENES
from vzip.calibration.tuning.tune import SUFFIX, tune
from vzip.export.cli.options import add_compression, add_model, selection_options
from vzip.runtime.cli.options import Parser, add_output
from vzip.runtime.console import emit

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
    """Tune a projector."""
    arguments = _parser(prog).read(argv)
    chosen = selection_options(arguments)
    options = vars(arguments)
    for name in ("quiet", "verbose"):
        del options[name]
    cls_token = not options.pop("no_cls")
    projector = tune(cls_token=cls_token, selection_options=chosen, **options)
    if projector is not None:  # one of several processes speaks
        emit(str(projector))
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
    group = parser.add_argument_group("training, by the names of Hugging Face's Trainer")
    for name, default, what in (
        ("--num-train-epochs", 1, "how often every record is seen"),
        ("--per-device-train-batch-size", 16, "records that a process runs at once"),
        ("--gradient-accumulation-steps", 1, "batches that make a step"),
        ("--learning-rate", 2e-5, "the highest rate of the run"),
        ("--warmup-ratio", 0.03, "share of the steps in which the rate rises to its highest"),
        ("--weight-decay", 0.0, "of matrices"),
        ("--max-grad-norm", 1.0, "largest norm of a step's gradient"),
        ("--save-steps", 100, "steps between two states on disk"),
        ("--seed", 0, "of the records and their order"),
    ):
        group.add_argument(
            name,
            type=type(default),
            default=default,
            metavar="N" if isinstance(default, int) else "X",
            help=f"{what} (default: %(default)s)",
        )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of the LLM (default: bf16 on a GPU that has it, else fp32)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="PyTorch's name of the device, such as cuda:1 (default: cuda where there is a GPU)",
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="keep the tower's features here, for other runs too (default: in FILE.work)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run of this output")
    add_output(parser, f"FILE{SUFFIX}", "the projector to write")
    return parser
