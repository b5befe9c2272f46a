"""A report as one HTML page that needs nothing else: no script, no network, no other file.

Everything that comes from a bundle or a file's name goes through `html.escape`; pictures are in the
page as data. A content security policy forbids the browser to load anything whatever slips through.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape

from vzip.calibration.reporting.report import Calibration, Content, Graph, Layer, Savings, Shown
from vzip.calibration.sweeping.output import size

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --tint: #f6f8fa; --bar: #1f6feb; --warn: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d;
  --paper: #0d1117; --tint: #151b23; --bar: #4493f8; --warn: #d29922; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 78rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem }
p { margin: .4rem 0; max-width: 60rem } .dim { color: var(--dim) } .warn { color: var(--warn) }
code { font: .92em ui-monospace, monospace; background: var(--tint); padding: .1em .3em;
  border-radius: 4px; overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0 }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere }
th { font-weight: 600; color: var(--dim); white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem 2rem; margin: 1rem 0 }
.tiles div { min-width: 8rem } .tiles b { display: block; font-size: 1.5rem; line-height: 1.2 }
.bar { display: inline-block; height: .6rem; background: var(--bar); border-radius: 2px }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: .5rem 0 1.5rem }
figure { margin: 0; width: min(100%, 17.5rem) } img { width: 100%; height: auto; display: block }
figcaption { font-size: .87rem; color: var(--dim) } details { margin: .5rem 0 }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class _Cell(str):
    """HTML that is escaped already."""

    __slots__ = ()


def page(content: Content) -> str:
    """Return the page, UTF-8 text."""
    manifest = content.manifest
    title = f"{manifest.model.id}, {manifest.selection.tokens} tokens"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_summary(content),
        *_facts(content),
        *_parity(content),
        *_precisions(content),
        *_pictures(content),
        *_latency(content),
        *_accuracy(content),
        *_savings(content),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(content: Content) -> Iterable[str]:
    manifest = content.manifest
    rows, columns = manifest.tower.grid
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    version = manifest.versions.get("vzip", "unknown")
    yield (
        f'<p class="dim">Report of the bundle <code>{escape(content.bundle)}</code>, made on '
        f"{now}. The bundle was exported by vzip {escape(version)}.</p>"
    )
    own = content.graphs[0]
    figures = [(f"{manifest.selection.tokens} of {rows * columns}", "tokens")]
    if isinstance(content.savings, Savings):
        saved = content.savings
        share = 1 - saved.llm.kv_bytes(saved.tokens) / saved.llm.kv_bytes(saved.all_tokens)
        figures.append((f"−{100 * share:.0f} %", "KV cache, predicted"))
    if own.timing is not None:
        figures.append((f"{own.timing.median_ms:.1f} ms", f"encoder in {own.precision}, measured"))
    if own.accuracy is not None:
        figures.append((f"{100 * own.accuracy[0]:.1f} %", f"accuracy in {own.precision}"))
    for graph in content.graphs[1:]:
        if graph.calibration is not None:
            overlap = graph.calibration.agreement["mean_overlap"]
            figures.append((f"{overlap:.3f}", f"of the kept tokens stay in {graph.precision}"))
    yield '<div class="tiles">'
    yield from (f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in figures)
    yield "</div>"


def _facts(content: Content) -> Iterable[str]:
    manifest = content.manifest
    model, chosen, tower = manifest.model, manifest.selection, manifest.tower
    cls = "CLS among the dominant" if chosen.cls_token else "without CLS"
    batch = f"{'1 to ' if manifest.batch.dynamic else ''}{manifest.batch.max}"
    weights = model.weights if model.seed is None else f"{model.weights}, seed {model.seed}"
    rows, columns = tower.grid
    projector = "the model's own" if model.projector is None else f"tuned, {model.projector}"
    selection = (
        f"{chosen.method}, {chosen.dominant} dominant + {chosen.contextual} contextual "
        f"({chosen.merge}), {cls}"
    )
    tokens = f"{rows} × {columns} tokens{' and CLS' if tower.cls_token else ''}"
    facts = [
        ("model", model.id),
        ("revision", model.revision or "a local folder's"),
        ("family", model.family),
        ("weights", weights),
        ("projector", projector),
        ("selection", selection),
        ("tower", f"{tokens} of {tower.image_size} × {tower.image_size} pixels"),
        ("takes", " and ".join(manifest.media) + (", cut into tiles" if manifest.tiling else "")),
        ("input", str(manifest.input)),
        ("outputs", "; ".join(str(each) for each in manifest.outputs)),
        ("batch", batch),
        ("graph", f"{manifest.precision}, opset {manifest.opset}"),
        ("engines", ", ".join(manifest.engines) or "none; vzip build makes one"),
        ("made with", ", ".join(f"{name} {each}" for name, each in manifest.versions.items())),
    ]
    yield "<h2>The bundle</h2>"
    yield from _table(None, facts)
    files = [
        (name, size(entry.bytes), _code(entry.sha256)) for name, entry in manifest.files.items()
    ]
    yield "<details><summary>Files and their digests</summary>"
    yield from _table(("file", "size", "SHA-256"), files)
    yield "</details>"


def _parity(content: Content) -> Iterable[str]:
    yield "<h2>Parity with the untouched model</h2>"
    parity = content.manifest.parity
    if parity is None:
        yield from _paragraph("Not measured. ", "vzip check BUNDLE", " compares the two.")
        return
    verdict = "met" if parity["passed"] else "not met"
    yield f"<p>The gate of {escape(content.manifest.precision)} was {verdict}.</p>"
    values = [
        (name.replace("_", " "), _number(value))
        for name, value in parity.items()
        if name != "passed"
    ]
    yield from _table(None, values)


def _precisions(content: Content) -> Iterable[str]:
    own = content.graphs[0].precision
    yield "<h2>Precisions</h2>"
    if len(content.graphs) == 1:
        yield from _paragraph(
            f"The bundle has its own graph in {own} alone. Quantised ones are made by ",
            "vzip calibrate BUNDLE --images FOLDER --precision int8",
            ".",
        )
        return
    yield (
        f"<p>Kept tokens and cosine against the bundle's own graph in {escape(own)}: on images "
        "held apart from calibration, as its report has them, and on the "
        f"{len(content.images)} images below.</p>"
    )
    rows = []
    for graph in content.graphs:
        calibration, here = graph.calibration, graph.agreement
        values = calibration.agreement if calibration is not None else {}
        rows.append(
            (
                graph.precision,
                size(graph.bytes),
                _optional(values.get("mean_overlap"), 4),
                _optional(values.get("min_overlap"), 4),
                _optional(values.get("mean_cosine"), 6),
                _optional(values.get("min_cosine"), 6),
                _optional(None if here is None else here.mean_overlap, 4),
                _optional(None if here is None else here.every.mean, 6),
            )
        )
    heading = (
        "precision", "size", "mean overlap", "lowest", "mean cosine", "lowest",
        "overlap here", "cosine here",
    )  # fmt: skip
    yield from _table(heading, rows, numbers=True)
    for graph in content.graphs[1:]:
        yield from _layers(graph, own)


def _layers(graph: Graph, own: str) -> Iterable[str]:
    yield f"<h3>Layers in {escape(graph.precision)}</h3>"
    if graph.unusable is not None:
        yield f'<p class="warn">Not run here: {escape(graph.unusable)}</p>'
    calibration = graph.calibration
    if calibration is None:
        yield from _paragraph(
            "The bundle has no report of its calibration. ",
            f"vzip calibrate BUNDLE --images FOLDER --precision {graph.precision}",
            " makes the graph anew, with one.",
        )
        return
    high = [layer for layer in calibration.layers if not layer.quantised]
    recipe = ", ".join(f"{name} {value}" for name, value in calibration.recipe.items())
    yield (
        f"<p>{len(calibration.layers) - len(high)} of {len(calibration.layers)} linear layers are "
        f"quantised. {calibration.calibrated} images to calibrate on, {calibration.held_apart} to "
        f"judge by. Recipe: {escape(recipe)}.</p>"
    )
    if high:
        yield f"<p>In {escape(own)}:</p>"
        yield from _table(
            ("layer", "why"), [(layer.name, layer.reason or "not said") for layer in high]
        )
    yield from _effects(calibration, graph.precision, own)


def _effects(calibration: Calibration, precision: str, own: str) -> Iterable[str]:
    measured = [layer for layer in calibration.layers if layer.score_error is not None]
    if not measured:
        yield (
            "<p>What each layer costs alone was not measured: the calibration had no limits to "
            "keep.</p>"
        )
        return
    worst = max((_error(layer) for layer in measured), default=0.0) or 1.0
    rows = [
        (
            layer.name,
            layer.kind,
            precision if layer.quantised else own,
            _optional(layer.overlap, 4),
            _optional(layer.cosine, 6),
            _optional(layer.score_error, 4),
            _bar(_error(layer) / worst),
        )
        for layer in measured
    ]
    yield f"<details open><summary>What each of {len(rows)} layers costs alone</summary>"
    yield (
        '<p class="dim">Kept tokens that stay, cosine of the tokens, and how far scores move '
        "(in their deviations), with this layer alone quantised.</p>"
    )
    heading = ("layer", "kind", "in the graph", "overlap", "cosine", "scores move", "")
    yield from _table(heading, rows, numbers=True)
    yield "</details>"


def _error(layer: Layer) -> float:
    error = layer.score_error
    return error if error is not None and 0 <= error < float("inf") else 0.0


def _pictures(content: Content) -> Iterable[str]:
    yield "<h2>What is kept</h2>"
    tiled = " Of a tiled image, the base tile." if content.manifest.tiling is not None else ""
    yield (
        "<p>Kept patches are clear, merged ones tinted by group with a frame around each group's "
        f"target.{tiled} Images: {escape(content.source)}.</p>"
    )
    own = content.graphs[0].precision
    for image in content.images:
        yield from _picture(image, own)


def _picture(image: Shown, own: str) -> Iterable[str]:
    yield f'<h3>{escape(image.name)}</h3><div class="pictures">'
    yield _figure(image.picture, "what the tower sees")
    for precision, (picture, share) in image.overlays.items():
        same = "" if precision == own else f": {100 * share:.1f} % of {own}'s kept tokens"
        yield _figure(picture, f"{precision}{same}")
    yield "</div>"


def _latency(content: Content) -> Iterable[str]:
    machine = content.machine
    images = "one image" if content.batch == 1 else f"{content.batch} images"
    yield "<h2>Latency</h2>"
    yield (
        f"<p>Encoder, {images} a call, from pixels at the tower's size to checked tokens. ONNX "
        f"Runtime {escape(str(machine['packages']['onnxruntime']))} on "
        f"{escape(str(machine['cores']))} cores ({escape(str(machine['system']))}, load "
        f"{escape(str(machine['state']['load']))}); precisions in turn.</p>"
    )
    timed = [(graph, graph.timing) for graph in content.graphs if graph.timing is not None]
    slowest = max(timing.median_ms for _, timing in timed)
    rows = [
        (
            graph.precision,
            f"{timing.median_ms:.2f}",
            f"{timing.p90_ms:.2f}",
            f"{timing.min_ms:.2f}",
            f"{timing.iqr_ms:.2f}",
            str(timing.calls),
            _bar(timing.median_ms / slowest),
        )
        for graph, timing in timed
    ]
    heading = ("precision", "median ms", "p90", "min", "quartile distance", "calls", "")
    yield from _table(heading, rows, numbers=True)
    for graph in content.graphs:
        if graph.unusable is not None:
            yield (
                f'<p class="warn">{escape(graph.precision)} was not run here: '
                f"{escape(graph.unusable)}</p>"
            )


def _accuracy(content: Content) -> Iterable[str]:
    yield "<h2>Accuracy</h2>"
    if content.questions is None:
        yield (
            "<p>Not measured: only the demo model, with its own weights, comes with questions to "
            "answer.</p>"
        )
        return
    asked, everything = content.questions
    yield (
        f"<p>Share of {asked['questions']} questions about {asked['scenes']} held-out scenes (seed "
        f"{asked['seed']}) that get exactly the right answer ± its standard error.</p>"
    )
    rows = [("all tokens, untouched model", _share(everything))]
    rows += [
        (f"{content.manifest.selection.tokens} tokens, {graph.precision}", _share(graph.accuracy))
        for graph in content.graphs
        if graph.accuracy is not None
    ]
    yield from _table(("", "accuracy"), rows, numbers=True)


def _savings(content: Content) -> Iterable[str]:
    yield "<h2>What the language model is saved</h2>"
    saved = content.savings
    if isinstance(saved, str):
        yield f"<p>{escape(saved)}</p>"
        return
    llm = saved.llm
    of = "" if saved.unit == "image" else f" of {saved.units} {saved.unit}s"
    assumed = " (assumed)" if llm.dtype_assumed else ""
    yield (
        f"<p>Predicted for a {escape(llm.model_type)} with {llm.layers} layers, hidden size "
        f"{llm.hidden_size}, {llm.kv_heads} key-value heads of {llm.head_dim}, cache in "
        f"{escape(llm.dtype)}{assumed}; {saved.text_tokens} tokens of text beside the image's{of}. "
        "Prefill: T(4nd² + 2n²d + 2ndm).</p>"
    )
    counts = (("all tokens", saved.all_tokens), ("this bundle", saved.tokens))
    rows = [
        (
            name,
            str(n),
            f"{llm.prefill_flops(n) / 1e9:.4g} GFLOP",
            size(llm.kv_bytes(n)),
            f"{100 * llm.kv_bytes(n) / llm.kv_bytes(saved.all_tokens):.0f} %",
        )
        for name, n in counts
    ]
    yield from _table(("", "LLM tokens", "prefill", "KV cache", "of all"), rows, numbers=True)


def _table(
    heading: Sequence[str] | None, rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> Iterable[str]:
    """Yield a table; with `numbers`, cells that are numbers are set to the right."""
    held = list(rows)
    yield '<div class="scroll"><table>'
    if heading is not None:
        below = held[0] if held else [""] * len(heading)
        names = zip(heading, below, strict=True)
        cells = (f"<th{_side(value, numbers)}>{escape(name)}</th>" for name, value in names)
        yield f"<tr>{''.join(cells)}</tr>"
    for first, *others in held:
        cells = (f"<td{_side(value, numbers)}>{_cell(value)}</td>" for value in others)
        yield f'<tr><th scope="row">{_cell(first)}</th>{"".join(cells)}</tr>'
    yield "</table></div>"


def _side(value: str, numbers: bool) -> str:
    """Return the attribute of a cell that is set to the right, if this one is."""
    is_number = not isinstance(value, _Cell) and value[:1] in set("0123456789–−")
    return ' class="n"' if numbers and is_number else ""


def _cell(value: str) -> str:
    return value if isinstance(value, _Cell) else escape(value)


def _code(text: str) -> _Cell:
    return _Cell(f"<code>{escape(text)}</code>")


def _bar(share: float) -> _Cell:
    return _Cell(f'<span class="bar" style="width:{8 * min(1.0, max(0.0, share)):.2f}rem"></span>')


def _figure(jpeg: bytes, caption: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _paragraph(before: str, command: str, after: str) -> Iterable[str]:
    yield f"<p>{escape(before)}<code>{escape(command)}</code>{escape(after)}</p>"


def _share(accuracy: tuple[float, float]) -> str:
    return f"{100 * accuracy[0]:.1f} ± {100 * accuracy[1]:.1f} %"


def _optional(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _number(value: object) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
