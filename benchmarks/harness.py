"""Timing of a callable: warm-up apart, turns of many calls, medians and spreads of all of them.

Standard library alone: every stack that is compared is timed by this file, in whichever Python it
lives.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

SETTLE_CALLS = 2  # untimed at the start of a turn: the GPU idled while others had theirs
TURN_S = 0.3


def warm_up(call: Callable[[], object], *, calls: int, seconds: float) -> list[float]:
    """Call until both limits are reached: at least so often, and at least so long.

    Returns:
        Milliseconds of each call; the first one may hold compilation.
    """
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < calls or time.perf_counter() - start < seconds:
        taken.append(_milliseconds(call))
    return taken


def calls_per_turn(warm_ms: float) -> int:
    """Return how many calls make a turn of about `TURN_S` seconds: 5 to 200."""
    return min(200, max(5, math.ceil(TURN_S * 1000 / max(warm_ms, 1e-6))))


def turn(call: Callable[[], object], *, calls: int) -> list[float]:
    """Time one turn.

    Args:
        call: Returns when its result is on the host, so that the clock reads are synchronised.
        calls: How many to time.

    Returns:
        Milliseconds of each.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(SETTLE_CALLS):
            call()
        return [_milliseconds(call) for _ in range(calls)]
    finally:
        if collecting:
            gc.enable()


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def summary(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return what a table and a sceptic need of the turns of one stack.

    Returns:
        Milliseconds: ``median_ms``, ``p90_ms``, ``min_ms`` and ``iqr_ms`` (distance of the
        quartiles) of all calls; ``turn_medians_ms`` in their order, and ``drift`` from the median
        of the first half of these to that of the second, as a share; ``calls``.
    """
    every = sorted(value for one in turns for value in one)
    medians = [statistics.median(one) for one in turns]
    half = max(1, len(medians) // 2)
    first, last = statistics.median(medians[:half]), statistics.median(medians[-half:])
    return {
        "median_ms": statistics.median(every),
        "p90_ms": _quantile(every, 0.9),
        "min_ms": every[0],
        "iqr_ms": _quantile(every, 0.75) - _quantile(every, 0.25),
        "turn_medians_ms": medians,
        "drift": last / first - 1,
        "calls": len(every),
    }


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of ordered values, interpolated."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
