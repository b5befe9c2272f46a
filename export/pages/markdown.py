"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table: its head, a rule, and a line a row; a bar in a cell is text."""
    return [_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    texts = (str(cell).replace("|", "\\|") for cell in cells)
    return "|" + "|".join(f" {text} " if text else " " for text in texts) + "|"
