"""Explicit quantisation: QuantizeLinear and DequantizeLinear around linear layers alone.

Symmetric throughout: activations per tensor, weights per output channel, zero points 0, which is
what TensorRT takes. Weights are stored quantised. `onnxruntime.quantization` could place the nodes
too, but with every weight of the model in memory at once, with a pair of its own for each of q, k
and v, and without a way for FP16 graphs of opset 17 and 18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from vzip.calibration.quantization.graph import Graph, Linear
from vzip.calibration.quantization.recipe import QuantPrecision

Array = NDArray[Any]

# FP8 came with opset 19, and so did scales in FP16: before, an FP16 graph would need casts between
# its MatMuls and their scales, which keep TensorRT from fusing them.
OPSET_OF_SMALL_SCALES = 19
LARGEST: Mapping[QuantPrecision, float] = {"int8": 127.0, "fp8": 448.0}
_TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


@dataclass(frozen=True)
class Setting:
    """How one linear layer is quantised.

    Attributes:
        threshold: Magnitude at which its input is clipped, after smoothing.
        factors: float32 [in] powers of two that its input is divided by, in the LayerNorm; None
            for none.
    """

    threshold: float
    factors: NDArray[np.float32] | None


def opset_of(graph: Graph, precision: QuantPrecision) -> int:
    """Return the opset that the quantised graph has: the graph's own where that will do."""
    linear = graph.tensors[graph.linears()[0].weights[0]]
    if precision == "int8" and linear.data_type == onnx.TensorProto.FLOAT:
        return graph.opset
    return max(graph.opset, OPSET_OF_SMALL_SCALES)


def raise_opset(graph: Graph, opset: int) -> Graph:
    """Rewrite a graph of opset 17 or 18 for a later one.

    Of the operators that an exported graph may hold (`vzip.runtime.bundle.graph_check.EXPORTED`)
    one changed its form on the way to 19: ReduceMax takes its axes as an input since 18.
    """
    if opset == graph.opset:
        return graph
    tensors, nodes = dict(graph.tensors), []
    for node in graph.nodes:
        axes = [each for each in node.attribute if each.name == "axes"]
        if node.op_type == "ReduceMax" and axes:
            name = f"{node.output[0]}.axes"
            tensors[name] = numpy_helper.from_array(np.array(axes[0].ints, np.int64), name)
            changed = onnx.NodeProto()
            changed.CopyFrom(node)
            changed.attribute.remove(axes[0])
            changed.input.append(name)
            nodes.append(changed)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes), tensors=tensors, opset=opset)


def smoothed(graph: Graph, linear: Linear, factors: NDArray[np.float32]) -> Graph:
    """Divide a linear layer's input channels in its LayerNorm, and multiply its weights' rows.

    The graph computes what it did. Factors are powers of two.
    """
    assert linear.norm is not None
    tensors = dict(graph.tensors)
    for name in linear.norm:
        values = graph.array(name)
        tensors[name] = numpy_helper.from_array(values / factors.astype(values.dtype), name)
    for name in linear.weights:
        values = graph.array(name)
        scaled = values * factors.astype(values.dtype)[:, None]
        tensors[name] = numpy_helper.from_array(scaled, name)
    return replace(graph, tensors=tensors)


def quantised(
    graph: Graph, settings: Mapping[str, Setting], precision: QuantPrecision, opset: int
) -> Graph:
    """Quantise linear layers of a graph or of a piece of one.

    Args:
        graph: The graph.
        settings: Name of a linear layer → how; those that are not named stay as they are.
        precision: Of the quantised ones.
        opset: From `opset_of`.

    Returns:
        A graph with the same inputs and outputs.
    """
    graph = raise_opset(graph, opset)
    linears = [each for each in graph.linears() if each.name in settings]
    for linear in linears:
        setting = settings[linear.name]
        if setting.factors is not None:
            graph = smoothed(graph, linear, setting.factors)
        graph = _with_pairs(graph, linear, setting.threshold, precision)
    return graph


