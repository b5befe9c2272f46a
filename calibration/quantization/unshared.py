"""Every linear layer and norm with initializers of its own, under the exporter's names.

The exporter stores small tensors that are equal once, under the name of the first: norms that were
never trained, biases of zero, equal weights. Quantisation changes the numbers of one layer and
knows layers by the names of their weights, so each gets its own again before anything is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

LINEAR: Final = re.compile(
    r"(layers\.\d+|projector)\.(q|k|v|out|fc1|fc2|linear_1|linear_2)\.weight"
)
"""What the exporter calls the weights of linear layers."""

_NORMS: Final = {"q": "norm1", "k": "norm1", "v": "norm1", "fc1": "norm2", "linear_1": "norm"}
_FOLLOWING: Final = {"q": "out", "k": "out", "v": "out", "out": "fc1", "fc1": "fc2"}


class OwnInitializers(ir.passes.InPlacePass):
    """Give each linear layer and norm that shares an initializer a copy under its own name.

    The copies share memory. The graph computes what it did.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Copy what has several users; the one it is named after keeps it."""
        graph, copied = model.graph, False
        for name, node, place in _owned(graph):
            value = node.inputs[place]
            assert value is not None
            if value.name != name and len(value.uses()) > 1:
                node.replace_input_with(place, _copy(graph, value, name))
                copied = True
        return ir.passes.PassResult(model, modified=copied)

    def ensures(self, model: ir.Model) -> None:
        """No weight, bias, gamma or beta is read twice."""
        for name, node, place in _owned(model.graph):
            value = node.inputs[place]
            if value is not None and len(value.uses()) > 1:
                raise ir.passes.PostconditionError(f"{name} shares {value.name}")


def _owned(graph: ir.Graph) -> list[tuple[str, ir.Node, int]]:
    """Return what the exporter calls each weight, bias, gamma and beta, and who reads it where."""
    found: list[tuple[str, ir.Node, int]] = []
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    for name, node in _linears(graph):
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        stem, _, part = name.rpartition(".")
        if maker in norms:
            norms.remove(maker)
            norm = f"{stem}.{_NORMS.get(part, 'norm')}"
            found += [(f"{norm}.weight", maker, 1), (f"{norm}.bias", maker, 2)]
        found.append((f"{name}.weight", node, 1))
        for use in node.outputs[0].uses():
            if use.node.op_type == "Add":
                found.append((f"{name}.bias", use.node, 1 - use.idx))
    for norm, node in zip(("pre_norm",), norms, strict=False):
        found += [(f"{norm}.weight", node, 1), (f"{norm}.bias", node, 2)]
    return [
        each
        for each in found
        if (value := each[1].inputs[each[2]]) is not None and value.is_initializer()
    ]


def _linears(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Yield each linear layer's name and MatMul, in the order in which they run.

    A weight's name is its layer's, unless a layer before has it: then the name follows from what
    ran before it and which input it has.
    """
    nodes = [
        (match, node)
        for node in graph
        if node.op_type == "MatMul"
        and (weight := node.inputs[1]) is not None
        and weight.is_initializer()
        and (match := LINEAR.fullmatch(weight.name or ""))
    ]
    readers: dict[ir.Value | None, list[str]] = {}
    for match, node in nodes:
        readers.setdefault(node.inputs[0], []).append(match[0].removesuffix(".weight"))
    taken: set[str] = set()
    layer, part, source = -1, "", None
    for match, node in nodes:
        name = match[0].removesuffix(".weight")
        if name in taken:
            beside = readers[node.inputs[0]]
            if part in ("q", "k", "v") and node.inputs[0] is source:
                name = _free(layer, beside, taken)
            elif part in _FOLLOWING:
                name = f"layers.{layer}.{_FOLLOWING[part]}"
            elif part == "fc2" and len(beside) > 1:
                name = _free(layer + 1, beside, taken)
            else:
                name = f"projector.linear_{1 if part == 'fc2' else 2}"
        taken.add(name)
        stem, _, part = name.rpartition(".")
        if stem.startswith("layers."):
            layer = int(stem.removeprefix("layers."))
        source = node.inputs[0]
        yield name, node


def _free(layer: int, beside: list[str], taken: set[str]) -> str:
    """Return the first of q, k and v that no other layer of the same input has."""
    names = [f"layers.{layer}.{part}" for part in "qkv"]
    return next(name for name in names if name not in taken and name not in beside)


def _copy(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return a new initializer with another's numbers."""
    while name in graph.initializers:
        name += ".own"
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(copy)
    return copy
