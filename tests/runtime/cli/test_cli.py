"""The command line: what it imports, prints and returns, and what it says about bad input."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import vzip.runtime
from tests.bundles import tiled, with_newline
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime import VisionEncoder, console
from vzip.runtime.cli import asking, show
from vzip.runtime.cli.main import COMMANDS, ENTRY_POINTS, main
from vzip.runtime.errors import InvalidInputError, MissingDependencyError, VzipError
from vzip.runtime.llm.local.transformers import TransformersLLM

BUNDLE = GOLDEN / "tiny_bundle"
HEAVY = ("torch", "onnxruntime", "transformers", "onnx", "vzip.export", "vzip.calibration")


def run(*argv: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run vzip in a process of its own."""
    command = [sys.executable, "-m", "vzip.runtime.cli.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def python(code: str, **kwargs) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    kwargs = {"stdout": pipe, "stderr": pipe, "text": True, "env": env, **kwargs}
    return subprocess.run([sys.executable, "-c", code], check=False, **kwargs)


def one_line(capsys, prog: str = "vzip") -> str:
    """The one line on stderr, after which nothing was printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{prog}: error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix(f"{prog}: error: ").strip()


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


# --- the table -------------------------------------------------------------------------------


def test_help_lists_every_command_in_one_line():
    result = run("-h")
    assert result.returncode == 0
    assert result.stderr == ""
    lines = [line.split(None, 1) for line in result.stdout.splitlines()]
    for group, listed in COMMANDS.items():
        assert lines.count([f"{group}:"]) == 1
        for name, text in listed.items():
            assert lines.count([name, text]) == 1
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_every_command_is_a_function_that_an_entry_point_names():
    installed = {each.name: each for each in metadata.entry_points(group=ENTRY_POINTS)}
    assert set(installed) == {name for group in COMMANDS.values() for name in group}
    for name, place in installed.items():
        function = place.load()
        assert [*inspect.signature(function).parameters] == ["argv", "prog"], name


def test_commands_get_their_arguments_and_their_name(monkeypatch):
    calls = []
    monkeypatch.setattr(show, "main", lambda argv, *, prog: calls.append((list(argv), prog)) or 7)
    assert main(["show", "-o", "x y"]) == 7
    assert calls == [(["-o", "x y"], "vzip show")]


def test_the_version_is_that_of_what_is_installed(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "version", {"vzip": "1.2.3"}.__getitem__)
    monkeypatch.setattr(sys, "argv", ["vzip", "--version"])  # the arguments where none are given
    assert main() == 0
    assert capsys.readouterr().out == "vzip 1.2.3\n"
    assert vzip.runtime.__version__ == "1.2.3"

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with refused(VzipError, cure="pip install -e ."):
        vzip.runtime.__version__  # noqa: B018


def test_a_word_that_is_no_command_gets_a_suggestion(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "usage: vzip COMMAND ...")
    for word, meant in (("exprot", "'export'"), ("zzz", "'vzip -h'"), ("--hlep", "'--help'")):
        assert main([word]) == 2
        line = one_line(capsys)
        assert word in line
        assert meant in line


# --- how commands end ------------------------------------------------------------------------


def fail_with(error):
    def command():
        raise error

    return command


def test_how_a_command_ends(capsys):
    assert console.run_command(lambda: 1, prog="vzip") == 1
    for code, status in ((None, 0), (0, 0), (2, 2)):  # argparse's
        assert console.run_command(fail_with(SystemExit(code)), prog="vzip") == status
    assert console.run_command(fail_with(KeyboardInterrupt()), prog="vzip") == 130
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        console.run_command(fail_with(ZeroDivisionError()), prog="vzip")


def test_an_error_of_ours_is_one_line(capsys):
    error = VzipError("the hub said\n  no:\nnever")
    assert console.run_command(fail_with(error), prog="vzip-export") == 2
    assert one_line(capsys, "vzip-export") == "the hub said no: never"


@pytest.mark.parametrize("argv", [["-h"], ["ask", "-h"]])
def test_a_reader_that_goes_away_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        result = python(
            f"import sys; from vzip.runtime.cli.main import main; sys.exit(main({argv}))",
            stdout=stdout,
        )
    assert result.returncode == 141
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
@pytest.mark.parametrize("code", ["emit('answer')", "print('answer')"])
def test_a_full_disk_is_one_line(code):
    with Path("/dev/full").open("w") as stdout:
        result = python(
            "import sys; from vzip.runtime.console import emit, run_command\n"
            f"sys.exit(run_command(lambda: {code} or 0, prog='vzip'))",
            stdout=stdout,
        )
    assert result.returncode == 2
    assert result.stderr.startswith("vzip: error: standard output can't be written (No space left")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_log_stops_no_command():
    with Path("/dev/full").open("w") as stderr:
        result = python(
            "import sys; from vzip.runtime.console import emit, run_command, say\n"
            "sys.exit(run_command(lambda: say('working') or emit('answer') or 0, prog='vzip'))",
            stderr=stderr,
        )
    assert (result.returncode, result.stdout) == (0, "answer\n")


def test_a_closed_stdout_is_one_line():
    code = (
        "import sys; from vzip.runtime.console import emit, run_command; "
        "sys.exit(run_command(lambda: emit('answer') or 0, prog='vzip'))"
    )
    result = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("vzip: error: standard output is closed")


def test_a_character_that_the_terminal_lacks_is_escaped():
    result = python(
        "from vzip.runtime.console import emit; emit('a 字 b')",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.stdout == "a \\u5b57 b\n"


class Terminal(io.StringIO):
    """A stream that says it is a terminal and remembers what was flushed when."""

    def __init__(self, text: str = "", *, terminal: bool = True) -> None:
        super().__init__(text)
        self.terminal = terminal
        self.flushed: list[str] = []

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_progress_is_a_bar_where_somebody_watches_and_tqdm_is_installed(monkeypatch):
    seen = []

    def bar(items, **kwargs):
        seen.append(kwargs)
        return (item for item in items)

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=bar))
    items = [1, 2]
    for stream in (Terminal(terminal=False), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert console.progress(items, desc="reading") is items
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(console.progress(iter(items), desc="reading", total=2, unit="shard")) == items
    assert seen == [{"desc": "reading", "total": 2, "unit": "shard", "leave": False}]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(console.progress(items, desc="reading")) == items


# --- ask and chat ----------------------------------------------------------------------------


class Conversation:
    """Answers with the question, in pieces of three letters."""

    def __init__(self, positions="consecutive") -> None:
        self.limits: list[int] = []
        self.positions = positions

    def stream(self, question, *, max_new_tokens):
        if "?" not in question:
            raise InvalidInputError("that is no question")
        self.limits.append(max_new_tokens)
        text = f"<{question.strip()}>"
        return (text[first : first + 3] for first in range(0, len(text), 3))

    def ask(self, question, *, max_new_tokens):
        return "".join(self.stream(question, max_new_tokens=max_new_tokens))


@pytest.fixture
def conversation(monkeypatch):
    made = Conversation()
    monkeypatch.setattr(asking, "conversations", lambda arguments: [made])
    return made


def test_what_can_be_refused_at_once_is(monkeypatch, capsys):
    monkeypatch.setattr(asking, "conversations", lambda arguments: pytest.fail("too late"))
    for argv, said in (
        (["ask", "b", "i", ""], "question"),
        (["ask", "b", "i", " \n"], "question"),
        (["ask", "b", "i", "\udcff?"], "character 0"),
        (["ask", "b", "i", "what?", "--max-new-tokens", "0"], " 0 "),
        (["chat", "b", "i", "--max-new-tokens", "-1"], "-1"),
        (["ask", "b", "i", "what?", "--frames", "0"], "--frames 0"),
        (["chat", "b", "i", "--frames", "-3"], "--frames -3"),
        (["ask", "b", "i"], "QUESTION"),
        (["ask", "b", "i", "q?", "--max-new", "5"], "'--max-new-tokens'"),  # no abbreviations
        (["ask", "b", "i", "q?", "--max-new-tokens", "many"], "'many'"),
        (["show", "b", "i", "-o", "o.png", "--frames", "2"], "--frames"),
        (["show", "b", "i"], "-o/--output"),
        (["show", "b", "i", "-o", "overlay.jpg"], ".png"),
        (["show", "b", "i", "-o", "overlay"], ".png"),
    ):
        assert main(argv) == 2, argv
        assert said in one_line(capsys), argv


def test_ask_prints_the_answer_alone(conversation, capsys):
    assert main(["ask", "b", "i", "what is it?"]) == 0
    assert capsys.readouterr() == ("<what is it?>\n", "")
    assert main(["ask", "b", "i", "what?", "--max-new-tokens", "5"]) == 0
    assert conversation.limits == [256, 5]


@pytest.mark.parametrize(
    "argv",
    [
        ["b", "1", "2", "3", "-q?", "--backend", "x"],
        ["b", "1", "2", "3", "--backend", "x", "-q?"],
        ["b", "1", "--backend", "x", "2", "3", "-q?"],
        ["--backend", "x", "b", "1", "2", "3", "-q?"],
    ],
)
@pytest.mark.parametrize("dash", [False, True])
def test_options_may_stand_anywhere(argv, dash, conversation, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(asking, "conversations", lambda each: seen.append(each) or [conversation])
    if dash and argv[-1] == "-q?":
        argv = [*argv[:-1], "--", "-q?"]
    else:
        argv = ["q?" if each == "-q?" else each for each in argv]
    assert main(["ask", *argv]) == 0
    assert capsys.readouterr().out.strip("<->\n") == "q?"
    assert (str(seen[0].bundle), seen[0].backend) == ("b", "x")
    assert list(map(str, seen[0].images)) == ["1", "2", "3"]


def test_a_file_is_no_question_and_a_long_text_is_one(conversation, tmp_path, capsys):
    (tmp_path / "b.jpg").write_bytes(b"")
    assert main(["ask", "b", "a.jpg", str(tmp_path / "b.jpg")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "b.jpg" in captured.err
    assert main(["ask", "b", "a.jpg", f"{'long ' * 2000}?"]) == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["ask", "{image}", "{bundle}", "What is that?"],
        ["chat", "{image}", "{bundle}"],
        ["show", "{image}", "{bundle}", "-o", "o.png"],
        ["encode", "{image}", "{bundle}", "-o", "o.npy"],
    ],
    ids=lambda argv: argv[0],
)
def test_an_image_before_the_bundle_is_told_the_order(argv, image, capsys):
    assert main([each.format(image=image, bundle=BUNDLE) for each in argv]) == 2
    line = one_line(capsys)
    assert str(image) in line
    assert f"'{BUNDLE}' is one" in line


def test_chat_answers_each_line_as_it_is_made(conversation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("one?\n\n  \ntwo? \n三?", terminal=False))
    stdout, stderr = Terminal(terminal=False), Terminal(terminal=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main(["chat", "b", "i"]) == 0
    assert stdout.getvalue() == "<one?>\n<two?>\n<三?>\n"
    assert stderr.getvalue() == "", "the prompt is for terminals"
    assert stdout.flushed[:3] == ["<on", "<one?>", "<one?>\n"]


def test_chat_of_nothing_says_nothing(conversation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("", terminal=False))
    assert main(["chat", "b", "i"]) == 0
    assert capsys.readouterr() == ("", "")


def test_chat_in_a_pipe_ends_at_a_question_that_fails(conversation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("one?\ntwo\nthree?\n", terminal=False))
    assert main(["chat", "b", "i"]) == 2
    assert capsys.readouterr() == ("<one?>\n", "vzip: error: that is no question\n")


def test_chat_at_a_terminal_prompts_and_goes_on(conversation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("two\nthree?\n"))
    assert main(["chat", "b", "i"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "<three?>\n"
    assert captured.err == "> vzip: error: that is no question\n> > \n"


def test_chat_without_stdin(conversation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "b", "i"]) == 2
    assert "chat: standard input is closed" in one_line(capsys)


def test_chat_with_a_line_that_has_no_end(conversation, monkeypatch, capsys):
    class Zeros(io.RawIOBase):  # as /dev/zero
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.given += len(buffer)
            assert self.given < 2**24, "read without end"
            buffer[:] = bytes(len(buffer))
            return len(buffer)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Zeros())))
    assert main(["chat", "b", "i"]) == 2
    assert "a line of standard input" in one_line(capsys)


def test_chat_with_questions_that_are_no_text(conversation, monkeypatch, capsys):
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", raw)
    assert main(["chat", "b", "i"]) == 2
    assert "standard input is not UTF-8 text" in one_line(capsys)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_the_llms_packages_the_extra_is_named(package, monkeypatch):
    if package == "transformers":  # torch is imported first, and need not be here
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as caught:
        TransformersLLM.open("demo")
    assert f"the package '{package}'" in str(caught.value)
    assert "pip install 'vzip[export]'" in str(caught.value)


# --- real bundles and images -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["ask", "chat", "show"])
@pytest.mark.parametrize(
    "fault", ["image absent", "image broken", "bundle absent", "bundle a file", "backend"]
)
def test_bad_input_is_one_line_and_leaves_nothing(command, fault, image, tmp_path, capsys):
    bundle, extra = BUNDLE, []
    if fault == "image absent":
        image, text = tmp_path / "absent.png", "absent.png"
    elif fault == "image broken":
        image.write_bytes(image.read_bytes()[:300])
        text = "image.png"
    elif fault == "bundle absent":
        bundle, text = tmp_path / "absent", "found nothing, expected the folder that `vzip export"
    elif fault == "bundle a file":
        bundle, text = BUNDLE / "model.onnx", "found a file, expected the folder that `vzip export"
    else:
        extra, text = ["--backend", "tensorflow"], "tensorflow"
    last = {"ask": ["what?"], "chat": [], "show": ["-o", str(tmp_path / "overlay.png")]}[command]
    before = sorted(tmp_path.iterdir())
    assert main([command, str(bundle), str(image), *last, *extra]) == 2
    assert text in one_line(capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_neither_image_nor_video(tmp_path, capsys):
    (odd := tmp_path / "odd.mp4").write_bytes(b"neither of them")
    video = "or, for a video, one of MP4, MOV, MKV, WebM, AVI"
    assert main(["ask", str(BUNDLE), str(odd), "what?"]) == 2
    assert video in (line := one_line(capsys))
    assert "expected one of JPEG, PNG" in line
    assert main(["show", str(BUNDLE), str(odd), "-o", str(tmp_path / "overlay.png")]) == 2
    assert video not in one_line(capsys)


class Asked(list):
    """The tokens that an LLM was given, call by call."""

    def open(self, bundle):
        return self

    def __init__(self):
        super().__init__()
        self.positions = []

    def conversation(self, embeds, *, frames, positions=None):
        assert frames is None
        self.positions.append(positions)
        self.append([each.embeds for each in embeds])
        return Conversation(positions or "consecutive")


@pytest.fixture
def asked(monkeypatch):
    made = Asked()
    monkeypatch.setattr(asking, "own", lambda bundle: made)
    monkeypatch.setattr(asking.TokenSpec, "of", lambda manifest: None)  # its weights are random
    return made


@pytest.fixture
def opened(monkeypatch):
    """Bundles whose graph was opened, and how many images each encoded."""
    made = []

    class Counted(VisionEncoder):
        def __init__(self, bundle, backend, opened):
            super().__init__(bundle, backend, opened)
            made.append([bundle.path.name, 0])

        def image_tokens(self, image, **options):
            made[-1][1] += 1
            return super().image_tokens(image, **options)

    monkeypatch.setattr("vzip.runtime.encoder.VisionEncoder", Counted)
    return made


def noise(path, seed, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def ask(bundle, *argv):
    return main(["ask", str(bundle), *map(str, argv), "what?"])


def test_both_positions_are_answered_beside_each_other(tmp_path, asked, monkeypatch, capsys):
    picture = noise(tmp_path / "a.png", 0)
    for option in ("original", "both"):  # the bundle is of schema 1
        assert ask(BUNDLE, picture, "--positions", option) == 2
        assert "export it again" in one_line(capsys)
    assert not asked
    monkeypatch.setattr("vzip.runtime.bundle.manifest.Manifest.span", 16)
    for option, wanted in (("original", ["original"]), ("consecutive", ["consecutive"])):
        assert ask(BUNDLE, picture, "--positions", option) == 0
        assert asked.positions == wanted
        assert capsys.readouterr().out == "<what?>\n"
        asked.positions.clear()
    assert ask(BUNDLE, picture, "--positions", "both") == 0
    assert capsys.readouterr().out == "original: <what?>\nconsecutive: <what?>\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nwhy?\n"))
    assert main(["chat", str(BUNDLE), str(picture), "--positions", "both"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "original: <what?>",
        "consecutive: <what?>",
        "original: <why?>",
        "consecutive: <why?>",
    ]
    assert asked.positions == ["original", "consecutive"] * 2


def test_an_animation_is_its_first_frame_and_that_is_said(tmp_path, asked, opened, capsys):
    first, second = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    output = tmp_path / "overlay.png"
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        first.save(path, save_all=True, append_images=[second])
        says = f"a.{suffix} is animated: its first frame is taken"
        more = "give a folder of frames or a video for more"
        assert main(["show", str(BUNDLE), str(path), "-o", str(output)]) == 0
        assert capsys.readouterr().err == f"{says}\n"
        opened.clear()
        for options in ([], ["--cache", tmp_path / "cache"], ["--cache", tmp_path / "cache"]):
            assert ask(BUNDLE, path, *options) == 0
            assert capsys.readouterr().err == f"{says}; {more}\n"
        assert len(opened) == 2, "the last is from the cache"
        first.save(path)
        assert ask(BUNDLE, path) == 0
        assert capsys.readouterr().err == ""


def test_pictures_behind_a_photo_are_no_animation(tmp_path, asked, capsys):
    photo, depth = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    path = tmp_path / "photo.jpg"
    photo.save(path, format="MPO", save_all=True, append_images=[depth])
    assert ask(BUNDLE, path) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cached", [False, True])
def test_of_several_pictures_none_is_cut_where_the_model_cuts_one_alone(tmp_path, asked, cached):
    bundle = with_newline(tmp_path / "b", BUNDLE, tiled("newline", only_alone=True))
    pictures = [noise(tmp_path / f"{seed}.png", seed) for seed in (1, 2)]
    options = ["--cache", tmp_path / "cache"] if cached else []
    with VisionEncoder.open(bundle, "onnxruntime") as encoder:
        for some in (pictures[:1], pictures, pictures[:1], pictures):
            assert ask(bundle, *some, *options) == 0
            expected = [encoder.image_embeds(each, several=len(some) > 1) for each in some]
            assert [len(each) for each in asked[-1]] == [len(each) for each in expected]
            for one, other in zip(asked[-1], expected, strict=True):
                assert np.array_equal(one, other)
            assert all((len(each) == 8) == (len(some) > 1) for each in expected)


def test_a_picture_in_the_cache_is_not_encoded(image, tmp_path, asked, opened, monkeypatch):
    cache = tmp_path / "cache"
    assert ask(BUNDLE, image) == 0
    assert ask(BUNDLE, image, "--cache", cache) == 0
    assert opened == [["tiny_bundle", 1]] * 2
    assert ask(BUNDLE, image, "--cache", cache) == 0
    twin = tmp_path / "another name.jpg"
    twin.write_bytes(image.read_bytes())
    assert ask(BUNDLE, twin, "--cache", cache) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("what?"))
    assert main(["chat", str(BUNDLE), str(image), "--cache", str(cache)]) == 0
    assert opened == [["tiny_bundle", 1]] * 2, "no graph was opened"
    assert len(asked) == 5
    for (tokens,) in asked:
        assert tokens.dtype == np.float32
        np.testing.assert_array_equal(tokens, asked[0][0])


def test_of_several_pictures_those_that_lack_are_encoded(tmp_path, asked, opened):
    one, two, three = (noise(tmp_path / f"{seed}.png", seed) for seed in (1, 2, 3))
    cache = tmp_path / "cache"
    assert ask(BUNDLE, two, "--cache", cache) == 0
    assert ask(BUNDLE, one, two, three, one, "--cache", cache) == 0
    assert ask(BUNDLE, one, two, three, one) == 0
    assert opened == [["tiny_bundle", 1], ["tiny_bundle", 2], ["tiny_bundle", 3]]
    assert len({tokens.tobytes() for tokens in asked[1]}) == 3
    np.testing.assert_array_equal(asked[1], asked[2])
    np.testing.assert_array_equal(asked[1][1], asked[0][0])


def test_another_bundles_tokens_and_another_pictures_are_not_taken(image, tmp_path, asked, opened):
    cache, other = tmp_path / "cache", BUNDLE.with_name("tiny_static_bundle")
    assert ask(BUNDLE, image, "--cache", cache) == 0
    assert ask(other, image, "--cache", cache) == 0
    assert [tokens[0].dtype for tokens in asked] == [np.float32, np.float16]
    assert ask(BUNDLE, noise(image, 9), "--cache", cache) == 0  # under the same path
    assert ask(BUNDLE, image, "--cache", tmp_path / "other cache") == 0
    assert [name for name, _ in opened] == [BUNDLE.name, other.name, BUNDLE.name, BUNDLE.name]
    assert not np.array_equal(asked[2], asked[0])
    assert len(list(cache.iterdir())) == 3


def test_the_same_pixels_turned_are_another_picture(tmp_path, asked, opened):
    turned = Image.Exif()
    turned[0x0112] = 6
    cache = tmp_path / "cache"
    upright = noise(tmp_path / "a.jpg", 1)
    assert ask(BUNDLE, upright, "--cache", cache) == 0
    assert ask(BUNDLE, noise(tmp_path / "b.jpg", 1, exif=turned), "--cache", cache) == 0
    assert len(opened) == 2
    assert not np.array_equal(asked[0], asked[1])


@pytest.mark.parametrize("damage", ["bit", "cut", "none"])
def test_a_damaged_entry_is_encoded_again(damage, image, tmp_path, asked, opened):
    cache = tmp_path / "cache"
    assert ask(BUNDLE, image, "--cache", cache) == 0
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "bit":
        data[-5] ^= 4
    entry.write_bytes(data[:-4] if damage == "cut" else data)
    for _ in range(2):
        assert ask(BUNDLE, image, "--cache", cache) == 0
    assert len(opened) == (1 if damage == "none" else 2)
    np.testing.assert_array_equal(asked[1], asked[0])
    np.testing.assert_array_equal(asked[2], asked[0])


@pytest.mark.parametrize("kind", ["video", "folder", "several"])
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_cache_holds_no_videos(command, kind, image, tmp_path, capsys):
    shown = [tmp_path]
    if kind != "folder":
        shown = [tmp_path / "clip.mp4"]
        shown[0].write_bytes(b"\0\0\0\x18ftypisom" + b"x" * 500)
    shown = [str(each) for each in (shown if kind != "several" else [image, *shown])]
    last = ["what?"] if command == "ask" else []
    cache = tmp_path / "cache"
    assert main([command, "no bundle", *shown, *last, "--cache", str(cache)]) == 2
    assert "--cache" in one_line(capsys)
    assert not cache.exists()


@pytest.mark.parametrize("fault", ["absent", "broken", "text", "frames"])
def test_a_bad_image_is_explained_with_a_cache_as_without(fault, image, tmp_path, capsys):
    options = []
    if fault == "absent":
        image.unlink()
    elif fault == "broken":
        image.write_bytes(image.read_bytes()[:300])
    elif fault == "text":
        image.write_text("no picture")
    else:
        options = ["--frames", "2"]
    assert ask(BUNDLE, image, *options) == 2
    line = one_line(capsys)
    assert f"'{image}'" in line
    assert ask(BUNDLE, image, *options, "--cache", tmp_path / "cache") == 2
    assert one_line(capsys) == line
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("place", ["image.png", "absent/cache"])
def test_a_cache_that_can_t_be_made_is_one_line(place, image, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VisionEncoder, "open", lambda *_: pytest.fail("too late"))
    assert ask(BUNDLE, image, "--cache", tmp_path / place) == 2
    assert str(tmp_path / place) in one_line(capsys)


def test_a_cache_that_can_t_be_written_is_one_line(image, tmp_path, asked, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert ask(BUNDLE, image, "--cache", tmp_path / "cache") == 2
    assert "No space left on" in one_line(capsys)
    assert asked == []
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("order", [1, -1])
def test_a_video_is_asked_about_alone(order, image, tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0\0\0\x18ftypisom" + b"x" * 500)
    shown = [image, clip][::order]
    assert ask("no bundle", *shown) == 2
    assert "2 files" in one_line(capsys)


@pytest.mark.parametrize("fault", ["video broken", "folder empty", "frame broken"])
def test_a_bad_video_is_one_line(fault, image, tmp_path, capsys):
    folder = tmp_path / "frames"
    folder.mkdir()
    shown, text = folder, "frames"
    if fault == "video broken":
        shown, text = tmp_path / "clip.mp4", "clip.mp4"
        shown.write_bytes(b"\0\0\0\x18ftypisom" + b"x" * 500)
    elif fault == "frame broken":
        (folder / "frame7.png").write_bytes(image.read_bytes()[:300])
        text = "frame7.png"
    for argv in (["ask", "what?"], ["chat"]):
        assert main([argv[0], str(BUNDLE), str(shown), *argv[1:]]) == 2
        assert text in one_line(capsys)


def test_an_engine_is_asked_for_by_name(image, tmp_path, capsys):
    output = tmp_path / "overlay.png"
    assert main(["show", str(BUNDLE), str(image), "-o", str(output), "--engine", "orin"]) == 2
    assert "vzip build" in one_line(capsys)
    mixed = ["--engine", "orin", "--backend", "onnxruntime"]
    assert main(["show", str(BUNDLE), str(image), "-o", str(output), *mixed]) == 2
    assert "'orin'" in one_line(capsys)
    assert not output.exists()


@pytest.mark.parametrize("kind", ["video", "folder"])
def test_show_refuses_what_is_no_image(kind, tmp_path, capsys):
    shown = tmp_path
    if kind == "video":
        shown = tmp_path / "clip.mp4"
        shown.write_bytes(b"\0\0\0\x18ftypisom" + b"x" * 500)
    assert main(["show", str(BUNDLE), str(shown), "-o", str(tmp_path / "overlay.png")]) == 2
    assert str(shown) in one_line(capsys)


def test_show_writes_the_overlay_and_prints_its_path(image, tmp_path, capsys):
    output = tmp_path / "new" / "overlay.PNG"
    output.parent.mkdir()
    assert main(["show", str(BUNDLE), str(image), "-o", str(output)]) == 0
    assert capsys.readouterr() == (f"{output}\n", "")
    assert list(output.parent.iterdir()) == [output]
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100
    output.write_text("old")
    assert main(["show", str(BUNDLE), str(image), "-o", str(output)]) == 0
    assert output.read_bytes()[:4] == b"\x89PNG"


def test_show_says_that_tiles_are_not_drawn(image, tmp_path, tiny_bundle, capsys):
    manifest = tiny_bundle / "manifest.json"
    values = json.loads(manifest.read_text())
    values["tiling"] = {"pinpoints": [[16, 32]], "order": "reference"}
    values["preprocessing"]["mode"] = "stretch"
    manifest.write_text(json.dumps(values))
    assert main(["show", str(tiny_bundle), str(image), "-o", str(tmp_path / "o.png")]) == 0
    assert capsys.readouterr().err == "show: this bundle cuts tiles; the base tile is drawn\n"


def test_show_that_can_not_write_keeps_the_old_picture(image, tmp_path, capsys, monkeypatch):
    output = tmp_path / "overlay.png"
    output.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["show", str(BUNDLE), str(image), "-o", str(output)]) == 2
    assert "No space left on device" in one_line(capsys)
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [image, output]


def test_a_reader_of_standard_error_that_went_away_ends_no_command(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from vzip.runtime.console import emit, run_command, say\n"
        "def work():\n"
        "    for number in range(9):\n"
        "        say(f'step {number}')\n"
        f"    pathlib.Path({str(tmp_path / 'result')!r}).write_text('whole')\n"
        "    emit('done')\n"
        "    return 0\n"
        "sys.exit(run_command(work, prog='vzip'))\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, check=False
    )
    os.close(writing)
    assert (result.returncode, result.stdout) == (0, b"done\n")
    assert (tmp_path / "result").read_text() == "whole"


def test_bars_are_forbidden_for_the_command_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    seen: list[list[str | None]] = []

    def work() -> int:
        seen.append([os.environ.get(name) for name in names])
        return 0

    console.run_command(work, prog="vzip")
    assert seen == [["1", "1"]]
    monkeypatch.setenv("TQDM_DISABLE", "0")
    console.run_command(work, prog="vzip")
    assert seen[1] == ["1", "0"]
    assert os.environ["TQDM_DISABLE"] == "0"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
