"""The parts of a serialised ONNX graph that decide what it computes, read one at a time.

`vzip.runtime.bundle.graph_check` has the walk through messages; this module says what is in a node,
a constant and an input, strictly: a field that stands twice, has another type than it says, or
leads to a graph within the graph is refused. What is read is a view into the file, never a copy.

Source: onnx.proto of ONNX 1.23; `tests/parity/test_graph_check_parity.py` compares its numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.graph_check import (
    ExternalTensor,
    MalformedError,
    external,
    fields,
    length_delimited,
    shown,
    text,
)

Read = Callable[[ExternalTensor], bytes]
"""Gives the bytes of a tensor that lies in the file of weights."""

FLOAT, UINT8, INT8, INT32, INT64, BOOL, FLOAT16, DOUBLE = 1, 2, 3, 6, 7, 9, 10, 11
BFLOAT16, FLOAT8 = 16, 17

ELEMENT_BYTES: Final[Mapping[int, int]] = {
    FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, INT64: 8, BOOL: 1, FLOAT16: 2, DOUBLE: 8, BFLOAT16: 2,
    FLOAT8: 1,
}  # fmt: skip
"""TensorProto.DataType → bytes of an element; there are no others in a graph of ours."""

FLOATS: Final = frozenset({FLOAT, FLOAT16, DOUBLE, BFLOAT16})
_NUMPY: Final = {UINT8: "<u1", INT8: "<i1", INT32: "<i4", INT64: "<i8", BOOL: "<u1"}

MOST_PARTS: Final = 2**16
"""Nodes, constants or inputs of a graph, each; ours have some thousand."""

LARGEST_RANK: Final = 8
_LONGEST_ATTRIBUTE = 64  # numbers in one; ours have a few
_LARGEST_EXTENT = 2**31 - 1

# Fields that lead nowhere: names, texts, and properties for tools.
_IDLE: Final[Mapping[str, frozenset[int]]] = {
    "GraphProto": frozenset({2, 10, 13, 16}),
    "NodeProto": frozenset({3, 6, 9}),
    "AttributeProto": frozenset({13}),
    "TensorProto": frozenset({12, 13, 14, 16}),
    "ValueInfoProto": frozenset({3, 4}),
}
_TYPED: Final[
    Mapping[int, tuple[int | None, frozenset[int]]]
] = {  # field of a TensorProto → bytes of an element (None: varints), its data types
    4: (4, frozenset({FLOAT})),
    5: (None, frozenset({UINT8, INT8, INT32, BOOL, FLOAT16, BFLOAT16, FLOAT8})),
    7: (None, frozenset({INT64})),
    10: (8, frozenset({DOUBLE})),
}
_RAW = 9
_ATTRIBUTE_FIELDS: Final = {2: 1, 3: 2, 4: 3, 7: 6, 8: 7}  # field → AttributeProto.AttributeType


@dataclass(frozen=True)
class Input:
    """An input of a graph.

    Attributes:
        name: Its name.
        dtype: A key of `ELEMENT_BYTES`.
        shape: Extents; those that a caller chooses have a name.
    """

    name: str
    dtype: int
    shape: tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor of numbers that the file holds.

    Attributes:
        name: Its name.
        dtype: A key of `ELEMENT_BYTES`.
        shape: Extents.
        external: Where its bytes lie in the file of weights; None where `parts` are they.
        parts: Views that hold the numbers, one after the other.
        packed: Whether the numbers in `parts` are varints.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    external: ExternalTensor | None
    parts: tuple[int | memoryview, ...]
    packed: bool

    def numbers(self, read: Read) -> NDArray[np.int64] | None:
        """Return integers or truth values as int64 of the constant's shape; None for others.

        Args:
            read: Gives bytes of the file of weights.
        """
        if self.dtype not in _NUMPY:
            return None
        if self.packed:
            flat = np.array([_signed(number) for number in _varints(self.parts)], np.int64)
        else:
            data = (
                read(self.external)
                if self.external is not None
                else b"".join(map(_bytes, self.parts))
            )
            flat = np.frombuffer(data, _NUMPY[self.dtype]).astype(np.int64)
        if flat.size != math.prod(self.shape):
            raise MalformedError(f"the constant {shown(self.name)} has {flat.size} numbers")
        return flat.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Node:
    """One operator and what goes in and out.

    Attributes:
        operator: Its name; of another domain than ONNX's with the domain before.
        inputs: Names of values; empty where an optional one isn't given.
        outputs: Likewise.
        attributes: Name → integer, number, text, integers or numbers.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Parts:
    """The one graph of a model.

    Args:
        model: A serialised ModelProto.

    Attributes:
        inputs: What a caller gives.
        outputs: Names of what comes out.
        constants: Name → constant.

    Raises:
        MalformedError: It is no such thing, or has what a graph of ours has not.
    """

    def __init__(self, model: bytes) -> None:
        self._graphs: list[memoryview] = []
        self.inputs: list[Input] = []
        self.outputs: list[str] = []
        self.constants: dict[str, Constant] = {}
        opsets: dict[str, int] = {}
        for number, wire, value in fields(memoryview(model)):
            if number == 7:
                self._graphs.append(length_delimited(wire, value, "GraphProto"))
                if len(self._graphs) > 1:
                    raise MalformedError("there are two graphs in it", "one")
            elif number == 8:
                name, version = _opset(length_delimited(wire, value, "OperatorSetIdProto"))
                if opsets.setdefault(name, version) != version or len(opsets) > 8:
                    raise MalformedError(f"the operator set {shown(name)} is imported twice", "one")
            elif number not in {1, 2, 3, 4, 5, 6, 14}:
                raise MalformedError(f"the model has the field {number}", "a graph alone")
        _check_opsets(opsets)
        for number, wire, value in self._fields():
            if number == 5:
                self._add_constant(_constant(length_delimited(wire, value, "TensorProto")))
            elif number == 11:
                self.inputs.append(_input(length_delimited(wire, value, "ValueInfoProto")))
                _few(self.inputs, "inputs")
            elif number == 12:
                self.outputs.append(_name(length_delimited(wire, value, "ValueInfoProto")))
                _few(self.outputs, "outputs")
            elif number != 1 and number not in _IDLE["GraphProto"]:
                raise MalformedError(f"the graph has the field {number}", "nodes and constants")

    def _fields(self) -> Iterator[tuple[int, int, int | memoryview]]:
        for graph in self._graphs:
            yield from fields(graph)

    def _add_constant(self, constant: Constant) -> None:
        if not constant.name or constant.name in self.constants:
            raise MalformedError(f"two constants have the name {shown(constant.name)}", "one")
        self.constants[constant.name] = constant
        _few(self.constants, "constants")

    def nodes(self) -> Iterator[Node]:
        """Yield every node, in the order of the file."""
        count = 0
        for number, wire, value in self._fields():
            if number == 1:
                count += 1
                if count > MOST_PARTS:
                    raise MalformedError(f"the graph has more than {MOST_PARTS} nodes", "fewer")
                yield _node(length_delimited(wire, value, "NodeProto"))


