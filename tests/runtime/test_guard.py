"""Guards: what becomes an error of ours at a door, and what passes."""

from __future__ import annotations

import ast
import asyncio
import errno
import http.client
import json
import logging
import re
import ssl
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests import house
from tests.refusals import refused, says
from vzip.runtime import console
from vzip.runtime.bundle import manifest as some_module_of_ours
from vzip.runtime.errors import BundleError, CheckpointError, InvalidInputError
from vzip.runtime.guard import door, guarded, shown

PanicException = type("PanicException", (BaseException,), {})  # as pyo3 makes it


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("raised", "cause"),
    [
        (OverflowError("int too large"), "OverflowError: int too large"),
        (RecursionError("deep\nand more"), "RecursionError: deep"),
        (MemoryError(), "MemoryError: there is not enough memory"),
        (PermissionError(13, "Permission denied", "a"), "PermissionError: Permission denied"),
        (KeyError("size"), "KeyError: 'size'"),
        (IndexError(), "IndexError"),
        (StopIteration(), "StopIteration"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
        (AssertionError("in a package"), "AssertionError: in a package"),
        (UnprintableError(), "UnprintableError"),
        (ValueError("x" * 10_000), "ValueError: xxx"),
        (ValueError("embedded null byte"), "ValueError: embedded null byte"),
        (OSError(errno.EROFS, "Read-only file system"), "OSError: Read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "OSError: File name too long"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "UnicodeEncodeError: 'utf-8'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "UnicodeDecodeError: 'utf-8'"),
        (json.JSONDecodeError("Extra data", "1 2", 2), "JSONDecodeError: Extra data"),
        (struct.error("unpack requires 4 bytes"), "error: unpack requires 4 bytes"),
        (zlib.error("Error -3"), "error: Error -3"),
        (zipfile.BadZipFile("Bad magic number"), "BadZipFile: Bad magic"),
        (tokenize.TokenError("EOF", (2, 0)), "TokenError: ('EOF', (2, 0))"),
        (SyntaxError("not a TIFF file"), "SyntaxError: not a TIFF"),
        (EOFError("end of file"), "EOFError: end of file"),
        (AttributeError("'list' object has no attribute 'get'"), "AttributeError: 'list'"),
        (TypeError("'>' not supported"), "TypeError: '>' not supported"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division"),
        (Image.DecompressionBombError("too many pixels"), "DecompressionBombError: too many"),
        (http.client.LineTooLong("header line"), "LineTooLong: got more than"),
        (ssl.SSLError(1, "wrong version"), "SSLError: wrong version"),
        (NotImplementedError("zip file version 25.5"), "NotImplementedError: zip file"),
        (UserWarning("as an error"), "UserWarning: as an error"),
    ],
)
def test_what_packages_raise_becomes_the_door_s_error(raised: BaseException, cause: str) -> None:
    thing = guarded(BundleError, lambda: "the bundle 'b' can't be read", cure="copy it again")
    with refused(BundleError, got="'b'", cause=cause, cure="copy") as caught, thing:
        raise raised
    assert caught.value.__cause__ is raised
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_ends_a_program_passes(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, guarded(BundleError, "x"):
        raise raised
    assert caught.value is raised


def test_what_ends_a_task_passes() -> None:
    with pytest.raises(asyncio.CancelledError), guarded(BundleError, "x"):
        raise asyncio.CancelledError


def test_our_own_errors_pass_with_their_fields() -> None:
    with (
        refused(InvalidInputError, got="the inner", cure="the nearer cure"),
        guarded(BundleError, "the outer"),
        guarded(CheckpointError, "the middle"),
    ):
        raise InvalidInputError("the inner", cure="the nearer cure")


@pytest.mark.parametrize("line", ["assert False", "no_such_name"])
def test_what_can_only_be_a_bug_of_ours_passes(line: str) -> None:
    """In vzip's own code: the same in a package is the package's answer to our input."""
    namespace = {"__name__": some_module_of_ours.__name__}
    with pytest.raises((AssertionError, NameError)), guarded(BundleError, "x"):
        exec(line, namespace)
    with refused(BundleError), guarded(BundleError, "x"):
        exec(line, {"__name__": "a_package"})


def test_what_works_with_checked_values_shows_its_bugs_and_not_those_of_packages() -> None:
    """An index beyond our own list is our bug; one beyond a package's isn't."""

    @door(BundleError, "x", reads=False)
    def work(module: str, line: str) -> None:
        exec(line, {"__name__": module})

    for line in ("[][1]", "{}['a']", "None.x", "1/0", "int('x')"):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            work(some_module_of_ours.__name__, line)
        assert not isinstance(caught.value, BundleError)
        with refused(BundleError):
            work("a_package", line)
    with refused(BundleError, cause="MemoryError"):
        work(some_module_of_ours.__name__, "raise MemoryError")
    with refused(BundleError, cause="No space left"):
        work(some_module_of_ours.__name__, "raise OSError(28, 'No space left on device')")


@door(BundleError, "the bundle '{path}' at {size} can't be read", cure="look at '{path}'")
def opened(path: object, *, size: object = 3) -> object:
    if isinstance(path, Exception):
        raise path
    return {"a": 1}[str(path)]


def test_a_door_names_its_arguments() -> None:
    assert opened("a") == 1
    assert opened.__name__ == "opened"
    with refused(BundleError, got=("'b'", "at 3"), cause="KeyError: 'b'", cure="'b'"):
        opened("b")
    with refused(BundleError, got=("'c.npy'", "SimpleNamespace")):
        opened(Path("c.npy"), size=SimpleNamespace())
    with refused(BundleError, got="…") as caught:
        opened("{path}" * 10_000)
    assert len(str(caught.value)) < 1500


def test_a_call_with_the_wrong_arguments_is_the_caller_s_bug() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        opened("a", wrong=1)  # type: ignore[call-arg]


def test_values_are_shown_in_a_few_characters() -> None:
    assert shown(10**400) == "a huge integer"
    assert (shown(None), shown(float("nan")), shown(7)) == ("None", "nan", "7")
    assert shown([1] * 1000) == "list"


def test_a_message_is_one_line_of_printable_characters() -> None:
    error = BundleError("the file 'a\x1b[31m\x07\ud800\u202e.npz'\r\nis gone", cure="a\x00b\x9b")
    assert re.fullmatch(r"[ -~]+", str(error))
    assert "a\\x1b[31m\\x07\\ud800\\u202e.npz' is gone" in str(error)
    assert str(BundleError("é 猫 – ×")) == "é 猫 – ×"


def test_the_original_is_there_to_be_looked_at(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def command(verbosity: console.Verbosity) -> int:
        console.set_verbosity(verbosity)
        opened("b")
        return 0

    assert console.run_command(lambda: command(console.Verbosity.NORMAL), prog="vzip") == 2
    assert "Traceback" not in capsys.readouterr().err
    with caplog.at_level(logging.DEBUG):
        assert console.run_command(lambda: command(console.Verbosity.DEBUG), prog="vzip") == 2
    said = capsys.readouterr().err
    assert "KeyError: 'b'" in said
    assert said.splitlines()[-1].startswith("vzip: error: the bundle 'b'")


def test_an_error_s_fields_are_as_they_were_given() -> None:
    says(BundleError("a\x1b", cure="c"), got="a\x1b", cure="c")


def test_a_machine_s_refusal_of_a_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise OSError(30, "Read-only file system", "a.png")

    assert console.run_command(command, prog="vzip show") == console.FAILED
    said = capsys.readouterr().err
    assert said.startswith("vzip show: error: ")
    assert "OSError: Read-only file system" in said
    assert said.count("\n") == 1


def test_a_bug_of_a_command_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        console.run_command(lambda: {}["a"], prog="vzip show")


def decorated() -> list[tuple[str, str, str]]:
    """Return each door in the source: its place, the kind it raises, and what documents it."""
    found = []
    for path in house.modules().values():
        tree = ast.parse(path.read_text("utf-8"))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            for call in getattr(node, "decorator_list", ()):
                if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "door"):
                    continue
                assert isinstance(node, ast.FunctionDef)
                text = ast.get_docstring(node) or ""
                if node.name == "__init__":  # the class says what making one raises
                    owner = parents[node]
                    assert isinstance(owner, ast.ClassDef)
                    text += ast.get_docstring(owner) or ""
                place = f"{path.parent.name}/{path.name}:{node.name}"
                found.append((place, ast.unparse(call.args[0]), text))
    return found


@pytest.mark.parametrize(("place", "kind", "text"), decorated(), ids=lambda each: each[:60])
def test_a_door_raises_what_it_documents(place: str, kind: str, text: str) -> None:
    private = place.rpartition(":")[2].startswith("_") and "__init__" not in place
    _, raises, said = text.partition("Raises:")
    assert private or (raises and (kind in said or "VzipError" in said)), place


PUBLIC = {
    "vzip.runtime.encoder": ("VisionEncoder.open", "VisionEncoder.encode", "VisionEncoder.run",
                             "VisionEncoder.image_tokens", "VisionEncoder.video_tokens"),
    "vzip.runtime.llm.opening": ("open_llm", "parse", "LlmChoice.open"),
    "vzip.runtime.bundle.reader": ("read_bundle", "Bundle.read_model", "Bundle.read_llm"),
    "vzip.runtime.pictures.images": ("load_image",),
    "vzip.runtime.pictures.video": ("sample_frames",),
    "vzip.runtime.tokens.file": ("TokenFile.open", "TokenFile.read"),
    "vzip.runtime.tokens.cache": ("TokenCache.get", "TokenCache.put", "TokenCache.__init__"),
    "vzip.export.pipeline": ("export",),
    "vzip.export.checking": ("check",),
    "vzip.export.engines": ("build",),
    "vzip.export.llm.gguf": ("convert",),
    "vzip.export.checkpoint.reader": ("Checkpoint.open", "read_vision", "read_projector"),
    "vzip.calibration.quantization.calibrate": ("calibrate",),
    "vzip.calibration.tuning.tune": ("tune",),
    "vzip.calibration.sweeping.sweep": ("sweep",),
    "vzip.calibration.reporting.report": ("report",),
    "vzip.calibration.samples": ("Samples.open",),
}  # fmt: skip


def test_what_the_documents_call_is_guarded() -> None:
    places = {place for place, _, _ in decorated()}
    for module, names in PUBLIC.items():
        package, _, name = module.rpartition(".")
        folder = package.rpartition(".")[2]
        files = {f"{folder}/{name}.py", f"{name}/__init__.py"}
        for each in names:
            function = each.rpartition(".")[2]
            assert places & {f"{file}:{function}" for file in files}, (module, each)
