"""The machines that vzip knows: one table of facts, and what follows from them.

``vzip targets`` prints the table. ``--target NAME`` at export takes opset and precision from it
where the command line says nothing, and refuses what the machine can't do, with the reason; it
never changes what the user said. ``vzip plan`` predicts from what a machine could do at best.

Sources: SM, JetPack, TensorRT versions and the memory of Jetsons from NVIDIA's JetPack and module
pages, TensorRT's and TensorRT-RTX's support matrices and release notes (collected 2026-11); memory
and ceilings from NVIDIA's data sheets of the product, unless something else stands beside the row.
What is marked [E] is an estimate of ours that no hardware has confirmed.

All ceilings are dense; data sheets like to print those with structured sparsity, twice as high.
FP16 is with sums in FP32, as BF16 is wherever the device has it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.wording import counted

# What an export can make today; the others are known so that a refusal can give the true reason.
Exported = Literal["fp32", "fp16"]
EXPORTED: Final[tuple[Exported, ...]] = ("fp32", "fp16")

# The smallest SM with hardware for a precision: FP16 and INT8 tensor cores since Turing, BF16 since
# Ampere, FP8 since Ada (TensorRT's support matrix).
SMALLEST_SM: Final[Mapping[str, int]] = MappingProxyType(
    {"fp32": 0, "fp16": 75, "int8": 75, "bf16": 80, "fp8": 89}
)

# TensorRT 8.6 reads ONNX up to opset 17, 10.x reads 20 and above.
OPSET_OF_8: Final = 17
NEWEST_OPSET: Final = 18

# [E] of CLIP ViT-L/14-336, the largest tower with an alias: 0.31 G parameters, and per image the
# largest tensors alive at once, attention not fused (two of 16 · 577 · 577, four of 577 · 4096).
WEIGHTS_MIB: Final[Mapping[str, int]] = {"fp32": 1200, "fp16": 600}
IMAGE_MIB: Final[Mapping[str, int]] = {"fp32": 80, "fp16": 40}


@dataclass(frozen=True)
class Software:
    """One TensorRT that a target may have.

    Attributes:
        version: TensorRT's version, such as ``10.3``; a trailing ``+`` means this one or later.
        source: Where it comes from: ``JetPack 6.2``, ``TensorRT`` or ``RTX`` (TensorRT-RTX).
    """

    version: str
    source: str

    @property
    def newest_opset(self) -> Literal[17, 18]:
        """The newest ONNX opset that it reads, as far as exports go."""
        legacy = self.source != "RTX" and self.version.startswith("8.")
        return OPSET_OF_8 if legacy else NEWEST_OPSET


HERE: Final = "here"
"""The machine that the command runs on: its CPU, measured at the call (`vzip.export.plan.here`)."""

# [E] What the system of a Jetson and its desktop, and CUDA's own libraries, keep of the memory that
# CPU and GPU share; and on a card what CUDA's context, activations and fragmentation take of it.
_SYSTEM_GB: Final = 2.0
_CARD_SHARE: Final = 0.9


@dataclass(frozen=True)
class Device:
    """One size of a machine, and its ceilings.

    Attributes:
        name: What `vzip plan` calls it.
        title: What its maker calls it, with what decides about its figures.
        memory_gb: Gigabytes (10⁹ bytes), as its maker counts them.
        tflops: Precision → 10¹² operations a second, a multiply-add counted as two: ``fp32``,
            ``fp16`` (on a CPU ``bf16``) and, where it is known, ``int8``.
        bandwidth_gb: Of its memory, 10⁹ bytes a second.
        source: Where the figures are from, for whoever reads a plan.
        target: The `Target` that it is one of, by name; None for a CPU.
        shared: Whether CPU and GPU share its memory.
        note: What one should know of this size.
    """

    name: str
    title: str
    memory_gb: float
    tflops: Mapping[str, float]
    bandwidth_gb: float
    source: str = "data sheet"
    target: str | None = None
    shared: bool = False
    note: str = ""

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
    name: str, title: str, memory_gb: int, bandwidth_gb: float,
    *, fp32: float, fp16: float, int8: float,
) -> Device:  # fmt: skip
    tflops = {"fp32": fp32, "fp16": fp16, "int8": int8}
    return Device(name, title, memory_gb, tflops, bandwidth_gb)


def _orin(
    name: str, title: str, memory_gb: int, bandwidth_gb: float,
    *, cores: int, ghz: float, note: str = "",
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
        name, title, memory_gb,
        {**tflops, "int8": round(int8, 1)}, bandwidth_gb,
        "data sheet; fp16 from int8 [E]", note=note,
    )  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    Attributes:
        name: What stands behind ``--target``.
        gpu: What NVIDIA calls it.
        sm: Compute capabilities as ``87`` for 8.7, ascending; several where the name covers
            several GPUs.
        memory_gb: The sizes it is sold with, ascending, as its maker counts them.
        shared: Whether GPU and CPU share that memory, as on every Jetson.
        software: The TensorRT versions it may have, oldest first.
        batch: Recommended largest batch [E]: above it, latency grows and throughput hardly does.
        workspace_mib: Recommended builder workspace [E].
        note: What one should know.
        devices: The sizes of it whose ceilings are known.
    """

    name: str
    gpu: str
    sm: tuple[int, ...]
    memory_gb: tuple[int, ...]
    shared: bool
    software: tuple[Software, ...]
    batch: int
    workspace_mib: int
    note: str = ""
    devices: tuple[Device, ...] = ()

    def __post_init__(self) -> None:
        assert {each.memory_gb for each in self.devices} <= {*self.memory_gb}, self.name
        assert self.sm, self.name
        assert self.sm == tuple(sorted(self.sm)), self.name
        assert self.memory_gb, self.name
        assert self.memory_gb == tuple(sorted(self.memory_gb)), self.name
        assert self.software, self.name
        assert self.batch <= self.largest_batch("fp16"), self.name

    @property
    def opset(self) -> Literal[17, 18]:
        """The newest opset that every TensorRT it may have reads."""
        return min(software.newest_opset for software in self.software)

    @property
    def precision(self) -> Exported:
        """The precision to export in unless the user says otherwise: tensor cores want FP16."""
        return "fp16"

    @property
    def hardware_precisions(self) -> tuple[str, ...]:
        """Precisions that its smallest SM computes in hardware."""
        return tuple(name for name, least in SMALLEST_SM.items() if self.sm[0] >= least)

    def refusal(self, precision: str) -> str | None:
        """Return why the target can't compute in `precision`; None if it can."""
        least = SMALLEST_SM[precision]
        if self.sm[0] >= least:
            return None
        return (
            f"{self.gpu} is SM {dotted(self.sm[0])} and {precision.upper()} needs SM "
            f"{dotted(least)} or newer"
        )

    def largest_batch(self, precision: str, memory_gb: int | None = None) -> int:
        """Return the most images that fit beside the weights [E].

        Args:
            precision: ``fp32`` or ``fp16``.
            memory_gb: Of which size; None for the largest it is sold with. Half of it is taken
                where CPU and GPU share it, for the system and the LLM want the rest.
        """
        memory = (self.memory_gb[-1] if memory_gb is None else memory_gb) * 1000**3 / 2**20
        usable = memory / 2 if self.shared else memory * 0.9
        return max(0, math.floor((usable - WEIGHTS_MIB[precision]) / IMAGE_MIB[precision]))


