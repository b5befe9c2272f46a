"""HTTP to a server that speaks OpenAI's chat protocol, with one-line errors; standard library only.

Proxies are those that the environment names, but none for this machine's own addresses. No
redirection is followed: it would lose the body, and might take the API key to another host. Nothing
is asked twice. A call ends when its time is over, whatever the server sends, and takes no more
memory than it may: see `vzip.runtime.llm.server.allowance`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from vzip.runtime.errors import BackendError, InvalidInputError, VzipError
from vzip.runtime.guard import door, guarded
from vzip.runtime.llm.server.allowance import (
    Allowance,
    HeldHttp,
    HeldHttps,
    LateError,
    Request,
    TooMuchError,
)

CALL_SECONDS: Final = 30.0
"""Longest call for what a server knows by itself; it tells soon that nobody is there."""

ANSWER_SECONDS: Final = 600.0
"""Longest call for an answer, from the connection to the last piece, where nothing else is said."""

IDLE_SECONDS: Final = 300.0
"""Longest wait for an answer's next byte: a request may stand in a queue."""

_LONGEST_PAGE: Final = 1 << 23  # bytes; a gateway's list of a thousand models has a few hundred KiB
_LONGEST_EVENT: Final = 1 << 20  # characters; an answer's piece has a few hundred
_LONGEST_GAP: Final = 1 << 21  # bytes up to the next event: itself, comments, what frames them
_LONGEST_CALL: Final = 7 * 86400  # seconds
_ERROR_SECONDS: Final = 5.0  # for an error's page, whose status is known already
_LONGEST_ERROR: Final = 1 << 16  # bytes that are read of an error's page
_CHUNK: Final = 1 << 13
_LONGEST_MESSAGE: Final = 400  # characters of the server's own words that are repeated

# What FastAPI and the servers' own checks answer to a request that they don't take.
_REFUSED: Final = (400, 413, 422)
_MORE_TIME: Final = "; ask for a shorter answer, or allow more time in Python (seconds=…)"
_SEE_LOG: Final = "see the server's log"
_NO_CHAT: Final = "it is no OpenAI-compatible server, or a proxy changed the answer"
_ENDED_BY_ERROR: Final = ("abort", "error")


