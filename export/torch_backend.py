"""PyTorch as a second opinion: the same graph, node by node, by another library's kernels.

Not a fast backend and not meant to be one: what it shares with ONNX Runtime is the file and nothing
else, so a result that both agree on is not one runtime's defect. It needs torch and onnx, and takes
the GPU where there is one. Any value of the graph can be had from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, missing


@dataclass(frozen=True)
class _Step:
    """One node: its function, where its inputs come from, and what is not needed after it."""

    function: Callable[..., Any]
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    dropped: tuple[str, ...]


class PyTorch:
    """An interpreter of a bundle's graph; see `Backend`.

    Attributes:
        name: The backend's name.
        device: ``cuda`` where PyTorch can use a GPU, ``cpu`` elsewhere.
    """

    name = "pytorch"
    engine: str | None = None

    def __init__(self, bundle: Bundle, extra_outputs: tuple[str, ...] = ()) -> None:
        try:
            import onnx
            import torch
        except ImportError as error:
            package = error.name or "torch"
            raise missing(package, needed_for="the backend 'pytorch'", extra="export") from error
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        graph = onnx.load_model_from_string(bundle.read_model()).graph
        self._dtypes = {
            value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in graph.input
        }
        self._outputs = (*(output.name for output in graph.output), *extra_outputs)
        made = {name for node in graph.node for name in node.output}
        if unknown := set(self._outputs) - made:
            raise BackendError(
                f"the graph has no value {sorted(unknown)}",
                expected="it among its nodes' outputs",
                cause="it was made by another version",
                cure="export the bundle again",
            )
        weights = _weights(bundle.data_path)
        constants = {tensor.name: _tensor(tensor, weights) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = _constant(node, weights)
        self._constants = {name: value.to(self.device) for name, value in constants.items()}
        self._steps: tuple[_Step, ...] | None = _plan(graph, {*self._outputs, *constants}, weights)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
        """See `Backend.run`."""
        import torch

        steps = self._steps  # another thread may close: this one then still ends its run
        constants = self._constants
        if steps is None:
            raise BackendError(f"the backend '{self.name}' is closed")
        with torch.inference_mode():
            values = dict(constants)
            for name, array in feeds.items():
                if name not in self._dtypes or array.dtype != self._dtypes[name]:
                    raise BackendError(
                        f"{self.name}: got {name} {array.dtype}, the graph expects {self._dtypes}",
                        cause="manifest and graph disagree",
                        cure="export the bundle again",
                    )
                values[name] = torch.tensor(array, device=self.device)
            for step in steps:
                inputs = [values[name] if name else None for name in step.inputs]
                try:
                    result = step.function(inputs, step.attributes, len(step.outputs))
                except (RuntimeError, IndexError, TypeError, ValueError) as error:
                    line = (str(error).splitlines() or [type(error).__name__])[0]
                    raise BackendError(
                        f"{self.name} failed at the node {step.name}: {line}",
                        cause=(
                            "the next call may succeed if memory was short, otherwise check the "
                            "bundle with vzip check"
                        ),
                    ) from error
                results = result if isinstance(result, tuple) else (result,)
                values.update(zip(step.outputs, results, strict=False))  # outputs may be left out
                for name in step.dropped:
                    del values[name]
            return {name: values[name].contiguous().cpu().numpy() for name in self._outputs}

    def close(self) -> None:
        """See `Backend.close`."""
        self._steps, self._constants = None, {}


def _plan(graph: Any, lasting: set[str], weights: NDArray[np.uint8]) -> tuple[_Step, ...]:
    """Return the steps of a GraphProto, each knowing which values nobody needs after it.

    Args:
        graph: The GraphProto.
        lasting: Values that are never dropped: outputs and constants.
        weights: The bytes of the external data.

    Raises:
        BackendError: Operators that aren't in the table, all of them named.
    """
    import onnx

    from vzip.export.torch_ops import OPERATORS

    nodes = [node for node in graph.node if node.op_type != "Constant"]
    kinds = [
        node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}::{node.op_type}"
        for node in nodes
    ]
    unknown = sorted(set(kinds) - set(OPERATORS))
    if unknown or graph.sparse_initializer:
        raise BackendError(
            f"the backend 'pytorch' doesn't know {unknown or 'sparse initializers'}",
            cause="the graph was made by another exporter or version",
            cure="run it with backend='onnxruntime'",
        )
    last = {name: place for place, node in enumerate(nodes) for name in node.input}
    steps = []
    for place, (node, kind) in enumerate(zip(nodes, kinds, strict=True)):
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for name, value in attributes.items():
            if isinstance(value, onnx.TensorProto):
                attributes[name] = _tensor(value, weights)
        used = {name for name in (*node.input, *node.output) if name}
        steps.append(
            _Step(
                function=OPERATORS[kind],
                name=node.name or f"{kind} #{place}",
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                attributes=attributes,
                dropped=tuple(name for name in used - lasting if last.get(name, place) == place),
            )
        )
    return tuple(steps)


def _weights(path: Path | None) -> NDArray[np.uint8]:
    """Return the bytes of the external data, mapped rather than read; none if there is no file."""
    if path is None:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="c")  # copy on write: PyTorch wants writable memory


def _tensor(proto: Any, weights: NDArray[np.uint8]) -> Any:
    """Return the torch.Tensor that a TensorProto describes."""
    import onnx

    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return _from_numpy(onnx.numpy_helper.to_array(proto).copy())
    place = {entry.key: entry.value for entry in proto.external_data}
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
    offset, length = int(place["offset"]), int(place["length"])
    if length != dtype.itemsize * int(np.prod(proto.dims, dtype=np.int64)):
        raise BackendError(
            f"the tensor {proto.name!r} takes {length} bytes",
            expected=f"those of {dtype} {list(proto.dims)}",
            cause="the graph is damaged",
            cure="export the bundle again",
        )
    array = weights[offset : offset + length].view(dtype).reshape(tuple(proto.dims))
    return _from_numpy(np.require(array, requirements=["ALIGNED", "WRITEABLE"]))


def _from_numpy(array: NDArray[Any]) -> Any:
    """Return the torch.Tensor with an array's memory; PyTorch doesn't know onnx's types of FP8."""
    import torch

    if not array.dtype.name.startswith("float8"):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))


def _constant(node: Any, weights: NDArray[np.uint8]) -> Any:
    """Return the torch.Tensor that a Constant node holds."""
    import onnx
    import torch

    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return _tensor(value, weights)
    if attribute.name in {"value_int", "value_ints"}:
        return torch.tensor(value, dtype=torch.int64)
    if attribute.name in {"value_float", "value_floats"}:
        return torch.tensor(value, dtype=torch.float32)
    raise BackendError(
        f"the backend 'pytorch' doesn't know a Constant with {attribute.name}",
        cause="the graph was made by another exporter or version",
        cure="run it with backend='onnxruntime'",
    )
