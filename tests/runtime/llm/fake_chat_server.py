"""A server that speaks OpenAI's chat protocol, for tests: it says what it is told to."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Handler = http.server.BaseHTTPRequestHandler


@dataclass(frozen=True)
class Request:
    """What came in; `headers` by lower-case name."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


def event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def piece(text: str | None, finish: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def answer(*pieces: str, finish: str = "stop") -> bytes:
    """A whole answer, as vLLM 0.32 sends it."""
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    return role + b"".join(map(piece, pieces)) + piece(None, finish) + event("[DONE]")


def send(handler: Handler, body: bytes, status: int = 200, kind: str = "application/json") -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def stream(handler: Handler, chunks: Sequence[bytes], *, end: bool = True) -> None:
    """Send chunks as they are divided; without the last one where `end` is false."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for chunk in chunks:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.wfile.flush()
    if end:
        handler.wfile.write(b"0\r\n\r\n")
    handler.close_connection = True


@dataclass
class FakeServer:
    """A running server.

    Attributes:
        url: Its address.
        requests: What came in.
        models: The names that it lists.
        reply: What answers a question; the default says ``An answer.``.
        pages: Path → what answers any other request, as JSON or a function.
    """

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    models: tuple[str, ...] = ("demo",)
    reply: Callable[[Handler, Any], None] = lambda handler, body: stream(
        handler, [answer(" An", " answer.")]
    )
    pages: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> list[Any]:
        """Bodies of the questions, in order."""
        return [each.body for each in self.requests if each.path == "/v1/chat/completions"]

    def respond(self, handler: Handler, request: Request) -> None:
        if request.path == "/v1/chat/completions" and request.method == "POST":
            self.reply(handler, request.body)
        elif request.path in self.pages:
            page = self.pages[request.path]
            if callable(page):
                page = page(handler, request.body)
            if page is not None:
                send(handler, json.dumps(page).encode())
        elif request.path == "/v1/models":
            listed = [{"id": name, "object": "model"} for name in self.models]
            send(handler, json.dumps({"object": "list", "data": listed}).encode())
        else:
            send(handler, b'{"detail":"Not Found"}', 404)


@contextlib.contextmanager
def fake_server(certificate: Any = None) -> Iterator[FakeServer]:
    """Run a server on a free port of this machine.

    Args:
        certificate: An `ssl.SSLContext`, to speak TLS.
    """
    fake = FakeServer()

    class Protocol(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, json.loads(data) if data else None)
            fake.requests.append(request)
            # A client that left, on purpose or not, is no error of the server.
            with contextlib.suppress(ConnectionError):
                fake.respond(self, request)

        do_GET = do_POST = _serve  # noqa: N815  http.server's names

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Protocol)
    server.daemon_threads = True
    if certificate is not None:
        server.socket = certificate.wrap_socket(server.socket, server_side=True)
    scheme = "http" if certificate is None else "https"
    fake.url = f"{scheme}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
