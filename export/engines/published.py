"""An engine in its bundle, and the lock under which it gets there: for every kind of engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vzip.runtime.bundle.engine_record import ENGINE_SUFFIX, ENGINES_FOLDER, LOCK_FILE, EngineRecord
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.bundle.writer import check_writable
from vzip.runtime.errors import BundleError
from vzip.runtime.files import atomic, locks

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in its bundle.

    Attributes:
        bundle: The bundle with the engine.
        name: The engine's name.
        record: Its record.
        reused: Whether it was there already, the same in every respect.
    """

    bundle: Bundle
    name: str
    record: EngineRecord
    reused: bool

    @property
    def path(self) -> Path:
        """The engine's file."""
        return self.bundle.path / ENGINES_FOLDER / f"{self.name}{ENGINE_SUFFIX}"


def check_changeable(bundle: Bundle) -> None:
    """Refuse a bundle that `build_lock` couldn't hold, or that can't take a file, before any work.

    Raises:
        BundleError: The folder can't be written, or its file system has no locks.
    """
    check_writable(bundle)
    trial = bundle.path / f".{os.urandom(4).hex()}{atomic.TEMPORARY}"
    try:
        try:
            with locks.on_file(trial) as lock:
                lockable = lock.taken is not None
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(
            f"{bundle.path}: can't be written ({error.strerror}), so the bundle can't be changed",
            cure="copy the bundle to a folder that you may write to, on a disk with room",
        ) from error
    if not lockable:
        raise _no_locks(bundle.path)


def _no_locks(folder: Path) -> BundleError:
    return BundleError(
        f"{folder}: its file system has no locks",
        cause="two processes could spoil each other's work",
        cure="copy the bundle to a local disk and work on it there",
    )


@contextlib.contextmanager
def build_lock(bundle: Bundle, say: Say) -> Iterator[None]:
    """Let one process at a time change a bundle; the lock ends with the process.

    Raises:
        BundleError: The folder can't be written, or its file system has no locks.
    """
    folder = bundle.path / ENGINES_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        lock = locks.on_file(
            folder / LOCK_FILE,
            lambda: say(f"another process works on {bundle.path}; waiting for it to end"),
        )
    except OSError as error:
        raise BundleError(
            f"{folder}: can't be written ({error.strerror}), so the bundle can't be changed",
            cure="copy the bundle to a folder that you may write to",
        ) from error
    with lock:
        if not lock.taken:
            raise _no_locks(folder)
        yield