def _few(several: Any, what: str) -> None:
    if len(several) > MOST_PARTS:
        raise MalformedError(f"the graph has more than {MOST_PARTS} {what}", "fewer")


def _check_opsets(opsets: Mapping[str, int]) -> None:
    """Refuse operator sets whose operators may mean something else."""
    own = [version for name, version in opsets.items() if name in {"", "ai.onnx"}]
    if len(own) != 1 or not 17 <= own[0] <= 24:
        raise MalformedError(f"its operators are of the set {own}", "one from 17 to 24")
    for name, version in opsets.items():
        if name.removeprefix("ai.onnx") and (name, version) != ("com.microsoft", 1):
            raise MalformedError(f"it imports the operator set {shown(name)} {version}", "ONNX's")


def _opset(data: memoryview) -> tuple[str, int]:
    name, version = "", 0
    for number, wire, value in fields(data):
        if number == 1:
            name = text(wire, value)
        elif number == 2 and isinstance(value, int):
            version = _signed(value)
        else:
            raise MalformedError(f"an operator set has the field {number}")
    return name, version


def _node(data: memoryview) -> Node:
    inputs, outputs = list[str](), list[str]()
    attributes: dict[str, Any] = {}
    names = {4: "", 7: ""}
    for number, wire, value in fields(data):
        if number in {1, 2}:
            ends = inputs if number == 1 else outputs
            ends.append(text(wire, value))
            if len(ends) > 256:
                raise MalformedError("a node has more than 256 inputs or outputs", "fewer")
        elif number in names:
            names[number] = text(wire, value)
        elif number == 5:
            name, found = _attribute(length_delimited(wire, value, "AttributeProto"))
            if name in attributes or len(attributes) > 32:
                raise MalformedError(f"a node has the attribute {shown(name)} twice", "once")
            attributes[name] = found
        elif number == 8:
            if text(wire, value):
                raise MalformedError("a node has an overload", "none")
        elif number not in _IDLE["NodeProto"]:
            raise MalformedError(f"a node has the field {number}")
    domain = names[7].removeprefix("ai.onnx") and names[7] + "::"
    return Node(domain + names[4], tuple(inputs), tuple(outputs), attributes)


