"""What is no plain file is refused at once, and what is read has a bound.

`tests/test_doors_of_files.py` tries every door, and finds those to come.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.plain_files import KINDS, a_fifo, quick
from vzip.runtime.files import locks, plain

__all__ = ["quick"]  # a fixture


@pytest.mark.usefixtures("quick")
def test_a_name_that_becomes_another_thing_meanwhile(tmp_path, monkeypatch):
    """Between the look and the opening a FIFO takes a file's place."""
    path = tmp_path / "it"
    path.write_bytes(b"x")
    really = os.open

    def swapped(name: Any, *rest: Any, **more: Any) -> int:
        path.unlink(missing_ok=True)
        a_fifo(path)
        return really(name, *rest, **more)

    monkeypatch.setattr(os, "open", swapped)
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(plain.NotPlainError, match="device, pipe or socket"):
        plain.open_plain(path)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_what_is_read_has_a_bound(tmp_path, monkeypatch):
    path = tmp_path / "it"
    path.write_bytes(b"12345")
    assert plain.read_plain(path, 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, more than 4") as caught:
        plain.read_plain(path, 4)
    assert caught.value.errno == errno.EFBIG
    with path.open("wb") as file:
        file.truncate(1 << 40)  # of which nothing is there
    with pytest.raises(OSError, match="more than"):
        plain.read_text(path)
    # What gives more than it says: as files of the kernel do.
    with pytest.raises(OSError, match="grows"):
        plain.read_plain("/proc/self/status", 1 << 20)
    with pytest.raises(OSError, match="null"):
        plain.open_plain("a\0b")


def test_links_may_be_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert plain.read_plain(tmp_path / "link", 1) == b"x"
    with pytest.raises(plain.NotPlainError, match="symbolic link"):
        plain.open_plain(tmp_path / "link", links=False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("quick")
def test_a_lock_is_a_plain_file(tmp_path, kind):
    kind(tmp_path / "it")
    with pytest.raises(plain.NotPlainError):
        locks.on_file(tmp_path / "it")
