"""What a bundle's graph is rewritten to: ONNX Runtime's own attention, and products in 8 bits.

Everything is found by its form, with conditions on every node of it; what doesn't meet them stays
as it is and is computed by the graph's own nodes. A form of a graph in which nothing is found is
the graph itself, which `vzip.runtime.fast.choice` measures as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.fast.graph import Graph, Node, number

Array = NDArray[Any]
Bits = Literal["tensor", "blocks"]

MICROSOFT: Final = "com.microsoft"
BLOCK: Final = 128
"""Numbers that share a scale in ``blocks``; of those that ONNX Runtime has kernels for (16 to 256)
the largest is the fastest, and each outlier spoils so many neighbours."""

_LEAST = 16  # rows and columns of weights that are worth an integer product


@dataclass(frozen=True)
class Form:
    """How the linear layers of a graph are computed; attention is fused in any case.

    Attributes:
        name: For records and messages.
        after_norm: How those are that a LayerNorm feeds, whose input can be smoothed: ``tensor``
            (inputs quantised with one scale per call, weights with one per output), ``blocks``
            (both with one for each `BLOCK` numbers of a row), or None for FP32.
        others: How the others are.
    """

    name: str
    after_norm: Bits | None
    others: Bits | None


FORMS: Final = (
    Form("dynamic", "tensor", "tensor"),
    Form("mixed", "tensor", "blocks"),
    Form("blocks", "blocks", "blocks"),
    Form("fused", None, None),
)


@dataclass(frozen=True)
class Linear:
    """A product with constant weights, and the bias that is added to it, if there is one.

    Attributes:
        input: Name of the value that is multiplied.
        weight: Name of the weights, [in, out].
        bias: Name of the bias, [out].
        output: Name of the result.
        place: Of the MatMul among the graph's nodes.
        end: Of the node that makes `output`.
    """

    input: str
    weight: str
    bias: str | None
    output: str
    place: int
    end: int


def linears(graph: Graph) -> list[Linear]:
    """Return the linear layers of a graph in FP32, in its order."""
    readers = graph.readers()
    places = {id(node): place for place, node in enumerate(graph.nodes)}
    found = []
    for place, node in enumerate(graph.nodes):
        if node.operator != "MatMul" or node.domain or node.inputs[0] in graph.tensors:
            continue
        shape = graph.shape(node.inputs[1])
        if shape is None or len(shape) != 2 or min(shape) < _LEAST:
            continue
        bias, output, end = None, node.outputs[0], place
        after = readers.get(output, [])
        if len(after) == 1 and after[0].operator == "Add" and output not in graph.outputs:
            other = [each for each in after[0].inputs if each != output]
            if len(other) == 1 and graph.shape(other[0]) == shape[1:]:
                bias, output, end = other[0], after[0].outputs[0], places[id(after[0])]
        found.append(Linear(node.inputs[0], node.inputs[1], bias, output, place, end))
    return found


def norms(graph: Graph) -> dict[str, tuple[Node, list[Linear]]]:
    """Return the LayerNorms whose results linear layers alone read.

    Returns:
        Name of the result → the norm, with constant gamma and beta [in], and those layers.
    """
    readers, every = graph.readers(), linears(graph)
    found = {}
    for node in graph.nodes:
        if node.operator != "LayerNormalization" or len(node.inputs) != 3:
            continue
        output = node.outputs[0]
        fed = [each for each in every if each.input == output]
        constant = all(graph.shape(name) is not None for name in node.inputs[1:])
        if fed and constant and len(fed) == len(readers[output]):
            found[output] = (node, fed)
    return found


def made(graph: Graph, form: Form, factors: Mapping[str, Array]) -> Graph:
    """Return a form of a graph.

    Args:
        graph: The bundle's.
        form: Which.
        factors: Name of a LayerNorm's result → float32 [in], powers of two that its channels are
            divided by before they are quantised; the weights are multiplied.

    Returns:
        A graph with the same inputs and outputs.
    """
    return with_attention(_with_integers(graph, form, factors))


def with_attention(graph: Graph) -> Graph:
    """Return the graph with every attention as one MultiHeadAttention.

    softmax((q · scale) kᵀ) v with q, k and v split in heads by Reshape and Transpose, nothing of it
    read elsewhere but by what chooses tokens, which keeps the nodes it reads.
    """
    around = _Around(graph, graph.makers(), graph.readers())
    places = {id(node): place for place, node in enumerate(graph.nodes)}
    edits = {}
    for node in graph.nodes:
        found = _attention(around, node)
        if found is not None:
            last, fused = found
            edits[places[id(last)]] = [fused]
    return graph.edited(edits)


@dataclass(frozen=True)
class _Around:
    """Finds the nodes around a value.

    Attributes:
        graph: The graph.
        makers: Which node makes each value.
        readers: Which nodes read it.
    """

    graph: Graph
    makers: Mapping[str, Node]
    readers: Mapping[str, list[Node]]

    def only(self, value: str, operator: str) -> Node | None:
        """Return the node that alone reads a value, if it is of this operator."""
        after = self.readers.get(value, [])
        alone = len(after) == 1 and value not in self.graph.outputs
        return after[0] if alone and after[0].operator == operator else None

    def maker(self, value: str, operator: str) -> Node | None:
        """Return the node that makes a value, if it is of this operator."""
        node = self.makers.get(value)
        return node if node is not None and node.operator == operator else None

    def split(self, value: str, perm: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return what was split in heads [b, n, heads, d] and transposed to this, and into what.

        Without a name if nothing was.
        """
        turned = self.maker(value, "Transpose")
        shaped = self.maker(turned.inputs[0], "Reshape") if turned is not None else None
        if turned is None or shaped is None or turned.integers("perm") != perm:
            return "", ()
        shape = _ints(self.graph, shaped.inputs[1])
        return (shaped.inputs[0], shape) if len(shape) == 4 else ("", ())

    def joined(self, value: str) -> Node | None:
        """Return what joins the heads [b, heads, n, d] of a value to [b, n, heads · d] again."""
        turned = self.only(value, "Transpose")
        if turned is None or turned.integers("perm") != (0, 2, 1, 3):
            return None
        return self.only(turned.outputs[0], "Reshape")

    def scaled(self, value: str) -> tuple[str, float | None]:
        """Return what was multiplied by a constant number to this, and that number or None."""
        node = self.maker(value, "Mul")
        constants = [each for each in node.inputs if each in self.graph.tensors] if node else []
        if node is None or len(constants) != 1 or self.graph.shape(constants[0]) not in {(), (1,)}:
            return "", None
        source = next(each for each in node.inputs if each != constants[0])
        return source, float(self.graph.array(constants[0]).reshape(-1)[0])


