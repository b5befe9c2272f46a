"""Which budget meets a limit; nothing heavy is imported here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.calibration.sweeping.measure import Row


@dataclass(frozen=True)
class SweepLimits:
    """What a budget must meet; None where nothing is asked.

    Attributes:
        max_latency_ms: Of the encoder, its median.
        max_prefill_gflops: Of the LLM.
        min_accuracy: Share of questions, above 0 and at most 1.
        min_agreement: Above 0 and at most 1.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    max_latency_ms: float | None = None
    max_prefill_gflops: float | None = None
    min_accuracy: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            most = math.inf if name.startswith("max") else 1
            if not 0 < value <= most or math.isinf(value):
                expected = "a number above 0" + (" and at most 1" if most == 1 else "")
                option = "--" + name.replace("_", "-")
                raise InvalidInputError(
                    f"got {option} {value:g}",
                    expected=f"{expected}",
                )

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return any(value is not None for value in vars(self).values())

    @property
    def of_quality(self) -> bool:
        """Whether there is one that a larger budget meets more easily."""
        return self.min_accuracy is not None or self.min_agreement is not None

    def shortfalls(self, row: Row) -> Iterator[float]:
        """Yield for every limit by what share a row misses it; 0 where it meets it."""
        for limit, value, most in self._judged(row):
            yield max(0.0, (value / limit if most else limit / max(value, 1e-9)) - 1)

    def describe(self, row: Row | None = None) -> str:
        """Return the limits in words, with the values of a row."""
        texts = []
        for name, text in _TEXTS.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            bound = f"{'at most' if name.startswith('max') else 'at least'} {limit:g}"
            if row is None:
                texts.append(text.format(bound))
            else:
                texts.append(f"{text.format(_number(_value(row, name)))} ({bound})")
        return ", ".join(texts)

    def _judged(self, row: Row) -> Iterator[tuple[float, float, bool]]:
        for name, limit in vars(self).items():
            if limit is not None:
                yield limit, _value(row, name), name.startswith("max")


_TEXTS = {
    "min_accuracy": "an accuracy of {}",
    "min_agreement": "an agreement of {}",
    "max_latency_ms": "an encoder latency of {} ms",
    "max_prefill_gflops": "a prefill of {} GFLOP",
}


@dataclass(frozen=True)
class Advice:
    """What follows from the limits.

    Attributes:
        met: Whether a budget meets them all.
        row: The budget to take; where none meets them, the one that comes nearest.
        text: The same in a sentence.
    """

    met: bool
    row: Row
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes; the row by name."""
        return {"met": self.met, "row": self.row.name, "text": self.text}


def advise(rows: Sequence[Row], limits: SweepLimits) -> Advice:
    """Return the budget that meets the limits.

    Where a limit says what must be kept, that is the smallest that does; of several merges the one
    that keeps most. Limits of cost alone are met most easily by the smallest budget, which keeps
    least: then it is, of those that meet them, the smallest of those that keep most. Among equals,
    to a point of accuracy and a thousandth of agreement, the first of `rows` is taken.

    Args:
        rows: At least one; all have an accuracy if `limits` asks for one.
        limits: At least one.
    """
    fitting = [row for row in rows if not any(limits.shortfalls(row))]
    if not fitting:
        nearest = min(rows, key=lambda row: (max(limits.shortfalls(row)), row.tokens))
        text = (
            f"none of the {len(rows)} has {limits.describe()}; nearest is {_named(nearest)}: "
            f"{limits.describe(nearest)}"
        )
        return Advice(False, nearest, text)
    if limits.of_quality:
        row = min(fitting, key=lambda row: (row.tokens, *(-each for each in _kept(row))))
        return Advice(True, row, f"{_named(row)}, the smallest with {limits.describe(row)}")
    row = max(fitting, key=lambda row: (*_kept(row), -row.tokens))
    return Advice(True, row, f"{_named(row)}, which keeps most with {limits.describe(row)}")


def _value(row: Row, name: str) -> float:
    values = {
        "max_latency_ms": row.latency.median_ms,
        "max_prefill_gflops": row.prefill_flops / 1e9,
        "min_accuracy": row.accuracy,
        "min_agreement": row.agreement,
    }
    value = values[name]
    assert value is not None, "an accuracy was asked for where there is none"
    return value


def _kept(row: Row) -> tuple[float, float]:
    """Return what a row keeps, the better measure first, in steps that mean something.

    A point of accuracy is its standard error on a thousand questions.
    """
    return (round(row.accuracy or 0.0, 2), round(row.agreement, 3))


def _named(row: Row) -> str:
    return f"{counted(row.tokens, 'token')} ({row.dominant} + {row.contextual}, {row.merge})"


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"
