"""ONNX bytes in, serialized engine out: the calls of TensorRT's builder, whichever version it is.

Precision lives in the graph. Where networks can be strongly typed they are; TensorRT 8 has the FP16
flag alone, and there every layer that is FP32 in the graph (scores, selection and merging) is held
to FP32 by a constraint. TF32 is off always: the FP32 parts of a graph decide which tokens are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from vzip.export.engines.tensorrt.api import Bindings
from vzip.export.engines.tensorrt.progress import Progress
from vzip.runtime.backends.tensorrt.engine import not_started
from vzip.runtime.backends.tensorrt.engine_file import HEADER_BYTES, header_fault
from vzip.runtime.backends.tensorrt.logger import listening
from vzip.runtime.bundle.manifest import Manifest, Tensor
from vzip.runtime.bundle.precision_record import Quantised
from vzip.runtime.errors import BackendError, ExportError
from vzip.runtime.files.codec import Scalar
from vzip.runtime.machine import sensors
from vzip.runtime.wording import counted

# What a layer of a weakly typed network computes in, beyond what the graph says.
Islands = Literal["graph", "norms", "all"]

# Layers whose sums lose most in FP16; "norms" holds them to FP32 too.
_FRAGILE: Final = ("NORMALIZATION", "SOFTMAX", "REDUCE")
# Layers without arithmetic, whose types follow from elsewhere.
_UNTYPED: Final = ("CONSTANT", "SHAPE", "CAST", "IDENTITY")

_MOST_WARNINGS: Final = 1000

_DTYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "uint8": ("UINT8",),
    "float32": ("FLOAT",),
    "float16": ("HALF",),
    "int64": ("INT64", "INT32"),  # TensorRT 8 has no INT64 and shows such outputs as INT32
}


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        workspace_mib: Limit for the scratch memory of tactics; None for the builder's own.
        level: Builder optimisation level, 0 to 5; None for the builder's own (3).
        low_memory: Leave cuBLAS and cuDNN out.
        opt_batch: The batch that tactics are chosen for, where the batch is dynamic.
        islands: Which layers stay FP32 in a weakly typed FP16 build.
        capabilities: Compute capabilities to build for without a GPU; empty for the GPU here.
        fp32_sums: Whether the products of a strongly typed FP16 network are summed up in FP32.
    """

    workspace_mib: int | None
    level: int | None
    low_memory: bool
    opt_batch: int
    islands: Islands
    capabilities: tuple[str, ...]
    fp32_sums: bool = False

    def to_json(self, bindings: Bindings) -> dict[str, Scalar]:
        """Return the settings as the engine's record holds them; defaults are left out."""
        chosen: dict[str, Scalar] = {
            "typing": "strong" if bindings.can.strongly_typed else "weak",
            "low_memory": self.low_memory,
            "tf32": False,
        }
        if self.workspace_mib is not None:
            chosen["workspace_mib"] = self.workspace_mib
        if self.level is not None:
            chosen["optimization_level"] = self.level
        if not bindings.can.strongly_typed:
            chosen["fp32_layers"] = self.islands
        if self.fp32_sums:
            chosen["fp32_accumulators"] = True
        if self.capabilities:
            chosen["ahead_of_time"] = True
        if bindings.can.profile_sharing:
            chosen["profile_sharing"] = True
        if bindings.can.user_allocation:
            chosen["user_allocation"] = True
        return chosen


@dataclass(frozen=True)
class Built:
    """What a build gave.

    Attributes:
        plan: The serialized engine.
        timing_cache: The cache after the build; None where TensorRT has none.
        warnings: What should be said to whoever started the build, a line each.
    """

    plan: memoryview
    timing_cache: bytes | None
    warnings: tuple[str, ...]


