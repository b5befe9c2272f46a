"""Figures of matplotlib, for commands that measure."""

from __future__ import annotations

import io
from typing import Any, Literal

from vzip.runtime.errors import MissingDependencyError, missing


def lacking(needed_for: str) -> MissingDependencyError | None:
    """Return what is missing for a plot; None if one can be drawn."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401 - with all that it needs
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return missing("matplotlib", needed_for=needed_for, extra="report")
    return None


def figure(size: tuple[float, float], *, needed_for: str) -> Any:
    """Return an empty figure of matplotlib, width and height in inches; never of pyplot.

    pyplot would look for a display.

    Raises:
        MissingDependencyError: It is not installed.
    """
    if (error := lacking(needed_for)) is not None:
        raise error
    import matplotlib.backends.backend_agg
    import matplotlib.figure

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
