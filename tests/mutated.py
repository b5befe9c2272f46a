"""Graphs that are wrong in one place: what a check must refuse, whatever the tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.export.graph.reading import read_graph
from vzip.export.graph.trace import save
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.bundle.writer import bundle_writer

Array = NDArray[Any]


def mutated(bundle: Bundle, folder: Path, change: Callable[[ir.Graph], None]) -> Bundle:
    """Return a copy of a bundle whose graph was changed."""
    model = read_graph(bundle, "a test")
    change(model.graph)
    for value in model.graph.initializers.values():  # the file is mapped, and written elsewhere
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    with bundle_writer(folder) as writer:
        for name in bundle.manifest.files:
            if not name.startswith("model.onnx"):
                (writer.folder / name).write_bytes((bundle.path / name).read_bytes())
        save(model, writer.folder)
        return writer.publish(bundle.manifest)


def _weight(graph: ir.Graph, name: str, change: Callable[[Array], None]) -> None:
    value = graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=name)


def _layer(graph: ir.Graph) -> int:
    """Return a layer in the middle."""
    return sum(name.endswith(".fc1.weight") for name in graph.initializers) // 2


def _heads(graph: ir.Graph) -> int:
    attention = next(node for node in graph if node.op_type == "Softmax")
    shape = attention.outputs[0].shape
    assert shape is not None
    return int(shape[1])  # type: ignore[arg-type]


def one_layer(graph: ir.Graph) -> None:
    """A layer's MLP gives 1 % less."""
    _weight(graph, f"layers.{_layer(graph)}.fc2.weight", lambda w: np.multiply(w, 0.99, out=w))


def one_head(graph: ir.Graph) -> None:
    """The values of one head of one layer are nothing."""
    width = graph.initializers[f"layers.{_layer(graph)}.v.weight"].shape[1] // _heads(graph)  # type: ignore[index, operator]

    def change(w: Array) -> None:
        w[:, width : 2 * width] = 0

    _weight(graph, f"layers.{_layer(graph)}.v.weight", change)


def one_channel(graph: ir.Graph) -> None:
    """One output channel of fc1 has the weights of its neighbour."""

    def change(w: Array) -> None:
        w[:, 3] = w[:, 4]

    _weight(graph, f"layers.{_layer(graph)}.fc1.weight", change)


def one_position(graph: ir.Graph) -> None:
    """Two tokens have each other's position."""

    def change(w: Array) -> None:
        w[0, [5, 6]] = w[0, [6, 5]]

    _weight(graph, "embedding.positions", change)


def one_bias(graph: ir.Graph) -> None:
    """One linear layer has no bias."""
    weight = graph.initializers[f"layers.{_layer(graph)}.fc1.weight"]
    (product,) = (user for user, _ in weight.uses())
    (add,) = (user for user, _ in product.outputs[0].uses())
    place = 0 if add.inputs[0] is not product.outputs[0] else 1
    bias = add.inputs[place]
    assert add.op_type == "Add"
    assert bias is not None
    assert bias.const_value is not None
    none = ir.Value(name="no_bias", const_value=ir.tensor(np.zeros_like(bias.const_value.numpy())))
    none.dtype, none.shape = bias.dtype, bias.shape
    none.const_value.name = "no_bias"  # type: ignore[union-attr]
    graph.register_initializer(none)
    add.replace_input_with(place, none)


def one_epsilon(graph: ir.Graph) -> None:
    """One LayerNorm adds another epsilon."""
    norm = [node for node in graph if node.op_type == "LayerNormalization"][_layer(graph) * 2]
    epsilon = norm.attributes["epsilon"].as_float()
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10 * epsilon)


def token_order(graph: ir.Graph) -> None:
    """The patches come column by column: the positions are those of the grid turned over."""

    def change(w: Array) -> None:
        first = w.shape[1] % 2 if int(np.sqrt(w.shape[1])) ** 2 != w.shape[1] else 0
        side = int(np.sqrt(w.shape[1] - first))
        patches = w[:, first:].reshape(1, side, side, -1)
        w[:, first:] = patches.transpose(0, 2, 1, 3).reshape(1, side * side, -1)

    _weight(graph, "embedding.positions", change)


FP32: Mapping[str, Callable[[ir.Graph], None]] = {
    each.__name__: each
    for each in (
        one_layer,
        one_head,
        one_channel,
        one_position,
        one_bias,
        one_epsilon,
        token_order,
    )
}
FP16: Mapping[str, Callable[[ir.Graph], None]] = {
    # One per cent of one layer, one channel of 3072 or an epsilon is less than FP16's own rounding.
    each.__name__: each
    for each in (one_head, one_position, one_bias, token_order)
}
