"""Sums of products of bytes are whole, also on a CPU without dot products of bytes (VNNI)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from vzip.runtime.backends.onnxruntime import session_options
from vzip.runtime.backends.openvino import FP32, compiled, read_model, saturates

ROWS, LENGTH, COLUMNS = 8, 64, 32
UNSIGNED, SIGNED = (TensorProto.UINT8, 255.0), (TensorProto.INT8, 127.0)


def graph(kind: int) -> bytes:
    """Return x, rounded to bytes, times a matrix of 127: what `vzip calibrate` makes of a layer."""
    held = {
        "one": np.array(1, np.float32),
        "zero": np.array(0, helper.tensor_dtype_to_np_dtype(kind)),
        "w": np.full((LENGTH, COLUMNS), 127, np.int8),
        "none": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["small"]),
        helper.make_node("DequantizeLinear", ["small", "one", "zero"], ["again"]),
        helper.make_node("DequantizeLinear", ["w", "one", "none"], ["weights"]),
        helper.make_node("MatMul", ["again", "weights"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [numpy_helper.from_array(values, name) for name, values in held.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize(("kind", "most"), [UNSIGNED, SIGNED])
def test_in_onnx_runtime(kind: int, most: float) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph(kind), session_options(onnxruntime))
    (y,) = session.run(None, {"x": np.full((ROWS, LENGTH), most, np.float32)})
    assert (y == most * 127 * LENGTH).all()


@pytest.mark.parametrize(("kind", "most"), [UNSIGNED, SIGNED])
@pytest.mark.parametrize("again", [False, True])
def test_in_openvino(tmp_path: Path, kind: int, most: float, again: bool) -> None:
    with read_model(openvino, graph(kind), tmp_path, {}) as model:
        (part,) = compiled(openvino, model, FP32, 1)
    ran = part.compiled
    if again:  # as an engine of the bundle is
        import io

        blob = io.BytesIO()
        ran.export_model(blob)
        blob.seek(0)
        ran = openvino.Core().import_model(blob, "CPU")
    y = ran(np.full((ROWS, LENGTH), most, np.float32))[0]
    assert (y == most * 127 * LENGTH).all()


def test_where_they_would_saturate_openvino_computes_in_floats() -> None:
    """The kernel is asked, and answers what the processor's instructions say."""
    flags = Path("/proc/cpuinfo").read_text("utf-8")
    if "model name" not in flags or " avx2" not in flags:  # another architecture
        assert not saturates()
        return
    assert saturates() == ("vnni" not in flags)