def _attribute(data: memoryview) -> tuple[str, Any]:
    """Return name and value of an attribute."""
    name, kind, found = "", None, dict[int, list[int | memoryview]]()
    for number, wire, value in fields(data):
        if number == 1:
            name = text(wire, value)
        elif number == 20:
            kind = value
        elif number in _ATTRIBUTE_FIELDS:
            found.setdefault(number, []).append(value)
        elif number not in _IDLE["AttributeProto"]:
            raise MalformedError(f"the attribute {shown(name)} has the field {number}",
                                 "a number, a text, or a list of numbers")  # fmt: skip
    if not found and kind in {6, 7}:
        return name, ()  # a list of none has no field
    if len(found) != 1:
        raise MalformedError(f"the attribute {shown(name)} has {len(found)} values", "one")
    ((number, values),) = found.items()
    if kind != _ATTRIBUTE_FIELDS[number]:
        raise MalformedError(f"the attribute {shown(name)} is of the type {kind}",
                             f"{_ATTRIBUTE_FIELDS[number]}")  # fmt: skip
    return name, _attribute_value(name, number, values)


def _attribute_value(name: str, number: int, values: list[int | memoryview]) -> Any:
    """Return what the fields of one number hold."""
    if number == 4:
        (only,) = values[-1:]
        return bytes(length_delimited(2 if isinstance(only, memoryview) else 0, only, "text"))
    if sum(map(_size, values)) > 10 * _LONGEST_ATTRIBUTE:
        raise MalformedError(f"the attribute {shown(name)} is long", "a few numbers")
    several = _floats(values) if number in {2, 7} else [*map(_signed, _varints(values))]
    if number in {7, 8}:
        return tuple(several)
    if len(several) != 1 or isinstance(values[0], int) != (number == 3):
        raise MalformedError(f"the attribute {shown(name)} has {len(several)} values", "one")
    return several[0]


def _constant(data: memoryview) -> Constant:
    """Return a constant whose bytes are as many as its shape and type say."""
    name, dtype = "", 0
    dims: list[int | memoryview] = []
    homes: dict[int, list[int | memoryview]] = {}
    for number, wire, value in fields(data):
        if number == 8:
            name = text(wire, value)
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 1:
            dims.append(value)
            if len(dims) > LARGEST_RANK or sum(map(_size, dims)) > 10 * LARGEST_RANK:
                raise MalformedError(f"a constant has more than {LARGEST_RANK} extents", "fewer")
        elif number in _TYPED or number == _RAW:
            homes.setdefault(number, []).append(value)
        elif number not in _IDLE["TensorProto"]:
            raise MalformedError(f"the constant {shown(name)} has the field {number}")
    shape = _extents(map(_signed, _varints(dims)), name)
    if dtype not in ELEMENT_BYTES:
        raise MalformedError(f"the constant {shown(name)} is of the data type {dtype}",
                             "a number's")  # fmt: skip
    place = next(external(data), None)
    if len(homes) + (place is not None) > 1:
        raise MalformedError(f"the constant {shown(name)} lies in two places", "one")
    number, parts = next(iter(homes.items()), (_RAW, []))
    width, kinds = _TYPED.get(number, (ELEMENT_BYTES[dtype], {dtype}))
    if dtype not in kinds or (number == _RAW and len(parts) > 1):
        raise MalformedError(f"the constant {shown(name)} has numbers of another type", "its own")
    held = sum(map(_count if width is None else _size, parts)) if place is None else place.length
    if held != math.prod(shape) * (width or 1):
        raise MalformedError(
            f"the constant {shown(name)} {list(shape)} has {held} "
            + ("numbers" if width is None else "bytes"),
            f"{math.prod(shape) * (width or 1)}",
        )
    return Constant(name, dtype, shape, place, tuple(parts), packed=width is None)


