"""What other programs say of this machine; each has a time limit, and may be absent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

LIMIT_S: Final = 10.0

_SMI_FIELDS: Final = (
    "name", "driver_version", "memory.total", "memory.used", "power.draw", "temperature.gpu",
    "utilization.gpu", "clocks.sm", "clocks.mem", "persistence_mode", "power.limit",
)  # fmt: skip


def run(
    command: Sequence[str], limit_s: float, **environment: str
) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None if it can't be started or takes too long."""
    try:
        return subprocess.run(  # noqa: S603  commands of ours, no shell
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


def ask(*command: str, limit_s: float = LIMIT_S) -> str | None:
    """Return what a command prints; None if it is absent, fails, or takes longer than the limit."""
    program = shutil.which(command[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        return None
    done = run([program, *command[1:]], limit_s)
    return done.stdout if done is not None and done.returncode == 0 else None


def nvidia_smi() -> list[dict[str, str]] | None:
    """Return what nvidia-smi says of each GPU; None where it is absent or fails."""
    text = ask("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader")
    if text is None:
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    return [
        dict(zip(_SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(_SMI_FIELDS)
    ]


def power_mode() -> str | None:
    """Return the name of a Jetson's power mode; None where ``nvpmodel`` doesn't say."""
    mode = ask("nvpmodel", "-q")  # its first line names the mode, its second numbers it
    match = re.search(r"NV Power Mode:\s*(\S+)", mode or "")
    return match[1] if match else None


def jetpack_package() -> str | None:
    """Return the version of the package ``nvidia-jetpack``; None where it isn't installed."""
    return (
        ask("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack") or ""
    ).strip() or None
