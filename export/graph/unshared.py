"""A bundle's graph in which every layer has nodes and initializers of its own, rightly named.

The exporter stores small tensors that are equal once, under the name of the first: norms that were
never trained, biases of zero, equal weights. Linear layers that then compute the same, such as q
and k of equal weights, become one. Whoever changes the numbers of one layer, or knows layers by the
names of their weights, takes the graph from here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from vzip.export.graph.reading import read_graph

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle

LINEAR: Final = re.compile(
    r"(layers\.\d+|projector)\.(q|k|v|out|fc1|fc2|linear_1|linear_2)\.weight"
)
"""What the exporter calls the weights of linear layers."""

_NORM_BEFORE: Final = {"q": "norm1", "fc1": "norm2", "linear_1": "norm"}
_BETWEEN: Final = frozenset({"Reshape", "Transpose", "Mul", "Cast"})
"""What lies between a linear layer and the attention that it feeds."""


def read_own_graph(bundle: Bundle, needed_for: str, extra: str = "export") -> ir.Model:
    """Return the graph that a bundle runs, its layers apart; as `read_graph`."""
    return OwnLayers()(read_graph(bundle, needed_for, extra)).model


class OwnLayers(ir.passes.InPlacePass):
    """Give each linear layer, norm and the patch embedding its own nodes and initializers.

    The copies share memory. The graph computes what it did. One that isn't the exporter's own in
    all of its linear layers, such as a quantised one, stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Part what became one; of several users of an initializer its namesake keeps it."""
        if not _is_the_exporters(model.graph):
            return ir.passes.PassResult(model, modified=False)
        parted = _part(model.graph)
        copied = False
        for name, node, place in _owned(model.graph):
            value = node.inputs[place]
            assert value is not None
            if value.name != name:
                node.replace_input_with(place, _copy(model.graph, value, name))
                if not value.uses() and not value.is_graph_output():
                    model.graph.initializers.pop(str(value.name))
                copied = True
        return ir.passes.PassResult(model, modified=parted or copied)

    def ensures(self, model: ir.Model) -> None:
        """Nothing that a layer owns is read twice, or has another name."""
        if not _is_the_exporters(model.graph):
            return
        for name, node, place in _owned(model.graph):
            value = node.inputs[place]
            if value is not None and (value.name != name or len(value.uses()) > 1):
                raise ir.passes.PostconditionError(f"{name} is {value.name}")


@dataclass(frozen=True)
class _Head:
    """How a linear layer reaches an attention.

    Attributes:
        chain: The nodes from its MatMul to the last before the attention's own MatMul.
        reader: That MatMul.
        place: Which input of it.
    """

    chain: tuple[ir.Node, ...]
    reader: ir.Node
    place: int


def _attentions(graph: ir.Graph) -> list[tuple[_Head, _Head, _Head]]:
    """Return what gives each layer's attention its queries, keys and values, in their order."""
    found = []
    for softmax in graph:
        if softmax.op_type != "Softmax":
            continue
        after = softmax.outputs[0].consumers()
        source = softmax.inputs[0]
        scores = None if source is None else source.producer()
        # The scores of tokens come from another Softmax, whose result no MatMul takes first.
        if (
            len(after) != 1
            or after[0].op_type != "MatMul"
            or after[0].inputs[0] is not softmax.outputs[0]
            or scores is None
            or scores.op_type != "MatMul"
        ):
            continue
        queries, keys, values = _head(scores, 0), _head(scores, 1), _head(after[0], 1)
        if queries and keys and values:
            found.append((queries, keys, values))
    return found


def _head(reader: ir.Node, place: int) -> _Head | None:
    chain: list[ir.Node] = []
    value = reader.inputs[place]
    while value is not None and (node := value.producer()) is not None:
        chain.insert(0, node)
        if _is_linear(node):
            return _Head(tuple(chain), reader, place)
        if node.op_type not in _BETWEEN and node.op_type != "Add":
            return None
        made = [each for each in node.inputs if each is not None and each.producer() is not None]
        value = made[0] if len(made) == 1 else None
    return None


