"""What a GPU or a Jetson could do at best: a table of published figures for `vzip plan`.

All figures are dense; data sheets like to print those with structured sparsity, twice as high. FP16
is with sums in FP32, as BF16 is wherever the device has it. Names begin with those of
`vzip.export.targets`, whose memory sizes they are. What is marked [E] is an estimate of ours.

Sources, each beside its row: NVIDIA's data sheets of the product unless something else is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from vzip.export.targets import TARGETS
from vzip.runtime.errors import InvalidInputError

HERE: Final = "here"
"""The machine that the command runs on: its CPU, measured at the call (`vzip.export.plan.here`)."""

# [E] What the system of a Jetson and its desktop, and CUDA's own libraries, keep of the memory that
# CPU and GPU share; and on a card what CUDA's context, activations and fragmentation take of it.
_SYSTEM_GB: Final = 2.0
_CARD_SHARE: Final = 0.9


@dataclass(frozen=True)
class Device:
    """One device's ceilings.

    Attributes:
        name: What stands behind ``--device``.
        title: What its maker calls it, with what decides about its figures.
        target: Its name in `vzip.export.targets`; None for a CPU.
        memory_gb: Gigabytes (10⁹ bytes), as its maker counts them.
        shared: Whether CPU and GPU share them.
        tflops: Precision → 10¹² operations a second, a multiply-add counted as two: ``fp32``,
            ``fp16`` (on a CPU ``bf16``) and, where it is known, ``int8``.
        bandwidth_gb: Of its memory, 10⁹ bytes a second.
        source: Where the figures are from, for whoever reads a plan.
    """

    name: str
    title: str
    target: str | None
    memory_gb: float
    shared: bool
    tflops: Mapping[str, float]
    bandwidth_gb: float
    source: str = "data sheet"

    @property
    def half(self) -> str:
        """The precision of 16 bits that it is good at."""
        return "fp16" if "fp16" in self.tflops else "bf16"

    @property
    def usable_gb(self) -> float:
        """What a model may take of its memory [E]."""
        if self.shared:
            return max(0.0, self.memory_gb - _SYSTEM_GB)
        return self.memory_gb * _CARD_SHARE


def _card(
    name: str, title: str, target: str, memory_gb: int, bandwidth_gb: float,
    *, fp32: float, fp16: float, int8: float,
) -> Device:  # fmt: skip
    tflops = MappingProxyType({"fp32": fp32, "fp16": fp16, "int8": int8})
    return Device(name, title, target, memory_gb, False, tflops, bandwidth_gb)


def _orin(
    name: str, title: str, target: str, memory_gb: int, bandwidth_gb: float,
    *, cores: int, ghz: float,
) -> Device:  # fmt: skip
    """Return a module with an Orin from the cores and the clock of its GPU.

    A core does one multiply-add a clock in FP32. There is one tensor core to 32 of them, and one
    does 512 multiply-adds a clock in INT8, so that cores and clock give the sparse INT8 figure of
    the data sheets' GPU. The DLAs, where there are any, do nothing here. FP16 is half of INT8, as
    on every GPU of that generation [E]: NVIDIA prints no such figure for modules.
    """
    int8 = cores / 32 * 512 * 2 * ghz / 1000
    tflops = {"fp32": round(cores * 2 * ghz / 1000, 2), "fp16": round(int8 / 2, 1)}
    return Device(
        name, title, target, memory_gb, True,
        MappingProxyType({**tflops, "int8": round(int8, 1)}), bandwidth_gb,
        "data sheet; fp16 from int8 [E]",
    )  # fmt: skip


_SUPER: Final = "MAXN SUPER of JetPack 6.2"

_ALL: Final = (
    # Jetson Orin Nano, Orin NX and AGX Orin series data sheets: CUDA cores, memory; the clocks and
    # bandwidths of the Super modes from "JetPack 6.2 brings Super Mode" (NVIDIA, January 2025). 67,
    # 34 and 170 sparse INT8 TOPS of the GPU are what the data sheets print.
    _orin("orin-nano", f"Jetson Orin Nano 8 GB, {_SUPER}", "orin-nano", 8, 102,
          cores=1024, ghz=1.02),
    _orin("orin-nano-4gb", f"Jetson Orin Nano 4 GB, {_SUPER}", "orin-nano", 4, 51,
          cores=512, ghz=1.02),
    _orin("orin-nx", f"Jetson Orin NX 16 GB, {_SUPER}", "orin-nx", 16, 102.4,
          cores=1024, ghz=1.173),
    _orin("orin-nx-8gb", f"Jetson Orin NX 8 GB, {_SUPER}", "orin-nx", 8, 102.4,
          cores=1024, ghz=1.173),
    _orin("agx-orin", "Jetson AGX Orin 64 GB, MAXN", "agx-orin", 64, 204.8,
          cores=2048, ghz=1.3),
    _orin("agx-orin-32gb", "Jetson AGX Orin 32 GB, MAXN", "agx-orin", 32, 204.8,
          cores=1792, ghz=0.93),
    # Jetson Thor series data sheet: 2070 and 1200 sparse FP4 TFLOPS, 273 GB/s; cores and clock
    # 2560 · 1.57 GHz and 1536 · 1.53 GHz. FP16 is an eighth of sparse FP4, INT8 twice that [E].
    Device("thor", "Jetson Thor T5000, MAXN", "thor", 128, True,
           MappingProxyType({"fp32": 8.0, "fp16": 258.8, "int8": 517.5}), 273,
           "data sheet; fp16 and int8 from fp4 [E]"),
    Device("thor-64gb", "Jetson Thor T4000, MAXN", "thor", 64, True,
           MappingProxyType({"fp32": 4.7, "fp16": 150.0, "int8": 300.0}), 273,
           "data sheet; fp16 and int8 from fp4 [E]"),
    # T4: 8.1, 65 and 130; 16 GB at 320 GB/s.
    _card("t4", "T4", "t4", 16, 320, fp32=8.1, fp16=65, int8=130),
    # L4: 30.3; with sparsity 242 and 485; 24 GB at 300 GB/s.
    _card("l4", "L4", "l4", 24, 300, fp32=30.3, fp16=121, int8=242.5),
    # A10: 31.2, 125, 250; 24 GB at 600 GB/s.
    _card("a10", "A10", "a10", 24, 600, fp32=31.2, fp16=125, int8=250),
    # A100: 19.5, 312, 624; 80 GB SXM at 2039 GB/s, 40 GB at 1555 GB/s.
    _card("a100", "A100 80 GB SXM", "a100", 80, 2039, fp32=19.5, fp16=312, int8=624),
    _card("a100-40gb", "A100 40 GB", "a100", 40, 1555, fp32=19.5, fp16=312, int8=624),
    # H100: SXM 67, with sparsity 1979 and 3958, 3.35 TB/s; NVL 60, 1671 and 3341, 3.9 TB/s.
    _card("h100", "H100 SXM 80 GB", "h100", 80, 3350, fp32=67, fp16=989.5, int8=1979),
    _card("h100-94gb", "H100 NVL 94 GB", "h100", 94, 3900, fp32=60, fp16=835.5, int8=1670.5),
    # H200 SXM: 67, with sparsity 1979 and 3958; 141 GB at 4.8 TB/s.
    _card("h200", "H200 SXM", "h200", 141, 4800, fp32=67, fp16=989.5, int8=1979),
    # DGX B200, an eighth of it: with sparsity 36 and 72 P, FP32 600 T; 1440 GB at 64 TB/s.
    _card("b200", "B200", "b200", 180, 8000, fp32=75, fp16=2250, int8=4500),
    # GeForce, founders' editions: NVIDIA's architecture white papers (GA102, Ada, RTX Blackwell),
    # FP16 with FP32 sums; with FP16 sums it is twice as high.
    _card("rtx3090", "GeForce RTX 3090", "rtx30", 24, 936, fp32=35.6, fp16=71, int8=284),
    _card("rtx4090", "GeForce RTX 4090", "rtx40", 24, 1008, fp32=82.6, fp16=165.2, int8=660.6),
    _card("rtx5090", "GeForce RTX 5090", "rtx50", 32, 1792, fp32=104.8, fp16=209.5, int8=838),
)  # fmt: skip

DEVICES: Final[Mapping[str, Device]] = MappingProxyType({each.name: each for each in _ALL})


def find_device(name: str) -> Device:
    """Return the device called `name`, which isn't `HERE`.

    Raises:
        InvalidInputError: There is none; the message lists what there is.
    """
    if name in DEVICES:
        return DEVICES[name]
    of_target = [each.name for each in DEVICES.values() if each.target == name]
    close = of_target or difflib.get_close_matches(name.lower(), (*DEVICES, HERE), n=1)
    if name in TARGETS and not of_target:  # "rtx", which is any of three generations
        close = [each.name for each in DEVICES.values() if str(each.target).startswith(name)]
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    raise InvalidInputError(
        f"--device is {name!r}",
        expected=f"one of {', '.join((*DEVICES, HERE))}",
        cause=f"{meant}'{HERE}' measures this machine's CPU",
    )
