"""Where a command writes: whether it can be written is said before any work is done."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import atomic
from vzip.runtime.guard import door

Pathlike = str | os.PathLike[str]


@door(InvalidInputError, "the output '{path}' can't be written", cure="choose another name")
def check_file(path: Pathlike, *suffixes: str, exact: bool = False) -> Path:
    """Refuse an output file that can't be written.

    Args:
        path: The file; it may be there already.
        suffixes: Those that its name may have, such as ``.png``.
        exact: Whether upper case is refused.

    Returns:
        The path.

    Raises:
        InvalidInputError: Another suffix, a folder, or a file in a folder that is not there or
            can't be written to.
    """
    path = Path(path)
    if (path.suffix if exact else path.suffix.lower()) not in suffixes:
        raise InvalidInputError(
            f"the output is '{path}'", expected=f"a file name that ends with {_either(suffixes)}"
        )
    if path.is_dir():
        raise InvalidInputError(
            f"the output '{path}' is a folder", cure="give the name of a file in it"
        )
    if not path.parent.is_dir():
        raise InvalidInputError(
            f"the output is '{path}', but the folder '{path.parent}' does not exist",
            cure="create the folder first",
        )
    _check_access(path.parent, path.name)
    return path


@door(InvalidInputError, "the output '{path}' can't be written", cure="choose another name")
def check_folder(path: Pathlike) -> Path:
    """Refuse a file for a folder of results; a folder that is not there will be made.

    Raises:
        InvalidInputError: It is a file, or one that can't be made or written to.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InvalidInputError(f"the output '{path}' is a file", expected="a folder")
    _check_access(path)
    return path


@door(InvalidInputError, "the output '{path}' can't be written", cure="choose another name")
def write_file(path: Path, data: bytes | str) -> None:
    """Write a result; the file is there whole, or as it was.

    Args:
        path: The file.
        data: What it holds; a text is written in UTF-8, and what can't be (a file's name may have
            bytes that are no text) is escaped.

    Raises:
        InvalidInputError: It can't be written.
    """
    try:
        atomic.replace_file(path, _bytes(data))
    except OSError as error:
        raise _unwritable(path, error) from error


@door(InvalidInputError, "the output '{folder}' can't be written", cure="choose another name")
def write_folder(folder: Path, files: Mapping[str, bytes | str]) -> list[Path]:
    """Write results, as `write_file` does, into a folder and return their paths.

    Raises:
        InvalidInputError: The folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            atomic.replace_file(folder / name, _bytes(data))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return [folder / name for name in files]


def _bytes(data: bytes | str) -> bytes:
    return data.encode(errors="backslashreplace") if isinstance(data, str) else data


def _check_access(folder: Path, name: str = "results.json") -> None:
    """Refuse a folder that can't be written to, or that can't be made, by trying it.

    A file is written there and removed again, since permissions don't say everything: the disk may
    be full, a quota be used up, a name be too long for what is written beside it at first.
    """
    there = folder.absolute()
    missing = []
    while not there.exists():
        missing.append(there)
        there = there.parent
    if not there.is_dir():
        raise _unwritable(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    made = []
    try:
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        atomic.try_file(folder / name)
    except OSError as error:
        raise _unwritable(folder / name if not missing else folder, error) from error
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):  # another command writes there now
                each.rmdir()


def _either(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes)


def _unwritable(path: Path, error: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"the output '{path}' can't be written ({error.strerror})",
        cure="choose a folder that you may write to, on a disk with room",
    )
