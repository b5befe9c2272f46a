"""What a graph computes is bounded before ONNX Runtime sees it, and no graph of ours is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.parity import fuzz_graphs
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime import VisionEncoder
from vzip.runtime.backends.onnxruntime import session_options, with_output
from vzip.runtime.bundle import graph_call, graph_check, graph_limits, graph_parts, graph_rules
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BundleError

GRAPHS = (
    ("tiny_bundle", "model.onnx"),
    ("tiny_static_bundle", "model.onnx"),
    ("tiny_precisions", "model.int8.onnx"),
    ("tiny_precisions", "model.fp8.onnx"),
)
BIG, LOW = 2**62, -(2**63)


def model(
    operator: str,
    inputs: Sequence[Any],
    outputs: int = 1,
    *,
    kind: int = TensorProto.FLOAT,
    shape: Sequence[int | str] = (1, 4, 8),
    **attributes: Any,
) -> bytes:
    """Return a graph of one node; arrays are constants, and ``x`` is what the graph takes."""
    constants = [
        numpy_helper.from_array(np.asarray(each), f"c{place}")
        for place, each in enumerate(inputs)
        if not isinstance(each, str)
    ]
    names = [each if isinstance(each, str) else f"c{place}" for place, each in enumerate(inputs)]
    domain, _, name = operator.rpartition("::")
    made = [f"y{place}" for place in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(name, names, made, domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [onnx.ValueInfoProto(name=each) for each in made],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return data


def no_weights(tensor: graph_check.ExternalTensor) -> bytes:
    raise AssertionError(tensor)


def check(data: bytes, batch: int = 1) -> None:
    graph_limits.check_encoder(data, no_weights, file="m.onnx", batch=batch)


def i64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


F32 = np.float32
MICROSOFT = "com.microsoft::"
HOSTILE: dict[str, bytes] = {
    "topk-negative": model("TopK", ["x", i64(-1)], 2),
    "divides-by-zero": model("Div", ["x", np.int64(0)], kind=TensorProto.INT64),
    "divides-by-what-is-given": model("Div", ["x", "x"], kind=TensorProto.INT64),
    "divides-the-least-by-minus-one": model("Div", ["x", np.int64(-1)], kind=TensorProto.INT64),
    "topk-beyond": model("TopK", ["x", i64(9)], 2),
    "topk-huge": model("TopK", ["x", i64(BIG)], 2),
    "topk-of-none": model("TopK", ["x", i64()], 2),
    "topk-axis": model("TopK", ["x", i64(1)], 2, axis=3),
    "topk-computed": model("TopK", ["x", "x"], 2, kind=TensorProto.INT64, shape=(1,)),
    "argmax-axis": model("ArgMax", ["x"], axis=-4),
    "softmax-axis": model("Softmax", ["x"], axis=LOW),
    "cumsum-axis": model("CumSum", ["x", np.int64(3)]),
    "reduce-axes": model("ReduceSum", ["x", i64(0, 0)]),
    "reduce-axis": model("ReduceMax", ["x", i64(2**40)]),
    "gather-beyond": model("Gather", ["x", i64(4)], axis=1),
    "gather-before": model("Gather", ["x", i64(-5)], axis=1),
    "gather-elements-beyond": model("GatherElements", ["x", np.full((1, 4, 8), 8)], axis=2),
    "slice-step": model("Slice", ["x", i64(0), i64(1), i64(1), i64(0)]),
    "slice-step-least": model("Slice", ["x", i64(0), i64(1), i64(1), i64(LOW)]),
    "slice-lengths": model("Slice", ["x", i64(0, 0), i64(1)]),
    "slice-empty": model("Slice", ["x", i64(3), i64(3), i64(1)]),
    "slice-axes": model("Slice", ["x", i64(0), i64(1), i64(3)]),
    "pad-huge": model("Pad", ["x", i64(0, 0, BIG, 0, 0, 0)]),
    "pad-much": model("Pad", ["x", i64(0, 0, 0, 0, 0, 2**30)]),
    "pad-negative": model("Pad", ["x", i64(0, 0, -1, 0, 0, 0)]),
    "pad-reflect": model("Pad", ["x", i64(0, 0, 8, 0, 0, 0)], mode="reflect"),
    "pad-lengths": model("Pad", ["x", i64(0, 0)]),
    "reshape-other": model("Reshape", ["x", i64(1, 33)]),
    "reshape-huge": model("Reshape", ["x", i64(BIG, -1)]),
    "reshape-wraps": model("Reshape", ["x", i64(2**32, 2**32, 32)]),
    "reshape-two": model("Reshape", ["x", i64(-1, -1)]),
    "reshape-digits": model("Reshape", ["x", i64(*[1] * 1000)]),
    "transpose-twice": model("Transpose", ["x"], perm=[0, 1, 1]),
    "transpose-axis": model("Transpose", ["x"], perm=[0, 1, LOW]),
    "squeeze-other": model("Squeeze", ["x", i64(1)]),
    "unsqueeze-axis": model("Unsqueeze", ["x", i64(9)]),
    "concat-axis": model("Concat", ["x", "x"], axis=3),
    "split-sizes": model("Split", ["x", i64(-1, 5)], 2, axis=1),
    "split-count": model("Split", ["x"], 2, axis=1, num_outputs=BIG),
    "cast-to": model("Cast", ["x"], to=99),
    "cast-to-text": model("Cast", ["x"], to=TensorProto.STRING),
    "clip-limit": model("Clip", ["x", F32([0, 1])]),
    "norm-scale": model("LayerNormalization", ["x", np.ones(7, F32)]),
    "norm-axis": model("LayerNormalization", ["x", np.ones(8, F32)], axis=-9),
    "matmul-sides": model("MatMul", ["x", np.ones((7, 2), F32)]),
    "conv-group": model("Conv", ["x", np.ones((2, 4, 3), F32)], group=BIG),
    "conv-stride": model("Conv", ["x", np.ones((2, 4, 3), F32)], strides=[0]),
    "conv-dilation": model("Conv", ["x", np.ones((2, 4, 3), F32)], dilations=[2**61]),
    "conv-pads": model("Conv", ["x", np.ones((2, 4, 3), F32)], pads=[2**40, 0]),
    "conv-pads-negative": model("Conv", ["x", np.ones((2, 4, 3), F32)], pads=[-1, 0]),
    "conv-kernel": model("Conv", ["x", np.ones((2, 4, 3), F32)], kernel_shape=[2**31]),
    "expand-huge": model("Expand", ["x", i64(2**31 - 1, 4, 8)]),
    "range-endless": model("Range", [np.int64(0), np.int64(1), np.int64(0)]),
    "range-huge": model("Range", [np.int64(0), np.int64(BIG), np.int64(1)]),
    "attention-heads": model(f"{MICROSOFT}MultiHeadAttention", ["x", "x", "x"], num_heads=0),
    "bits": model(f"{MICROSOFT}MatMulNBits", ["x", np.ones((2, 1, 16), np.uint8),
                  np.ones(2, F32)], K=8, N=2, bits=8, block_size=0),
    "bits-size": model(f"{MICROSOFT}MatMulNBits", ["x", np.ones((2, 1, 15), np.uint8),
                       np.ones(2, F32)], K=8, N=2, bits=8, block_size=16),
    "an-unknown-attribute": model("Neg", ["x"], axis=1),
    "another-type": model("Softmax", ["x"], axis=1.0),
    "an-unknown-value": model("Neg", ["z"]),
    "no-value": model("Neg", [""]),
    "too-many-inputs": model("Neg", ["x", "x"]),
    "too-many-outputs": model("Neg", ["x"], 2),
    "loop": model("Loop", [np.int64(BIG), "x"]),
    "text": model("StringNormalizer", ["x"]),
    "constant-of-shape": model("ConstantOfShape", [i64(2**20, 2**20)]),
    "tile": model("Tile", ["x", i64(1, 1, BIG)]),
    "resize": model("Resize", ["x", "", F32([1, 1, 1e30])]),
    "an-open-extent-too-many": model("Neg", ["x"], shape=(2**31 - 1, 8, 8)),
    "no-extent": model("Neg", ["x"], shape=(0, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_can_not_be_run_is_refused(name: str) -> None:
    with refused(BundleError, got="m.onnx", cure="export the bundle again"):
        check(HOSTILE[name])


SOUND = {
    "topk": model("TopK", ["x", i64(8)], 2),
    "divides": model("Div", ["x", np.int64(2)], kind=TensorProto.INT64),
    "gather": model("Gather", ["x", i64(-4, 3)], axis=1),
    "gathers-what-is-given": model("Gather", ["x", "x"], kind=TensorProto.INT64),
    "slice": model("Slice", ["x", i64(1), i64(2**63 - 1), i64(1)]),
    "slice-backwards": model("Slice", ["x", i64(-1), i64(LOW), i64(2), i64(-3)]),
    "slice-backwards-to": model("Slice", ["x", i64(2**62), i64(1), i64(2), i64(-2)]),
    "pad": model("Pad", ["x", i64(0, 1, 2, 0, 0, 3)]),
    "reshape": model("Reshape", ["x", i64(0, -1, 2)]),
    "squeeze": model("Squeeze", ["x"]),
    "unsqueeze": model("Unsqueeze", ["x", i64(-1, 0)]),
    "split": model("Split", ["x", i64(1, 7)], 2, axis=2),
    "conv": model("Conv", ["x", np.ones((6, 2, 3), F32), np.ones(6, F32)], group=2, strides=[2],
                  pads=[1, 2], dilations=[2], kernel_shape=[3]),
    "reduces-all": model("ReduceMax", ["x"], keepdims=0),
    "argmax": model("ArgMax", ["x"], axis=-2, keepdims=0),
    "expand": model("Expand", ["x", i64(3, 1, 1, 8)]),
    "gemm": model("Gemm", ["x", np.ones((5, 4), F32), np.ones(5, F32)], shape=(4, 3), transA=1,
                  transB=1),
    "range": model("Range", [np.int64(7), np.int64(0), np.int64(-2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_shapes_are_those_that_onnx_runtime_gives(name: str) -> None:
    data = SOUND[name]
    session = onnxruntime.InferenceSession(data)
    (taken,) = session.get_inputs()
    dtype = np.int64 if "int64" in taken.type else F32
    given = np.ones(taken.shape, dtype) if name != "gathers-what-is-given" else np.zeros(
        taken.shape, dtype)  # fmt: skip
    made = session.run(None, {"x": given})
    found = shapes(data, {})
    assert [found[f"y{place}"] for place in range(len(made))] == [each.shape for each in made]


def shapes(data: bytes, choice: dict[str, int], read: Any = no_weights) -> dict[str, Any]:
    """Return the shape of every value of a graph, as the rules have it."""
    found = {}

    class Watched(graph_limits._Walk):
        def _add(self, name: str, value: graph_call.Value, *, held: bool = False) -> None:
            super()._add(name, value, held=held)
            found[name] = value.shape

    parts = graph_parts.Parts(data)
    limits = graph_limits.A_PROMPT
    uses = graph_limits._last_uses(parts)
    Watched(parts, read, choice, limits, uses=uses, place=[]).run()
    return found


@pytest.mark.parametrize(("folder", "file"), GRAPHS)
def test_every_value_of_a_real_graph_has_the_shape_that_onnx_runtime_gives(
    folder: str, file: str
) -> None:
    trial = fuzz_graphs.Trial(GOLDEN / folder, file)
    for batch in (1, 2) if "static" not in folder else (2,):
        found = shapes(trial.whole, {"batch": batch}, trial.read)
        names = [name for node in onnx.load_model_from_string(trial.whole).graph.node
                 for name in node.output]  # fmt: skip
        longer = trial.whole
        for name in names:
            longer = with_output(longer, name)
        outputs = trial.outputs(longer, batch)
        assert len(outputs) > 30
        assert {name: found[name] for name in outputs} == {
            name: value.shape for name, value in outputs.items()
        }


def with_digests(folder: Path, edit: Callable[[Any], None]) -> Path:
    """Edit a bundle's graph and set its manifest right, as somebody hostile would."""
    path = folder / "model.onnx"
    graph = onnx.load_model(path, load_external_data=False)
    edit(graph)
    path.write_bytes(graph.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    manifest["files"]["model.onnx"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def negative_topk(graph: Any) -> None:
    node = next(each for each in graph.graph.node if each.op_type == "TopK")
    (k,) = (each for each in graph.graph.initializer if each.name == node.input[1])
    k.CopyFrom(numpy_helper.from_array(i64(-1), k.name))


def hidden_topk(graph: Any) -> None:
    """Let K lie in the file of weights, where eight bytes of some weight are huge."""
    node = next(each for each in graph.graph.node if each.op_type == "TopK")
    (k,) = (each for each in graph.graph.initializer if each.name == node.input[1])
    k.ClearField("raw_data")
    k.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "8")):
        k.external_data.add(key=key, value=value)


