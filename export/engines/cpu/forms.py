"""What a bundle's graph is rewritten to: ONNX Runtime's own attention, and products in 8 bits.

`vzip.export.engines.cpu.patterns` finds what is rewritten. A form of a graph in which nothing is
found is the graph itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from vzip.export.engines.cpu.patterns import (
    ATTENTION,
    LinearMatch,
    array,
    attention,
    choosing,
    floats,
    gates,
    linears,
    norms,
)

Array = NDArray[Any]
Bits = Literal["tensor", "blocks"]

MICROSOFT: Final = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
BLOCK: Final = 128
"""Numbers that share a scale in ``blocks``; of those that ONNX Runtime has kernels for (16 to 256)
the largest is the fastest, and each outlier spoils so many neighbours."""


@dataclass(frozen=True)
class Form:
    """How the linear layers of a graph are computed; attention is fused in any case.

    Attributes:
        name: For records and messages.
        after_norm: How those are that a LayerNorm feeds, whose input can be smoothed: ``tensor``
            (inputs quantised with one scale per call, weights with one per output), ``blocks``
            (both with one for each `BLOCK` numbers of a row), or None for FP32.
        others: How the others are; but those whose queries and keys choose and merge tokens, and
            what shares their input, are always in FP32: an estimated 1.6 % of the time, and up to
            half as many other tokens kept (ViT-L/14-336, random weights).
    """

    name: str
    after_norm: Bits | None
    others: Bits | None

    @property
    def own_weights(self) -> bool:
        """Whether its weights are others than the bundle's."""
        return self.after_norm is not None or self.others is not None


FORMS: Final = (
    Form("dynamic", "tensor", "tensor"),
    Form("mixed", "tensor", "blocks"),
    Form("blocks", "blocks", "blocks"),
    Form("fused", None, None),
)


def rewrite(model: ir.Model, form: Form, factors: Mapping[str, Array]) -> bool:
    """Give a graph a form, in place; its inputs and outputs stay what they are.

    Args:
        model: The bundle's graph.
        form: Which.
        factors: Name of a LayerNorm's result → float32 [in], powers of two that its channels are
            divided by before they are quantised; the weights are multiplied.

    Returns:
        Whether anything of the form was found in it.
    """
    fused = FuseAttention()(model).modified
    return EightBits(form, factors)(model).modified or fused


