"""The result of `vzip bench` as Markdown, as plots, and fit to be committed. Nothing is measured.

``result.json``, schema 1:

* ``what``, ``schema``, ``command``, ``started`` (UTC), ``environment`` (see
  `vzip.runtime.machine.record`), ``baseline``: name of the stack that ratios are of, or null.
* ``before``: of `vzip.export.bench.others.wait_until_idle`; ``warnings``: what a reader must know
  first, such as that the machine was in use.
* ``bundles``: a record each: ``name``, ``model``, ``weights``, ``precision``, ``tokens``, …
* ``rows``: one for each bundle, batch and stack that ran; one that was open in several groups (the
  baseline, a ceiling) has one for each group. All times are milliseconds of one call.

  - ``bundle``, ``tokens`` (K of the bundle), ``batch``, ``group``;
  - ``stack`` (``onnxruntime:int8``), and its parts ``kind`` (``ours``, ``peer``, ``ceiling``,
    ``phase``), ``name``, ``form``, ``precision``, ``device``;
  - ``median_ms``, ``p90_ms``, ``p99_ms``, ``min_ms``, ``iqr_ms``, ``calls``, ``turn_medians_ms``,
    ``drift``: see `vzip.runtime.machine.timing.summary`; ``images_per_s``; ``spread`` and
    ``unsteady``, ``others_cores``: see `vzip.export.bench.measure.summary`;
  - ``open_s``, ``first_call_ms``, ``warm_up_calls``, ``warm_ms``, ``peak_host_mib`` (the process,
    up to this batch), ``torch_reserved_mib``, ``python``, ``packages``;
  - ``agreement`` with the untouched model: `vzip.export.bench.judging.judged`, ``passed`` unless
    a benchmark gave pictures of its own, as what differs from the bundle's reference is not timed;
    a peer without compression has cosines of the kept patches alone;
  - ``flops`` of the call, ``gflop_per_s``, ``share_of_ceiling`` (of the rate of the multiplications
    alone), ``times_baseline`` (how many times as fast), ``times_baseline_best`` (by the fastest
    call of each), ``ratio_unsteady`` and ``share_unsteady``; null where it can't be said;
  - of an engine ``engine_ms``, ``host_ms``, ``on_device_ms`` and ``profile``
    (`vzip.export.inspect.engine_profile`, or ``error``); of preprocessing ``picture`` and
    ``pixels``; of copies ``bytes``.

* ``states``: the machine's state after every round.
* ``empty``: ``cell`` and ``why`` of what did not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from vzip.export.pages import figures, markdown
from vzip.export.pages.rendering import mailable
from vzip.runtime.wording import counted

Result = Mapping[str, Any]
Row = Mapping[str, Any]

COLUMNS: Final = (
    "stack", "median ms", "best", "p90", "p99", "IQR", "calls", "images/s", "× baseline", "best",
    "TFLOP/s", "of ceiling", "kept overlap", "cosine", "merged", "peak MiB", "open s", "first ms",
    "others' cores",
)  # fmt: skip
_BELIEVED: Final = 100  # times as fast or as slow: none is, beside another form of itself
COLOURS: Final[Mapping[str, str]] = {
    "ours": "#1f6feb", "peer": "#8b949e", "ceiling": "#d1572a", "phase": "#2c8a4b"
}  # fmt: skip


def without_paths(value: Any) -> Any:
    """Return a result with every absolute path cut to its last part: it may go to others."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    return mailable(value) if isinstance(value, str) else value


def sections(result: Result) -> Iterator[tuple[Mapping[str, Any], int, list[Row]]]:
    """Yield bundle, batch, and the rows that were timed together, the fastest first.

    What didn't fit into memory together has a section of its own, with a baseline of its own:
    ratios of different groups are not of the same moments. Phases are left out.
    """
    for bundle in result["bundles"]:
        rows = [
            row
            for row in result["rows"]
            if row["bundle"] == bundle["name"] and row["kind"] != "phase"
        ]
        for batch, group in dict.fromkeys((row["batch"], row["group"]) for row in rows):
            found = [row for row in rows if (row["batch"], row["group"]) == (batch, group)]
            yield bundle, batch, sorted(found, key=lambda row: row["median_ms"])


