"""The timing harness: what it calls, what it keeps, what it makes of it."""

from __future__ import annotations

import gc
import time

import pytest

from benchmarks import harness


def test_a_turn_times_every_call_but_the_first_ones():
    calls = []
    taken = harness.turn(lambda: calls.append(gc.isenabled()), calls=5)
    assert len(taken) == 5
    assert len(calls) == 5 + harness.SETTLE_CALLS
    assert not any(calls)  # no collection in between
    assert gc.isenabled()


def test_a_turn_that_fails_leaves_collection_on():
    with pytest.raises(ZeroDivisionError):
        harness.turn(lambda: 1 / 0, calls=1)
    assert gc.isenabled()


def test_times_are_milliseconds():
    assert 2 <= min(harness.turn(lambda: time.sleep(0.002), calls=3)) < 200


def test_warm_up_goes_on_until_both_limits_are_reached():
    assert len(harness.warm_up(lambda: None, calls=7, seconds=0)) == 7
    start = time.perf_counter()
    harness.warm_up(lambda: None, calls=1, seconds=0.05)
    assert time.perf_counter() - start >= 0.05


@pytest.mark.parametrize(("warm_ms", "calls"), [(1.0, 200), (10.0, 30), (1000.0, 5), (0.0, 200)])
def test_calls_per_turn(warm_ms, calls):
    assert harness.calls_per_turn(warm_ms) == calls


def test_summary():
    found = harness.summary([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0]])
    assert found["median_ms"] == 5.5
    assert found["p90_ms"] == pytest.approx(9.1)  # numpy.quantile's linear interpolation
    assert found["min_ms"] == 1.0
    assert found["iqr_ms"] == pytest.approx(4.5)
    assert found["turn_medians_ms"] == [2.0, 5.0, 8.5]
    assert found["drift"] == pytest.approx(8.5 / 2.0 - 1)
    assert found["calls"] == 10


def test_one_turn_has_no_drift():
    assert harness.summary([[3.0]])["drift"] == 0
