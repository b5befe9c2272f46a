"""What others take of the CPU: counted, waited out, warned of; and how long a run will take."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from vzip.export.bench import others as load
from vzip.export.bench.others import Moment, wait_until_idle
from vzip.export.bench.remaining import Remaining
from vzip.runtime.machine import sensors

BURN = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
BEFORE = {"cores": 2, "others_cores": 0.0, "idle": True, "waited_s": 0.0}


def test_what_others_take_is_counted_and_what_is_timed_is_not(monkeypatch):
    busy, own = iter([100.0, 103.0]), iter([7.0, 8.0, 7.5, 9.0])
    monkeypatch.setattr(load, "_spare", lambda: 0)
    monkeypatch.setattr(load.sensors, "busy_s", lambda: next(busy))
    monkeypatch.setattr(load.sensors, "cpu_s", lambda _pid: next(own))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(load.time, "monotonic", lambda: next(clock))
    first = Moment.now(1, 2)
    assert first == (10.0, 85.0)
    assert Moment.now(1, 2).others_since(first) == (3.0 - 0.5 - 1.0) / 2


@pytest.mark.skipif(sys.platform != "linux", reason="counted in /proc")
def test_the_system_counts_what_a_process_takes_among_all():
    burner = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        everybody, own = sensors.busy_s(), sensors.cpu_s(burner.pid)
        assert everybody is not None
        assert own is not None
        end = time.monotonic() + 30  # others may have all the cores
        while (took := (sensors.cpu_s(burner.pid) or 0) - own) < 0.3 and time.monotonic() < end:
            time.sleep(0.05)
        after = sensors.busy_s()
    finally:
        burner.kill()
        burner.wait()
    assert took >= 0.3
    assert after is not None
    assert after - everybody > took - 0.1


def test_what_the_system_does_not_say_is_not_made_up(monkeypatch):
    monkeypatch.setattr(load.sensors, "busy_s", lambda: None)
    assert Moment.now(os.getpid()).others_since(Moment(0.0, 1.0)) is None
    found = wait_until_idle(5.0, say=pytest.fail)
    assert (found["others_cores"], found["idle"], found["waited_s"]) == (None, None, 0.0)
    assert load.warnings([{"others_cores": None}], found) == []


@pytest.mark.parametrize(
    ("quota", "others"), [(2, 0.5), (8, 6.5), (1, 0.0)], ids=["some", "none", "more than others"]
)
def test_others_may_have_the_cores_that_a_quota_does_not_pay_for(monkeypatch, quota, others):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(load.process, "cores", lambda: quota)
    assert Moment(10.0, 65.0).others_since(Moment(0.0, 0.0)) == others


@pytest.mark.parametrize(
    ("looks", "limit", "idle", "said"),
    [
        ([0.0], 30, True, []),
        ([1.5, 1.5, 0.1], 30, True, ["1.5 of 2 cores", "waited 2 s: the machine is idle"]),
        ([1.5] * 99, 3, False, ["up to 3 s", "waited 3 s: there was no idle machine"]),
        ([1.5], 0, False, []),
    ],
)
def test_an_idle_machine_is_waited_for_but_not_for_ever(monkeypatch, looks, limit, idle, said):
    monkeypatch.setattr(load.process, "cores", lambda: 2)
    clock, given = [0.0], iter(looks)

    def look() -> float:
        clock[0] += 1.0
        return next(given)

    told: list[str] = []
    found = wait_until_idle(
        limit, say=told.append, look=look, clock=lambda: clock[0] - (1.0 if clock[0] else 0.0)
    )
    assert found["idle"] is idle
    assert len(told) == len(said)
    assert all(part in text for part, text in zip(said, told, strict=True))


def test_a_reader_is_warned_of_a_machine_in_use_and_of_unsteady_runs():
    quiet = {"others_cores": 0.1, "unsteady": False}
    assert load.warnings([quiet, {"unsteady": False}], BEFORE) == []
    (said,) = load.warnings([quiet, {"others_cores": 1.2}], BEFORE)
    assert "1 of 2 rows" in said
    assert "up to 1.2" in said
    (said,) = load.warnings([quiet], {**BEFORE, "idle": False, "others_cores": 0.6})
    assert "0.6 of 2 cores" in said
    assert "waiting" not in said  # nobody waited
    (said,) = load.warnings([quiet, {"unsteady": True}], BEFORE)
    assert "1 of 2 rows" in said


def test_the_time_left_is_what_others_of_its_kind_took():
    clock, said = [0.0], list[str]()
    progress = Remaining(3, said.append, clock=lambda: clock[0])
    assert progress.left_s() is None
    for _ in range(2):
        opened = progress.opening("b: x")
        clock[0] += 10.0
        opened()
        progress.plan(100.0, 10, 5)  # 5 s of calls, 6.5 with what surrounds them
    assert said == ["b: x, 1 of 3", "b: x, 2 of 3, about 40 s left"]
    assert progress.left_s() == pytest.approx(10 + 6.5 + 2 * 6.5)
    opened = progress.opening("b: fails")
    clock[0] += 1.0
    opened()
    assert progress.left_s() == pytest.approx(13)
    over = progress.turns("b: turns", [(100.0, 10), (100.0, 10)], 5)
    clock[0] += 5.2  # twice as long as was planned
    over(1)
    assert progress.left_s() == pytest.approx(4 * 5.2)
    for number in range(2, 6):
        over(number)
    assert progress.left_s() == 0
    assert said[-1].startswith("  round 4 of 5, about ")