def phases(result: Result) -> list[Row]:
    """Return the rows of preprocessing and copies."""
    return [row for row in result["rows"] if row["kind"] == "phase"]


def heading(bundle: Mapping[str, Any], batch: int) -> str:
    """Return what a section is about."""
    return (
        f"{bundle['name']}: {bundle['tokens']} of {bundle['tower_tokens']} tokens "
        f"({bundle['dominant']} + {bundle['contextual']}, {bundle['merge']}), batch {batch}"
    )


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells, as `COLUMNS` has them; – is what can't be said of it."""
    agreement = row.get("agreement") or {}
    rate = row.get("gflop_per_s")
    other = "" if agreement.get("passed", True) else ", other tokens"
    return (
        row["stack"] + (f" ({row['chosen']})" if "chosen" in row else "") + other,
        _number(row["median_ms"]),
        _number(row["min_ms"]),
        _number(row["p90_ms"]),
        _number(row["p99_ms"]),
        _number(row["iqr_ms"]),
        str(row["calls"]),
        _number(row["images_per_s"]),
        ratio(row),
        "–" if row.get("times_baseline_best") is None else f"{row['times_baseline_best']:.2f}×",
        "–" if rate is None else f"{rate / 1000:.3g}",
        share(row),
        _optional(agreement.get("kept_overlap"), 4),
        _optional(agreement.get("mean_cosine"), 6),
        _optional(agreement.get("contextual_cosine"), 4),
        f"{row['peak_host_mib']:.0f}",
        f"{row['open_s']:.1f}",
        _optional(row.get("first_call_ms"), 0),
        _optional(row.get("others_cores"), 2),
    )


def ratio(row: Row) -> str:
    """Return how many times as fast as the baseline, or that the run is too unsteady to say it.

    The ratio of an unsteady run is given roughly, and not at all where it is out of all proportion.
    """
    times = row.get("times_baseline")
    if times is None:
        return "–"
    if not row.get("ratio_unsteady"):
        return f"{times:.2f}×"
    why = f"spread {row['spread']:.0%}" if row["unsteady"] else "baseline"
    return _unsteady(times, f"{times:.2g}×", why)


def share(row: Row) -> str:
    """Return a row's share of the ceiling, or that the run is too unsteady to say it."""
    part = row.get("share_of_ceiling")
    if part is None:
        return "–"
    if not row.get("share_unsteady"):
        return f"{part:.0%}"
    why = f"spread {row['spread']:.0%}" if row["unsteady"] else "ceiling"
    return _unsteady(part, f"{100 * part:.2g}%", why)


def _unsteady(ratio: float, text: str, why: str) -> str:
    if not 1 / _BELIEVED < ratio < _BELIEVED:
        return f"unsteady ({why})"
    return f"about {text}, unsteady ({why})"


def facts(result: Result) -> list[tuple[str, str]]:
    """Return what the numbers depend on, as name and value."""
    place = result["environment"]
    state = place["state"]
    gpus = ", ".join(gpu["name"] for gpu in state["nvidia_smi"] or [])
    clocks = place["cpu_mhz"]
    return [
        ("command", result["command"]),
        ("started", result["started"]),
        ("processor", f"{place['processor']}, {counted(place['cores'], 'core')}"),
        ("instructions", ", ".join(place["instructions"]) or "not said"),
        ("GPU", gpus or place["jetson"] or "none"),
        # Results of before have none.
        *([("power mode", place["power_mode"])] if place.get("power_mode") else []),
        ("memory", f"{place['memory_mib']} MiB"),
        ("clocks", "the kernel doesn't say" if clocks is None else f"{clocks} MHz"),
        ("governor", place["governor"] or "the kernel doesn't say"),
        ("threads", ", ".join(f"{k}={v}" for k, v in place["threads"].items()) or "no bound set"),
        ("load before", _load(result)),
        ("system", f"{place['system']}, Python {place['python']}"),
        ("packages", ", ".join(f"{name} {each}" for name, each in place["packages"].items())),
    ]


