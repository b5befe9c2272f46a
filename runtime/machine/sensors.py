"""What Linux tells about the machine through files: memory, power, temperature, load, clocks.

Read, never written, without root and without a package: on a Jetson this is where the numbers are
(its NVML answers "not supported" to most questions). Every function takes the root of the file
system, so that tests can show it a Jetson. A file that is absent or can't be read, as sensors of
units that are switched off can't, is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")

# The release of Jetson Linux (L4T) → JetPack. Major and minor decide; see `jetpack`.
_JETPACKS: Final = (
    ("35.", "5.1"), ("36.2", "6.0 DP"), ("36.3", "6.0"), ("36.4.0", "6.1"), ("36.4", "6.2"),
    ("36.5", "6.2.2"), ("38.2", "7.0"), ("38.4", "7.1"), ("39.2", "7.2"),
)  # fmt: skip

# The instructions that decide how fast a CPU multiplies, as /proc/cpuinfo names them.
# The GPU's name in devfreq: Xavier's and Orin's, by its address, and Thor's.
_TEGRA_GPUS: Final = {"17000000.gpu", "17000000.gv11b", "17000000.ga10b", "gpu-gpc-0"}

_INSTRUCTIONS: Final = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Memory in MiB, from /proc/meminfo and /proc/swaps.

    Attributes:
        total: What the kernel manages.
        available: What can be had without swapping (MemAvailable). On a Jetson this, not what
            cudaMemGetInfo says, is what an allocation on the GPU can get.
        swap_total: All swap areas.
        swap_free: Of these, unused.
        zram: Of `swap_total`, areas in compressed memory.
        cma_total: Contiguous memory set aside (``cma=``); None where the kernel doesn't say.
        cma_free: Of it, unused.
        disk_swap_free: Of `swap_free`, what isn't zram: room that takes nothing from `available`.
    """

    total: int
    available: int
    swap_total: int
    swap_free: int
    zram: int
    cma_total: int | None
    cma_free: int | None
    disk_swap_free: int


@dataclass(frozen=True)
class Clock:
    """One device of devfreq, or one CPU.

    Attributes:
        name: Such as ``17000000.gpu``, ``gpu-gpc-0`` or ``cpu0``.
        mhz: Now.
        lowest_mhz: The governor's lower limit; equal to `highest_mhz` when the clock is locked.
        highest_mhz: The governor's upper limit.
        load: Share of the time it was busy, 0 to 1; None where the driver doesn't say (Thor).
    """

    name: str
    mhz: float
    lowest_mhz: float
    highest_mhz: float
    load: float | None


@dataclass(frozen=True)
class Jetson:
    """What says that this is a Jetson, and which.

    Attributes:
        model: Of the device tree, such as ``NVIDIA Jetson Orin Nano Developer Kit``.
        l4t: Release of Jetson Linux, such as ``36.4.3``; None where the file is absent.
        jetpack: The JetPack with that release; None where vzip doesn't know it.
    """

    model: str
    l4t: str | None
    jetpack: str | None


def jetson(root: Path = ROOT) -> Jetson | None:
    """Return which Jetson this is; None on any other machine."""
    release = _read(root / "etc/nv_tegra_release")
    model = (_read(root / "proc/device-tree/model") or "").rstrip("\0")
    if release is None and "Jetson" not in model and not _is_tegra(root):
        return None
    match = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", release or "")
    l4t = f"{match[1]}.{match[2]}" if match else None
    return Jetson(model or "unknown", l4t, None if l4t is None else jetpack(l4t))


def _is_tegra(root: Path) -> bool:
    """Say whether the kernel is a Jetson's: all that a container sees of where it runs."""
    kernel = _read(root / "proc/sys/kernel/osrelease") or ""
    devices = {device.name for device in _entries(root / "sys/class/devfreq")}
    return "tegra" in kernel or bool(devices & _TEGRA_GPUS)


def jetpack(l4t: str) -> str | None:
    """Return the JetPack that brings a release of Jetson Linux; None for one not known."""
    for prefix, version in _JETPACKS:
        if l4t == prefix or l4t.startswith(prefix if prefix.endswith(".") else prefix + "."):
            return version
    return None


_DIGITS: Final = "[0-9]{1,18}"  # of a number that a kernel writes
_TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # in a second


def memory(root: Path = ROOT) -> Memory | None:
    """Return the machine's memory; None where there is no /proc/meminfo."""
    text = _read(root / "proc/meminfo")
    if text is None:
        return None
    kib = {name: int(value) for name, value in re.findall(rf"^(\w+):\s+({_DIGITS})\b", text, re.M)}
    zram = disk = 0
    for line in (_read(root / "proc/swaps") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) < 4 or not all(re.fullmatch(_DIGITS, each) for each in fields[2:4]):
            continue
        if "zram" in fields[0]:
            zram += int(fields[2])
        else:
            disk += int(fields[2]) - int(fields[3])
    total = kib.get("MemTotal", 0)
    return Memory(
        total=total // 1024,
        available=kib.get("MemAvailable", kib.get("MemFree", 0)) // 1024,
        swap_total=kib.get("SwapTotal", 0) // 1024,
        swap_free=kib.get("SwapFree", 0) // 1024,
        zram=zram // 1024,
        cma_total=kib["CmaTotal"] // 1024 if "CmaTotal" in kib else None,
        cma_free=kib["CmaFree"] // 1024 if "CmaFree" in kib else None,
        disk_swap_free=disk // 1024,
    )


