"""What an engine's time is summed up to; on a GPU, `benchmarks/gpu_evidence.py` records it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import tensorrt_rtx

from tests.export import fake_tensorrt
from tests.export.layouts import write_layout
from tests.refusals import refused
from tests.runtime.fake_gpu import with_engine
from vzip.export.algorithm.budget import Budget
from vzip.export.engines.tensorrt.api import load_bindings
from vzip.export.engines.tensorrt.layers import EngineLayers, inspect_engine
from vzip.export.graph.reading import read_graph
from vzip.export.graph.trace import GraphOptions
from vzip.export.inspect import engine_profile
from vzip.export.inspect.engine_profile import (
    OPAQUE,
    REFORMAT,
    UNKNOWN,
    profile_engine,
    summary,
)
from vzip.export.inspect.parts import SELECTION, parts
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, BundleError

LAYERS = 3  # that run, of the tiny checkpoint's four


def exported(folder: Path, family: str = "llava", **source: Any) -> Bundle:
    write_layout("llava-hf-single", folder / "tiny", family=family)
    cls_token = family == "llava"
    return export_bundle(
        WeightSource(str(folder / "tiny"), **source),
        folder / "bundle",
        budget=Budget(7, 3, cls_token),
        precision="fp16",
        options=GraphOptions(batch=3, dynamic_batch=True),
        check_images=(),
        step=lambda _: None,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("profile"))


def graph_of(bundle: Bundle) -> list[ir.Node]:
    return list(read_graph(bundle, "a test").graph)


def takes(node: ir.Node, name: str) -> bool:
    return any(value is not None and value.name == name for value in node.inputs)


def operators(nodes: list[ir.Node], part: str) -> Counter[str]:
    found = parts(nodes)
    return Counter(node.op_type for node in nodes if found[node.name] == part)


# What a node is for


@pytest.mark.slow
def test_parts_of_a_graph(bundle: Bundle) -> None:
    nodes = graph_of(bundle)
    assert set(parts(nodes)) == {node.name for node in nodes}
    # Of a layer: q, k, v, QKᵀ, times V, out; fc1, fc2.
    attention = operators(nodes, "attention")
    assert (attention["MatMul"], attention["Softmax"]) == (6 * LAYERS, LAYERS)
    feed_forward = operators(nodes, "feed-forward")
    assert (feed_forward["MatMul"], feed_forward["Sigmoid"]) == (2 * LAYERS, LAYERS)
    assert operators(nodes, "LayerNorm") == {"LayerNormalization": 2 * LAYERS + 1}
    assert operators(nodes, "projector")["MatMul"] == 2
    assert operators(nodes, "embedding")["Conv"] == 1
    selection = operators(nodes, SELECTION)
    # The row of scores, the targets' keys, their similarities, the merge.
    assert (selection["TopK"], selection["MatMul"], selection["Softmax"]) == (2, 4, 1)
    assert not {"Conv", "LayerNormalization"} & set(selection)


@pytest.mark.slow
def test_the_casts_around_the_merge_are_the_merges(bundle: Bundle) -> None:
    nodes = graph_of(bundle)
    found = parts(nodes)
    (merge,) = (node for node in nodes if node.op_type == "MatMul" and takes(node, "token_weights"))
    casts = [
        node
        for node in nodes
        if node.op_type == "Cast"
        and (set(node.outputs) & set(merge.inputs) or set(node.inputs) & set(merge.outputs))
    ]
    assert len(casts) == 2  # the bundle is FP16, the merge FP32
    assert {found[cast.name] for cast in casts} == {SELECTION}


@pytest.mark.slow
def test_pooled_tokens_are_merged_behind_the_projector(tmp_path: Path) -> None:
    nodes = graph_of(exported(tmp_path, "llava-onevision", media="video"))
    assert operators(nodes, "projector")["MatMul"] == 2
    assert operators(nodes, "attention")["Softmax"] > 0
    assert operators(nodes, SELECTION)["MatMul"] == 7


def test_another_graph_is_refused(bundle: Bundle) -> None:
    nodes = [node for node in graph_of(bundle) if not takes(node, "token_weights")]
    with refused(BundleError, got="token_weights", expected="vzip export"):
        parts(nodes)


# What a layer is for


def named(nodes: list[ir.Node], part: str, operator: str) -> str:
    found = parts(nodes)
    return next(n.name for n in nodes if found[n.name] == part and n.op_type == operator)


def layers_of(*layers: tuple[str, str, tuple[str, ...]]) -> EngineLayers:
    shown = tuple((name, kind, "Half") for name, kind, _ in layers)
    return EngineLayers(shown, tuple(origins for *_, origins in layers), 0, 1)


def test_time_is_summed_by_part(bundle: Bundle) -> None:
    nodes = graph_of(bundle)
    fc1, add = named(nodes, "feed-forward", "MatMul"), named(nodes, "attention", "Add")
    norm, top = named(nodes, "LayerNorm", "LayerNormalization"), named(nodes, SELECTION, "TopK")
    product = named(nodes, "attention", "MatMul")
    layers = layers_of(
        ("gemm_1", "gemm", (fc1, add)),  # the product weighs more than what is fused to it
        ("__myl_AddMeanSub", "kgen", (add, norm)),  # and a norm more than a sum
        ("_gemm_mha_v2_myl0_3", "fused", ()),
        ("Reformatting CopyNode for Input Tensor 0 to x", "Reformat", ()),
        ("topk", "TopK", (top,)),
        ("__myl_Move", "kgen", ()),
        (f"{product} + {add}", "MatrixMultiply", ()),  # names alone, as from 8.6
    )
    times = [4.0, 1.0, 2.0, 0.5, 0.25, 0.125, 2.125]
    run = [(name, ms) for (name, *_), ms in zip(layers.layers, times, strict=True)]
    slow = [(name, 10 * ms) for name, ms in run]
    found = summary([run, slow, run], layers, nodes)
    assert found.parts == {
        "attention": 4.125, "feed-forward": 4.0, "LayerNorm": 1.0, REFORMAT: 0.5, SELECTION: 0.25,
        UNKNOWN: 0.125,
    }  # fmt: skip
    assert next(iter(found.parts)) == "attention"
    assert found.layers["attention"] == 2
    assert (found.calls, found.total_ms, found.reformat_layers) == (3, 10.0, 1)
    assert found.share(SELECTION) == 0.025
    assert found.slowest[0] == ("gemm_1", "feed-forward", 4.0)
    written = json.loads(json.dumps(found.to_json()))
    assert (written["selection_share"], written["unknown_share"]) == (0.025, 0.0125)
    assert written["parts"]["LayerNorm"] == {"ms": 1.0, "share": 0.1, "layers": 1}
    assert written["fused_attention"] == 1


def test_a_layer_of_many_nodes_is_named_so(bundle: Bundle) -> None:
    """TensorRT 8.6 shows a transformer as one layer; no part of the graph is to get its time."""
    product = named(graph_of(bundle), "attention", "MatMul")
    name = "{ForeignNode[" + product + "..." + product + "]}"
    found = summary([[(name, 1.0)]], layers_of((name, "Myelin", ())), graph_of(bundle))
    assert found.parts == {OPAQUE: 1.0}


def test_a_name_that_stands_twice_in_a_run_counts_twice(bundle: Bundle) -> None:
    found = summary([[("x", 1.0), ("x", 2.0)]] * 3, layers_of(("x", "kgen", ())), graph_of(bundle))
    assert (found.parts, found.total_ms) == ({UNKNOWN: 3.0}, 3.0)


def test_a_layer_that_the_inspector_does_not_know_is_unknown(bundle: Bundle) -> None:
    found = summary([[("y", 1.0)]], layers_of(("x", "kgen", ())), graph_of(bundle))
    assert found.parts == {UNKNOWN: 1.0}


@pytest.mark.slow
def test_a_profiler_that_says_nothing(bundle: Bundle) -> None:
    with refused(BackendError, got="2 runs", expected="at least one", cure="vzip build"):
        summary([[], []], layers_of(), graph_of(bundle))


def test_what_the_inspector_says_of_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT 10 prints them; 8.6 has no metadata, and layers' names alone come as texts."""
    trt = fake_tensorrt.make("10.3")
    said = {
        "Layers": [
            {"Name": "a", "LayerType": "gemm",
             "Metadata": "[ONNX Layer: node_matmul][ONNX Layer: node_add_1]"},
            {"Name": "b", "LayerType": "kgen",
             "Metadata": "[ONNX Layer: node_mul]\x1e[ONNX Layer: node_view]"},
            {"Name": "c", "LayerType": "Reformat", "Metadata": ""},
            "d",
        ]
    }  # fmt: skip
    monkeypatch.setattr(trt.EngineInspector, "get_engine_information", lambda *_: json.dumps(said))
    fake_tensorrt.install(monkeypatch, trt)
    monkeypatch.setattr(cuda, "load", lambda: None)
    found = inspect_engine(load_bindings("tensorrt"), memoryview(b"ftrt and so on"))
    assert found.origins == (("node_matmul", "node_add_1"), ("node_mul", "node_view"), (), ())
    assert [name for name, *_ in found.layers] == ["a", "b", "c", "d"]


