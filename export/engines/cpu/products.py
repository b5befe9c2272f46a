"""Linear layers in 8 bits, each way written as nodes of ONNX Runtime's CPU.

``tensor`` and ``blocks`` are operators of ONNX Runtime's own. ``tokens`` is a chain: the channels'
means are taken off, neighbours are turned together by a Hadamard matrix, each token is divided by
its largest number, and what comes out of the integer product is multiplied with it again. A
rotation spreads an outlier of one channel over its neighbours, so that it no longer sets the step
that all of its token is rounded with. The weights are turned back, which changes nothing of the
result, and the means' share of it goes into the bias. Source: Ashkboos et al., "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456; the rotation is computed here, in
blocks, because it would have to pass a LayerNorm or a GELU to be folded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.export.engines.cpu.patterns import LinearMatch, array

Array = NDArray[Any]
Bits = Literal["tensor", "tokens", "blocks"]

MICROSOFT: Final = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
BLOCK: Final = 128
"""Numbers that share a scale in ``blocks``; of those that ONNX Runtime has kernels for (16 to 256)
the largest is the fastest, and each outlier spoils so many neighbours."""
ROTATED: Final = 128
"""Most numbers of a token that ``tokens`` turns together. Of 16 to 128, the larger the better and
the slower: 64 takes a millisecond less a layer and misses .97 of the tokens of CLIP-B/16-384."""
_LEAST_ROTATED: Final = 16
_ZERO: Final = np.uint8(128)
"""What stands for 0 in unsigned inputs that are symmetric."""
_TINIEST: Final = 1e-30
"""A token's step where all of it is 0."""


@dataclass(frozen=True)
class Learnt:
    """What was learnt for the forms of a graph from pictures.

    Attributes:
        factors: Name of a LayerNorm's result → float32 [in], powers of two that its channels are
            divided by for ``tensor`` and ``blocks``; the weights are multiplied.
        means: Name of what a linear layer reads → float32 [in], each channel's mean, which
            ``tokens`` takes off.
    """

    factors: Mapping[str, Array] = field(default_factory=dict)
    means: Mapping[str, Array] = field(default_factory=dict)


