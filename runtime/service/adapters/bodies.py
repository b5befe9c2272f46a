"""Requests' bodies, read within bounds; and the pictures that stand in them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import urllib.request
from collections.abc import Collection
from typing import Any, Final
from urllib.parse import urlsplit

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import codec
from vzip.runtime.guard import said_by, shown
from vzip.runtime.service.admission import TOO_LARGE, Admission, RefusedError, Ticket

_DATA_URL: Final = re.compile(
    r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+=-]+)*?)(;base64)?,", re.IGNORECASE
)
_FETCH_SECONDS: Final = 10.0


async def read_body(
    request: Any, ticket: Ticket, admission: Admission, *, most: int, seconds: float
) -> bytes:
    """Return a request's body.

    Args:
        request: Starlette's.
        ticket: The request's; bytes are counted there before they are kept.
        admission: Bounds the bytes of all requests.
        most: Most bytes.
        seconds: Longest time that it may take to come.

    Raises:
        RefusedError: It is larger than that, comes more slowly, or the client leaves; or the server
            holds too much already.
        InvalidInputError: It is packed, or says no length that is one.
    """
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise InvalidInputError(
            f"got a body in the encoding {shown(packed)!r}",
            expected="one that isn't packed",
            cure="leave Content-Encoding out",
        )
    claimed = request.headers.get("content-length", "0")
    if claimed.isascii() and claimed.isdigit() and (len(claimed) > 18 or int(claimed) > most):
        raise _too_large(claimed, most)
    data = bytearray()
    try:
        async with Within(min(seconds, ticket.left)):
            async for chunk in request.stream():
                if len(data) + len(chunk) > most:
                    raise _too_large(f"more than {most}", most)
                admission.reserve(ticket, len(chunk))
                data += chunk
    except asyncio.TimeoutError:
        raise RefusedError(
            f"{len(data)} bytes of the body came within {seconds:g} s",
            status=408,
            code="slow_upload",
            expected="all of it",
            cause="the connection is slow, or the client stopped sending",
            cure="send it again",
        ) from None
    return bytes(data)


class Within:
    """End what is awaited inside after some seconds; like `asyncio.timeout`, for Python 3.10."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._late = max(seconds, 0.0), False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None

        def late() -> None:
            self._late = True
            task.cancel()

        self._handle = asyncio.get_running_loop().call_later(self._seconds, late)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handle.cancel()
        if self._late and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError


def _too_large(got: str, most: int) -> RefusedError:
    return RefusedError(
        f"the body has {got} bytes",
        status=413,
        code=TOO_LARGE,
        expected=f"at most {most}",
        cure="send smaller or fewer pictures",
    )


def parsed(data: bytes) -> dict[str, Any]:
    """Return the JSON object that a body holds.

    Raises:
        InvalidInputError: It is none.
    """
    try:
        value = codec.parse(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(
            "the body is no JSON", expected="a JSON object in UTF-8", cause=said_by(error)
        ) from error
    if not isinstance(value, dict):
        raise InvalidInputError(
            f"the body is a JSON {type(value).__name__}", expected="a JSON object"
        )
    return value


def media_of(url: object, where: str, *, hosts: Collection[str], most: int) -> bytes:
    """Return the bytes that a URL of a request stands for.

    Args:
        url: A data URL; or one of a host that is listed.
        where: The place in the request, for messages.
        hosts: Hosts that may be asked.
        most: Most bytes.

    Raises:
        InvalidInputError: It is neither, or can't be had.
    """
    if not isinstance(url, str):
        raise InvalidInputError(f"{where} is a {type(url).__name__}", expected="a data URL, a text")
    if url[:5].lower() == "data:":
        return _data(url, where)
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or host not in hosts:
        raise InvalidInputError(
            f"{where} is the URL {shown(url)[:100]!r}",
            expected="a data URL: data:image/jpeg;base64,…",
            cause="this server fetches nothing" if not hosts else "its host isn't listed here",
            cure="send the picture itself, or start the server with --allow-host HOST",
        )
    return _fetched(url, where, most)


def _data(url: str, where: str) -> bytes:
    match = _DATA_URL.match(url[:200])
    if match is None or not match[3]:
        raise InvalidInputError(
            f"{where} begins with {url[:40]!r}",
            expected="a data URL in base64: data:image/jpeg;base64,…",
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(
            f"{where} holds no base64", expected="a whole data URL", cause=said_by(error)
        ) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which may lead to a host that is not listed."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Leave it the error that it is."""


def _fetched(url: str, where: str, most: int) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(url, timeout=_FETCH_SECONDS) as response:
            data: bytes = response.read(most + 1)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{where} can't be fetched", cause=said_by(error), cure="send the picture itself"
        ) from error
    if len(data) > most:
        raise InvalidInputError(f"{where} has more than {most} bytes", expected=f"at most {most}")
    return data