def build(
    bindings: Bindings,
    model: bytes,
    path: Path,
    manifest: Manifest,
    *,
    settings: BuildSettings,
    timing_cache: bytes,
    quantised: Quantised | None = None,
) -> Built:
    """Build an engine.

    Args:
        bindings: The TensorRT to build with.
        model: The graph's bytes, already checked: these are parsed, not the file read again.
        path: A name for the graph, in the folder in which its external data lies.
        manifest: Of the bundle, for what the parsed network must look like.
        settings: How to build.
        timing_cache: Of an earlier build, or empty. One that is damaged or from another machine is
            ignored with a warning.
        quantised: Precision of the graph's linear layers, if it is not the bundle's own graph.

    Raises:
        ExportError: The parser doesn't take the graph, or the network differs from the manifest.
        BackendError: There is no GPU, or the builder failed; with the builder's own words.
        KeyboardInterrupt: The build was interrupted.
    """
    messages = _Messages()
    trt = bindings.module
    with listening(trt, messages.hear) as logger:
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # pybind: the factory returned nullptr
            raise not_started(trt, messages.first()) from error
        network = builder.create_network(_creation_flags(bindings))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model, str(path)):
            raise _not_taken(bindings, parser, messages, path)
        _check_network(bindings, network, manifest)
        if settings.fp32_sums:
            sum_in_fp32(bindings, network)
        config = builder.create_builder_config()
        _configure(bindings, network, config, manifest, settings)
        if quantised is not None and not bindings.can.strongly_typed:
            config.set_flag(bindings.module.BuilderFlag.INT8)  # without it 8.6 takes no Q and DQ
        if manifest.batch.dynamic:
            _add_profile(builder, config, manifest, settings.opt_batch)
        cache, warnings = _use_cache(bindings, config, messages, timing_cache)
        progress = Progress(lambda: logger.raised is not None)
        if bindings.can.progress_monitor:
            monitor = progress.monitor(trt)  # held by this name: TensorRT keeps a bare pointer
            config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        progress.reraise()
        if serialized is None:
            raise BackendError(
                f"{bindings} failed to build the engine{messages.because()}",
                cure=(
                    "if memory was short, use --low-memory or a smaller --workspace"
                    f"{_contiguous()}, otherwise report this line"
                ),
            )
        after = None
        if cache is not None and (kept := config.get_timing_cache()) is not None:
            after = bytes(kept.serialize())
        _check_header(bindings, memoryview(serialized))
        if (warned := messages.warned()) is not None:
            warnings.append(warned)
        # Not a copy: an engine is as large as the weights. The view keeps TensorRT's buffer alive.
        return Built(memoryview(serialized), after, tuple(warnings))


def _contiguous() -> str:
    """Return the cure for what only a Jetson has: contiguous memory that ran out."""
    if sensors.jetson() is None:
        return ""
    return (
        " (where it or dmesg says NvMap error 12, contiguous memory ran out: close what uses the "
        "GPU or camera, or add cma=512M to the APPEND line of /boot/extlinux/extlinux.conf and "
        "restart)"
    )


def _check_header(bindings: Bindings, plan: memoryview) -> None:
    """Refuse an engine that the runtime would refuse for its header, and say whose fault it is."""
    fault = header_fault(bytes(plan[:HEADER_BYTES]), bindings.name, bindings.version)
    if fault is not None:
        found, expected = fault
        raise BackendError(
            f"{bindings} built an engine that {found}",
            expected=expected,
            cause=(
                "vzip doesn't know the headers of this TensorRT's engines, and its runtime would "
                "refuse them. Nothing was published"
            ),
            cure="report this line, and build with another TensorRT meanwhile",
        )


@dataclass
class _Messages:
    """What TensorRT said, for the error that may follow."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    count: int = 0

    def hear(self, severity: str, message: str) -> None:
        """Keep errors and warnings, of which a builder may give thousands."""
        if severity in {"INTERNAL_ERROR", "ERROR"}:
            self.errors.append(message)
        elif severity == "WARNING":
            self.count += 1
            if len(self.warnings) < _MOST_WARNINGS:
                self.warnings.append(message)

    def first(self) -> str:
        """Return the first error, or the last warning without one: later errors follow from it."""
        said = self.errors or self.warnings[-1:]
        return " ".join(said[0].split()) if said else ""

    def because(self) -> str:
        """Return that as a part of our message."""
        said = self.first()
        return f" ({said})" if said else ""

    def warned(self) -> str | None:
        """Return one line about the warnings; None without any."""
        if not self.count:
            return None
        said = " ".join(self.warnings[0].split())
        return f"TensorRT gave {counted(self.count, 'warning')}, first: {said}"


def _creation_flags(bindings: Bindings) -> int:
    """Return the flags of a network: strongly typed where possible, explicit batch on 8."""
    creation = bindings.module.NetworkDefinitionCreationFlag
    flags = 0
    if bindings.can.strongly_typed_flag:
        flags |= 1 << int(creation.STRONGLY_TYPED)
    # The default from 10 on, where the flag may still be there.
    if bindings.can.explicit_batch_flag:
        flags |= 1 << int(creation.EXPLICIT_BATCH)
    return flags


def _not_taken(bindings: Bindings, parser: Any, messages: _Messages, path: Path) -> ExportError:
    """Return the error for a graph that the parser refused, in the parser's words."""
    # The parser's first error is the cause; what follows in the log is its echo.
    said = [_said(parser.get_error(place)) for place in range(parser.num_errors)][:1]
    said += [line for line in messages.errors if "open file" in line][:1]
    detail = "; ".join(" ".join(each.split()) for each in said)
    return ExportError(
        f"the parser of {bindings} doesn't take {path}: {detail or 'no reason given'}",
        cause="the graph is damaged, or of a newer opset than this TensorRT reads",
        cure="for TensorRT 8.6 make it with 'vzip export --opset 17'",
    )


