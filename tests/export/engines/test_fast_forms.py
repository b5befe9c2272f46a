"""Forms of exported graphs, each run beside the graph that they were made from.

What a form is to compute in 8 bits is computed here again, in float64 from its own description.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from benchmarks.quantization import WithOutliers
from tests.export.layouts import write_layout
from vzip.export.algorithm.budget import Budget
from vzip.export.engines.cpu import choice, forms
from vzip.export.engines.cpu import form_graph as fast_graph
from vzip.export.engines.cpu.form_graph import Graph, Node, number
from vzip.export.engines.cpu.forms import FORMS, made, with_attention
from vzip.export.engines.cpu.patterns import gates, linears, norms
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import Method, WeightSource, export_bundle
from vzip.runtime import VisionEncoder
from vzip.runtime.agreement import read_reference
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS
from vzip.runtime.bundle.onnx_wire import with_output
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BundleError

Array = np.ndarray[Any, Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "image": {},
    "pixels-17": {"options": GraphOptions("pixel_values", 2, opset=17)},
    "outliers": {"source": WithOutliers},
    "fp16": {"precision": "fp16"},
    "siglip": {"family": "llava-siglip"},
}
MakeBundle = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Return a function that gives a bundle of `OPTIONS`; tests must not change it."""
    done: dict[str, Bundle] = {}
    folder = tmp_path_factory.mktemp("fast")

    def make(name: str) -> Bundle:
        if name not in done:
            change = dict(OPTIONS[name])
            source, family = change.pop("source", WeightSource), change.pop("family", "llava")
            write_layout("llava-hf-single", folder / f"{name}-model", family=family)
            options: dict[str, Any] = {
                "method": Method(Budget(12, 4, cls_token=family == "llava")),
                "precision": "fp32",
                "options": GraphOptions(batch=4, dynamic_batch=True),
                "check_images": reference_images(),
                "step": lambda _: None,
            }
            path = folder / f"{name}-model"
            done[name] = export_bundle(
                source(str(path), seed=0), folder / name, **{**options, **change}
            )
        return done[name]

    return make


def graph_of(bundle: Bundle) -> Graph:
    return Graph.read(bundle.read_model(), bundle.weights_folder)


def pictures(bundle: Bundle) -> Array:
    with bundle.open_file("reference.npz") as file:
        return read_reference(file, bundle.manifest).input[: bundle.manifest.batch.max]


def run(graph: Graph, bundle: Bundle, extra: tuple[str, ...] = ()) -> dict[str, Array]:
    """Run a graph without ONNX Runtime's own optimisations."""
    model = graph.to_model()
    for name in extra:
        model = with_output(model, name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.folder)
    )
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    feeds = {bundle.manifest.input.name: pictures(bundle)}
    return dict(zip(names, session.run(names, feeds), strict=True))


def operators(graph: Graph) -> Counter[str]:
    return Counter(node.operator for node in graph.nodes)


def close(one: dict[str, Array], other: dict[str, Array], tolerance: float) -> None:
    assert np.array_equal(one[KEPT], other[KEPT])
    assert np.abs(one[EMBEDS] - other[EMBEDS]).max() <= tolerance * np.abs(other[EMBEDS]).max()


# Reading and writing


