"""What a user asks `vzip build` for, and what that means for TensorRT's builder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vzip.export.engines.tensorrt import memory as build_memory
from vzip.export.engines.tensorrt.api import Bindings
from vzip.export.engines.tensorrt.build import BuildSettings
from vzip.runtime.bundle.engine_record import NAME
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.precision_record import Quantised
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine import sensors

LEVELS: Final = range(6)  # IBuilderConfig.builder_optimization_level, from 8.6 on
SAFER_LEVEL: Final = 0


@dataclass(frozen=True)
class BuildRequest:
    """What a user asked for.

    Attributes:
        name: The engine's name; None for one after TensorRT and the GPU.
        workspace_mib: Limit for the scratch memory of tactics; None for the builder's own.
        level: Builder optimisation level; None for the builder's own.
        opt_batch: The batch that tactics are chosen for; None for the largest.
        low_memory: Build with little memory, and refuse what can't fit.
        rtx: Compute capabilities to build for without a GPU, as the user wrote them.
        safer: After a failed proof, try the next safer way to build.
        precision: Of the graph to build from: ``int8`` or ``fp8``, or None for the bundle's own.
        log: File for all that TensorRT says; None for one in the bundle that stays if it fails.
    """

    name: str | None = None
    workspace_mib: int | None = None
    level: int | None = None
    opt_batch: int | None = None
    low_memory: bool = False
    rtx: str | None = None
    safer: bool = False
    precision: str | None = None
    log: Path | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.test(self.name):
            raise InvalidInputError(
                f"name (--name) is {self.name!r}",
                expected=f"{NAME.expected}, which a file can be called",
            )
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= 2**20:
            raise InvalidInputError(
                f"workspace_mib (--workspace) is {self.workspace_mib}",
                expected=f"MiB from 1 to {2**20}",
            )
        if self.level is not None and self.level not in LEVELS:
            raise InvalidInputError(
                f"builder_optimization_level (--builder-optimization-level) is {self.level}",
                expected="0 (quick) to 5 (searches longest)",
            )


@dataclass(frozen=True)
class BuildTarget:
    """What an engine is built for.

    Attributes:
        gpu: The GPU's name; None ahead of time.
        sm: Compute capabilities.
        jetpack: JetPack here; None where there is none, and ahead of time.
    """

    gpu: str | None
    sm: tuple[str, ...]
    jetpack: str | None


def this_machine() -> BuildTarget:
    """Return the GPU here.

    Raises:
        BackendError: There is none that works.
    """
    from vzip.runtime.backends.tensorrt import cuda

    device = cuda.load()
    jetson = sensors.jetson()
    return BuildTarget(
        device.device_name(),
        (device.compute_capability(),),
        None if jetson is None else jetson.jetpack,
    )


def first_settings(
    request: BuildRequest, manifest: Manifest, capabilities: tuple[str, ...]
) -> BuildSettings:
    """Return how to build what was asked for, for compute capabilities or for the GPU here.

    Raises:
        InvalidInputError: A batch that the graph doesn't take.
    """
    batch = manifest.batch
    opt = request.opt_batch
    if opt is not None and not (1 <= opt <= batch.max if batch.dynamic else opt == batch.max):
        takes = f"1 to {batch.max}" if batch.dynamic else f"exactly {batch.max}"
        raise InvalidInputError(
            f"opt_batch (--opt-batch) is {opt}",
            expected=takes,
            cause="the graph takes no other batch",
        )
    workspace, level = request.workspace_mib, request.level
    if request.low_memory:
        workspace = build_memory.LOW_MEMORY_WORKSPACE_MIB if workspace is None else workspace
        level = build_memory.LOW_MEMORY_LEVEL if level is None else level
    return BuildSettings(
        workspace_mib=workspace,
        level=level,
        low_memory=request.low_memory,
        opt_batch=batch.max if opt is None else opt,
        islands="graph",
        capabilities=capabilities,
    )


def safer_settings(
    first: BuildSettings,
    bindings: Bindings,
    manifest: Manifest,
    quantised: Quantised | None = None,
) -> list[BuildSettings]:
    """Return what to try after `first` failed, from what costs least speed to what costs most.

    Where precision is a matter of flags, more layers in FP32 and at last all. Where it lives in the
    graph, a level at which the builder rewrites and fuses less, and then FP32 sums of FP16 products
    too: the level changes no arithmetic.
    """
    if not bindings.can.strongly_typed and manifest.precision == "fp16":
        return [dataclasses.replace(first, islands=each) for each in ("norms", "all")]
    lowest = dataclasses.replace(first, level=SAFER_LEVEL)
    tries = [] if first.level == SAFER_LEVEL else [lowest]
    if manifest.precision == "fp16" and quantised is None:
        tries.append(dataclasses.replace(lowest, fp32_sums=True))
    return tries
