"""Every operator of the backend 'pytorch' against ONNX Runtime, on random inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vzip.export.torch_backend import PyTorch
from vzip.export.torch_ops import OPERATORS
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Graph:
    """What a backend needs of a bundle."""

    model: bytes
    path: Path

    @property
    def data_path(self) -> Path | None:
        path = self.path / "model.onnx.data"
        return path if path.exists() else None

    def read_model(self) -> bytes:
        return self.model


def opened(model: bytes, folder: Path, extra: tuple[str, ...] = ()) -> PyTorch:
    return PyTorch(cast("Bundle", Graph(model, folder)), extra)


NONE = None  # an input that is left out


def floats(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def ints(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, size=shape)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float, dtype: type = np.int64) -> np.ndarray:
    return np.array(value, dtype)


def case(
    operator: str,
    *inputs: np.ndarray | None,
    outputs: int = 1,
    opset: int = 18,
    name: str = "",
    **attributes: Any,
) -> Any:
    label = "-".join(
        [operator, *([name] if name else []), *(f"{k}={v}" for k, v in attributes.items())]
    )
    label = label if len(label) < 80 else f"{operator}-{name}"
    return pytest.param((operator, inputs, outputs, opset, attributes), id=label)


X = floats(2, 3, 4)
POSITIVE = np.abs(X) + np.float32(0.1)
TIES = ints(0, 3, 3, 8).astype(np.float32)
WIDE, HALVES = X * 3, np.arange(-4, 4).astype(np.float32) + np.float32(0.5)
STEPS, BYTES = np.abs(floats(4)) + np.float32(0.01), ints(-128, 128, 2, 3, 4).astype(np.int8)
BOOLS, OTHERS = ints(0, 2, 2, 3) > 0, ints(0, 2, 2, 3) > 0
MODULI = ints(1, 5, 2, 3) * (ints(0, 2, 2, 3) * 2 - 1)

CASES = [
    *(case(op, X) for op in ("Neg", "Abs", "Erf", "Tanh", "Sigmoid", "Floor", "Identity")),
    *(case(op, X.astype(np.float16), name="half") for op in ("Neg", "Tanh", "Sigmoid")),
    case("Sqrt", POSITIVE),
    case("Reciprocal", POSITIVE),
    case("Neg", ints(-5, 5, 3), name="int"),
    *(case(op, X, floats(3, 1)) for op in ("Add", "Sub", "Mul", "Div")),
    case("Add", X.astype(np.float16), floats(4, dtype=np.float16), name="half"),
    case("Mul", X.astype(np.float16), floats(4, dtype=np.float16), name="half"),
    *(case(op, ints(-9, 9, 2, 3), MODULI, name="int") for op in ("Add", "Sub", "Mul", "Div")),
    case("Mod", ints(-9, 9, 2, 3), MODULI),
    case("Mod", ints(-9, 9, 2, 3), MODULI, fmod=1),
    case("Mod", X, floats(4), fmod=1, name="float"),
    case("Pow", POSITIVE, floats(4)),
    case("Pow", X, scalar(2, np.float32), name="square"),
    case("Pow", X, scalar(3), name="int exponent"),
    case("Pow", ints(0, 5, 3), scalar(2.0, np.float32), name="int base"),
    *(case(op, TIES, ints(0, 3, 3, 1).astype(np.float32)) for op in ("Equal", "Greater", "Less")),
    *(case(op, TIES, ints(0, 3, 8).astype(np.float32)) for op in ("GreaterOrEqual", "LessOrEqual")),
    case("Equal", ints(0, 3, 4, 1), ints(0, 3, 1, 5), name="int"),
    case("Equal", BOOLS, OTHERS, name="bool"),
    *(case(op, BOOLS, OTHERS) for op in ("And", "Or")),
    case("Not", BOOLS),
    case("Where", BOOLS, floats(2, 3), floats(3)),
    case("Where", BOOLS, ints(0, 9, 2, 3), scalar(-1), name="int"),
    case("Max", X, floats(3, 1), floats(4)),
    case("Min", X, floats(3, 1), floats(4)),
    case("Max", X, name="one"),
    case("Max", ints(0, 9, 3), ints(0, 9, 3), name="int"),
    case("Clip", X, scalar(-0.5, np.float32), scalar(0.5, np.float32)),
    case("Clip", X, NONE, scalar(0.5, np.float32), name="max only"),
    case("Clip", X, scalar(-0.5, np.float32), name="min only"),
    case("Clip", X, name="neither"),
    case("Cast", X * 10, to=TensorProto.INT64),
    case("Cast", X, to=TensorProto.FLOAT16),
    case("Cast", X * 2, to=TensorProto.BOOL),
    case("Cast", X, to=TensorProto.DOUBLE),
    case("Cast", ints(0, 256, 3, 3).astype(np.uint8), to=TensorProto.FLOAT),
    case("Cast", ints(0, 256, 3, 3).astype(np.uint8), to=TensorProto.FLOAT16),
    case("Cast", BOOLS, to=TensorProto.FLOAT, name="bool"),
    case("Cast", ints(-9, 9, 3), to=TensorProto.INT32),
    case("Gelu", X, opset=20),
    case("Gelu", X, opset=20, approximate="tanh"),
    case("Softmax", X),
    case("Softmax", X, axis=1),
    case("Softmax", X * 50, axis=-3, name="large"),
    case("Softmax", X.astype(np.float16), name="half"),
    case("LayerNormalization", X, floats(4), floats(4)),
    case("LayerNormalization", X, floats(4), floats(4), epsilon=0.1, axis=-1),
    case("LayerNormalization", X, floats(3, 4), floats(3, 4), axis=1),
    case("LayerNormalization", X, floats(4), name="no bias"),
    case(
        "LayerNormalization",
        (X * 100).astype(np.float16),
        floats(4, dtype=np.float16),
        floats(4, dtype=np.float16),
        name="half",
        opset=17,
    ),
    case("Shape", X),
    case("Shape", X, start=-2),
    case("Shape", X, start=1, end=-1),
    case("Reshape", X, i64(4, 6)),
    case("Reshape", X, i64(0, -1)),
    case("Reshape", X, i64(-1, 0, 2), name="copied and inferred"),
    case("Reshape", floats(0, 3), i64(3, 0), allowzero=1),
    case("Transpose", X),
    case("Transpose", X, perm=[1, 2, 0]),
    case("Concat", X, floats(2, 5, 4), axis=1),
    case("Concat", X, floats(2, 3, 1), X, axis=-1),
    case("Unsqueeze", X, i64(0)),
    case("Unsqueeze", X, i64(-1, 1)),
    case("Unsqueeze", X, i64(3, 0), name="unordered"),
    case("Squeeze", floats(1, 3, 1, 2)),
    case("Squeeze", floats(1, 3, 1, 2), i64(-2)),
    case("Squeeze", floats(1, 3, 1, 2), i64(0, 2)),
    case("Expand", floats(3, 1), i64(2, 3, 4)),
    case("Expand", X, i64(1, 4), name="to its own shape"),
    case("Slice", X, i64(1), i64(3), i64(2)),
    case("Slice", X, i64(0, -2), i64(2, 2**62), name="no axes"),
    case("Slice", X, i64(-1), i64(-(2**62)), i64(-1), i64(-1), name="reversed"),
    case("Slice", X, i64(3, 2), i64(0, 0), i64(2, 1), i64(-2, -1), name="backwards"),
    case("Slice", X, i64(0), i64(100), i64(-1), i64(2), name="every other, clamped"),
    case("Slice", X, i64(3), i64(1), i64(2), name="empty"),
    case("Pad", X, i64(1, 0, 2, 0, 3, 1)),
    case("Pad", X, i64(1, 0, 2, 0, 3, 1), scalar(7.5, np.float32), name="value"),
    case("Pad", X, i64(2, 1), NONE, i64(-1), name="one axis"),
    case("Pad", X, i64(1, 0, 0, 3), scalar(-1, np.float32), i64(-1, 0), name="two axes"),
    case("Pad", X, i64(-1, 0, 1, 0, -1, 0), name="negative"),
    case("Pad", ints(0, 9, 2, 3), i64(0, 1, 0, 1), scalar(4), name="int"),
    case("Pad", X, i64(0, 1, 0, 0, 0, 2), mode="constant", opset=17),
    case("Split", X, outputs=2, num_outputs=2),
    case("Split", floats(2, 5), outputs=3, axis=1, num_outputs=3, name="uneven"),
    case("Split", X, outputs=2, axis=-1, opset=17),
    case("Split", X, i64(1, 3), outputs=2, axis=2),
    case("ConstantOfShape", i64(2, 3)),
    case("ConstantOfShape", i64(2), value=numpy_helper.from_array(i64(7)), name="7"),
    case("Range", scalar(3), scalar(11), scalar(2)),
    case("Range", scalar(5), scalar(-3), scalar(-3), name="down"),
    case("Range", scalar(0, np.float32), scalar(1, np.float32), scalar(0.3, np.float32), name="f"),
    case("Gather", X, ints(-4, 4, 2, 5), axis=2),
    case("Gather", X, ints(-2, 2, 3)),
    case("Gather", X, scalar(-1), axis=1, name="scalar"),
    case("Gather", ints(0, 9, 4), i64(3), axis=-1, name="int"),
    case("GatherElements", X, ints(-4, 4, 2, 3, 2), axis=2),
    case("GatherElements", X, ints(-3, 3, 2, 6, 4), axis=-2),
    case("GatherND", X, np.stack([ints(-2, 2, 5), ints(-3, 3, 5)], -1)),
    case("GatherND", X, ints(-2, 2, 4, 1), name="rows"),
    case("GatherND", X, ints(-3, 3, 2, 5, 1), batch_dims=1),
    case("GatherND", X, ints(-4, 4, 2, 3, 1), batch_dims=2),
    case("ScatterElements", X, np.array([[[1, -1], [0, 2]]]), floats(1, 2, 2), axis=2),
    case("ScatterElements", X, np.array([[[1], [0], [-1]]]), floats(1, 3, 1), axis=-1),
    case("OneHot", ints(-5, 5, 2, 3), scalar(5), np.array([0, 1], np.float32)),
    case("OneHot", ints(-5, 5, 2, 3), i64(5), np.array([2, 9], np.int64), axis=1),
    case("OneHot", i64(7, -8, 0), scalar(5), np.array([0, 1], np.float32), axis=0, name="outside"),
    case("TopK", X, i64(2), outputs=2),
    case("TopK", X, i64(3), outputs=2, axis=1, largest=0),
    case("TopK", TIES, i64(6), outputs=2, name="ties"),
    case("TopK", TIES, i64(6), outputs=2, largest=0, name="ties"),
    case("TopK", np.zeros((2, 40), np.float32), i64(9), outputs=2, name="all tied"),
    case("TopK", TIES.T.copy(), i64(6), outputs=2, axis=-2, name="ties"),
    case("ArgMax", X),
    case("ArgMax", X, axis=-1, keepdims=0),
    case("ArgMax", TIES, axis=1, name="ties"),
    case("ArgMax", TIES, axis=0, keepdims=0, name="ties"),
    case("CumSum", X, scalar(1)),
    case("CumSum", X, scalar(-1), exclusive=1),
    case("CumSum", X, scalar(2), reverse=1),
    case("CumSum", ints(0, 9, 3, 4), scalar(0), reverse=1, exclusive=1, name="int"),
    *(case(op, X, i64(1)) for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2")),
    *(
        case(op, X, i64(-1, 0), keepdims=0)
        for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2")
    ),
    *(case(op, X, name="all") for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2")),
    *(
        case(op, X, opset=17, axes=[-2], keepdims=0)
        for op in ("ReduceMean", "ReduceMax", "ReduceL2")
    ),
    case("ReduceSum", X, noop_with_empty_axes=1),
    case("ReduceSum", ints(0, 9, 3, 4), i64(1), name="int"),
    case("ReduceMax", ints(0, 9, 3, 4), i64(1), name="int"),
    case("ReduceSum", X.astype(np.float16), i64(2), name="half"),
    case("MatMul", floats(2, 5, 3, 4), floats(5, 4, 2)),
    case("MatMul", floats(3, 4), floats(4), name="vector"),
    case("MatMul", floats(3, 4, dtype=np.float16), floats(4, 2, dtype=np.float16), name="half"),
    case("Gemm", floats(3, 4), floats(4, 2), floats(2)),
    case("Gemm", floats(4, 3), floats(2, 4), floats(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm", floats(3, 4), floats(4, 2), name="no bias"),
    case("QuantizeLinear", WIDE, scalar(0.02, np.float32), scalar(0, np.int8), name="saturates"),
    case("QuantizeLinear", HALVES, scalar(1, np.float32), scalar(0, np.int8), name="to even"),
    case("QuantizeLinear", WIDE, scalar(0.05, np.float32), scalar(9, np.uint8), name="uint8"),
    case("QuantizeLinear", WIDE, STEPS, ints(-3, 3, 4).astype(np.int8), axis=-1),
    case("QuantizeLinear", X, STEPS[:3], np.zeros(3, np.int8), name="second axis"),
    case("DequantizeLinear", BYTES, scalar(0.02, np.float32), scalar(3, np.int8)),
    case("DequantizeLinear", BYTES, STEPS, np.zeros(4, np.int8), axis=-1),
    case("DequantizeLinear", BYTES, STEPS[:3], ints(-3, 3, 3).astype(np.int8), name="second axis"),
    case(
        "DequantizeLinear",
        BYTES,
        STEPS.astype(np.float16),
        np.zeros(4, np.int8),
        axis=-1,
        opset=19,
        name="half",
    ),
    case("Conv", floats(2, 3, 8, 8), floats(5, 3, 4, 4), strides=[4, 4], name="patches"),
    case("Conv", floats(2, 3, 9, 8), floats(5, 3, 4, 4), floats(5), strides=[4, 4], name="margin"),
    case("Conv", floats(1, 2, 7, 6), floats(4, 2, 3, 2), pads=[1, 0, 2, 1], dilations=[2, 1]),
    case("Conv", floats(1, 4, 5, 5), floats(6, 2, 3, 3), group=2, strides=[1, 2]),
    case(
        "Conv",
        floats(1, 3, 8, 8, dtype=np.float16),
        floats(5, 3, 4, 4, dtype=np.float16),
        strides=[4, 4],
        name="half",
    ),
]  # fmt: skip


def model_of(
    operator: str,
    inputs: tuple[np.ndarray | None, ...],
    outputs: int,
    opset: int,
    attributes: dict[str, Any],
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a model of one node, and its feeds."""
    feeds = {f"i{k}": array for k, array in enumerate(inputs) if array is not None}
    names = [f"i{k}" if array is not None else "" for k, array in enumerate(inputs)]
    graph = helper.make_graph(
        [helper.make_node(operator, names, [f"o{k}" for k in range(outputs)], **attributes)],
        "one",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=f"o{k}") for k in range(outputs)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model.SerializeToString(), feeds


