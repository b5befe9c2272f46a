"""`vzip inspect`: what a bundle's graph consists of, and what it became in an engine."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from vzip.export.engines.tensorrt.api import load_bindings
from vzip.export.engines.tensorrt.layers import EngineLayers, inspect_engine
from vzip.export.graph.reading import read_graph
from vzip.runtime.backends import cpu_engine
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.bundle.engine_record import CpuTarget, EngineRecord
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BackendError, InvalidInputError, MissingDependencyError
from vzip.runtime.files.codec import Scalar
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    import onnx_ir as ir

_MIB: Final = 2**20
_NAMES: Final = {"FLOAT": "FP32", "FLOAT16": "FP16"}


def describe_graph(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield lines about a bundle's graph.

    Work is counted for one image: two operations for each multiply-add of matrix products and the
    convolution, nothing for the rest.

    Raises:
        BundleError: The bundle is damaged.
        MissingDependencyError: The package onnx is not installed.
    """
    bundle = read_bundle(path, verify=False)  # `read_graph` verifies
    graph = read_graph(bundle, "'vzip inspect' of a graph").graph
    yield from _about(bundle.manifest)
    batch = 1 if bundle.manifest.batch.dynamic else bundle.manifest.batch.max
    nodes = list(graph)
    made = [value for node in nodes for value in node.outputs]
    weights = list(graph.initializers.values())
    yield f"operators: {len(nodes)}: {_counts(Counter(node.op_type for node in nodes))}"
    yield f"values: {_counts(Counter(map(_dtype, made)))}"
    sizes: Counter[str] = Counter()
    for value in weights:
        sizes[_dtype(value)] += _bytes(value)
    shown = ", ".join(f"{size / _MIB:.2f} MiB {kind}" for kind, size in sizes.most_common())
    tensors = counted(len(weights), "tensor")
    yield f"weights: {sum(sizes.values()) / _MIB:.1f} MiB in {tensors}: {shown}"
    work: Counter[str] = Counter()
    for node in nodes:
        if operations := _operations(node):
            work[_dtype(node.outputs[0])] += operations // batch
    shown = ", ".join(f"{count / 1e9:.3g} GFLOP in {kind}" for kind, count in work.most_common())
    yield f"work per image: {sum(work.values()) / 1e9:.4g} GFLOP (estimate): {shown}"
    fusable = sum(map(_is_attention, nodes))
    yield f"attention: {counted(fusable, 'time')} MatMul → Softmax → MatMul, the form that is fused"
    if bundle.manifest.precision == "fp16":
        islands = [node for node in nodes if _dtype(node.outputs[0]) == "FP32"]
        names = _counts(Counter(node.op_type for node in islands))
        yield f"FP32 islands: {counted(len(islands), 'operator')}: {names}"
    largest = max((*weights, *graph.inputs, *made), key=_bytes)
    size = _bytes(largest) / _MIB
    shown = f"{largest.name} {_dtype(largest)} {list(_shape(largest))}, {size:.1f} MiB"
    yield f"largest value: {shown} at batch {batch}"
    yield from _engines(bundle)


def describe_engine(path: str | os.PathLike[str], name: str) -> Iterator[str]:
    """Yield lines about an engine: its record, and its layers where it can be loaded.

    Raises:
        InvalidInputError: The bundle has no engine of that name.
        BundleError: Bundle or engine are damaged.
    """
    bundle = read_bundle(path, verify=False)
    if name not in bundle.manifest.engines:
        raise InvalidInputError(
            f"{bundle.path} has no engine {name!r}",
            expected=f"one of {', '.join(bundle.manifest.engines)}"
            if bundle.manifest.engines
            else "an engine in the bundle",
            cure=f"build one with: vzip build {bundle.path}",
        )
    record = bundle.manifest.engines[name]
    if record.cpu is not None:
        yield from _cpu_engine(bundle, name, record, record.cpu)
        return
    plan = read_engine(bundle, name)
    yield f"engine: {name}: {record.bytes / _MIB:.1f} MiB, SHA-256 {record.sha256[:12]}…, whole"
    yield from _record(record)
    try:
        layers = inspect_engine(load_bindings(record.gpu_stack), plan)
    except (BackendError, MissingDependencyError) as error:
        yield f"layers: can't be listed here: {error}"
        return
    yield from _layers(layers)


def _cpu_engine(
    bundle: Bundle, name: str, record: EngineRecord, target: CpuTarget
) -> Iterator[str]:
    data = None if record.stack == "openvino" else cpu_engine.read_engine(bundle, name)
    if data is None:
        cpu_engine.check_engine(bundle, name)
    yield f"engine: {name}: {record.bytes / _MIB:.1f} MiB, SHA-256 {record.sha256[:12]}…, whole"
    yield f"made with: {cpu_engine.TITLES[record.stack]} {record.version} in {record.seconds} s"
    instructions = ", ".join(target.instructions)
    yield f"made on: {target.processor}, {counted(target.threads, 'core')}, with {instructions}"
    yield f"form: {target.form}, of the graph in {record.precision}"
    yield f"proof: {_verdict(record)}"
    if record.proof is not None:
        yield f"proof numbers: {_flat(record.proof)}"
    for form, numbers in target.measured.items():
        yield f"measured {form}: {_flat(numbers)}"
    if data is None:
        yield "operators: can't be listed: OpenVINO's file is its own"
        return
    try:
        import onnx
    except ImportError:
        yield "operators: can't be listed here, since the package onnx is not installed"
        return
    nodes = onnx.load_model_from_string(data).graph.node
    yield f"operators: {len(nodes)}: {_counts(Counter(node.op_type for node in nodes))}"


