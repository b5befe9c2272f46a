"""Figures of matplotlib, for commands that measure."""

from __future__ import annotations

import io
from typing import Any, Literal

from vzip.runtime.errors import missing


def figure(size: tuple[float, float], *, needed_for: str) -> Any:
    """Return an empty figure of matplotlib, width and height in inches; never of pyplot.

    pyplot would look for a display.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise missing("matplotlib", needed_for=needed_for, extra="report") from error
    made = matplotlib.figure.Figure(figsize=size, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(made)
    return made


def drawn(figure: Any, kind: Literal["svg", "png"]) -> bytes:
    """Return a figure as a file's bytes; the same figure gives the same bytes."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "vzip"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(data, format=kind, dpi=120, metadata=metadata)
    return data.getvalue()
