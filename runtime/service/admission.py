"""Who may come in: a bound on requests, bytes and each client's share, deadlines, and leaving.

Nothing waits outside: a request that finds the house full is refused at once, and told when to come
again. So memory has a bound, whoever asks for what.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator

from vzip.runtime.errors import VzipError

BUSY, DRAINING, EXPIRED, GONE, TOO_LARGE = "busy", "draining", "expired", "gone", "too_large"


class RefusedError(VzipError):
    """A request that is not served, for a reason that may be another one later.

    Attributes:
        status: The HTTP status that says so.
        code: The reason in one word, such as ``busy``.
        retry_after: Seconds after which to try again; None where that is of no use.
        parameter: Which part of the request is meant; empty where all of it is.
    """

    parameter = ""

    def __init__(
        self,
        got: str,
        *,
        status: int,
        code: str,
        retry_after: int | None = None,
        expected: str = "",
        cause: str = "",
        cure: str = "",
    ) -> None:
        super().__init__(got, expected=expected, cause=cause, cure=cure)
        self.status, self.code, self.retry_after = status, code, retry_after

    def __reduce__(self) -> tuple[object, ...]:
        fields = {name: getattr(self, name) for name in ("expected", "cause", "cure")}
        return _remade, (self.got, self.status, self.code, self.retry_after, fields)


def _remade(
    got: str, status: int, code: str, retry_after: int | None, fields: dict[str, str]
) -> RefusedError:
    return RefusedError(got, status=status, code=code, retry_after=retry_after, **fields)


class Ticket:
    """A request that was let in.

    Attributes:
        client: Who asks, by which the shares are counted.
        since: When it came, in seconds of `time.monotonic`.
    """

    def __init__(self, client: str, seconds: float) -> None:
        self.client, self.since = client, time.monotonic()
        self._seconds = seconds
        self._gone = False
        self.bytes = 0

    @property
    def left(self) -> float:
        """Seconds until the deadline; below 0 behind it."""
        return self.since + self._seconds - time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._gone

    def cancel(self) -> None:
        """Say that the client left; work that was not begun is dropped."""
        self._gone = True

    def check(self) -> None:
        """Go on only where somebody still waits.

        Raises:
            RefusedError: The client left, or the deadline is over.
        """
        if self._gone:
            raise RefusedError("the client went away", status=499, code=GONE)
        if self.left <= 0:
            raise self.expired()

    def expired(self) -> RefusedError:
        """Return the error of a request whose deadline is over."""
        return RefusedError(
            f"the request was not answered within {self._seconds:g} s",
            status=504,
            code=EXPIRED,
            retry_after=1,
            cause="the server is busy, or the request is too large for its limit",
            cure="ask again later, or for less",
        )

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Let what runs inside be this request's work; see `checked`."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: contextvars.ContextVar[Ticket | None] = contextvars.ContextVar("ticket", default=None)


def current_ticket() -> Ticket | None:
    """Return the request that this thread works for; None outside of any."""
    return _CURRENT.get()


class Admission:
    """The door: what is inside at once has a bound.

    Args:
        requests: Most requests inside.
        per_client: Most of one client's.
        memory: Most bytes of bodies, of all requests inside.
        seconds: Longest time from a request's first byte to its answer's last.
    """

    def __init__(self, *, requests: int, per_client: int, memory: int, seconds: float) -> None:
        self._most, self._per_client, self._memory = requests, per_client, memory
        self._seconds = seconds
        self._changed = threading.Condition()
        self._inside: set[Ticket] = set()
        self._clients: Counter[str] = Counter()
        self._bytes = 0
        self._draining = False
        self._pace = 0.05  # seconds from one answer to the next while there are requests
        self._last = 0.0

    @property
    def inside(self) -> int:
        """Requests that are inside."""
        return len(self._inside)

    @property
    def held_bytes(self) -> int:
        """Bytes of their bodies."""
        return self._bytes

    @property
    def draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self._draining

    @contextlib.contextmanager
    def enter(self, client: str) -> Iterator[Ticket]:
        """Let a request in for as long as the block runs.

        Args:
            client: Who asks: an address, or a key.

        Raises:
            RefusedError: The house is full or is being left, or the client has its share.
        """
        ticket = Ticket(client, self._seconds)
        with self._changed:
            if self._draining:
                raise RefusedError(
                    "the server is shutting down",
                    status=503,
                    code=DRAINING,
                    retry_after=5,
                    cure="ask another server, or this one when it is back",
                )
            if len(self._inside) >= self._most:
                raise self._busy(f"the server has {self._most} requests in hand, its most")
            if self._clients[client] >= self._per_client:
                raise self._busy(f"this client has {self._per_client} requests in hand, its most")
            self._inside.add(ticket)
            self._clients[client] += 1
        try:
            yield ticket
        finally:
            with self._changed:
                now = time.monotonic()
                busy_since = max(self._last, ticket.since)
                self._pace += 0.1 * (min(now - busy_since, 60.0) - self._pace)
                self._last = now
                self._inside.discard(ticket)
                self._bytes -= ticket.bytes
                self._clients[client] -= 1
                if not self._clients[client]:
                    del self._clients[client]
                self._changed.notify_all()

    def reserve(self, ticket: Ticket, size: int) -> None:
        """Count bytes of a request's body, before they are kept.

        Raises:
            RefusedError: All bodies together would be too large.
        """
        with self._changed:
            if self._bytes + size > self._memory:
                raise self._busy(f"the requests in hand hold {self._bytes} bytes")
            self._bytes += size
            ticket.bytes += size

    def drain(self, seconds: float) -> bool:
        """Let nobody in any more, and wait for those inside.

        Args:
            seconds: Longest wait; those who are left then are told that nobody waits for them.

        Returns:
            Whether all left in time.
        """
        with self._changed:
            self._draining = True
            empty = self._changed.wait_for(lambda: not self._inside, seconds)
            for ticket in self._inside:
                ticket.cancel()
        return empty

    def refuse_all(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self._draining = True

    def _busy(self, got: str) -> RefusedError:
        seconds = math.ceil(self._pace * len(self._inside) / 2)
        return RefusedError(
            got,
            status=429,
            code=BUSY,
            retry_after=min(max(seconds, 1), 60),
            cure="ask again after the seconds that Retry-After says",
        )
