"""`vzip serve` as a process: what it refuses to do, how it starts, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.places import GOLDEN
from tests.runtime.service.serving import SCENES
from vzip.runtime.cli.main import main

TINY = str(GOLDEN / "tiny_bundle")
KEY = "a-key-of-some-length"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], ("--host 0.0.0.0", "--api-key", "--insecure")),
        (["--host", "::"], ("--host ::", "--api-key")),
        (["--host", "example.org"], ("example.org", "IP address")),
        (["--api-key", "short"], ("5 characters", "16")),
        (["--port", "70000"], ("70000", "65535")),
        (["--batch", "9"], ("9", "at most 3")),
        (["--queue", "0"], ("queue",)),
        (["--delay-ms", "-1"], ("delay",)),
        (["--drain", "0"], ("--drain",)),
        (["--timeout", "nan"], ("seconds",)),
        (["--max-body-mb", "0"], ("body",)),
        (["--llm", "nothing:x/y"], ("nothing",)),
        ([], ("random weights",)),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_line(
    options: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", TINY, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", TINY, "--llm", "none", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


@pytest.fixture
def process() -> Iterator[Any]:
    """Start a service; yield a way to do so."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environ: str) -> tuple[subprocess.Popen[str], int]:
        code = "import sys; from vzip.runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "serve", TINY, "--llm", "none", "--port", "0"]
        made = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
        )
        started.append(made)
        assert made.stderr is not None
        line = made.stderr.readline()
        assert line.startswith("serving tiny_bundle at http://127.0.0.1:"), line
        return made, int(line.rpartition(":")[2])

    yield start
    for each in started:
        each.kill()
        each.wait()


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST" if body else "GET", path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data


def test_sigterm_lets_those_inside_have_their_answers(process: Any) -> None:
    made, port = process()
    picture = SCENES[0].read_bytes()
    assert ask(port, "/v1/show", picture)[0] == 200
    with socket.create_connection(("127.0.0.1", port), timeout=30) as wire:
        head = (
            f"POST /v1/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(picture)}\r\n\r\n"
        )
        wire.sendall(head.encode() + picture[:1000])
        while b"requests_in_hand 1.0" not in ask(port, "/metrics")[1]:
            time.sleep(0.002)
        made.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        wire.sendall(picture[1000:])
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert b" 200 " in answer.splitlines()[0]
    assert made.wait(20) == 0
    assert "all requests were answered" in made.stderr.read()
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/health")


def test_a_second_look_at_the_key_in_the_environment(process: Any) -> None:
    _, port = process(VZIP_API_KEY=KEY)
    assert ask(port, "/v1/models")[0] == 401
    status, data = ask(port, "/v1/models", Authorization=f"Bearer {KEY}")
    assert status == 200
    assert json.loads(data)["data"][0]["id"] == "tiny_bundle"


def test_connections_that_ask_nothing_are_dropped(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.runtime.service.serving import served
    from vzip.runtime.service.adapters import server

    monkeypatch.setattr(server, "_TICK", 0.05)
    monkeypatch.setattr(server, "_HEADERS", 0.1)
    with served(GOLDEN / "tiny_bundle") as each:
        for sent in (b"", b"POST /v1/show HTTP/1.1\r\nHost: loc"):
            with each.socket() as wire:
                wire.settimeout(5)
                wire.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert wire.recv(100) == b""
        # One that is being answered isn't.
        with each.socket() as wire:
            wire.sendall(b"POST /v1/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.4)
            wire.sendall(b"no image.")
            assert b" 400 " in wire.recv(4096)


def test_one_bundle_is_served_from_a_thread_s_many(tmp_path: Path) -> None:
    """Many threads, many pictures, small memory: nothing is mixed up in the cache."""
    import io

    from PIL import Image

    from tests.runtime.service.serving import served

    pictures = []
    for number in range(24):
        data = io.BytesIO()
        Image.new("RGB", (20 + number, 30), (number * 10, 0, 255 - number * 10)).save(data, "PNG")
        pictures.append(data.getvalue())
    with served(GOLDEN / "tiny_bundle", cache_bytes=2000) as each:
        alone = [each.ask("POST", "/v1/show", picture)[1]["kept"] for picture in pictures]
        wrong: list[int] = []

        def client(first: int) -> None:
            for number in range(first, first + 24):
                at = number % 24
                if each.ask("POST", "/v1/show", pictures[at])[1]["kept"] != alone[at]:
                    wrong.append(at)

        threads = [threading.Thread(target=client, args=(first,)) for first in range(0, 24, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert each.service.remembered.bytes <= 2000