def dotted(sm: int) -> str:
    """Return 87 as ``8.7`` and 120 as ``12.0``."""
    return f"{sm // 10}.{sm % 10}"


# JetPack 5.1 (TensorRT 8.5.2) is left out on purpose: it has no LayerNormalization operator and no
# fused attention on Orin, so no graph of ours is right there.
_ORIN: Final = (
    Software("8.6.2", "JetPack 6.0"),
    Software("10.3", "JetPack 6.1, 6.2"),
    Software("10.16", "JetPack 7.2"),
)
# TensorRT 8.6 serves SM 7.5 to 9.0 on x86-64, 10.x everything here. TensorRT 11.1's CMake builds
# for SM 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0, and with CUDA 13 for 11.0; not for Orin's 8.7, which
# 11 serves in the package of JetPack 7.2.2 alone.
_DATACENTER: Final = (Software("8.6", "TensorRT"), Software("10+", "TensorRT"))
# 10.8 is the first with Blackwell (its release notes; B200 was early access there).
_BLACKWELL: Final = (Software("10.8+", "TensorRT"),)
_RTX: Final = Software("1.7", "RTX")

_WITH_8_GB: Final = "build with swap and without the desktop (docs/jetson.md)"
_SUPER: Final = "MAXN SUPER of JetPack 6.2"