class FuseAttention(ir.passes.InPlacePass):
    """Make one MultiHeadAttention of every attention; what chooses tokens keeps its own nodes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the last node of each; what then leads nowhere is removed."""
        graph, modified = model.graph, False
        for node in list(graph):
            found = attention(node)
            if found is None:
                continue
            result = found.end.outputs[0]
            fused = ir.node(
                ATTENTION,
                (found.queries, found.keys, found.values),
                {"num_heads": found.heads, "scale": found.scale},
                domain=MICROSOFT,
                name=f"{result.name}.attention",
            )
            _replace(graph, [found.end], [fused])
            modified = True
        return _cleaned(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No attention of that form is left."""
        if any(attention(node) is not None for node in model.graph):
            _fail("an attention was not fused")


class EightBits(ir.passes.InPlacePass):
    """Compute linear layers in 8 bits, of a graph whose attention is fused.

    ONNX Runtime computes x · σ(x) more than three times as fast as x · σ(c x) (1.31 on AVX-512),
    so c goes into the weights around it: those before are multiplied by it, those after divided.

    Attributes:
        form: Which layers, and how.
        factors: As `rewrite` takes them.
    """

    def __init__(self, form: Form, factors: Mapping[str, Array]) -> None:
        self.form, self.factors = form, factors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the nodes of each layer; see the class."""
        graph = model.graph
        taken = self._taken(graph)
        normed = {norm.outputs[0].name: norm for norm in norms(graph)}
        times: dict[str, float] = {}  # result of a layer → the c of the gate after it
        over: dict[str, float] = {}  # and of the gate before it
        for gate in gates(graph, [linear for linear, _ in taken]):
            times[_name(gate.before.output)] = gate.c
            over.update((_name(linear.output), gate.c) for linear in gate.after)
            gate.sigmoid.replace_input_with(0, gate.before.output)
        smoothed: set[str] = set()
        for linear, bits in taken:
            name, given = _name(linear.output), _name(linear.input)
            c = times.get(name, 1.0)
            weights = array(linear.weight) * np.float32(c / over.get(name, 1.0))
            bias = linear.bias
            if bias is not None and c != 1:
                bias = _constant(graph, f"{name}.bias", array(bias) * np.float32(c))
            factor = self.factors.get(given) if given in normed else None
            if factor is not None:
                weights = weights * factor[:, None]
                if given not in smoothed:
                    smoothed.add(given)
                    _divide(graph, normed[given], factor)
            if bits == "tensor":
                _tensor_product(graph, linear, weights, bias)
            else:
                _block_product(graph, linear, weights, bias)
        return _cleaned(model, bool(taken))

    def ensures(self, model: ir.Model) -> None:
        """No layer that the form has in 8 bits is left in FP32."""
        if left := self._taken(model.graph):
            _fail(f"{len(left)} linear layers are still in FP32")

    def _taken(self, graph: ir.Graph) -> list[tuple[LinearMatch, Bits]]:
        """Return the linear layers that the form has in 8 bits, and how."""
        if not self.form.own_weights:
            return []
        every, read = linears(graph), choosing(graph)
        shared = {linear.input for linear in every if linear.output in read}
        normed, found = {norm.outputs[0] for norm in norms(graph)}, []
        for linear in every:
            if linear.input in shared:
                continue
            bits = self.form.after_norm if linear.input in normed else self.form.others
            rows = (floats(linear.weight) or (0,))[0]
            if bits is not None and (bits != "blocks" or rows % BLOCK == 0):
                found.append((linear, bits))
        return found


def _divide(graph: ir.Graph, norm: ir.Node, factor: Array) -> None:
    """Divide what a LayerNorm gives by [in] factors; tensors may be shared, so it gets its own."""
    for place, kind in ((1, "gamma"), (2, "beta")):
        old = norm.inputs[place]
        assert old is not None
        name = f"{norm.outputs[0].name}.{kind}"
        norm.replace_input_with(place, _constant(graph, name, array(old) / factor))


def _tensor_product(
    graph: ir.Graph, linear: LinearMatch, weights: Array, bias: ir.Value | None
) -> None:
    """Quantise the input in a call with one scale, the weights [in, out] with one per output.

    ONNX Runtime's kernels for x86 take unsigned inputs and signed weights; layers that share an
    input share its quantisation.
    """
    nodes, x = [], linear.input
    quantise = next((n for n in x.consumers() if n.op_type == "DynamicQuantizeLinear"), None)
    if quantise is None:
        small = f"{x.name}.u8"
        quantise = ir.node("DynamicQuantizeLinear", (x,), num_outputs=3, name=small)
        for value, kind in zip(quantise.outputs, ("u8", "scale", "zero"), strict=True):
            value.name = f"{x.name}.{kind}"
        nodes.append(quantise)
    scales = np.abs(weights).max(axis=0) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    name = _name(linear.output)
    quantised = _constant(graph, f"{name}.s8", np.rint(weights / scales).astype(np.int8))
    steps = _constant(graph, f"{name}.scale", scales)
    small_x, scale, zero = quantise.outputs
    inputs = [small_x, quantised, scale, steps, zero, *(() if bias is None else (None, bias))]
    nodes.append(ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=name))
    _replace(graph, _nodes(linear), nodes)


def _block_product(
    graph: ir.Graph, linear: LinearMatch, weights: Array, bias: ir.Value | None
) -> None:
    """Quantise input and weights [in, out] with one scale for each `BLOCK` numbers."""
    rows, columns = weights.shape
    blocks = weights.T.reshape(columns, rows // BLOCK, BLOCK)
    scales = np.abs(blocks).max(axis=2) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    # 128 is the zero that the operator assumes.
    small = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
    name = _name(linear.output)
    quantised = _constant(graph, f"{name}.blocks", small)
    steps = _constant(graph, f"{name}.steps", scales)
    inputs: list[ir.Value | None] = [linear.input, quantised, steps]
    inputs += [] if bias is None else [None, None, bias]
    attributes = {"K": rows, "N": columns, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    product = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=name)
    _replace(graph, _nodes(linear), [product])


def _nodes(linear: LinearMatch) -> list[ir.Node]:
    return list(dict.fromkeys((linear.product, linear.end)))


def _replace(graph: ir.Graph, old: list[ir.Node], new: list[ir.Node]) -> None:
    """Put nodes in the place of others; the last one's result takes the place of the last one's."""
    ir.convenience.replace_nodes_and_values(
        graph, old[0], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]]
    )


def _cleaned(model: ir.Model, modified: bool) -> ir.passes.PassResult:
    """Remove what leads nowhere any more, and say which operators there are."""
    if modified:
        model.graph.opset_imports[MICROSOFT] = 1
        common.RemoveUnusedNodesPass()(model)
    return ir.passes.PassResult(model, modified=modified)


def _constant(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    """Return a new initializer."""
    tensor = ir.tensor(values, name=name)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(values.shape)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def _name(value: ir.Value) -> str:
    assert value.name is not None  # ONNX has no values without one
    return value.name


def _fail(message: str) -> NoReturn:
    raise ir.passes.PostconditionError(message)
