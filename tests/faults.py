"""What goes wrong while files are written: a disk that fills, and SIGKILL."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> list[int]:
    """Let every flush but the first `after` find the disk full; return how many there were."""
    calls, fsync = [0], os.fsync

    def fail(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    return calls


def killed(work: Callable[[], object], steps: int) -> bool:
    """Return whether a fork of this process that does `work` was killed at a step, by SIGKILL."""
    child = os.fork()
    if child == 0:
        left = [steps]

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **options: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **options)

            return step

        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counting(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
