"""Forms of exported graphs, each run beside the graph that they were made from.

What a form is to compute in 8 bits is computed here again, in float64 from its own description.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from vzip.export.engines.cpu import forms, products
from vzip.export.engines.cpu.forms import FORMS, FuseAttention, rewrite
from vzip.export.engines.cpu.learning import learn, varied
from vzip.export.engines.cpu.patterns import array, attention, gates, linears, norms
from vzip.export.engines.cpu.products import Learnt, hadamard, rotated
from vzip.export.graph.reading import read_graph
from vzip.runtime.agreement import load_reference
from vzip.runtime.backends.onnxruntime import session_options, with_output
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle

Array = np.ndarray[Any, Any]
MakeBundle = Callable[[str], Bundle]


def graph_of(bundle: Bundle) -> ir.Model:
    return read_graph(bundle, "a test")


DYNAMIC, FUSED = (next(f for f in FORMS if f.name == name) for name in ("dynamic", "fused"))
TOKENS = next(f for f in FORMS if f.name == "tokens")


def formed(bundle: Bundle, form: forms.Form, learnt: Learnt | None = None) -> ir.Model:
    model = graph_of(bundle)
    assert rewrite(model, form, learnt or Learnt())
    return model


def pictures(bundle: Bundle) -> Array:
    return load_reference(bundle).input[: bundle.manifest.batch.max]


def run(
    model: ir.Model, bundle: Bundle, extra: tuple[str, ...] = (), images: Array | None = None
) -> dict[str, Array]:
    """Run a graph with nothing of ONNX Runtime's own that changes values inside it.

    What makes sums of bytes whole is one of its optimisations, of the second of three levels.
    """
    data = ir.to_proto(model).SerializeToString()
    for name in extra:
        data = with_output(data, name)
    options = session_options(onnxruntime)
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.weights_folder)
    )
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    feeds = {bundle.manifest.input.name: pictures(bundle) if images is None else images}
    return dict(zip(names, session.run(names, feeds), strict=True))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def close(one: dict[str, Array], other: dict[str, Array], tolerance: float) -> None:
    assert np.array_equal(one[KEPT], other[KEPT])
    assert np.abs(one[EMBEDS] - other[EMBEDS]).max() <= tolerance * np.abs(other[EMBEDS]).max()


def alike(one: Array, other: Array) -> float:
    """Return the cosine of two arrays as a whole."""
    a, b = (np.ravel(each).astype(np.float64) for each in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def also_read(model: ir.Model, value: ir.Value) -> None:
    """Let something else read a value: an output of the graph."""
    extra = ir.node("Identity", (value,))
    extra.outputs[0].name = "extra"
    extra.outputs[0].type, extra.outputs[0].shape = value.type, value.shape
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])


# Attention


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "pixels-17", "outliers", "siglip"])
def test_attention_becomes_one_operator_and_computes_the_same(
    exported: MakeBundle, name: str
) -> None:
    bundle = exported(name)
    model, fused = graph_of(bundle), graph_of(bundle)
    assert FuseAttention()(fused).modified
    layers = operators(model)["LayerNormalization"] // 2
    assert operators(fused)["MultiHeadAttention"] == layers >= 2
    # What is left chooses tokens.
    assert operators(fused)["Softmax"] == operators(model)["Softmax"] - layers <= 1
    close(run(fused, bundle, (TOKEN_WEIGHTS,)), run(model, bundle, (TOKEN_WEIGHTS,)), 1e-5)


@pytest.mark.parametrize("case", ["axis", "read", "swapped", "shape", "unscaled", "output", "perm"])
def test_attention_of_another_form_stays_as_it_is(exported: MakeBundle, case: str) -> None:
    """Each changes the first layer alone, in a graph that still runs but for two."""
    bundle = exported("image")
    model = graph_of(bundle)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    scores, (context,) = softmax.inputs[0].producer(), softmax.outputs[0].consumers()
    queries, keys = (scores.inputs[place].producer() for place in (0, 1))
    if case == "axis":
        softmax.attributes["axis"] = ir.AttrInt64("axis", -2)
    elif case == "read":  # probabilities that something else reads too
        after = context.outputs[0].consumers()[0]
        summed = ir.node("ReduceSum", (softmax.outputs[0],), {"keepdims": 1})
        weighted = ir.node("Mul", (context.outputs[0], summed.outputs[0]))
        model.graph.insert_after(context, [summed, weighted])
        after.replace_input_with(0, weighted.outputs[0])
    elif case == "swapped":  # probabilities from the right, of values laid out for it
        turned = context.inputs[1].producer()
        turned.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 3, 1])
        turned.outputs[0].shape = None
        context.replace_input_with(0, turned.outputs[0])
        context.replace_input_with(1, softmax.outputs[0])
        context.outputs[0].shape = None
        after = context.outputs[0].consumers()[0]
        after.attributes["perm"] = ir.AttrInt64s("perm", [0, 3, 1, 2])
    elif case == "shape":  # queries and keys in more, narrower heads than values
        for turned in (queries, keys):
            split = turned.inputs[0].producer()
            shape = array(split.inputs[1]) * [1, 1, 2, 1] // [1, 1, 1, 2]
            split.replace_input_with(
                1, products.constant(model.graph, f"{split.name}.other", shape)
            )
    elif case == "unscaled":  # by a value that isn't constant
        scaled = queries.inputs[0].producer().inputs[0].producer()
        constant = next(place for place, v in enumerate(scaled.inputs) if v.is_initializer())
        scaled.replace_input_with(constant, scaled.inputs[1 - constant])
    elif case == "output":  # probabilities that the graph gives itself
        model.graph.outputs.append(softmax.outputs[0])
    else:  # heads last
        queries.attributes["perm"] = ir.AttrInt64s("perm", [3, 1, 2, 0])
    assert attention(softmax) is None
    if case in {"shape", "perm"}:
        return
    expected = run(model, bundle)
    FuseAttention()(model)
    assert softmax in list(model.graph)
    close(run(model, bundle), expected, 1e-5)


# Products in 8 bits


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks fit into the tiny tower's rows."""
    monkeypatch.setattr(products, "BLOCK", 16)


