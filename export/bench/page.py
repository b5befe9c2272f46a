"""The result of `vzip bench` as one HTML page that needs nothing else: no script, no network.

Everything that comes from a bundle or a machine goes through `html.escape`; the plot is in the page
as data. A content security policy forbids the browser to load anything whatever slips through.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from vzip.export.bench import output
from vzip.export.bench.output import COLOURS, COLUMNS, Result, Row

# As `vzip report`, whose page a reader may have open beside this one.
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --tint: #f6f8fa; --warn: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d;
  --paper: #0d1117; --tint: #151b23; --warn: #d29922; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 92rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line) }
p { margin: .4rem 0; max-width: 60rem } .dim { color: var(--dim) }
code { font: .92em ui-monospace, monospace; background: var(--tint); padding: .1em .3em;
  border-radius: 4px; overflow-wrap: anywhere }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0 }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
th { font-weight: 600; color: var(--dim); white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.wide { min-width: 6.5rem } tr.ours th { color: var(--ink) } td.why { overflow-wrap: anywhere }
.bar { display: inline-block; height: .6rem; border-radius: 2px }
.key span { display: inline-block; width: .8rem; height: .6rem; border-radius: 2px;
  margin: 0 .35rem 0 1rem } .key span:first-child { margin-left: 0 }
.plot { background: #ffffff; padding: .5rem; border-radius: 6px; max-width: 60rem }
img { width: 100%; height: auto; display: block } details { margin: .5rem 0 }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_KEY = {
    "ours": "vzip",
    "peer": "compared with it",
    "ceiling": "the multiplications alone",
}


def page(result: Result, svg: bytes | None) -> str:
    """Return the page, UTF-8 text.

    Args:
        result: See `vzip.export.bench.output`.
        svg: Its plot; None where none could be drawn.
    """
    title = "Encoder benchmark: " + ", ".join(each["name"] for each in result["bundles"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_intro(result),
        *_sections(result),
        *_phases(result),
        *_plot(svg),
        *_empty(result),
        "<h2>Measured on</h2>",
        *_table(None, [(name, _code(value)) for name, value in output.facts(result)]),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _intro(result: Result) -> Iterable[str]:
    yield f"<p>{escape(result['what'])}.</p>"
    if result["baseline"] is not None:
        yield (
            f"<p>× baseline: how many times as fast as <code>{escape(result['baseline'])}"
            "</code>, the median of the ratios of their turns. Of ceiling: share of the rate at "
            "which the encoder's matrix multiplications alone ran beside it, in the same "
            "precision. IQR: distance of the quartiles.</p>"
        )
    key = (
        f'<span style="background:{COLOURS[kind]}"></span>{escape(what)}'
        for kind, what in _KEY.items()
    )
    yield f'<p class="dim key">{"".join(key)}</p>'


def _sections(result: Result) -> Iterable[str]:
    for bundle, batch, rows in output.sections(result):
        yield f"<h2>{escape(output.heading(bundle, batch))}</h2>"
        weights = bundle["weights"] if bundle["seed"] is None else f"seed {bundle['seed']}"
        yield (
            f'<p class="dim">{escape(bundle["model"])}, weights: {escape(str(weights))}; graph '
            f"in {escape(bundle['precision'])}, {bundle['image_size']} × {bundle['image_size']} "
            "pixels.</p>"
        )
        yield '<div class="scroll"><table>'
        first, *others = COLUMNS
        names = "".join(f'<th class="n">{escape(name)}</th>' for name in others)
        yield f"<tr><th>{escape(first)}</th><th></th>{names}</tr>"
        slowest = max((row["median_ms"] for row in rows), default=1.0)
        yield from (_row(row, slowest) for row in rows)
        yield "</table></div>"


def _row(row: Row, slowest: float) -> str:
    first, *others = output.cells(row)
    cells = "".join(f'<td class="n">{escape(value)}</td>' for value in others)
    width = 6 * row["median_ms"] / slowest
    bar = (
        f'<span class="bar" style="width:{width:.2f}rem;background:{COLOURS[row["kind"]]}"></span>'
    )
    return (
        f'<tr class="{row["kind"]}"><th scope="row">{escape(first)}</th>'
        f'<td class="wide">{bar}</td>{cells}</tr>'
    )


def _phases(result: Result) -> Iterable[str]:
    rows = [output.phase_cells(row) for row in output.phases(result)]
    if rows:
        yield "<h2>Beside the encoder</h2>"
        yield "<p>What a call has besides: the file to the tower's input, and copies.</p>"
        yield from _table(("bundle", "phase", "batch", "median ms", "p90", "p99", "calls"), rows)


def _plot(svg: bytes | None) -> Iterable[str]:
    if svg is not None:
        data = base64.b64encode(svg).decode()
        yield "<h2>Plot</h2>"
        yield (
            '<div class="plot"><img alt="medians as bars" '
            f'src="data:image/svg+xml;base64,{data}"></div>'
        )


def _empty(result: Result) -> Iterable[str]:
    if result["empty"]:
        yield "<h2>Not run</h2>"
        yield from _table(
            ("cell", "why"), [(each["cell"], each["why"]) for each in result["empty"]]
        )


def _table(heading: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield '<div class="scroll"><table>'
    if heading is not None:
        yield f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in heading)}</tr>"
    for first, *others in rows:
        cells = "".join(f'<td class="why">{_cell(value)}</td>' for value in others)
        yield f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>'
    yield "</table></div>"


class _Html(str):
    """HTML that is escaped already."""

    __slots__ = ()


def _cell(value: str) -> str:
    return value if isinstance(value, _Html) else escape(value)


def _code(text: str) -> _Html:
    return _Html(f"<code>{escape(text)}</code>")
