"""What of a bundle's graph has another form: linear layers, norms, QuickGELU, attention.

Everything is found by its form, with conditions on every node of it; what doesn't meet them stays
as it is and is computed by the graph's own nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

ATTENTION: Final = "MultiHeadAttention"

_LEAST = 16  # rows and columns of weights that are worth an integer product


@dataclass(frozen=True)
class LinearMatch:
    """A product with constant weights, and the bias that is added to it, if there is one.

    Attributes:
        product: The MatMul.
        end: The node that makes the result: the Add of the bias, or the MatMul.
        weight: The weights, [in, out].
        bias: The bias, [out].
    """

    product: ir.Node
    end: ir.Node
    weight: ir.Value
    bias: ir.Value | None

    @property
    def input(self) -> ir.Value:
        """The value that is multiplied."""
        return _input(self.product, 0)

    @property
    def output(self) -> ir.Value:
        """The result."""
        return self.end.outputs[0]


def linears(graph: ir.Graph) -> list[LinearMatch]:
    """Return the linear layers of a graph in FP32, in its order."""
    found = []
    for node in graph:
        if not _is(node, "MatMul") or ir.convenience.get_const_tensor(_input(node, 0)) is not None:
            continue
        weight = _input(node, 1)
        shape = floats(weight)
        if shape is None or len(shape) != 2 or min(shape) < _LEAST:
            continue
        bias, end = None, node
        add = _only_reader(node.outputs[0], "Add")
        if add is not None:
            other = [each for each in add.inputs if each is not node.outputs[0]]
            if len(other) == 1 and other[0] is not None and floats(other[0]) == shape[1:]:
                bias, end = other[0], add
        found.append(LinearMatch(node, end, weight, bias))
    return found


def norms(graph: ir.Graph) -> dict[ir.Node, list[LinearMatch]]:
    """Return the LayerNorms with constant gamma and beta [in], whose results linear layers read.

    Returns:
        The norm → those layers, which alone read its result.
    """
    every, found = linears(graph), {}
    for node in graph:
        if not _is(node, "LayerNormalization") or len(node.inputs) != 3:
            continue
        output = node.outputs[0]
        fed = [each for each in every if each.input is output]
        constant = all(value is not None and floats(value) is not None for value in node.inputs[1:])
        alone = fed and len(fed) == len(output.consumers()) and not output.is_graph_output()
        if alone and constant:
            found[node] = fed
    return found


@dataclass(frozen=True)
class SigmoidGate:
    """QuickGELU, x · σ(c x), of what one linear layer makes and others alone read.

    Attributes:
        c: The constant, 1.702 in CLIP.
        scaled: The node that multiplies by it.
        sigmoid: The node after that.
        before: The layer that makes x.
        after: Those that read the result.
    """

    c: float
    scaled: ir.Node
    sigmoid: ir.Node
    before: LinearMatch
    after: tuple[LinearMatch, ...]


def gates(graph: ir.Graph, among: Sequence[LinearMatch]) -> list[SigmoidGate]:
    """Return the QuickGELUs between some of a graph's linear layers."""
    makers = {linear.output: linear for linear in among}
    found = []
    for sigmoid in graph:
        if not _is(sigmoid, "Sigmoid"):
            continue
        source, c = _scaled(_input(sigmoid, 0))
        gated = _only_reader(sigmoid.outputs[0], "Mul")
        if source not in makers or gated is None or not c:
            continue
        scaled, output = _input(sigmoid, 0).producer(), gated.outputs[0]
        assert scaled is not None  # it has a source
        after = tuple(linear for linear in among if linear.input is output)
        if (
            _only_reader(scaled.outputs[0], "Sigmoid") is not None
            and set(gated.inputs) == {source, sigmoid.outputs[0]}
            and len(source.consumers()) == 2
            and len(after) == len(output.consumers())
            and after
            and not (source.is_graph_output() or output.is_graph_output())
        ):
            found.append(SigmoidGate(c, scaled, sigmoid, makers[source], after))
    return found


