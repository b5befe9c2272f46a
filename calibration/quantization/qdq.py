"""Explicit quantisation: QuantizeLinear and DequantizeLinear around linear layers alone.

Symmetric throughout: activations per tensor, weights per output channel, zero points 0, which is
what TensorRT takes. Weights are stored quantised. `onnxruntime.quantization` could place the nodes
too, but with every weight of the model in memory at once, with a pair of its own for each of q, k
and v, and without a way for FP16 graphs of opset 17 and 18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import Sequential, common

from vzip.calibration.quantization.folds import hadamard, rotated, source_of
from vzip.calibration.quantization.pieces import LinearGroup, array_of, linear_groups
from vzip.calibration.quantization.recipe import QuantPrecision
from vzip.runtime.errors import BundleError

Array = NDArray[Any]

# FP8 came with opset 19, and so did scales in FP16: before, an FP16 graph would need casts between
# its MatMuls and their scales, which keep TensorRT from fusing them.
OPSET_OF_SMALL_SCALES = 19
LARGEST: Mapping[QuantPrecision, float] = {"int8": 127.0, "fp8": 448.0}
_TYPES: Final[Mapping[QuantPrecision, Any]] = {
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
}


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Setting:
    """How one linear layer is quantised.

    In this order: its input is divided by `factors`, `rotated` or put into `order`, its `apart`
    channels are taken out, blocks of the others are rotated, `shift` is taken off, and what is left
    is quantised.

    Attributes:
        threshold: Magnitude at which what is quantised is clipped.
        factors: float32 [in] powers of two that its input is divided by, in the LayerNorm; None
            for none.
        shift: float32 [channels that are quantised], what is taken off; None for nothing.
        apart: int64, channels that are multiplied in high precision, of the input in its `order`.
        order: int64 [in], an order of the input's channels in which those `apart` are the last, for
            a feed forward's second layer; None for the order that there is.
        block: Channels that a Hadamard matrix mixes: in the layer of an attention's values, and
            where there is an `order` by a product of its own. 0 for none.
        folded: Whether shift and rotation are done in what makes the input.
        correction: float32 [out], added to the bias: what rounding takes away on average. None for
            nothing.
    """

    threshold: float
    factors: NDArray[np.float32] | None = None
    shift: NDArray[np.float32] | None = None
    apart: NDArray[np.int64] = field(default_factory=_none)
    order: NDArray[np.int64] | None = None
    block: int = 0
    folded: bool = False
    correction: NDArray[np.float32] | None = None


def opset_of(model: ir.Model, precision: QuantPrecision) -> int:
    """Return the opset that the quantised graph has: the graph's own where that will do."""
    opset = model.opset_imports[""]
    linear = model.graph.initializers[linear_groups(model)[0].weights[0]]
    if precision == "int8" and linear.dtype == ir.DataType.FLOAT:
        return opset
    return max(opset, OPSET_OF_SMALL_SCALES)


def quantised(
    model: ir.Model, settings: Mapping[str, Setting], precision: QuantPrecision, opset: int
) -> ir.Model:
    """Quantise linear layers of a graph or of a piece of one.

    Args:
        model: The graph, which stays as it is.
        settings: Name of a linear layer → how; those that are not named stay as they are.
        precision: Of the quantised ones.
        opset: From `opset_of`.

    Returns:
        A graph with the same inputs and outputs.
    """
    edits = Sequential(
        RaiseOpset(opset),
        Smooth({name: each.factors for name, each in settings.items() if each.factors is not None}),
        Fold(settings),
        QuantiseLinears(settings, precision),
        common.RemoveUnusedNodesPass(),
    )
    return edits(model.clone()).model