def _said(error: Any) -> str:
    """Return what the parser says of an error, with its place where the parser tells it (10+)."""
    operator, name = (getattr(error, each, str)() for each in ("node_operator", "node_name"))
    return f"{operator} {name!r}: {error.desc()}" if operator else str(error.desc())


def _check_network(bindings: Bindings, network: Any, manifest: Manifest) -> None:
    """Refuse a network whose inputs and outputs aren't the manifest's: not every file is a graph.

    TensorRT's parser takes some files that hold no graph for an empty one.
    """
    trt = bindings.module

    def shown(tensor: Any) -> str:
        return f"{tensor.name} {_dtype_name(trt, tensor.dtype)} {list(tensor.shape)}"

    def fits(tensor: Any, expected: Tensor) -> bool:
        shape = tuple(-1 if extent == "batch" else extent for extent in expected.shape)
        dtype = _dtype_name(trt, tensor.dtype)
        same = (tensor.name, tuple(tensor.shape)) == (expected.name, shape)
        return same and dtype in _DTYPES[expected.dtype]

    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for found, expected in ((inputs, manifest.inputs), (outputs, manifest.outputs)):
        if len(found) != len(expected) or not all(
            any(fits(tensor, each) for tensor in found) for each in expected
        ):
            raise ExportError(
                f"the parser of {bindings} found {[shown(tensor) for tensor in found]}",
                expected=f"{[str(each) for each in expected]}",
                cause="graph and manifest disagree",
                cure="export the bundle again",
            )


def _dtype_name(trt: Any, dtype: Any) -> str:
    """Return the name of a DataType; its numbers differ between versions."""
    names = (name for name in ("UINT8", "FLOAT", "HALF", "INT64", "INT32", "BOOL", "INT8"))
    return next((name for name in names if getattr(trt.DataType, name, None) == dtype), str(dtype))


def _configure(
    bindings: Bindings, network: Any, config: Any, manifest: Manifest, settings: BuildSettings
) -> None:
    """Set everything that doesn't depend on the machine."""
    trt, flags = bindings.module, bindings.module.BuilderFlag
    if hasattr(flags, "TF32"):
        config.clear_flag(flags.TF32)
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if settings.low_memory and bindings.can.external_tactics:
        sources = config.get_tactic_sources()
        for name in bindings.can.external_tactics:
            sources &= ~(1 << int(getattr(trt.TacticSource, name)))
        config.set_tactic_sources(sources)
    # Layer names and precisions for `vzip inspect`; it costs kilobytes in the engine.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    weakly_fp16 = manifest.precision == "fp16" and not bindings.can.strongly_typed
    if weakly_fp16 and settings.islands != "all":
        config.set_flag(flags.FP16)
        if bindings.can.precision_constraints:
            config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        hold_fp32(bindings, network, settings.islands)
    if bindings.can.profile_sharing:
        # The runtime has a context for each batch size, as captured graphs demand.
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if bindings.can.user_allocation:
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    if bindings.can.ahead_of_time:
        # Otherwise the engine is for every GPU that TensorRT-RTX knows, and larger.
        names = [f"SM{each}" for each in settings.capabilities] or ["CURRENT"]
        config.num_compute_capabilities = len(names)
        for place, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), place)


