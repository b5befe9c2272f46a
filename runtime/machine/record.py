"""The record of this machine: what it is, its state and the versions, beside every measured number.

No package is imported for it. `vzip.runtime.doctor.environment` adds what only an import can say.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from vzip.runtime.machine import commands, process, sensors

PACKAGES: Final = ("vzip", "numpy", "pillow", "onnxruntime", "openvino", "torch", "transformers")

_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Record = dict[str, Any]


def machine(*packages: str, root: Path = sensors.ROOT) -> Record:
    """Return the machine's record, as JSON has it.

    Args:
        packages: Distributions whose versions count beside those of `PACKAGES`.
        root: Of the file system that is read.

    Returns:
        ``processor``, ``cores`` (those that this process may use), ``instructions``,
        ``memory_mib``, ``system``, ``python``, ``packages`` (name → version, of those that are
        installed), ``jetson`` (its model; None elsewhere), ``power_mode`` (a Jetson's), ``cpu_mhz``
        and ``governor`` (None where the kernel doesn't say, as in most virtual machines),
        ``threads`` (variables of the environment that bound their number), ``graph_threads``
        (those that ONNX Runtime gets for a graph), ``cpu_quota`` (cores' time that control groups
        allow; None without a limit) and ``state``: see
        `state`; its ``load`` is that before the measurement.
    """
    memory, jetson = sensors.memory(root), sensors.jetson(root)
    return {
        "processor": processor(root),
        "cores": process.cores(root),
        "instructions": sensors.instructions(root),
        "memory_mib": None if memory is None else memory.total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions(*PACKAGES, *packages),
        "jetson": None if jetson is None else jetson.model,
        "power_mode": None if jetson is None else commands.power_mode(),
        "cpu_mhz": [round(clock.mhz) for clock in sensors.cpu_clocks(root)] or None,
        "governor": sensors.governor(root),
        "threads": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "graph_threads": process.threads(root),
        "cpu_quota": process.quota(root),
        "state": state(root),
    }


def state(root: Path = sensors.ROOT) -> Record:
    """Return what changes from second to second: power, temperatures, clocks, load, memory.

    Returns:
        ``power_w`` and ``temperature_c`` by name, ``gpu_clocks``, ``nvidia_smi`` (None where it
        can't be asked), ``memory_available_mib`` and ``load``, the average over a minute.
    """
    memory = sensors.memory(root)
    return {
        "power_w": sensors.power(root),
        "temperature_c": sensors.temperatures(root),
        "gpu_clocks": [dataclasses.asdict(clock) for clock in sensors.gpu_clocks(root)],
        "nvidia_smi": commands.nvidia_smi(),
        "memory_available_mib": None if memory is None else memory.available,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def processor(root: Path = sensors.ROOT) -> str:
    """Return the processor's name, or its architecture where the kernel has no name for it."""
    return sensors.processor(root) or platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those distributions that are installed, without importing them."""
    return {name: found for name in packages if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