def _with_pairs(graph: Graph, linear: Linear, threshold: float, precision: QuantPrecision) -> Graph:
    """Quantise a linear layer's input and weights; q, k and v become one MatMul and a Split."""
    weights = [graph.array(name) for name in linear.weights]  # each [in, out]
    wide, stem = weights[0].dtype, linear.name
    array = np.concatenate(weights, axis=1)
    scales = _scale(np.abs(array).max(axis=0), precision, wide)  # [out]
    scale = _scale(np.array(threshold), precision, wide)
    tensors = {name: each for name, each in graph.tensors.items() if name not in linear.weights}

    def add(name: str, tensor: Any) -> str:
        tensor.name = name
        tensors[name] = tensor
        return name

    step = add(f"{stem}.input.scale", numpy_helper.from_array(scale))
    zero = add(f"{stem}.input.zero", _zeros((), precision))
    stored = [
        add(f"{stem}.weight.quantised", _quantise(array, scales, precision)),
        add(f"{stem}.weight.scale", numpy_helper.from_array(scales)),
        add(f"{stem}.weight.zero", _zeros(scales.shape, precision)),
    ]
    source, weight, product = f"{stem}.input", f"{stem}.weight", f"{stem}.product"
    nodes = [
        _node("QuantizeLinear", [linear.input, step, zero], [f"{source}.quantised"]),
        _node("DequantizeLinear", [f"{source}.quantised", step, zero], [source]),
        _node("DequantizeLinear", stored, [weight], axis=1),
        _node("MatMul", [source, weight], [product]),
    ]
    replaced, ends = _with_biases(graph, linear)
    if any(bias is not None for _, bias in ends):
        widths = [each.shape[1] for each in weights]
        biases = [
            np.zeros(width, wide) if bias is None else graph.array(bias)
            for width, (_, bias) in zip(widths, ends, strict=True)
        ]
        tensors = {name: each for name, each in tensors.items() if name not in {b for _, b in ends}}
        # [1, 1, out] adds what [out] does. A MatMul and a bias of one axis become a Gemm first in
        # ONNX Runtime, which then finds no integer MatMul for it.
        shaped = np.concatenate(biases)[None, None]
        bias_name = add(f"{stem}.bias", numpy_helper.from_array(shaped))
        nodes.append(_node("Add", [product, bias_name], [f"{stem}.output"]))
    if len(ends) == 1:
        nodes[-1].output[0] = ends[0][0]
    else:
        sizes = np.array([each.shape[1] for each in weights], np.int64)
        sizes_name = add(f"{stem}.sizes", numpy_helper.from_array(sizes))
        outputs = [name for name, _ in ends]
        nodes.append(_node("Split", [nodes[-1].output[0], sizes_name], outputs, axis=-1))
    return replace(graph, nodes=_spliced(graph.nodes, replaced, nodes), tensors=tensors)


def _with_biases(graph: Graph, linear: Linear) -> tuple[set[str], list[tuple[str, str | None]]]:
    """Return the nodes of a linear layer, and each MatMul's last output and bias, if it has one."""
    replaced, ends = set(linear.nodes), []
    by_name = {node.name: node for node in graph.nodes}
    for name in linear.nodes:
        output = by_name[name].output[0]
        readers = [node for node in graph.nodes if output in node.input]
        end: tuple[str, str | None] = (output, None)
        if len(readers) == 1 and readers[0].op_type == "Add" and output not in graph.outputs:
            bias = next(x for x in readers[0].input if x != output)
            if bias in graph.tensors and len(graph.tensors[bias].dims) == 1:
                end = (readers[0].output[0], bias)
                replaced.add(readers[0].name)
        ends.append(end)
    return replaced, ends


def _spliced(nodes: Sequence[Any], replaced: set[str], others: Sequence[Any]) -> tuple[Any, ...]:
    """Put other nodes where the first of the replaced ones was."""
    place = next(number for number, node in enumerate(nodes) if node.name in replaced)
    left = [node for node in nodes[place:] if node.name not in replaced]
    return (*nodes[:place], *others, *left)


def _node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, f"{outputs[0]}.{kind}", **attributes)


def _scale(threshold: Array, precision: QuantPrecision, wide: Any) -> Array:
    """Return the steps [...] in the graph's own dtype; 1 where there is nothing but zeros."""
    scale = (threshold.astype(np.float64) / LARGEST[precision]).astype(wide)
    tiny = (
        np.finfo(wide).smallest_normal if wide == np.float32 else np.finfo(wide).smallest_subnormal
    )
    return np.where(threshold > 0, np.maximum(scale, tiny), 1).astype(wide)


def _quantise(array: Array, scales: Array, precision: QuantPrecision) -> Any:
    """Return weights [in, out] divided by the steps [out] and rounded to nearest even."""
    largest = LARGEST[precision]
    scaled = np.clip(array.astype(np.float32) / scales.astype(np.float32), -largest, largest)
    if precision == "int8":
        small = np.rint(scaled).astype(np.int8)
    else:
        small = scaled.astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor("", _TYPES[precision], array.shape, small.tobytes(), raw=True)


def _zeros(shape: tuple[int, ...], precision: QuantPrecision) -> Any:
    size = int(np.prod(shape, dtype=int))
    return helper.make_tensor("", _TYPES[precision], shape, b"\0" * size, raw=True)
