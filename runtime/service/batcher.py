"""Joins what several threads ask of a backend into calls of the sizes that its graph has.

It is a backend itself, and `VisionEncoder` stands above it: so pictures are prepared, cut into
tiles and checked as everywhere, and tiles of different requests still share a call. No thread is of
its own: of the threads that wait, one runs the next call for all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import BackendError
from vzip.runtime.service.admission import Ticket, current_ticket
from vzip.runtime.service.figures import Figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.backends.protocol import Backend

    Array = NDArray[Any]

SHARED_SCALES: Final = frozenset({"dynamic", "mixed"})
"""Forms of CPU engines in which a picture's tokens depend on the others of its call."""


class _Call:
    """What one thread asks for: some rows of the graph's input."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows
        self.since = time.monotonic()
        self.ticket: Ticket | None = current_ticket()
        self.woken = threading.Event()
        self.error: BaseException | None = None
        self.outputs: dict[str, Array] | None = None

    @property
    def done(self) -> bool:
        return self.outputs is not None or self.error is not None

    def result(self) -> dict[str, Array]:
        if self.error is not None:
            raise self.error
        assert self.outputs is not None
        return self.outputs


class Batcher:
    """A backend that runs another one, for several threads at once.

    A call begins when it is full, when nobody else is on the way, or after the delay.

    Args:
        backend: What runs the graph.
        most: Most rows of a call: at most what the graph takes.
        fixed: Rows that every call must have; None where any number up to `most` will do. Missing
            ones are copies of the last, as `VisionEncoder` makes them.
        delay: Longest wait for more rows, in seconds.
        alone: Whether no two requests may share a call; see `SHARED_SCALES`.
        figures: Counts calls.

    Attributes:
        engine: As the backend's.
        device: As the backend's.
        threads: As the backend's.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        most: int,
        fixed: int | None,
        delay: float,
        alone: bool,
        figures: Figures,
    ) -> None:
        self.engine, self.device = backend.engine, backend.device
        self.threads: int | None = getattr(backend, "threads", None)
        self._backend = backend
        self._most, self._fixed, self._delay, self._alone = most, fixed, delay, alone
        self._figures = figures
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)  # only the one who runs calls waits on it
        self._waiting: deque[_Call] = deque()
        self._coming = 0
        self._led = False
        self._open = True

    def coming(self, count: int) -> None:
        """Say that threads are on the way here, or, below 0, that they won't come any more."""
        with self._lock:
            self._coming += count
            if count < 0:
                self._more.notify()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Backend.run`; waits for a call that has room.

        Raises:
            BackendError: The graph failed, or the backend is closed.
            RefusedError: The request's client left meanwhile, or its deadline is over.
        """
        ((name, rows),) = feeds.items()
        call = _Call(rows)
        with self._lock:
            if not self._open:
                raise BackendError("the service is closed", cure="start it again")
            self._waiting.append(call)
            lead = not self._led
            if lead:
                self._led = True
            else:
                self._more.notify()
        if not lead:
            call.woken.wait()
            if call.done:
                return call.result()
        try:
            while not call.done:
                self._run(name, self._gathered())
        finally:
            with self._lock:
                self._led = bool(self._waiting)
                if self._led:
                    self._waiting[0].woken.set()  # it goes on for the others
        return call.result()

    def close(self) -> None:
        """Refuse calls from now on, end those that wait, and close the backend."""
        with self._lock:
            self._open = False
            self._more.notify()
        self._backend.close()

    def _gathered(self) -> list[_Call]:
        """Wait for more rows, and take those that go into the next call."""
        with self._lock:
            until = self._waiting[0].since + self._delay
            while self._worth_waiting() and (left := until - time.monotonic()) > 0:
                self._more.wait(left)
            taken: list[_Call] = []
            rows = 0
            while self._waiting and (not taken or not self._alone):
                rows += len(self._waiting[0].rows)
                if taken and rows > self._most:
                    break
                taken.append(self._waiting.popleft())
            return taken

    def _worth_waiting(self) -> bool:
        """Return whether a call may become fuller within the delay."""
        full = sum(len(each.rows) for each in self._waiting) >= self._most
        # Each thread that waits here was on the way; those beyond them still are.
        return self._open and not self._alone and not full and self._coming > len(self._waiting)

    def _run(self, name: str, calls: list[_Call]) -> None:
        """Run the backend once, and share out what it gives; a failure is of each alone."""
        calls = [each for each in calls if _wanted(each)]
        if not calls:
            return
        try:
            outputs = self._outputs(name, calls)
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that asked
            if len(calls) > 1:  # one of them may be the cause; the others are served
                for each in calls:
                    self._run(name, [each])
                return
            calls[0].error = error
            calls[0].woken.set()
            return
        first = 0
        for each in calls:
            end = first + len(each.rows)
            # Copies: a slice would keep the whole call's memory for as long as one is remembered.
            each.outputs = {
                key: np.array(value[first:end]) if len(value) > end - first else value
                for key, value in outputs.items()
            }
            first = end
            each.woken.set()

    def _outputs(self, name: str, calls: list[_Call]) -> dict[str, Array]:
        """Run the backend on the rows of some calls."""
        parts = [each.rows for each in calls]
        count = sum(map(len, parts))
        if self._fixed is not None and (absent := self._fixed - count) > 0:
            parts.append(np.repeat(parts[-1][-1:], absent, axis=0))
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        begun = time.monotonic()
        outputs: dict[str, Array] = dict(self._backend.run({name: rows}))
        now = time.monotonic()
        self._figures.called(count, now - begun, begun - calls[0].since)
        return outputs


def _wanted(call: _Call) -> bool:
    """Return whether somebody still waits for a call; where not, say so to its thread."""
    if call.ticket is None:
        return True
    try:
        call.ticket.check()
    except Exception as error:  # noqa: BLE001 - it is raised in the thread that asked
        call.error = error
        call.woken.set()
        return False
    return True