def by_hand(x: Array, weights: Array, bits: str, block: int = 16) -> Array:
    """Return x · weights, rounded as a form describes it, in float64."""
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    if bits == "tensor":
        step = (max(x.max(), 0) - min(x.min(), 0)) / 255
        zero = np.clip(np.rint(-min(x.min(), 0) / step), 0, 255)
        rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
        steps = np.abs(weights).max(axis=0) / 127
        return np.asarray(rounded @ (np.rint(weights / steps) * steps))
    if bits == "tokens":
        width = min(128, x.shape[-1] & -x.shape[-1])
        width = width if width >= 16 else 1  # too few to be worth it
        x, weights = rotated(x, width), rotated(weights.T, width).T
        steps = np.abs(x).max(axis=-1, keepdims=True) / 127
        rounded = np.rint(x / steps) * steps
        steps = np.abs(weights).max(axis=0) / 127
        return np.asarray(rounded @ (np.rint(weights / steps) * steps))
    rows = x.reshape(*x.shape[:-1], -1, block)
    steps = np.abs(rows).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(rows / np.where(steps, steps, 1)) * steps).reshape(x.shape)
    parts = weights.reshape(-1, block, weights.shape[1])
    steps = np.abs(parts).max(axis=1, keepdims=True) / 127
    return np.asarray(rounded @ (np.rint(parts / steps) * steps).reshape(weights.shape))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:-1], ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["image", "pixels-17", "siglip"])
