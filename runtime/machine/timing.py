"""Times of calls: warm-up apart, compared ones in turn, so that a machine that drifts favours none.

Standard library alone: every stack that is compared is timed by this file, in whichever Python it
lives.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WARM_UP = 2  # untimed calls of each: the first may allocate and choose kernels
SECONDS = 6.0  # that the timed calls of `interleaved` take together, roughly
LEAST, MOST = 7, 200  # timed calls of each
SETTLE_CALLS = 2  # untimed at the start of a turn: the device idled while others had theirs
TURN_S = 0.3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over all that were timed.

    Attributes:
        median_ms: Half of the calls were as fast or faster.
        p90_ms: Nine in ten were.
        p99_ms: 99 in a hundred were; of fewer than a hundred calls, nearly the slowest.
        min_ms: The fastest.
        iqr_ms: Distance of the quartiles: half of the calls lie within it.
        calls: How many were timed.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    iqr_ms: float
    calls: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Sum up one call's times; there must be some."""
        ordered = sorted(milliseconds)
        return cls(
            median_ms=round(statistics.median(ordered), 4),
            p90_ms=round(_quantile(ordered, 0.9), 4),
            p99_ms=round(_quantile(ordered, 0.99), 4),
            min_ms=round(ordered[0], 4),
            iqr_ms=round(_quantile(ordered, 0.75) - _quantile(ordered, 0.25), 4),
            calls=len(ordered),
        )

    def to_json(self) -> dict[str, float | int]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float | None = None,
    settle_s: float = 0.0,
) -> dict[str, Timing]:
    """Time calls of this process in rounds, each of which has every call once.

    The order turns by one from round to round, so none always follows the same other. Warm-up is
    not counted, and the garbage collector rests.

    Args:
        calls: Name → what is timed; it returns when its result is on the host.
        seconds: That the calls take together, roughly, with what settles them; `SECONDS` by
            default. None gets fewer than `LEAST`.
        settle_s: How long each is called, untimed, before it is timed. Some libraries' threads wait
            for their next work by spinning, and so take time from whatever is called after them:
            ONNX Runtime's two threads took 31 ms of processor time after a call (1.31).

    Returns:
        Name → its times, in the order of `calls`.
    """
    names = list(calls)
    for _ in range(WARM_UP - 1):
        for name in names:
            calls[name]()
    warm = sum(_milliseconds(calls[name]) for name in names) + 1000 * settle_s * len(names)
    limit = SECONDS if seconds is None else seconds
    rounds = min(MOST, max(LEAST, math.ceil(1000 * limit / max(warm, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for first in range(rounds):
            start = first % len(names)
            for name in names[start:] + names[:start]:
                if settle_s:
                    warm_up(calls[name], calls=1, seconds=settle_s)
                taken[name].append(_milliseconds(calls[name]))
    return {name: Timing.of(times) for name, times in taken.items()}


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


def turn(call: Callable[[], object], *, calls: int, settle: int = SETTLE_CALLS) -> list[float]:
    """Time one turn of a stack, while the other stacks' processes wait.

    Args:
        call: Returns when its result is on the host, so that the clock reads are synchronised.
        calls: How many to time.
        settle: How many to make before, untimed.

    Returns:
        Milliseconds of each.
    """
    with _no_collection():
        for _ in range(settle):
            call()
        return [_milliseconds(call) for _ in range(calls)]


def summary(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return what a table and a sceptic need of the turns of one stack.

    Returns:
        `Timing`'s fields over all calls; ``turn_medians_ms`` in their order, and ``drift`` from
        the median of the first half of these to that of the second, as a share.
    """
    medians = [statistics.median(one) for one in turns]
    half = max(1, len(medians) // 2)
    first, last = statistics.median(medians[:half]), statistics.median(medians[-half:])
    return {
        **Timing.of([value for one in turns for value in one]).to_json(),
        "turn_medians_ms": [round(median, 4) for median in medians],
        "drift": round(last / first - 1, 4),
    }


class _no_collection:  # noqa: N801 - reads as a context
    """The garbage collector rests, and goes on afterwards if it was on."""

    def __enter__(self) -> None:
        self._collecting = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._collecting:
            gc.enable()


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of ordered values, interpolated."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
