"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from vzip.export.hardware import TARGETS
from vzip.export.plan.predict import Estimator, Fitting, Prediction, gb, short
from vzip.runtime.wording import counted


def table(plan: Estimator, rows: Sequence[Prediction]) -> str:
    """Return a plan as text of at most 100 columns: what it is of, the rows, and the legend."""
    return "\n".join([*_heading(plan), "", *_cells(plan, rows), "", *_legend(plan)])


def record(plan: Estimator, rows: Sequence[Prediction], advice: Fitting | None) -> dict[str, Any]:
    """Return the same as values that `json` writes: bytes, milliseconds, tokens a second."""
    return {
        "model": plan.model.name,
        "unit": plan.model.unit,
        "units": plan.model.units,
        "device": asdict(plan.device),
        "pace": asdict(plan.pace),
        "precision": plan.precision,
        "llm_weights": plan.weights,
        "text_tokens": plan.text_tokens,
        "rows": [{**asdict(row), "ttft_ms": row.ttft_ms, "fits": plan.fits(row)} for row in rows],
        "advice": advice and {"met": advice.met, "tokens": advice.row.tokens, "text": advice.text},
    }


def _heading(plan: Estimator) -> Iterator[str]:
    model, device, pace = plan.model, plan.device, plan.pace
    yield f"{model.name} on {device.name} ({device.title})"
    yield "Times and memory are predicted; nothing of this was run."
    speeds = ", ".join(f"{name} {short(value)}" for name, value in device.tflops.items())
    yield (
        f"ceilings: {speeds} TFLOPS, {short(device.bandwidth_gb)} GB/s, {device.memory_gb:.3g} GB "
        f"({device.source})"
    )
    yield (
        f"assumed: encoder {pace.encoder:.0%} of this, prefill {pace.prefill:.0%}, reading "
        f"{pace.reading:.0%}, {pace.start_us:g} µs a kernel; {device.usable_gb:.1f} GB usable"
    )
    per = "an image" if model.unit == "image" else f"{model.units} {model.unit}s"
    tokens, size = model.budgets[0], model.vision_parameters
    work = sum(model.vision_flops(tokens)) / 1e9
    times = ", ".join(f"{p} {short(plan.encoder_ms(tokens, p))} ms" for p in device.tflops)
    yield f"encoder: {_count(size)} numbers, {short(work)} GFLOP for {per}: {times}"
    yield (
        f"LLM: {model.llm.model_type}, {_count(model.llm_parameters)} numbers, "
        f"{gb(plan.weight_bytes)} GB in {plan.weights}, read once in {short(plan.weights_ms)} "
        f"ms; {counted(plan.text_tokens, 'token')} of text"
    )
    target = "" if device.target is None else TARGETS[device.target].note
    for note in filter(None, (target, device.note)):
        yield f"note on {device.name}: {note}"


def _cells(plan: Estimator, rows: Sequence[Prediction]) -> list[str]:
    unit = "tokens" if plan.model.unit == "image" else f"tokens/{plan.model.unit}"
    head = (unit, "split", "prompt", "encoder ms", "prefill ms", "TTFT ms", "answer/s",
            "KV MB", "memory GB", "cost")  # fmt: skip
    cells = [head, *(_row(plan, row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    shown = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return [shown[0], "  ".join("-" * width for width in widths), *shown[1:]]


def _row(plan: Estimator, row: Prediction) -> tuple[str, ...]:
    return (
        f"{'all ' if row.budget is None else ''}{row.tokens}",
        row.budget or "",
        str(row.llm_tokens),
        short(row.encoder_ms),
        short(row.prefill_ms),
        short(row.ttft_ms),
        short(row.tokens_per_second),
        f"{row.kv_bytes / 1e6:.0f}",
        gb(row.memory_bytes) + ("" if plan.fits(row) else " (!)"),
        f"{row.cost_share:.1%}",
    )


def _legend(plan: Estimator) -> Iterator[str]:
    yield f"TTFT: time to first token, encoder ({plan.precision}) and prefill; preprocessing and"
    yield "  the LLM program's overhead come on top. answer: tokens a second, for one question."
    yield "prompt: tokens of text and image together; the cache is of these."
    yield "memory: weights of both and the cache; (!) is more than the device has to give."
    yield "cost: the paper's T(4nd² + 2n²d + 2ndm) of the prefill, as a share of all tokens'."


def _count(value: int) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e7 else f"{value / 1e6:.2f} M"