def _add_profile(builder: Any, config: Any, manifest: Manifest, opt_batch: int) -> None:
    """Tell the builder which batches the engine is to take."""
    profile = builder.create_optimization_profile()
    image = manifest.input.shape[1:]
    shapes = [(batch, *image) for batch in (1, opt_batch, manifest.batch.max)]
    profile.set_shape(manifest.input.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(
            f"the builder doesn't take batches from 1 to {manifest.batch.max}",
            cure="build with a bundle of a smaller --max-batch",
        )


def hold_fp32(bindings: Bindings, network: Any, islands: Islands) -> int:
    """Constrain layers of a weakly typed network to FP32 and return how many.

    These are the layers that compute in FP32 in the graph: all their floating inputs and outputs
    are FP32. With "norms" those whose sums lose most in FP16 are constrained too.
    """
    trt = bindings.module
    single, half = trt.DataType.FLOAT, trt.DataType.HALF
    untyped = _layer_types(trt, _UNTYPED)
    fragile = _layer_types(trt, _FRAGILE) if islands == "norms" else ()
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in untyped:
            continue
        ins = [layer.get_input(place) for place in range(layer.num_inputs)]
        outs = [layer.get_output(place) for place in range(layer.num_outputs)]
        # An optional input may be absent.
        types = [tensor.dtype for tensor in (*ins, *outs) if tensor is not None]
        if single not in types and half not in types:
            continue
        if half not in types:
            layer.precision = single
            for place, tensor in enumerate(outs):
                if tensor is not None and tensor.dtype == single:
                    layer.set_output_type(place, single)
            count += 1
        elif layer.type in fragile:
            layer.precision = single  # its output stays what the graph says
            count += 1
    return count


def sum_in_fp32(bindings: Bindings, network: Any) -> int:
    """Put casts round every FP16 product of a strongly typed network and return how many there are.

    TensorRT may sum such a product up in FP16. Between casts it is FP32 by its types, which
    TensorRT fuses back to FP16 factors with an FP32 sum, as Torch-TensorRT does it
    (`use_fp32_acc`). Not tried on a GPU.
    """
    trt = bindings.module
    single, half = trt.DataType.FLOAT, trt.DataType.HALF
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for place in range(layer.num_inputs):
            if (tensor := layer.get_input(place)) is not None:
                readers.setdefault(tensor.name, []).append((layer, place))
    count = 0
    for layer in layers:
        if layer.type != trt.LayerType.MATRIX_MULTIPLY:
            continue
        factors = [layer.get_input(place) for place in range(layer.num_inputs)]
        if any(factor.dtype != half for factor in factors):
            continue
        for place, factor in enumerate(factors):
            layer.set_input(place, network.add_cast(factor, single).get_output(0))
        product = layer.get_output(0)
        back = network.add_cast(product, half).get_output(0)
        for reader, place in readers.get(product.name, ()):
            reader.set_input(place, back)
        count += 1
    return count


def _layer_types(trt: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    found = (getattr(trt.LayerType, name, None) for name in names)
    return tuple(each for each in found if each is not None)


def _use_cache(
    bindings: Bindings, config: Any, messages: _Messages, content: bytes
) -> tuple[Any, list[str]]:
    """Give the build a timing cache; one that is damaged or foreign is replaced by an empty one."""
    if not bindings.can.timing_cache:
        return None, []
    if bindings.can.editable_timing_cache:
        config.set_flag(bindings.module.BuilderFlag.EDITABLE_TIMING_CACHE)
    warnings = []
    before = len(messages.errors) + len(messages.warnings)
    # TensorRT answers a damaged cache with None, or with an empty one and a line in the log.
    cache = config.create_timing_cache(content)
    complained = bool(content) and len(messages.errors) + len(messages.warnings) > before
    attached = cache is not None and config.set_timing_cache(cache, False)
    if complained or not attached:
        reason = messages.because() if complained else ""
        warnings.append(
            "the timing cache is damaged, or from another GPU or TensorRT; it is ignored and "
            f"written anew, so this build takes as long as the first one{reason}"
        )
        messages.errors.clear()
        messages.warnings.clear()
        messages.count = 0
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache, warnings
