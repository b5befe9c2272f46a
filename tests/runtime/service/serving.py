"""A service that runs in a thread of the test, and what speaks to it without a client's manners."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzip.runtime import demo, open_llm
from vzip.runtime.service.adapters.server import make_server
from vzip.runtime.service.adapters.web import Web, WebSettings
from vzip.runtime.service.answering import Answering
from vzip.runtime.service.encoding import EncodingService
from vzip.runtime.service.figures import PrometheusFigures
from vzip.runtime.service.settings import ServiceSettings

SCENES = sorted((Path(demo.__file__).parent / "pictures").glob("*.jpg"))


@dataclass
class Served:
    """A service that runs.

    Attributes:
        port: Where.
        service: Its core.
        web: What is served.
        server: uvicorn's server.
        thread: Where it runs.
    """

    port: int
    service: EncodingService
    web: Web
    server: Any
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        """Return a response's status, its JSON or bytes, and the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            response = connection.getresponse()
            data = response.read()
        kind = response.headers.get_content_type()
        return response.status, json.loads(data) if kind == "application/json" else data, response

    def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any]:
        """Send JSON; return status and answer."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content_Type": "application/json", **headers}
        return self.ask("POST", path, body, **headers)[:2]

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def counted(self, name: str, **labels: str) -> float:
        """Return a counter's value."""
        value = self.web.figures._registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@contextlib.contextmanager
def served(bundle: Path, *, llm: bool = False, **changed: Any) -> Iterator[Served]:
    """Serve a bundle; settings are of `ServiceSettings` or `WebSettings`."""
    own = {name for name in WebSettings.__dataclass_fields__ if name in changed}
    web_settings = WebSettings(name="demo", **{name: changed.pop(name) for name in own})
    settings, figures = ServiceSettings(threads=1, **changed), PrometheusFigures()
    with EncodingService(bundle, settings, figures) as service:
        answering = None
        if llm:
            answering = Answering(
                open_llm(service.bundle, threads=1),
                local=True,
                answers=settings.answers,
                kept=settings.conversations,
                figures=figures,
            )
        web = Web(service, web_settings, answering)
        ready: list[int] = []
        begun = threading.Event()

        def started(_: str, port: int) -> None:
            ready.append(port)
            begun.set()

        server = make_server(web, host="127.0.0.1", port=0, drain_seconds=10, started=started)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert begun.wait(20)
        try:
            yield Served(ready[0], service, web, server, thread)
        finally:
            server.should_exit = True
            thread.join(20)
            if answering is not None:
                answering.close()
        assert not thread.is_alive()
        assert service.admission.inside == 0
        assert service.admission.held_bytes == 0


def data_url(picture: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def chat(
    *pictures: bytes, question: str = "What digit is there?", **changed: Any
) -> dict[str, Any]:
    """Return the body of a question about pictures."""
    content = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    parts = [*content, {"type": "text", "text": question}]
    return {"model": "demo", "messages": [{"role": "user", "content": parts}], **changed}
