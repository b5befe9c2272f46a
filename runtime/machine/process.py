"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def cores() -> int:
    """Return how many cores this process may use: a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Return `cores`, counting two threads of one core once, where the kernel says which they are.

    Two threads that multiply on one core slow each other down.
    """
    if not hasattr(os, "sched_getaffinity"):
        return cores()
    found = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            found.add(siblings.read_text(encoding="ascii"))
        except OSError:
            return cores()
    return len(found)


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had, mapped files included.

    Linux's account of a process begins with what its parent had when it was forked, so the memory's
    own high-water mark (``VmHWM``) is read where there is one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
        return int(found[1]) * 1024
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def peak_mib() -> float:
    """Return `peak_bytes` in MiB."""
    return peak_bytes() / 2**20
