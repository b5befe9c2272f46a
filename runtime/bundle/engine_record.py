"""The record of an engine in a bundle's manifest, checked when it is made.

An engine is for one GPU or processor, one version of one library and one graph. The record says
which, so that a reader can refuse an engine before a library reads a byte of it; it also says how
it was built and what its proof against PyTorch gave. `docs/bundle.md` specifies the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from vzip.runtime.bundle.precision_record import QUANTISED, Precision, Quantised
from vzip.runtime.files.codec import (
    OPTIONAL,
    Count,
    Index,
    Must,
    Record,
    Scalar,
    Sha256,
    Text,
    matching,
    within,
)

ENGINES_FOLDER: Final = "engines"
ENGINE_SUFFIX: Final = ".plan"
TIMING_CACHE: Final = "timing.cache"
LOG_SUFFIX: Final = ".log"
"""Of what TensorRT said in a build that failed."""
KERNEL_CACHE_SUFFIX: Final = ".rtxcache"
LARGEST_KERNEL_CACHE: Final = 2**28
LOCK_FILE: Final = ".lock"

STACKS: Final = ("tensorrt", "tensorrt_rtx")
"""Of the engines for GPUs."""
CPU_STACKS: Final = ("onnxruntime", "openvino")
"""Of the engines for CPUs."""

NAME: Final = matching(
    "[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
    "a name of letters, digits, '.', '_' and '-', at most 100",
)
"""What an engine may be called: its name is a part of a file's name."""

Size = Annotated[int, within(1, 2**16)]
Version = Annotated[
    str, matching(r"[0-9]{1,4}(\.[0-9]{1,5}){1,3}", "a version such as '10.3.0.30'")
]
Capability = Annotated[
    str, matching("[1-9][0-9]{1,2}", "a compute capability without the dot, such as '87'")
]


@dataclass(frozen=True)
class EngineBatch(Record):
    """The optimization profile of an engine: how many images one call takes.

    Attributes:
        min: The smallest number.
        opt: The number the engine is tuned for.
        max: The largest number.
    """

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opt < self.min:
            raise self.misfit("opt", f"at least the smallest number, {self.min}")
        if self.max < self.opt:
            raise self.misfit("max", f"at least the number it is tuned for, {self.opt}")


@dataclass(frozen=True)
class CpuTarget(Record):
    """The CPU that an engine was made on, and how its form was chosen there.

    Attributes:
        processor: Name of the processor.
        instructions: Its vector instructions, of those that matter to products.
        threads: Cores that the forms were timed on.
        form: Which form of the graph it is; `docs/fastest.md` says which there are.
        measured: Form → what was measured of it, or why it was refused.
    """

    processor: Text
    instructions: tuple[Text, ...]
    threads: Count
    form: Text
    measured: Mapping[Text, Mapping[Text, Scalar]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in self.measured:
            raise self.misfit("form", f"one of those measured: {', '.join(self.measured)}")


@dataclass(frozen=True)
class KernelCache(Record):
    """What TensorRT-RTX compiled for the GPU that an engine was proven on: ``NAME.rtxcache``.

    Attributes:
        sha256: Digest of the file.
        bytes: Size of the file.
    """

    sha256: Sha256
    bytes: Count


@dataclass(frozen=True)
class EngineRecord(Record):
    """What an engine is, and for what.

    Attributes:
        sha256: Digest of the engine's file.
        bytes: Size of the engine's file.
        stack: Python module that built it and that must run it.
        version: Version of that library, such as ``10.3.0.30``.
        gpu: Name of the GPU it was built on; None if it was built ahead of time, without one, or
            for a CPU.
        sm: Compute capabilities it runs on, such as ``87`` for 8.7; none for a CPU.
        jetpack: JetPack of the machine that built it; None where there is none.
        precision: Precision of the graph it was built from.
        batch: How many images one call takes.
        model_sha256: Digest of the graph it was built from: ``model.onnx``, or a quantised one.
        settings: Settings of the builder, by name.
        seconds: How long the build took.
        fused_attention: Layers of fused attention that the inspector confirmed; None if it can't
            tell.
        proof: Numbers of the comparison with PyTorch's tokens on the machine that built it, and its
            verdict ``passed``; None if it was not run there (ahead of time).
        cpu: The CPU that it is for; None for a GPU.
        kernels: Compiled kernels that lie beside it (TensorRT-RTX); None where there are none.
    """

    sha256: Sha256
    bytes: Count
    stack: Literal["tensorrt", "tensorrt_rtx", "onnxruntime", "openvino"]
    version: Version
    gpu: Text | None
    sm: tuple[Capability, ...]
    jetpack: Text | None
    precision: Precision
    batch: EngineBatch
    model_sha256: Sha256
    settings: Mapping[Text, Scalar]
    seconds: Annotated[float, Must(lambda value: value >= 0, "a number of at least 0")]
    fused_attention: Index | None
    proof: Mapping[Text, Scalar] | None
    cpu: CpuTarget | None = field(default=None, metadata=OPTIONAL)
    kernels: KernelCache | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        for_cpu = self.cpu is not None
        if for_cpu != (self.stack in CPU_STACKS):
            where = " or ".join(map(repr, CPU_STACKS))
            raise self.misfit("stack", f"{where} where there is 'cpu', else one for GPUs")
        if for_cpu == bool(self.sm):
            raise self.misfit("sm", f"{'no' if for_cpu else 'a list of'} compute capabilities")
        if self.proof is not None and type(self.proof.get("passed")) is not bool:
            raise self.misfit("proof", "the verdict 'passed', true or false, among its values")

    @property
    def gpu_stack(self) -> Literal["tensorrt", "tensorrt_rtx"]:
        """The stack of an engine that is for GPUs."""
        assert self.stack != "onnxruntime"
        assert self.stack != "openvino"
        return self.stack

    @property
    def quantised(self) -> Quantised | None:
        """Which of the bundle's quantised graphs it was built from; None for its own."""
        return next((each for each in QUANTISED if each == self.precision), None)
