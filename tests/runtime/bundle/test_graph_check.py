from __future__ import annotations

import itertools

import pytest

from tests.places import ROOT
from tests.refusals import refused
from vzip.runtime.bundle import graph_check
from vzip.runtime.bundle.graph_check import ExternalTensor, check_graph, external_tensors
from vzip.runtime.errors import BundleError


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def entry(key: str, value: str) -> bytes:
    return message(13, message(1, key.encode()) + message(2, value.encode()))


def tensor(location: str = "model.onnx.data", *more: bytes, external: bool = True) -> bytes:
    flag = varint(14 << 3) + b"\x01" if external else b""
    where = entry("location", location) + entry("offset", "8") + entry("length", "4")
    return message(8, b"w") + where + flag + b"".join(more)


def model(graph: bytes = b"") -> bytes:
    return varint(1 << 3) + b"\x08" + message(7, graph)


FOUND = ExternalTensor("w", "model.onnx.data", 8, 4)


def node(attribute: bytes) -> bytes:
    return message(1, message(5, attribute))


PLACES = {
    "initializer": model(message(5, tensor())),
    "location-not-external": model(message(5, tensor(external=False))),
    "sparse-values": model(message(15, message(1, tensor()))),
    "sparse-indices": model(message(15, message(2, tensor()))),
    "attribute-tensor": model(node(message(5, tensor()))),
    "attribute-tensors": model(node(message(10, tensor()))),
    "attribute-sparse": model(node(message(22, message(1, tensor())))),
    "attribute-sparses": model(node(message(23, message(1, tensor())))),
    "subgraph": model(node(message(6, message(5, tensor())))),
    "subgraphs": model(node(message(11, message(5, tensor())))),
    "function": model() + message(25, message(7, message(5, message(5, tensor())))),
    "default": model() + message(25, message(11, message(5, tensor()))),
    "training-init": model() + message(20, message(1, message(5, tensor()))),
    "training-step": model() + message(20, message(2, message(5, tensor()))),
    "graph-in-two-parts": model() + model(message(5, tensor())),
}


@pytest.mark.parametrize("place", PLACES)
def test_finds_external_tensors_wherever_they_stand(place):
    assert external_tensors(PLACES[place]) == [FOUND]


def test_ignores_tensors_that_hold_their_data():
    assert external_tensors(model(message(5, message(8, b"w") + message(9, b"1234")))) == []


def test_keeps_the_order_of_the_file():
    data = model(message(5, tensor("a")) + node(message(5, tensor("b"))) + message(5, tensor("c")))
    assert [each.location for each in external_tensors(data)] == ["a", "b", "c"]


def test_reads_the_golden_bundle(tiny_bundle):
    found = external_tensors((tiny_bundle / "model.onnx").read_bytes())
    size = (tiny_bundle / "model.onnx.data").stat().st_size
    assert sum(each.length for each in found) == size
    assert {each.location for each in found} == {"model.onnx.data"}


@pytest.mark.parametrize(
    "described",
    [
        tensor("model.onnx.data", entry("location", "/etc/passwd")),  # twice
        tensor("model.onnx.data", entry("checksum", "0")),
        tensor("model.onnx.data", entry("offset", "8")),
        message(8, b"w") + varint(14 << 3) + b"\x01",  # without a place
    ],
)
def test_refuses_ambiguous_descriptions(described):
    with refused(BundleError, got="'w'", expected=("location", "offset", "length")):
        external_tensors(model(message(5, described)))


@pytest.mark.parametrize("number", ["-1", "0x10", "", " 8", "1e3", "٣", "9" * 20])
def test_refuses_offsets_that_are_no_plain_numbers(number):
    where = entry("location", "model.onnx.data") + entry("offset", number) + entry("length", "4")
    with refused(BundleError, got=repr(("offset", number)), expected="digits"):
        external_tensors(model(message(5, where)))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "there is no graph in it"),
        (b"\x08", "it ends within a number"),
        (b"\x3a\x05ab", "it ends within a field"),
        (b"\x3b", "wire type 3"),
        (b"\x3f", "wire type 7"),
        (b"\x02\x00", "field number 0"),
        (b"\x38\x01", "wire type 0 where a GraphProto was expected"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "a number has more than 64 bits"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "a number has more than 64 bits"),
        (b"\x0d\x00\x00", "it ends within a field"),
        (model(message(5, message(8, b"\xff"))), "a text is not UTF-8"),
        (b"not an ONNX file, just text", "wire type 6"),
    ],
)
def test_refuses_what_is_no_model(data, what):
    with refused(BundleError, got=("llm.onnx", what), expected="ModelProto", cure="export"):
        external_tensors(data, file="llm.onnx")