def _input(data: memoryview) -> Input:
    """Return an input, which must be a tensor with a shape."""
    name, kinds = "", list[memoryview]()
    for number, wire, value in fields(data):
        if number == 1:
            name = text(wire, value)
        elif number == 2:
            kinds.append(length_delimited(wire, value, "TypeProto"))
        elif number not in _IDLE["ValueInfoProto"]:
            raise MalformedError(f"the input {shown(name)} has the field {number}")
    tensors = [
        length_delimited(wire, value, "tensor type") if number == 1 else None
        for kind in kinds
        for number, wire, value in fields(kind)
        if number != 6
    ]
    if len(tensors) != 1 or tensors[0] is None:
        raise MalformedError(f"the input {shown(name)} is no tensor", "one")
    dtype, shapes = 0, list[memoryview]()
    for number, wire, value in fields(tensors[0]):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2:
            shapes.append(length_delimited(wire, value, "TensorShapeProto"))
    if dtype not in ELEMENT_BYTES or len(shapes) != 1:
        raise MalformedError(f"the input {shown(name)} has no type or shape of numbers", "both")
    extents: list[int | str] = []
    for number, wire, value in fields(shapes[0]):
        if number != 1 or len(extents) == LARGEST_RANK:
            raise MalformedError(f"the shape of the input {shown(name)} has other fields")
        extents.append(_extent(length_delimited(wire, value, "Dimension"), name))
    return Input(name, dtype, tuple(extents))


def _extent(data: memoryview, name: str) -> int | str:
    """Return an extent of an input, or its name."""
    found: list[int | str] = []
    for number, wire, value in fields(data):
        if number == 1 and isinstance(value, int):
            found.extend(_extents([_signed(value)], name))
        elif number == 2:
            found.append(text(wire, value))
        elif number != 3:
            raise MalformedError(f"the shape of the input {shown(name)} has other fields")
    if len(found) != 1 or found == [""]:
        raise MalformedError(f"the input {shown(name)} has an extent without number or name")
    return found[0]


def _name(data: memoryview) -> str:
    """Return the name in a ValueInfoProto."""
    name = ""
    for number, wire, value in fields(data):
        if number == 1:
            name = text(wire, value)
    return name


def _extents(numbers: Any, name: str) -> tuple[int, ...]:
    shape = tuple(numbers)
    if any(not 0 <= each <= _LARGEST_EXTENT for each in shape):
        raise MalformedError(f"{shown(name)} has the extents {shown(list(shape))}", "sizes")
    return shape


def _signed(number: int) -> int:
    """Return a varint as protobuf's int64."""
    return number - 2**64 if number >= 2**63 else number


def _bytes(part: int | memoryview) -> memoryview:
    return length_delimited(2 if isinstance(part, memoryview) else 0, part, "tensor")


def _size(part: int | memoryview) -> int:
    """Return how many bytes of numbers a field holds; of a varint an upper bound."""
    return 10 if isinstance(part, int) else len(part)


def _count(part: int | memoryview) -> int:
    """Return how many varints a field holds."""
    if isinstance(part, int):
        return 1
    return int(np.count_nonzero(np.frombuffer(part, np.uint8) < 0x80))


def _varints(parts: Any) -> Iterator[int]:
    """Yield the integers of a repeated field, packed or not."""
    for part in parts:
        if isinstance(part, int):
            yield part
            continue
        number = shift = 0
        for byte in part:
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                if number >= 2**64:
                    raise MalformedError("a number has more than 64 bits")
                yield number
                number = shift = 0
            elif shift > 63:
                raise MalformedError("a number has more than 64 bits")
        if shift:
            raise MalformedError("it ends within a number")


def _floats(parts: Any) -> list[float]:
    """Return the numbers of a repeated float, packed or not."""
    data = b"".join(map(_bytes, parts))
    if len(data) % 4:
        raise MalformedError("it ends within a number")
    return list(struct.unpack(f"<{len(data) // 4}f", data))