def _attention(around: _Around, softmax: Node) -> tuple[Node, Node] | None:
    """Return the last node of the attention around a Softmax, and what computes the same."""
    if softmax.operator != "Softmax" or softmax.integers("axis") not in {(-1,), (3,)}:
        return None
    scores = around.maker(softmax.inputs[0], "MatMul")
    context = around.only(softmax.outputs[0], "MatMul")
    if scores is None or context is None or context.inputs[0] != softmax.outputs[0]:
        return None
    queries, shape = around.split(scores.inputs[0], (0, 2, 1, 3))
    keys, of_keys = around.split(scores.inputs[1], (0, 2, 3, 1))
    values, of_values = around.split(context.inputs[1], (0, 2, 1, 3))
    source, scale = around.scaled(queries)
    joined = around.joined(context.outputs[0])
    if joined is None or scale is None or not shape == of_keys == of_values:
        return None
    flat, (heads, width) = _ints(around.graph, joined.inputs[1]), shape[2:]
    if min(heads, width) < 1 or len(flat) != 3 or flat[2] not in {-1, heads * width}:
        return None
    attributes = (number("num_heads", heads), number("scale", scale))
    name = f"{joined.outputs[0]}.attention"
    inputs = (source, keys, values)
    fused = Node("MultiHeadAttention", inputs, joined.outputs, MICROSOFT, name, attributes)
    return joined, fused


def _ints(graph: Graph, name: str) -> tuple[int, ...]:
    """Return a constant list of int64; empty if it is none."""
    if name not in graph.tensors:
        return ()
    array = graph.array(name)
    return tuple(array.tolist()) if array.dtype == np.int64 and array.ndim == 1 else ()