@pytest.mark.parametrize("node", CASES)
def test_operator(tmp_path: Path, node: tuple[Any, ...]) -> None:
    outputs = node[2]
    model, feeds = model_of(*node)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)
    got = opened(model, tmp_path).run(feeds)
    assert list(got) == [f"o{k}" for k in range(outputs)]
    for each, want in zip(got.values(), expected, strict=True):
        assert each.dtype == want.dtype
        assert each.shape == want.shape
        if want.dtype.kind == "f":
            tolerance = 4e-3 if want.dtype == np.float16 else 2e-6
            np.testing.assert_allclose(each, want, rtol=tolerance, atol=tolerance)
        else:
            assert np.array_equal(each, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_fp8_saturates_and_rounds_to_even(tmp_path: Path, dtype: type) -> None:
    # 17 and 19 lie between 16, 18 and 20; 448 is the largest, 2**-9 the smallest magnitude.
    values = [0, 1.03, -17, 19, 448, 465, -600, 2.0**-9, 2.0**-10, 3 * 2.0**-11, np.inf]
    x = np.array([*values, *np.linspace(-500, 500, 997)], dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = [
        numpy_helper.from_array(np.array(1, dtype), "step"),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["small"]),
        helper.make_node("DequantizeLinear", ["small", "step", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, x.shape)],
        constants,
    )
    opset = helper.make_opsetid("", 19)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    (got,) = opened(model, tmp_path).run({"x": x}).values()
    assert got.dtype == dtype
    assert np.array_equal(got, want)
    assert got[:11].tolist() == [0, 1, -16, 20, 448, 448, -448, 2.0**-9, 0, 2.0**-9, 448]


def test_every_operator_has_a_case() -> None:
    assert {each.values[0][0] for each in CASES} == set(OPERATORS)


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("value", numpy_helper.from_array(np.array([[1, 2]], np.int64)), np.array([[1, 2]])),
        ("value_int", 3, np.array(3)),
        ("value_ints", [3, 4], np.array([3, 4])),
        ("value_float", 0.5, np.array(0.5, np.float32)),
        ("value_floats", [0.5, 2.0], np.array([0.5, 2], np.float32)),
    ],
)
def test_constants(tmp_path: Path, attribute: str, value: Any, expected: np.ndarray) -> None:
    model, _ = model_of("Constant", (), 1, 18, {attribute: value})
    (got,) = opened(model, tmp_path).run({}).values()
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)