# Orin Nano, NX and AGX Orin series data sheets: CUDA cores, memory; the clocks and bandwidths of
# the Super modes from "JetPack 6.2 brings Super Mode" (NVIDIA, January 2025). 67, 34 and 170 sparse
# INT8 TOPS of the GPU are what the data sheets print. GeForce: founders' editions, NVIDIA's
# architecture white papers (GA102, Ada, RTX Blackwell), FP16 with FP32 sums; with FP16 sums it is
# twice as high.
_ALL: Final = (
    Target(
        "orin-nano", "Jetson Orin Nano", (87,), (4, 8), True, _ORIN, 4, 512, "",
        (
            _orin("orin-nano", f"Jetson Orin Nano 8 GB, {_SUPER}", 8, 102, cores=1024, ghz=1.02,
                  note=_WITH_8_GB),
            _orin("orin-nano-4gb", f"Jetson Orin Nano 4 GB, {_SUPER}", 4, 51, cores=512, ghz=1.02,
                  note="build with --low-memory and swap (docs/jetson.md)"),
        ),
    ),
    Target(
        "orin-nx", "Jetson Orin NX", (87,), (8, 16), True, _ORIN, 8, 1024,
        "",
        (
            _orin("orin-nx", f"Jetson Orin NX 16 GB, {_SUPER}", 16, 102.4, cores=1024, ghz=1.173),
            _orin("orin-nx-8gb", f"Jetson Orin NX 8 GB, {_SUPER}", 8, 102.4, cores=1024, ghz=1.173,
                  note=_WITH_8_GB),
        ),
    ),
    Target(
        "agx-orin", "Jetson AGX Orin", (87,), (32, 64), True,
        (*_ORIN, Software("11.4", "JetPack 7.2.2+")), 16, 2048, "",
        (
            _orin("agx-orin", "Jetson AGX Orin 64 GB, MAXN", 64, 204.8, cores=2048, ghz=1.3),
            _orin("agx-orin-32gb", "Jetson AGX Orin 32 GB, MAXN", 32, 204.8, cores=1792, ghz=0.93),
        ),
    ),
    Target(
        "thor", "Jetson Thor", (110,), (64, 128), True,
        (
            Software("10.13.3", "JetPack 7.0, 7.1"),
            Software("10.16", "JetPack 7.2"),
            Software("11.4", "JetPack 7.2.2+"),
        ),
        32, 4096,
        "10.13.3 miscompiles batch 1: take JetPack 7.2",
        # Jetson Thor series data sheet: 2070 and 1200 sparse FP4 TFLOPS, 273 GB/s; cores and clock
        # 2560 · 1.57 GHz and 1536 · 1.53 GHz. FP16 is an eighth of sparse FP4, INT8 twice that [E].
        (
            Device("thor", "Jetson Thor T5000, MAXN", 128,
                   {"fp32": 8.0, "fp16": 258.8, "int8": 517.5}, 273,
                   "data sheet; fp16 and int8 from fp4 [E]"),
            Device("thor-64gb", "Jetson Thor T4000, MAXN", 64,
                   {"fp32": 4.7, "fp16": 150.0, "int8": 300.0}, 273,
                   "data sheet; fp16 and int8 from fp4 [E]"),
        ),
    ),
    Target("t4", "T4", (75,), (16,), False, (*_DATACENTER, _RTX), 8, 2048,
           "INT8 ViTs are often slower than FP16",
           (_card("t4", "T4", 16, 320, fp32=8.1, fp16=65, int8=130),)),
    # With sparsity 242 and 485.
    Target("l4", "L4", (89,), (24,), False, (*_DATACENTER, _RTX), 16, 4096, "",
           (_card("l4", "L4", 24, 300, fp32=30.3, fp16=121, int8=242.5),)),
    Target("a10", "A10", (86,), (24,), False, (*_DATACENTER, _RTX), 16, 4096, "",
           (_card("a10", "A10", 24, 600, fp32=31.2, fp16=125, int8=250),)),
    Target("a100", "A100", (80,), (40, 80), False, (*_DATACENTER, _RTX), 32, 8192,
           "INT8 ViTs are often slower than FP16",
           (_card("a100", "A100 80 GB SXM", 80, 2039, fp32=19.5, fp16=312, int8=624),
            _card("a100-40gb", "A100 40 GB", 40, 1555, fp32=19.5, fp16=312, int8=624))),
    # SXM 67, with sparsity 1979 and 3958, 3.35 TB/s; NVL 60, 1671 and 3341, 3.9 TB/s.
    Target("h100", "H100", (90,), (80, 94), False, _DATACENTER, 64, 8192, "",
           (_card("h100", "H100 SXM 80 GB", 80, 3350, fp32=67, fp16=989.5, int8=1979),
            _card("h100-94gb", "H100 NVL 94 GB", 94, 3900, fp32=60, fp16=835.5, int8=1670.5))),
    # SXM: with sparsity 1979 and 3958.
    Target("h200", "H200", (90,), (141,), False, _DATACENTER, 64, 8192, "",
           (_card("h200", "H200 SXM", 141, 4800, fp32=67, fp16=989.5, int8=1979),)),
    # DGX B200, an eighth of it: with sparsity 36 and 72 P, FP32 600 T; 1440 GB at 64 TB/s.
    Target("b200", "B200", (100,), (180,), False, _BLACKWELL, 64, 8192, "",
           (_card("b200", "B200", 180, 8000, fp32=75, fp16=2250, int8=4500),)),
    Target("rtx", "GeForce RTX 30 to 50", (86, 89, 120), (8, 12, 16, 24, 32), False,
           (_RTX, *_BLACKWELL), 8, 2048,
           "one bundle for all three; rtx30, rtx40, rtx50 for one"),
    Target("rtx30", "GeForce RTX 30", (86,), (8, 12, 24), False, (*_DATACENTER, _RTX), 8, 2048, "",
           (_card("rtx3090", "GeForce RTX 3090", 24, 936, fp32=35.6, fp16=71, int8=284),)),
    Target("rtx40", "GeForce RTX 40", (89,), (8, 12, 16, 24), False, (*_DATACENTER, _RTX), 8, 2048,
           "",
           (_card("rtx4090", "GeForce RTX 4090", 24, 1008, fp32=82.6, fp16=165.2, int8=660.6),)),
    Target("rtx50", "GeForce RTX 50", (120,), (8, 12, 16, 24, 32), False, (*_BLACKWELL, _RTX), 8,
           2048, "TensorRT through 10.16.1 miscompiles fused attention (#4837)",
           (_card("rtx5090", "GeForce RTX 5090", 32, 1792, fp32=104.8, fp16=209.5, int8=838),)),
)  # fmt: skip