def test_every_linear_layer_is_rounded_as_described(
    exported: MakeBundle, small_blocks: None, name: str, form: forms.Form
) -> None:
    bundle = exported(name)
    graph = graph_of(bundle).graph
    found, rng = linears(graph), np.random.default_rng(0)
    normed = {norm.outputs[0].name: fed for norm, fed in norms(graph).items()}
    factors = {
        value: np.exp2(rng.integers(-2, 3, len(array(fed[0].weight)))).astype(np.float32)
        for value, fed in normed.items()
    }
    read = {each.input.name: len(array(each.weight)) for each in found}
    means = {
        name: (rng.standard_normal(rows) / 64).astype(np.float32) for name, rows in read.items()
    }
    changed = formed(bundle, form, Learnt(factors, means))
    kinds = operators(changed)
    assert all(each.bias is not None for each in found)
    layers = len(normed) // 2
    chooses = tuple(f"layers.{layers - 1}.{part}.weight" for part in "qkv")
    assert set(chooses) < {each.weight.name for each in found}
    bits = [
        None if each.weight.name in chooses
        else form.after_norm if each.input.name in normed else form.others
        for each in found
    ]  # fmt: skip
    fits = [b in {"tensor", "tokens"} or (b == "blocks" and len(array(each.weight)) % 16 == 0)
            for b, each in zip(bits, found, strict=True)]  # fmt: skip
    assert len(found) == 6 * layers + 2
    assert len(normed) == 2 * layers >= 4
    assert kinds["MatMulIntegerToFloat"] == bits.count("tensor") + bits.count("tokens")
    inputs = {x.input.name for x, b in zip(found, bits, strict=True) if b == "tokens"}
    assert kinds["QuantizeLinear"] == len(inputs)  # once for layers that share an input
    assert kinds["MatMulNBits"] == sum(b == "blocks" and f for b, f in zip(bits, fits, strict=True))
    names = {x.name for each in found for x in (each.input, each.output)} - {EMBEDS}
    values = run(changed, bundle, tuple(names))
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
        weights = array(linear.weight) * np.float32(gain / over.get(linear.output, 1))
        if how != "tokens" and linear.input.name in factors:
            weights = weights * factors[linear.input.name][:, None]
        bias, x = gain * array(linear.bias), values[linear.input.name]
        mean = means[linear.input.name] * np.float32(over.get(linear.output, 1))
        if how == "tokens":
            # What a norm gives is centred already, the rest is in the chain.
            bias = bias + mean @ weights
            x = x if linear.input.name in normed else x - mean
        expected, got = by_hand(x, weights, how) + bias, values[linear.output.name]
        # What lies between two steps may be rounded either way; the rounding as a whole may not.
        rounding = np.square(x.astype(np.float64) @ weights + bias - expected).mean()
        assert np.square(got - expected).mean() <= 0.05 * rounding, linear


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_agree_with_the_graph(
    exported: MakeBundle, small_blocks: None, form: forms.Form
) -> None:
    bundle = exported("image")
    expected, got = run(graph_of(bundle), bundle), run(formed(bundle, form), bundle)
    assert alike(expected[EMBEDS], got[EMBEDS]) > 0.99
    share = np.mean(
        [len(np.intersect1d(a, b)) for a, b in zip(expected[KEPT], got[KEPT], strict=True)]
    )
    assert share / 12 > 0.9


def _tail(model: ir.Model) -> tuple[ir.Node, ir.Node, ir.Node]:
    """Return the nodes of the first QuickGELU: x · 1.702, σ of it, and x times that."""
    sigmoid = next(node for node in model.graph if node.op_type == "Sigmoid")
    return sigmoid.inputs[0].producer(), sigmoid, sigmoid.outputs[0].consumers()[0]


def test_the_constant_of_quickgelu_goes_into_the_weights_around_it(exported: MakeBundle) -> None:
    bundle = exported("image")
    model = graph_of(bundle)
    every = gates(model.graph, linears(model.graph))
    assert [gate.c for gate in every] == [pytest.approx(1.702)] * len(every) != []
    changed = formed(bundle, DYNAMIC)
    x_name, gated = every[0].before.output.name, _tail(model)[2].outputs[0].name
    values = run(changed, bundle, (x_name, gated))
    x = values[x_name].astype(np.float64)
    # x is 1.702 times what it was, and so is the result.
    assert np.allclose(values[gated], x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)
    plain = run(model, bundle, (x_name,))[x_name]
    assert np.dot(x.ravel(), plain.ravel()) / np.square(plain).sum() == pytest.approx(1.702, 0.01)
    assert _tail(changed)[1].inputs[0].name == x_name
    fused = formed(bundle, FUSED)
    assert operators(changed)["Mul"] == operators(fused)["Mul"] - len(every)


