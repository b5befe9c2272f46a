"""An engine in its bundle, and the lock under which it gets there: for every kind of engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vzip.runtime.bundle.engine_record import ENGINE_SUFFIX, ENGINES_FOLDER, LOCK_FILE, EngineRecord
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BundleError
from vzip.runtime.files import locks

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
            raise BundleError(
                f"{folder}: its file system has no locks",
                cause="two processes could spoil each other's work",
                cure="copy the bundle to a local disk and work on it there",
            )
        yield
