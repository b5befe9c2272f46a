"""The result of `vzip bench` as one web page, of the template `bench.jinja`."""

from __future__ import annotations

from typing import Final

from vzip.export.bench import output
from vzip.export.bench.output import Result
from vzip.export.pages.rendering import render

_KEY: Final = {
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
    assert __package__ is not None
    return render(
        __package__,
        "bench.jinja",
        title="Encoder benchmark: " + ", ".join(each["name"] for each in result["bundles"]),
        result=result,
        svg=svg,
        key=_KEY,
        colours=output.COLOURS,
        columns=output.COLUMNS,
        sections=list(output.sections(result)),
        heading=output.heading,
        cells=output.cells,
        phases=[output.phase_cells(row) for row in output.phases(result)],
        empty=[(each["cell"], each["why"]) for each in result["empty"]],
        facts=output.facts(result),
    )