def _with_integers(graph: Graph, form: Form, factors: Mapping[str, Array]) -> Graph:
    """Return the graph with linear layers in 8 bits as a form has them."""
    normed = norms(graph)
    added = _Added()
    places = {value: place for place, node in enumerate(graph.nodes) for value in node.outputs}
    for linear in linears(graph):
        after_norm = linear.input in normed
        bits = form.after_norm if after_norm else form.others
        weights = graph.array(linear.weight) if bits is not None else None
        if bits is None or weights is None:
            continue
        if bits == "blocks" and weights.shape[0] % BLOCK:
            continue
        factor = factors.get(linear.input) if after_norm else None
        if factor is not None:
            weights = weights * factor[:, None]
            added.edits[places[linear.input]] = [added.smoothed(graph, linear.input, factor)]
        if bits == "tensor":
            added.tensor_product(linear, weights)
        else:
            added.block_product(linear, weights)
    return graph.edited(added.edits, added.tensors)


@dataclass
class _Added:
    """What a rewrite puts into a graph.

    Attributes:
        edits: As `Graph.edited` takes them.
        tensors: Likewise.
    """

    edits: dict[int, list[Node]] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)
    _quantised: set[str] = field(default_factory=set)

    def smoothed(self, graph: Graph, value: str, factor: Array) -> Node:
        """Return the LayerNorm that gives `value`, divided by [in] factors."""
        node = next(each for each in graph.nodes if value in each.outputs)
        names = []
        for name in node.inputs[1:]:
            self.tensors[f"{name}.smoothed"] = graph.array(name) / factor
            names.append(f"{name}.smoothed")
        return Node(
            node.operator, (node.inputs[0], *names), node.outputs, "", node.name, node.attributes
        )

    def tensor_product(self, linear: Linear, weights: Array) -> None:
        """Quantise the input in a call with one scale, the weights [in, out] with one per output.

        ONNX Runtime's kernels for x86 take unsigned inputs and signed weights; layers that share an
        input share its quantisation.
        """
        small, scale, zero = (f"{linear.input}.{each}" for each in ("u8", "scale", "zero"))
        nodes = []
        if linear.input not in self._quantised:
            self._quantised.add(linear.input)
            outputs = (small, scale, zero)
            nodes.append(Node("DynamicQuantizeLinear", (linear.input,), outputs, "", small))
        scales = np.abs(weights).max(axis=0) / 127
        scales = np.where(scales > 0, scales, 1).astype(np.float32)
        quantised, steps = f"{linear.weight}.s8", f"{linear.weight}.scale"
        self.tensors[quantised] = np.rint(weights / scales).astype(np.int8)
        self.tensors[steps] = scales
        inputs = [small, quantised, scale, steps, zero]
        if linear.bias is not None:
            inputs += ["", linear.bias]
        nodes.append(
            Node("MatMulIntegerToFloat", tuple(inputs), (linear.output,), MICROSOFT, linear.output)
        )
        self._put(linear, nodes)

    def block_product(self, linear: Linear, weights: Array) -> None:
        """Quantise input and weights [in, out] with one scale for each `BLOCK` numbers."""
        rows, columns = weights.shape
        blocks = weights.T.reshape(columns, rows // BLOCK, BLOCK)
        scales = np.abs(blocks).max(axis=2) / 127
        scales = np.where(scales > 0, scales, 1).astype(np.float32)
        quantised, steps = f"{linear.weight}.blocks", f"{linear.weight}.steps"
        # 128 is the zero that the operator assumes.
        self.tensors[quantised] = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
        self.tensors[steps] = scales
        inputs = [linear.input, quantised, steps]
        if linear.bias is not None:
            inputs += ["", "", linear.bias]
        attributes = {"K": rows, "N": columns, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        self._put(
            linear,
            [
                Node(
                    "MatMulNBits",
                    tuple(inputs),
                    (linear.output,),
                    MICROSOFT,
                    linear.output,
                    tuple(number(name, value) for name, value in attributes.items()),
                )
            ],
        )

    def _put(self, linear: Linear, nodes: list[Node]) -> None:
        """Put nodes in the place of a linear layer's."""
        self.edits[linear.place] = nodes
        if linear.end != linear.place:
            self.edits[linear.end] = []
