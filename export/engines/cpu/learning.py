"""What forms need to know of a graph, from runs of ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.export.engines.cpu.patterns import array, linears, norms
from vzip.export.engines.cpu.products import Learnt, name_of
from vzip.export.graph import smooth
from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu
from vzip.runtime.bundle.reader import Bundle

Array = NDArray[Any]

ALPHA: Final = 0.5
"""Share of the outliers that smoothing moves to the weights, SmoothQuant's own default."""
_MEAN, _MOST = ".mean.over.all", ".most.of.all"


def learn(bundle: Bundle, graph: ir.Model, pictures: Array) -> Learnt:
    """Return what the forms of a bundle's graph need.

    Args:
        bundle: The bundle.
        graph: Its graph.
        pictures: The graph's input, [n, …].
    """
    means, most = _statistics(bundle, graph, pictures)
    factors = {}
    for norm, fed in norms(graph.graph).items():
        value = name_of(norm.outputs[0])
        factors[value] = smooth.factors(most[value], [array(each.weight) for each in fed], ALPHA)
    return Learnt(factors, means)


def varied(pictures: Array, *, channels_last: bool) -> Array:
    """Return pictures, and of each its mirror image and its four quarters at twice their size.

    A bundle has four pictures, and means over so few lean towards what they show.

    Args:
        pictures: [n, H, W, 3] or [n, 3, H, W].
        channels_last: Which of the two.

    Returns:
        [6 n, …], those given first.
    """
    rows, columns = (1, 2) if channels_last else (2, 3)
    height, width = pictures.shape[rows], pictures.shape[columns]
    found = [pictures, np.flip(pictures, columns)]
    for top in (0, height - (height + 1) // 2):
        for left in (0, width - (width + 1) // 2):
            down = top + np.arange(height) // 2
            right = left + np.arange(width) // 2
            found.append(pictures.take(down, rows).take(right, columns))
    return np.concatenate(found)


def _statistics(
    bundle: Bundle, graph: ir.Model, pictures: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return of what linear layers read each channel's mean and its largest magnitude."""
    names = list(dict.fromkeys(name_of(each.input) for each in linears(graph.graph)))
    if not names:
        return {}, {}
    watched = graph.clone()
    _watch(watched, names)
    model = ir.to_proto(watched).SerializeToString()
    sums: dict[str, Array] = {}
    most: dict[str, Array] = {}
    calls = 0
    with contextlib.closing(OnnxRuntimeCpu.of_model(model, bundle.weights_folder)) as opened:
        for images in batches(bundle, pictures):
            results = opened.run({bundle.manifest.input.name: images})
            calls += 1
            for name in names:
                sums[name] = sums.get(name, 0) + results[f"{name}{_MEAN}"].astype(np.float64)
                most[name] = np.maximum(most.get(name, 0), results[f"{name}{_MOST}"])
    return {name: (each / calls).astype(np.float32) for name, each in sums.items()}, most


def batches(bundle: Bundle, pictures: Array) -> Iterable[Array]:
    """Yield pictures in the smallest calls; the last one starts over with the first."""
    rows = 1 if bundle.manifest.batch.dynamic else bundle.manifest.batch.max
    for start in range(0, len(pictures), rows):
        chosen = np.arange(start, start + rows) % len(pictures)
        yield np.ascontiguousarray(pictures[chosen])


def _watch(model: ir.Model, names: list[str]) -> None:
    """Make the mean and the largest magnitude of values, over all axes but the last, outputs."""
    graph, found = model.graph, set(names)
    values = {v.name: v for node in graph for v in node.outputs if v.name in found}
    for name in names:
        value = values[name]
        size = ir.node("Abs", (value,))
        rank = len(value.shape or (0, 0, 0))
        axes = list(range(rank - 1))
        for source, operator, kind in (
            (value, "ReduceMean", _MEAN), (size.outputs[0], "ReduceMax", _MOST)
        ):  # fmt: skip
            inputs: tuple[ir.Value, ...] = (source,)
            attributes: dict[str, Any] = {"axes": axes, "keepdims": 0}
            if (model.opset_imports.get("") or 0) >= 18:
                held = ir.Value(
                    name=f"{name}{kind}.axes", const_value=ir.tensor(np.array(axes, np.int64))
                )
                graph.register_initializer(held)
                inputs, attributes = (source, held), {"keepdims": 0}
            node = ir.node(operator, inputs, attributes)
            if operator == "ReduceMax":
                graph.append(size)
            graph.append(node)
            made = node.outputs[0]
            made.name, made.type = f"{name}{kind}", ir.TensorType(ir.DataType.FLOAT)
            made.shape = ir.Shape([value.shape[-1] if value.shape else None])
            graph.outputs.append(made)
