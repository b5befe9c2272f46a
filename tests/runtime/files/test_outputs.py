"""Whether an output can be written is said before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import faults
from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.outputs import check_file, check_folder


def test_what_can_be_written_is_given_back(tmp_path: Path) -> None:
    assert check_file(tmp_path / "a.png", ".png") == tmp_path / "a.png"
    assert check_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"


def test_a_folder_that_may_not_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def access(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)  # root may write everywhere
    with refused(InvalidInputError, got=(str(tmp_path), "ermission"), cure="folder"):
        check_file(tmp_path / "a.png", ".png")
    with refused(InvalidInputError, got=(str(tmp_path / "new"), "ermission"), cure="folder"):
        check_folder(tmp_path / "new" / "deep")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(InvalidInputError, got=(str(tmp_path / "file" / "sub"), "ot a directory")):
        check_folder(tmp_path / "file" / "sub")


def test_trying_leaves_nothing(tmp_path: Path) -> None:
    check_file(tmp_path / "a.png", ".png")
    check_folder(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there.png").write_bytes(b"x")
    check_file(tmp_path / "there.png", ".png")
    assert (tmp_path / "there.png").read_bytes() == b"x"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_and_names_that_cant_be_written_are_known_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def check(name: str) -> None:
        if kind == "file":
            check_file(tmp_path / f"{name}.png", ".png")
        else:
            check_folder(tmp_path / name / "deep")

    # What is written beside it at first has a longer name.
    with refused(InvalidInputError, got=str(tmp_path)):
        check(("x" * 247) if kind == "file" else "x" * 256)
    with refused(InvalidInputError, got=str(tmp_path)):
        check("a\0b")
    faults.fill_disk(monkeypatch)
    with refused(InvalidInputError, got=(str(tmp_path), "No space left"), cure="room"):
        check("a")
    assert list(tmp_path.iterdir()) == []
