"""uvicorn, set up for strangers: what a connection may take, and a drain at SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.errors import InvalidInputError, require

if TYPE_CHECKING:
    from vzip.runtime.service.adapters.web import Web

_TICK: Final = 2.0  # seconds between two looks at a connection
_HEADERS: Final = 15.0  # seconds in which a connection must begin a request
_STUCK: Final = 15.0  # seconds in which a reader must take something of what is sent
_MOST_CONNECTIONS: Final = 1024


def run(server: Any) -> None:
    """Serve until SIGTERM or SIGINT, and then until those inside have their answers.

    Args:
        server: From `make_server`.

    Raises:
        InvalidInputError: The address can't be had.
    """
    # uvicorn raises the signal again when it is done; then there is nothing left to be ended.
    before = {each: signal.signal(each, _nothing) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    except SystemExit as error:  # it has logged that the address can't be had
        raise InvalidInputError(
            f"the service can't listen at {server.config.host}:{server.config.port}",
            expected="an address of this machine, and a port that is free",
            cure="give another one with --port",
        ) from error
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def make_server(
    web: Web,
    *,
    host: str,
    port: int,
    proxy: str | None = None,
    drain_seconds: float = 30.0,
    access_log: bool = False,
    started: Callable[[str, int], None] | None = None,
) -> Any:
    """Return uvicorn's server, which is not running yet; see `run`.

    Args:
        web: What is served.
        host: The address.
        port: The port; 0 for any that is free.
        proxy: Address of a proxy whose word on who the client is counts; None for none.
        drain_seconds: Longest wait for those inside.
        access_log: Whether each request is logged.
        started: Called with address and port when it is ready.

    Raises:
        MissingDependencyError: uvicorn or httptools is not installed.
    """
    require("uvicorn", "httptools", needed_for="the service", extra="serve")
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]  # not typed here
        def handle_exit(self, sig: int, frame: Any) -> None:
            web.service.admission.refuse_all()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if started is not None and self.started:
                started(*self.servers[0].sockets[0].getsockname()[:2])

    config = uvicorn.Config(
        web.app,
        host=host,
        port=port,
        http=connection_class(),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=access_log,
        server_header=False,
        date_header=True,
        proxy_headers=proxy is not None,
        forwarded_allow_ips=proxy,
        limit_concurrency=_MOST_CONNECTIONS,
        backlog=_MOST_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(drain_seconds),
    )
    return Server(config)


def _nothing(*_: object) -> None:
    """Take a signal that was obeyed already."""


def connection_class() -> Any:
    """Return uvicorn's connection, which is dropped where its client keeps it for nothing."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Connection(HttpToolsProtocol):  # type: ignore[misc]  # not typed here
        """Drops clients that begin no request, or take nothing of what they are sent."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle_since = self._taken_at = self.loop.time()
            self._left = 0
            self._look_later()

        def connection_lost(self, exc: Exception | None) -> None:
            self._look.cancel()
            super().connection_lost(exc)

        def _look_later(self) -> None:
            self._look = self.loop.call_later(_TICK, self._look_now)

        def _look_now(self) -> None:
            now = self.loop.time()
            if self.cycle is not None and not self.cycle.response_complete:
                self._idle_since = now
            left = self.transport.get_write_buffer_size()
            if left == 0 or left < self._left:
                self._taken_at = now
            self._left = left
            if now - self._taken_at > _STUCK or now - self._idle_since > _HEADERS + _TICK:
                self.transport.abort()
                return
            self._look_later()

    return Connection
