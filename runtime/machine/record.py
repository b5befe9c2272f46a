"""What a number depends on: the machine, its state and the versions, stored beside every result.

Quick, unlike `vzip.runtime.machine.environment.environment`, which asks every package in a child
process.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from vzip.runtime.machine import sensors
from vzip.runtime.machine.environment import power_mode, state

PACKAGES: Final = ("vzip", "numpy", "pillow", "onnxruntime", "openvino", "torch", "transformers")

# The instructions that decide how fast a CPU multiplies, as /proc/cpuinfo names them.
_INSTRUCTIONS: Final = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip

_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def machine(*packages: str, root: Path = sensors.ROOT) -> dict[str, Any]:
    """Return the machine's record, as JSON has it.

    Args:
        packages: Distributions whose versions count beside those of `PACKAGES`.
        root: Of the file system that is read.

    Returns:
        ``processor``, ``cores`` (those that this process may use), ``instructions``,
        ``memory_mib``, ``system``, ``python``, ``packages`` (name → version, of those that are
        installed), ``jetson`` (its model; None elsewhere), ``power_mode`` (a Jetson's), ``cpu_mhz``
        and ``governor`` (None where the kernel doesn't say, as in most virtual machines),
        ``threads`` (variables of the environment that bound their number) and ``state``: see
        `vzip.runtime.machine.environment.state`; its ``load`` is that before the measurement.
    """
    memory, jetson = sensors.memory(root), sensors.jetson(root)
    return {
        "processor": sensors.processor(root) or platform.machine(),
        "cores": _cores(),
        "instructions": instructions(root),
        "memory_mib": None if memory is None else memory.total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {
            name: version
            for name in (*PACKAGES, *packages)
            if (version := _version(name)) is not None
        },
        "jetson": None if jetson is None else jetson.model,
        "power_mode": None if jetson is None else power_mode(),
        "cpu_mhz": [round(clock.mhz) for clock in sensors.cpu_clocks(root)] or None,
        "governor": _governor(root),
        "threads": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "state": state(root),
    }


def _cores() -> int | None:
    """Return how many cores this process may use: a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def instructions(root: Path = sensors.ROOT) -> list[str]:
    """Return which vector instructions of those that matter here the processor has."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    there = set(match[1].split()) if match else set()
    return [name for name in _INSTRUCTIONS if name in there]


def _governor(root: Path) -> str | None:
    """Return how the first CPU's clock is governed: the power mode of a machine without a GPU."""
    path = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