def test_names_every_operator_that_it_does_not_know(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"]),
        helper.make_node("Add", ["x", "x"], ["b"]),
        helper.make_node("Attention", ["x"], ["c"], domain="com.microsoft"),
        helper.make_node("If", ["x"], ["d"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [onnx.ValueInfoProto(name=name) for name in "abcd"],
    )
    model = helper.make_model(graph).SerializeToString()
    with pytest.raises(
        BackendError, match=r"\['If', 'NonZero', 'com.microsoft::Attention'\]; the g"
    ):
        opened(model, tmp_path)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "message"),
    [
        ("Pad", (X, i64(0, 1, 0, 0, 0, 0)), {"mode": "edge"}, "Pad of mode edge"),
        ("ArgMax", (X,), {"select_last_index": 1}, "ArgMax with select_last_index"),
        ("LayerNormalization", (X, floats(4)), {"stash_type": 11}, "a stash_type but 1"),
        ("Conv", (floats(1, 1, 4, 4), floats(1, 1, 2, 2)), {"auto_pad": "SAME_UPPER"}, "auto_pad"),
        ("Conv", (floats(1, 1, 4), floats(1, 1, 2)), {}, "other than two spatial axes"),
        (
            "ScatterElements",
            (X, ints(0, 1, 1, 1, 1), floats(1, 1, 1)),
            {"reduction": "add"},
            "ScatterElements with a reduction",
        ),
        ("Cast", (X,), {"to": TensorProto.STRING}, "Cast to ONNX data type 8"),
        ("Squeeze", (X, i64(1)), {}, r"Squeeze of axes \[1\] of shape \[2, 3, 4\]"),
    ],
)
def test_refuses_what_it_would_have_to_guess(
    tmp_path: Path,
    operator: str,
    inputs: tuple[np.ndarray, ...],
    attributes: dict[str, Any],
    message: str,
) -> None:
    model, feeds = model_of(operator, inputs, 1, 18, attributes)
    with pytest.raises(BackendError, match=f"doesn't know .*{message}"):
        opened(model, tmp_path).run(feeds)


