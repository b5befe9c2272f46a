"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from vzip.runtime.errors import InvalidInputError

ROOT: Final = Path("/")
MOST_THREADS: Final = 4096

_limit: int | None = None


def cores(root: Path = ROOT) -> int:
    """Return how many cores this process may use: a container may have fewer than the machine.

    Counted are those that it is bound to, and of them no more than the quota of its control groups
    is worth, rounded up.

    Args:
        root: Of the file system that is read.
    """
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    else:
        bound = os.cpu_count() or 1
    return _within_quota(bound, root)


def physical_cores(root: Path = ROOT) -> int:
    """Return `cores`, counting two threads of one core once, where the kernel says which they are.

    Two threads that multiply on one core slow each other down.
    """
    if not hasattr(os, "sched_getaffinity"):
        return cores(root)
    found = set()
    for cpu in os.sched_getaffinity(0):
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            found.add(siblings.read_text(encoding="ascii"))
        except OSError:
            return cores(root)
    return _within_quota(len(found), root)


def threads(root: Path = ROOT) -> int:
    """Return how many threads a graph gets that nobody gave a number: those of `limit_threads`.

    Without a limit they are `physical_cores`. More threads than a quota pays for are stopped in the
    midst of a product while the others wait for them.
    """
    return physical_cores(root) if _limit is None else _limit


def thread_limit() -> int | None:
    """Return what `limit_threads` set last."""
    return _limit


def limit_threads(count: int | None) -> None:
    """Set what `threads` returns from now on; None for this machine's own number."""
    global _limit  # noqa: PLW0603  a process has one number
    if count is not None:
        check_threads(count)
    _limit = count


def check_threads(count: object) -> int:
    """Return a number of threads that somebody asked for.

    Raises:
        InvalidInputError: It is no integer from 1 to 4096.
    """
    if type(count) is int and 1 <= count <= MOST_THREADS:
        return count
    raise InvalidInputError(
        f"got threads={count!r}",
        expected=f"an integer from 1 to {MOST_THREADS}",
        cure=f"leave it out for this machine's own number, {physical_cores()}",
    )


def quota(root: Path = ROOT) -> float | None:
    """Return how many cores' time the control groups of this process allow; None without a limit.

    Groups are nested, and each bounds all below it, so the smallest counts. In a container the
    groups above its own are mostly out of sight. Both versions are read, since a system may mount
    both: ``cpu.max`` of version 2, ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` of version 1.
    Sources: the kernel's admin-guide/cgroup-v2 and scheduler/sched-bwc, proc(5) for mountinfo.

    Args:
        root: Of the file system that is read.
    """
    shares = [
        _share(each)
        for group, mount in _groups(root)
        for each in (group, *group.parents)
        if each.is_relative_to(mount)
    ]
    return min((share for share in shares if share is not None), default=None)


def _within_quota(count: int, root: Path) -> int:
    """Return as many of some cores as the quota is worth; at least one."""
    share = quota(root)
    return count if share is None else max(1, min(count, math.ceil(share)))


def _groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folders of this process's groups that count time, and where each is mounted."""
    own = {}  # whether version 1 → the group's path
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) or "cpu" in controllers.split(","):
            own[bool(controllers)] = path
    seen = False
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        first = kind[0] == "cgroup" and "cpu" in kind[2].split(",")
        if not first and kind[0] != "cgroup2":
            continue
        seen = True
        yield _group(root, fields[4], own.get(first, "/"), fields[3])
    if not seen:
        for first, place in ((False, ""), (True, "/cpu"), (True, "/cpu,cpuacct")):
            yield _group(root, f"/sys/fs/cgroup{place}", own.get(first, "/"), "/")


def _group(root: Path, mount: str, path: str, mounted: str) -> tuple[Path, Path]:
    """Return the folder of a group, and that in which the hierarchy from `mounted` on is."""
    top = root / mount.lstrip("/")
    inside = PurePosixPath(path)
    if ".." in inside.parts or not inside.is_relative_to(mounted):
        return top, top  # of a namespace above; what is mounted is this process's own
    return top / inside.relative_to(mounted), top


def _share(group: Path) -> float | None:
    """Return how many cores' time a group may take; None without a limit."""
    words = " ".join(_lines(group / "cpu.max")).split() or [
        word for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for word in _lines(group / name)
    ]
    if len(words) != 2 or not all(re.fullmatch(r"[0-9]{1,18}", word) for word in words):
        return None  # "max", -1, or no such file
    share, period = map(int, words)
    return share / period if share and period else None


def _lines(path: Path) -> list[str]:
    """Return a file's lines; none where it is absent or can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):  # a mount's name with a zero byte is a ValueError
        return []


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
