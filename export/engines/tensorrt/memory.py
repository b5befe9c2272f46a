"""How much memory a build will need, said before it starts: estimates, and marked as such.

On a Jetson the GPU takes its memory from the same pool as everything else, and a build that runs
out of it ends the process (or the desktop) after minutes. The numbers here are estimates that no
Jetson has confirmed: the share of the weights comes from TensorRT-RTX 1.7, which held 3.2 times the
weights of an FP16 ViT-L at its peak when it built without a GPU, plus one copy for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vzip.runtime.bundle.manifest import DATA_FILE, MODEL_FILE, Manifest
from vzip.runtime.bundle.precision_record import Quantised, data_file, graph_file
from vzip.runtime.machine import sensors

MIB: Final = 2**20

COPIES_ON_HOST: Final = 3.2
"""Copies of the weights at a build's peak: as parsed, as converted, serialized; see above."""

COPIES_ON_GPU: Final = 1.0
"""[E] Copies on the GPU while tactics are timed."""

INTERPRETER_MIB: Final = 450
"""Python, numpy and the builder's library without a GPU, measured with TensorRT-RTX 1.7."""

LIBRARIES_MIB: Final = 1000
"""[E] CUDA context, TensorRT's builder library and kernels, cuBLAS and cuDNN."""

FEWER_LIBRARIES_MIB: Final = 650
"""[E] The same without cuBLAS and cuDNN."""

DEFAULT_WORKSPACE_MIB: Final = 1024
"""[E] What tactics take while they are timed, where nobody sets a limit."""

LOW_MEMORY_WORKSPACE_MIB: Final = 256
LOW_MEMORY_LEVEL: Final = 2


@dataclass(frozen=True)
class Estimate:
    """What a build is estimated to need at its peak, in MiB.

    Attributes:
        on_host: Copies of the weights that the CPU holds, which can be swapped.
        on_gpu: Copies of the weights that the GPU holds, which can't.
        workspace: Scratch memory of the tactics.
        libraries: Interpreter, libraries, CUDA context.
    """

    on_host: int
    on_gpu: int
    workspace: int
    libraries: int

    @property
    def total(self) -> int:
        """The sum, in MiB."""
        return self.on_host + self.on_gpu + self.workspace + self.libraries

    def __str__(self) -> str:
        return (
            f"about {self.total} MiB (estimate: weights {self.on_host + self.on_gpu}, workspace "
            f"{self.workspace}, libraries {self.libraries})"
        )


def estimate(
    manifest: Manifest,
    *,
    workspace_mib: int | None,
    low_memory: bool,
    gpu: bool,
    quantised: Quantised | None = None,
) -> Estimate:
    """Return what building an engine of a bundle will need.

    Args:
        manifest: Of the bundle; the sizes of its files are what counts.
        workspace_mib: Limit for tactics; None for the builder's own.
        low_memory: Whether cuBLAS and cuDNN are left out.
        gpu: Whether it is built on a GPU; ahead of time nothing runs on one.
        quantised: Which of its quantised graphs is built from; None for its own.
    """
    own = (MODEL_FILE, DATA_FILE)
    names = own if quantised is None else (graph_file(quantised), data_file(quantised))
    stored = sum(entry.bytes for name, entry in manifest.files.items() if name in names)
    if not gpu:
        return Estimate(round(stored * COPIES_ON_HOST / MIB), 0, 0, INTERPRETER_MIB)
    return Estimate(
        on_host=round(stored * COPIES_ON_HOST / MIB),
        on_gpu=round(stored * COPIES_ON_GPU / MIB),
        workspace=DEFAULT_WORKSPACE_MIB if workspace_mib is None else workspace_mib,
        libraries=FEWER_LIBRARIES_MIB if low_memory else LIBRARIES_MIB,
    )


@dataclass(frozen=True)
class Outlook:
    """What a build needs beside what there is.

    Attributes:
        line: Says both.
        cure: What to do, since it can't fit; None if it fits, or nobody knows.
    """

    line: str
    cure: str | None


def compare(needed: Estimate, memory: sensors.Memory | None, *, precision: str) -> Outlook:
    """Set what a build needs beside what there is.

    Swap on a disk counts for the host's copies of the weights alone: nothing that the GPU holds can
    be swapped. zram doesn't count, since it takes its memory from what is available.

    Args:
        needed: The estimate.
        memory: The machine's; None where the system doesn't say.
        precision: Of the bundle.
    """
    if memory is None:
        said = f"memory: the build needs {needed}; this system doesn't say how much is free"
        return Outlook(said, None)
    line = f"memory: the build needs {needed}, {memory.available} MiB are available"
    swap = min(memory.disk_swap_free, needed.on_host)
    if memory.disk_swap_free:
        line += (
            f", and {memory.disk_swap_free} MiB of swap, which serve the host's copies of the "
            f"weights ({needed.on_host}) alone"
        )
    if needed.total <= memory.available + swap:
        return Outlook(line, None)
    smaller = "export with --dtype fp16 (half the weights), " if precision == "fp32" else ""
    more = "" if swap == needed.on_host else "add swap on a disk, "
    cure = f"{smaller}stop the desktop and other programs, {more}or set a smaller --workspace"
    return Outlook(line, cure)
