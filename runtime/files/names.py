"""Names and texts of a system, or of a locale, whose bytes are not UTF-8."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vzip.runtime.errors import InvalidInputError

_DESCRIPTORS = Path("/proc/self/fd")


@contextmanager
def in_utf8(folder: Path) -> Iterator[str]:
    """Give a folder's name to a library that takes names as UTF-8, whatever the system's are.

    The operating system's names are bytes. Python keeps those that are no text, and ONNX Runtime
    refuses them; under a locale that isn't UTF-8 it looks for another name. Such a folder is
    named by the descriptor that it is opened by.

    Args:
        folder: A folder that is there.

    Yields:
        Its name, or another one that leads to it; that one is good within the block.

    Raises:
        InvalidInputError: The name isn't UTF-8 and the system names no descriptors (Linux does).
    """
    path = os.path.abspath(folder)  # noqa: PTH100  Path.absolute keeps '..'
    if _is_utf8(path):
        yield str(folder)
        return
    if not _DESCRIPTORS.is_dir():
        raise InvalidInputError(
            f"the folder '{folder}' has a name that is not UTF-8",
            expected="one that ONNX Runtime can open",
            cure="rename the folder",
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield str(_DESCRIPTORS / str(descriptor))
    finally:
        os.close(descriptor)


def typed(text: str) -> str:
    """Return what was typed, as text: under a locale that isn't UTF-8 Python keeps bytes it lacks.

    Args:
        text: An argument or a line of standard input.

    Returns:
        The text; as it was where its bytes are no UTF-8 either.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        with suppress(UnicodeError):
            return os.fsencode(text).decode()
    return text


def _is_utf8(path: str) -> bool:
    """Return whether the bytes of a name are those that a library makes of the text."""
    try:
        return path.encode() == os.fsencode(path)
    except UnicodeEncodeError:
        return False