def _load(result: Result) -> str:
    """Return what kept the machine busy before, as far as the result says so."""
    average = f"{result['environment']['state']['load']}, the average over a minute"
    before = result.get("before")
    if before is None or before["others_cores"] is None:
        return average
    waited = f" after {before['waited_s']:.0f} s of waiting" if before["waited_s"] else ""
    others = f"{before['others_cores']} of {counted(before['cores'], 'core')} in use{waited}"
    return f"{others} (load {average})"


def table(result: Result) -> str:
    """Return the result as Markdown."""
    lines = [f"{result['what']}.", ""]
    lines += [line for each in result.get("warnings", ()) for line in (f"**Warning: {each}.**", "")]
    if result["baseline"] is not None:
        said = (
            f"× baseline: how many times as fast as `{result['baseline']}`, the median of the "
            "ratios of their turns; best: of the fastest call of each. Unsteady: its quartiles or "
            "the baseline's are more than a third of the median apart. Of ceiling: share of the "
            "rate at which the encoder's matrix multiplications alone ran beside it, in the same "
            "precision. IQR: distance of the quartiles. Others' cores: kept busy by other programs "
            "during its turns."
        )
        lines += [said, ""]
    for bundle, batch, rows in sections(result):
        shown = markdown.table(COLUMNS, map(cells, rows))
        lines += [f"### {heading(bundle, batch)}", "", *shown, ""]
    if beside := phases(result):
        columns = ("bundle", "phase", "batch", "median ms", "p90", "p99", "calls")
        shown = markdown.table(columns, map(phase_cells, beside))
        lines += ["### Beside the encoder", "", *shown, ""]
    if result["empty"]:
        empty = [(each["cell"], each["why"]) for each in result["empty"]]
        lines += ["### Not run", "", *markdown.table(("cell", "why"), empty), ""]
    lines += [f"* {name}: {value}" for name, value in facts(result)]
    return "\n".join(lines) + "\n"


def phase_cells(row: Row) -> tuple[str, ...]:
    """Return a phase's cells: bundle, what, batch, times, calls."""
    what = row["stack"]
    if "pixels" in row:
        what = f"{row['name']}, {row['picture']} ({row['pixels'][0]} × {row['pixels'][1]})"
    times = (_number(row[name]) for name in ("median_ms", "p90_ms", "p99_ms"))
    return (row["bundle"], what, str(row["batch"]), *times, str(row["calls"]))


def plot(result: Result, kind: Literal["svg", "png"]) -> bytes:
    """Return the medians as bars, one panel for each bundle and batch.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    panels = list(sections(result))
    heights = [max(2, len(rows)) for _, _, rows in panels]
    size = (9, 0.24 * sum(heights) + 0.9 * len(panels) + 0.4)
    figure = figures.figure(size, needed_for="the plot of a benchmark")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (bundle, batch, rows) in zip(axes, panels, strict=True):
        slowest_first = rows[::-1]
        medians = [row["median_ms"] for row in slowest_first]
        panel.barh(
            [row["stack"] for row in slowest_first],
            medians,
            color=[COLOURS[row["kind"]] for row in slowest_first],
            xerr=[row["iqr_ms"] / 2 for row in slowest_first],
            error_kw={"ecolor": "#1c2128", "elinewidth": 0.8, "capsize": 2},
        )
        for place, row in enumerate(slowest_first):
            said = "" if row.get("times_baseline") is None else f"  {ratio(row)}"
            text = f" {_number(row['median_ms'])}{said}"
            end = (row["median_ms"] + row["iqr_ms"] / 2, place)
            panel.annotate(text, end, va="center", fontsize=7,
                           xytext=(3, 0), textcoords="offset points")  # fmt: skip
        panel.set_title(heading(bundle, batch).replace("$", r"\$"), fontsize=10, loc="left")
        panel.set_xlim(0, 1.18 * max(row["median_ms"] + row["iqr_ms"] / 2 for row in rows))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("ms a call, median; whiskers: distance of the quartiles", fontsize=8)
    return figures.drawn(figure, kind)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _optional(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
