"""`vzip inspect`: what a bundle's graph consists of, and what TensorRT made of it in an engine."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from vzip.export.engines.tensorrt.api import load_stack
from vzip.export.engines.tensorrt.layers import EngineLayers, inspect_engine
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.bundle.engine_record import EngineRecord
from vzip.runtime.bundle.manifest import Manifest, Scalar
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
    missing,
)

if TYPE_CHECKING:
    import onnx

_MIB: Final = 2**20
_NAMES: Final = {1: "FP32", 2: "UINT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16"}
_BYTES: Final = {1: 4, 2: 1, 6: 4, 7: 8, 9: 1, 10: 2}
_WORK: Final = ("MatMul", "Conv")

Shapes = Mapping[str, tuple[int, tuple[int, ...]]]


def describe_graph(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield lines about a bundle's graph.

    Work is counted for one image: two operations for each multiply-add of matrix products and the
    convolution, nothing for the rest.

    Raises:
        BundleError: The bundle is damaged.
        MissingDependencyError: The package onnx is not installed.
    """
    bundle = read_bundle(path, verify=False)  # `read_model` verifies
    model = _load(bundle)
    yield from _about(bundle.manifest)
    graph = model.graph
    batch = 1 if bundle.manifest.batch.dynamic else bundle.manifest.batch.max
    shapes = _shapes(graph)
    operators = Counter(node.op_type for node in graph.node)
    yield f"operators: {len(graph.node)}: {_counts(operators)}"
    yield "values: " + _counts(Counter(_dtype(shapes, o) for n in graph.node for o in n.output))
    yield from _weights(graph)
    work: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in _WORK:
            work[_dtype(shapes, node.output[0])] += _operations(node, shapes) // batch
    shown = ", ".join(f"{count / 1e9:.3g} GFLOP in {kind}" for kind, count in work.most_common())
    yield f"work per image: {sum(work.values()) / 1e9:.4g} GFLOP (estimate): {shown}"
    yield f"attention: {_attention(graph)} times MatMul → Softmax → MatMul, the form that is fused"
    if bundle.manifest.precision == "fp16":
        islands = [node for node in graph.node if _dtype(shapes, node.output[0]) == "FP32"]
        names = _counts(Counter(node.op_type for node in islands))
        yield f"FP32 islands: {len(islands)} operators: {names}"
    largest = max(shapes, key=lambda name: math.prod(shapes[name][1]) * _BYTES[shapes[name][0]])
    kind, shape = shapes[largest]
    size = math.prod(shape) * _BYTES[kind] / _MIB
    yield f"largest value: {largest} {_NAMES[kind]} {list(shape)}, {size:.1f} MiB at batch {batch}"
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
            expected=(
                f"one of {', '.join(bundle.manifest.engines) or 'none: build one with vzip build'}"
            ),
        )
    record = bundle.manifest.engines[name]
    plan = read_engine(bundle, name)
    yield f"engine: {name}: {record.bytes / _MIB:.1f} MiB, SHA-256 {record.sha256[:12]}…, whole"
    yield from _record(record)
    try:
        layers = inspect_engine(load_stack(record.stack), plan)
    except (BackendError, MissingDependencyError) as error:
        yield f"layers: can't be listed here: {error}"
        return
    yield from _layers(layers)


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


def _load(bundle: Bundle) -> onnx.ModelProto:
    try:
        import onnx
    except ImportError as error:
        raise missing("onnx", needed_for="'vzip inspect' of a graph", extra="export") from error
    data = bundle.read_model()
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own error, of several packages
        raise BundleError(
            f"{bundle.path}: model.onnx can't be parsed ({error})",
            cure="export the bundle again",
        ) from error


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return element type and shape of every value; an open batch counts as 1."""
    shapes = {value.name: (value.data_type, tuple(value.dims)) for value in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        extents = (d.dim_value if d.HasField("dim_value") else 1 for d in tensor.shape.dim)
        shapes.setdefault(value.name, (tensor.elem_type, tuple(extents)))
    return shapes


def _dtype(shapes: Shapes, name: str) -> str:
    kind = shapes.get(name, (0, ()))[0]
    return _NAMES.get(kind, "unknown")


def _operations(node: Any, shapes: Shapes) -> int:
    """Return the floating-point operations of a MatMul or Conv; 0 where a shape is unknown."""
    if any(name not in shapes for name in (*node.input[:2], node.output[0])):
        return 0
    result = math.prod(shapes[node.output[0]][1])
    if node.op_type == "MatMul":
        return 2 * result * shapes[node.input[0]][1][-1]
    return 2 * result * math.prod(shapes[node.input[1]][1][1:])  # a kernel [D, C, h, w]


def _weights(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the line about weights: what they take, by element type."""
    sizes: Counter[str] = Counter()
    for value in graph.initializer:
        size = math.prod(value.dims) * _BYTES.get(value.data_type, 0)
        sizes[_NAMES.get(value.data_type, "unknown")] += size
    shown = ", ".join(f"{size / _MIB:.2f} MiB {kind}" for kind, size in sizes.most_common())
    total = sum(sizes.values()) / _MIB
    yield f"weights: {total:.1f} MiB in {len(graph.initializer)} tensors: {shown}"


def _attention(graph: onnx.GraphProto) -> int:
    """Count the Softmax that follow a MatMul and feed one other MatMul alone."""
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    count = 0
    for node in graph.node:
        if node.op_type == "Softmax" and makers[node.input[0]].op_type == "MatMul":
            after = users.get(node.output[0], [])
            count += [each.op_type for each in after] == ["MatMul"]
    return count


def _engines(bundle: Bundle) -> Iterator[str]:
    if not bundle.manifest.engines:
        yield "engines: none; 'vzip build' makes one"
    for name, record in bundle.manifest.engines.items():
        where = record.gpu or "ahead of time"
        yield (
            f"engine {name}: {record.stack} {record.version}, {where}, "
            f"SM {', '.join(record.sm)}, {_verdict(record)}"
        )


def _record(record: EngineRecord) -> Iterator[str]:
    yield f"built with: {record.stack} {record.version} in {record.seconds} s"
    machine = record.gpu or "no GPU, ahead of time"
    jetpack = "" if record.jetpack is None else f", JetPack {record.jetpack}"
    yield f"built on: {machine}; for SM {', '.join(record.sm)}{jetpack}"
    batch = record.batch
    yield f"precision: {record.precision}; batch {batch.min} to {batch.max}, tuned for {batch.opt}"
    yield f"settings: {_flat(record.settings)}"
    fused = record.fused_attention
    yield f"fused attention: {'not looked at' if fused is None else f'{fused} layers'}"
    yield f"proof: {_verdict(record)}"
    if record.proof is not None:
        yield f"proof numbers: {_flat(record.proof)}"


def _layers(layers: EngineLayers) -> Iterator[str]:
    yield f"layers: {len(layers.layers)}: {_counts(layers.kinds())}"
    yield f"first outputs: {_counts(layers.precisions())}"
    yield f"fused attention: {layers.fused_attention} layers"
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
