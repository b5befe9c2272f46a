"""A serialised ONNX model as nodes and tensors that can be replaced, without the onnx package.

What isn't touched keeps its bytes: tensors that lie in the file of weights stay there until their
numbers are asked for. Field numbers are those of onnx.proto of ONNX 1.23;
`tests/export/engines/test_fast_forms.py` compares them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.onnx_wire import (
    ENTRY_KEY,
    ENTRY_VALUE,
    EXTERNAL,
    GRAPH,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    NODE_INPUT,
    NODE_NAME,
    NODE_OPERATOR,
    NODE_OUTPUT,
    TENSOR_DATA_LOCATION,
    TENSOR_EXTERNAL_DATA,
    TENSOR_NAME,
    VALUE_NAME,
    ExternalTensor,
    MalformedError,
    external_tensors,
    fields,
    length_delimited,
    message,
    text,
    varint,
)
from vzip.runtime.errors import BundleError

Array = NDArray[Any]

MODEL_OPSET: Final = 8  # ModelProto.opset_import
OPSET_DOMAIN, OPSET_VERSION = 1, 2
GRAPH_INITIALIZER, GRAPH_VALUE_INFO = 5, 13
NODE_ATTRIBUTE, NODE_DOMAIN = 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_F, ATTRIBUTE_I, ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 1, 2, 3, 8, 20
ATTRIBUTE_FLOAT, ATTRIBUTE_INT = 1, 2  # AttributeProto.AttributeType
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_INT64S, TENSOR_RAW = 1, 2, 4, 7, 9
DTYPES: Final[Mapping[int, str]] = {1: "<f4", 2: "|u1", 3: "|i1", 7: "<i8"}
"""TensorProto.DataType → numpy's name, of what is read or written here."""

