"""What one call to a server may take, of time and of bytes, and connections that are held to it.

A socket's own timeout says how long one read may wait: a server that sends a byte now and then is
never left by it, and what it sends has no end. Here every byte that comes in is counted, whatever
`http.client` takes it for (status lines, headers, sizes of chunks, trailers, comments of a stream),
and every wait ends where the call's time does.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

LONGEST_HEAD: Final = 1 << 18
"""Bytes before an answer's body: status line and headers, of a proxy and of passing answers too."""


class LateError(TimeoutError):
    """A call's time is over.

    Attributes:
        silent: Whether nothing came for too long; else the call as a whole takes too long.
    """

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        super().__init__("silent" if silent else "late")


class TooMuchError(OSError):
    """A server sends more than a call may take."""

    def __init__(self, most: int) -> None:
        super().__init__(f"sent more than {most} bytes")


class Allowance:
    """What is left of a call's time and bytes.

    Args:
        seconds: For the call as a whole: connection, request, headers, and body or stream.
        idle: For one wait, be it for the connection or for the next byte.

    Attributes:
        seconds: As given.
        idle: As given.
        taken: Bytes that came in.
    """

    def __init__(self, seconds: float, idle: float) -> None:
        self.seconds, self.idle = seconds, idle
        self.taken = 0
        self._ends = time.monotonic() + seconds
        self._most, self._until = LONGEST_HEAD, LONGEST_HEAD

    def wait(self) -> float:
        """Return for how long the next wait may last, in seconds.

        Raises:
            LateError: The call's time is over.
        """
        left = self._ends - time.monotonic()
        if left <= 0:
            raise LateError(silent=False)
        return min(left, self.idle)

    def late(self) -> LateError:
        """Return the error for a wait that lasted as long as it might."""
        return LateError(silent=time.monotonic() < self._ends)

    def took(self, count: int) -> None:
        """Count bytes that came in.

        Raises:
            TooMuchError: They are too many.
        """
        self.taken += count
        if self.taken > self._until:
            raise TooMuchError(self._most)

    def allow(self, count: int) -> None:
        """Let so many bytes come in from now on."""
        self._most, self._until = count, self.taken + count

    def hurry(self, seconds: float) -> None:
        """Let the call end in so many seconds, if it would not end earlier."""
        self._ends = min(self._ends, time.monotonic() + seconds)


class Request(urllib.request.Request):  # noqa: S310 - http(s), checked
    """A request that may take what its allowance says.

    Attributes:
        allowance: That.
    """

    def __init__(self, url: str, data: bytes | None, allowance: Allowance) -> None:
        super().__init__(url, data)
        self.allowance = allowance


class _Held:
    """What makes a socket keep to an allowance; stands before `socket.socket` in a class."""

    allowance = Allowance(math.inf, math.inf)

    def recv_into(self, *args: Any) -> int:
        with self.waiting():
            count: int = super().recv_into(*args)  # type: ignore[misc]
        self.allowance.took(count)
        return count

    def sendall(self, *args: Any) -> None:
        with self.waiting():
            super().sendall(*args)  # type: ignore[misc]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let one call of the socket wait for as long as it may."""
        self.settimeout(self.allowance.wait())  # type: ignore[attr-defined]
        try:
            yield
        except TimeoutError as error:
            if isinstance(error, LateError):
                raise
            raise self.allowance.late() from error


class _Plain(_Held, socket.socket):
    """A socket without TLS."""


class _Tls(_Held, ssl.SSLSocket):
    """A socket with it."""


class _Http(http.client.HTTPConnection):
    def __init__(self, host: str, *, allowance: Allowance, **rest: Any) -> None:
        super().__init__(host, **rest)
        self._create_connection = lambda address, *_: _connected(address, allowance)


class _Https(http.client.HTTPSConnection):
    """The connection begins without TLS, to speak to a proxy; what the proxy says counts too."""

    def __init__(self, host: str, *, allowance: Allowance, **rest: Any) -> None:
        super().__init__(host, **rest)
        self._allowance = allowance
        self._create_connection = lambda address, *_: _connected(address, allowance)

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        plain, name = self.sock, self._tunnel_host or self.host  # type: ignore[attr-defined]
        context = self._context  # type: ignore[attr-defined]
        context.sslsocket_class = _Tls
        self.sock = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
        self.sock.allowance = self._allowance
        with self.sock.waiting():
            self.sock.do_handshake()


class HeldHttp(urllib.request.HTTPHandler):
    """Opens http addresses with connections that keep to their request's allowance."""

    def http_open(self, req: Request) -> Any:  # type: ignore[override]
        """Open one."""
        return self.do_open(_Http, req, allowance=req.allowance)  # type: ignore[arg-type]


class HeldHttps(urllib.request.HTTPSHandler):
    """Likewise https addresses."""

    def https_open(self, req: Request) -> Any:  # type: ignore[override]
        """Open one."""
        return self.do_open(_Https, req, allowance=req.allowance)  # type: ignore[arg-type]


def _connected(address: tuple[str, int], allowance: Allowance) -> _Plain:
    """Connect to the first of a host's addresses that takes the connection.

    Python's own `socket.create_connection` gives each address the whole time.

    Raises:
        OSError: None does, or the host isn't known.
        LateError: It takes too long.
    """
    failed: OSError = OSError("the host has no address")
    for family, kind, protocol, _, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            held = _Plain(family, kind, protocol)
            held.allowance = allowance
            try:
                with held.waiting():
                    held.connect(where)
            except BaseException:
                held.close()
                raise
        except OSError as error:  # noqa: PERF203 - one or two addresses
            failed = error
        else:
            return held
    raise failed
