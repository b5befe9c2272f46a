"""Folders and files that appear whole or not at all, whatever kills the process that writes them.

A folder is written beside its target under a hidden name, flushed to the disk, and takes the
target's name in one system call. The hidden folder is locked by the process that writes it:
the kernel drops the lock with the process, so the next writer of the same target can tell what a
dead one left behind from what a living one is working on.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO, Final

from vzip.runtime.files import locks

TEMPORARY: Final = ".vzip-tmp"
ASIDE: Final = ".vzip-old"

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}
_TRIED: Final = 4096  # bytes: a block, which an empty file doesn't take
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class StagedFolder:
    """A hidden folder beside `target` that is to take its place.

    Attributes:
        target: The folder that `commit` creates or replaces.
        path: The hidden folder, empty at first.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        _sweep(target)
        self.path, self._lock = _make_locked(target)

    def commit(self) -> None:
        """Flush the folder to the disk and let it take the target's place.

        Where the kernel can exchange two folders (Linux), no moment exists at which the target is
        absent. Elsewhere the old folder is moved aside first and removed last; a process killed in
        between leaves it complete, under its name with `ASIDE` at the end.

        Raises:
            OSError: The disk is full, the folder is read-only, … : the target is as it was.
        """
        # onnx writes files of weights that only their owner may read; the folder has the umask's.
        mode = self.path.stat().st_mode & 0o666
        for entry in self.path.iterdir():
            entry.chmod(mode)
            _flush(entry)
        _flush(self.path)
        if os.path.lexists(self.target):
            replaced = _replace(self.path, self.target)
        else:
            self.path.rename(self.target)  # fails, as it should, if something appeared there
            replaced = None
        _flush(self.target.parent)
        if replaced is not None:
            _remove(replaced)

    def close(self) -> None:
        """Remove what was not committed and drop the lock; closing twice does nothing."""
        _remove(self.path)
        self._lock.close()


def rename_file(path: Path, target: Path) -> None:
    """Let a file that was flushed before take the place of `target`, and flush the folder.

    Raises:
        OSError: It could not be renamed; both are as they were.
    """
    path.replace(target)
    _flush(target.parent)


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to a hidden sibling of `path`, flush it and let it take the place of `path`.

    Raises:
        OSError: It could not be written; `path` is as it was and nothing is left beside it.
    """
    temporary = _hidden(path, TEMPORARY)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def try_file(path: Path) -> None:
    """Write what `replace_file` would write at first, a few kilobytes of it, and remove it again.

    Where the system can, the file never has a name, so that who is killed leaves none behind.

    Raises:
        OSError: A file of that name can't be written now; nothing is left.
    """
    temporary = _hidden(path, TEMPORARY)
    with contextlib.suppress(FileNotFoundError):
        temporary.lstat()  # of a name that is too long says so
    try:
        nameless = os.open(path.parent, os.O_RDWR | os.O_TMPFILE, 0o600)
    except (AttributeError, OSError):
        pass  # neither every system nor every file system has them
    else:
        with os.fdopen(nameless, "wb") as file:
            _fill(file)
        return
    try:
        with temporary.open("xb") as file:
            _fill(file)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(file: BinaryIO) -> None:
    """Write a few kilobytes to the disk."""
    file.write(bytes(_TRIED))
    file.flush()
    os.fsync(file.fileno())


def is_temporary(path: Path) -> bool:
    """Return whether `path` has a name that only this module gives."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def _hidden(target: Path, ending: str) -> Path:
    """Return a new hidden name beside `target`."""
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}{ending}")


def _make_locked(target: Path) -> tuple[Path, locks.Lock]:
    """Create the hidden folder and lock it; the mode is the umask's, as for any folder."""
    while True:
        path = _hidden(target, TEMPORARY)
        lock = locks.on_folder(path)
        if lock.taken is not False:
            return path, lock
        # Another writer took it for a dead one's, in the moment before it was locked.
        lock.close()


def _sweep(target: Path) -> None:
    """Remove hidden folders that writers of `target` left when they were killed."""
    for path in target.parent.glob(f".{_escaped(target.name)}.*{TEMPORARY}"):
        try:
            lock = locks.on_left(path)
        except OSError:
            continue  # it is no folder
        if lock is None:
            continue  # another writer swept it first
        with lock:
            if lock.taken:  # without locks nothing is swept
                _remove(path)


def _escaped(name: str) -> str:
    """Return `name` for use in a glob pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, target: Path) -> Path:
    """Let `path` take the place of the folder `target`; return where the old one is now."""
    try:
        _exchange(path, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    else:
        return path
    aside = _hidden(target, ASIDE)
    target.rename(aside)
    try:
        path.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    return aside


def _exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders in one system call.

    Raises:
        OSError: With an errno of `_UNSUPPORTED` where kernel, C library or file system can't.
    """
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "no renameat2 in the C library")
    first, second = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, first, _AT_FDCWD, second, ctypes.c_uint(_RENAME_EXCHANGE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def _remove(path: Path) -> None:
    """Remove a folder as far as possible."""
    import shutil  # with its compressors it takes longer to import than this package

    shutil.rmtree(path, ignore_errors=True)
