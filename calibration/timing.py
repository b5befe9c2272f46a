"""Times calls side by side: in turn, so that a machine that drifts favours none of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

WARM_UP = 2  # untimed calls of each: the first may allocate and choose kernels
SECONDS = 6.0  # that the timed calls take together, roughly
LEAST, MOST = 7, 200  # timed calls of each


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over all that were timed.

    Attributes:
        median_ms: Half of the calls were as fast or faster.
        p90_ms: Nine in ten were.
        min_ms: The fastest.
        iqr_ms: Distance of the quartiles: half of the calls lie within it.
        calls: How many were timed.
    """

    median_ms: float
    p90_ms: float
    min_ms: float
    iqr_ms: float
    calls: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """Sum up one call's times; there must be some."""
        ordered = sorted(milliseconds)
        return cls(
            median_ms=round(statistics.median(ordered), 4),
            p90_ms=round(_quantile(ordered, 0.9), 4),
            min_ms=round(ordered[0], 4),
            iqr_ms=round(_quantile(ordered, 0.75) - _quantile(ordered, 0.25), 4),
            calls=len(ordered),
        )

    def to_json(self) -> dict[str, float | int]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Time calls in rounds, each of which has every call once.

    The order turns by one from round to round, so none always follows the same other. Warm-up is
    not counted, and the garbage collector rests.

    Args:
        calls: Name → what is timed; it returns when its result is on the host.

    Returns:
        Name → its times, in the order of `calls`.
    """
    names = list(calls)
    for _ in range(WARM_UP - 1):
        for name in names:
            calls[name]()
    warm = sum(_milliseconds(calls[name]) for name in names)
    rounds = min(MOST, max(LEAST, math.ceil(1000 * SECONDS / max(warm, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for first in range(rounds):
            start = first % len(names)
            for name in names[start:] + names[:start]:
                taken[name].append(_milliseconds(calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(times) for name, times in taken.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _quantile(ordered: list[float], share: float) -> float:
    """Return a quantile of ordered values, interpolated."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
