"""What a server may take of us: time and bytes have a bound, whatever it sends and wherever.

The servers here are bare sockets, for `http.server` sends nothing wrong. What is taken is counted
in bytes, and deadlines are far below a second.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.refusals import refused, says
from tests.runtime.llm.fake_chat_server import answer, event, fake_server, piece
from tests.runtime.llm.test_chat_server import EMBEDS, TOKENS, TinyServer
from vzip.runtime.errors import BackendError, InvalidInputError, VzipError
from vzip.runtime.llm.experimental.sglang import _Answer
from vzip.runtime.llm.server import allowance as allowances
from vzip.runtime.llm.server import http_client
from vzip.runtime.llm.server.http_client import Client

SECONDS = 0.25
OK = b"HTTP/1.1 200 OK\r\n"
JSON = OK + b"Content-Type: application/json\r\n"
STREAM = OK + b"Content-Type: text/event-stream\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
MODELS = json.dumps({"data": [{"id": "demo"}]}).encode()
Send = Callable[[bytes], None]
# Where a server is when it starts to send without end: what came before, and what comes for ever.
PLACES = {
    "before the status": (b"", b"H"),
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "header line": (JSON + b"X-Long: ", b"x"),
    "header lines": (JSON, b"X: y\r\n"),
    "passing answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body of a length": (JSON + b"Content-Length: 999999999999\r\n\r\n", b" "),
    "body without a length": (JSON + b"\r\n", b" "),
    "size of a chunk": (JSON + CHUNKED, b"0"),
    "extension of a chunk": (JSON + CHUNKED + b"1;", b"x"),
    "chunks": (JSON + CHUNKED, b"1\r\n \r\n"),
    "trailers": (JSON + CHUNKED + b"0\r\n", b"X: y\r\n"),
    "error page": (b"HTTP/1.1 500 Oops\r\n\r\n", b"x"),
    "redirection": (b"HTTP/1.1 302 Found\r\nLocation: /there\r\n\r\n", b"x"),
}
STREAMED = {
    "line": (STREAM + b"\r\n", b"x"),
    "comments": (STREAM + b"\r\n", b": keep-alive\n\n"),
    "comments in chunks": (STREAM + CHUNKED, b"e\r\n: keep-alive\n\n\r\n"),
    "empty lines": (STREAM + b"\r\n", b"\n"),
    "fields": (STREAM + b"\r\n", b"id: 1\n"),
    "data of one event": (STREAM + b"\r\n", b"data: x\n"),
    "empty data of one event": (STREAM + b"\r\n", b"data:\n"),
    "no stream": (OK + b"Content-Type: text/html\r\n\r\n", b"x"),
}
LIVELY = {
    "events": (STREAM + b"\r\n", piece("x" * 900)),
    "events of nothing": (STREAM + b"\r\n", piece("")),
}


@contextlib.contextmanager
def bare(serve: Callable[[Send, bytes], None]) -> Iterator[str]:
    """Run `serve(send, request)` for each connection in a thread; `send` ends it where we left."""
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def one(connection: socket.socket) -> None:
        def send(data: bytes) -> None:
            if ended.is_set():
                raise ConnectionAbortedError
            for first in range(0, len(data), 65536):  # each has its own five seconds
                connection.sendall(data[first : first + 65536])

        with contextlib.suppress(OSError), connection:
            connection.settimeout(5)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536) or b"\r\n\r\n"
            # What stays unread when a socket is closed lets the client lose the answer.
            length = re.search(rb"content-length: *(\d+)", request, re.IGNORECASE)
            whole = request.index(b"\r\n\r\n") + 4 + (int(length[1]) if length else 0)
            while len(request) < whole and (more := connection.recv(65536)):
                request += more
            serve(send, request)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listening.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        ended.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def endless(head: bytes, unit: bytes, *, pause: float) -> Callable[[Send, bytes], None]:
    """Send `unit` for ever: slowly, or as fast as it goes."""

    def serve(send: Send, _: bytes) -> None:
        send(head)
        data = unit if pause else unit * (65536 // len(unit))
        while True:
            send(data)
            time.sleep(pause)

    return serve


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[allowances.Allowance]]:
    """The allowances of all calls, with short times."""
    made: list[allowances.Allowance] = []

    class Recorded(allowances.Allowance):
        def __init__(self, *times: float) -> None:
            super().__init__(*times)
            made.append(self)

    monkeypatch.setattr(http_client, "Allowance", Recorded)
    monkeypatch.setattr(http_client, "CALL_SECONDS", SECONDS)
    monkeypatch.setattr(http_client, "_ERROR_SECONDS", SECONDS)
    monkeypatch.delenv("TINY_API_KEY", raising=False)
    return made


def call(url: str, seconds: float = SECONDS) -> Any:
    return Client("tiny", url, "TINY_API_KEY", seconds).get("/v1/models")


def stream(url: str, seconds: float = SECONDS) -> list[str]:
    events = Client("tiny", url, "TINY_API_KEY", seconds).post("/v1/chat/completions", {})
    with contextlib.closing(events):
        return list(events.pieces())


def error_of(asking: Callable[..., Any], url: str, **more: Any) -> VzipError:
    with pytest.raises((BackendError, InvalidInputError)) as caught:
        asking(url, **more)
    return caught.value


def streamed(head: bytes, unit: bytes) -> tuple[bytes, bytes]:
    return head.replace(b"application/json", b"text/event-stream"), unit


ALL = {
    **{f"call: {place}": (call, *sent) for place, sent in PLACES.items()},
    **{f"stream: {place}": (stream, *streamed(*sent)) for place, sent in PLACES.items()},
    **{f"stream: {place}": (stream, *sent) for place, sent in STREAMED.items()},
}
# What is known of the answer by then is said in the place of the time that is over.
KNOWN = {"error page": "HTTP 500", "redirection": "HTTP 302", "no stream": "no stream of events"}


class TestWithoutEnd:
    @pytest.mark.parametrize("where", [*ALL, *LIVELY])
    def test_a_dripping_server_is_left(self, taken, where):
        asking, *sent = ALL.get(where) or (stream, *LIVELY[where])
        with bare(endless(*sent, pause=0.01)) as url:
            began = time.monotonic()
            error = error_of(asking, url)
            assert time.monotonic() - began < 4 * SECONDS
        says(error, got=KNOWN.get(where.partition(": ")[2], f"within {SECONDS} s"))

    @pytest.mark.parametrize("where", ALL)
    def test_a_flood_is_bounded(self, taken, where):
        asking, *sent = ALL[where]
        with bare(endless(*sent, pause=0)) as url:
            error = error_of(asking, url, seconds=20)
        assert isinstance(error, BackendError)
        most = {asking is call: http_client._LONGEST_PAGE}.get(True, http_client._LONGEST_GAP)
        if where.partition(": ")[2] in list(PLACES)[:5]:
            most = allowances.LONGEST_HEAD
        assert taken[-1].taken <= most + 2**17

    @pytest.mark.parametrize("text", ["x" * 900, "", "\n"])
    def test_an_answer_is_no_longer_than_was_asked_for(self, taken, text):
        def serve(send: Send, request: bytes) -> None:
            if request.startswith(b"GET"):
                send(JSON + b"Content-Length: %d\r\n\r\n" % len(MODELS) + MODELS)
                return
            endless(STREAM + b"\r\n", piece(text), pause=0 if text.strip() else 0.01)(send, b"")

        with bare(serve) as url:
            llm = TinyServer(url, TOKENS, seconds=20 if text.strip() else SECONDS)
            error = error_of(lambda _: llm.ask(EMBEDS, "?", max_new_tokens=3), url)
        says(error, got="3072 characters" if text.strip() else f"within {SECONDS} s")
        assert taken[-1].taken < 2**18

    def test_silence_between_pieces(self, taken, monkeypatch):
        monkeypatch.setattr(http_client, "IDLE_SECONDS", SECONDS)

        def serve(send: Send, _: bytes) -> None:
            send(STREAM + b"\r\n")
            for _ in range(3):
                time.sleep(SECONDS / 2)
                send(piece("x"))
            time.sleep(2 * SECONDS)

        with bare(serve) as url:
            events = Client("tiny", url, "TINY_API_KEY", 20).post("/", {}).pieces()
            assert [next(events) for _ in range(3)] == ["x"] * 3  # in more than the idle time
            with refused(BackendError, got=f"sent nothing for {SECONDS} s", cure="seconds="):
                next(events)

    def test_the_last_wait_is_a_short_one(self, taken):
        def serve(send: Send, _: bytes) -> None:
            time.sleep(1.2 * SECONDS)
            send(STREAM + b"\r\n")
            time.sleep(10 * SECONDS)

        with bare(serve) as url:
            began = time.monotonic()
            says(error_of(stream, url, seconds=2 * SECONDS), got=f"within {2 * SECONDS} s")
            assert time.monotonic() - began < 3 * SECONDS

    def test_an_error_is_told_though_its_page_never_ends(self, taken):
        with bare(endless(*PLACES["error page"], pause=0.01)) as url:
            began = time.monotonic()
            says(error_of(stream, url, seconds=20), got="HTTP 500 Oops: xx")
            assert time.monotonic() - began < 4 * SECONDS

    def test_a_server_that_never_begins_tls(self, taken):
        listening = socket.create_server(("127.0.0.1", 0))
        with contextlib.closing(listening):
            url = f"https://127.0.0.1:{listening.getsockname()[1]}"
            began = time.monotonic()
            says(error_of(call, url), got=f"within {SECONDS} s")
            assert time.monotonic() - began < 4 * SECONDS

    @pytest.mark.parametrize("head", [b"HTTP/1.1 200 ", b"HTTP/1.1 200 OK\r\n", b""])
    @pytest.mark.parametrize("pause", [0.01, 0])
    def test_a_proxy_on_the_way_to_tls(self, taken, monkeypatch, head, pause):
        unit = b"X: y\r\n" if head.endswith(b"\n") else b"x"
        with bare(endless(head, unit, pause=pause)) as url:
            monkeypatch.setenv("https_proxy", url)
            monkeypatch.delenv("no_proxy", raising=False)
            monkeypatch.delenv("NO_PROXY", raising=False)
            error = error_of(call, "https://server.example", seconds=SECONDS if pause else 20)
        assert isinstance(error, BackendError)
        says(error, got="(through the proxy" if pause else ("server.example", ""))
        assert taken[-1].taken <= allowances.LONGEST_HEAD + 2**17

    def test_a_server_that_takes_no_request(self, taken):
        listening = socket.create_server(("127.0.0.1", 0))
        with contextlib.closing(listening):
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            client = Client("tiny", url, "TINY_API_KEY", SECONDS)
            with refused(BackendError, got=f"within {SECONDS} s"):
                client.post("/", {"x": "x" * 20_000_000})

    def test_addresses_of_a_host_share_the_time(self, taken, monkeypatch):
        # Of a network that is not routed, or whose packets nobody answers.
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        where = full.getsockname()
        waiting = []
        for _ in range(4):  # until its queue is full
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(where)
            waiting.append(each)
        many = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", where)] * 8
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: many)
        began = time.monotonic()
        says(error_of(call, f"http://127.0.0.1:{where[1]}"), got=f"within {SECONDS} s")
        assert time.monotonic() - began < 4 * SECONDS
        for each in (*waiting, full):
            each.close()


class TestLies:
    @pytest.mark.parametrize(
        ("sent", "got"),
        [
            (JSON + b"Content-Length: 99\r\n\r\n" + MODELS, "closed the connection"),
            (JSON + b"Content-Length: " + b"9" * 1000 + b"\r\n\r\n" + MODELS, "closed the"),
            (JSON + b"Content-Length: 5\r\n\r\n" + MODELS, "not JSON"),
            (JSON + CHUNKED + b"5\r\n" + MODELS, "not JSON|closed the connection"),
            (JSON + CHUNKED + b"f" * 1000 + b"\r\n" + MODELS, "closed the connection"),
            (JSON + CHUNKED + b"-1\r\n" + MODELS, "closed|not JSON"),
            (JSON + CHUNKED + b"zz\r\n" + MODELS, "closed the connection"),
            (OK + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b", "encoding 'gzip'"),
            (JSON + b"\r\n\xff\xfe", "not JSON"),
            (JSON + b"\r\n" + b"[" * 100_000, "not JSON"),
            (JSON + b"\r\n" + b'{"a":' * 100_000, "not JSON"),
            (JSON + b"\r\n" + b"9" * 5000, "not JSON"),
            (b"HTTP/1.1 99999999999 OK\r\n\r\n", "not HTTP"),
            (b"HTTP/1.1 500 \x1b[2J\r\n\r\n" + b"[" * 100_000, "HTTP 500"),
            (b"HTTP/1.1 204 No\r\n\r\n", "not JSON"),
            (b"HTTP/7.7 200 OK\r\n\r\n{}", "not HTTP"),
        ],
    )
    def test_of_a_page(self, taken, sent, got):
        with bare(lambda send, _: send(sent)) as url:
            error = error_of(call, url)
        assert isinstance(error, BackendError)
        assert any(each in error.got for each in got.split("|")), error

    @pytest.mark.parametrize(
        "head",
        [
            b"\r\n",
            b"Content-Length: -7\r\n\r\n",
            b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
            b"Content-Encoding: identity\r\n\r\n",
        ],
    )
    def test_of_which_nothing_depends(self, taken, head):
        with bare(lambda send, _: send(JSON + head + MODELS)) as url:
            assert call(url) == json.loads(MODELS)

    @pytest.mark.parametrize(
        "data",
        [
            "[" * 100_000,
            "9" * 5000,
            "NaN",
            '{"choices": [{"delta": {"content": [1]}}]}',
            '{"choices": {"0": 1}}',
            '{"choices": 7}',
        ],
    )
    def test_of_an_event(self, taken, data):
        with bare(lambda send, _: send(STREAM + b"\r\n" + event(data))) as url:
            says(error_of(stream, url), got="no piece of an answer")

    @pytest.mark.parametrize("ids", ["x", [1.5], [True], [-1], [2**31], {"0": 1}, ["1"], None])
    def test_of_ids(self, ids):
        with pytest.raises(TypeError):
            http_client.checked_ids(ids)
        with pytest.raises(TypeError):
            _Answer.piece(None, {"meta_info": {"finish_reason": None}, "output_ids": ids})

    def test_a_thousand_models_make_no_page(self, fake_models):
        fake_models.models = tuple(f"model-{number}" for number in range(1000))
        with refused(InvalidInputError, got=("'model-0'", "and 980 more")) as caught:
            TinyServer(fake_models.url, TOKENS)
        assert len(str(caught.value)) < 1000


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("TINY_API_KEY", raising=False)
    with fake_server() as server:
        yield server


def test_what_is_closed_is_closed_for_the_server_too(taken):
    left = threading.Event()

    def serve(send: Send, _: bytes) -> None:
        send(STREAM + b"\r\n" + piece("x"))
        try:
            while True:
                send(b": waiting\n\n")
                time.sleep(0.005)
        except OSError:
            left.set()

    with bare(serve) as url:
        events = Client("tiny", url, "TINY_API_KEY", 20).post("/", {})
        pieces = events.pieces()
        assert next(pieces) == "x"
        events.close()
        assert left.wait(2)  # while we still have both


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9])
def test_no_time(seconds):
    with refused(InvalidInputError, got="seconds=", expected="above 0"):
        Client("tiny", "http://127.0.0.1:1", "TINY_API_KEY", seconds)


def test_an_answer_of_many_pieces_is_taken(taken):
    """What is honest passes: 20,000 pieces, 6 MB, between comments."""
    sent = STREAM + b"\r\n" + (b": so\n\n" + piece("word " * 40)) * 20_000 + answer("end")
    with bare(lambda send, _: send(sent)) as url:
        assert len(stream(url, seconds=60)) == 20_001