@dataclass(frozen=True)
class Attention:
    """softmax((q · scale) kᵀ) v, with q, k and v split in heads by Reshape and Transpose.

    Attributes:
        queries: q, [b, n, heads · d], not yet scaled.
        keys: k, likewise.
        values: v, likewise.
        end: The Reshape that makes the result, [b, n, heads · d].
        heads: How many.
        scale: What the scores are multiplied by.
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    end: ir.Node
    heads: int
    scale: float


def attention(softmax: ir.Node) -> Attention | None:
    """Return the attention around a Softmax.

    Nothing of it is read elsewhere but by what chooses tokens, which keeps the nodes it reads.
    """
    if not _is(softmax, "Softmax") or softmax.attributes.get_int("axis", -1) not in {-1, 3}:
        return None
    scores = _maker(_input(softmax, 0), "MatMul")
    context = _only_reader(softmax.outputs[0], "MatMul")
    if scores is None or context is None or _input(context, 0) is not softmax.outputs[0]:
        return None
    queries, shape = _split(_input(scores, 0), (0, 2, 1, 3))
    keys, of_keys = _split(_input(scores, 1), (0, 2, 3, 1))
    values, of_values = _split(_input(context, 1), (0, 2, 1, 3))
    source, scale = (None, None) if queries is None else _scaled(queries)
    end = _joined(context.outputs[0])
    if source is None or keys is None or values is None or end is None or scale is None:
        return None
    if not shape == of_keys == of_values:
        return None
    flat, (heads, width) = _integers(_input(end, 1)), shape[2:]
    if min(heads, width) < 1 or len(flat) != 3 or flat[2] not in {-1, heads * width}:
        return None
    return Attention(source, keys, values, end, heads, scale)


def floats(value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of a constant of FP32 numbers; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    return tuple(tensor.shape.numpy())


def array(value: ir.Value) -> Array:
    """Return a constant's numbers."""
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None  # patterns ask for constants alone
    return tensor.numpy()


def _is(node: ir.Node, operator: str) -> bool:
    return node.op_type == operator and node.domain == ""


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None  # no operator here has inputs that can be left out
    return value


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    """Return the node that alone reads a value, if it is of this operator."""
    after = value.consumers()
    alone = len(after) == 1 and not value.is_graph_output()
    return after[0] if alone and _is(after[0], operator) else None


def _maker(value: ir.Value, operator: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of this operator."""
    node = value.producer()
    return node if node is not None and _is(node, operator) else None


def _split(value: ir.Value, perm: tuple[int, ...]) -> tuple[ir.Value | None, tuple[int, ...]]:
    """Return what was split in heads [b, n, heads, d] and transposed to this, and into what."""
    turned = _maker(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != perm:
        return None, ()
    shaped = _maker(_input(turned, 0), "Reshape")
    shape = () if shaped is None else _integers(_input(shaped, 1))
    return (_input(shaped, 0), shape) if shaped is not None and len(shape) == 4 else (None, ())


def _joined(value: ir.Value) -> ir.Node | None:
    """Return what joins the heads [b, heads, n, d] of a value to [b, n, heads · d] again."""
    turned = _only_reader(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    return _only_reader(turned.outputs[0], "Reshape")


def _scaled(value: ir.Value) -> tuple[ir.Value | None, float | None]:
    """Return what was multiplied by a constant number to this, and that number."""
    node = _maker(value, "Mul")
    if node is None:
        return None, None
    constants = [each for each in node.inputs if each is not None and floats(each) is not None]
    sources = [each for each in node.inputs if each not in constants]
    if len(constants) != 1 or len(sources) != 1 or floats(constants[0]) not in {(), (1,)}:
        return None, None
    return sources[0], float(array(constants[0]).reshape(-1)[0])


def _integers(value: ir.Value) -> tuple[int, ...]:
    """Return a constant list of int64; empty if it is none."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.INT64 or len(tensor.shape) != 1:
        return ()
    return tuple(tensor.numpy().tolist())


def choosing(graph: ir.Graph) -> set[ir.Value]:
    """Return what fused attention reads and something else reads too, which chooses tokens."""
    return {
        value
        for node in graph
        if node.op_type == ATTENTION
        for value in node.inputs
        if value is not None and len(value.consumers()) > 1
    }
