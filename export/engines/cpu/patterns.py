"""What of a bundle's graph has another form: linear layers, norms, QuickGELU, attention.

Everything is found by its form, with conditions on every node of it; what doesn't meet them stays
as it is and is computed by the graph's own nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vzip.export.engines.cpu.form_graph import Graph, Node, number

MICROSOFT: Final = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_LEAST = 16  # rows and columns of weights that are worth an integer product


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
        alone = fed and len(fed) == len(readers[output]) and output not in graph.outputs
        if alone and constant:
            found[output] = (node, fed)
    return found


@dataclass(frozen=True)
class Gate:
    """QuickGELU, x · σ(c x), of what one linear layer makes and others alone read.

    Attributes:
        c: The constant, 1.702 in CLIP.
        scaled: The node that multiplies by it.
        sigmoid: The node after that.
        before: The layer that makes x.
        after: Those that read the result.
    """

    c: float
    scaled: Node
    sigmoid: Node
    before: Linear
    after: tuple[Linear, ...]


def gates(graph: Graph, among: Sequence[Linear]) -> list[Gate]:
    """Return the QuickGELUs between some of a graph's linear layers."""
    around = Around(graph, graph.makers(), graph.readers())
    makers = {linear.output: linear for linear in among}
    found = []
    for sigmoid in graph.nodes:
        if sigmoid.operator != "Sigmoid":
            continue
        source, c = around.scaled(sigmoid.inputs[0])
        gated = around.only(sigmoid.outputs[0], "Mul")
        if source not in makers or gated is None or not c:
            continue
        scaled, output = around.makers[sigmoid.inputs[0]], gated.outputs[0]
        after = tuple(linear for linear in among if linear.input == output)
        if (
            around.only(scaled.outputs[0], "Sigmoid") is not None
            and set(gated.inputs) == {source, sigmoid.outputs[0]}
            and len(around.readers[source]) == 2
            and len(after) == len(around.readers.get(output, ()))
            and after
            and not {source, output} & set(graph.outputs)
        ):
            found.append(Gate(c, scaled, sigmoid, makers[source], after))
    return found


def attention(around: Around, softmax: Node) -> tuple[Node, Node] | None:
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


@dataclass(frozen=True)
class Around:
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


def _ints(graph: Graph, name: str) -> tuple[int, ...]:
    """Return a constant list of int64; empty if it is none."""
    if name not in graph.tensors:
        return ()
    array = graph.array(name)
    return tuple(array.tolist()) if array.dtype == np.int64 and array.ndim == 1 else ()