@pytest.mark.parametrize("case", ["read", "result read", "output", "varying", "other", "sigmoid"])
def test_a_gate_of_another_form_keeps_its_constant(exported: MakeBundle, case: str) -> None:
    """Each changes the first layer alone."""
    bundle = exported("image")
    model = graph_of(bundle)
    known = len(gates(model.graph, linears(model.graph)))
    scaled, sigmoid, gated = _tail(model)
    constant = next(place for place, v in enumerate(scaled.inputs) if v.is_initializer())
    source = scaled.inputs[1 - constant]
    if case == "read":
        also_read(model, source)
    elif case == "result read":
        also_read(model, gated.outputs[0])
    elif case == "output":
        model.graph.outputs.append(gated.outputs[0])
    elif case == "varying":  # by itself instead of a constant
        scaled.replace_input_with(constant, source)
    elif case == "other":  # what is gated is not what the gate is of
        for place in (0, 1):
            gated.replace_input_with(place, sigmoid.outputs[0])
    else:
        also_read(model, scaled.outputs[0])
    assert len(gates(model.graph, linears(model.graph))) == known - 1
    expected = run(model, bundle)
    assert rewrite(model, DYNAMIC, Learnt())
    values = run(model, bundle)
    for name in expected:
        assert alike(values[name], expected[name]) > 0.98, name


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_gate_beside_a_layer_that_stays_in_fp32_keeps_its_constant(
    exported: MakeBundle, which: str
) -> None:
    graph = graph_of(exported("image")).graph
    every = linears(graph)
    gate = gates(graph, every)[0]
    left_out = gate.before if which == "before" else gate.after[0]
    some = [linear for linear in every if linear is not left_out]
    assert [each.c for each in gates(graph, some)] == [each.c for each in gates(graph, every)][1:]


@pytest.mark.slow
def test_smoothing_divides_what_a_norm_gives(exported: MakeBundle) -> None:
    """By powers of two: bit for bit, also where norms share gamma and beta."""
    bundle = exported("outliers")

    def shared() -> ir.Model:
        model = graph_of(bundle)
        first, *others = norms(model.graph)
        for norm in others:
            for place in (1, 2):
                norm.replace_input_with(place, first.inputs[place])
        return model

    model, changed, rng = shared(), shared(), np.random.default_rng(1)
    found = {norm.outputs[0].name: (norm, fed) for norm, fed in norms(model.graph).items()}
    factors = {
        value: np.exp2(rng.integers(-3, 4, len(array(fed[0].weight)))).astype(np.float32)
        for value, (_, fed) in found.items()
    }
    assert len(factors) >= 4
    first = next(iter(factors))
    assert rewrite(changed, DYNAMIC, Learnt(factors))
    before, after = run(model, bundle, (first,)), run(changed, bundle, (first,))
    assert np.array_equal(after[first], before[first] / factors[first])
    # Later ones get other inputs, for the rounding before them: each against its own.
    sources = {value: norm.inputs[0].name for value, (norm, _) in found.items()}
    new = changed.graph.initializers
    choosing = set(factors) - {v for v in factors if f"{v}.gamma" in new}
    assert len(choosing) == 1
    values = run(changed, bundle, (*factors, *sources.values()))
    gamma, beta = (array(found[first][0].inputs[place]) for place in (1, 2))
    for value, factor in factors.items():
        x = values[sources[value]].astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        divided = 1 if value in choosing else factor
        assert np.allclose(values[value], (x * gamma + beta) / divided, rtol=1e-3, atol=1e-4), value


def test_a_norm_that_something_else_reads_is_not_smoothed(exported: MakeBundle) -> None:
    model = graph_of(exported("image"))
    norm = next(iter(norms(model.graph)))
    also_read(model, norm.outputs[0])
    assert norm not in norms(model.graph)


