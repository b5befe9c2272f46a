"""The door of the service: what is inside at once has a bound, and whoever leaves makes room."""

from __future__ import annotations

import contextlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vzip.runtime.service.admission import Admission, RefusedError


def admission(**changed) -> Admission:
    return Admission(**{"requests": 3, "per_client": 2, "memory": 100, "seconds": 60.0, **changed})


def refusal(call) -> RefusedError:
    with pytest.raises(RefusedError) as raised:
        call()
    return raised.value


def test_no_more_come_in_than_there_is_room_for() -> None:
    door = admission()
    with door.enter("a"), door.enter("a"), door.enter("b"):
        error = refusal(lambda: door.enter("c").__enter__())
        assert (error.status, error.code) == (429, "busy")
        assert error.retry_after is not None
        assert 1 <= error.retry_after <= 60
    with door.enter("c"):
        assert door.inside == 1


def test_a_client_has_its_share() -> None:
    door = admission()
    with door.enter("a"), door.enter("a"):
        assert refusal(lambda: door.enter("a").__enter__()).status == 429
        with door.enter("b"):
            pass
    with door.enter("a"):
        pass
    assert not door._clients


def test_bodies_of_all_have_one_bound_and_leave_with_their_requests() -> None:
    door = admission()
    with door.enter("a") as one:
        door.reserve(one, 60)
        with door.enter("b") as other:
            assert refusal(lambda: door.reserve(other, 41)).status == 429
            door.reserve(other, 40)
        assert door.held_bytes == 60
    assert door.held_bytes == 0


def test_an_error_inside_makes_room_too() -> None:
    door = admission()
    with contextlib.suppress(ZeroDivisionError), door.enter("a") as ticket:
        door.reserve(ticket, 50)
        raise ZeroDivisionError
    assert (door.inside, door.held_bytes) == (0, 0)


def test_the_deadline_and_the_client_that_left_end_a_request() -> None:
    door = admission(seconds=0.000001)
    with door.enter("a") as ticket:
        assert refusal(ticket.check).status == 504
        ticket.cancel()
        assert refusal(ticket.check).code == "gone"


def test_a_drain_lets_nobody_in_and_waits_for_those_inside() -> None:
    door = admission()
    leave, inside = threading.Event(), threading.Event()

    def request() -> None:
        with door.enter("a"):
            inside.set()
            assert leave.wait(10)

    with ThreadPoolExecutor(2) as pool:
        stays = pool.submit(request)
        assert inside.wait(10)
        drained = pool.submit(door.drain, 10)
        while not door.draining:
            pass
        error = refusal(lambda: door.enter("b").__enter__())
        assert (error.status, error.code) == (503, "draining")
        assert error.retry_after
        leave.set()
        stays.result(10)
        assert drained.result(10) is True


def test_a_drain_that_takes_too_long_tells_those_inside() -> None:
    door = admission()
    with door.enter("a") as ticket:
        assert door.drain(0.01) is False
        assert ticket.gone


def test_a_refusal_crosses_processes_with_its_fields() -> None:
    error = refusal(lambda: admission(requests=0).enter("a").__enter__())
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.status, again.code, again.retry_after) == (
        str(error), 429, "busy", error.retry_after,
    )  # fmt: skip