def endless_loop(graph: Any) -> None:
    """Put 2**62 turns before an output."""
    boolean = helper.make_tensor_value_info("again", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [helper.make_tensor_value_info("turn", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
        [boolean],
    )  # fmt: skip
    turns = numpy_helper.from_array(np.int64(BIG), "turns")
    graph.graph.initializer.extend([turns, numpy_helper.from_array(np.array(True), "start")])
    graph.graph.node.insert(0, helper.make_node("Loop", ["turns", "start"], [], body=body))


@pytest.mark.parametrize("edit", [negative_topk, hidden_topk])
def test_one_byte_of_a_bundle_s_graph_is_refused_with_its_digest_right(
    tiny_bundle: Path, edit: Callable[[Any], None]
) -> None:
    with_digests(tiny_bundle, edit)
    for open_ in (read_bundle, lambda path: VisionEncoder.open(path, "onnxruntime")):
        with refused(BundleError, got=("model.onnx", "TopK"), cure="export the bundle again"):
            open_(tiny_bundle)


def test_a_loop_in_a_bundle_s_graph_is_refused(tiny_bundle: Path) -> None:
    with_digests(tiny_bundle, endless_loop)
    with refused(BundleError, got=("model.onnx", "Loop"), cure="export the bundle again"):
        VisionEncoder.open(tiny_bundle, "onnxruntime")


def chain(count: int, name: str = "MatMul", side: int = 2**12) -> bytes:
    """Return a graph in which every node takes what the last one gave, and the first."""
    nodes = [
        helper.make_node(name, [f"y{place - 1}" if place else "x", "x"], [f"y{place}"])
        for place in range(count)
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (side, side))],
        [helper.make_tensor_value_info(f"y{count - 1}", TensorProto.FLOAT, None)],
    )  # fmt: skip
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)]
    ).SerializeToString()
    return data


