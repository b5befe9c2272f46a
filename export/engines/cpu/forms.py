"""What a bundle's graph is rewritten to: ONNX Runtime's own attention, and products in 8 bits.

`vzip.export.engines.cpu.patterns` finds what is rewritten. A form of a graph in which nothing is
found is the graph itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NoReturn

import onnx_ir as ir
from onnx_ir.passes import common

from vzip.export.engines.cpu import products
from vzip.export.engines.cpu.patterns import (
    ATTENTION,
    LinearMatch,
    attention,
    choosing,
    floats,
    gates,
    linears,
    norms,
)
from vzip.export.engines.cpu.products import (
    MICROSOFT,
    Bits,
    Learnt,
    Products,
    extents,
    name_of,
    replace,
)


@dataclass(frozen=True)
class Form:
    """How the linear layers of a graph are computed; attention is fused in any case.

    Attributes:
        name: For records and messages.
        after_norm: How those are that a LayerNorm feeds, whose input can be smoothed: ``tensor``
            (inputs quantised with one scale per call, weights with one per output), ``tokens``
            (inputs rotated and quantised with one scale per token, weights with one per output),
            ``blocks`` (both with one for each `BLOCK` numbers of a row), or None for FP32.
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


_AXES_ARE_INPUTS: Final = 18
"""Opset from which on ReduceMax takes its axes as an input."""

FORMS: Final = (
    Form("tokens", "tokens", "tokens"),
    Form("dynamic", "tensor", "tensor"),
    Form("mixed", "tensor", "blocks"),
    Form("blocks", "blocks", "blocks"),
    Form("fused", None, None),
)


def rewrite(model: ir.Model, form: Form, learnt: Learnt) -> bool:
    """Give a graph a form, in place; its inputs and outputs stay what they are.

    Args:
        model: The bundle's graph.
        form: Which.
        learnt: For this graph.

    Returns:
        Whether anything of the form was found in it.
    """
    fused = FuseAttention()(model).modified
    return EightBits(form, learnt)(model).modified or fused


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
            replace(graph, [found.end], [fused])
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
        learnt: As `rewrite` takes it.
    """

    def __init__(self, form: Form, learnt: Learnt) -> None:
        self.form, self.learnt = form, learnt

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the nodes of each layer; see the class."""
        graph = model.graph
        taken = self._taken(graph)
        normed = {name_of(norm.outputs[0]): norm for norm in norms(graph)}
        times: dict[str, float] = {}  # result of a layer → the c of the gate after it
        over: dict[str, float] = {}  # and of the gate before it
        for gate in gates(graph, [linear for linear, _ in taken]):
            times[name_of(gate.before.output)] = gate.c
            over.update((name_of(linear.output), gate.c) for linear in gate.after)
            gate.sigmoid.replace_input_with(0, gate.before.output)
        inputs = (model.opset_imports.get("") or 0) >= _AXES_ARE_INPUTS
        put = Products(graph, normed, self.learnt, axes_are_inputs=inputs)
        for linear, bits in taken:
            name = name_of(linear.output)
            before, after = over.get(name, 1.0), times.get(name, 1.0)
            put.replace(linear, bits, before=before, after=after)
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
            fits = bits != "blocks" or rows % products.BLOCK == 0
            if bits is not None and fits and (bits != "tokens" or extents(linear.input)):
                found.append((linear, bits))
        return found


def _cleaned(model: ir.Model, modified: bool) -> ir.passes.PassResult:
    """Remove what leads nowhere any more, and say which operators there are."""
    if modified:
        model.graph.opset_imports[MICROSOFT] = 1
        common.RemoveUnusedNodesPass()(model)
    return ir.passes.PassResult(model, modified=modified)


def _fail(message: str) -> NoReturn:
    raise ir.passes.PostconditionError(message)
