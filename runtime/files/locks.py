"""Locks between processes, which the kernel drops with the process that holds them.

They are advisory (flock) and lie on a file or folder. SIGKILL leaves no lock behind: a file that is
there says nothing, only its lock does. Windows and some network file systems have no locks; whoever
takes one decides what that means.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vzip.runtime.files import plain

# What POSIX alone has is 0 elsewhere.
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT: Final = getattr(os, "O_NONBLOCK", 0)
_FOLDER: Final = getattr(os, "O_DIRECTORY", 0)


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
        OSError: It can't be opened; is no plain file, or its folder is a symbolic link.
    """
    flags = os.O_RDWR | os.O_CREAT | _NO_LINK | _NO_WAIT
    try:
        if os.open in os.supports_dir_fd:
            folder = _open_folder(path.parent)
            try:
                descriptor = os.open(path.name, flags, 0o666, dir_fd=folder)
            finally:
                os.close(folder)
        else:
            descriptor = os.open(path, flags, 0o666)
    except plain.NotPlainError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket, a folder
            plain.check_plain(path.lstat(), path)
        raise
    try:
        plain.check_plain(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(descriptor, waiting)


def on_folder(path: Path) -> Lock:
    """Take the lock of a folder, which is made if it isn't there, without waiting.

    Raises:
        OSError: It can't be made or opened, or is a symbolic link.
    """
    while True:
        path.mkdir(exist_ok=True)
        lock = Lock(_open_folder(path))
        if lock.taken is False or lock.is_of(path):
            return lock
        lock.close()  # its last user removed it in the moment before it was locked


def on_left(path: Path) -> Lock | None:
    """Take the lock of a folder that somebody left, without waiting; None if it isn't there.

    Raises:
        OSError: It is no folder, or can't be opened.
    """
    try:
        return Lock(_open_folder(path))
    except FileNotFoundError:
        return None


def _open_folder(path: Path) -> int:
    """Open a folder itself: through a link a lock would be made elsewhere."""
    if path.is_symlink():
        raise plain.NotPlainError(errno.ELOOP, "its folder is a symbolic link", str(path))
    return os.open(path, os.O_RDONLY | _FOLDER | _NO_LINK)


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