def _about(manifest: Manifest) -> Iterator[str]:
    model, selection = manifest.model, manifest.selection
    precision = f"{manifest.precision}, opset {manifest.opset}"
    yield f"model: {model.id}, {model.weights} weights, {precision}"
    yield (
        f"tokens: {manifest.tower.tokens} → {selection.tokens} = {selection.dominant} dominant + "
        f"{selection.contextual} contextual ({selection.merge}), selected by {selection.method}"
    )
    yield f"takes: {'; '.join(_takes(manifest))}"
    yield f"inputs: {', '.join(map(str, manifest.inputs))}"
    yield f"outputs: {', '.join(map(str, manifest.outputs))}"


def _takes(manifest: Manifest) -> Iterator[str]:
    yield ", ".join(manifest.media)
    tiling, pool = manifest.tiling, manifest.tower.pool
    if tiling is not None:
        count = len(tiling.pinpoints)
        yield f"tiles: {tiling.order}, {count} resolution{'' if count == 1 else 's'}"
    if pool != 1:
        yield f"pooled {pool}x{pool}"


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Return a value's shape; an open batch counts as 1."""
    return tuple(x if isinstance(x, int) else 1 for x in value.shape or ())


def _dtype(value: ir.Value) -> str:
    return "unknown" if value.dtype is None else _NAMES.get(value.dtype.name, value.dtype.name)


def _bytes(value: ir.Value) -> int:
    return 0 if value.dtype is None else math.ceil(math.prod(_shape(value)) * value.dtype.itemsize)


def _operations(node: ir.Node) -> int:
    """Return the floating-point operations of a MatMul or Conv; 0 of others, or without shapes."""
    first, second, *_ = (*node.inputs, None, None)
    if node.op_type not in {"MatMul", "Conv"} or first is None or second is None:
        return 0
    if not (first.shape and second.shape and node.outputs[0].shape):
        return 0
    result = math.prod(_shape(node.outputs[0]))
    if node.op_type == "MatMul":
        return 2 * result * _shape(first)[-1]
    return 2 * result * math.prod(_shape(second)[1:])  # a kernel [D, C, h, w]


def _is_attention(node: ir.Node) -> bool:
    """Whether a node is a Softmax that follows a MatMul and feeds one other MatMul alone."""
    if node.op_type != "Softmax" or node.inputs[0] is None:
        return False
    before = node.inputs[0].producer()
    after = [use.node.op_type for use in node.outputs[0].uses()]
    return before is not None and before.op_type == "MatMul" and after == ["MatMul"]


def _engines(bundle: Bundle) -> Iterator[str]:
    if not bundle.manifest.engines:
        yield "engines: none; 'vzip build' makes one"
    for name, record in bundle.manifest.engines.items():
        if record.cpu is not None:
            where = f"{record.cpu.processor}, form {record.cpu.form}"
        else:
            where = f"{record.gpu or 'ahead of time'}, SM {', '.join(record.sm)}"
        yield f"engine {name}: {record.stack} {record.version}, {where}, {_verdict(record)}"


def _record(record: EngineRecord) -> Iterator[str]:
    yield f"built with: {record.stack} {record.version} in {record.seconds} s"
    machine = record.gpu or "no GPU, ahead of time"
    jetpack = "" if record.jetpack is None else f", JetPack {record.jetpack}"
    yield f"built on: {machine}; for SM {', '.join(record.sm)}{jetpack}"
    batch = record.batch
    yield f"precision: {record.precision}; batch {batch.min} to {batch.max}, tuned for {batch.opt}"
    yield f"settings: {_flat(record.settings)}"
    fused = record.fused_attention
    yield f"fused attention: {'not told' if fused is None else counted(fused, 'layer')}"
    yield f"proof: {_verdict(record)}"
    if record.proof is not None:
        yield f"proof numbers: {_flat(record.proof)}"


def _layers(layers: EngineLayers) -> Iterator[str]:
    yield f"layers: {len(layers.layers)}: {_counts(layers.kinds())}"
    yield f"first outputs: {_counts(layers.precisions())}"
    if layers.opaque:
        yield f"fused attention: not told: {counted(layers.opaque, 'layer')} of many nodes each"
    else:
        yield f"fused attention: {counted(layers.fused_attention or 0, 'layer')}"
    if layers.int8:
        yield f"INT8: {counted(layers.int8, 'layer')}"
    if layers.memory is not None:
        yield f"scratch memory: {layers.memory / _MIB:.1f} MiB"
    for name, kind, dtype in layers.layers:
        yield "  " + "  ".join(part for part in (name, kind, dtype) if part)


def _verdict(record: EngineRecord) -> str:
    if record.proof is None:
        return "not proven"
    return "proven" if record.proof["passed"] else "failed its proof"


def _flat(values: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered)
