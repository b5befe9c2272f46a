"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine import process, record


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 6}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert process.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert process.cores() == process.physical_cores() == 7


def test_two_threads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for cpu in range(4):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu // 2}")
    assert process.physical_cores(tmp_path) == 2


TREES: dict[str, tuple[dict[str, str], float | None]] = {
    "none": ({}, None),
    "v2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
    "v2-unbounded": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "v2-nested": (
        {
            "proc/self/cgroup": "0::/a.slice/b.scope\n",
            "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a.slice/b.scope/cpu.max": "400000 100000\n",
        },
        1.5,
    ),
    "v2-mounted-elsewhere": (
        {
            "proc/self/cgroup": "1:name=systemd:/x\n0::/pod/own\n",
            "proc/self/mountinfo": "30 1 0:26 /pod /cg rw - cgroup2 cgroup rw,nsdelegate\n",
            "cg/own/cpu.max": "300000 100000\n",
            "cg/cpu.max": "max 100000\n",
            "sys/fs/cgroup/cpu.max": "100000 100000\n",
        },
        3.0,
    ),
    "v2-of-a-namespace-above": (
        {"proc/self/cgroup": "0::/../other\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        0.5,
    ),
    "v1": (
        {
            "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/1f\n",
            "proc/self/mountinfo": (
                "31 1 0:27 /docker/1f /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct"
            ),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2.0,
    ),
    "v1-unbounded": (
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "9"},
        None,
    ),
    "both": (
        {
            "proc/self/cgroup": "3:cpu:/d\n0::/d\n",
            "proc/self/mountinfo": (
                "1 1 0:1 / /sys/fs/cgroup/cpu rw - cgroup c rw,cpu\n"
                "2 1 0:2 / /sys/fs/cgroup/unified rw - cgroup2 c rw\n"
            ),
            "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "700000",
            "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/unified/cpu.max": "600000 100000",
        },
        6.0,
    ),
    "nonsense": (
        {"sys/fs/cgroup/cpu.max": f"{'9' * 1000} x", "proc/self/mountinfo": " - \n1 2 - cgroup2\n"},
        None,
    ),
    "a-period-of-none": ({"sys/fs/cgroup/cpu.max": "100000 0"}, None),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_quota_is_the_smallest_of_nested_groups(
    tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = TREES[tree]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert process.quota(tmp_path) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    rounded = 4 if expected is None else max(1, min(4, -int(-expected // 1)))
    assert process.cores(tmp_path) == process.threads(tmp_path) == rounded
    assert record.machine(root=tmp_path)["graph_threads"] == rounded
    assert record.machine(root=tmp_path)["cpu_quota"] == expected


def test_a_limit_counts_until_it_is_taken_back() -> None:
    own = process.threads()
    process.limit_threads(3)
    try:
        assert process.threads() == process.thread_limit() == 3
    finally:
        process.limit_threads(None)
    assert process.threads() == own


@pytest.mark.parametrize("count", [0, -1, 4097, True, 2.0, "2"])
def test_a_number_of_threads_is_a_sensible_integer(count: object) -> None:
    with refused(InvalidInputError, got=f"threads={count!r}", expected="1 to 4096"):
        process.check_threads(count)


@pytest.mark.slow
def test_the_peak_stays_after_memory_is_given_back() -> None:
    before = process.peak_bytes()
    np.ones(2**26).sum()  # 512 MiB; what is in use now may be less than the peak
    assert process.peak_mib() >= before / 2**20 + 200 or before > 2**29
    assert process.peak_mib() == process.peak_bytes() / 2**20


@pytest.mark.slow
def test_a_child_s_peak_does_not_begin_with_its_parent_s() -> None:
    held = np.ones(2**26)  # 512 MiB
    code = "from vzip.runtime.machine.process import peak_mib; print(peak_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < held.nbytes / 2**20 / 2