class RaiseOpset(ir.passes.InPlacePass):
    """Rewrite a graph of opset 17 or 18 for a later one.

    Of the operators that an exported graph may hold (`vzip.runtime.bundle.graph_check.EXPORTED`)
    one changed its form on the way to 19: ReduceMax takes its axes as an input since 18.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Turn the attribute into an input."""
        modified = self.opset != model.opset_imports[""]
        for node in model.graph if modified else ():
            if node.op_type == "ReduceMax" and "axes" in node.attributes:
                axes = np.array(node.attributes.pop("axes").as_ints(), np.int64)
                node.resize_inputs(2)
                name = f"{node.outputs[0].name}.axes"
                node.replace_input_with(1, _constant(model.graph, name, axes))
        model.opset_imports[""] = self.opset
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No ReduceMax has the attribute that opset 18 took away."""
        for node in model.graph:
            if self.opset > 17 and node.op_type == "ReduceMax" and "axes" in node.attributes:
                raise ir.passes.PostconditionError(f"{node.name} has its axes as an attribute")


class Smooth(ir.passes.InPlacePass):
    """Divide linear layers' input channels in their LayerNorms, and multiply their weights' rows.

    The graph computes what it did.

    Args:
        factors: Name of a linear layer → float32 [in], powers of two.
    """

    def __init__(self, factors: Mapping[str, NDArray[np.float32]]) -> None:
        self.factors = factors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the numbers of gammas, betas and weights."""
        for linear in _plain(model):
            factors = self.factors.get(linear.name)
            if factors is None:
                continue
            assert linear.norm is not None
            for name in linear.norm:
                values = array_of(model, name)
                _replace(model, name, values / factors.astype(values.dtype))
            for name in linear.weights:
                values = array_of(model, name)
                _replace(model, name, values * factors.astype(values.dtype)[:, None])
        return ir.passes.PassResult(model, modified=bool(self.factors))


class Fold(ir.passes.InPlacePass):
    """Do to linear layers' inputs, in what makes them, what costs nothing there.

    The LayerNorm or the layer of the values takes the shift, that layer the rotation, and the layer
    before an activation gives its channels another order. What follows must take the shift back;
    apart from that the graph computes what it did.

    Args:
        settings: Name of a linear layer → how it is quantised.
    """

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = settings

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the numbers of norms, weights and biases."""
        for linear in _plain(model):
            setting = self.settings.get(linear.name)
            if setting is not None:
                _fold(model, linear, setting)
        return ir.passes.PassResult(model, modified=bool(self.settings))


def _fold(model: ir.Model, linear: LinearGroup, setting: Setting) -> None:
    shift = np.float32(0) if setting.shift is None else setting.shift
    if linear.norm is not None:
        if setting.folded:
            _replace(model, linear.norm[1], _wide(model, linear.norm[1]) - shift)
        return
    source = source_of(model, linear)
    if source is None:
        return
    # Axes of the weights before, of their bias, and of the layer's own weights.
    places = [(source.weight, 1), (source.bias, 0), (linear.weights[0], 0)]
    for name, axis in ((name, axis) for name, axis in places if name is not None):
        if setting.order is not None and source.head is None:
            _replace(model, name, np.take(_wide(model, name), setting.order, axis))
        elif setting.block and setting.folded:
            _replace(model, name, rotated(_wide(model, name), setting.block, axis))
    if setting.folded and source.bias is not None:
        _replace(model, source.bias, _wide(model, source.bias) - shift)


class QuantiseLinears(ir.passes.InPlacePass):
    """Quantise linear layers' inputs and weights; q, k and v become one MatMul and a Split.

    Args:
        settings: Name of a linear layer → how.
        precision: What they become.
    """

    def __init__(self, settings: Mapping[str, Setting], precision: QuantPrecision) -> None:
        self.settings, self.precision = settings, precision

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace each linear layer by its quantised form."""
        linears = [each for each in _plain(model) if each.name in self.settings]
        for linear in linears:
            _quantise_linear(model, linear, self.settings[linear.name], self.precision)
        return ir.passes.PassResult(model, modified=bool(linears))

    def ensures(self, model: ir.Model) -> None:
        """No layer that was named multiplies weights as they were."""
        left = set(self.settings) & {each.name for each in _plain(model)}
        if left:
            raise ir.passes.PostconditionError(f"{sorted(left)} are as they were")


def _plain(model: ir.Model) -> list[LinearGroup]:
    """Return the linear layers that are not quantised; there may be none left."""
    try:
        return linear_groups(model)
    except BundleError:
        return []


