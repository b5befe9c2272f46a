"""Pictures made ready ahead: order, bounds, errors, and whose threads work."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from vzip.runtime.pictures.ahead import ahead, share
from vzip.runtime.pictures.resize import on_cores

ITEMS = range(9)


def slow_first(item: int) -> int:
    """The earlier an item, the longer it takes."""
    time.sleep(0.002 * (len(ITEMS) - item))
    return item


@pytest.mark.parametrize(("threads", "most"), [(1, 4), (2, 1), (3, 4), (64, 64)])
def test_results_come_in_the_order_of_the_items(threads, most):
    assert list(ahead(slow_first, ITEMS, threads=threads, most=most)) == list(ITEMS)
    assert list(ahead(slow_first, (), threads=threads, most=most)) == []


def test_no_more_are_begun_than_most_and_no_more_at_once_than_threads():
    begun, working, peak, lock = 0, 0, 0, threading.Lock()

    def work(item: int) -> int:
        nonlocal begun, working, peak
        with lock:
            begun, working = begun + 1, working + 1
            peak = max(peak, working)
        time.sleep(0.002)
        with lock:
            working -= 1
        return item

    for taken, _ in enumerate(ahead(work, range(20), threads=3, most=4), start=1):
        time.sleep(0.005)
        assert begun <= taken + 4
    assert begun == 20
    assert 2 <= peak <= 3


def test_they_are_made_ready_while_others_are_used():
    third = threading.Event()
    results = ahead(lambda item: third.set() if item == 2 else None, ITEMS, threads=2, most=3)
    next(results)
    assert third.wait(10)
    results.close()


def test_the_first_item_s_error_is_raised_in_its_turn_and_the_rest_is_given_up():
    done = []

    def work(item: int) -> int:
        if item in (3, 4):
            time.sleep(0.02 if item == 3 else 0)  # the later one fails sooner
            raise ValueError(f"item {item}")
        done.append(item)
        return item

    taken: list[int] = []
    with pytest.raises(ValueError, match="item 3"):
        taken.extend(ahead(work, range(100), threads=2, most=6))
    assert taken == [0, 1, 2]
    assert len(done) < 12


@pytest.mark.parametrize("left", ["closed", "failed"])
def test_no_thread_is_left_behind(left):
    before = set(threading.enumerate())
    with (
        contextlib.suppress(KeyError),
        contextlib.closing(ahead(slow_first, ITEMS, threads=4, most=8)) as results,
    ):
        next(results)
        if left == "failed":
            raise KeyError
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(("threads", "count"), [(1, 9), (8, 1)])
def test_one_thread_or_one_item_is_the_caller_s_own(threads, count):
    names = ahead(lambda _: threading.get_ident(), range(count), threads=threads, most=8)
    assert set(names) == {threading.get_ident()}
    assert share() is None


def test_strips_of_several_pictures_have_no_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr("vzip.runtime.pictures.resize.cores", lambda: 8)

    def strips(_: int) -> int:
        def strip(_: int) -> int:
            time.sleep(0.002)
            return threading.get_ident()

        return len(set(on_cores(strip, range(12))))

    assert max(ahead(strips, range(4), threads=8, most=4)) <= 2
    assert max(ahead(strips, range(8), threads=8, most=8)) == 1
    assert strips(0) > 2  # alone