class Client:
    """Requests to one server, with its errors as ours.

    Args:
        name: The LLM server's name, for messages.
        url: The server's address.
        key_variable: Environment variable of its API key.
        seconds: For an answer as a whole; None for `ANSWER_SECONDS`. Other calls have
            `CALL_SECONDS`, or this where it is less.

    Raises:
        InvalidInputError: The address or the key can't be one, or there is no such time.
    """

    @door(InvalidInputError, "{name}: '{url}' can't be a server's address", cure="check it")
    def __init__(
        self, name: str, url: str, key_variable: str, seconds: float | None = None
    ) -> None:
        self._name, self._key_variable = name, key_variable
        self._seconds = ANSWER_SECONDS if seconds is None else seconds
        if not 0 < self._seconds <= _LONGEST_CALL:
            raise InvalidInputError(
                f"{name}: got seconds={seconds}",
                expected=f"the longest time for an answer, above 0 and at most {_LONGEST_CALL}",
            )
        self.url, host = _address(name, url)
        scheme = urlsplit(self.url).scheme
        # A proxy is for the network outside; who names this machine means this machine.
        proxies = {} if _is_local(host) else urllib.request.getproxies()
        self._proxied = scheme in proxies and not urllib.request.proxy_bypass(host)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), _NoRedirects(), HeldHttp(), HeldHttps()
        )
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InvalidInputError(
                f"{name}: the API key in {key_variable} holds characters that no HTTP header takes",
                cure="set it again, without line breaks",
            )

    def get(self, path: str) -> Any:
        """Return what a path holds, as parsed JSON."""
        return self._call(path, None)

    def call(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send JSON that the server answers at once, and return its answer, parsed."""
        return self._call(path, json.dumps(body).encode())

    def post(self, path: str, body: Mapping[str, Any], kind: type[Events] | None = None) -> Events:
        """Send JSON, and return the events that answer it, of OpenAI's kind or another."""
        data = json.dumps(body).encode()
        allowance = Allowance(self._seconds, min(self._seconds, IDLE_SECONDS))
        with self.errors(allowance):
            response = self._open(path, data, allowance)
        return (kind or Events)(self, response, allowance)

    def _call(self, path: str, data: bytes | None) -> Any:
        seconds = min(self._seconds, CALL_SECONDS)
        allowance = Allowance(seconds, seconds)
        with self.errors(allowance), self._open(path, data, allowance) as response:
            answer = _body(response, allowance, _LONGEST_PAGE)
        try:
            return _parsed(answer)
        except ValueError as error:
            raise BackendError(
                f"{self._name}: {self.url}{path} answered with {_kind(response)} that is not JSON",
                cause=f"it is no server of {self._name}",
                cure="give the server's address, without a path",
            ) from error

    def broken(self, what: str, *, cause: str = "", cure: str = "") -> BackendError:
        """Return the error for an answer that can't be used; `what` completes "the server …"."""
        where = f"{self._name}: the server at {self.url}"
        return BackendError(f"{where} {what}", cause=cause, cure=cure)

    def clean(self, text: str) -> str:
        """Return the server's words on one line, of bounded length, without the API key."""
        line = " ".join(text.split())
        line = line.replace(self._key, "***") if self._key else line
        return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…"

    @contextlib.contextmanager
    def errors(self, allowance: Allowance) -> Iterator[None]:
        """Turn what goes wrong on the way into one of our errors."""
        guard = guarded(
            BackendError,
            f"{self._name}: the server at {self.url} can't be asked",
            cure="check its address, and the proxies that the environment names",
        )
        with guard:
            try:
                yield
            except urllib.error.HTTPError as error:
                with error:
                    raise self._refusal(error, allowance) from None
            except (OSError, http.client.HTTPException) as error:
                what, cure = self._trouble(error, allowance)
                raise self.broken(what, cure=cure) from error

    def _open(
        self, path: str, data: bytes | None, allowance: Allowance
    ) -> http.client.HTTPResponse:
        request = Request(self.url + path, data, allowance)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        response: http.client.HTTPResponse = self._opener.open(request)
        packed = response.headers.get("Content-Encoding", "identity").strip().lower()
        if packed not in ("", "identity"):
            response.close()
            raise self.broken(
                f"answered in the encoding {self.clean(packed)!r}",
                cause="it was asked for plain text, so a proxy may have packed it",
                cure="give the address of the server itself",
            )
        return response

    def _refusal(self, error: urllib.error.HTTPError, allowance: Allowance) -> VzipError:
        """Return the error for an HTTP status of 300 or more."""
        words = self.clean(_server_words(_page(error, allowance)))
        status = f"HTTP {error.code} {self.clean(str(error.reason))}".strip()
        got = f"answered {status}" + (f": {words}" if words else "")
        # rstrip: the server's words often end a sentence, and ours goes on.
        got = got.rstrip(".; ")
        if error.code in _REFUSED:
            return InvalidInputError(f"{self._name}: the server at {self.url} {got}")
        cause = ""
        if error.code in (401, 403):
            state = "holds another key" if self._key else "is not set"
            cause = f"the environment variable {self._key_variable} {state}"
            cure = f"set {self._key_variable} to the server's key"
        elif 300 <= error.code < 400:
            where = self.clean(error.headers.get("Location", ""))
            cause, cure = "requests with a body follow no redirection", _SEE_LOG
            if where.lower().startswith(("http://", "https://")):
                cure = f"give the address {where}"
        elif error.code == 404 and not words.lower().startswith("the model"):
            cause = f"it has no {urlsplit(error.url or '').path}"
            cure = f"give the address of a server of {self._name}"
        elif error.code in (429, 503):
            cause, cure = "it is busy or not ready yet", "try again later"
        else:
            cure = _SEE_LOG
        return self.broken(got, cause=cause, cure=cure)

    def _trouble(self, error: Exception, allowance: Allowance) -> tuple[str, str]:
        """Say what became of the connection, and the cure; see `broken`."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        by = " (through the proxy that the environment names)" if self._proxied else ""
        match reason:
            case ConnectionRefusedError():
                said = f"refuses connections{by}", "start it, or check the address and its port"
            case socket.gaierror():
                said = f"is at a host that is not known here{by}", "check the address"
            case TimeoutError():
                silent = isinstance(reason, LateError) and reason.silent
                said = (
                    f"sent nothing for {allowance.idle:g} s{by}"
                    if silent
                    else f"did not answer within {allowance.seconds:g} s{by}",
                    "check the address, and whether the server is busy or stuck"
                    + (_MORE_TIME if allowance.seconds == self._seconds else ""),
                )
            case TooMuchError():
                said = f"{reason}, which no answer has{by}", "check the address"
            case ssl.SSLCertVerificationError():
                said = (
                    f"has a certificate that is not trusted here ({reason.verify_message})",
                    "name that of its authority in the environment variable SSL_CERT_FILE",
                )
            case ssl.SSLError():
                said = (
                    f"does not speak TLS ({reason.reason})",
                    "begin the address of a server without a certificate with http://",
                )
            case ConnectionError() | http.client.IncompleteRead():
                said = f"closed the connection{by}", _SEE_LOG
            case http.client.HTTPException():
                said = (
                    "answered with something that is not HTTP",
                    "check the port, and whether the address begins with https://",
                )
            case _:
                said = f"can't be reached{by}: {self.clean(str(reason))}", "check the address"
        return said


class Events:
    """The server-sent events of one answer.

    Format: https://html.spec.whatwg.org/multipage/server-sent-events.html

    Attributes:
        cause: Why an event may be none of an answer.
    """

    cause = _NO_CHAT

    def __init__(
        self, client: Client, response: http.client.HTTPResponse, allowance: Allowance
    ) -> None:
        self._client, self._response, self._allowance = client, response, allowance
        # Reads what is there, and keeps the beginning of a character whose other bytes follow.
        self._lines = io.TextIOWrapper(response, encoding="utf-8", newline=None)

    def close(self) -> None:
        """Drop the connection, whereupon the server stops making the answer."""
        self._lines.close()

    def pieces(self) -> Iterator[Any]:
        """Yield what `piece` returns of each event as it comes; to the answer's end, or raise."""
        if self._response.headers.get_content_type() != "text/event-stream":
            page = _page(self._response, self._allowance)
            words = self._client.clean(_server_words(page)) or f"{_kind(self._response)}"
            raise self._client.broken(
                f"answered with no stream of events: {words}", cause=self.cause, cure=_SEE_LOG
            )
        ended = False
        for data in self._data():
            if data == "[DONE]":
                return
            piece, reason = self._read(data)
            if reason in _ENDED_BY_ERROR:
                raise self._client.broken(
                    f"ended the answer with {reason!r}", cure=f"ask again, and {_SEE_LOG}"
                )
            ended = ended or reason is not None
            if piece:
                yield piece
        if not ended:
            raise self._client.broken("broke off in the middle of an answer", cure=_SEE_LOG)

    def _read(self, data: str) -> tuple[Any, str | None]:
        """Return what is new in an event's data; see `piece`."""
        try:
            event = _parsed(data)
            if event.get("error") or event.get("object") == "error":
                words = self._client.clean(_server_words(data.encode()))
                raise self._client.broken(f"failed while answering: {words}", cure=_SEE_LOG)
            return self.piece(event)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._client.broken(
                f"sent an event that is no piece of an answer: {self._client.clean(data[:80])!r}",
                cause=self.cause,
            ) from error

    def piece(self, event: Any) -> tuple[Any, str | None]:
        """Return what is new in an event, and why the answer ends if it does.

        Raises:
            ValueError: It is no piece of an answer; or TypeError, KeyError, AttributeError.
        """
        choices = event["choices"]
        if not choices:  # what was used, at the end
            return "", None
        piece = choices[0]["delta"].get("content") or ""
        piece.encode()  # text that can be written, or this is no piece
        return piece, choices[0].get("finish_reason")

    def _data(self) -> Iterator[str]:
        """Yield the data of each event; comments and other fields are passed over."""
        more = True
        while more:
            self._allowance.allow(_LONGEST_GAP)
            with self._client.errors(self._allowance):
                try:
                    data, more = self._event()
                except UnicodeDecodeError as error:
                    raise self._client.broken(
                        "sent an answer that is not UTF-8", cause=self.cause
                    ) from error
            if data:
                yield "\n".join(data)

    def _event(self) -> tuple[list[str], bool]:
        """Return the lines of the next event's data, and whether more may follow."""
        data: list[str] = []
        size = 0
        while True:
            line = self._lines.readline(_LONGEST_EVENT)
            size += len(line)
            if size >= _LONGEST_EVENT:
                raise self._client.broken(
                    f"sent an event of {_LONGEST_EVENT} characters or more",
                    cause="it is no stream of events",
                )
            if line == "\n":
                if data:
                    return data, True
                size = 0
            elif not line:
                return data, False
            field, _, value = line.rstrip("\n").partition(":")
            if field == "data":
                data.append(value.removeprefix(" "))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would lose the body, and might take the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Leave it the error that it is."""


def _address(name: str, url: str) -> tuple[str, str]:
    """Return a server's address without ``/v1``, and its host.

    Raises:
        InvalidInputError: It is no address of a server.
    """
    text = url.strip()
    example = "http://127.0.0.1:8000"
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:  # a port that is no number, a bracket without its twin
        host = None
    if "@" in text:
        raise InvalidInputError(
            f"{name}: the server's address holds a user name or password",
            cure=f"give it without, such as {example}, and an API key in the environment",
        )
    plain = text.isascii() and text.isprintable() and " " not in text
    if not host or not plain or parts.scheme not in ("http", "https"):
        raise InvalidInputError(
            f"{name}: got the address {text!r}",
            expected=f"that of a server, such as {example}",
            cure="begin it with http:// or https://, and write a port as a number",
        )
    if parts.query or parts.fragment:
        raise InvalidInputError(
            f"{name}: got the address {text!r}",
            expected=f"one without '?' and '#', such as {example}",
        )
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}", host


def _is_local(host: str) -> bool:
    """Return whether a host is this machine: by name, or an address of it or of none (0.0.0.0)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _kind(response: http.client.HTTPResponse) -> str:
    return str(response.headers.get_content_type())


def _body(response: Any, allowance: Allowance, most: int) -> bytes:
    """Return an answer's body; what is read is little more than `most`, whatever it claims to be.

    Raises:
        TooMuchError: It is longer than that.
        IncompleteRead: It is shorter than it claims to be.
    """
    allowance.allow(most)
    claimed: int | None = response.length
    data = bytearray()
    while claimed is None or len(data) < claimed:
        # Not `read`, which takes the memory for as much as is claimed, or loses what came.
        piece = response.read1(_CHUNK)
        data += piece
        if not piece:
            break
    if claimed is not None and len(data) < claimed:
        raise http.client.IncompleteRead(b"")
    return bytes(data)


def _page(response: Any, allowance: Allowance) -> bytes:
    """Return the beginning of a page that tells of an error, as far as it comes soon."""
    allowance.hurry(_ERROR_SECONDS)
    allowance.allow(2 * _LONGEST_ERROR)  # what frames it is counted too
    data = bytearray()
    with contextlib.suppress(OSError, http.client.HTTPException):
        while len(data) < _LONGEST_ERROR and (piece := response.read1(_CHUNK)):
            data += piece
    return bytes(data[:_LONGEST_ERROR])


def _parsed(text: str | bytes) -> Any:
    """Return what JSON holds.

    Raises:
        ValueError: It is none, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def checked_ids(found: Any) -> list[int]:
    """Return a server's list of token ids.

    Raises:
        TypeError: It is no list of them.
    """
    if isinstance(found, list) and all(type(each) is int and 0 <= each < 2**31 for each in found):
        return found
    raise TypeError("no list of token ids")


def _server_words(page: bytes) -> str:
    """Return what a server says of an error, of the forms that LLM servers use; else nothing."""
    try:
        said = _parsed(page)
    except ValueError:  # a proxy's page, or plain text
        text = page.decode(errors="replace")
        return "" if "<" in text else text
    for key in ("error", "detail", "message", "msg"):
        while isinstance(said, list) and said:  # FastAPI's list of what is wrong with the body
            said = said[0]
        if isinstance(said, dict) and key in said:
            said = said[key]
    return said if isinstance(said, str) else json.dumps(said)
