"""Write the README's tables from benchmarks/results: ``python -m benchmarks.readme``.

`tests/test_readme.py` fails when a table is not what its result file gives. Where there is no
result file, the README says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.bundles import CPU_ENGINE_STACKS
from benchmarks.harness.results import RESULTS
from benchmarks.real_towers import COLUMNS, fastest
from benchmarks.real_towers import rows as rows_of_tower
from vzip.export.pages import markdown
from vzip.runtime.agreement import CPU_FORM

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FEWEST = 64  # tokens
AIM = 8.0  # times the published form, on a CPU
# Cosine of each token of a peer that counts as the same: more than is asked of an engine.
_LOWEST = 0.99


def demo_accuracy(result: dict[str, Any]) -> str:
    """Return the demo model's table in short: one line a budget."""
    rows = {(row["name"], row["tokens"]): row for row in result["rows"]}
    full = rows["all tokens", result["patches"]]
    wrong = rows["all tokens of another picture", result["patches"]]
    budgets = sorted({row["tokens"] for row in result["rows"]} - {result["patches"]}, reverse=True)
    columns = (
        "VisionZip, average, with CLS",
        "VisionZip, sum, with CLS",
        "uniform grid",
        "random",
    )
    heading = (
        f"Held-out accuracy with all {result['patches']} tokens: {full['accuracy']:.1%} of "
        f"{sum(result['questions'].values())} questions (with another picture's tokens: "
        f"{wrong['accuracy']:.1%}). What is left of it with fewer:"
    )
    lines = [
        heading,
        "",
        "| tokens | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for tokens in budgets:
        kept = (f"{rows[column, tokens]['kept']:.1%}" for column in columns)
        lines.append(f"| {tokens} ({tokens / result['patches']:.0%}) | " + " | ".join(kept) + " |")
    return "\n".join(lines)


def export_cost(result: dict[str, Any]) -> str:
    """Return one sentence about what an export at full size costs."""
    checked, plain = result["median"]["with parity check"], result["median"]["without"]
    runs, where = result["runs"]["without"], result["environment"]
    text = (
        f"`{result['command']}`: {checked['wall_s']:.0f} s and {checked['peak_gb']:.1f} GB at its "
        f"peak with the parity check, {plain['wall_s']:.0f} s and {plain['peak_gb']:.1f} GB "
        f"without (medians of {len(runs)} on {where['cores']} cores, {where['processor']}). "
        "No 7B model is ever built."
    )
    if built := result["median"].get("build"):
        text += (
            f" `{result['build_command']}`, ahead of time and without a GPU: "
            f"{built['wall_s']:.0f} s, {built['peak_gb']:.1f} GB."
        )
    return text


def handoff(result: dict[str, Any]) -> str:
    """Return the table of the local LLMs that ran on this machine."""
    from benchmarks.handoff import table

    return table(result).rstrip("\n")


HEADLINE_TOWER = "clip-b16-384"  # trained, with LLaVA-1.5's 576 patches


def headline(whole: dict[str, Any]) -> str:
    """Return how much faster than the published form the fastest of our stacks is, on a real tower.

    Args:
        whole: As `benchmarks.real_towers` writes it.
    """
    result = whole["towers"].get(HEADLINE_TOWER)
    if result is None:
        command = f"python -m benchmarks.real_towers --towers {HEADLINE_TOWER}"
        return f"Not measured yet: `{command}` does."
    rows = _rows(result, FEWEST, 1)
    bundle = result["bundles"][0]
    patches = bundle["tower_tokens"] - 1
    what = f"{result['about']}, one image, {bundle['tokens']} of {patches} tokens"
    ours = fastest(result)
    if ours is None:
        return f"No stack of vzip's agrees with the untouched model on {what} ({_place(result)})."
    found, form = ours["agreement"], f" ({ours['chosen']})" if ours.get("chosen") else ""
    return (
        f"**{_times(ours)} as fast as VisionZip's published PyTorch form** on "
        f"a CPU, with trained weights: {what}, `{ours['stack']}`{form} {ours['median_ms']:.0f} ms, "
        f"`{result['baseline']}` {rows[result['baseline']]['median_ms']:.0f} ms, side by side on "
        f"{_place(result)}; on {found['images']} photographs held apart, kept tokens "
        f"{found['kept_overlap']:.1%} the same as the untouched model's, cosine "
        f"{found['mean_cosine']:.4f}, of merged tokens {found['contextual_cosine']:.4f} "
        f"(`{result['command']}`).{_best(ours, rows[result['baseline']])}"
    )


def headline_random(result: dict[str, Any]) -> str:
    """Return the same of LLaVA-1.5's larger encoder, with random weights."""
    rows = _rows(result, FEWEST, 1)
    base = rows[result["baseline"]]
    own = [row for row in rows.values() if row["kind"] == "ours" and _agrees(row)]
    if not own:
        return "With random weights no stack of vzip's agrees with the untouched model."
    ours = min(own, key=_median)
    return (
        f"With random weights, at the size of LLaVA-1.5's own encoder: "
        f"{_times(ours)}, one image, {FEWEST} of 576 tokens, "
        f"`{ours['stack']}` {ours['median_ms']:.0f} ms, "
        f"`{base['stack']}` {base['median_ms']:.0f} ms, on {_place(result)}; kept tokens "
        f"{ours['agreement']['kept_overlap']:.1%} the same, cosine "
        f"{ours['agreement']['mean_cosine']:.4f} (`{result['command']}`).{_best(ours, base)}"
    )


def real_towers(whole: dict[str, Any]) -> str:
    """Return the table of towers in short: the published form, ours, and what fails."""
    columns = ("tower", "precision", "stack", "kept overlap", "cosine", "worst", "merged cosine",
               "ms", "× published", "agrees")  # fmt: skip
    places = [COLUMNS.index(each) for each in (*columns[:4], "cosine, mean", *columns[5:])]
    lines = [
        [line[place] for place in places]
        for name, result in whole["towers"].items()
        for line in rows_of_tower(name, result)
    ]
    # What falls short stands in the whole table.
    cells = [(*line[:-1], "yes" if line[-1] == "yes" else "no") for line in lines]
    return "\n".join(markdown.table(columns, cells))


def encoder(result: dict[str, Any]) -> str:
    """Return the encoder's table in short: one line a stack, its other budgets and batches beside.

    Args:
        result: As `vzip.export.bench.output` describes it.
    """
    wide = {
        (row["tokens"], row["batch"]): None
        for row in result["rows"]
        if row["kind"] in ("ours", "peer") and (row["tokens"], row["batch"]) != (FEWEST, 1)
    }
    others = {place: _rows(result, *place) for place in sorted(wide)}
    heads = [f"{tokens} tokens, batch {batch}" for tokens, batch in others]
    columns = [
        f"stack, {FEWEST} tokens, batch 1", "ms", "times as fast", "of ceiling", "kept overlap",
        "cosine", "of merged tokens", *heads,
    ]  # fmt: skip
    lines = [
        (
            f"Milliseconds of a call, medians on {_place(result)}. Times as fast: as "
            f"`{result['baseline']}` in the same turns. Of ceiling: of the rate of the matrix "
            "multiplications alone, in the same precision. Cosine: of kept tokens, and of merged "
            "ones, with the untouched model's."
        ),
        "",
    ]
    cells = []
    rows = _rows(result, FEWEST, 1)
    group = rows[result["baseline"]].get("group")
    for stack, row in sorted(rows.items(), key=lambda each: _median(each[1])):
        agreement = row.get("agreement") or {}
        name = f"**`{stack}`**" if row["kind"] == "ours" else f"`{stack}`"
        cells.append(
            (
                name if row.get("group") == group else f"{name} †",
                f"{row['median_ms']:.0f}",
                _cell(row["times_baseline"], ".2f", _mark(row)),
                _cell(row["share_of_ceiling"], ".0%"),
                _cell(agreement.get("kept_overlap"), ".4f"),
                _cell(agreement.get("mean_cosine"), ".5f"),
                _cell(agreement.get("contextual_cosine"), ".3f"),
                *(_cell(other.get(stack, {}).get("median_ms"), ".0f") for other in others.values()),
            )
        )
    lines += markdown.table(columns, cells)
    lines += _other_turns(result, group)
    return "\n".join([*lines, "", *_aims(rows), *_empty(result)])


def _other_turns(result: dict[str, Any], group: int | None) -> list[str]:
    """Return what the dagger says: how fast the baseline was in the turns of other groups."""
    bases = [
        f"{row['median_ms']:.0f}"
        for row in result["rows"]
        if row["stack"] == result["baseline"] and row.get("group") != group
        and (row["tokens"], row["batch"]) == (FEWEST, 1)
    ]  # fmt: skip
    if not bases:
        return []
    return [
        "",
        f"† In turns of their own, with `{result['baseline']}` at {' and '.join(bases)} ms.",
    ]


def _aims(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return which of the aims on a CPU were met, as lines of a list.

    Args:
        rows: Stack → its row.
    """
    engines = [rows[name] for name in CPU_ENGINE_STACKS if name in rows]
    fastest, own = next(iter(engines), None), rows.get("onnxruntime:fp32")
    if fastest is None or own is None:
        return []
    faster = [
        (name, row)
        for name, row in sorted(rows.items(), key=lambda each: _median(each[1]))
        if row["kind"] == "peer" and _median(row) < _median(fastest)
    ]
    same = [f"`{name}` ({row['median_ms']:.0f} ms)" for name, row in faster if _agrees(row)]
    other = [
        f"`{name}` ({row['median_ms']:.0f} ms, cosine of merged tokens "
        f"{row['agreement']['contextual_cosine']:.2f})"
        for name, row in faster
        if not _agrees(row)
    ]
    plain = {
        name: row
        for name, row in rows.items()
        if row["kind"] == "peer" and name.endswith(":fp32") and "onnxruntime" not in name
    }
    best = min(plain, key=lambda name: _median(plain[name]))
    times = fastest["times_baseline"]
    ahead = f"Missed: {', '.join(same)} against {fastest['median_ms']:.0f} ms." if same else "Met."
    if other:
        ahead += f" Faster, with other tokens: {', '.join(other)}."
    slower = _median(own) > _median(plain[best])
    return [
        f"* Aim: 8 times the published form. {'Met' if times >= AIM else 'Missed'}: {times:.1f}.",
        (
            "* Aim: ahead of every peer that keeps and merges the same tokens (overlap "
            f"{CPU_FORM.overlap}, cosines {_LOWEST}). {ahead}"
        ),
        (
            f"* Aim: FP32 no slower than the best peer. {'Missed' if slower else 'Met'}: "
            f"{own['median_ms']:.0f} against {plain[best]['median_ms']:.0f} ms (`{best}`)."
        ),
    ]


def _agrees(row: dict[str, Any]) -> bool:
    """Say whether a stack passes what a form has to pass to be chosen as the fastest."""
    found = row["agreement"]
    limits = {
        "kept_overlap": CPU_FORM.overlap,
        "min_cosine": _LOWEST,
        "contextual_cosine": _LOWEST,
    }
    return all(limit is not None and found[name] >= limit for name, limit in limits.items())


def end_to_end(result: dict[str, Any]) -> str:
    """Return what all tokens and the fewest cost, a line for each LLM, runner and model.

    Args:
        result: As `benchmarks.end_to_end` writes it.
    """
    columns = (
        "LLM, runner", "model", "image tokens", "time to first token", "faster", "prefill faster",
        "cost model says", "tokens/s", "KV cache", "peak",
    )  # fmt: skip
    lines = [
        (
            f"True shapes, random weights, {result['text_tokens']} tokens of text; medians on "
            f"{_place(result)}. The encoder is PyTorch's with SDPA, in BF16."
        ),
        "",
    ]
    cells = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["llm"], row["runner"], row["model"]), []).append(row)
    for (llm, runner, model), rows in groups.items():
        rows.sort(key=lambda row: row["tokens"])
        few, full = rows[0], rows[-1]
        times = [
            None if each["ttft_ms"] is None else each["ttft_ms"] / 1000 for each in (full, few)
        ]
        cells.append(
            (
                f"{llm}, {runner}",
                model,
                f"{full['tokens']} → {few['tokens']}",
                "–" if None in times else " → ".join(_cell(each, ".2f") for each in times) + " s",
                _cell(few["ttft_ratio"], ".1f", "×"),
                f"{few['prefill_ratio']:.1f}×",
                f"{few['predicted_ratio']:.1f}×",
                f"{full['decode_tokens_per_s']:.2f} → {few['decode_tokens_per_s']:.2f}",
                f"{full['kv_bytes'] / 1e6:.0f} → {few['kv_bytes'] / 1e6:.0f} MB",
                f"{full['peak_bytes'] / 1e9:.1f} → {few['peak_bytes'] / 1e9:.1f} GB",
            )
        )
    return "\n".join([*lines, *markdown.table(columns, cells), *_empty(result)])


def small_costs(result: dict[str, Any]) -> str:
    """Return the costs around the encoder in a few sentences."""

    def span(way: str) -> str:
        times = [row["ms"][way]["median_ms"] for row in result["preprocessing"]]
        return f"{min(times):.0f} to {max(times):.0f} ms"

    *_, opened = result["open"]
    open_ms = {name: timing["median_ms"] for name, timing in opened["ms"].items()}
    imported = {name: timing["median_ms"] for name, timing in result["import"].items()}
    run, *_ = result["host"]["ms"].values()
    return (
        f"* A JPEG of 12 megapixels to pixel values: {span('exact')}, bit for bit transformers' "
        f"({span('transformers')}); {span('draft')} with a draft, whose tokens are "
        f"{result['draft_agreement']['mean_overlap']:.1%} the same. The aim was "
        f"{result['aim_ms']:.0f} ms; reading the file's coefficients alone takes "
        f"{span('coefficients')}.\n"
        f"* Importing `VisionEncoder`: {imported['VisionEncoder']:.0f} ms, of which numpy and "
        f"Pillow {imported['numpy and Pillow']:.0f} (Python itself {imported['python']:.0f}).\n"
        f"* Opening {opened['megabytes']:.0f} MB with every check: "
        f"{open_ms['VisionEncoder.open'] / 1000:.2f} s, ONNX Runtime alone "
        f"{open_ms['ONNX Runtime alone'] / 1000:.2f} s.\n"
        f"* A call's checks on the host: {1000 * run['median_ms']:.0f} µs.\n\n"
        f"Medians on {_place(result)}."
    )


def _rows(result: dict[str, Any], tokens: int, batch: int) -> dict[str, dict[str, Any]]:
    """Return stack → its row at a budget and batch; of several groups, the first."""
    found: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        if (row["tokens"], row["batch"]) == (tokens, batch) and row["kind"] in ("ours", "peer"):
            found.setdefault(row["stack"], row)
    return found


def _median(row: dict[str, Any]) -> float:
    return float(row["median_ms"])


def _place(result: dict[str, Any]) -> str:
    where, before = result["environment"], result.get("before")
    place = f"{where['cores']} cores, {where['processor']}"
    if before is not None and before["others_cores"] is not None:
        return f"{place} ({before['others_cores']} of them in use by others)"
    load = where.get("state", {}).get("load")
    return place if load is None else f"{place} (load before: {load})"


def _times(row: dict[str, Any]) -> str:
    """Return how many times as fast as the baseline, and whether that is unsteady."""
    return f"{row['times_baseline']:.1f} times{_mark(row)}"


def _mark(row: dict[str, Any]) -> str:
    return " (unsteady)" if row.get("ratio_unsteady") else ""


def _best(ours: dict[str, Any], base: dict[str, Any]) -> str:
    """Return the ratio of the fastest calls, in which other load counts least."""
    if "min_ms" not in ours or "min_ms" not in base:
        return ""
    one, other = ours["min_ms"], base["min_ms"]
    return f" Fastest calls: {one:.0f} and {other:.0f} ms, {other / one:.1f} times."


def _cell(value: float | None, form: str, unit: str = "") -> str:
    """Return a cell; – where there is nothing to say."""
    return "–" if value is None else f"{value:{form}}{unit}"


def _empty(result: dict[str, Any]) -> list[str]:
    """Return what was not measured, and why, as lines of a list."""
    if not result["empty"]:
        return []
    return ["", *(f"* Not run: {each['cell']}: {each['why']}" for each in result["empty"])]


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "headline": ("real_towers", headline),
    "headline_random": ("encoder", headline_random),
    "real_towers": ("real_towers", real_towers),
    "encoder": ("encoder", encoder),
    "end_to_end": ("end_to_end", end_to_end),
    "end_to_end_7b": ("llama-2-7b/end_to_end", end_to_end),
    "small_costs": ("small_costs", small_costs),
    "demo_accuracy": ("demo_accuracy", demo_accuracy),
    "export_cost": ("export_cost", export_cost),
    "handoff": ("handoff", handoff),
}
"""Table → its result file, which the command of that name writes, and what renders it."""


def with_tables(readme: str, results: Path = RESULTS) -> str:
    """Return the README's text with every table as its result file gives it."""
    for name, (source, render) in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = readme.split(begin)
        _, tail = rest.split(end)
        path = results / f"{source}.json"
        if path.exists():
            table = render(json.loads(path.read_text()))
        else:
            table = f"Not measured yet: `python -m benchmarks.{Path(source).name}` does."
        readme = f"{head}{begin}{table}\n{end}{tail}"
    return readme


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
