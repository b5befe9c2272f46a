"""Where a serialised ONNX model keeps data outside itself, read without the onnx package.

An ONNX file may name any path of the machine as the home of a tensor, and runtimes have followed
such names out of the model's folder. Digests in a manifest don't help against someone who wrote
both, so a bundle's reader walks the model itself. The walk knows only the fields that can lead to a
tensor, refuses what it doesn't understand in them, and skips everything else by length.

Source: onnx.proto of ONNX 1.23; `tests/parity/test_onnx_wire_parity.py` compares the field numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vzip.runtime.errors import BundleError

# Message → field number → message in that field: every way from a model to a tensor.
PATHS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        10: "TensorProto",
        6: "GraphProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
GRAPH_OUTPUT = (7, 12)  # ModelProto.graph, GraphProto.output
VALUE_NAME = 1  # ValueInfoProto.name
GRAPH, GRAPH_NODE = 7, 1  # ModelProto.graph, GraphProto.node
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR = 1, 2, 3, 4
TENSOR_NAME = 8
TENSOR_EXTERNAL_DATA = 13  # repeated StringStringEntryProto
TENSOR_DATA_LOCATION = 14
EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL
ENTRY_KEY, ENTRY_VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 64  # protobuf itself stops at 100


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes lie in another file.

    Attributes:
        name: Name of the tensor, for messages.
        location: File, relative to the model's folder.
        offset: First byte in that file.
        length: Number of bytes.
    """

    name: str
    location: str
    offset: int
    length: int


class MalformedError(Exception):
    """Bytes that are no ONNX model; the file's name is put in front by who knows it."""


def external_tensors(model: bytes, *, file: str = "model.onnx") -> list[ExternalTensor]:
    """Return every tensor of a serialised ModelProto whose data is external, in file order.

    Args:
        model: The bytes.
        file: Where they come from, for messages.

    Raises:
        BundleError: The bytes are no ModelProto, or an external tensor is described in a way that
            two readers could understand differently (a key missing, twice or unknown).
    """
    try:
        return _walk(model)
    except MalformedError as error:
        raise BundleError(f"{file}{error}") from error.__cause__


def _walk(model: bytes) -> list[ExternalTensor]:
    """Return every external tensor; see `external_tensors`."""
    found: list[ExternalTensor] = []
    pending = [("ModelProto", memoryview(model), 0)]
    seen_graph = False
    while pending:
        kind, data, depth = pending.pop()
        if depth > _DEEPEST:
            raise malformed(f"messages nested more than {_DEEPEST} deep")
        if kind == "TensorProto":
            found.extend(_external(data))
            continue
        children = []
        for number, wire, value in fields(data):
            child = PATHS[kind].get(number)
            if child is None:
                continue
            children.append((child, length_delimited(wire, value, child), depth + 1))
            seen_graph = seen_graph or child == "GraphProto"
        pending.extend(reversed(children))
    if not seen_graph:
        raise malformed("there is no graph in it")
    return found


def with_output(model: bytes, name: str) -> bytes:
    """Return a serialised ModelProto with the graph's value `name` as an additional output.

    Protobuf merges a message that stands twice, and repeated fields are then concatenated: the
    bytes of a model that holds only this output are simply appended.
    """
    value_info = message(VALUE_NAME, name.encode())
    return model + message(GRAPH_OUTPUT[0], message(GRAPH_OUTPUT[1], value_info))


def message(number: int, data: bytes) -> bytes:
    """Return a length-delimited field."""
    return varint(number << 3 | _BYTES) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Return `value` in base 128, lowest digits first."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def malformed(what: str) -> MalformedError:
    """Return the error for bytes that are no ONNX model."""
    return MalformedError(
        f" is malformed: {what}, expected an ONNX ModelProto; "
        "the file is truncated or was edited: export the bundle again"
    )


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return a varint of at most 64 bits and the place after it."""
    value = 0
    for count in range(10):
        if place + count >= len(data):
            raise malformed("it ends within a number")
        digit = data[place + count]
        value |= (digit & 0x7F) << 7 * count
        if digit < 0x80:
            if value >= 2**64:
                break
            return value, place + count + 1
    raise malformed("a number has more than 64 bits")


def fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (field number, wire type, value) of one message."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number < 2**29:
            raise malformed(f"field number {number}")
        value: int | memoryview
        if wire == _VARINT:
            value, place = _read_varint(data, place)
        elif wire in {_FIXED64, _FIXED32, _BYTES}:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
            if wire == _BYTES:
                length, place = _read_varint(data, place)
            if length > len(data) - place:
                raise malformed("it ends within a field")
            value = data[place : place + length]
            place += length
        else:  # groups, which ONNX never had, and the two numbers without a meaning
            raise malformed(f"wire type {wire}")
        yield number, wire, value


def length_delimited(wire: int, value: int | memoryview, what: str) -> memoryview:
    """Return the bytes of a field that must hold a message or a text."""
    if wire != _BYTES or not isinstance(value, memoryview):
        raise malformed(f"wire type {wire} where a {what} was expected")
    return value


def text(wire: int, value: int | memoryview) -> str:
    """Return the text of a field."""
    try:
        return bytes(length_delimited(wire, value, "text")).decode()
    except UnicodeDecodeError as error:
        raise malformed("a text is not UTF-8") from error


def _external(data: memoryview) -> Iterator[ExternalTensor]:
    """Yield the external tensor that a TensorProto is, if it is one."""
    name, external, entries = "", False, list[tuple[str, str]]()
    for number, wire, value in fields(data):
        if number == TENSOR_NAME:
            name = text(wire, value)
        elif number == TENSOR_DATA_LOCATION:
            external = external or value == EXTERNAL
        elif number == TENSOR_EXTERNAL_DATA:
            pair = ["", ""]
            for part, part_wire, part_value in fields(length_delimited(wire, value, "entry")):
                if part in {ENTRY_KEY, ENTRY_VALUE}:
                    pair[part - 1] = text(part_wire, part_value)
            entries.append((pair[0], pair[1]))
    if not external and not entries:
        return
    keys = sorted(key for key, _ in entries)
    values = dict(entries)
    numbers = [values.get(key, "") for key in ("offset", "length")]
    if keys != ["length", "location", "offset"] or not all(
        number.isascii() and number.isdigit() and len(number) < 20 for number in numbers
    ):
        raise MalformedError(
            f": the external tensor {name!r} is described by {entries}, expected exactly "
            "one each of location, offset and length, the last two in digits; the file was edited "
            "or made by another tool: export the bundle again"
        )
    yield ExternalTensor(name, values["location"], int(numbers[0]), int(numbers[1]))