def test_field_numbers_are_those_of_onnx() -> None:
    def numbers(kind: Any) -> dict[str, int]:
        return {field.name: field.number for field in kind.DESCRIPTOR.fields}

    opset, model = numbers(onnx.OperatorSetIdProto), numbers(onnx.ModelProto)
    assert (opset["domain"], opset["version"]) == (
        fast_graph.OPSET_DOMAIN,
        fast_graph.OPSET_VERSION,
    )
    assert model["opset_import"] == fast_graph.MODEL_OPSET
    inner = numbers(onnx.GraphProto)
    assert inner["initializer"] == fast_graph.GRAPH_INITIALIZER
    assert inner["value_info"] == fast_graph.GRAPH_VALUE_INFO
    node = numbers(onnx.NodeProto)
    assert (node["attribute"], node["domain"]) == (
        fast_graph.NODE_ATTRIBUTE,
        fast_graph.NODE_DOMAIN,
    )
    tensor = numbers(onnx.TensorProto)
    names = ("dims", "data_type", "float_data", "int64_data", "raw_data")
    assert [tensor[name] for name in names] == [
        fast_graph.TENSOR_DIMS,
        fast_graph.TENSOR_TYPE,
        fast_graph.TENSOR_FLOATS,
        fast_graph.TENSOR_INT64S,
        fast_graph.TENSOR_RAW,
    ]
    for number_, name in fast_graph.DTYPES.items():
        assert onnx.helper.tensor_dtype_to_np_dtype(number_) == np.dtype(name)


@pytest.mark.parametrize("name", ["image", "pixels-17", "fp16"])
def test_what_was_read_is_written_again(exported: MakeBundle, name: str) -> None:
    bundle = exported(name)
    before = onnx.load_from_string(bundle.read_model())
    graph = graph_of(bundle)
    after = onnx.load_from_string(graph.to_model())
    del before.graph.value_info[:]
    for model in (before, after):
        for node in model.graph.node:
            node.ClearField("doc_string")
            del node.metadata_props[:]
            node.domain = node.domain  # written even where it is empty
    assert after.graph == before.graph
    assert list(after.opset_import) == list(before.opset_import)
    assert after.ir_version == before.ir_version
    assert graph.outputs == tuple(each.name for each in before.graph.output)


def test_arrays_are_those_of_onnx(exported: MakeBundle) -> None:
    bundle = exported("image")
    graph = graph_of(bundle)
    model = onnx.load(str(bundle.path / "model.onnx"))
    known = {1, 7}
    for tensor in model.graph.initializer:
        if tensor.data_type in known:
            expected = numpy_helper.to_array(tensor)
            assert np.array_equal(graph.array(tensor.name), expected)
            assert graph.array(tensor.name).dtype == expected.dtype
            shape = expected.shape if tensor.data_type == 1 else None
            assert graph.shape(tensor.name) == shape


def test_attributes_are_onnxs() -> None:
    proto = onnx.AttributeProto.FromString(number("scale", 0.125))
    assert proto == onnx.helper.make_attribute("scale", 0.125)
    proto = onnx.AttributeProto.FromString(number("num_heads", 16))
    assert proto == onnx.helper.make_attribute("num_heads", 16)
    perm = onnx.helper.make_attribute("perm", [0, 2, 1, 3]).SerializeToString()
    axis = onnx.helper.make_attribute("axis", -1).SerializeToString()
    node = Node("Transpose", (), (), attributes=(perm, axis))
    assert (node.integers("perm"), node.integers("axis")) == ((0, 2, 1, 3), (-1,))
    assert node.integers("absent") == ()
    packed = b"\x0a\x04perm\x42\x04\x00\x02\x01\x03"  # as other writers have lists
    assert Node("", (), (), attributes=(packed,)).integers("perm") == (0, 2, 1, 3)


def test_a_saved_graph_has_all_weights_of_its_own(exported: MakeBundle, tmp_path: Path) -> None:
    bundle = exported("image")
    graph = made(graph_of(bundle), FORMS[0], {})
    expected = run(graph, bundle)
    graph.save(tmp_path / "x.onnx", tmp_path / "x.onnx.data")
    model = onnx.load(str(tmp_path / "x.onnx"))
    onnx.checker.check_model(str(tmp_path / "x.onnx"))
    for tensor in model.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), _any(graph, tensor.name))
    again = Graph.read((tmp_path / "x.onnx").read_bytes(), tmp_path)
    got = run(again, bundle)
    assert np.array_equal(got[EMBEDS], expected[EMBEDS])


def _any(graph: Graph, name: str) -> Array:
    tensor = graph.tensors[name]
    if isinstance(tensor, bytes) and name not in graph.external:
        return numpy_helper.to_array(onnx.TensorProto.FromString(tensor))
    return graph.array(name)