def main_weights(weights: Array, setting: Setting) -> Array:
    """Return what of a linear layer's weights is quantised.

    Args:
        weights: [in, out], after `Smooth` and `Fold`.
        setting: How it is quantised.

    Returns:
        [channels that are quantised, out]. Channels that stand apart and aren't the last stay in
        their places, as zeros.
    """
    kept: Array
    if setting.order is not None:
        kept = weights[: len(weights) - len(setting.apart)]
        if setting.block:
            kept = rotated(kept, setting.block, 0).astype(weights.dtype)
        return kept
    if not len(setting.apart):
        return weights
    kept = weights.copy()
    kept[setting.apart] = 0
    return kept


def rounded_weights(
    main: Array, precision: QuantPrecision, wide: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weights [in, out] in 8 bits, and their steps [out] in the graph's own dtype."""
    scales = _scale(np.abs(main).max(axis=0), precision, wide)
    return _quantise(main, scales, precision), scales


class _Nodes:
    """New nodes of one linear layer, and their constants."""

    def __init__(self, graph: ir.Graph, stem: str) -> None:
        self.graph, self.stem = graph, stem
        self.nodes: list[ir.Node] = []

    def add(self, name: str, numbers: Array) -> ir.Value:
        """Return a new constant."""
        return _constant(self.graph, f"{self.stem}.{name}", numbers)

    def op(
        self, kind: str, inputs: list[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Value:
        """Return what a new node gives."""
        made = ir.Value(name=f"{self.stem}.{name}")
        title = f"{made.name}.{kind}"
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=[made], name=title))
        return made


def _prepared(
    nodes: _Nodes, source: ir.Value | None, setting: Setting, main: Array
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return a linear layer's input as it is quantised, and the channels that stand apart."""
    add, op, wide = nodes.add, nodes.op, main.dtype
    channels, apart = source, None
    if len(setting.apart) and setting.order is not None:
        sizes = add("input.sizes", np.array([len(main), len(setting.apart)], np.int64))
        channels, apart = (ir.Value(name=f"{nodes.stem}.input.{x}") for x in ("main", "apart"))
        nodes.nodes.append(
            ir.node("Split", [source, sizes], {"axis": -1}, outputs=[channels, apart],
                    name=f"{nodes.stem}.input.Split")
        )  # fmt: skip
    elif len(setting.apart):
        apart = op("Gather", [source, add("apart.places", setting.apart)], "input.apart", axis=-1)
    if setting.block and not setting.folded:
        size = setting.block
        blocks = add("blocks.shape", np.array([0, 0, len(main) // size, size], np.int64))
        channels = op("Reshape", [channels, blocks], "blocks")
        matrix = add("blocks.hadamard", hadamard(size).astype(wide))
        channels = op("MatMul", [channels, matrix], "blocks.rotated")
        flat = add("rotated.shape", np.array([0, 0, len(main)], np.int64))
        channels = op("Reshape", [channels, flat], "rotated")
    if setting.shift is not None and not setting.folded:
        channels = op("Sub", [channels, add("input.shift", setting.shift.astype(wide))], "shifted")
    return channels, apart


def _quantise_linear(
    model: ir.Model, linear: LinearGroup, setting: Setting, precision: QuantPrecision
) -> None:
    graph, stem, small = model.graph, linear.name, _TYPES[precision]
    named = {node.name: node for node in graph}
    products = [named[name] for name in linear.nodes]
    weights = [array_of(model, name) for name in linear.weights]  # each [in, out]
    wide = weights[0].dtype
    array = np.concatenate(weights, axis=1)
    main = main_weights(array, setting)
    stored, scales = rounded_weights(main, precision, wide)
    scale = _scale(np.array(setting.threshold), precision, wide)

    made_nodes = _Nodes(graph, stem)
    nodes, add, op = made_nodes.nodes, made_nodes.add, made_nodes.op
    channels, apart = _prepared(made_nodes, products[0].inputs[0], setting, main)
    step, zero = add("input.scale", scale), add("input.zero", np.zeros((), small))
    rounded = op("QuantizeLinear", [channels, step, zero], "input.quantised")
    packed = [
        add("weight.quantised", stored),
        add("weight.scale", scales),
        add("weight.zero", np.zeros(scales.shape, small)),
    ]
    weight = op("DequantizeLinear", [*packed], "weight", axis=1)
    last = op("MatMul", [op("DequantizeLinear", [rounded, step, zero], "input"), weight], "product")
    if apart is not None:
        exact = op("MatMul", [apart, add("apart.weight", array[setting.apart])], "apart")
        last = op("Add", [last, exact], "whole")
    ends, biases, replaced = _with_biases(products)
    more = np.zeros(array.shape[1], np.float32)
    if setting.shift is not None:
        more += setting.shift @ main.astype(np.float32)
    if setting.correction is not None:
        more += setting.correction
    if any(bias is not None for bias in biases) or more.any():
        numbers = [
            np.zeros(each.shape[1], wide) if bias is None else array_of(model, str(bias.name))
            for each, bias in zip(weights, biases, strict=True)
        ]
        # [1, 1, out] adds what [out] does. A MatMul and a bias of one axis become a Gemm first in
        # ONNX Runtime, which then finds no integer MatMul for it.
        shaped = (np.concatenate(numbers) + more).astype(wide)[None, None]
        graph.initializers.pop(f"{stem}.bias", None)
        last = op("Add", [last, add("bias", shaped)], "output")
    made = [last]
    if len(ends) > 1:
        sizes = add("sizes", np.array([each.shape[1] for each in weights], np.int64))
        made = [ir.Value() for _ in ends]
        nodes.append(
            ir.node(
                "Split", [last, sizes], {"axis": -1}, outputs=made, name=f"{ends[0].name}.Split"
            )
        )
    first = next(node for node in graph if node in replaced)
    ir.convenience.replace_nodes_and_values(graph, first, replaced, nodes, ends, made)


def _with_biases(
    products: list[ir.Node],
) -> tuple[list[ir.Value], list[ir.Value | None], list[ir.Node]]:
    """Return each MatMul's last output, its bias if it has one, and all nodes up to there."""
    ends, biases, replaced = [], list[ir.Value | None](), [*products]
    for product in products:
        end, bias = product.outputs[0], None
        uses = list(end.uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add" and not end.is_graph_output():
            adding = uses[0].node
            other = adding.inputs[1 - uses[0].idx]
            if other is not None and other.is_initializer() and len(other.shape or ()) == 1:
                end, bias = adding.outputs[0], other
                replaced.append(adding)
        ends.append(end)
        biases.append(bias)
    return ends, biases, replaced


def _constant(graph: ir.Graph, name: str, numbers: Array) -> ir.Value:
    """Return a new initializer."""
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(numbers.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _replace(model: ir.Model, name: str, numbers: Array) -> None:
    """Give an initializer other numbers, in its own dtype."""
    dtype = array_of(model, name).dtype
    model.graph.initializers[name].const_value = ir.tensor(numbers.astype(dtype), name=name)


def _wide(model: ir.Model, name: str) -> NDArray[np.float32]:
    """Return an initializer's numbers in float32."""
    return array_of(model, name).astype(np.float32)


def _scale(threshold: Array, precision: QuantPrecision, wide: Any) -> Array:
    """Return the steps [...] in the graph's own dtype; 1 where there is nothing but zeros."""
    scale = (threshold.astype(np.float64) / LARGEST[precision]).astype(wide)
    tiny = (
        np.finfo(wide).smallest_normal if wide == np.float32 else np.finfo(wide).smallest_subnormal
    )
    return np.where(threshold > 0, np.maximum(scale, tiny), 1).astype(wide)


def _quantise(array: Array, scales: Array, precision: QuantPrecision) -> Array:
    """Return weights [in, out] divided by the steps [out] and rounded to nearest even."""
    largest = LARGEST[precision]
    scaled = np.clip(array.astype(np.float32) / scales.astype(np.float32), -largest, largest)
    small: Array = (np.rint(scaled) if precision == "int8" else scaled).astype(_TYPES[precision])
    return small