TARGETS: Final[Mapping[str, Target]] = MappingProxyType({each.name: each for each in _ALL})

DEVICES: Final[Mapping[str, Device]] = MappingProxyType(
    {
        each.name: replace(each, target=target.name, shared=target.shared)
        for target in _ALL
        for each in target.devices
    }
)


@dataclass(frozen=True)
class TargetChoice:
    """What an export is made with.

    Attributes:
        opset: 17 or 18.
        precision: ``fp32`` or ``fp16``.
        notes: Lines to tell the user: what was taken from the target, what to mind.
    """

    opset: Literal[17, 18]
    precision: Exported
    notes: tuple[str, ...] = ()


def resolve(
    name: str | None, *, opset: Literal[17, 18] | None, precision: str | None, batch: int
) -> TargetChoice:
    """Return opset and precision of an export: what the user said, else the target's, else ours.

    Args:
        name: A name of the table; None for no target.
        opset: As the user said, or None.
        precision: As the user said, or None.
        batch: The batch, or the largest one of an open batch axis.

    Raises:
        InvalidInputError: There is no such target, it can't do what was said, or the precision is
            none that vzip exports.
    """
    target = None if name is None else find(name)
    if target is not None and precision is not None and precision in SMALLEST_SM:
        _refuse_precision(target, precision)
    asked = next((each for each in EXPORTED if each == precision), None)
    if precision is not None and asked is None:
        raise InvalidInputError(
            f"--dtype is {precision!r}",
            expected=f"{' or '.join(EXPORTED)}",
            cause="an export has no other dtype",
        )
    if target is None:
        return TargetChoice(opset or NEWEST_OPSET, asked or "fp32")
    chosen = TargetChoice(opset or target.opset, asked or target.precision)
    _refuse_batch(target, chosen.precision, batch)
    return TargetChoice(chosen.opset, chosen.precision, tuple(_notes(target, chosen, batch)))