def test_products_are_counted() -> None:
    check(chain(100))
    with refused(BundleError, got="products", expected=str(2**43)):
        check(chain(200))


def test_values_of_one_moment_are_counted() -> None:
    rows = [f"y{place}" for place in range(64)]
    nodes = [helper.make_node("Neg", ["x"], [row]) for row in rows]
    nodes.append(helper.make_node("Concat", rows, ["z"], axis=0))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2**12, 2**12))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with refused(BundleError, got="values of one moment"):
        check(made.SerializeToString())


def test_what_grows_with_the_cube_of_a_prompt_is_refused() -> None:
    """At 256 tokens it is small, at the length of a real prompt 256 GiB."""
    square = [
        helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2]),
        helper.make_node("Mul", ["x", "y"], ["xy"]),  # [n, n, 1]
    ]
    graph = helper.make_graph(
        square, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, "n", 1))],
        [onnx.ValueInfoProto(name="xy")],
    )  # fmt: skip

    def decoder(more: Sequence[Any], output: str) -> bytes:
        made = onnx.GraphProto()
        made.CopyFrom(graph)
        made.node.extend(more)
        made.output[0].name = output
        made.initializer.append(numpy_helper.from_array(i64(3), "last"))
        opsets = [helper.make_opsetid("", 18)]
        data: bytes = helper.make_model(made, opset_imports=opsets).SerializeToString()
        return data

    graph_limits.check_decoder(decoder([], "xy"), no_weights, file="m.onnx")
    cube = [
        helper.make_node("Unsqueeze", ["xy", "last"], ["xy_"]),  # [n, n, 1, 1]
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),  # [1, 1, n]
        helper.make_node("Mul", ["xy_", "t"], ["cube"]),  # [n, n, 1, n]
    ]
    with refused(BundleError, got="elements in one value"):
        graph_limits.check_decoder(decoder(cube, "cube"), no_weights, file="m.onnx")


