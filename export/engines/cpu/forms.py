"""What a bundle's graph is rewritten to: ONNX Runtime's own attention, and products in 8 bits.

`vzip.export.engines.cpu.patterns` finds what is rewritten. A form of a graph in which nothing is
found is the graph itself, which `vzip.export.engines.cpu.choice` measures as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from vzip.export.engines.cpu.form_graph import Graph, Node, number
from vzip.export.engines.cpu.patterns import (
    MICROSOFT,
    Around,
    Linear,
    attention,
    gates,
    linears,
    norms,
)

Array = NDArray[Any]
Bits = Literal["tensor", "blocks"]

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


FORMS: Final = (
    Form("dynamic", "tensor", "tensor"),
    Form("mixed", "tensor", "blocks"),
    Form("blocks", "blocks", "blocks"),
    Form("fused", None, None),
)


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
    around = Around(graph, graph.makers(), graph.readers())
    places = {id(node): place for place, node in enumerate(graph.nodes)}
    edits = {}
    for node in graph.nodes:
        found = attention(around, node)
        if found is not None:
            last, fused = found
            edits[places[id(last)]] = [fused]
    return graph.edited(edits)


def _choosing(graph: Graph) -> set[str]:
    """Return the inputs of the linear layers that choose tokens: more than attention reads them."""
    fused = with_attention(graph)
    readers = fused.readers()
    read = {
        value
        for node in fused.nodes
        if node.operator == "MultiHeadAttention"
        for value in node.inputs
        if len(readers[value]) > 1
    }
    return {linear.input for linear in linears(graph) if linear.output in read}


def _taken(graph: Graph, form: Form) -> list[tuple[Linear, Bits]]:
    """Return the linear layers that a form has in 8 bits, and how."""
    normed, choosing, found = norms(graph), _choosing(graph), []
    for linear in linears(graph):
        if linear.input in choosing:
            continue
        bits = form.after_norm if linear.input in normed else form.others
        rows = (graph.shape(linear.weight) or (0,))[0]
        if bits is not None and (bits != "blocks" or rows % BLOCK == 0):
            found.append((linear, bits))
    return found


def _with_integers(graph: Graph, form: Form, factors: Mapping[str, Array]) -> Graph:
    """Return the graph with linear layers in 8 bits as a form has them.

    ONNX Runtime computes x · σ(x) more than three times as fast as x · σ(c x) (1.31 on AVX-512),
    so c goes into the weights around it: those before are multiplied by it, those after divided.
    """
    normed, taken, added = norms(graph), _taken(graph, form), _Added()
    places = {value: place for place, node in enumerate(graph.nodes) for value in node.outputs}
    times: dict[str, float] = {}  # result of a layer → the c of the gate after it
    over: dict[str, float] = {}  # and of the gate before it
    for gate in gates(graph, [linear for linear, _ in taken]):
        times[gate.before.output] = gate.c
        over.update((linear.output, gate.c) for linear in gate.after)
        added.edits[places[gate.scaled.outputs[0]]] = []
        unscaled = replace(gate.sigmoid, inputs=(gate.before.output,))
        added.edits[places[gate.sigmoid.outputs[0]]] = [unscaled]
    for linear, bits in taken:
        c = times.get(linear.output, 1.0)
        weights = graph.array(linear.weight) * np.float32(c / over.get(linear.output, 1.0))
        if linear.bias is not None and c != 1:
            bias = f"{linear.output}.bias"
            added.tensors[bias] = graph.array(linear.bias) * np.float32(c)
            linear = replace(linear, bias=bias)  # noqa: PLW2901
        factor = factors.get(linear.input) if linear.input in normed else None
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
        names = [f"{value}.gamma", f"{value}.beta"]  # not the old names: tensors may be shared
        for name, old in zip(names, node.inputs[1:], strict=True):
            self.tensors[name] = graph.array(old) / factor
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
        quantised, steps = f"{linear.output}.s8", f"{linear.output}.scale"
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
        quantised, steps = f"{linear.output}.blocks", f"{linear.output}.steps"
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
