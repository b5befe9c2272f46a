"""Who gets a lock, who waits and who is refused, with a second process that is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vzip.runtime.files import locks, plain

HOLDER = """
import sys, time
from pathlib import Path
from tests.refusals import refused
from vzip.export.engines.published import build_lock
from vzip.runtime.errors import BundleError
from vzip.runtime.files import locks, plain
lock = getattr(locks, sys.argv[1])(Path(sys.argv[2]))
print(lock.taken, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["on_file", "on_folder"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds the lock of ``tmp_path / "lock"``."""
    command = [sys.executable, "-c", HOLDER, request.param, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_one_holds_it_and_sigkill_leaves_none(held, tmp_path, request):
    name = request.node.callspec.params["held"]
    with getattr(locks, name)(tmp_path / "lock") as lock:
        assert lock.taken is False
    held.send_signal(signal.SIGKILL)
    held.wait()
    with getattr(locks, name)(tmp_path / "lock") as lock:
        assert lock.taken is True
        assert getattr(locks, name)(tmp_path / "lock").taken is False
        lock.close()  # and closing twice does nothing
    assert getattr(locks, name)(tmp_path / "lock").taken is True


@pytest.mark.parametrize("held", ["on_file"], indirect=True)
def test_who_waits_gets_it_when_it_is_free(held, tmp_path):
    said = []

    def waiting() -> None:
        said.append("waiting")
        held.kill()

    with locks.on_file(tmp_path / "lock", waiting) as lock:
        assert (lock.taken, said) == (True, ["waiting"])


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with locks.on_folder(tmp_path / "a") as folder, locks.on_file(tmp_path / "b") as file:
        assert (folder.taken, file.taken) == (None, None)


def test_a_folder_that_was_removed_before_it_was_locked(tmp_path, monkeypatch):
    path, flock = tmp_path / "folder", fcntl.flock
    calls = []

    def once_removed(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            path.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", once_removed)
    with locks.on_folder(path) as lock:
        assert lock.taken is True
        assert lock.is_of(path)
    assert len(calls) == 2


def test_a_link_is_no_file_to_lock(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(plain.NotPlainError, match="symbolic link"):
        locks.on_file(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_no_lock_is_made_through_a_linked_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    for take in (
        lambda: locks.on_file(tmp_path / "link" / "lock"),
        lambda: locks.on_folder(tmp_path / "link"),
        lambda: locks.on_left(tmp_path / "link"),
    ):
        with pytest.raises(plain.NotPlainError, match="symbolic link"):
            take()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    # A link further up is the user's own way to name a folder.
    (tmp_path / "elsewhere" / "own").mkdir()
    with locks.on_file(tmp_path / "link" / "own" / "lock") as lock:
        assert lock.taken is True


def test_a_folder_that_becomes_a_link_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to("elsewhere")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)  # it was none when it was looked at
    for take in (
        lambda: locks.on_file(tmp_path / "folder" / "lock"),
        lambda: locks.on_folder(tmp_path / "folder"),
    ):
        with pytest.raises(OSError, match=r"Not a directory|symbolic"):
            take()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_nobody_left(tmp_path):
    assert locks.on_left(tmp_path / "gone") is None


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    really = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(OSError, match="Read-only"):
        locks.on_file(tmp_path / "lock")
    assert len([*Path("/proc/self/fd").iterdir()]) == before