def test_a_tensor_of_the_wrong_size_is_refused(exported: MakeBundle) -> None:
    graph = graph_of(exported("image"))
    raw = numpy_helper.from_array(np.zeros(4, np.float32), "x")
    raw.raw_data = raw.raw_data[:-1]
    wrong = replace(graph, tensors={"x": raw.SerializeToString()})
    with pytest.raises(BundleError, match=r"'x' has type .* and 15 bytes"):
        wrong.array("x")


# Attention


@pytest.mark.parametrize("name", ["image", "pixels-17", "outliers", "siglip"])
def test_attention_becomes_one_operator_and_computes_the_same(
    exported: MakeBundle, name: str
) -> None:
    bundle = exported(name)
    graph = graph_of(bundle)
    fused = with_attention(graph)
    layers = operators(graph)["LayerNormalization"] // 2
    assert operators(fused)["MultiHeadAttention"] == layers >= 2
    # What is left chooses tokens.
    assert operators(fused)["Softmax"] == operators(graph)["Softmax"] - layers <= 1
    close(run(fused, bundle, (TOKEN_WEIGHTS,)), run(graph, bundle, (TOKEN_WEIGHTS,)), 1e-5)


def _change(graph: Graph, place: int, **change: Any) -> Graph:
    nodes = list(graph.nodes)
    nodes[place] = replace(nodes[place], **change)
    return replace(graph, nodes=tuple(nodes))


def _integers(name: str, values: list[int] | int) -> bytes:
    return bytes(onnx.helper.make_attribute(name, values).SerializeToString())


