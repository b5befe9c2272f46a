"""What a serialised ONNX model may hold, checked without the onnx package and never edited.

An ONNX file may name any path of the machine as the home of a tensor, and any operator of any
library that a runtime has loaded; runtimes have followed such names out of the model's folder.
Digests in a manifest don't help against someone who wrote both, so a bundle's reader walks the
model itself. The walk knows only the fields that lead to a tensor or a node, refuses what it
doesn't understand in them, and skips everything else by length. What a graph computes, and how
much of it, is looked at by `vzip.runtime.bundle.graph_limits`.

Source: onnx.proto of ONNX 1.23; `tests/parity/test_graph_check_parity.py` compares its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vzip.runtime.errors import BundleError

EXPORTED: Final = frozenset(
    {
        "Add", "ArgMax", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Erf", "GreaterOrEqual",
        "LayerNormalization", "MatMul", "Mul", "Neg", "Pad", "ReduceMax",
        "ReduceSum", "Reshape", "Sigmoid", "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh",
        "TopK", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Every operator that `vzip export` writes. TensorRT 8.6 to 11 and TensorRT-RTX take all of them,
none as a loop and none with a data-dependent shape (docs/operators.md)."""

OWN: Final = EXPORTED | {"CumSum", "Gather", "GatherElements", "Identity", "ReduceMean"}
"""Operators of a bundle's own graph; by hand one may be written with a few more than an export, and
earlier exports held CumSum."""

QUANTISED: Final = OWN | {"DequantizeLinear", "QuantizeLinear", "Split"}
"""Operators of a graph that `vzip calibrate` wrote."""

CPU_ENGINE: Final = OWN | {
    "Abs",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "com.microsoft::MatMulIntegerToFloat",
    "com.microsoft::MatMulNBits",
    "com.microsoft::MultiHeadAttention",
}
"""Operators of an engine for ONNX Runtime's CPU; three are that runtime's own."""

LLM: Final = None
"""A decoder: any of ONNX's own operators that `vzip.runtime.bundle.graph_rules` knows."""

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
NODE_OPERATOR, NODE_DOMAIN = 4, 7
TENSOR_NAME = 8
TENSOR_EXTERNAL_DATA = 13  # repeated StringStringEntryProto
TENSOR_DATA_LOCATION = 14
EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL
ENTRY_KEY, ENTRY_VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ENTRIES = ["length", "location", "offset"]
_HOLD_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_DEEPEST = 64  # protobuf itself stops at 100
# ONNX Runtime tells its own format by these bytes, and what it then reads is another graph.
_ORT_FORMAT = b"ORTM"
_MOST = 2**16
_MOST_MESSAGES = 2**18  # nodes, attributes and tensors; ours have some ten thousand
_MOST_OPERATORS = 1000  # different ones; ONNX has two hundred
_LONGEST_SHOWN = 80


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
    """Bytes that are no ONNX model: what of them, and what was expected.

    The file's name is put in front by who knows it.
    """

    def __init__(self, got: str, expected: str = "an ONNX ModelProto") -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


def check_graph(
    model: bytes,
    *,
    file: str,
    data_file: str,
    data_bytes: int | None,
    operators: frozenset[str] | None,
) -> None:
    """Refuse a graph that reads what isn't its own, or computes what it may not.

    Args:
        model: A serialised ModelProto.
        file: Where it comes from, for messages.
        data_file: The one file in which its external data may lie.
        data_bytes: Size of that file; None where the manifest lists none.
        operators: Names of the operators that it may hold, those of other domains than ONNX's with
            the domain before (``com.microsoft::MatMulNBits``); `LLM` for a decoder's.

    Raises:
        BundleError: The bytes are no ModelProto, a tensor lies elsewhere or beyond the file's end,
            or there is another operator.
    """
    found, held = _read(model, file)
    if operators is None:
        others = {name for name in held if "::" in name or name in _HOLD_GRAPHS}
        allowed = "ONNX's own operators, and none with a graph inside"
    else:
        others, allowed = held - operators, "those that docs/bundle.md lists"
    if others:
        raise BundleError(
            f"{file} holds the operators {', '.join(sorted(others)[:8])[:400]}",
            expected=allowed,
            cause="it was edited, or made by another tool or version",
            cure="export the bundle again",
        )
    for tensor in found:
        if tensor.location != data_file:
            raise BundleError(
                f"{file}: the tensor {shown(tensor.name)} lies in {shown(tensor.location)}",
                expected=f"{data_file!r}",
                cause="a graph may not read other files",
                cure="don't use this bundle",
            )
        if data_bytes is None:
            raise BundleError(
                f"{file}: the tensor {shown(tensor.name)} lies in {data_file}, which the manifest "
                "doesn't list",
                cause="the bundle is incomplete",
                cure="export it again",
            )
        if tensor.offset + tensor.length > data_bytes:
            raise BundleError(
                f"{file}: the tensor {shown(tensor.name)} takes bytes {tensor.offset} to "
                f"{tensor.offset + tensor.length} of {data_file}, which has {data_bytes}",
                cause="the files don't belong together",
                cure="export the bundle again",
            )


def external_tensors(model: bytes, *, file: str = "model.onnx") -> list[ExternalTensor]:
    """Return every tensor of a serialised ModelProto whose data is external, in file order.

    Args:
        model: The bytes.
        file: Where they come from, for messages.

    Raises:
        BundleError: The bytes are no ModelProto, or an external tensor is described in a way that
            two readers could understand differently (a key missing, twice or unknown).
    """
    return _read(model, file)[0]