@pytest.mark.slow
def test_fp16_graphs_have_no_other_form(exported: MakeBundle) -> None:
    for form in FORMS:
        assert not rewrite(graph_of(exported("fp16")), form, Learnt())


# What forms stand on


@pytest.mark.parametrize("width", [1, 16, 64])
def test_a_rotation_undoes_itself_and_spreads_an_outlier(width: int) -> None:
    turn = hadamard(width)
    assert np.allclose(turn @ turn, np.eye(width), atol=1e-6)
    rows = np.zeros((3, 128), np.float32)
    rows[:, 5] = 8
    turned = rotated(rows, width)
    assert np.abs(turned).max() == pytest.approx(8 / np.sqrt(width))
    assert np.allclose(rotated(turned, width), rows, atol=1e-5)


def test_a_planted_outlier_and_a_sink_cost_tokens_little_and_a_scale_per_call_much(
    exported: MakeBundle,
) -> None:
    """A channel that is hot in a few tokens, as in the input of fc2 of trained towers."""
    bundle, errors = exported("image"), {}
    for form in (TOKENS, DYNAMIC):
        model = graph_of(bundle)
        linear = next(each for each in linears(model.graph) if "fc2" in str(each.weight.name))
        tokens = linear.input.shape[1]
        hot = np.zeros((1, tokens, len(array(linear.weight))), np.float32)
        hot[:, ::9, 3] = 300
        planted = products.constant(model.graph, "planted", hot)
        added = ir.node("Add", (linear.input, planted))
        added.outputs[0].name, added.outputs[0].shape = "hot", linear.input.shape
        added.outputs[0].type = linear.input.type
        model.graph.insert_before(linear.product, added)
        linear.product.replace_input_with(0, added.outputs[0])
        name = linear.output.name
        # The tokens that aren't hot, beside the same graph in FP32.
        expected = run(model, bundle, (name,))[name]
        assert rewrite(model, form, Learnt())
        cold = np.arange(tokens) % 9 != 0
        got = run(model, bundle, (name,))[name]
        errors[form.name] = 1 - alike(got[:, cold], expected[:, cold])
    assert errors["tokens"] < 1e-3 < errors["dynamic"] / 10


def test_tokens_of_a_picture_do_not_depend_on_the_others_of_its_call(exported: MakeBundle) -> None:
    bundle = exported("image")
    images = pictures(bundle)
    others = np.concatenate([images[:1], 255 - images[1:]])
    for form, alone in ((TOKENS, True), (DYNAMIC, False)):
        changed = formed(bundle, form)
        one, other = (run(changed, bundle, images=each)[EMBEDS][0] for each in (images, others))
        assert np.array_equal(one, other) == alone


def test_learnt_are_each_channels_means(exported: MakeBundle) -> None:
    bundle = exported("image")
    graph = graph_of(bundle)
    learnt = learn(bundle, graph, pictures(bundle))
    names = {each.input.name for each in linears(graph.graph)}
    assert learnt.means.keys() == names
    for name, values in run(graph, bundle, tuple(names)).items():
        if name in names:
            expected = values.reshape(-1, values.shape[-1]).mean(0)
            assert np.allclose(learnt.means[name], expected, atol=1e-4), name


@pytest.mark.parametrize("channels_last", [True, False])
def test_varied_pictures_are_mirrored_and_zoomed(channels_last: bool) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (2, 6, 7, 3), np.uint8)
    given = pictures if channels_last else pictures.transpose(0, 3, 1, 2)
    found = varied(given, channels_last=channels_last)
    assert found.shape == (12, *given.shape[1:])
    found = found if channels_last else found.transpose(0, 2, 3, 1)
    assert np.array_equal(found[:2], pictures)
    assert np.array_equal(found[2:4], pictures[:, :, ::-1])
    assert np.array_equal(found[4, ::2, ::2], pictures[0, :3, :4])
    assert np.array_equal(found[10, 0, 0], pictures[0, 3, 3])
    assert np.array_equal(found[11, -1, -1], pictures[1, 5, 6])
