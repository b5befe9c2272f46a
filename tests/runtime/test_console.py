"""What reaches a terminal: text as it is, and nothing that a terminal would take for a command."""

from __future__ import annotations

import json
import logging
import types
import warnings
from pathlib import Path

import pytest
from PIL import Image

from tests.runtime.llm.fake_chat_server import answer, event, fake_server, send, stream
from tests.runtime.llm.test_chat_server import EMBEDS, TOKENS, TinyServer
from vzip.runtime import console
from vzip.runtime.cli import asking
from vzip.runtime.cli.main import main
from vzip.runtime.errors import VzipError
from vzip.runtime.pictures.images import load_image

# A title, colours, a cleared screen, the cursor's place, a link, an answer asked of the terminal,
# a bell; the same with C1; text over other text; and text in another order.
HOSTILE = (
    "\x1b]0;owned\x07 \x1b[31m \x1b[2J\x1b[1;1H \x1b]8;;http://x\x1b\\ \x1bP+q\x1b\\ \x1b[6n \x07"
    "\x9b31m \x9d0;owned\x9c \x90q\x9c\x85 a\rb\bc\x0b\x0c\x00\x7f "
    "\u202egpj.exe \u2066x\u2069 \u2028"
)
PLAIN = "Ein Äpfel\t\n水 🎉 👩\u200d🚀 می\u200cخواهم שלום\u200f ا \\x1b e\u0301 \u00ad"


def harmless(text: str) -> bool:
    """Whether a terminal takes nothing of it for a command."""
    return not any(
        (ord(each) < 32 and each not in "\n\t")
        or 0x7F <= ord(each) < 0xA0
        or each in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        for each in text
    )  # fmt: skip


def test_what_is_harmful_is_so_here():
    assert not harmless(HOSTILE)
    assert harmless(PLAIN)


@pytest.mark.parametrize("write", [console.emit, console.say, console.complain])
def test_texts(write, capsys):
    write(HOSTILE)
    write(PLAIN)
    written = "".join(capsys.readouterr())
    first, second = written.split("\n", 1)
    assert harmless(written)
    assert r"\x1b]0;owned\x07" in first
    assert r"a\rb\x08c" in first
    assert r"\u202egpj.exe" in first
    assert second == PLAIN + "\n"


def test_every_character_has_one_form(capsys):
    every = "".join(map(chr, range(0x3000)))
    console.emit(every)
    shown = capsys.readouterr().out
    assert harmless(shown)
    assert console.visible("a\r\nb") == "a\nb"
    kept = [each for each in every if harmless(each)]
    assert all(console.visible(each) == each for each in kept)


def test_json_is_exact(capsys):
    value = {HOSTILE: [PLAIN, HOSTILE], "n": 1.5}
    console.emit_json(value)
    written = capsys.readouterr().out
    assert harmless(written)
    assert json.loads(written) == value
    assert "水" in written


def test_what_libraries_and_modules_say(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])

    def command() -> int:
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
        logging.getLogger("vzip.x").warning(HOSTILE)  # by the handler of last resort
        console.set_verbosity(console.Verbosity.VERBOSE)
        logging.getLogger("vzip.x").info("%s", HOSTILE)
        raise VzipError(HOSTILE, cause=HOSTILE)

    before = logging.lastResort, warnings.showwarning
    assert console.run_command(command, prog="vzip") == 2
    assert (logging.lastResort, warnings.showwarning) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count(r"\x1b]0;owned\x07") == 5
    assert harmless(err)


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_an_answer(command, capsys, monkeypatch):
    """It is escaped wherever its pieces are cut, and keeps its lines and tabs."""
    said = f"{HOSTILE}\nfirst\tcolumn\n{PLAIN}"

    class Conversation:
        def ask(self, *_: object, **__: object) -> str:
            return said

        def stream(self, *_: object, **__: object) -> list[str]:
            return list(said)

    monkeypatch.setattr(asking, "conversations", lambda _: [Conversation()])
    lines = iter(["What?\n", ""])
    stdin = types.SimpleNamespace(isatty=lambda: False, readline=lambda _most: next(lines))
    monkeypatch.setattr("sys.stdin", stdin)
    question = ["What?"] if command == "ask" else []
    assert main([command, "bundle", "picture.png", *question]) == 0
    out = capsys.readouterr().out
    assert harmless(out)
    assert "\nfirst\tcolumn\n" + PLAIN in out


def test_errors_of_a_server():
    hostile = {"error": {"message": HOSTILE}}
    with fake_server() as fake:
        fake.models = ("demo", HOSTILE)
        with pytest.raises(VzipError) as caught:
            TinyServer(fake.url, TOKENS)
        assert str(caught.value).isprintable()
        fake.models = ("demo",)
        llm = TinyServer(fake.url, TOKENS)
        for reply in (
            lambda handler, _: send(handler, json.dumps(hostile).encode(), 500),
            lambda handler, _: send(handler, HOSTILE.encode(), 502),
            lambda handler, _: stream(handler, [event(hostile)]),
            lambda handler, _: stream(handler, [event(HOSTILE.replace("\r", ""))]),
            lambda handler, _: stream(handler, [answer("x", finish=HOSTILE).replace(b"]", b"")]),
        ):
            fake.reply = reply
            with pytest.raises(VzipError) as caught:
                llm.ask(EMBEDS, "?")
            assert str(caught.value).isprintable()


def test_errors_that_name_files(tmp_path: Path):
    folder = tmp_path / HOSTILE.replace("/", "").replace("\0", "").replace("\u2028", "\n")
    folder.mkdir()
    (folder / "a.png").write_text(HOSTILE)
    for name in ("absent.png", "a.png"):
        with pytest.raises(VzipError) as caught:
            load_image(folder / name)
        assert str(caught.value).isprintable()


def test_a_name_gives_no_line_of_its_own(tmp_path, capsys):
    path = tmp_path / "a\nvzip: error: \x1b[31m.gif"
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 99)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    asking.tell_if_animated(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert r"a\nvzip: error: \x1b[31m.gif" in line
