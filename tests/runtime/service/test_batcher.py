"""Calls of several threads are joined: in order, and in the sizes that the graph has."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.refusals import refused
from vzip.runtime.errors import BackendError
from vzip.runtime.service.admission import RefusedError, Ticket
from vzip.runtime.service.batcher import Batcher
from vzip.runtime.service.figures import Figures


class Doubling:
    """A backend that doubles its input, keeps the sizes of its calls, and runs when it is let."""

    engine, device = None, "nowhere"

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.inside = threading.Event()
        self.closed = False

    def run(self, feeds):
        self.sizes.append(len(feeds["x"]))
        self.inside.set()
        assert self.go.wait(10)
        if (feeds["x"] < 0).any():
            raise BackendError("got a number below 0")
        return {"y": feeds["x"] * 2, "n": np.arange(len(feeds["x"]))}

    def close(self) -> None:
        self.closed = True


def batcher(backend, *, most=4, fixed=None, delay=0.0, alone=False) -> Batcher:
    return Batcher(backend, most=most, fixed=fixed, delay=delay, alone=alone, figures=Figures())


def rows(*values: int) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.int64)[:, None]}


def waiting(made: Batcher, count: int) -> None:
    """Wait until so many calls wait."""
    end = time.monotonic() + 10
    while len(made._waiting) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def several(made: Batcher, backend: Doubling, *asked: dict[str, np.ndarray]):
    """Ask from as many threads while one call runs, so that the others wait."""
    backend.go.clear()
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(made.run, rows(1))
        assert backend.inside.wait(10)
        futures = []
        for number, each in enumerate(asked, 1):
            futures.append(pool.submit(made.run, each))
            waiting(made, number)  # one after the other, so that their order is known
        backend.go.set()
        assert first.result(10)["y"].tolist() == [[2]]
        return futures


def test_one_that_is_alone_waits_for_nobody() -> None:
    backend = Doubling()
    made = batcher(backend, delay=5)
    begun = time.monotonic()
    assert made.run(rows(3, 4))["y"].tolist() == [[6], [8]]
    assert time.monotonic() - begun < 2


def test_those_that_wait_share_a_call_and_get_their_own_rows() -> None:
    backend = Doubling()
    made = batcher(backend)
    futures = several(made, backend, rows(2), rows(3, 4), rows(5), rows(6))
    results = [each.result(10) for each in futures]
    assert [each["y"].ravel().tolist() for each in results] == [[4], [6, 8], [10], [12]]
    assert backend.sizes == [1, 4, 1]
    assert results[1]["y"].base is None, "a slice keeps the whole call's memory"


def test_a_call_is_never_larger_than_the_graph_takes() -> None:
    backend = Doubling()
    futures = several(batcher(backend), backend, rows(1, 2, 3), rows(4, 5), rows(6))
    assert [each.result(10)["y"].ravel().tolist() for each in futures] == [[2, 4, 6], [8, 10], [12]]
    assert backend.sizes == [1, 3, 3]


def test_a_static_batch_is_filled_with_copies_of_the_last() -> None:
    backend = Doubling()
    made = batcher(backend, most=3, fixed=3)
    assert made.run(rows(7))["y"].tolist() == [[14]]
    futures = several(made, backend, rows(1), rows(2))
    assert [each.result(10)["y"].tolist() for each in futures] == [[[2]], [[4]]]
    assert set(backend.sizes) == {3}


def test_calls_are_not_shared_where_a_picture_depends_on_its_neighbours() -> None:
    backend = Doubling()
    futures = several(batcher(backend, alone=True), backend, rows(1), rows(2), rows(3))
    assert [each.result(10)["y"].tolist() for each in futures] == [[[2]], [[4]], [[6]]]
    assert backend.sizes == [1, 1, 1, 1]


def test_one_that_is_on_the_way_is_waited_for() -> None:
    backend = Doubling()
    made = batcher(backend, delay=10)
    made.coming(2)  # as two threads that prepare pictures say
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made.run, rows(1))
        waiting(made, 1)
        assert not first.done()
        second = pool.submit(made.run, rows(2))
        assert (first.result(5)["y"].item(), second.result(5)["y"].item()) == (2, 4)
    assert backend.sizes == [2]


def test_one_that_gave_up_on_the_way_is_not_waited_for() -> None:
    backend = Doubling()
    made = batcher(backend, delay=10)
    made.coming(2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(made.run, rows(1))
        waiting(made, 1)
        made.coming(-1)
        assert first.result(5)["y"].item() == 2


def test_the_wait_ends_with_the_delay() -> None:
    backend = Doubling()
    made = batcher(backend, delay=0.05)
    made.coming(2)
    begun = time.monotonic()
    assert made.run(rows(1))["y"].item() == 2
    assert 0.04 < time.monotonic() - begun < 5


def test_a_failure_is_of_the_one_that_causes_it() -> None:
    backend = Doubling()
    futures = several(batcher(backend), backend, rows(2), rows(-1), rows(3))
    assert futures[0].result(10)["y"].item() == 4
    assert futures[2].result(10)["y"].item() == 6
    with refused(BackendError, got="below 0"):
        futures[1].result(10)


def test_what_nobody_waits_for_is_not_run() -> None:
    backend = Doubling()
    made = batcher(backend)
    gone, late = Ticket("a", 60), Ticket("a", 0.0)

    def asked(ticket: Ticket):
        with ticket.current():
            return made.run(rows(5))

    backend.go.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(made.run, rows(1))
        assert backend.inside.wait(10)
        futures = [pool.submit(asked, each) for each in (gone, late)]
        waiting(made, 2)
        gone.cancel()
        backend.go.set()
        assert first.result(10)["y"].item() == 2
        for future, status in zip(futures, (499, 504), strict=True):
            with pytest.raises(RefusedError) as raised:
                future.result(10)
            assert raised.value.status == status
    assert backend.sizes == [1]


def test_many_threads_each_get_their_own() -> None:
    backend = Doubling()
    made = batcher(backend, most=8, delay=0.001)

    def ask(number: int) -> None:
        made.coming(1)
        try:
            count = 1 + number % 3
            asked = rows(*range(number, number + count))
            assert made.run(asked)["y"].tolist() == (asked["x"] * 2).tolist()
        finally:
            made.coming(-1)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(ask, range(600)))
    assert sum(backend.sizes) == sum(1 + number % 3 for number in range(600))
    assert max(backend.sizes) <= 8
    assert len(backend.sizes) < 600
    assert not made._led
    assert not made._waiting


def test_a_closed_one_refuses() -> None:
    backend = Doubling()
    made = batcher(backend)
    made.close()
    assert backend.closed
    with refused(BackendError, got="closed"):
        made.run(rows(1))