def _is_linear(node: ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or not weight.is_initializer():
        return False
    return LINEAR.fullmatch(weight.name or "") is not None


def _is_the_exporters(graph: ir.Graph) -> bool:
    """Return whether the linear layers are those that `_linears` names: three for an attention."""
    attentions = _attentions(graph)
    heads = {head.chain[0] for each in attentions for head in each}
    others = [node for node in graph if _is_linear(node) and node not in heads]
    return bool(attentions) and len(others) == 3 * len(attentions) + 2


def _part(graph: ir.Graph) -> bool:
    """Give each of queries, keys and values the nodes that two of them have in common."""
    parted = False
    for heads in _attentions(graph):
        latest: dict[ir.Node, ir.Node] = {}  # node → itself, or its last copy: q, k, v is the order
        for part, head in zip("qkv", heads, strict=True):
            if head.chain[0] in latest:
                _clone(graph, head, part, latest)
                parted = True
            latest.update((node, node) for node in head.chain if node not in latest)
    return parted


def _clone(graph: ir.Graph, head: _Head, part: str, latest: dict[ir.Node, ir.Node]) -> None:
    """Copy a head's chain, each node behind its latest copy, and let its reader read that."""
    copies: dict[ir.Value | None, ir.Value] = {}
    for node in head.chain:
        old = node.outputs[0]
        new = ir.Value(name=f"{old.name}.{part}", shape=old.shape, type=old.type)
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if each is None else copies.get(each, each) for each in node.inputs],
            node.attributes.values(),
            outputs=[new],
            name=f"{node.name}.{part}",
        )
        graph.insert_after(latest.get(node, node), copy)
        latest[node] = copy
        copies[old] = new
    head.reader.replace_input_with(head.place, copies[head.chain[-1].outputs[0]])


def _linears(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """Yield each linear layer's name and MatMul, in the order in which they run.

    Those that feed no attention wait for each other, so that their order is the module's.
    """
    attentions = _attentions(graph)
    names = {
        head.chain[0]: f"layers.{layer}.{part}"
        for layer, heads in enumerate(attentions)
        for part, head in zip("qkv", heads, strict=True)
    }
    others = [
        *(f"layers.{n}.{part}" for n in range(len(attentions)) for part in ("out", "fc1", "fc2")),
        "projector.linear_1",
        "projector.linear_2",
    ]
    left = iter(others)
    for node in graph:
        if _is_linear(node):
            yield names[node] if node in names else next(left), node


def _owned(graph: ir.Graph) -> list[tuple[str, ir.Node, int]]:
    """Return what the exporter calls each weight, bias, gamma and beta, and who reads it where."""
    found: list[tuple[str, ir.Node, int]] = []
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    for name, node in _linears(graph):
        source = node.inputs[0]
        maker = None if source is None else source.producer()
        stem, _, part = name.rpartition(".")
        if maker in norms and part in _NORM_BEFORE:
            norms.remove(maker)
            norm = f"{stem}.{_NORM_BEFORE[part]}"
            found += [(f"{norm}.weight", maker, 1), (f"{norm}.bias", maker, 2)]
        found.append((f"{name}.weight", node, 1))
        for use in node.outputs[0].uses():
            if use.node.op_type == "Add":
                found.append((f"{name}.bias", use.node, 1 - use.idx))
    for norm, node in zip(("pre_norm",), norms, strict=False):
        found += [(f"{norm}.weight", node, 1), (f"{norm}.bias", node, 2)]
    for node in graph:
        if node.op_type == "Conv":
            parts = ((1, "embedding.kernel"), (2, "embedding.bias"))
            found += [(name, node, place) for place, name in parts if place < len(node.inputs)]
    return [
        each
        for each in found
        if (value := each[1].inputs[each[2]]) is not None and value.is_initializer()
    ]


def _copy(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return an initializer of a name with another's numbers.

    Who has the name without owning it gets another one: its owner comes later.
    """
    if (held := graph.initializers.get(name)) is not None:
        taken = (f"{name}.{number}" for number in itertools.count(1))
        held.name = next(each for each in taken if each not in graph.initializers)
    copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(copy)
    return copy
