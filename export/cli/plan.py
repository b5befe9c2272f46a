"""`vzip plan`: what budgets would cost on a device; nothing heavy is imported for `-h`."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.export import EXPORT_PACKAGES
from vzip.export.cli.options import add_model
from vzip.export.hardware import DEVICES, HERE, find_device
from vzip.export.plan import predict as plan
from vzip.runtime.cli.options import Parser, numbers
from vzip.runtime.console import complain, emit, emit_json
from vzip.runtime.errors import InvalidInputError, require

TEXT_TOKENS = 64
"""LLaVA-1.5's prompt without its image has about forty tokens, a question some twenty."""

NONE_MEETS = 1


RENAMED = {
    "--device": "--target",
    "--budgets": "--tokens",
    "--latency-ms": "--max-latency-ms",
    "--ttft-ms": "--max-ttft-ms",
    "--memory-gb": "--max-memory-gb",
}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Predict the cost of budgets, and the largest that meets limits and fits.

    Returns:
        0; 1 if no budget meets the limits and fits the device.
    """
    arguments = _parser(prog).read(argv)
    limits = plan.PlanLimits(
        arguments.max_latency_ms, arguments.max_ttft_ms, arguments.max_memory_gb
    )
    if arguments.text_tokens < 0:
        raise InvalidInputError(
            f"got --text-tokens {arguments.text_tokens}",
            expected="0 or more",
        )
    known = None if arguments.target == HERE else find_device(arguments.target)
    require(*EXPORT_PACKAGES, needed_for=f"'{prog}'", extra="export")
    from vzip.export.plan.here import measure
    from vzip.export.plan.model import read_model
    from vzip.export.plan.table import record, table

    model = read_model(arguments.model)
    budgets = arguments.tokens or model.budgets
    for tokens in budgets:
        model.budget(tokens)  # before the machine is measured
    device = measure(model) if known is None else known
    made = plan.Estimator(model, device, arguments.llm_weights, arguments.text_tokens)
    advice = plan.advise(made, limits)
    asked = {*budgets, model.patches}
    if limits.any:
        asked.add(advice.row.tokens)
    rows = [made.predict(tokens) for tokens in sorted(asked)]
    if arguments.json:
        emit_json(record(made, rows, advice if limits.any or not advice.met else None))
    else:
        emit(table(made, rows))
    if not advice.met:
        complain(f"{prog}: error: {advice.text}")
        return NONE_MEETS
    if limits.any and not arguments.json:
        emit(f"\nrecommended (predicted): {advice.text}")
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Estimate latency and memory for several budgets on a machine, from the model's work and "
        "the machine's published ceilings: time of the encoder and of the LLM's prefill, speed of "
        "the answer, memory. With limits, recommend the largest budget that meets them all. Exit "
        "status 1 if none does, or nothing fits the machine.",
        table=True,
        renamed=RENAMED,
    )
    add_model(parser, revision=False)
    parser.add_argument(
        "--target",
        required=True,
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or {HERE}: this machine's CPU, measured in a few seconds",
    )
    parser.add_argument(
        "--tokens",
        type=numbers,
        metavar="K,K,…",
        help="tokens of an image, a tile or a frame (default: the paper's share of the patches)",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=TEXT_TOKENS,
        metavar="N",
        help="tokens of prompt and question beside the image's (default: %(default)s)",
    )
    parser.add_argument(
        "--llm-weights",
        choices=tuple(plan.BITS),
        default="fp16",
        help="what the LLM's weights are stored in (default: %(default)s)",
    )
    group = parser.add_argument_group("limits, of which a recommendation meets all")
    for name, what in (
        ("--max-latency-ms", "predicted latency of the encoder"),
        ("--max-ttft-ms", "predicted time of encoder and prefill, to the first token"),
        ("--max-memory-gb", "predicted memory of weights and cache, gigabytes of 10⁹ bytes"),
    ):
        group.add_argument(name, type=float, metavar="X", help=what)
    return parser