def find(name: str) -> Target:
    """Return the target called `name`.

    Raises:
        InvalidInputError: There is none; the message lists what there is.
    """
    if name not in TARGETS:
        raise InvalidInputError(
            f"--target is {name!r}",
            expected=f"one of {', '.join(TARGETS)}",
            cure="'vzip targets' says what they are",
        )
    return TARGETS[name]


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
    raise InvalidInputError(
        f"--target is {name!r}",
        expected=f"one of {', '.join((*DEVICES, HERE))}",
        cause=f"did you mean {' or '.join(close)}?" if close else "",
        cure=f"'{HERE}' measures this machine's CPU",
    )


def _refuse_precision(target: Target, precision: str) -> None:
    if reason := target.refusal(precision):
        usable = " or ".join(p for p in EXPORTED if p in target.hardware_precisions)
        raise InvalidInputError(
            f"--dtype {precision} and --target {target.name} contradict each other",
            cause=reason,
            cure=f"take --dtype {usable}",
        )


def _refuse_batch(target: Target, precision: str, batch: int) -> None:
    most = target.largest_batch(precision)
    if batch > most:
        raise InvalidInputError(
            f"a batch of {batch} and --target {target.name} contradict each other",
            cause=f"about {WEIGHTS_MIB[precision]} MiB of weights and {IMAGE_MIB[precision]} MiB "
            f"an image in {precision} (estimates for a ViT-L) fill {_share(target)} its "
            f"{target.memory_gb[-1]} GB at {counted(most, 'image')}",
            cure=f"take at most {most}, or leave out --target",
        )


def _share(target: Target) -> str:
    return "the half that the system leaves of" if target.shared else "90 % of"


def _notes(target: Target, chosen: TargetChoice, batch: int) -> list[str]:
    notes = [f"target {target.name}: opset {chosen.opset}, {chosen.precision}"]
    too_old = [each for each in target.software if each.newest_opset < chosen.opset]
    if too_old:
        versions = ", ".join(f"{each.version} ({each.source})" for each in too_old)
        notes.append(f"opset {chosen.opset} is too new for TensorRT {versions}; 17 suits all")
    small = [gb for gb in target.memory_gb if target.largest_batch(chosen.precision, gb) < batch]
    if small:
        sizes = " or ".join(map(str, small))
        notes.append(f"a batch of {batch} will hardly fit the one with {sizes} GB (estimate)")
    elif batch > target.batch:
        notes.append(f"a batch above {target.batch} hardly raises its throughput (estimate)")
    return notes


def table() -> str:
    """Return the table, at most 100 columns wide, with its legend."""
    head = ("target", "SM", "memory GB", "opset", "hardware precisions", "batch", "workspace")
    rows = [head, *map(_row, TARGETS.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    right = {3, 5, 6}
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += ["", "TensorRT that it may have (JetPack: TensorRT), and what to mind:"]
    name_width = max(map(len, TARGETS))
    for target in TARGETS.values():
        lines.append(f"  {target.name:<{name_width}}  {_software(target)}")
        notes = [f"{each.memory_gb:g} GB: {each.note}" for each in target.devices if each.note]
        for note in filter(None, (target.note, *notes)):
            lines.append(f"  {'':<{name_width}}    {note}")
    return "\n".join([*lines, "", *_LEGEND])


_LEGEND: Final = (
    "opset: what --target exports with, the newest that every TensorRT of the target reads.",
    "precisions: what the hardware can do. An export with --target is fp16 unless --dtype says",
    "fp32; 'vzip calibrate' makes int8 and fp8.",
    "batch (recommended / largest that fits) and workspace (MiB): estimates for CLIP ViT-L/14-336",
    "in FP16 that no hardware has confirmed.",
)


def _row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        ", ".join(map(dotted, target.sm)),
        "/".join(map(str, target.memory_gb)) + (" shared" if target.shared else ""),
        str(target.opset),
        " ".join(target.hardware_precisions),
        f"{target.batch} / {target.largest_batch('fp16')}",
        str(target.workspace_mib),
    )


def _software(target: Target) -> str:
    jetpacks = [each for each in target.software if each.source.startswith("JetPack ")]
    if jetpacks:
        parts = (f"{each.source.removeprefix('JetPack ')}: {each.version}" for each in jetpacks)
        return "JetPack " + " · ".join(parts)
    return " · ".join(
        f"TensorRT-RTX {each.version}" if each.source == "RTX" else f"TensorRT {each.version}"
        for each in target.software
    )
