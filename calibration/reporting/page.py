"""A report as one web page; `vzip.export.pages.rendering` says what it may hold.

The sentences are in `report.jinja`; here are the rows of its tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from vzip.calibration.reporting.content import Content, Graph, LayerRow, Savings
from vzip.export.pages.rendering import bar, code, digits, mailable, missed, render, size
from vzip.runtime.agreement import missed_limits, missed_shown
from vzip.runtime.wording import counted

Cells = tuple[str, ...]


def page(content: Content) -> str:
    """Return the page, UTF-8 text."""
    assert __package__ is not None
    manifest = content.manifest
    own = content.graphs[0].precision
    return render(
        __package__,
        "report.jinja",
        title=f"{_model(content)}, {counted(manifest.selection.tokens, 'token')}",
        content=content,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=list(_tiles(content)),
        facts=_facts(content),
        files=[
            (name, size(each.bytes), code(each.sha256)) for name, each in manifest.files.items()
        ],
        parity=_parity(content),
        missed=_missed(content),
        short=_short,
        precisions=[_precision(graph) for graph in content.graphs],
        effects=lambda graph: _effects(graph, own),
        latency=_latency(content),
        accuracy=list(_accuracy(content)),
        savings=list(_savings(content.savings)),
    )


def _tiles(content: Content) -> Iterator[Cells]:
    """Yield the numbers at the top of the page, each with what it is."""
    manifest, own = content.manifest, content.graphs[0]
    yield f"{manifest.selection.tokens} of {manifest.tower.tokens}", "tokens"
    if isinstance(content.savings, Savings):
        saved = content.savings
        share = 1 - saved.llm.kv_bytes(saved.tokens) / saved.llm.kv_bytes(saved.all_tokens)
        yield f"−{100 * share:.0f} %", "KV cache, predicted"
    if own.timing is not None:
        yield f"{own.timing.median_ms:.1f} ms", f"encoder in {own.precision}, measured"
    if own.accuracy is not None:
        yield f"{100 * own.accuracy[0]:.1f} %", f"accuracy in {own.precision}"
    for graph in content.graphs[1:]:
        if graph.calibration is not None:
            overlap = graph.calibration.agreement["mean_overlap"]
            yield f"{overlap:.3f}", f"of the kept tokens stay in {graph.precision}"


def _model(content: Content) -> str:
    """Return the model's id; of a local folder its name alone."""
    model = content.manifest.model.id
    return mailable(model, model) if Path(model).is_absolute() else model


def _parity(content: Content) -> list[Cells]:
    """Return the numbers of `vzip check`; one that misses its limit says so, in red."""
    parity = content.manifest.parity or {}
    limits = {} if parity.get("passed") else missed_limits(parity, content.manifest)
    return [
        (
            name.replace("_", " "),
            shown if name not in limits else missed(f"{shown}: missed, {limits[name]}"),
        )
        for name, value in parity.items()
        if name != "passed"
        for shown in [f"{value:.9g}" if isinstance(value, float) else str(value)]
    ]


def _missed(content: Content) -> str:
    """Return by what the bundle's graph misses its gate; nothing if it doesn't."""
    parity = content.manifest.parity
    if parity is None or parity["passed"]:
        return ""
    shown = missed_shown(parity, content.manifest)
    return shown[:1].upper() + shown[1:] if shown else "Its check failed"


def _short(graph: Graph) -> list[str]:
    """Return what of a quantised graph misses the limits that its calibration had, in words."""
    if graph.calibration is None:
        return []
    values, here, recipe = graph.calibration.agreement, graph.agreement, graph.calibration.recipe
    found = []
    for name, option, apart, shown in (
        ("overlap", "keep_agreement", "mean_overlap", None if here is None else here.mean_overlap),
        ("cosine", "keep_cosine", "mean_cosine", None if here is None else here.every.mean),
    ):
        least = _least(recipe.get(option))
        if least is None:
            continue
        for where, value in (
            ("on images held apart", values[apart]),
            ("on the images below", shown),
        ):
            if value is not None and not value >= least:
                found.append(f"mean {name} {value:.4f} {where}, expected at least {least:g}")
    return found


def _least(limit: str | None) -> float | None:
    try:
        return None if limit is None else float(limit)
    except ValueError:  # it had none
        return None