def test_a_batch_multiplies_what_a_graph_may_take() -> None:
    data = model("Neg", ["x"], shape=("batch", 2**13, 2**13))
    check(data, batch=64)
    with refused(BundleError, got="elements"):
        check(model("Neg", ["x"], shape=(64, 2**13, 2**13)))


def part(number: int, *fields: bytes) -> bytes:
    data = b"".join(fields)
    size, length = b"", len(data)
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


OPSET = part(8, b"\x10\x12")
SMALL_PARTS: dict[str, bytes] = {
    "empty nodes": part(7, b"\n\0" * 20_000) + OPSET,
    "small nodes": part(
        7, *(part(1, part(1, b"x"), part(2, b"%x" % n), part(4, b"Neg")) for n in range(4_000))
    ) + OPSET,
    "empty inputs": part(7, b"\x5a\0" * 20_000) + OPSET,
    "empty constants": part(7, b"\x2a\0" * 20_000) + OPSET,
    "empty attributes": part(7, part(1, part(4, b"Neg"), b"\x2a\0" * 20_000)) + OPSET,
    "empty names": part(7, part(1, part(4, b"Neg"), b"\n\0" * 20_000)) + OPSET,
    "external data": part(7, part(5, b"\x6a\0" * 20_000)) + OPSET,
    "operators": part(7, *(part(1, part(4, b"%x" % n)) for n in range(10_000))) + OPSET,
    "extents": part(7, part(5, b"\x08\1" * 20_000)) + OPSET,
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_PARTS)
def test_memory_is_in_proportion_to_the_file(name: str) -> None:
    data = SMALL_PARTS[name]
    tracemalloc.start()
    try:
        with refused(BundleError, got="m.onnx"):
            graph_check.check_graph(data, file="m.onnx", data_file="d", data_bytes=0,
                                    operators=graph_check.OWN)  # fmt: skip
            check(data)
        assert tracemalloc.get_traced_memory()[1] < 16 * len(data) + 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [1, 5])
