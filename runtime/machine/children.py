"""A program in a process of its own: with a time limit, and with a bound on what it says.

Whatever it does, the caller goes on: a child that hangs, crashes or writes without end is ended,
and its own children with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

KEPT: Final = 2**18
"""Bytes of a child's output that are kept of its beginning, and as many of its end."""

_CHUNK: Final = 2**16
_PATIENCE_S: Final = 5.0  # for the rest of the output of a child that has ended


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: Its exit status; negative is the signal that ended it. None after the limit, or
            where it could not be started.
        how: In words; empty if all went well.
        output: What it wrote to standard output and standard error, as text; where that was long,
            the beginning and the end.
        seconds: How long it ran.
    """

    status: int | None
    how: str
    output: str
    seconds: float


def run_child(
    command: Sequence[str],
    limit_s: float,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    kept: int = KEPT,
) -> Ended:
    """Run a program to its end, or to the end of its time.

    Args:
        command: The program and its arguments.
        limit_s: Seconds after which it is killed, with all that it has started.
        environment: Variables beside those of this process.
        folder: Its working directory; None for this process's own.
        kept: Bytes of its output that are kept of the beginning, and as many of the end.
    """
    start = time.monotonic()
    try:
        child = subprocess.Popen(  # noqa: S603  commands of ours, no shell
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a group of its own, which can be ended as a whole
        )
    except OSError as error:
        return Ended(None, f"can't be started ({error.strerror})", "", 0.0)
    assert child.stdout is not None
    said = _Said(child.stdout, kept)
    status: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(limit_s)
    finally:
        _end(child)  # what it left behind goes too, and would hold its output open
    seconds = time.monotonic() - start
    return Ended(status, _how(status, limit_s), said.text(), round(seconds, 2))


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and its group."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _how(status: int | None, limit_s: float) -> str:
    if status is None:
        return f"took longer than {limit_s:.0f} s and was ended"
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"ended with status {status}" if status else ""


class _Said:
    """Reads what a child says, so that it never waits for a reader, and keeps what is wanted."""

    def __init__(self, stream: IO[bytes], kept: int) -> None:
        self._head, self._tail, self._lost = bytearray(), bytearray(), 0
        self._kept = kept
        self._stream = stream
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with self._stream as stream:
            while chunk := os.read(stream.fileno(), _CHUNK):
                room = self._kept - len(self._head)
                self._head += chunk[:room]
                self._tail += chunk[room:]
                if len(self._tail) > 2 * self._kept:
                    self._shorten()

    def _shorten(self) -> None:
        lost = max(0, len(self._tail) - self._kept)
        self._lost += lost
        del self._tail[:lost]

    def text(self) -> str:
        """Return it, once there is no more to come."""
        self._thread.join(_PATIENCE_S)
        self._shorten()
        gap = f"\n… {self._lost} bytes left out …\n".encode() if self._lost else b""
        return (
            (self._head + gap + self._tail)
            .decode("utf-8", "replace")
            .replace("\0", "\N{REPLACEMENT CHARACTER}")
        )
