"""What commands that measure share: figures of matplotlib, and results in a folder."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vzip.runtime.errors import InvalidInputError, missing
from vzip.runtime.files import atomic


def figure(size: tuple[float, float], *, needed_for: str) -> Any:
    """Return an empty figure of matplotlib, width and height in inches; never of pyplot.

    pyplot would look for a display.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", needed_for=needed_for, extra="report") from error
    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    return made


def drawn(figure: Any, kind: Literal["svg", "png"]) -> bytes:
    """Return a figure as a file's bytes; the same figure gives the same bytes."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "vzip"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(data, format=kind, dpi=120, metadata=metadata)
    return data.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write a command's results, each whole or not at all, and return their paths.

    Raises:
        InvalidInputError: The folder, which is the command's ``-o``, can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            atomic.replace_file(folder / name, data)
    except OSError as error:
        raise InvalidInputError(
            f"-o is '{folder}', which can't be written ({error.strerror})",
            cure="give a folder that you may write to, on a disk with room",
        ) from error
    return [folder / name for name in files]
