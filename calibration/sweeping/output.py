"""A sweep as a table in Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vzip.export.pages import figures, markdown
from vzip.export.pages.rendering import byte_unit, mailable, size
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.calibration.sweeping.advice import Advice
    from vzip.calibration.sweeping.measure import Row, Sweep

_COLOURS = ("#1f6feb", "#d1572a", "#2c8a4b", "#8250df")
_GREY = "#6b7280"


def table(sweep: Sweep, advice: Advice | None) -> str:
    """Return the sweep as Markdown: what was measured and how, the rows, the advice."""
    llm, machine = sweep.llm, sweep.machine
    per = "" if sweep.unit == "image" else f" per {sweep.unit}, {sweep.units} {sweep.unit}s"
    dtype = f"{llm.dtype}{' (assumed)' if llm.dtype_assumed else ''}"
    measured = (
        f"Agreement on {counted(sweep.images, 'image')} ({_code(sweep.source)}): of every patch's "
        "embedding with that of the token that stands for it, cosines weighted by attention. "
        f"Encoder: one {sweep.unit}, ONNX Runtime {machine['packages']['onnxruntime']}, FP32, "
        f"median and distance of the quartiles of {sweep.everything.latency.calls} calls in turn, "
        f"on {counted(machine['cores'], 'core')} ({machine['system']}, load "
        f"{machine['state']['load']}). LLM: a {_code(llm.model_type)} with "
        f"{counted(llm.layers, 'layer')} and hidden size {llm.hidden_size}, "
        f"{counted(sweep.text_tokens, 'token')} of text beside the image's; prefill "
        f"T(4nd² + 2n²d + 2ndm), predicted; KV cache in {dtype}, predicted."
    )
    lines = [f"# Budgets of {_code(_model(sweep))}", "", measured, ""]
    if sweep.questions is not None:
        asked = sweep.questions
        said = (
            f"Accuracy on {counted(asked['questions'], 'question')} about {asked['scenes']} "
            f"held-out scenes (seed {asked['seed']}) ± its standard error."
        )
        lines += [said, ""]
    heading = [
        f"tokens{per}",
        "dominant + contextual",
        "merge",
        "agreement",
        "attention kept",
        *(["accuracy"] if sweep.questions is not None else []),
        "encoder ms",
        "LLM tokens",
        "prefill GFLOP",
        "KV cache",
    ]
    rows = (sweep.everything, *sweep.rows)
    lines += markdown.table(heading, [_cells(row, sweep) for row in rows])
    if advice is not None:
        lines += ["", f"**{'Recommended' if advice.met else 'No budget meets it'}**: {advice.text}"]
    return "\n".join(lines) + "\n"


def plot(sweep: Sweep, advice: Advice | None, kind: Literal["svg", "png"]) -> bytes:
    """Return the sweep as a picture of four panels.

    Args:
        sweep: With at least one row.
        advice: Its row is marked.
        kind: The file's format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = figures.figure((10, 6.8), needed_for="the plot of a sweep")
    (kept, latency), (prefill, cache) = figure.subplots(2, 2, sharex=True)
    everything = sweep.everything
    by_merge = {row.merge: [r for r in sweep.rows if r.merge == row.merge] for row in sweep.rows}
    for (merge, rows), colour in zip(by_merge.items(), _COLOURS, strict=False):
        tokens = [row.tokens for row in rows]
        label = f", {merge}" if len(by_merge) > 1 else ""
        kept.plot(
            tokens, [r.agreement for r in rows], "o-", color=colour, label=f"agreement{label}"
        )
        if everything.accuracy is not None:
            errors = [row.accuracy_error for row in rows]
            shares = [row.accuracy for row in rows]
            style = {"color": colour, "capsize": 3, "label": f"accuracy{label}"}
            kept.errorbar(tokens, shares, errors, fmt="s--", **style)
        latency.errorbar(
            tokens,
            [row.latency.median_ms for row in rows],
            [row.latency.iqr_ms / 2 for row in rows],
            fmt="o-",
            color=colour,
            capsize=3,
            label=merge,
        )
    single = next(iter(by_merge.values()))  # the LLM's cost doesn't depend on the merge
    tokens = [row.tokens for row in single]
    scale, unit = byte_unit(everything.kv_bytes)
    prefill.plot(tokens, [row.prefill_flops / 1e9 for row in single], "o-", color=_COLOURS[2])
    cache.plot(tokens, [row.kv_bytes / scale for row in single], "o-", color=_COLOURS[2])
    if everything.accuracy is not None:
        label = f"accuracy, all {counted(everything.tokens, 'token')}"
        kept.axhline(everything.accuracy, color=_GREY, linestyle=":", label=label)
    for panel, value in (
        (latency, everything.latency.median_ms),
        (prefill, everything.prefill_flops / 1e9),
        (cache, everything.kv_bytes / scale),
    ):
        panel.axhline(
            value, color=_GREY, linestyle=":", label=f"all {counted(everything.tokens, 'token')}"
        )
        panel.set_ylim(bottom=0)
    titles = (
        (kept, "what is kept", "share"),
        (latency, "encoder latency, measured", "ms (bars: quartile distance)"),
        (prefill, "LLM prefill, predicted", "GFLOP"),
        (cache, "KV cache, predicted", unit),
    )
    for panel, title, axis in titles:
        panel.set_title(title, fontsize=11, loc="left")
        panel.set_ylabel(axis)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if advice is not None and advice.met:
            panel.axvline(advice.row.tokens, color=_COLOURS[3], alpha=0.35, linewidth=6, zorder=0)
        panel.legend(fontsize=8, frameon=False)
    for panel in (prefill, cache):
        panel.set_xlabel(f"tokens per {sweep.unit}")
    # A `$` would begin a formula in a model's name.
    name = sweep.model.rsplit("/", 1)[-1].replace("$", r"\$")
    marked = f"; marked: {advice.row.name}" if advice is not None and advice.met else ""
    figure.suptitle(f"Budgets of {name}{marked}", fontsize=12, x=0.01, ha="left")
    return figures.drawn(figure, kind)


def _model(sweep: Sweep) -> str:
    """Return the model's id; of a local folder its name alone."""
    return mailable(sweep.model, sweep.model) if Path(sweep.model).is_absolute() else sweep.model


def _cells(row: Row, sweep: Sweep) -> Sequence[str]:
    everything = sweep.everything
    split = "all patches" if row.dominant is None else f"{row.dominant} + {row.contextual}"
    accuracy = []
    if row.accuracy is not None and row.accuracy_error is not None:
        accuracy = [f"{100 * row.accuracy:.1f} ± {100 * row.accuracy_error:.1f} %"]
    flops = row.prefill_flops / 1e9
    return [
        str(row.tokens),
        split,
        row.merge or "",
        f"{row.agreement:.4f}",
        f"{row.attention_kept:.4f}",
        *accuracy,
        f"{row.latency.median_ms:.1f} ± {row.latency.iqr_ms:.1f}",
        str(row.llm_tokens),
        f"{flops:.4g} ({100 * row.prefill_flops / everything.prefill_flops:.0f} %)",
        f"{size(row.kv_bytes)} ({100 * row.kv_bytes / everything.kv_bytes:.0f} %)",
    ]


def _code(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
