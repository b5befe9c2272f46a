"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from vzip.runtime.machine import process


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 6}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert process.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert process.cores() == process.physical_cores() == 7


def test_two_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(
        process.Path, "read_text", lambda path, **_: f"{int(path.parts[5][3:]) // 2}"
    )
    assert process.physical_cores() == 2


@pytest.mark.slow
def test_the_peak_stays_after_memory_is_given_back() -> None:
    before = process.peak_bytes()
    np.ones(2**25).sum()  # 256 MiB
    assert process.peak_mib() >= before / 2**20 + 200 or before > 2**29
    assert process.peak_mib() == process.peak_bytes() / 2**20


@pytest.mark.slow
def test_a_child_s_peak_does_not_begin_with_its_parent_s() -> None:
    held = np.ones(2**26)  # 512 MiB
    code = "from vzip.runtime.machine.process import peak_mib; print(peak_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < held.nbytes / 2**20 / 2