def _facts(content: Content) -> list[Cells]:
    manifest = content.manifest
    model, chosen, tower = manifest.model, manifest.selection, manifest.tower
    rows, columns = tower.grid
    split = f"{chosen.dominant} dominant + {chosen.contextual} contextual"
    cls = "CLS among the dominant" if chosen.cls_token else "without CLS"
    grid = f"{rows} × {columns} tokens{' and CLS' if tower.cls_token else ''}"
    return [
        ("model", _model(content)),
        ("revision", model.revision or "a local folder's"),
        ("family", model.family),
        ("weights", model.weights if model.seed is None else f"{model.weights}, seed {model.seed}"),
        ("projector", f"tuned, {model.projector}" if model.projector else "the model's own"),
        ("selection", f"{chosen.method}, {split} ({chosen.merge}), {cls}"),
        ("tower", f"{grid} of {tower.image_size} × {tower.image_size} pixels"),
        ("takes", " and ".join(manifest.media) + (", cut into tiles" if manifest.tiling else "")),
        ("input", str(manifest.input)),
        ("outputs", "; ".join(map(str, manifest.outputs))),
        ("batch", f"{'1 to ' if manifest.batch.dynamic else ''}{manifest.batch.max}"),
        ("graph", f"{manifest.precision}, opset {manifest.opset}"),
        ("engines", ", ".join(manifest.engines) or "none; vzip build makes one"),
        ("made with", ", ".join(f"{name} {each}" for name, each in manifest.versions.items())),
    ]


def _precision(graph: Graph) -> Cells:
    values = graph.calibration.agreement if graph.calibration is not None else {}
    here = graph.agreement
    return (
        graph.precision,
        size(graph.bytes),
        digits(values.get("mean_overlap"), 4),
        digits(values.get("min_overlap"), 4),
        digits(values.get("mean_cosine"), 6),
        digits(values.get("min_cosine"), 6),
        digits(None if here is None else here.mean_overlap, 4),
        digits(None if here is None else here.every.mean, 6),
    )


def _effects(graph: Graph, own: str) -> list[Cells]:
    """Return what each layer costs alone; nothing where that was not measured."""
    assert graph.calibration is not None
    measured = [layer for layer in graph.calibration.layers if layer.score_error is not None]
    worst = max(map(_error, measured), default=0.0) or 1.0
    return [
        (
            layer.name,
            layer.kind,
            graph.precision if layer.quantised else own,
            digits(layer.overlap, 4),
            digits(layer.cosine, 6),
            digits(layer.score_error, 4),
            bar(_error(layer) / worst),
        )
        for layer in measured
    ]


def _error(layer: LayerRow) -> float:
    error = layer.score_error
    return error if error is not None and 0 <= error < float("inf") else 0.0


def _latency(content: Content) -> list[Cells]:
    timed = [(graph, graph.timing) for graph in content.graphs if graph.timing is not None]
    slowest = max(timing.median_ms for _, timing in timed)
    return [
        (
            graph.precision,
            *(digits(each, 2) for each in (timing.median_ms, timing.p90_ms, timing.min_ms)),
            digits(timing.iqr_ms, 2),
            str(timing.calls),
            bar(timing.median_ms / slowest),
        )
        for graph, timing in timed
    ]


def _accuracy(content: Content) -> Iterator[Cells]:
    if content.questions is not None:
        yield "all tokens, untouched model", _share(content.questions[1])
    for graph in content.graphs:
        if graph.accuracy is not None:
            name = f"{counted(content.manifest.selection.tokens, 'token')}, {graph.precision}"
            placed = graph.renumbered is not None
            yield name + (", original positions" if placed else ""), _share(graph.accuracy)
            if graph.renumbered is not None:
                yield f"{name}, consecutive positions", _share(graph.renumbered)


def _share(accuracy: tuple[float, float]) -> str:
    return f"{100 * accuracy[0]:.1f} ± {100 * accuracy[1]:.1f} %"


def _savings(saved: Savings | str) -> Iterator[Cells]:
    if isinstance(saved, str):
        return
    llm = saved.llm
    for name, n in (("all tokens", saved.all_tokens), ("this bundle", saved.tokens)):
        yield (
            name,
            str(n),
            f"{llm.prefill_flops(n) / 1e9:.4g} GFLOP",
            size(llm.kv_bytes(n)),
            f"{100 * llm.kv_bytes(n) / llm.kv_bytes(saved.all_tokens):.0f} %",
        )
