"""The service over HTTP: bad input of every kind is one clear error, and the next one is served."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.places import GOLDEN
from tests.runtime.service.serving import SCENES, Served, chat, data_url, served
from vzip.runtime.encoder import VisionEncoder
from vzip.runtime.tokens.file import TokenFile

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The golden bundle, of 1 to 3 pictures, without an LLM."""
    with served(GOLDEN / "tiny_bundle", body=2**20, pixels=2**22, pictures=3) as each:
        yield each


def png(width: int = 20, height: int = 16, colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return data.getvalue()


def bomb(side: int = 30000) -> bytes:
    """A PNG that says it has nearly a thousand million pixels, in a few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))


def still_serves(each: Served) -> None:
    status, answer, _ = each.ask("POST", "/v1/show", png(), Content_Type="image/png")
    assert status == 200, answer


INFER = "/v2/models/demo/infer"


def tensor(**changed: Any) -> dict[str, Any]:
    """A request of the Open Inference Protocol that is right but for what is changed."""
    one = {"name": "image", "datatype": "UINT8", "shape": [1, 16, 16, 3], "data": [7] * 768}
    return {"inputs": [{**one, **changed}]}


BODIES: dict[str, tuple[str, Any, int, tuple[str, ...]]] = {
    "no JSON": ("/v1/chat/completions", b"{", 400, ("JSON",)),
    "deep JSON": ("/v1/chat/completions", b"[" * 100000, 400, ("JSON",)),
    "a key twice": ("/v1/encode", b'{"images": [], "images": []}', 400, ("JSON",)),
    "a number": ("/v1/encode", b"7", 400, ("JSON object",)),
    "no UTF-8": ("/v1/encode", b"\xff\xfe{}", 400, ("JSON",)),
    "no pictures": ("/v1/encode", {"images": []}, 400, ("images",)),
    "no base64": ("/v1/encode", {"images": ["data:image/png;base64,%%"]}, 400, ("base64",)),
    "no data URL": ("/v1/encode", {"images": ["data:,hello"]}, 400, ("base64",)),
    "a URL": ("/v1/encode", {"images": ["http://10.0.0.1/a.png"]}, 400, ("fetches nothing",)),
    "a file": ("/v1/encode", {"images": ["file:///etc/passwd"]}, 400, ("fetches nothing",)),
    "no picture": ("/v1/encode", {"images": [data_url(b"hello")]}, 400, ("format",)),
    "half a picture": ("/v1/encode", {"images": [data_url(png()[:50])]}, 400, ("whole",)),
    "a bomb": ("/v1/encode", {"images": [data_url(bomb())]}, 400, ("30000×30000",)),
    "a large one": ("/v1/encode", {"images": [data_url(png(2100, 2000))]}, 400, ("4194304",)),
    "too many": ("/v1/encode", {"images": [data_url(png())] * 4}, 400, ("4 pictures", "3")),
    "an unknown model": ("/v2/models/other/infer", tensor(), 404, ("'other'", "demo")),
    "an unknown version": ("/v2/models/demo/versions/7/infer", tensor(), 404, ("'7'", "1")),
    "no inputs": (INFER, {}, 400, ("inputs",)),
    "inputs of numbers": (INFER, {"inputs": [1]}, 400, ("inputs",)),
    "a wrong name": (INFER, tensor(name="picture"), 400, ("picture", "image")),
    "a wrong dtype": (INFER, tensor(datatype="FP32"), 400, ("float32", "uint8")),
    "an unknown dtype": (INFER, tensor(datatype="FLOAT"), 400, ("FLOAT", "UINT8")),
    "no dtype": (INFER, tensor(datatype=None), 400, ("UINT8",)),
    "a wrong shape": (INFER, tensor(shape=[1, 16, 48]), 400, ("[1, 16, 48]",)),
    "a negative extent": (INFER, tensor(shape=[-1, 768]), 400, ("shape",)),
    "a huge shape": (INFER, tensor(shape=[2**31 - 1] * 8), 400, ("768 values",)),
    "too many in a batch": (INFER, tensor(shape=[4, 16, 16, 3], data=[1] * 3072), 400, ("1 to 3",)),
    "none in a batch": (INFER, tensor(shape=[0, 16, 16, 3], data=[]), 400, ("batch of 0",)),
    "too little data": (INFER, tensor(data=[1]), 400, ("768 numbers",)),
    "numbers too large": (INFER, tensor(data=[256] * 768), 400, ("uint8",)),
    "numbers with a point": (INFER, tensor(data=[0.5] * 768), 400, ("uint8",)),
    "words for numbers": (INFER, tensor(data=["a"] * 768), 400, ("768 values",)),
    "lists of several lengths": (INFER, tensor(data=[[1], [1, 2]]), 400, ("768 numbers",)),
    "no data": (INFER, tensor(data=None), 400, ("no data",)),
    "more binary data than there is": (
        INFER, tensor(parameters={"binary_data_size": 768}), 400, ("768", "0 bytes"),
    ),
    "an unknown output": (
        INFER, {**tensor(), "outputs": [{"name": "x"}]}, 400, ("'x'", "image_embeds"),
    ),
    "an id that is no text": (INFER, {**tensor(), "id": 7}, 400, ("id",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_one_error_in_the_protocol_s_form(tiny: Served, name: str) -> None:
    path, body, status, words = BODIES[name]
    got, answer = tiny.post(path, body)
    assert got == status, answer
    message = answer["error"] if path.startswith("/v2") else answer["error"]["message"]
    assert isinstance(message, str)
    assert message.count("\n") == 0
    for word in words:
        assert word in message
    still_serves(tiny)


@pytest.mark.parametrize("length", ["-1", "999999", "12x", "9" * 5000, "٣"])
def test_a_wrong_length_of_the_header_is_refused(tiny: Served, length: str) -> None:
    body = json.dumps(tensor()).encode()
    with tiny.socket() as wire:
        head = (
            f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            f"Inference-Header-Content-Length: {length}\r\nConnection: close\r\n\r\n"
        )
        wire.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert b" 400 " in answer.splitlines()[0]
    still_serves(tiny)


def test_a_tensor_of_bytes_that_is_cut_off(tiny: Served) -> None:
    for blob in (b"\x05\0\0\0ab", b"\1", b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0"):
        one = {
            "name": "picture", "datatype": "BYTES", "shape": [1],
            "parameters": {"binary_data_size": len(blob)},
        }  # fmt: skip
        head = json.dumps({"inputs": [one]}).encode()
        status, answer, _ = tiny.ask(
            "POST", "/v2/models/demo-pictures/infer", head + blob,
            Inference_Header_Content_Length=str(len(head)),
        )  # fmt: skip
        assert status == 400, answer
        assert "whole elements" in answer["error"]


def test_an_unknown_path_and_method(tiny: Served) -> None:
    status, answer, _ = tiny.ask("GET", "/v2/models/demo/infer")
    assert (status, [*answer]) == (405, ["error"])
    status, answer, _ = tiny.ask("GET", "/docs")
    assert (status, answer["error"]["code"]) == (404, "not_found")


def test_a_body_that_is_too_large_is_refused_before_it_is_read(tiny: Served) -> None:
    with tiny.socket() as wire:
        wire.sendall(
            b"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"
        )
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert b" 413 " in answer.splitlines()[0]
    assert b"1048576" in answer


def test_a_body_without_a_length_is_refused_where_it_becomes_too_large(tiny: Served) -> None:
    with tiny.socket() as wire:
        wire.sendall(
            b"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        try:
            for _ in range(40):
                wire.sendall(chunk)
        except OSError:
            pass
        answer = wire.recv(65536)
    assert b" 413 " in answer.splitlines()[0]
    still_serves(tiny)


def test_a_packed_body_is_refused(tiny: Served) -> None:
    status, answer, _ = tiny.ask("POST", "/v1/encode", b"x", Content_Encoding="gzip")
    assert status == 400
    assert "gzip" in answer["error"]["message"]


def test_half_an_upload_leaves_nothing_behind(tiny: Served) -> None:
    with tiny.socket() as wire:
        wire.sendall(
            b"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\nabc"
        )
        until(lambda: tiny.service.admission.inside == 1)
    until(lambda: tiny.service.admission.inside == 0)
    assert tiny.service.admission.held_bytes == 0
    still_serves(tiny)


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_slow_upload_is_ended() -> None:
    with (
        served(GOLDEN / "tiny_bundle", upload_seconds=0.2) as each,
        each.socket() as wire,
    ):
        wire.sendall(
            b"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\nabc"
        )
        answer = wire.recv(65536)
        assert b" 408 " in answer.splitlines()[0]
        still_serves(each)


def test_the_deadline_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(GOLDEN / "tiny_bundle", seconds=0.3) as each:
        run = each.service._batcher._backend.run

        def slowly(feeds: Any) -> Any:
            time.sleep(0.5)
            return run(feeds)

        monkeypatch.setattr(each.service._batcher._backend, "run", slowly)
        status, answer, response = each.ask("POST", "/v1/show", png())
        assert (status, answer["error"]["code"]) == (504, "expired")
        assert response.headers["Retry-After"]
        monkeypatch.undo()
        until(lambda: not each.service._batcher._led)
        still_serves(each)


def test_a_client_that_left_is_not_worked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    with served(GOLDEN / "tiny_bundle", workers=1) as each:
        go, inside = threading.Event(), threading.Event()
        run = each.service._batcher._backend.run
        calls = []

        def stuck(feeds: Any) -> Any:
            calls.append(1)
            inside.set()
            assert go.wait(10)
            return run(feeds)

        monkeypatch.setattr(each.service._batcher._backend, "run", stuck)
        head = b"POST /v1/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        wires = [each.socket() for _ in range(4)]
        for number, wire in enumerate(wires):
            body = png(20 + number)
            wire.sendall(head % len(body) + body)
        assert inside.wait(10)
        until(lambda: each.service.admission.inside == 4)
        for wire in wires:
            wire.close()
        until(lambda: each.service.admission.inside == 0)
        go.set()
        monkeypatch.undo()
        still_serves(each)
        assert len(calls) == 1, "pictures of clients that left were encoded"


def test_the_house_that_is_full_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(GOLDEN / "tiny_bundle", queue=1) as each, each.socket() as wire:
        wire.sendall(b"POST /v1/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n")
        until(lambda: each.service.admission.inside == 1)
        status, answer, response = each.ask("POST", "/v1/show", png())
        assert (status, answer["error"]["code"]) == (429, "busy")
        assert int(response.headers["Retry-After"]) >= 1
        assert each.ask("GET", "/health")[0] == 200
        assert b'route="POST /v1/show",status="429"' in each.ask("GET", "/metrics")[1]


def test_who_has_no_key_is_asked_for_it() -> None:
    with served(GOLDEN / "tiny_bundle", api_key=KEY) as each:
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": f"Basic {KEY}"}):
            for path in ("/v1/models", "/v2/models/demo", "/metrics"):
                status, answer, response = each.ask("GET", path, **given)
                assert status == 401, path
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert KEY not in json.dumps(answer)
        right = {"Authorization": f"Bearer {KEY}"}
        assert each.ask("GET", "/v1/models", **right)[0] == 200
        assert each.ask("POST", "/v1/show", png(), **right)[0] == 200
        for path in ("/", "/health", "/ready", "/v2/health/live", "/v2/health/ready"):
            assert each.ask("GET", path)[0] == 200, path


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8080"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "[", "Origin": "http://["},
    ],
    ids=str,
)
def test_pages_of_other_sites_can_t_ask(tiny: Served, headers: dict[str, str]) -> None:
    status, _, _ = tiny.ask("POST", "/v1/show", png(), **headers)
    assert status == 403


def test_the_page_may_ask(tiny: Served) -> None:
    for host in (f"localhost:{tiny.port}", f"127.0.0.1:{tiny.port}"):
        given = {"Host": host, "Origin": f"http://{host}"}
        assert tiny.ask("POST", "/v1/show", png(), **given)[0] == 200


def test_no_answer_holds_a_path_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vzip.runtime.errors import BackendError

    with served(GOLDEN / "tiny_bundle", cache=str(tmp_path / "cache")) as each:

        def fails(_: Any) -> Any:
            raise BackendError(f"'{tmp_path}/engine' is broken")

        monkeypatch.setattr(each.service._batcher._backend, "run", fails)
        status, answer = each.post("/v1/encode", {"images": [data_url(png())]})
        assert status == 500
        assert str(tmp_path) not in json.dumps(answer)
        monkeypatch.undo()
        still_serves(each)
        clip = data_url(b"\0\0\0\x18ftypmp42" + bytes(100), "video/mp4")
        part = {"type": "video_url", "video_url": {"url": clip}}
        for body in (
            chat(png()),
            {"model": "demo", "messages": [{"role": "user", "content": [part]}]},
        ):
            status, answer = each.post("/v1/chat/completions", body)
            assert status == 404  # there is no LLM
            assert "/tmp" not in json.dumps(answer)


def test_a_cache_that_fails_is_left_and_the_request_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    with served(GOLDEN / "tiny_bundle", cache=str(tmp_path / "cache"), cache_bytes=0) as each:
        still_serves(each)
        assert len(list((tmp_path / "cache").iterdir())) == 1
        shutil.rmtree(tmp_path / "cache")
        still_serves(each)
        still_serves(each)


def test_tokens_come_as_a_token_file(tiny: Served, tmp_path: Path) -> None:
    pictures = [png(colour="red"), png(30, 20, "blue"), SCENES[0].read_bytes()]
    status, data = tiny.post("/v1/encode", {"images": [data_url(each) for each in pictures]})
    assert status == 200
    (tmp_path / "t.safetensors").write_bytes(data)
    with (
        VisionEncoder.open(GOLDEN / "tiny_bundle", threads=1) as encoder,
        TokenFile.open(tmp_path / "t.safetensors") as file,
    ):
        for number, each in enumerate(pictures):
            wanted = encoder.image_tokens(each, several=True)
            got = file.read(str(number))
            assert np.array_equal(got.kept, wanted.kept)
            np.testing.assert_allclose(got.tokens, wanted.embeds, atol=1e-5, rtol=0)


def test_a_seen_picture_is_remembered(tiny: Served) -> None:
    picture = png(33, 44, "green")
    first = tiny.ask("POST", "/v1/show", picture)[1]
    again = tiny.ask("POST", "/v1/show", picture)[1]
    assert (first.pop("remembered"), again.pop("remembered")) == (False, True)
    first.pop("encode_ms")
    again.pop("encode_ms")
    assert first == again


def test_it_is_not_ready_while_it_is_left() -> None:
    with served(GOLDEN / "tiny_bundle") as each:
        assert each.ask("GET", "/ready")[0] == 200
        each.service.admission.refuse_all()
        for path in ("/ready", "/v2/health/ready"):
            status, _, response = each.ask("GET", path)
            assert status == 503
            assert response.headers["Retry-After"]
        assert each.ask("GET", "/health")[0] == 200
        status, answer, _ = each.ask("POST", "/v1/show", png())
        assert (status, answer["error"]["code"]) == (503, "draining")


def test_a_bug_of_ours_is_an_answer_without_its_words(
    tiny: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("/secret/path")

    monkeypatch.setattr(tiny.service, "picture", broken)
    status, answer, _ = tiny.ask("POST", "/v1/show", png())
    assert status == 500
    assert "secret" not in json.dumps(answer)
    assert "KeyError" in caplog.text
    monkeypatch.undo()
    still_serves(tiny)
