"""Names that are not UTF-8, and locales that aren't: every command works, or says one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import GOLDEN
from vzip.export.checkpoint.containers import read_json, read_tensors
from vzip.runtime import demo
from vzip.runtime.cli.main import main
from vzip.runtime.errors import VzipError
from vzip.runtime.files.names import in_utf8, typed

NO_TEXT = os.fsdecode(b"n\xffb")
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PICTURE = next((Path(demo.__file__).parent / "pictures").glob("*.jpg"))


def in_c_locale(*arguments: str | Path, **kwargs) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vzip.runtime.cli.main", *map(str, arguments)]
    environ = {**os.environ, **PLAIN}
    return subprocess.run(command, env=environ, capture_output=True, check=False, **kwargs)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose name is no UTF-8, with a bundle and a picture in it."""
    folder = tmp_path / NO_TEXT
    shutil.copytree(GOLDEN / "tiny_bundle", folder / "bundle")
    shutil.copy(PICTURE, folder / "a.jpg")
    return folder


def test_a_name_that_is_utf8_stays_and_another_one_leads_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ö").mkdir()
    with in_utf8(tmp_path / "ö") as name:
        assert name == str(tmp_path / "ö")
    (tmp_path / NO_TEXT).mkdir()
    (tmp_path / NO_TEXT / "here").touch()
    with in_utf8(tmp_path / NO_TEXT) as name:
        assert name.isascii()
        assert os.listdir(name) == ["here"]  # noqa: PTH208
    assert not os.path.exists(name)  # noqa: PTH110


def test_what_was_typed_is_text_under_every_locale() -> None:
    assert typed("what is ö?") == "what is ö?"
    assert typed("what is ö?".encode().decode("ascii", "surrogateescape")) == "what is ö?"
    assert typed(NO_TEXT) == NO_TEXT  # and is refused as no text


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "bundle", "a.jpg", "-o", "a.png"),
        ("encode", "bundle", "a.jpg", "-o", "a.safetensors"),
        ("inspect", "bundle"),
    ],
    ids=lambda each: each[0],
)
def test_a_bundle_below_a_folder_that_is_no_text(
    place: Path, capsysbinary: pytest.CaptureFixture[bytes], arguments: tuple[str, ...]
) -> None:
    names = [str(place / each) if (place / each).exists() else each for each in arguments]
    if "-o" in names:
        names[-1] = str(place / names[-1])
    assert main(names) == 0
    if "-o" in names:
        assert Path(names[-1]).stat().st_size > 0


def test_a_model_below_such_a_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(demo.checkpoint(), tmp_path / NO_TEXT)
    assert (
        main(["export", "--model", str(folder), "--tokens", "43", "-o", str(tmp_path / "b")]) == 2
    )
    err = capsys.readouterr().err
    assert "not UTF-8" in err
    assert err.count("\n") == 1


def test_a_bundle_below_umlauts_in_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "ö"
    shutil.copytree(GOLDEN / "tiny_bundle", folder / "bundle")
    shutil.copy(PICTURE, folder / "ä.jpg")
    done = in_c_locale("show", folder / "bundle", folder / "ä.jpg", "-o", folder / "ü.png")
    assert (done.returncode, done.stdout) == (0, os.fsencode(folder / "ü.png") + b"\n"), done.stderr


def test_help_is_printed_in_a_locale_that_lacks_its_characters() -> None:
    done = in_c_locale("build", "-h")
    assert done.returncode == 0, done.stderr
    assert b"usage: vzip build" in done.stdout
    assert done.stderr == b""


@pytest.mark.full
def test_every_long_command_below_a_folder_that_is_no_text(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    place = tmp_path / NO_TEXT
    pictures = place / "pictures"
    pictures.mkdir(parents=True)
    for path in PICTURE.parent.glob("*.jpg"):
        shutil.copy(path, pictures / os.fsdecode(b"\xfe" + os.fsencode(path.name)))
    bundle, picture = str(place / "b"), str(next(pictures.iterdir()))
    tune = ["tune", "--model", "demo", "--data", "demo", "--count", "16", "--tokens", "43"]
    sweep = ["sweep", "--model", "demo", "--tokens", "22", "--images", str(pictures)]
    for command in (
        ["export", "--model", "demo", "--tokens", "43", "--with-llm", "-o", bundle],
        ["ask", bundle, picture, "What digit is there?", "--cache", str(place / "cache")],
        ["check", bundle],
        ["calibrate", bundle, "--images", str(pictures), "--precision", "int8"],
        ["bench", bundle, "--wait", "0", "-o", str(place / "bench")],
        ["report", bundle, "--images", str(pictures), "-o", str(place / "r.html")],
        [*sweep, "-o", str(place / "sweep")],
        ["convert", "--model", "demo", "--to", "gguf", "-o", str(place / "a.gguf")],
        [*tune, "-o", str(place / "p.safetensors")],
    ):
        assert main(command) == 0, (command, capsysbinary.readouterr().err)


def test_errors_about_files_are_one_printable_line(tmp_path):
    folder = tmp_path / "a\x1b[2J\x9b31m\n\u202eb\r"
    folder.mkdir()
    (folder / "config.json").write_text("{\x1b[2J")
    (folder / "pickle.bin").write_bytes(b"\x80\x02c\x1b[2Jos\nsystem\x1b[31m\n.")
    for use in (
        lambda: read_json(folder / "config.json"),
        lambda: read_tensors(folder / "pickle.bin", ["a"]),
    ):
        with pytest.raises(VzipError) as caught:
            use()
        assert str(caught.value).isprintable()