def _read(model: bytes, file: str) -> tuple[list[ExternalTensor], set[str]]:
    """Return every external tensor, in file order, and the name of every operator."""
    try:
        _refuse_other_formats(model)
        return _walk(model)
    except MalformedError as error:
        raise BundleError(
            f"{file} is malformed: {error.got}",
            expected=error.expected,
            cause="the file is truncated, or was edited or made by another tool",
            cure="export the bundle again",
        ) from error.__cause__


def _refuse_other_formats(model: bytes) -> None:
    """Refuse a protobuf that is another graph to ONNX Runtime."""
    if model[4:8] == _ORT_FORMAT:
        raise MalformedError("to ONNX Runtime it is a graph in that one's own format")


def _walk(model: bytes) -> tuple[list[ExternalTensor], set[str]]:
    found: list[ExternalTensor] = []
    operators: set[str] = set()
    seen_graph, messages = False, 0
    # Messages are read as they are come to, in the file's order: what is held is the way to one.
    way = [_Message("ModelProto", memoryview(model))]
    while way:
        here = way[-1]
        for number, wire, value in here.fields:
            if number in here.names:
                here.names[number] = text(wire, value)  # the last one counts, as for every reader
                continue
            child = PATHS[here.kind].get(number)
            if child is None:
                continue
            data = length_delimited(wire, value, child)
            seen_graph = seen_graph or child == "GraphProto"
            messages += 1
            if messages > _MOST_MESSAGES:
                raise MalformedError(f"more than {_MOST_MESSAGES} messages", "fewer")
            if child == "TensorProto":
                found.extend(external(data))
                if len(found) > _MOST:
                    raise MalformedError(f"more than {_MOST} external tensors", "fewer")
                continue
            way.append(_Message(child, data))
            break
        else:
            way.pop()
            if here.kind == "NodeProto":
                domain = here.names[NODE_DOMAIN]
                domain = domain.removeprefix("ai.onnx") and domain + "::"
                operators.add(domain + here.names[NODE_OPERATOR])
                if len(operators) > _MOST_OPERATORS:
                    raise MalformedError(f"more than {_MOST_OPERATORS} operators", "fewer")
        if len(way) > _DEEPEST + 1:
            raise MalformedError(f"messages nested more than {_DEEPEST} deep")
    if not seen_graph:
        raise MalformedError("there is no graph in it")
    return found, operators


class _Message:
    """A message that is being read."""

    def __init__(self, kind: str, data: memoryview) -> None:
        self.kind, self.fields = kind, fields(data)
        self.names = {NODE_OPERATOR: "", NODE_DOMAIN: ""} if kind == "NodeProto" else {}


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return a varint of at most 64 bits and the place after it."""
    value = 0
    for count in range(10):
        if place + count >= len(data):
            raise MalformedError("it ends within a number")
        digit = data[place + count]
        value |= (digit & 0x7F) << 7 * count
        if digit < 0x80:
            if value >= 2**64:
                break
            return value, place + count + 1
    raise MalformedError("a number has more than 64 bits")


def fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield (field number, wire type, value) of one message."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number < 2**29:
            raise MalformedError(f"field number {number}")
        value: int | memoryview
        if wire == _VARINT:
            value, place = _read_varint(data, place)
        elif wire in {_FIXED64, _FIXED32, _BYTES}:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
            if wire == _BYTES:
                length, place = _read_varint(data, place)
            if length > len(data) - place:
                raise MalformedError("it ends within a field")
            value = data[place : place + length]
            place += length
        else:  # groups, which ONNX never had, and the two numbers without a meaning
            raise MalformedError(f"wire type {wire}")
        yield number, wire, value


def length_delimited(wire: int, value: int | memoryview, what: str) -> memoryview:
    """Return the bytes of a field that must hold a message or a text."""
    if wire != _BYTES or not isinstance(value, memoryview):
        raise MalformedError(f"wire type {wire} where a {what} was expected")
    return value


def text(wire: int, value: int | memoryview) -> str:
    """Return the text of a field."""
    try:
        return bytes(length_delimited(wire, value, "text")).decode()
    except UnicodeDecodeError as error:
        raise MalformedError("a text is not UTF-8") from error


def shown(value: object) -> str:
    """Return what a file holds as it stands in messages."""
    said = repr(value)
    return said if len(said) <= _LONGEST_SHOWN else f"{said[: _LONGEST_SHOWN - 1]}…"


def external(data: memoryview) -> Iterator[ExternalTensor]:
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
            if len(entries) > len(_ENTRIES) + 1:  # enough to see what is wrong
                break
    if not external and not entries:
        return
    keys = sorted(key for key, _ in entries)
    values = dict(entries)
    numbers = [values.get(key, "") for key in ("offset", "length")]
    if keys != _ENTRIES or not all(
        number.isascii() and number.isdigit() and len(number) < 20 for number in numbers
    ):
        raise MalformedError(
            f"the external tensor {shown(name)} is described by {shown(entries)}",
            "exactly one each of location, offset and length, the last two in digits",
        )
    yield ExternalTensor(name, values["location"], int(numbers[0]), int(numbers[1]))
