"""How much memory a build will need, said before it starts: estimates, and marked as such.

On a Jetson the GPU takes its memory from the same pool as everything else, and a build that runs
out of it ends the process (or the desktop) after minutes. The numbers here are estimates that no
Jetson has confirmed: the share of the weights comes from TensorRT-RTX 1.7, which held 3.2 times the
weights of an FP16 ViT-L at its peak when it built without a GPU, plus one copy for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vzip.runtime.errors import BackendError
from vzip.runtime.manifest import DATA_FILE, MODEL_FILE, Manifest

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
        weights: Copies of the weights.
        workspace: Scratch memory of the tactics.
        libraries: Interpreter, libraries, CUDA context.
    """

    weights: int
    workspace: int
    libraries: int

    @property
    def total(self) -> int:
        """The sum, in MiB."""
        return self.weights + self.workspace + self.libraries

    def __str__(self) -> str:
        return (
            f"about {self.total} MiB (estimate: weights {self.weights}, workspace "
            f"{self.workspace}, libraries {self.libraries})"
        )


def estimate(
    manifest: Manifest, *, workspace_mib: int | None, low_memory: bool, gpu: bool
) -> Estimate:
    """Return what building an engine of a bundle will need.

    Args:
        manifest: Of the bundle; the sizes of its files are what counts.
        workspace_mib: Limit for tactics; None for the builder's own.
        low_memory: Whether cuBLAS and cuDNN are left out.
        gpu: Whether it is built on a GPU; ahead of time nothing runs on one.
    """
    stored = sum(
        entry.bytes for name, entry in manifest.files.items() if name in (MODEL_FILE, DATA_FILE)
    )
    if not gpu:
        return Estimate(round(stored * COPIES_ON_HOST / MIB), 0, INTERPRETER_MIB)
    return Estimate(
        weights=round(stored * (COPIES_ON_HOST + COPIES_ON_GPU) / MIB),
        workspace=DEFAULT_WORKSPACE_MIB if workspace_mib is None else workspace_mib,
        libraries=FEWER_LIBRARIES_MIB if low_memory else LIBRARIES_MIB,
    )


def compare(
    needed: Estimate, available_mib: int | None, *, low_memory: bool, precision: str
) -> str:
    """Return the line that says what a build needs and what there is.

    Args:
        needed: The estimate.
        available_mib: MemAvailable; None where the system doesn't say.
        low_memory: Whether the build was asked to be careful, so that it refuses what can't fit.
        precision: Of the bundle.

    Raises:
        BackendError: In low-memory mode, when it can't fit.
    """
    if available_mib is None:
        return f"memory: the build needs {needed}; this system doesn't say how much is free"
    line = f"memory: the build needs {needed}, {available_mib} MiB are available"
    if needed.total <= available_mib:
        return line
    smaller = "export with --precision fp16 (half the weights), " if precision == "fp32" else ""
    cure = f"{smaller}stop the desktop and other programs, add swap, or set a smaller --workspace"
    if low_memory:
        raise BackendError(
            f"{line}: it can't fit and was not started; {cure}, or build on a module of the same "
            "kind with more memory (same SM and TensorRT) and copy the bundle"
        )
    return f"{line}: it may run out of memory; try --low-memory, or {cure}"
