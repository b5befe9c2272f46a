"""What can be done to a linear layer's input inside the layer before it, so that it costs nothing.

The values of an attention are mixed over tokens alone, with weights that sum to 1: what their layer
does to channels of one head reaches the output's layer as it is. And what lies between a feed
forward's two layers treats each channel alike and apart, so these may change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.calibration.quantization.pieces import LinearGroup

Array = NDArray[Any]

_ALIKE: Final = frozenset({"Add", "Mul", "Sub", "Div", "Sigmoid", "Tanh", "Erf"})
_HEADS: Final = (0, 2, 1, 3)


@dataclass(frozen=True)
class InputSource:
    """The linear layer that makes the input of another.

    Attributes:
        weight: Name of its weights, [in, out].
        bias: Name of its bias, [out]; None for none.
        head: Channels of an attention's head; None for a feed forward's first layer.
    """

    weight: str
    bias: str | None
    head: int | None


def source_of(model: ir.Model, linear: LinearGroup) -> InputSource | None:
    """Return what makes a linear layer's input; None where nothing can be done there."""
    (node,) = (node for node in model.graph if node.name == linear.nodes[0])
    value = node.inputs[0]
    if value is None or len(linear.nodes) != 1 or len(value.uses()) != 1:
        return None
    return _values(value) or _hidden(value, node)


def _values(value: ir.Value) -> InputSource | None:
    """Return the layer of the values of an attention whose result this is."""
    mixed = _before(_before(value, "Reshape"), "Transpose")
    attention = None if mixed is None else mixed.producer()
    if attention is None or attention.op_type != "MatMul" or len(mixed.uses()) != 1:  # type: ignore[union-attr]
        return None
    weights, values = attention.inputs
    softmax = None if weights is None else weights.producer()
    if softmax is None or softmax.op_type != "Softmax":
        return None
    split = _before(values, "Transpose")
    flat = _before(split, "Reshape")
    shape = None if flat is None else split.producer().inputs[1]  # type: ignore[union-attr]
    numbers = None if shape is None else shape.const_value
    if flat is None or numbers is None or len(flat.uses()) != 1:
        return None
    return _linear(flat, int(numbers.numpy()[-1]))


def _before(value: ir.Value | None, kind: str) -> ir.Value | None:
    """Return what a Reshape or a Transpose of heads was made from, if nothing else reads it."""
    node = None if value is None or len(value.uses()) != 1 else value.producer()
    if node is None or node.op_type != kind:
        return None
    if kind == "Transpose" and tuple(node.attributes["perm"].as_ints()) != _HEADS:
        return None
    return node.inputs[0]


def _hidden(value: ir.Value, reader: ir.Node) -> InputSource | None:
    """Return the layer before an activation that treats all channels alike."""
    seen: dict[ir.Value, None] = {}
    start: ir.Value | None = None
    left = [value]
    while left:
        each = left.pop()
        if each in seen or each is start:
            continue
        node = each.producer()
        if node is None or each.is_graph_output():
            return None
        if _linear(each, None) is not None:
            if start is not None and start is not each:
                return None
            start = each
            continue
        if node.op_type not in _ALIKE:
            return None
        seen[each] = None
        left += [x for x in node.inputs if x is not None and not _scalar(x)]
    makers = {each.producer() for each in seen} | {reader}
    if start is None or start.is_graph_output():
        return None
    if any(use.node not in makers for each in (start, *seen) for use in each.uses()):
        return None
    return _linear(start, None)


def _scalar(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.size == 1


def _linear(value: ir.Value, head: int | None) -> InputSource | None:
    """Return the linear layer that ends with a value, if nothing else reads its weights."""
    node, bias = value.producer(), None
    if node is not None and node.op_type == "Add":
        for product, other in (node.inputs, node.inputs[::-1]):
            if other is not None and other.is_initializer() and len(other.shape or ()) == 1:
                node, bias = None if product is None else product.producer(), other
                break
        else:
            return None
    if node is None or node.op_type != "MatMul":
        return None
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
        return None
    if any(each is not None and len(each.uses()) != 1 for each in (weight, bias)):
        return None
    return InputSource(str(weight.name), None if bias is None else str(bias.name), head)


def hadamard(size: int) -> NDArray[np.float32]:
    """Return the normalised Hadamard matrix of a power of two, which is its own inverse.

    It spreads one large number over `size` channels (QuaRot, arXiv 2404.00456).
    """
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    normal: NDArray[np.float32] = (matrix / np.sqrt(size)).astype(np.float32)
    return normal


def rotated(array: Array, size: int, axis: int) -> Array:
    """Multiply blocks of `size` along an axis by a Hadamard matrix; float32."""
    moved = np.moveaxis(array.astype(np.float32, copy=False), axis, -1)
    blocks: Array = moved.reshape(*moved.shape[:-1], -1, size) @ hadamard(size)
    turned: NDArray[np.float32] = np.moveaxis(blocks.reshape(moved.shape), -1, axis)
    return turned


def powers(size: int, most: int) -> Iterator[int]:
    """Yield the powers of two from 4 to `most` that divide a size, the largest first."""
    block = most
    while block >= 4:
        if size % block == 0:
            yield block
        block //= 2