# The whole way; `tests/runtime/backends/test_tensorrt_backend.py` has what the backend does


def test_an_open_engine_is_profiled(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [(named(graph_of(bundle), "projector", "MatMul"), 0.75), ("_gemm_mha_v2", 0.25)]
    warm = [(name, 100 * ms) for name, ms in run]
    asked: list[Any] = []

    def inspect(bindings: Any, plan: Any) -> EngineLayers:
        asked.append((bindings, bytes(plan[:4])))
        return layers_of(*((name, "", ()) for name, _ in run))

    def layer_ms(rows: int, calls: int) -> list[list[tuple[str, float]]]:
        asked.append((rows, calls))
        return [warm] * 2 + [run] * (calls - 2)

    monkeypatch.setattr(engine_profile, "load_bindings", lambda name: name)
    monkeypatch.setattr(engine_profile, "inspect_engine", inspect)
    opened: Any = SimpleNamespace(engine="orin", layer_ms=layer_ms)
    found = profile_engine(opened, with_engine(bundle.path, "10"), 2, calls=4, warm_up=2)
    assert asked == [(2, 6), ("tensorrt", b"ftrt")]
    assert (found.calls, found.total_ms) == (4, 1.0)
    assert found.parts == {"projector": 0.75, "attention": 0.25}


def test_the_real_bindings_take_a_profiler_as_ours() -> None:
    """TensorRT-RTX's wheel, which needs no GPU for this; 8.6 and 10 have the same names."""
    taken: list[tuple[str, float]] = []

    class Profiler(tensorrt_rtx.IProfiler):
        def __init__(self) -> None:
            tensorrt_rtx.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            taken.append((layer_name, ms))

    Profiler().report_layer_time("a", 1.0)
    assert taken == [("a", 1.0)]
    assert hasattr(tensorrt_rtx.IExecutionContext, "profiler")
