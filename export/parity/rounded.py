"""A graph in true half precision, on a CPU: every operator computes in FP32 and rounds once.

ONNX Runtime's CPU runs an FP16 graph in FP32: it puts Casts round each operator and takes away
those that meet, so its result says nothing of what FP16 costs. Here the graph itself says where
numbers are rounded, in FP32 with a Cast to the narrow type and back behind every operator, and no
optimiser runs. Sums are FP32 inside an operator, and what it gives is rounded once: what a strongly
typed TensorRT network says, whatever it fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from vzip.export.graph.reading import read_graph
from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu
from vzip.runtime.bundle.reader import Bundle

WIDE: Final = ir.DataType.FLOAT

# What only moves numbers has none to round.
_EXACT: Final = frozenset(
    {
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def open_rounded(
    bundle: Bundle,
    extra_outputs: tuple[str, ...] = (),
    *,
    narrow: ir.DataType = ir.DataType.FLOAT16,
) -> OnnxRuntimeCpu:
    """Open a bundle's own graph so that it computes in true half precision; see `rounded`."""
    model = rounded(read_graph(bundle, "a run in half precision"), narrow)
    data = ir.to_proto(model).SerializeToString()
    return OnnxRuntimeCpu.of_model(data, bundle.weights_folder, extra_outputs, optimised=False)


def rounded(model: ir.Model, narrow: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """Rewrite a graph in place so that it computes in FP32 and rounds behind every operator.

    Args:
        model: Its values of type `narrow` become FP32 ones that `narrow` can hold. With BFLOAT16 it
            is an FP32 graph, and all of its FP32 values are rounded, its weights too.
        narrow: FLOAT16 or BFLOAT16.

    Returns:
        The model, with the same inputs and outputs.
    """
    graph = model.graph
    typed = narrow if narrow == ir.DataType.FLOAT16 else WIDE
    nodes = list(graph)
    narrow_outputs = [place for place, each in enumerate(graph.outputs) if each.dtype == narrow]
    for value in list(graph.initializers.values()):
        if value.dtype == typed:
            casts = _casts(value, (WIDE,) if typed == narrow else (narrow, WIDE))
            graph.insert_before(graph[0], casts)
            _replace(value, casts, graph)
    for node in nodes:
        if node.op_type == "Cast" and node.outputs[0].dtype == narrow:
            node.attributes["to"] = ir.AttrInt64("to", int(WIDE))
        for output in node.outputs:
            if output.dtype != typed:
                continue
            output.dtype = WIDE
            if node.op_type not in _EXACT:
                casts = _casts(output, (narrow, WIDE))
                graph.insert_after(node, casts)
                _replace(output, casts, graph)
    for place in narrow_outputs:
        output = graph.outputs[place]
        casts = _casts(output, (narrow,))
        graph.append(casts[0])
        graph.outputs[place] = casts[0].outputs[0]
        named, output.name = output.name, f"{output.name}.wide"
        graph.outputs[place].name = named
    return model


def _casts(value: ir.Value, dtypes: Sequence[ir.DataType]) -> list[ir.Node]:
    """Return Casts of a value, one after the other."""
    casts: list[ir.Node] = []
    for dtype in dtypes:
        cast = ir.node("Cast", [value], {"to": int(dtype)})
        cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
        value = cast.outputs[0]
        casts.append(cast)
    return casts


def _replace(value: ir.Value, casts: Sequence[ir.Node], graph: ir.Graph) -> None:
    """Let all that reads a value read what Casts make of it."""
    made = casts[-1].outputs[0]
    for user, place in list(value.uses()):
        if user is not casts[0]:
            user.replace_input_with(place, made)
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = made
            named, value.name = value.name, f"{value.name}.exact"
            made.name = named