class Products:
    """Puts products in 8 bits in the place of a graph's linear layers.

    Args:
        graph: The graph, whose LayerNorms get other gamma and beta.
        normed: Name of a result that linear layers alone read → the LayerNorm that makes it.
        learnt: What the forms need.
        axes_are_inputs: Whether ReduceMax takes its axes as an input, as it does from opset 18 on.
    """

    def __init__(
        self,
        graph: ir.Graph,
        normed: Mapping[str, ir.Node],
        learnt: Learnt,
        *,
        axes_are_inputs: bool,
    ) -> None:
        self._graph, self._normed, self._learnt = graph, normed, learnt
        self._axes_are_inputs = axes_are_inputs
        self._changed: set[str] = set()  # results of norms that have another gamma and beta
        self._tokens: dict[str, tuple[ir.Value, ir.Value]] = {}  # quantised input, steps
        self._constants: dict[str, ir.Value] = {}

    def replace(self, linear: LinearMatch, bits: Bits, *, before: float, after: float) -> None:
        """Replace a layer's nodes.

        Args:
            linear: The layer.
            bits: How it is computed.
            before: What its input is multiplied with in the graph as it now is.
            after: What its result is to be multiplied with.
        """
        given = name_of(linear.input)
        weights = array(linear.weight) * np.float32(after / before)
        bias = None if linear.bias is None else array(linear.bias) * np.float32(after)
        if bits == "tokens":
            self._by_token(linear, weights, bias, np.float32(before))
            return
        factor = self._learnt.factors.get(given) if given in self._normed else None
        if factor is not None:
            weights = weights * factor[:, None]
            self._renormed(given, lambda gamma, beta: (gamma / factor, beta / factor))
        value = linear.bias if after == 1 else self._bias(linear, bias)
        if bits == "tensor":
            self._by_tensor(linear, weights, value)
        else:
            self._by_blocks(linear, weights, value)

    def _renormed(self, given: str, change: Callable[[Array, Array], tuple[Array, Array]]) -> None:
        """Change what a LayerNorm gives, once; tensors may be shared, so it gets its own."""
        if given in self._changed:
            return
        self._changed.add(given)
        norm = self._normed[given]
        gamma, beta = (array(_given(norm, place)) for place in (1, 2))
        for place, kind, new in zip((1, 2), ("gamma", "beta"), change(gamma, beta), strict=True):
            # A copy: what isn't changed is mapped from the bundle's file.
            norm.replace_input_with(place, constant(self._graph, f"{given}.{kind}", np.array(new)))

    def _by_tensor(self, linear: LinearMatch, weights: Array, bias: ir.Value | None) -> None:
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
        quantised, steps = self._by_output(linear, weights)
        small_x, scale, zero = quantise.outputs
        inputs = [small_x, quantised, scale, steps, zero, *(() if bias is None else (None, bias))]
        name = name_of(linear.output)
        nodes.append(ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=name))
        replace(self._graph, nodes_of(linear), nodes)

    def _by_blocks(self, linear: LinearMatch, weights: Array, bias: ir.Value | None) -> None:
        """Quantise input and weights [in, out] with one scale for each `BLOCK` numbers."""
        rows, columns = weights.shape
        blocks = weights.T.reshape(columns, rows // BLOCK, BLOCK)
        scales = _scales(blocks, axis=2)
        # 128 is the zero that the operator assumes.
        small = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
        name = name_of(linear.output)
        quantised = constant(self._graph, f"{name}.blocks", small)
        steps = constant(self._graph, f"{name}.steps", scales)
        inputs: list[ir.Value | None] = [linear.input, quantised, steps]
        inputs += [] if bias is None else [None, None, bias]
        attributes = {"K": rows, "N": columns, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        product = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=name)
        replace(self._graph, nodes_of(linear), [product])

    def _by_token(
        self, linear: LinearMatch, weights: Array, bias: Array | None, before: np.float32
    ) -> None:
        """Rotate input and weights, and quantise the input with one scale per token."""
        given, name, graph = name_of(linear.input), name_of(linear.output), self._graph
        mean = self._learnt.means.get(given, np.zeros(len(weights), np.float32)) * before
        nodes: list[ir.Node] = []
        if given not in self._tokens:
            x = linear.input
            if given in self._normed:
                self._renormed(given, lambda gamma, beta: (gamma, beta - mean))
            else:
                x = self._add(nodes, "Sub", f"{given}.centred", x, self._constant(given, mean))
            self._tokens[given] = self._quantised(nodes, given, x, extents(linear.input))
        small, steps = self._tokens[given]
        turned = rotated(weights.T, _width(len(weights))).T
        quantised, scales = self._by_output(linear, turned)
        inputs = (small, quantised, self._one(), scales, self._zero())
        product = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=f"{name}.product")
        nodes.append(product)
        scaled = self._add(nodes, "Mul", f"{name}.scaled", product.outputs[0], steps)
        total = mean @ weights if bias is None else mean @ weights + bias
        added = constant(graph, f"{name}.added", total.astype(np.float32))
        nodes.append(ir.node("Add", (scaled, added), name=name))
        replace(graph, nodes_of(linear), nodes)

    def _quantised(
        self, nodes: list[ir.Node], given: str, x: ir.Value, shape: tuple[int, ...]
    ) -> tuple[ir.Value, ir.Value]:
        """Return tokens [..., in] in 8 bits around `_ZERO`, and the steps [..., 1] of each."""
        width = _width(shape[-1])
        if width > 1:
            flat = self._shared("flat", np.array([-1, width], np.int64), width)
            whole = self._shared("whole", np.array([-1, *shape], np.int64), *shape)
            turn = self._shared("turn", hadamard(width), width)
            x = self._add(nodes, "Reshape", f"{given}.flat", x, flat)
            x = self._add(nodes, "MatMul", f"{given}.turned", x, turn)
            x = self._add(nodes, "Reshape", f"{given}.rotated", x, whole)
        size = self._add(nodes, "Abs", f"{given}.size", x)
        most = self._most(nodes, f"{given}.most", size)
        step = self._shared("step", np.float32(1 / 127))
        steps = self._add(nodes, "Mul", f"{given}.step", most, step)
        tiniest = self._shared("tiniest", np.float32(_TINIEST))
        steps = self._add(nodes, "Clip", f"{given}.steps", steps, tiniest)
        x = self._add(nodes, "Div", f"{given}.divided", x, steps)
        small = self._add(nodes, "QuantizeLinear", f"{given}.u8", x, self._one(), self._zero())
        return small, steps

    def _most(self, nodes: list[ir.Node], name: str, x: ir.Value) -> ir.Value:
        if self._axes_are_inputs:
            node = ir.node("ReduceMax", (x, self._shared("last", np.array([-1], np.int64))))
        else:
            node = ir.node("ReduceMax", (x,), {"axes": [-1]})
        node.outputs[0].name = name
        nodes.append(node)
        return node.outputs[0]

    def _by_output(self, linear: LinearMatch, weights: Array) -> tuple[ir.Value, ir.Value]:
        """Return weights [in, out] in signed 8 bits, and the scale of each output."""
        name = name_of(linear.output)
        scales = _scales(weights, axis=0)
        small = np.rint(weights / scales).astype(np.int8)
        return (
            constant(self._graph, f"{name}.s8", small),
            constant(self._graph, f"{name}.scale", scales),
        )

    def _bias(self, linear: LinearMatch, bias: Array | None) -> ir.Value | None:
        return None if bias is None else constant(self._graph, f"{linear.output.name}.bias", bias)

    def _constant(self, given: str, mean: Array) -> ir.Value:
        return constant(self._graph, f"{given}.mean", mean.astype(np.float32))

    def _one(self) -> ir.Value:
        return self._shared("one", np.float32(1))

    def _zero(self) -> ir.Value:
        return self._shared("zero", _ZERO)

    def _shared(self, kind: str, values: Any, *sizes: int) -> ir.Value:
        """Return a constant that several chains read."""
        name = ".".join(["tokens", kind, *map(str, sizes)])
        if name not in self._constants:
            self._constants[name] = constant(self._graph, name, np.asarray(values))
        return self._constants[name]

    @staticmethod
    def _add(nodes: list[ir.Node], operator: str, name: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(operator, inputs, name=name)
        node.outputs[0].name = name
        nodes.append(node)
        return node.outputs[0]


def hadamard(width: int) -> NDArray[np.float32]:
    """Return the orthogonal, symmetric matrix [width, width] of Sylvester; width a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    made: NDArray[np.float32] = (matrix / np.sqrt(width)).astype(np.float32)
    return made


def rotated(rows: Array, width: int) -> Array:
    """Turn each `width` neighbours of rows [..., n] together; twice is nothing."""
    parts = rows.reshape(*rows.shape[:-1], -1, width)
    turned: Array = (parts @ hadamard(width)).reshape(rows.shape)
    return turned


def extents(value: ir.Value) -> tuple[int, ...]:
    """Return the extents of a value behind its first axis; empty where they aren't all known."""
    dims = () if value.shape is None else tuple(value.shape.dims)[1:]
    known = tuple(each for each in dims if isinstance(each, int))
    return known if len(known) == len(dims) else ()


def _width(length: int) -> int:
    """Return how many numbers of a token of some length are turned together; 1 for none."""
    width = min(ROTATED, length & -length)
    return width if width >= _LEAST_ROTATED else 1


def _scales(weights: Array, *, axis: int) -> Array:
    scales = np.abs(weights).max(axis=axis) / 127
    return np.where(scales > 0, scales, 1).astype(np.float32)


def nodes_of(linear: LinearMatch) -> list[ir.Node]:
    """Return the nodes of a layer, in their order."""
    return list(dict.fromkeys((linear.product, linear.end)))


def replace(graph: ir.Graph, old: list[ir.Node], new: list[ir.Node]) -> None:
    """Put nodes in the place of others; the last one's result takes the place of the last one's."""
    ir.convenience.replace_nodes_and_values(
        graph, old[0], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]]
    )


def constant(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    """Return a new initializer."""
    tensor = ir.tensor(values, name=name)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(values.shape)
    value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def name_of(value: ir.Value) -> str:
    """Return a value's name, without which ONNX has none."""
    assert value.name is not None
    return value.name


def _given(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None  # `norms` asks for all three
    return value