def test_a_failing_node_is_named_and_the_next_run_is_clean(tmp_path: Path) -> None:
    model, _ = model_of("Gather", (floats(3), i64(0)), 1, 18, {})
    backend = opened(model, tmp_path)
    array = floats(3)
    with pytest.raises(BackendError, match="pytorch failed at the node Gather #0: ") as raised:
        backend.run({"i0": array, "i1": i64(7)})
    assert "\n" not in str(raised.value)
    assert backend.run({"i0": array, "i1": i64(1)})["o0"] == array[1]


def test_refuses_feeds_of_another_dtype_or_name(tmp_path: Path) -> None:
    model, _ = model_of("Neg", (X,), 1, 18, {})
    backend = opened(model, tmp_path)
    for feeds in ({"i0": X.astype(np.float64)}, {"x": X}):
        with pytest.raises(BackendError, match=r"the graph expects .*manifest and graph disagree"):
            backend.run(feeds)


def test_every_value_can_be_had(tiny_bundle: Path, golden: dict[str, np.ndarray]) -> None:
    data = (tiny_bundle / "model.onnx").read_bytes()
    names = [name for node in onnx.load_model_from_string(data).graph.node for name in node.output]
    extra = tuple(name for name in names if name not in {"image_embeds", "kept_indices"})
    graph = onnx.load(tiny_bundle / "model.onnx")
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    feeds = {"image": golden["images"][:3]}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    expected = dict(
        zip([each.name for each in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    got = opened(data, tiny_bundle, extra).run(feeds)
    assert set(got) == set(expected) == set(names)
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


def test_keeps_no_more_values_than_it_needs(tiny_bundle: Path) -> None:
    steps = opened((tiny_bundle / "model.onnx").read_bytes(), tiny_bundle)._steps
    assert steps is not None
    made = {name for step in steps for name in step.outputs} | {"image"}
    dropped = [name for step in steps for name in step.dropped]
    assert len(dropped) == len(set(dropped))
    assert made - set(dropped) == {"image_embeds", "kept_indices"}


def test_refuses_external_data_of_another_size(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    (tensor,) = (each for each in model.graph.initializer if each.name == "patch_weight")
    tensor.dims[0] += 1
    with pytest.raises(BackendError, match="'patch_weight' takes 3072 bytes, expected those of fl"):
        opened(model.SerializeToString(), tiny_bundle)


def test_external_data_need_not_be_aligned(tmp_path: Path) -> None:
    weights = floats(5)
    (tmp_path / "model.onnx.data").write_bytes(b"x" + weights.tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[5])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx.data", "offset": "1", "length": "20"}.items():
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Neg", ["w"], ["y"])], "g", [], [onnx.ValueInfoProto(name="y")], [tensor]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert np.array_equal(opened(model.SerializeToString(), tmp_path).run({})["y"], -weights)