@pytest.mark.parametrize("case", ["axis", "read", "swapped", "shape", "unscaled", "output", "perm"])
def test_attention_of_another_form_stays_as_it_is(exported: MakeBundle, case: str) -> None:
    """Each changes the first layer alone, in a graph that still runs."""
    bundle = exported("image")
    graph = graph_of(bundle)
    makers = graph.makers()
    places = {id(node): place for place, node in enumerate(graph.nodes)}
    softmax = next(node for node in graph.nodes if node.operator == "Softmax")
    scores = makers[softmax.inputs[0]]
    place = places[id(softmax)]
    reader = graph.readers()[softmax.outputs[0]][0]
    queries = makers[makers[scores.inputs[0]].inputs[0]]
    if case == "axis":
        graph = _change(graph, place, attributes=(_integers("axis", -2),))
    elif case == "read":  # probabilities that something else reads too
        doubled = Node("Add", (reader.outputs[0], reader.outputs[0]), ("doubled",))
        mean = Node(
            "ReduceSum", (softmax.outputs[0],), ("summed",), attributes=(_integers("keepdims", 1),)
        )
        first = Node("Mul", (reader.outputs[0], "summed"), ("weighted",))
        after = graph.readers()[reader.outputs[0]][0]
        graph = _change(graph, places[id(after)], inputs=("weighted",))
        at = places[id(reader)] + 1
        graph = replace(graph, nodes=(*graph.nodes[:at], mean, first, *graph.nodes[at:]))
        assert doubled
    elif case == "swapped":  # probabilities from the right, of values laid out for it
        turned = makers[reader.inputs[1]]
        graph = _change(graph, places[id(turned)], attributes=(_integers("perm", [0, 2, 3, 1]),))
        graph = _change(graph, places[id(reader)], inputs=(turned.outputs[0], reader.inputs[0]))
        after = graph.readers()[reader.outputs[0]][0]
        place = next(i for i, node in enumerate(graph.nodes) if node is after)
        graph = _change(graph, place, attributes=(_integers("perm", [0, 3, 1, 2]),))
    elif case == "shape":  # queries in more, narrower heads than keys: all in the batch of products
        shape = graph.array(queries.inputs[1]).copy()
        keys = makers[makers[scores.inputs[1]].inputs[0]]
        other = np.array([shape[0], shape[1], shape[2] * 2, shape[3] // 2])
        tensors = {**graph.tensors, "other": other}
        graph = replace(graph, tensors=tensors)
        for node in (queries, keys):
            graph = _change(graph, places[id(node)], inputs=(node.inputs[0], "other"))
        values = makers[makers[reader.inputs[1]].inputs[0]]
        rest = replace(graph, outputs=(softmax.outputs[0],)).edited({})
        assert with_attention(rest).nodes == rest.nodes  # nothing reads its result
        assert values
        fused = with_attention(graph)
        assert softmax in fused.nodes
        return
    elif case == "unscaled":  # by a value that isn't constant
        scaled = makers[queries.inputs[0]]
        constant = next(name for name in scaled.inputs if name in graph.tensors)
        source = next(name for name in scaled.inputs if name != constant)
        graph = _change(graph, places[id(scaled)], inputs=(source, source))
    elif case == "output":  # probabilities that the graph gives itself
        graph = replace(graph, outputs=(*graph.outputs, softmax.outputs[0]))
    else:  # heads last
        turned = makers[scores.inputs[0]]
        graph = _change(
            graph, places[id(turned)], attributes=(_integers("perm", [0, 2, 1, 3][::-1]),)
        )
        assert softmax in with_attention(graph).nodes
        return
    fused = with_attention(graph)
    assert any(softmax.outputs == node.outputs for node in fused.nodes)
    close(run(fused, bundle), run(graph, bundle), 1e-5)


# Products in 8 bits


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks fit into the tiny tower's rows."""
    monkeypatch.setattr(forms, "BLOCK", 16)


def by_hand(x: Array, weights: Array, bits: str, block: int = 16) -> Array:
    """Return x · weights, rounded as a form describes it, in float64."""
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    if bits == "tensor":
        step = (max(x.max(), 0) - min(x.min(), 0)) / 255
        zero = np.clip(np.rint(-min(x.min(), 0) / step), 0, 255)
        rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
        steps = np.abs(weights).max(axis=0) / 127
        return np.asarray(rounded @ (np.rint(weights / steps) * steps))
    rows = x.reshape(*x.shape[:-1], -1, block)
    steps = np.abs(rows).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(rows / np.where(steps, steps, 1)) * steps).reshape(x.shape)
    parts = weights.reshape(-1, block, weights.shape[1])
    steps = np.abs(parts).max(axis=1, keepdims=True) / 127
    return np.asarray(rounded @ (np.rint(parts / steps) * steps).reshape(weights.shape))


@pytest.mark.parametrize("form", FORMS[:-1], ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["image", "pixels-17", "siglip"])
def test_every_linear_layer_is_rounded_as_described(
    exported: MakeBundle, small_blocks: None, name: str, form: forms.Form
) -> None:
    bundle = exported(name)
    graph = graph_of(bundle)
    found = linears(graph)
    normed = norms(graph)
    rng = np.random.default_rng(0)
    factors = {
        value: np.exp2(rng.integers(-2, 3, graph.shape(linear[0].weight)[0])).astype(np.float32)  # type: ignore[index]
        for value, (_, linear) in normed.items()
    }
    changed = made(graph, form, factors)
    kinds = operators(changed)
    assert all(each.bias is not None for each in found)
    layers = len(normed) // 2
    chooses = tuple(f"layers.{layers - 1}.{part}.weight" for part in "qkv")
    assert set(chooses) < {each.weight for each in found}
    bits = [
        None if each.weight in chooses else form.after_norm if each.input in normed else form.others
        for each in found
    ]
    fits = [b == "tensor" or (b == "blocks" and (graph.shape(each.weight) or (1,))[0] % 16 == 0)
            for b, each in zip(bits, found, strict=True)]  # fmt: skip
    assert len(found) == 6 * layers + 2
    assert len(normed) == 2 * layers >= 4
    assert kinds["MatMulIntegerToFloat"] == bits.count("tensor")
    assert kinds["MatMulNBits"] == sum(b == "blocks" and f for b, f in zip(bits, fits, strict=True))
    values = run(
        changed, bundle, tuple({x for each in found for x in (each.input, each.output)} - {EMBEDS})
    )
    # QuickGELU's constant is in the weights around it.
    between = gates(graph, [each for each, fit in zip(found, fits, strict=True) if fit])
    assert len(between) == (0 if name == "siglip" else layers)
    times = {gate.before.output: gate.c for gate in between}
    over = {each.output: gate.c for gate in between for each in gate.after}
    for linear, how, fit in zip(found, bits, fits, strict=True):
        if not fit:
            continue
        assert how is not None
        gain = times.get(linear.output, 1)
        weights = graph.array(linear.weight) * np.float32(gain / over.get(linear.output, 1))
        if linear.input in factors:
            weights = weights * factors[linear.input][:, None]
        bias, x = gain * graph.array(linear.bias or ""), values[linear.input]
        expected = by_hand(x, weights, how) + bias
        # What lies between two steps may be rounded either way; the rounding as a whole may not.
        rounding = np.square(x.astype(np.float64) @ weights + bias - expected).mean()
        assert np.square(values[linear.output] - expected).mean() <= 0.05 * rounding, linear


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_agree_with_the_graph(
    exported: MakeBundle, small_blocks: None, form: forms.Form
) -> None:
    bundle = exported("image")
    expected, got = run(graph_of(bundle), bundle), run(made(graph_of(bundle), form, {}), bundle)
    one, other = (each[EMBEDS].astype(np.float64).reshape(-1) for each in (expected, got))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99
    share = np.mean(
        [len(np.intersect1d(a, b)) for a, b in zip(expected[KEPT], got[KEPT], strict=True)]
    )
    assert share / 12 > 0.9


def _tail(graph: Graph) -> tuple[Node, Node, Node]:
    """Return the nodes of the first QuickGELU: x · 1.702, σ of it, and x times that."""
    sigmoid = next(node for node in graph.nodes if node.operator == "Sigmoid")
    return graph.makers()[sigmoid.inputs[0]], sigmoid, graph.readers()[sigmoid.outputs[0]][0]


def test_the_constant_of_quickgelu_goes_into_the_weights_around_it(exported: MakeBundle) -> None:
    bundle = exported("image")
    graph = graph_of(bundle)
    every = gates(graph, linears(graph))
    assert [gate.c for gate in every] == [pytest.approx(1.702)] * len(every) != []
    changed = made(graph, FORMS[0], {})
    _, sigmoid, gated = _tail(graph)
    values = run(changed, bundle, (every[0].before.output, gated.outputs[0]))
    x = values[every[0].before.output].astype(np.float64)
    # x is 1.702 times what it was, and so is the result.
    assert np.allclose(values[gated.outputs[0]], x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)
    plain = run(graph, bundle, (every[0].before.output,))[every[0].before.output]
    assert np.dot(x.ravel(), plain.ravel()) / np.square(plain).sum() == pytest.approx(1.702, 0.01)
    fused = next(node for node in changed.nodes if node.outputs == sigmoid.outputs)
    assert fused.inputs == (every[0].before.output,)
    assert operators(changed)["Mul"] == operators(made(graph, FORMS[-1], {}))["Mul"] - len(every)


@pytest.mark.parametrize("case", ["read", "result read", "output", "varying", "other", "sigmoid"])
def test_a_gate_of_another_form_keeps_its_constant(exported: MakeBundle, case: str) -> None:
    """Each changes the first layer alone."""
    bundle = exported("image")
    graph = graph_of(bundle)
    known = len(gates(graph, linears(graph)))
    scaled, sigmoid, gated = _tail(graph)
    places = {id(node): place for place, node in enumerate(graph.nodes)}
    source = next(each for each in scaled.inputs if each not in graph.tensors)

    def read(value: str) -> Graph:
        extra = Node("Identity", (value,), ("extra",))
        return replace(graph, nodes=(*graph.nodes, extra), outputs=(*graph.outputs, "extra"))

    if case == "read":
        graph = read(source)
    elif case == "result read":
        graph = read(gated.outputs[0])
    elif case == "output":
        graph = replace(graph, outputs=(*graph.outputs, gated.outputs[0]))
    elif case == "varying":  # by itself instead of a constant
        graph = _change(graph, places[id(scaled)], inputs=(source, source))
    elif case == "other":  # what is gated is not what the gate is of
        graph = _change(graph, places[id(gated)], inputs=(sigmoid.outputs[0], sigmoid.outputs[0]))
    else:
        graph = read(scaled.outputs[0])
    assert len(gates(graph, linears(graph))) == known - 1
    values, expected = run(made(graph, FORMS[0], {}), bundle), run(graph, bundle)
    for name in expected:
        one, other = (np.ravel(each[name]).astype(np.float64) for each in (values, expected))
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.98, name


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_gate_beside_a_layer_that_stays_in_fp32_keeps_its_constant(
    exported: MakeBundle, which: str
) -> None:
    graph = graph_of(exported("image"))
    every = linears(graph)
    gate = gates(graph, every)[0]
    left_out = gate.before if which == "before" else gate.after[0]
    some = [linear for linear in every if linear != left_out]
    assert gates(graph, some) == gates(graph, every)[1:]


def test_smoothing_divides_what_a_norm_gives(exported: MakeBundle) -> None:
    """By powers of two: bit for bit, also where norms share gamma and beta."""
    bundle = exported("outliers")
    graph = graph_of(bundle)
    shared = graph.tensors["layers.0.norm1.weight"], graph.tensors["layers.0.norm1.bias"]
    assert not graph.external.keys() & {"layers.0.norm1.weight", "layers.0.norm1.bias"}
    nodes = tuple(
        replace(node, inputs=(node.inputs[0], "layers.0.norm1.weight", "layers.0.norm1.bias"))
        if node.outputs[0] in norms(graph) else node
        for node in graph.nodes
    )  # fmt: skip
    graph = replace(graph, nodes=nodes)
    assert all(shared)
    rng = np.random.default_rng(1)
    factors = {
        value: np.exp2(rng.integers(-3, 4, graph.shape(fed[0].weight)[0])).astype(np.float32)  # type: ignore[index]
        for value, (_, fed) in norms(graph).items()
    }
    assert len(factors) >= 4
    first = next(iter(factors))
    changed = made(graph, FORMS[0], factors)
    before, after = run(graph, bundle, (first,)), run(changed, bundle, (first,))
    assert np.array_equal(after[first], before[first] / factors[first])
    # Later ones get other inputs, for the rounding before them: each against its own.
    sources = {value: norm.inputs[0] for value, (norm, _) in norms(graph).items()}
    choosing = set(factors) - {v for v in factors if f"{v}.gamma" in changed.tensors}
    assert len(choosing) == 1
    values = run(changed, bundle, (*factors, *sources.values()))
    gamma, beta = (graph.array(f"layers.0.norm1.{each}") for each in ("weight", "bias"))
    for value, factor in factors.items():
        x = values[sources[value]].astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        divided = 1 if value in choosing else factor
        assert np.allclose(values[value], (x * gamma + beta) / divided, rtol=1e-3, atol=1e-4), value


@pytest.mark.parametrize("shared", [False, True])
def test_a_norm_that_something_else_reads_is_not_smoothed(
    exported: MakeBundle, shared: bool
) -> None:
    graph = graph_of(exported("image"))
    value = next(iter(norms(graph)))
    if shared:
        extra = Node("Identity", (value,), ("extra",))
        graph = replace(graph, nodes=(*graph.nodes, extra), outputs=(*graph.outputs, "extra"))
    assert (value in norms(graph)) is not shared


def test_fp16_graphs_have_no_other_form(exported: MakeBundle) -> None:
    graph = graph_of(exported("fp16"))
    for form in FORMS:
        assert made(graph, form, {}).nodes == graph.nodes


# The choice


def opened(model: bytes, folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_of_an_fp16_graph_the_own_form_is_chosen(exported: MakeBundle, tmp_path: Path) -> None:
    best, measured = choice.choose(exported("fp16"), opened, tmp_path)
    assert best.name == "own"
    assert [each.form for each in measured] == ["own", *(form.name for form in FORMS)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fastest", ["own", *(form.name for form in FORMS)])
def test_the_fastest_that_agrees_is_chosen(
    exported: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    from vzip.runtime.machine.timing import Timing

    def fake(calls: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, Timing]:
        for each in calls.values():
            each()
        return {name: Timing.of([1.0 if name == fastest else 2.0]) for name in calls}

    monkeypatch.setattr(choice, "interleaved", fake)
    monkeypatch.setattr(forms, "BLOCK", 16)
    monkeypatch.setattr(choice, "COSINE", 0.5)
    monkeypatch.setattr(choice, "OVERLAP", 0.5)
    chosen, measured = choice.choose(exported("image"), opened, tmp_path)
    assert chosen.name == fastest
    assert [each.form for each in measured] == ["own", *(form.name for form in FORMS)]
    assert all(each.refused is None for each in measured)
    mine = {f"{fastest}.onnx", f"{fastest}.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == (
        set() if fastest in {"own", "fused"} else mine
    )


def test_a_form_that_keeps_other_tokens_is_refused(
    exported: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = choice.made

    def wrong(graph: Graph, form: forms.Form, factors: Any) -> Graph:
        done = right(graph, form, factors)
        spoiled = {name: np.full_like(x, 0.01) if name.endswith(".scale") and x.ndim else x
                   for name, x in done.tensors.items() if isinstance(x, np.ndarray)}  # fmt: skip
        return replace(done, tensors={**done.tensors, **spoiled})

    monkeypatch.setattr(choice, "made", wrong)
    chosen, measured = choice.choose(exported("image"), opened, tmp_path)
    refused = {each.form: each.refused for each in measured}
    assert "expected at least 0.95 and 0.99" in str(refused["dynamic"])
    assert chosen.name not in {"dynamic", "mixed"}


def test_a_form_that_cannot_be_opened_is_recorded(exported: MakeBundle, tmp_path: Path) -> None:
    from vzip.runtime.errors import BackendError

    def refuse(model: bytes, folder: Path) -> Any:
        if b"MatMulIntegerToFloat" in model:
            raise BackendError("no such operator")
        return opened(model, folder)

    chosen, measured = choice.choose(exported("image"), refuse, tmp_path)
    refused = {each.form: each.refused for each in measured}
    assert refused["dynamic"] == "can't be opened: no such operator"
    assert chosen.name not in {"dynamic", "mixed"}


@pytest.mark.slow
def test_outliers_are_smoothed_away(
    exported: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported("outliers")
    _, smoothed = choice.choose(bundle, opened, tmp_path)
    monkeypatch.setattr(choice, "_factors", lambda *_: {})
    _, plain = choice.choose(bundle, opened, tmp_path)
    with_, without = (next(x for x in each if x.form == "dynamic") for each in (smoothed, plain))
    assert with_.min_cosine is not None
    assert without.min_cosine is not None
    assert 1 - with_.min_cosine < 0.2 * (1 - without.min_cosine)


def test_the_encoder_tells_groups_of_the_form_that_it_runs(
    exported: MakeBundle, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(exported("image").path, tmp_path / "bundle")
    with VisionEncoder.open(tmp_path / "bundle", "onnxruntime", precision="fastest") as encoder:
        assert encoder.precision == "fastest"
        tokens = encoder.run(pictures(read_bundle(tmp_path / "bundle")))
        assert tokens.groups.shape == (4, encoder.manifest.tower.tokens)
        assert (tokens.groups >= 0).sum(axis=1).tolist() == [encoder.manifest.tower.tokens - 12] * 4
