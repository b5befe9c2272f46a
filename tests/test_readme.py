"""The README's tables are what the result files give."""

from __future__ import annotations

from benchmarks.readme import README, with_tables


def test_the_tables_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m benchmarks.readme"
