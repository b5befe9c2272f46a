"""The record of this machine: what a number depends on."""

from __future__ import annotations

import os

import pytest

from vzip.runtime.machine import commands
from vzip.runtime.machine.record import machine, versions


def test_the_processor_and_what_runs_on_it(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni amx_int8 smx\n"
    )
    governor = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    governor.mkdir(parents=True)
    (governor / "scaling_governor").write_text("powersave\n")
    found = machine("pytest", root=tmp_path)
    assert found["processor"] == "Some CPU"
    assert found["instructions"] == ["avx2", "avx512_vnni", "amx_int8"]
    assert found["governor"] == "powersave"
    assert found["packages"]["pytest"] == pytest.__version__
    assert found["jetson"] is None
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert versions("no-such-distribution") == {}


def test_a_jetsons_power_mode_is_stored(tmp_path, monkeypatch):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    monkeypatch.setattr(
        commands, "ask", lambda *command: {"nvpmodel": "NV Power Mode: 15W\n"}.get(command[0])
    )
    assert machine(root=tmp_path)["power_mode"] == "15W"


def test_what_nvidia_smi_says_is_of_the_state(monkeypatch):
    row = "L4, 570.86, 23034 MiB, 3 MiB, 16.1 W, 41, 0 %, 210 MHz, 405 MHz, Enabled, 72.00 W\n"
    monkeypatch.setattr(
        commands, "ask", lambda *command: row if command[0] == "nvidia-smi" else None
    )
    (gpu,) = machine()["state"]["nvidia_smi"]
    assert (gpu["name"], gpu["temperature.gpu"]) == ("L4", "41")
