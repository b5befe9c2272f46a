"""Locks between processes, which the kernel drops with the process that holds them.

They are advisory (flock) and lie on a file or folder. SIGKILL leaves no lock behind: a file that is
there says nothing, only its lock does. Windows and some network file systems have no locks; whoever
takes one decides what that means.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Lock:
    """The lock of an open file or folder, held until it is closed; a context manager.

    Attributes:
        taken: Whether it is held now; False if another process holds it, None if the file system
            has no locks.
    """

    def __init__(self, descriptor: int, waiting: Callable[[], object] | None = None) -> None:
        """Take the lock, see `on_file`; the descriptor is closed with it."""
        self._descriptor: int | None = descriptor
        try:
            self.taken = _take(descriptor, waiting)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop the lock; closing twice does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def is_of(self, path: Path) -> bool:
        """Return whether what is locked still has this name."""
        if self._descriptor is None or not path.exists():
            return False
        return os.path.samestat(path.stat(), os.fstat(self._descriptor))

    def __enter__(self) -> Lock:  # noqa: PYI034 - typing.Self is newer than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def on_file(path: Path, waiting: Callable[[], object] | None = None) -> Lock:
    """Take the lock of a file, which is made if it isn't there and stays.

    Args:
        path: The file.
        waiting: What to do before waiting for another process that holds the lock; None not to
            wait, see `Lock.taken`.

    Raises:
        OSError: It can't be opened, or is a symbolic link.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return Lock(os.open(path, flags, 0o666), waiting)


def on_folder(path: Path) -> Lock:
    """Take the lock of a folder, which is made if it isn't there, without waiting.

    Raises:
        OSError: It can't be made or opened.
    """
    while True:
        path.mkdir(exist_ok=True)
        lock = Lock(os.open(path, os.O_RDONLY))
        if lock.taken is False or lock.is_of(path):
            return lock
        lock.close()  # its last user removed it in the moment before it was locked


def _take(descriptor: int, waiting: Callable[[], object] | None) -> bool | None:
    """Lock what is open; see `Lock.taken`."""
    try:
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                return False
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return None
    return True
