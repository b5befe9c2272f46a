"""The field numbers that the runtime's check of a graph walks are those of onnx's descriptors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from vzip.runtime.backends.onnxruntime import with_output
from vzip.runtime.bundle import graph_check


def descriptor(name: str) -> Any:
    return getattr(onnx, name).DESCRIPTOR


def reaches_tensor(name: str, seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a message can hold a TensorProto, at any depth."""
    if name == "TensorProto":
        return True
    children = {field.message_type.name for field in descriptor(name).fields if field.message_type}
    return any(
        reaches_tensor(child, seen | {name})
        for child in children - seen
        if hasattr(onnx, child)  # the others are parts of types, declared inside other messages
    )


def test_every_way_to_a_tensor_is_walked() -> None:
    expected: dict[str, dict[int, str]] = {}
    pending = ["ModelProto"]
    while pending:
        name = pending.pop()
        if name in expected or name == "TensorProto":
            continue
        expected[name] = {
            field.number: field.message_type.name
            for field in descriptor(name).fields
            if field.message_type and reaches_tensor(field.message_type.name)
        }
        pending.extend(expected[name].values())
    assert expected == graph_check.PATHS


def test_field_numbers_are_those_of_onnx() -> None:
    tensor = {field.name: field.number for field in descriptor("TensorProto").fields}
    assert tensor["name"] == graph_check.TENSOR_NAME
    assert tensor["external_data"] == graph_check.TENSOR_EXTERNAL_DATA
    assert tensor["data_location"] == graph_check.TENSOR_DATA_LOCATION
    assert TensorProto.EXTERNAL == graph_check.EXTERNAL
    entry = {field.name: field.number for field in descriptor("StringStringEntryProto").fields}
    assert (entry["key"], entry["value"]) == (graph_check.ENTRY_KEY, graph_check.ENTRY_VALUE)
    node = {field.name: field.number for field in descriptor("NodeProto").fields}
    assert (node["op_type"], node["domain"]) == (graph_check.NODE_OPERATOR, graph_check.NODE_DOMAIN)


def test_finds_what_onnx_writes(tmp_path: Path) -> None:
    big = np.arange(64, dtype=np.float32)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])],
        [onnx.numpy_helper.from_array(big, "inner")],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [64])],
        [onnx.numpy_helper.from_array(big, "outer")],
    )
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph)
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    found = graph_check.external_tensors(path.read_bytes())
    assert sorted(each.name for each in found) == ["inner", "inner", "outer"]
    assert {each.location for each in found} == {"w.bin"}
    assert {each.length for each in found} == {256}


@pytest.mark.parametrize("extra", ["token_weights", "members"])
def test_with_output_is_what_onnx_would_write(tiny_bundle: Path, extra: str) -> None:
    data = (tiny_bundle / "model.onnx").read_bytes()
    expected = onnx.load_model_from_string(data)
    expected.graph.output.append(onnx.ValueInfoProto(name=extra))
    longer = with_output(data, extra)
    assert onnx.load_model_from_string(longer) == expected
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tiny_bundle)
    )
    session = onnxruntime.InferenceSession(longer, options)
    assert [output.name for output in session.get_outputs()][2:] == [extra]
