"""Times of calls: what is called, what it keeps, what it makes of it."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest

from vzip.runtime.machine import timing


def test_a_turn_times_every_call_but_the_first_ones():
    calls = []
    taken = timing.turn(lambda: calls.append(gc.isenabled()), calls=5)
    assert len(taken) == 5
    assert len(calls) == 5 + timing.SETTLE_CALLS
    assert not any(calls)  # no collection in between
    assert gc.isenabled()


def test_a_turn_that_fails_leaves_collection_on():
    with pytest.raises(ZeroDivisionError):
        timing.turn(lambda: 1 / 0, calls=1)
    assert gc.isenabled()


def test_times_are_milliseconds():
    assert 2 <= min(timing.turn(lambda: time.sleep(0.002), calls=3)) < 200


def test_warm_up_goes_on_until_both_limits_are_reached():
    assert len(timing.warm_up(lambda: None, calls=7, seconds=0)) == 7
    start = time.perf_counter()
    timing.warm_up(lambda: None, calls=1, seconds=0.05)
    assert time.perf_counter() - start >= 0.05


@pytest.mark.parametrize(("warm_ms", "calls"), [(1.0, 200), (10.0, 30), (1000.0, 5), (0.0, 200)])
def test_calls_per_turn(warm_ms, calls):
    assert timing.calls_per_turn(warm_ms) == calls


def test_summary():
    found = timing.summary([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0]])
    assert found["median_ms"] == 5.5
    assert found["p90_ms"] == pytest.approx(9.1)  # numpy.quantile's linear interpolation
    assert found["min_ms"] == 1.0
    assert found["iqr_ms"] == pytest.approx(4.5)
    assert found["turn_medians_ms"] == [2.0, 5.0, 8.5]
    assert found["drift"] == pytest.approx(8.5 / 2.0 - 1)
    assert found["calls"] == 10


def test_one_turn_has_no_drift():
    assert timing.summary([[3.0]])["drift"] == 0


def test_what_another_call_leaves_behind_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads that spin for a while after a call of their library."""
    now, before = [0], [""]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def call(name: str) -> Any:
        def run() -> None:
            now[0] += (50 if before[0] in {name, ""} else 90) * 1_000_000
            before[0] = name

        return run

    calls = {name: call(name) for name in "ab"}
    assert timing.interleaved(calls)["b"].p90_ms == 90
    found = timing.interleaved(calls, settle_s=1e-9)
    assert found["a"].p90_ms == found["b"].p90_ms == 50


def test_a_machine_that_slows_down_favours_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0], []
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def call(name: str, milliseconds: int) -> Any:
        def run() -> None:
            called.append(name)
            now[0] += (milliseconds + len(called)) * 1_000_000  # one slower with every call

        return run

    found = timing.interleaved({"a": call("a", 100), "b": call("b", 100), "c": call("c", 40)})
    rounds = found["a"].calls
    timed = called[timing.WARM_UP * 3 :]
    assert len(timed) == 3 * rounds >= 3 * timing.LEAST
    assert timed[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert abs(found["a"].median_ms - found["b"].median_ms) <= 2
    assert found["a"].median_ms - found["c"].median_ms == pytest.approx(60, abs=3)


def test_a_timing_has_the_quantiles_of_its_calls() -> None:
    found = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == timing.Timing(
        median_ms=3.0, p90_ms=4.6, p99_ms=4.96, min_ms=1.0, iqr_ms=2.0, calls=5
    )