def test_refuses_graphs_nested_too_deeply():
    graph = b""
    for _ in range(100):
        graph = node(message(6, graph))
    with refused(BundleError, got="64 deep"):
        external_tensors(model(graph))


def test_every_truncation_is_refused_or_harmless(tiny_bundle):
    whole = (tiny_bundle / "model.onnx").read_bytes()
    expected = external_tensors(whole)
    for end in range(0, len(whole), 7):
        try:
            found = external_tensors(whole[:end])
        except BundleError:
            continue
        assert found == expected  # only what follows the graph was cut off


@pytest.mark.slow
def test_no_flipped_bit_raises_anything_but_a_bundle_error(tiny_bundle):
    whole = (tiny_bundle / "model.onnx").read_bytes()
    refused = 0
    for place, bit in itertools.product(range(0, len(whole), 5), range(0, 8, 3)):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        try:
            external_tensors(bytes(data))
        except BundleError:
            refused += 1
    assert refused > 100


def operator(name: str, domain: str = "") -> bytes:
    return message(1, message(4, name.encode()) + (message(7, domain.encode()) if domain else b""))


def checked(data: bytes, operators: frozenset[str] | None, data_bytes: int | None = 12) -> None:
    check_graph(data, file="m.onnx", data_file="m.data", data_bytes=data_bytes, operators=operators)


def test_graphs_of_earlier_exports_may_hold_cumsum_and_new_ones_not() -> None:
    """TensorRT 8.6 to 10.7 make a loop of it; what was exported with it still opens."""
    for allowed in (graph_check.OWN, graph_check.QUANTISED, graph_check.CPU_ENGINE):
        checked(model(operator("CumSum")), allowed)
    assert "CumSum" not in graph_check.EXPORTED


def test_operators_are_those_that_are_listed():
    within = message(1, message(4, b"Add") + message(5, message(6, operator("Evil"))))
    for graph, found in (
        (operator("Evil"), "Evil"),
        (operator("Add", "com.microsoft"), "com.microsoft::Add"),
        (operator("Add") + operator("Add", "ai.onnx.ml"), "ai.onnx.ml::Add"),
        (within, "Evil"),
    ):
        with refused(BundleError, got=("m.onnx", found), cure="export"):
            checked(model(graph), graph_check.OWN)
    with refused(BundleError, got="Split"):
        checked(model(operator("Split")), graph_check.OWN)
    checked(model(operator("Split") + operator("Add", "ai.onnx")), graph_check.QUANTISED)
    checked(model(operator("MatMulNBits", "com.microsoft")), graph_check.CPU_ENGINE)


def test_a_function_can_not_stand_for_an_operator():
    function = message(25, message(7, operator("Add")))
    with refused(BundleError, got="local::f"):
        checked(model(operator("f", "local")) + function, graph_check.OWN)


def test_a_decoder_has_any_of_onnx_s_operators_and_no_graph_inside():
    checked(model(operator("Attention") + operator("Gather")), graph_check.LLM)
    for graph, found in (
        (operator("Loop"), "Loop"),
        (operator("GroupQueryAttention", "com.microsoft"), "GroupQueryAttention"),
    ):
        with refused(BundleError, got=found):
            checked(model(graph), graph_check.LLM)


def test_external_data_is_in_one_file_and_within_it():
    checked(model(message(5, tensor("m.data"))), graph_check.OWN)
    with refused(BundleError, got=("'w'", "'../m.data'"), expected="'m.data'", cure="don't use"):
        checked(model(message(5, tensor("../m.data"))), graph_check.OWN)
    with refused(BundleError, got=("'w'", "m.data")):
        checked(model(message(5, tensor("m.data"))), graph_check.OWN, None)
    with refused(BundleError, got=("'w'", "8 to 12", "11")):
        checked(model(message(5, tensor("m.data"))), graph_check.OWN, 11)


def test_the_specification_lists_the_operators():
    said = (ROOT / "docs" / "bundle.md").read_text("utf-8")
    assert [name for name in graph_check.QUANTISED if f"`{name}`" not in said] == []
