"""Whether an output can be written is said before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
