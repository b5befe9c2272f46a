"""Graph passes, each with the condition that holds after it.

The traced graph is close to what is wanted; these passes finish it. `ir.passes` enforces `requires`
before and `ensures` after every pass, so a change in the exporter shows up as an error here, not as
a slower or wrong engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import onnx_ir as ir
from onnx_ir.passes import common

from vzip.runtime.bundle import graph_check
from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS, graph_outputs

# How the encoder's parameters end that are FP16 in an FP16 graph.
WEIGHT_NAMES = (".weight", ".bias", ".kernel", ".positions")


def _fail(message: str) -> NoReturn:
    raise ir.passes.PostconditionError(message)


def _sizes(value: ir.Value) -> Sequence[int | ir.SymbolicDim]:
    if value.shape is None:
        _fail(f"{value.name} has no shape")
    return value.shape.dims


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """Return an input's value if it is known before the graph runs."""
    value = node.inputs[index]
    return None if value is None else ir.convenience.get_const_tensor(value)


class HideTokenWeights(ir.passes.InPlacePass):
    """Take the plan matrix out of the outputs; it stays in the graph under its name.

    A reader that wants the groups (an overlay, say) makes it an output again.
    """

    def __init__(self, *, ranked: bool = False) -> None:
        self.expected = list(graph_outputs(ranked=ranked))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the output named `token_weights`."""
        outputs = model.graph.outputs
        kept = [value for value in outputs if value.name != TOKEN_WEIGHTS]
        modified = len(kept) != len(outputs)
        outputs[:] = kept
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """The promised outputs, and one value of that name inside."""
        names = [value.name for value in model.graph.outputs]
        if names != self.expected:
            _fail(f"outputs are {names}; expected {self.expected}")
        inside = [v.name for node in model.graph for v in node.outputs if v.name == TOKEN_WEIGHTS]
        if len(inside) != 1:
            _fail(f"{len(inside)} values are named {TOKEN_WEIGHTS}; expected one")


class PlainReshape(ir.passes.InPlacePass):
    """Drop `allowzero` where no dimension is zero: older parsers need not know the attribute."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the attribute from every Reshape with a constant shape without zeros."""
        modified = False
        for node in model.graph:
            if node.op_type == "Reshape" and "allowzero" in node.attributes:
                del node.attributes["allowzero"]
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """Every Reshape has a constant shape of which at most the batch is open."""
        for node in model.graph:
            if node.op_type != "Reshape":
                continue
            shape = _constant(node, 1)
            if shape is None:
                _fail(f"{node.name}: the shape of a Reshape is computed at run time")
            batch, *sizes = shape.numpy().tolist()
            if batch == 0 or any(size < 1 for size in sizes):
                _fail(f"{node.name}: Reshape to {[batch, *sizes]} leaves an axis open")


class LowerToOpset17(ir.passes.InPlacePass):
    """Rewrite what changed between opset 17 and 18, for TensorRT 8.6.

    torch.onnx exports opset 18 at the least, and onnx's version converter has no step back for Pad.
    Of the operators allowed here two changed: ReduceMax took its axes as an attribute, and Pad had
    no axes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Turn the axes of ReduceMax into an attribute."""
        for node in model.graph:
            if node.op_type == "ReduceMax" and len(node.inputs) == 2:
                axes = _constant(node, 1)
                if axes is None:
                    _fail(f"{node.name}: the axes of ReduceMax are computed at run time")
                node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
                node.resize_inputs(1)
        model.opset_imports[""] = 17
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No node has an input that opset 17 does not know."""
        for node in model.graph:
            known = {"ReduceMax": 1, "Pad": 3}.get(node.op_type)
            if known is not None and len(node.inputs) > known:
                _fail(f"{node.name}: {node.op_type} has {len(node.inputs)} inputs in opset 17")


class Anonymise(common.ClearMetadataAndDocStringPass):
    """Remove stack traces and paths of the exporting machine: same input, same bytes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear what the base pass clears, and what the model and its values carry."""
        super().call(model)
        graph = model.graph
        values = [value for node in graph for value in node.outputs]
        owners: list[ir.Model | ir.Value] = [model, *graph.inputs, *values]
        for owner in [*owners, *graph.initializers.values()]:
            owner.metadata_props.clear()
            owner.doc_string = None
        graph.name, model.producer_name, model.producer_version = "vzip", "vzip", None
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No node or value carries metadata."""
        for node in model.graph:
            owners: list[ir.Node | ir.Value] = [node, *node.outputs]
            if any(owner.metadata_props or owner.doc_string for owner in owners):
                _fail(f"{node.name} still carries metadata")


class Promises(ir.passes.InPlacePass):
    """No edit: check what `docs/bundle.md` promises of every graph."""

    def __init__(self, *, opset: int, softmaxes: int, norms: int, half: bool) -> None:
        self.opset, self.softmaxes, self.norms, self.half = opset, softmaxes, norms, half

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave the model as it is."""
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        """Opset, operators, static shapes, fusable attention, LayerNormalization, weights' type."""
        if dict(model.opset_imports) != {"": self.opset}:
            _fail(f"opset imports are {dict(model.opset_imports)}; expected {self.opset} alone")
        operators = {node.op_type for node in model.graph}
        if others := sorted(operators - graph_check.EXPORTED):
            _fail(f"operators {others} are not allowed")
        for node in model.graph:
            for value in node.outputs:
                self._check_shape(value)
        norms = sum(node.op_type == "LayerNormalization" for node in model.graph)
        if norms != self.norms:
            _fail(f"{norms} LayerNormalization; expected {self.norms}, one a norm of the model")
        softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
        if len(softmaxes) != self.softmaxes:
            _fail(
                f"{len(softmaxes)} Softmax; expected {self.softmaxes}, one a layer and one for the "
                "scores where they come from attention"
            )
        for node in softmaxes:
            if len(node.outputs[0].uses()) != 1:
                _fail(f"{node.name}: a second consumer of the softmax breaks fused attention")
        if self.half:
            # By name: the small constants of the FP32 side branch have none of the module's.
            wide = [
                name
                for name, value in model.graph.initializers.items()
                if value.dtype == ir.DataType.FLOAT and name.endswith(WEIGHT_NAMES)
            ]
            if wide:
                _fail(f"weights {wide[:3]} are FP32 in an FP16 graph")

    @staticmethod
    def _check_shape(value: ir.Value) -> None:
        if any(not isinstance(size, int) for size in _sizes(value)[1:]):
            _fail(f"{value.name} has shape {value.shape}: only the batch axis may be open")