def power(root: Path = ROOT) -> dict[str, float]:
    """Return watts by rail, from the INA monitors of a Jetson.

    INA3221 (kernel documentation, hwmon/ina3221): three channels, ``inN_label``, ``inN_input`` in
    mV, ``currN_input`` in mA; channels 4 and up are shunt voltages and sums. INA238, which measures
    a Thor's input, gives ``power1_input`` in µW. Rails: ``VDD_IN`` is the whole module of an Orin
    Nano or NX; on an AGX Orin ``VIN_SYS_5V0`` is only a part.
    """
    rails: dict[str, float] = {}
    for chip in _entries(root / "sys/class/hwmon"):
        kind = (_read(chip / "name") or "").strip()
        if not kind.startswith("ina"):
            continue
        for channel in (1, 2, 3):
            label = (_read(chip / f"in{channel}_label") or "").strip()
            if label == "NC":  # not connected
                continue
            watts = _channel_power(chip, channel)
            if watts is not None:
                rails[label or (kind if channel == 1 else f"{kind}.{channel}")] = round(watts, 3)
    return rails


def _channel_power(chip: Path, channel: int) -> float | None:
    microwatts = _number(chip / f"power{channel}_input")
    if microwatts is not None:
        return microwatts / 1e6
    millivolts = _number(chip / f"in{channel}_input")
    milliamperes = _number(chip / f"curr{channel}_input")
    if millivolts is None or milliamperes is None:
        return None
    return millivolts * milliamperes / 1e6


def temperatures(root: Path = ROOT) -> dict[str, float]:
    """Return °C by thermal zone, such as ``gpu-thermal`` and ``tj-thermal``."""
    zones = {}
    for zone in _entries(root / "sys/class/thermal", "thermal_zone*"):
        name = (_read(zone / "type") or zone.name).strip()
        millidegrees = _number(zone / "temp")
        if millidegrees is not None:
            zones[name] = millidegrees / 1000
    return zones


def gpu_clocks(root: Path = ROOT) -> list[Clock]:
    """Return the GPU's clocks, from devfreq: ``17000000.gpu`` on Orin, ``gpu-gpc-0`` on Thor."""
    clocks = []
    for device in _entries(root / "sys/class/devfreq"):
        if not re.search(r"gpu|ga10b|gv11b|gp10b", device.name):
            continue
        now, low, high = (_number(device / f"{which}_freq") for which in ("cur", "min", "max"))
        if now is None or low is None or high is None:
            continue
        permille = _number(device / "device/load")
        if permille is None:
            permille = _number(device / "load")
        load = None if permille is None else permille / 1000
        clocks.append(Clock(device.name, now / 1e6, low / 1e6, high / 1e6, load))
    return clocks


def cpu_clocks(root: Path = ROOT) -> list[Clock]:
    """Return the clocks of the CPUs that are on line."""
    clocks = []
    for cpu in _entries(root / "sys/devices/system/cpu", "cpu[0-9]*"):
        scaling = cpu / "cpufreq"
        now, low, high = (
            _number(scaling / f"scaling_{which}_freq") for which in ("cur", "min", "max")
        )
        if now is not None and low is not None and high is not None:
            clocks.append(Clock(cpu.name, now / 1e3, low / 1e3, high / 1e3, None))
    return clocks


def processor(root: Path = ROOT) -> str | None:
    """Return what /proc/cpuinfo calls the processor; ARM's kernels don't say."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo") or "", re.M)
    return match[1].strip() if match else None


def instructions(root: Path = ROOT) -> list[str]:
    """Return which vector instructions of those that matter here the processor has."""
    text = _read(root / "proc/cpuinfo") or ""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    there = set(match[1].split()) if match else set()
    return [name for name in _INSTRUCTIONS if name in there]


def busy_s(root: Path = ROOT) -> float | None:
    """Return for how many seconds the CPUs that this process may use were busy, since they started.

    Whoever kept them so, other machines on the same hardware included (``steal``). Of two readings
    the difference counts. None where there is no /proc/stat. Source: proc_stat(5).
    """
    text = _read(root / "proc/stat") or ""
    found = {
        int(name): [int(each) for each in times.split()]
        for name, times in re.findall(rf"^cpu({_DIGITS}) +((?:{_DIGITS} *)+)$", text, re.M)
    }
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(found)
    counted = [times for cpu, times in found.items() if cpu in own] or list(found.values())
    if not counted:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user and nice.
    return sum(sum(times[:8]) - sum(times[3:5]) for times in counted) / _TICKS


def cpu_s(pid: int, root: Path = ROOT) -> float | None:
    """Return the CPU's seconds that a process has had; None where it is gone or nothing says so."""
    fields = (_read(root / f"proc/{pid}/stat") or "").rpartition(")")[2].split()
    times = fields[11:15]  # of itself, in user mode and in the kernel; of children that ended
    if len(times) < 4 or not all(re.fullmatch(_DIGITS, each) for each in times):
        return None
    return sum(map(int, times)) / _TICKS


def governor(root: Path = ROOT) -> str | None:
    """Return how the first CPU's clock is governed: the power mode of a machine without a GPU."""
    text = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return None if text is None else text.strip()


def distribution(root: Path = ROOT) -> str | None:
    """Return what the distribution of Linux calls itself."""
    text = _read(root / "etc/os-release") or ""
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', text, re.MULTILINE)
    return match[1] if match else None


def _entries(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """Yield what lies in a folder, in order; nothing where it can't be read."""
    try:
        yield from sorted(folder.glob(pattern))
    except OSError:
        return


def _read(path: Path) -> str | None:
    """Return a file's text; None where it is absent or the driver refuses."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    """Return the integer that a file starts with (``306000000``, or ``45@306000000``)."""
    match = re.match(rf"\s*(-?{_DIGITS})(?![0-9])", _read(path) or "")
    return int(match[1]) if match else None
