"""The client of OpenAI-compatible servers, against a real server in a thread."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused, says
from tests.runtime.llm.fake_chat_server import (
    FakeServer,
    answer,
    event,
    fake_server,
    piece,
    send,
    stream,
)
from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.llm import TokenSpec
from vzip.runtime.llm.server import http_client
from vzip.runtime.llm.server.chat_server import ServerLLM

Broken, Invalid = BackendError, InvalidInputError
KEY = "TINY_API_KEY"
TOKENS = TokenSpec(count=2, hidden_size=4, image_token_id=3)
EMBEDS = np.arange(8, dtype=np.float32).reshape(2, 4)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


class TinyServer(ServerLLM):
    name = "tiny"
    key_variable = KEY

    def part(self, embeds, uuid):
        return {"type": "tokens", "rows": embeds.tolist(), "uuid": uuid}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.delenv(KEY, raising=False)
    with fake_server() as server:
        yield server


@pytest.fixture
def conversation(fake: FakeServer) -> Any:
    return TinyServer(fake.url, TOKENS).conversation(EMBEDS)


def ask(fake: FakeServer, question: str = "What is it?") -> str:
    return TinyServer(fake.url, TOKENS).ask(EMBEDS, question)


def asked(fake: FakeServer, question: str = "What is it?") -> pytest.ExceptionInfo[Exception]:
    """Return the error that a question ends in; it is one line."""
    with pytest.raises((BackendError, InvalidInputError)) as caught:
        ask(fake, question)
    assert str(caught.value).startswith("tiny: ")
    assert "\n" not in str(caught.value)
    return caught


class TestRequest:
    def test_body_of_the_first_turn(self, fake):
        llm = TinyServer(fake.url, TOKENS)
        first = llm.conversation([EMBEDS, EMBEDS + 1])
        assert first.ask("  What is it? ", max_new_tokens=7) == "An answer."
        (body,) = fake.asked
        parts = body["messages"][0]["content"]
        uuids = [part.pop("uuid") for part in parts[:2]]
        assert body == {
            "model": "demo",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "tokens", "rows": EMBEDS.tolist()},
                        {"type": "tokens", "rows": (EMBEDS + 1).tolist()},
                        {"type": "text", "text": "What is it?"},
                    ],
                }
            ],
            "max_tokens": 7,
            "temperature": 0,
            "stream": True,
        }
        assert uuids[0] != uuids[1]
        assert all(len(uuid) == 64 for uuid in uuids)

    def test_uuid_is_that_of_the_tokens(self, fake):
        llm = TinyServer(fake.url, TOKENS)

        def uuid(embeds):
            llm.conversation(embeds).ask("?")
            return fake.asked[-1]["messages"][0]["content"][0]["uuid"]

        assert uuid(EMBEDS) == uuid(EMBEDS.copy()) == uuid(np.asfortranarray(EMBEDS))
        assert uuid(EMBEDS) != uuid(EMBEDS.astype(np.float16))
        assert uuid(EMBEDS) != uuid(EMBEDS[::-1])

    def test_later_turns_carry_all_before(self, fake, conversation):
        assert conversation.ask("What is it?") == "An answer."
        assert conversation.ask("And why?") == "An answer."
        first, second = (body["messages"] for body in fake.asked)
        assert second == [
            *first,
            {"role": "assistant", "content": "An answer."},
            {"role": "user", "content": "And why?"},
        ]
        assert list(conversation.messages) == [
            *second,
            {"role": "assistant", "content": "An answer."},
        ]

    def test_frames_are_images(self, fake):
        video = np.concatenate([EMBEDS, EMBEDS + 1, EMBEDS + 2])
        TinyServer(fake.url, TOKENS).ask(video, "?", frames=3)
        parts = fake.asked[0]["messages"][0]["content"]
        assert [part.get("rows") for part in parts] == [
            EMBEDS.tolist(),
            (EMBEDS + 1).tolist(),
            (EMBEDS + 2).tolist(),
            None,
        ]

    def test_video_with_a_place_of_its_own_is_refused(self, fake):
        tokens = TokenSpec(2, 4, 3, video_token_id=5, frame_count=2)
        with refused(InvalidInputError, got="tiny: got a video's tokens", cure="transformers"):
            TinyServer(fake.url, tokens).conversation(EMBEDS, frames=1)

    @pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/llm/v1", "/llm/"])
    def test_address_with_and_without_v1(self, fake, path):
        prefix = "/llm" if "llm" in path else ""
        fake.pages[f"{prefix}/v1/models"] = {"data": [{"id": "other"}]}
        llm = TinyServer(fake.url + path, TOKENS)
        assert (llm.model, llm.url) == ("other", fake.url + prefix)

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:8000",
            "ftp://localhost",
            "http://",
            "http://localhost:eighty",
            "http://[::1",
            "http://local host",
            "http://lö",
            "http://localhost?key=1",
        ],
    )
    def test_what_is_no_address(self, url):
        with refused(InvalidInputError, got=f"tiny: got the address {url!r}", expected="http://"):
            TinyServer(url, TOKENS)

    def test_password_in_the_address_is_not_repeated(self):
        with refused(InvalidInputError, got="password") as caught:
            TinyServer("http://me:secret@localhost:1", TOKENS)
        assert "secret" not in str(caught.value)


class TestChecks:
    @pytest.mark.parametrize(
        ("embeds", "got"),
        [
            (EMBEDS[:1], "[1, 4]"),
            (EMBEDS[:, :3], "[2, 3]"),
            (EMBEDS[None], "[1, 2, 4]"),
            (EMBEDS * np.nan, "2 of 2 tokens"),
            (EMBEDS.astype(np.float64), "float64"),
            ([], "an empty list"),
        ],
    )
    def test_tokens_before_the_call(self, fake, embeds, got):
        llm = TinyServer(fake.url, TOKENS)
        with refused(InvalidInputError, got=got):
            llm.conversation(embeds)
        assert fake.asked == []

    @pytest.mark.parametrize(
        ("question", "limit", "got"),
        [
            (" ", 1, "empty"),
            ("\ud800", 1, "Unicode"),
            ("Is <image> this?", 1, "'<image>'"),
            ("Is <video> this?", 1, "'<video>'"),
            ("What?", 0, "0 new tokens"),
        ],
    )
    def test_questions_before_the_call(self, fake, conversation, question, limit, got):
        with refused(InvalidInputError, got=got):
            conversation.stream(question, max_new_tokens=limit)
        assert fake.asked == []
        assert conversation.messages == ()


class TestModels:
    def test_one_is_taken_several_are_listed(self, fake):
        fake.models = ("a", "b")
        for model, asked in ((None, "none was named"), ("c", "'c'")):
            with refused(InvalidInputError, got=("'a', 'b'", asked), cure="TinyServer("):
                TinyServer(fake.url, TOKENS, model=model)
        assert TinyServer(fake.url, TOKENS, model="b").model == "b"

    @pytest.mark.parametrize(
        ("page", "got"),
        [
            *(
                (json.dumps(page).encode(), "/v1/models lists no models")
                for page in ({"data": []}, {"models": ["a"]}, [], "x", None)
            ),
            (b"<html>", "text/html"),
        ],
    )
    def test_no_list_of_models(self, fake, page, got):
        kind = "text/html" if page == b"<html>" else "application/json"
        fake.pages["/v1/models"] = lambda handler, _: send(handler, page, kind=kind)
        with refused(BackendError, got=got):
            TinyServer(fake.url, TOKENS)

    def test_not_there(self, fake):
        fake.pages["/v1/models"] = lambda handler, _: send(handler, b"<h1>Not here", 404)
        with refused(BackendError, got=(fake.url, "HTTP 404"), cause="/v1/models", cure="tiny"):
            TinyServer(fake.url, TOKENS)


class TestStream:
    def test_pieces_come_as_they_are_sent(self, fake):
        go_on = threading.Event()

        def reply(handler, body):
            def chunks():
                yield piece("One")
                assert go_on.wait(10)
                yield piece(" two") + piece(None, "stop") + event("[DONE]")

            stream(handler, chunks())

        fake.reply = reply
        pieces = TinyServer(fake.url, TOKENS).conversation(EMBEDS).stream("Count")
        assert next(pieces) == "One"  # before the server says more
        go_on.set()
        assert list(pieces) == [" two"]

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
    def test_bytes_divided_anywhere(self, fake, conversation, size):
        # A character of two, three and four bytes, and every way to end a line.
        text = answer("  é", " 水", "🎉 \n", "\n", "x ", " ").replace(b"\n\n", b"\r\n\r\n", 2)
        text = b": keep-alive\n\nid: 1\nevent: message\nretry: 5\n" + text
        fake.reply = lambda handler, _: stream(
            handler, [text[at : at + size] for at in range(0, len(text), size)]
        )
        # White space goes out with what follows it.
        assert list(conversation.stream("?")) == ["é", " 水", "🎉", " \n\nx"]
        assert conversation.messages[-1] == {"role": "assistant", "content": "é 水🎉 \n\nx"}

    def test_data_of_several_lines_and_without_a_blank(self, fake):
        text = b'data:{"choices": [{"delta":\ndata: {"content": "x"}}]}\n\n'
        fake.reply = lambda handler, _: stream(handler, [text + answer()])
        assert ask(fake) == "x"

    def test_usage_and_null_content_are_no_pieces(self, fake):
        fake.reply = lambda handler, _: stream(
            handler,
            [
                event({"choices": [{"delta": {"content": None}}]}),
                piece("x"),
                piece(None, "length"),
                event({"choices": [], "usage": {"total_tokens": 3}}),
            ],
        )  # no [DONE]: why it ended was said
        assert ask(fake) == "x"

    def test_empty_answer(self, fake, conversation):
        fake.reply = lambda handler, _: stream(handler, [answer(" ", "\n")])
        assert conversation.ask("?") == ""
        conversation.ask("On?")
        assert fake.asked[1]["messages"][1] == {"role": "assistant", "content": ""}

    def test_without_chunks(self, fake):
        fake.reply = lambda handler, _: send(handler, answer("x"), kind="text/event-stream")
        assert ask(fake) == "x"


class TestTurns:
    def test_an_answer_left_unread_counts_as_far_as_it_came(self, fake, conversation):
        fake.reply = lambda handler, _: stream(handler, [answer("One", " two", " three")])
        left = conversation.stream("Count")
        assert next(left) == "One"
        assert conversation.ask("On?") == "One two three"
        assert [message["content"] for message in fake.asked[1]["messages"][1:]] == ["One", "On?"]
        with refused(InvalidInputError, got="a later question"):
            next(left)
        assert len(conversation.messages) == 4

    @pytest.mark.parametrize("how", ["closed", "another question"])
    def test_the_server_hears_that_nobody_listens(self, fake, conversation, how):
        closed, whole = threading.Event(), fake.reply

        def reply(handler, body):
            try:
                stream(handler, [piece("One"), *([piece("!" * 9_000)] * 10_000)])
            finally:
                closed.set()

        fake.reply = reply
        pieces = conversation.stream("Count")
        assert next(pieces) == "One"
        if how == "closed":
            pieces.close()
        else:
            fake.reply = whole
            assert conversation.ask("On?") == "An answer."
        assert closed.wait(10)
        assert conversation.messages[1] == {"role": "assistant", "content": "One"}

    def test_an_answer_never_read_was_never_asked_for(self, fake, conversation):
        unread = conversation.stream("Never")
        assert conversation.ask("First?") == "An answer."
        assert [body["messages"][0]["content"][1]["text"] for body in fake.asked] == ["First?"]
        with refused(InvalidInputError, got="a later question"):
            next(unread)
        assert len(fake.asked) == 1

    @pytest.mark.parametrize("turns", [0, 1])
    @pytest.mark.parametrize("how", ["half", "refused"])
    def test_a_turn_that_failed_is_taken_back(self, fake, conversation, turns, how):
        for _ in range(turns):
            conversation.ask("Before?")
        whole = fake.reply
        if how == "half":
            fake.reply = lambda handler, _: stream(handler, [piece("Half")], end=False)
            expected = refused(BackendError, got="closed the connection")
        else:
            page = b'{"error": {"message": "too long"}}'
            fake.reply = lambda handler, _: send(handler, page, 400)
            expected = refused(InvalidInputError, got="HTTP 400 Bad Request: too long")
        with expected:
            conversation.ask("What?")
        assert len(conversation.messages) == 2 * turns
        fake.reply = whole
        assert conversation.ask("What?") == "An answer."
        failed, again = fake.asked[-2:]
        assert failed == again


STATUSES = [
    (401, {"error": "Unauthorized"}, Broken, {"cause": (KEY, "not set"), "cure": KEY}),
    (404, {"error": {"message": "The model x."}}, Broken, {"got": "model x", "cure": "log"}),
    (404, {"detail": "Not Found"}, Broken, {"cause": "/v1/chat/completions", "cure": "tiny"}),
    (422, {"detail": [{"loc": ["body"], "msg": "Required"}]}, Invalid, {"got": ": Required"}),
    (400, {"object": "error", "message": "At most 1.\nSo."}, Invalid, {"got": "At most 1. So"}),
    (500, "<html><h1>Oops</h1></html>", Broken, {"got": "HTTP 500", "cure": "log"}),
    (502, "no upstream", Broken, {"got": "HTTP 502 Bad Gateway: no upstream"}),
    (503, "", Broken, {"cause": "busy", "cure": "later"}),
    (500, {"error": {"code": 3}}, Broken, {"got": '{"code": 3}'}),
]


class TestErrors:
    @pytest.mark.parametrize(("status", "page", "error", "fields"), STATUSES)
    def test_http_status(self, fake, status, page, error, fields):
        data = (page if isinstance(page, str) else json.dumps(page)).encode()
        fake.reply = lambda handler, _: send(handler, data, status, "text/html")
        caught = asked(fake)
        assert caught.type is error
        says(caught.value, **fields)

    def test_long_pages_are_cut(self, fake):
        fake.reply = lambda handler, _: send(handler, b"x" * 100_000, 500)
        assert len(str(asked(fake).value)) < 600

    @pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions"])
    @pytest.mark.parametrize("status", [302, 307])
    def test_redirection_is_not_followed(self, fake, path, status):
        with fake_server() as other:

            def reply(handler, body):
                handler.send_response(status)
                handler.send_header("Location", f"{other.url}{path}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            fake.reply = fake.pages["/v1/models"] = reply
            if path != "/v1/models":
                del fake.pages["/v1/models"]
            says(asked(fake).value, got=f"HTTP {status}", cure=f"{other.url}{path}")
            assert other.requests == []

    @pytest.mark.parametrize("where", ["file:///etc/passwd", "javascript:x", "/there"])
    def test_a_redirection_to_what_is_no_server_is_no_advice(self, fake, where):
        def reply(handler, body):
            handler.send_response(302)
            handler.send_header("Location", where)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        fake.reply = reply
        error = asked(fake).value
        says(error, got="HTTP 302", cure="log")
        assert where not in error.cure

    @pytest.mark.parametrize(
        ("sent", "got"),
        [
            (event({"error": {"message": "CUDA out of memory", "code": 500}}), "CUDA out of"),
            (b"event: error\n" + event({"object": "error", "message": "Oh"}), "answering: Oh"),
            (piece("x", "abort"), "'abort'"),
            (piece("x"), "broke off"),
            (b"", "broke off"),
            (event("garbage"), "'garbage'"),
            (event({"choices": [{"text": "x"}]}), "no piece of an answer"),
            (event({"choices": [{"delta": {"content": 7}}]}), "no piece of an answer"),
            (event([1]), "no piece of an answer"),
            (b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n', "no piece"),
            (b"data: \xff\xfe\n\n", "UTF-8"),
            (b"x" * (1 << 20), "1048576"),
        ],
    )
    def test_broken_streams(self, fake, sent, got):
        fake.reply = lambda handler, _: stream(handler, [sent] if sent else [])
        caught = asked(fake)
        assert caught.type is BackendError
        says(caught.value, got=got)

    def test_no_stream(self, fake):
        fake.reply = lambda handler, _: send(handler, b'{"error": {"message": "No."}}')
        says(asked(fake).value, got="no stream of events: No.")
        fake.reply = lambda handler, _: send(handler, b"<html>", kind="text/html")
        says(asked(fake).value, got="no stream of events: text/html")

    @pytest.mark.parametrize(
        ("raw", "got"),
        [
            (b"", "closed the connection"),
            (b"SSH-2.0-OpenSSH_9.6\r\n", "not HTTP"),
            (HEAD + b"Content-Length: 900\r\n\r\n" + piece("x"), "broke off"),
            (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "closed the connection"),
        ],
    )
    def test_dies_halfway(self, fake, raw, got):
        def reply(handler, body):
            handler.wfile.write(raw)
            handler.close_connection = True

        fake.reply = reply
        says(asked(fake).value, got=got)

    def test_nobody_there(self):
        with fake_server() as gone:
            pass
        for url, got in (
            (gone.url, f"{gone.url} refuses connections"),
            ("http://nowhere.invalid:8000", "is at a host that is not known here"),
        ):
            with refused(BackendError, got=got, cure="check the address"):
                TinyServer(url, TOKENS)

    @pytest.mark.parametrize("late", [b"", piece("x")])
    def test_too_slow(self, fake, monkeypatch, late):
        done = threading.Event()

        def reply(handler, body):
            if late:
                stream(handler, [late], end=False)
            done.wait(10)

        fake.reply = reply
        monkeypatch.setattr(http_client, "ANSWER_SECONDS", 0.3)
        llm = TinyServer(fake.url, TOKENS)
        began = time.monotonic()
        with refused(BackendError, got="within 0.3 s", cure="seconds="):
            llm.ask(EMBEDS, "?")
        done.set()
        assert time.monotonic() - began < 5


class TestKey:
    def test_goes_along_and_is_never_shown(self, fake, monkeypatch):
        monkeypatch.setenv(KEY, "sk-secret\n")
        assert ask(fake) == "An answer."
        assert {each.headers["authorization"] for each in fake.requests} == {"Bearer sk-secret"}
        fake.reply = lambda handler, _: send(handler, b'{"error": "bad key: sk-secret"}', 401)
        error = asked(fake).value
        says(error, got="bad key: ***", cause=(KEY, "another key"))
        assert "sk-secret" not in str(error)

    def test_none_is_sent_without_one(self, fake):
        ask(fake)
        assert not any("authorization" in each.headers for each in fake.requests)

    def test_what_no_header_takes(self, fake, monkeypatch):
        for key in ("two\nlines", "schlüssel"):
            monkeypatch.setenv(KEY, key)
            with refused(InvalidInputError, got=KEY) as caught:
                TinyServer(fake.url, TOKENS)
            assert key not in str(caught.value)


class TestNetwork:
    def test_proxy_is_for_others_than_this_machine(self, fake, monkeypatch):
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        port = fake.url.rpartition(":")[2]
        with fake_server() as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            for host in ("127.0.0.1", "localhost", "0.0.0.0"):
                assert TinyServer(f"http://{host}:{port}", TOKENS).model == "demo"
            assert proxy.requests == []
            proxy.pages["http://server.example:1/v1/models"] = {"data": [{"id": "far"}]}
            assert TinyServer("http://server.example:1", TOKENS).model == "far"
        with refused(BackendError, got="refuses connections (through the proxy"):
            TinyServer("http://server.example:1", TOKENS)
        monkeypatch.setenv("no_proxy", "server.invalid")
        with refused(BackendError, got="is at a host that is not known here"):
            TinyServer("http://server.invalid:1", TOKENS)

    def test_https(self, tmp_path, monkeypatch):
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl, which makes the certificate, is not installed")
        names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
        files = ("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"))
        subprocess.run(
            [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names, *files],
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        with fake_server(context) as fake:
            with refused(BackendError, got="certificate", cure="SSL_CERT_FILE"):
                TinyServer(fake.url, TOKENS)
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
            assert ask(fake) == "An answer."

    def test_https_at_a_plain_server(self, fake):
        with refused(BackendError, got="TLS", cure="http://"):
            TinyServer(fake.url.replace("http:", "https:"), TOKENS)
