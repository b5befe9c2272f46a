"""What TensorRT said during a build, in a file: all of it, up to a size.

It is written as it is said, so that it is there when the builder was killed for want of memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vzip.export.engines.published import Say
from vzip.runtime.backends.tensorrt.logger import listening
from vzip.runtime.errors import BundleError, InvalidInputError

MOST_DETAILS: Final = 24 * 2**20
"""Bytes of INFO and VERBOSE; a verbose log of a large graph is hundreds of megabytes."""
MOST: Final = 32 * 2**20
"""Bytes of everything: warnings and errors are kept when details aren't any more."""

_DETAILS: Final = ("INFO", "VERBOSE")
_LONGEST: Final = 64 * 2**10


class _Writing:
    """A log that is being written; keeps quiet when the disk is full."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()  # TensorRT speaks from several threads
        self._start = time.monotonic()
        self._size = self._left_out = 0

    def hear(self, severity: str, message: str) -> None:
        """Write a message, if it has room."""
        passed = time.monotonic() - self._start
        line = f"{passed:9.3f} {severity}: {message[:_LONGEST].rstrip()}\n"
        data = line.encode(errors="backslashreplace")
        with self._lock:
            if self._size + len(data) > (MOST_DETAILS if severity in _DETAILS else MOST):
                self._left_out += 1
                return
            self._size += len(data)
            with contextlib.suppress(OSError):
                os.write(self._descriptor, data)

    def close(self) -> None:
        """Say what was left out, and close the file."""
        with contextlib.suppress(OSError):
            if self._left_out:
                said = f"{self._left_out} messages left out; the log is bounded\n"
                os.write(self._descriptor, said.encode())
        os.close(self._descriptor)


@contextlib.contextmanager
def build_log(trt: Any, beside: Path, asked: Path | None, say: Say) -> Iterator[Say]:
    """Write what TensorRT says, and what is said to the user, into a file.

    Args:
        trt: The module.
        beside: The file in the bundle, which stays only if the block raises.
        asked: A file that the user named, which stays in any case and is taken instead.
        say: Told where the log is, if the block raises.

    Yields:
        `say` that writes into the log too.

    Raises:
        InvalidInputError: `asked` can't be written.
        BundleError: `beside` can't.
    """
    path = beside if asked is None else asked
    try:
        # Not through a link that a bundle brought.
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o666)
    except OSError as error:
        kind = BundleError if asked is None else InvalidInputError
        raise kind(
            f"the log '{path}' can't be written ({error.strerror})",
            cure="choose a folder that you may write to, on a disk with room",
        ) from error
    writing = _Writing(descriptor)

    def saying(line: str) -> None:
        writing.hear("vzip", line)
        say(line)

    try:
        with listening(trt, writing.hear):
            yield saying
    except BaseException as error:
        writing.hear("vzip", f"{type(error).__name__}: {error}")
        writing.close()
        say(f"all that TensorRT said is in {path}")
        raise
    writing.close()
    if asked is None:
        path.unlink(missing_ok=True)
