"""Plain files: how everything that somebody names is opened and read.

What a name leads to need not be a file. Opening a FIFO waits until somebody writes, a device may
act or never end, and a name that was looked at may be another thing when it is opened. So a file is
opened without waiting, and what was opened is looked at; what is read has a bound that is known
before memory is taken for it. `tests/test_doors_of_files.py` lists who opens files in another
way, and why.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

Pathlike = str | os.PathLike[str]

LONGEST_TEXT: Final = 1 << 26
"""Bytes of a configuration, index or tokenizer that are read at most; the largest have 40 MiB."""

# What POSIX alone has is 0 elsewhere.
_OPEN: Final = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
)
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0)


class NotPlainError(OSError):
    """What is no plain file, or not the folder that it should be; `strerror` says what it is."""


def open_plain(path: Pathlike, *, links: bool = True) -> BinaryIO:
    """Open a file for reading, at once.

    Args:
        path: The file.
        links: Whether its name may be a symbolic link to it.

    Raises:
        OSError: It can't be opened; a `NotPlainError` if it is no plain file.
    """
    try:
        # First of all not opened: that alone can make a device act.
        check_plain(Path(path).stat(follow_symlinks=links), path)
        descriptor = os.open(path, _OPEN if links else _OPEN | _NO_LINK)
    except ValueError as error:  # a zero byte, or text that the file system has no bytes for
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        check_plain(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Pathlike, most: int) -> bytes:
    """Return what a file holds.

    Args:
        path: The file, or a link to it.
        most: Bytes that it may have.

    Raises:
        OSError: It can't be read, is no plain file, or is larger.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {most}", str(path))
        data = file.read(size + 1)
    if len(data) > size:
        raise OSError(errno.EBUSY, "it grows while it is read", str(path))
    return data


def read_text(path: Pathlike, most: int = LONGEST_TEXT) -> str:
    """Return the text of a file in UTF-8; see `read_plain`.

    Raises:
        OSError: As for `read_plain`.
        UnicodeDecodeError: It is no UTF-8.
    """
    return read_plain(path, most).decode("utf-8")


def check_folder_of_plain(folder: Path) -> None:
    """Refuse a folder for a library that opens the files in it by their names, and would wait.

    Raises:
        OSError: It can't be listed; a `NotPlainError` if something in it is no file and no folder.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and Path(entry.path).exists():  # not a link to nothing
                check_plain(entry.stat(), entry.path)


def check_plain(status: os.stat_result, path: Pathlike) -> None:
    """Refuse what is no plain file.

    Raises:
        NotPlainError: It isn't.
    """
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        folder, link = stat.S_ISDIR(mode), stat.S_ISLNK(mode)
        kind = "folder" if folder else "symbolic link" if link else "device, pipe or socket"
        code = errno.EISDIR if folder else errno.ELOOP if link else errno.EINVAL
        raise NotPlainError(code, f"it is a {kind}, not a plain file", os.fspath(path))
