"""What this machine is and has: one record, for ``vzip doctor`` and beside every measured number.

Nothing here imports a package that isn't the runtime's own, and every question has a time limit, so
the record can be had on a machine where half of it is broken.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from vzip.runtime.console import progress
from vzip.runtime.machine import probes, sensors

IMPORT_LIMIT_S: Final = 90.0  # a first `import torch` from a Jetson's SD card takes half a minute
COMMAND_LIMIT_S: Final = 10.0

# Distribution names; their versions are read without importing them.
PACKAGES: Final = (
    "vzip", "numpy", "pillow", "transformers", "onnx", "onnxscript", "safetensors", "polygraphy",
)  # fmt: skip

_SMI_FIELDS: Final = (
    "name", "driver_version", "memory.total", "memory.used", "power.draw", "temperature.gpu",
    "utilization.gpu", "clocks.sm", "clocks.mem", "persistence_mode", "power.limit",
)  # fmt: skip

Record = dict[str, Any]


def environment(root: Path = sensors.ROOT, *, folder: Path | None = None) -> Record:
    """Return everything that is known about this machine, as JSON has it.

    Args:
        root: Of the file system that sensors are read from.
        folder: Whose disk is looked at; None for the working directory.

    Returns:
        Keys ``python``, ``platform``, ``packages``, ``jetson``, ``memory_mib``, ``disk``, ``state``
        and one for each of `probes.PROBES`. A value is None where there is nothing of the kind.
    """
    return {
        "python": _python(),
        "platform": _platform(root),
        "packages": {name: _version(name) for name in PACKAGES},
        "jetson": _jetson(root),
        "memory_mib": _fields(sensors.memory(root)),
        "disk": _disk(folder or Path()),
        **{name: _probe(name) for name in progress(probes.PROBES, desc="looking")},
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
        "nvidia_smi": nvidia_smi(),
        "memory_available_mib": None if memory is None else memory.available,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def nvidia_smi() -> list[dict[str, str]] | None:
    """Return what nvidia-smi says of each GPU; None where it is absent or fails."""
    text = ask("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader")
    if text is None:
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    return [
        dict(zip(_SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(_SMI_FIELDS)
    ]


def ask(*command: str, limit_s: float = COMMAND_LIMIT_S) -> str | None:
    """Return what a command prints; None if it is absent, fails, or takes longer than the limit."""
    program = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        return None
    done = _run([program, *command[1:]], limit_s)
    return done.stdout if done is not None and done.returncode == 0 else None


def _run(
    command: Sequence[str], limit_s: float, **environment: str
) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None if it can't be started or takes too long."""
    try:
        return subprocess.run(  # noqa: S603  commands of this file, no shell
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit_s,
            env={**os.environ, "LC_ALL": "C", **environment},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _probe(name: str, limit_s: float = IMPORT_LIMIT_S) -> Record | None:
    """Ask one probe in a child process; None for a package that is not installed."""
    # The child is to see the packages that this process sees, and no folder it happens to be in.
    path = os.pathsep.join(filter(None, sys.path))
    done = _run([sys.executable, str(Path(probes.__file__)), name], limit_s, PYTHONPATH=path)
    if done is None:
        return {"error": f"no answer within {limit_s:.0f} s"}
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {"error": _death(done)}
    return None if found.get("absent") else dict(found)


def _death(done: subprocess.CompletedProcess[str]) -> str:
    """Say how a child ended that gave no answer."""
    if done.returncode < 0:
        try:
            how = signal.Signals(-done.returncode).name
        except ValueError:
            how = f"signal {-done.returncode}"
        return f"importing it crashes the interpreter ({how})"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"importing it ends the interpreter with status {done.returncode} ({last})"


def _python() -> Record:
    settings = Path(sys.prefix) / "pyvenv.cfg"
    virtual = sys.prefix != sys.base_prefix
    try:
        text = settings.read_text(encoding="utf-8") if virtual else ""
    except OSError:
        text = ""
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "virtual_environment": virtual,
        "system_site_packages": not virtual
        or re.search(r"include-system-site-packages\s*=\s*true", text, re.IGNORECASE) is not None,
    }


def _platform(root: Path) -> Record:
    return {
        "system": platform.system(),
        "distribution": _distribution(root),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": sensors.processor(root),
        "cores": os.cpu_count(),
    }


def _distribution(root: Path) -> str | None:
    try:
        text = (root / "etc/os-release").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', text, re.MULTILINE)
    return match[1] if match else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _jetson(root: Path) -> Record | None:
    found = sensors.jetson(root)
    if found is None:
        return None
    package = ask("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack")
    return {
        **dataclasses.asdict(found),
        "nvidia_jetpack_package": (package or "").strip() or None,
        "power_mode": power_mode(),
        "system_tensorrt": [str(path) for path in _system_tensorrt(root)],
    }


def power_mode() -> str | None:
    """Return the name of a Jetson's power mode; None where ``nvpmodel`` doesn't say."""
    mode = ask("nvpmodel", "-q")  # its first line names the mode, its second numbers it
    match = re.search(r"NV Power Mode:\s*(\S+)", mode or "")
    return match[1] if match else None


def _system_tensorrt(root: Path) -> list[Path]:
    """Return where JetPack's Python bindings of TensorRT lie."""
    return sorted((root / "usr/lib").glob("python3*/dist-packages/tensorrt"))


def _disk(folder: Path) -> Record | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return {"folder": str(folder.absolute()), "free_gb": round(usage.free / 1e9, 1)}


def _fields(memory: sensors.Memory | None) -> Record | None:
    return None if memory is None else dataclasses.asdict(memory)


def gpus() -> list[Record] | str:
    """Return the GPUs that CUDA can use here, or why there is none."""
    driver = _probe("driver") or {}
    return driver.get("gpus") or str(driver.get("error", "the driver lists none"))
