"""The record of this machine with all that only an import can say, for ``vzip doctor``.

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
from pathlib import Path
from typing import Final

from vzip.runtime.console import progress
from vzip.runtime.doctor import probes
from vzip.runtime.machine import commands, sensors
from vzip.runtime.machine.record import Record, machine

IMPORT_LIMIT_S: Final = 90.0  # a first `import torch` from a Jetson's SD card takes half a minute

# Distributions that commands need beside those of the machine's record.
PACKAGES: Final = ("onnx", "onnx-ir", "onnxscript", "safetensors", "polygraphy")


def environment(root: Path = sensors.ROOT, *, folder: Path | None = None) -> Record:
    """Return everything that is known about this machine, as JSON has it.

    Args:
        root: Of the file system that sensors are read from.
        folder: Whose disk is looked at; None for the working directory.

    Returns:
        The machine's record (`vzip.runtime.machine.record.machine`) and beside it
        ``distribution``, ``architecture``, ``interpreter``, ``memory`` (the fields of
        `sensors.Memory`), ``jetpack`` (a Jetson's software), ``disk`` and one for each of
        `probes.PROBES`. A value is None where there is nothing of the kind.
    """
    memory = sensors.memory(root)
    return {
        **machine(*PACKAGES, root=root),
        "distribution": sensors.distribution(root),
        "architecture": platform.machine(),
        "interpreter": _interpreter(),
        "memory": None if memory is None else dataclasses.asdict(memory),
        "jetpack": _jetpack(root),
        "disk": _disk(folder or Path()),
        **{name: _probe(name) for name in progress(probes.PROBES, desc="looking")},
    }


def _probe(name: str, limit_s: float = IMPORT_LIMIT_S) -> Record | None:
    """Ask one probe in a child process; None for a package that is not installed."""
    # The child is to see the packages that this process sees, and no folder it happens to be in.
    path = os.pathsep.join(filter(None, sys.path))
    done = commands.run(
        [sys.executable, str(Path(probes.__file__)), name], limit_s, PYTHONPATH=path
    )
    if done is None:
        return {"error": f"no answer within {limit_s:.0f} s"}
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {"error": _death(done, "starting" if name.endswith("_runtime") else "importing")}
    return None if found.get("absent") else dict(found)


def _death(done: subprocess.CompletedProcess[str], doing: str) -> str:
    """Say how a child ended that gave no answer."""
    if done.returncode < 0:
        try:
            how = signal.Signals(-done.returncode).name
        except ValueError:
            how = f"signal {-done.returncode}"
        return f"{doing} it crashes the interpreter ({how})"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{doing} it ends the interpreter with status {done.returncode} ({last})"


def _interpreter() -> Record:
    settings = Path(sys.prefix) / "pyvenv.cfg"
    virtual = sys.prefix != sys.base_prefix
    try:
        text = settings.read_text(encoding="utf-8") if virtual else ""
    except OSError:
        text = ""
    return {
        "executable": sys.executable,
        "virtual_environment": virtual,
        "system_site_packages": not virtual
        or re.search(r"include-system-site-packages\s*=\s*true", text, re.IGNORECASE) is not None,
    }


def _jetpack(root: Path) -> Record | None:
    found = sensors.jetson(root)
    if found is None:
        return None
    bindings = sorted((root / "usr/lib").glob("python3*/dist-packages/tensorrt"))
    return {
        "l4t": found.l4t,
        "jetpack": found.jetpack,
        "package": commands.jetpack_package(),
        "system_tensorrt": [str(path) for path in bindings],
    }


def _disk(folder: Path) -> Record | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return {"folder": str(folder.absolute()), "free_gb": round(usage.free / 1e9, 1)}


def gpus() -> list[Record] | str:
    """Return the GPUs that CUDA can use here, or why there is none."""
    driver = _probe("driver") or {}
    return driver.get("gpus") or str(driver.get("error", "the driver lists none"))