_INLINE = 1024  # bytes up to which a tensor stays in the graph, as the exporter has it
_ALIGNED = 64  # bytes: weights that are mapped are read with vector instructions


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        operator: What it computes, such as ``MatMul``.
        inputs: Names of values; empty for one that is left out.
        outputs: Likewise.
        domain: Empty for ONNX's own operators.
        name: Its name.
        attributes: Serialised AttributeProtos.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""
    name: str = ""
    attributes: tuple[bytes, ...] = ()

    def integers(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a number or a list of numbers; empty if it isn't there."""
        for attribute in self.attributes:
            parts = list(fields(memoryview(attribute)))
            if any(n == ATTRIBUTE_NAME and text(w, v) == name for n, w, v in parts):
                return _integers(parts, (ATTRIBUTE_I, ATTRIBUTE_INTS))
        return ()

    def to_bytes(self) -> bytes:
        """Return the NodeProto."""
        return b"".join(
            (
                *(message(NODE_INPUT, each.encode()) for each in self.inputs),
                *(message(NODE_OUTPUT, each.encode()) for each in self.outputs),
                message(NODE_NAME, self.name.encode()),
                message(NODE_OPERATOR, self.operator.encode()),
                *(message(NODE_ATTRIBUTE, each) for each in self.attributes),
                message(NODE_DOMAIN, self.domain.encode()),
            )
        )


def number(name: str, value: float) -> bytes:
    """Return an AttributeProto that holds an int or a float."""
    kind, content = (
        (ATTRIBUTE_INT, _scalar(ATTRIBUTE_I, value))
        if isinstance(value, int)
        else (ATTRIBUTE_FLOAT, varint(ATTRIBUTE_F << 3 | 5) + struct.pack("<f", value))
    )
    return message(ATTRIBUTE_NAME, name.encode()) + content + _scalar(ATTRIBUTE_TYPE, kind)


@dataclass(frozen=True)
class Graph:
    """A model whose nodes and tensors can be replaced.

    Attributes:
        nodes: In topological order.
        tensors: Initializers by name: TensorProtos as they were read, and arrays that are new.
        outputs: Names of the graph's outputs.
        folder: Where the file of weights lies.
        rest: The graph's other fields, serialised.
        model: The model's other fields, serialised.
        external: Where tensors lie in the file of weights.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, bytes | Array]
    outputs: tuple[str, ...]
    folder: Path
    rest: bytes = field(repr=False)
    model: bytes = field(repr=False)
    external: Mapping[str, ExternalTensor] = field(repr=False)

    @classmethod
    def read(cls, model: bytes, folder: Path) -> Graph:
        """Read a serialised ModelProto.

        Args:
            model: The bytes.
            folder: Where its external data lies.

        Raises:
            BundleError: They are no ModelProto.
        """
        external = {each.name: each for each in external_tensors(model)}
        try:
            return _read(model, folder, external)
        except MalformedError as error:
            raise BundleError(f"the graph{error}") from error.__cause__

    def makers(self) -> dict[str, Node]:
        """Return which node makes each value."""
        return {value: node for node in self.nodes for value in node.outputs}

    def readers(self) -> dict[str, list[Node]]:
        """Return which nodes read each value; the graph itself isn't among those of its outputs."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(node)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of an initializer of FP32 numbers; None for anything else."""
        tensor = self.tensors.get(name)
        if tensor is None or isinstance(tensor, np.ndarray):
            return None if tensor is None or tensor.dtype != np.float32 else tensor.shape
        parts = list(fields(memoryview(tensor)))
        if _integers(parts, (TENSOR_TYPE,)) != (1,):
            return None
        return _integers(parts, (TENSOR_DIMS,))

    def array(self, name: str) -> Array:
        """Return an initializer's numbers, of one of `DTYPES`.

        Raises:
            BundleError: It is of another type, or shorter than its shape says.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, np.ndarray):
            return tensor
        parts = list(fields(memoryview(tensor)))
        dims = _integers(parts, (TENSOR_DIMS,))
        kind = _integers(parts, (TENSOR_TYPE,))
        dtype = DTYPES.get(kind[0]) if kind else None
        place = self.external.get(name)
        if place is not None:
            with (self.folder / place.location).open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
        else:
            data = b"".join(bytes(length_delimited(w, v, "data")) for n, w, v in parts
                            if n in {TENSOR_RAW, TENSOR_FLOATS} and w == 2)  # fmt: skip
            if not data and (values := _integers(parts, (TENSOR_INT64S,))):
                data = np.array(values, np.int64).astype("<i8").tobytes()
        if dtype is None or len(data) != np.dtype(dtype).itemsize * int(np.prod(dims)):
            raise BundleError(
                f"the tensor {name!r} has type {kind} and {len(data)} bytes for the shape "
                f"{[*dims]}",
                expected=f"one of the types {[*DTYPES]} and as many bytes as that takes",
                cause="the graph was edited or made by another tool",
                cure="export the bundle again",
            )
        return np.frombuffer(data, dtype).reshape(dims)

    def edited(
        self, edits: Mapping[int, Sequence[Node]], tensors: Mapping[str, Array] | None = None
    ) -> Graph:
        """Return the graph with nodes replaced, and without what then leads nowhere.

        Args:
            edits: Place of a node → what stands there instead.
            tensors: New initializers.
        """
        nodes = [
            each
            for place, node in enumerate(self.nodes)
            for each in edits.get(place, (node,))
        ]  # fmt: skip
        needed, kept = set(self.outputs), []
        for node in reversed(nodes):
            if not needed.isdisjoint(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        every = {**self.tensors, **(tensors or {})}
        left = {name: tensor for name, tensor in every.items() if name in needed}
        return replace(self, nodes=tuple(reversed(kept)), tensors=left)

    def to_model(self) -> bytes:
        """Return the serialised model; new tensors are in it, others where they were."""
        tensors = [
            _inline(name, tensor) if isinstance(tensor, np.ndarray) else tensor
            for name, tensor in self.tensors.items()
        ]
        return self._with(tensors)

    def save(self, graph: Path, weights: Path) -> tuple[str, str]:
        """Write the model and a file of all its weights, those from other files included.

        Args:
            graph: The file of the model.
            weights: The file of its weights, in the same folder.

        Returns:
            SHA-256 of both files.
        """
        tensors, digest = [], hashlib.sha256()
        with weights.open("wb") as file:
            for name, tensor in self.tensors.items():
                new = isinstance(tensor, np.ndarray)
                if not new and name not in self.external:
                    tensors.append(cast("bytes", tensor))
                    continue
                array = self.array(name)
                if new and array.nbytes <= _INLINE:
                    tensors.append(_inline(name, array))
                    continue
                data = b"\0" * (-file.tell() % _ALIGNED) + array.tobytes()
                offset = file.tell() + len(data) - array.nbytes
                tensors.append(_pointing(name, array, weights.name, offset))
                file.write(data)
                digest.update(data)
        model = self._with(tensors)
        graph.write_bytes(model)
        return hashlib.sha256(model).hexdigest(), digest.hexdigest()

    def _with(self, tensors: Iterable[bytes]) -> bytes:
        """Return the serialised model with these TensorProtos."""
        parts = [message(GRAPH_NODE, node.to_bytes()) for node in self.nodes]
        parts += [message(GRAPH_INITIALIZER, tensor) for tensor in tensors]
        model = self.model
        for domain in {node.domain for node in self.nodes} - {""}:
            opset = message(OPSET_DOMAIN, domain.encode()) + _scalar(OPSET_VERSION, 1)
            model += message(MODEL_OPSET, opset)
        return model + message(GRAPH, b"".join(parts) + self.rest)


def _read(model: bytes, folder: Path, external: Mapping[str, ExternalTensor]) -> Graph:
    nodes: list[Node] = []
    tensors: dict[str, bytes | Array] = {}
    outputs: list[str] = []
    around, rest = [], []
    for part, kind, content in fields(memoryview(model)):
        if part != GRAPH:
            around.append(_again(part, kind, content))
            continue
        for inner, wire, value in fields(length_delimited(kind, content, "graph")):
            if inner == GRAPH_NODE:
                nodes.append(_node(length_delimited(wire, value, "node")))
            elif inner == GRAPH_INITIALIZER:
                tensor = bytes(length_delimited(wire, value, "tensor"))
                tensors[_name(tensor, TENSOR_NAME)] = tensor
            elif inner != GRAPH_VALUE_INFO:  # says what values inside the graph are: they change
                rest.append(_again(inner, wire, value))
                if inner == GRAPH_OUTPUT[1]:
                    outputs.append(_name(bytes(length_delimited(wire, value, "")), VALUE_NAME))
    return Graph(
        tuple(nodes), tensors, tuple(outputs), folder, b"".join(rest), b"".join(around), external
    )


def _node(data: memoryview) -> Node:
    parts = list(fields(data))

    def texts(wanted: int) -> tuple[str, ...]:
        return tuple(text(wire, value) for part, wire, value in parts if part == wanted)

    (operator,), domain, name = texts(NODE_OPERATOR), texts(NODE_DOMAIN), texts(NODE_NAME)
    attributes = tuple(
        bytes(length_delimited(wire, value, "attribute"))
        for part, wire, value in parts
        if part == NODE_ATTRIBUTE
    )
    return Node(
        operator, texts(NODE_INPUT), texts(NODE_OUTPUT), "".join(domain), "".join(name), attributes
    )


def _name(data: bytes, wanted: int) -> str:
    return next((text(w, v) for part, w, v in fields(memoryview(data)) if part == wanted), "")


def _again(part: int, wire: int, value: int | memoryview) -> bytes:
    """Return a field as it was."""
    if isinstance(value, int):
        return _scalar(part, value)
    return message(part, bytes(value)) if wire == 2 else varint(part << 3 | wire) + bytes(value)


def _scalar(part: int, value: int) -> bytes:
    return varint(part << 3) + varint(value)


def _integers(
    parts: Sequence[tuple[int, int, int | memoryview]], wanted: Sequence[int]
) -> tuple[int, ...]:
    """Return the numbers of repeated fields, which may be packed."""
    found: list[int] = []
    for part, _, value in parts:
        if part in wanted:
            if isinstance(value, int):
                found.append(value)
            else:
                # A packed list is what is left of a message without its tags.
                found += _unpacked(value)
    return tuple(each - 2**64 if each >= 2**63 else each for each in found)


def _unpacked(data: memoryview) -> list[int]:
    values, value, shift = [], 0, 0
    for digit in data:
        value |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            values.append(value)
            value = shift = 0
    return values


def _head(name: str, array: Array) -> bytes:
    (kind,) = (key for key, each in DTYPES.items() if np.dtype(each) == array.dtype)
    dims = b"".join(_scalar(TENSOR_DIMS, extent) for extent in array.shape)
    return dims + _scalar(TENSOR_TYPE, kind) + message(TENSOR_NAME, name.encode())


def _inline(name: str, array: Array) -> bytes:
    return _head(name, array) + message(TENSOR_RAW, array.tobytes())


def _pointing(name: str, array: Array, location: str, offset: int) -> bytes:
    """Return a TensorProto that refers to bytes in a file."""
    entries = (("location", location), ("offset", str(offset)), ("length", str(array.nbytes)))
    return (
        _head(name, array)
        + b"".join(
            message(
                TENSOR_EXTERNAL_DATA,
                message(ENTRY_KEY, key.encode()) + message(ENTRY_VALUE, value.encode()),
            )
            for key, value in entries
        )
        + _scalar(TENSOR_DATA_LOCATION, EXTERNAL)
    )