def test_a_graph_has_so_many_parts_and_no_more(number: int) -> None:
    data = part(7, bytes([number << 3 | 2, 0]) * (2**18 + 1)) + OPSET
    with refused(BundleError, got="messages"):
        graph_check.external_tensors(data, file="m.onnx")


def test_every_listed_operator_has_a_rule() -> None:
    own = graph_check.QUANTISED | graph_check.CPU_ENGINE
    assert own - graph_rules.RULES.keys() == set()


def outcomes(folder: Path, file: str, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield the number of each damaged graph and what became of it, each process until it ends."""
    while first < last:
        command = [sys.executable, fuzz_graphs.__file__, folder, file, str(first), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        yield from zip(map(int, lines[::2]), lines[1::2], strict=False)
        if done.returncode == 0:
            return
        first += len(lines) // 2
        yield first, f"ended the process with {done.returncode}: {done.stderr[-500:]}"
        first += 1


def judge(folder: Path, file: str, count: int) -> None:
    found = dict(outcomes(folder, file, 0, count))
    assert len(found) == count
    assert {seed: what for seed, what in found.items() if what.startswith("ended")} == {}
    assert found[0] == "ran"
    assert sum(what == "ran" for what in found.values()) > count / 50
    assert sum(what.startswith("refused") for what in found.values()) > count / 4


def test_no_damaged_graph_ends_the_process() -> None:
    judge(GOLDEN / "tiny_bundle", "model.onnx", 200)


@pytest.mark.full
@pytest.mark.parametrize(("folder", "file"), GRAPHS)
def test_none_of_thousands_does(folder: str, file: str) -> None:
    judge(GOLDEN / folder, file, 3000)


def test_a_graph_that_is_another_one_to_onnx_runtime_is_refused(tiny_bundle: Path) -> None:
    """Four bytes in a producer's name are the mark of ONNX Runtime's own format."""
    whole = (tiny_bundle / "model.onnx").read_bytes()
    twofold = part(2, b"\0\0ORTM" + bytes(40)) + whole
    assert onnx.load_model_from_string(twofold).graph.node
    with pytest.raises(Exception, match="ORT"):  # which looks at the other graph
        onnxruntime.InferenceSession(twofold)
    with refused(BundleError, got="own format"):
        graph_check.external_tensors(twofold, file="m.onnx")
    options = session_options(onnxruntime)
    key = "session.load_model_format"
    assert options.get_session_config_entry(key) == "ONNX"
