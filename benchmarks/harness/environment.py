"""What numbers depend on: the machine and the versions, stored beside every result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment(*packages: str) -> dict[str, Any]:
    """Return processor, cores, load before the measurement, Python's version and the packages'."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line for line in lines if "model name" in line]
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
