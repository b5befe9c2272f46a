"""Quantised graphs: what is quantised and how, what stays, that they run and agree, and compile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.refusals import refused
from vzip.calibration.quantization.pieces import (
    Chain,
    PieceSession,
    array_of,
    linear_groups,
    own_graph,
)
from vzip.calibration.quantization.qdq import Setting, quantised
from vzip.calibration.quantization.quantize import Quantised, quantize
from vzip.calibration.quantization.ranges import BINS, Histograms, fp8_grid, int8_grid, thresholds
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.samples import Samples
from vzip.runtime.agreement import compare
from vzip.runtime.backends import open_backend
from vzip.runtime.backends.onnxruntime import session_options, with_output
from vzip.runtime.bundle.graph_check import external_tensors
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BundleError, InvalidInputError, ParityError

MakeBundle = Callable[[str], Bundle]
Array = np.ndarray[Any, Any]

FREE = Recipe(keep_agreement=None, keep_cosine=None)
PLAIN = dataclasses.replace(FREE, method="minmax", smoothing=None)
SMOOTH = dataclasses.replace(FREE, method="minmax")
LINEARS = [f"layers.{n}.{part}" for n in range(3) for part in ("qkv", "out", "fc1", "fc2")]
LINEARS += ["projector.linear_1", "projector.linear_2"]
PAIRS = Counter({"QuantizeLinear": 14, "DequantizeLinear": 28, "Split": 3})


@pytest.fixture(scope="session")
def made(tiny: MakeBundle, pictures: Path) -> Callable[[str, Recipe], Quantised]:
    """Return a function that quantises a bundle, once."""
    done: dict[tuple[str, Recipe], Quantised] = {}

    def make(name: str, recipe: Recipe) -> Quantised:
        if (name, recipe) not in done:
            samples = Samples.open(str(pictures), count=10)
            done[name, recipe] = quantize(tiny(name), samples, recipe, step=lambda _: None)
        return done[name, recipe]

    return make


Made = Callable[[str, Recipe], Quantised]


def batch_of(bundle: Bundle, pictures: Path, seed: int = 9) -> Array:
    size = bundle.manifest.batch.max
    samples = Samples.open(str(pictures), count=size, seed=seed)
    return next(samples.batches(bundle.manifest, size))


def saved(done: Quantised, folder: Path) -> Any:
    """Save a graph and return it as onnx reads it, weights and all."""
    done.save(folder)
    onnx.checker.check_model(str(folder / done.file), full_check=True)
    return onnx.load(str(folder / done.file))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_linear_layers_alone_are_quantised_symmetrically(
    name: str, precision: str, tiny: MakeBundle, made: Made, tmp_path: Path
) -> None:
    bundle = tiny(name)
    done = made(name, dataclasses.replace(PLAIN, precision=precision))
    model = saved(done, tmp_path)
    original = onnx.load(str(bundle.path / "model.onnx"))
    wide = np.float32 if name == "fp32" else np.float16
    small = np.int8 if precision == "int8" else ml_dtypes.float8_e4m3fn
    largest = 127 if precision == "int8" else 448

    # Everything but the linear layers is there as it was, in number.
    before = Counter(node.op_type for node in original.graph.node)
    after = Counter(node.op_type for node in model.graph.node)
    joined = Counter({"MatMul": 6, "Add": 6})  # q, k and v of three layers became one each
    assert after - before == PAIRS
    assert before - after == joined
    for old, new in ((original.graph.input, model.graph.input),
                     (original.graph.output, model.graph.output)):  # fmt: skip
        assert list(old) == list(new)

    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    weights = {each.name: numpy_helper.to_array(each) for each in original.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    products = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and makers[node.input[1]].op_type == "DequantizeLinear"
    ]
    assert len(products) == 14
    for node, linear in zip(products, LINEARS, strict=True):
        dequantised = makers[node.input[0]]
        quantise = makers[dequantised.input[0]]
        assert (dequantised.op_type, quantise.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert list(dequantised.input[1:]) == list(quantise.input[1:])
        scale, zero = (arrays[each] for each in quantise.input[1:])
        assert (scale.shape, scale.dtype, zero.shape) == ((), wide, ())
        assert zero.dtype == small
        assert float(zero) == 0
        stored, steps, zeros = (arrays[each] for each in makers[node.input[1]].input)
        assert stored.dtype == small
        assert steps.dtype == wide
        assert steps.shape == zeros.shape == stored.shape[1:]  # one for each output channel
        assert not zeros.astype(np.float32).any()
        [axis] = [each.i for each in makers[node.input[1]].attribute if each.name == "axis"]
        assert axis == 1
        parts = "qkv" if linear.endswith(".qkv") else [linear.rpartition(".")[2]]
        stem = linear.rpartition(".")[0]
        wanted = np.concatenate([weights[f"{stem}.{each}.weight"] for each in parts], axis=1)
        got = stored.astype(np.float64) * steps
        assert np.abs(wanted).max(axis=0) == pytest.approx(largest * steps, rel=2e-3)
        room = 0.51 * steps if precision == "int8" else np.abs(wanted) / 15 + steps / 500
        assert (np.abs(got - wanted) <= room).all()
    assert done.opset == model.opset_import[0].version
    assert done.opset == (17 if (name, precision) == ("fp32", "int8") else 19)


@pytest.mark.slow
def test_the_saved_files_read_nothing_but_each_other(made: Made, tmp_path: Path) -> None:
    done = made("fp32", PLAIN)
    done.save(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "model.int8.onnx",
        "model.int8.onnx.data",
    ]
    model = (tmp_path / "model.int8.onnx").read_bytes()
    tensors = external_tensors(model)
    assert {each.location for each in tensors} == {"model.int8.onnx.data"}
    spans = sorted((each.offset, each.offset + each.length) for each in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == (tmp_path / "model.int8.onnx.data").stat().st_size
    again = tmp_path / "again"
    again.mkdir()
    done.save(again)
    assert (again / "model.int8.onnx").read_bytes() == model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), list(itertools.product(["fp32", "fp16"], ["int8", "fp8"]))
)
def test_it_runs_and_agrees(  # noqa: PLR0917 - fixtures, and what varies
    name: str, precision: str, tiny: MakeBundle, made: Made, pictures: Path, tmp_path: Path
) -> None:
    bundle = tiny(name)
    done = made(name, dataclasses.replace(FREE, precision=precision))
    done.save(tmp_path)
    batch = batch_of(bundle, pictures)
    _, backend = open_backend("onnxruntime", bundle)
    expected = backend.run({bundle.manifest.input.name: batch})
    options = session_options(onnxruntime)
    if precision == "fp8":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(tmp_path / done.file), options)
    feeds = {bundle.manifest.input.name: batch}
    wanted = (EMBEDS, KEPT)
    got = dict(zip(wanted, session.run(wanted, feeds), strict=True))
    assert got[EMBEDS].dtype == expected[EMBEDS].dtype
    assert got[KEPT].dtype == np.int64
    agreement = compare([expected], [got], bundle.manifest)
    assert len(agreement.overlaps) == len(batch)
    # 12 of 64 patches of random weights: one token that changes places is 0.08 of an image.
    assert agreement.mean_overlap > 0.8
    assert agreement.kept.mean > 0.995
    assert not np.array_equal(got[EMBEDS], expected[EMBEDS])
    # What a reader adds to see where tokens went.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    model = with_output((tmp_path / done.file).read_bytes(), TOKEN_WEIGHTS)
    [weights] = onnxruntime.InferenceSession(model, options).run([TOKEN_WEIGHTS], feeds)
    assert weights.shape == (len(batch), 16, 65)
    assert np.array_equal(weights[0, :12].argmax(axis=1), got[KEPT][0])


def test_onnx_runtime_computes_them_in_integers(made: Made, tmp_path: Path) -> None:
    done = made("fp32", PLAIN)
    done.save(tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / done.file), options)
    model = onnx.load(str(tmp_path / "optimised.onnx"), load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMulIntegerToFloat"] == len(LINEARS)
    assert kinds["DequantizeLinear"] == 0


def test_minmax_ranges_are_the_largest_magnitudes(
    tiny: MakeBundle, made: Made, pictures: Path
) -> None:
    bundle, report = tiny("fp32"), made("fp32", PLAIN).report
    calibrate, _ = Samples.open(str(pictures), count=10).split()
    graph = own_graph(bundle)
    inputs = {linear.name: linear.input for linear in linear_groups(graph)}
    _, backend = open_backend("onnxruntime", bundle, extra_outputs=tuple(set(inputs.values())))
    peaks = dict.fromkeys(inputs, 0.0)
    for batch in calibrate.batches(bundle.manifest, 4):
        outputs = backend.run({"image": batch})
        for name, value in inputs.items():
            peaks[name] = max(peaks[name], float(np.abs(outputs[value]).max()))
    assert [each.name for each in report.layers] == LINEARS
    for layer in report.layers:
        assert layer.range == layer.peak == pytest.approx(peaks[layer.name], rel=1e-5)
        assert layer.smoothing is None
    assert (report.calibrated, report.held_apart) == (8, 2)


def test_the_report_says_what_was_done(made: Made, pictures: Path) -> None:
    done = made("fp32", SMOOTH)
    report = json.loads(json.dumps(done.report.to_json(), allow_nan=False))
    samples = Samples.open(str(pictures), count=10)
    assert report["samples"] == samples.to_json()
    assert report["recipe"] == SMOOTH.to_json()
    assert (report["calibrated"], report["held_apart"], report["deciding"]) == (8, 2, 0)
    assert report["agreement"]["images"] == 2 * 6  # and their views
    assert [each["name"] for each in report["layers"]] == LINEARS
    kinds = ["qkv", "out_proj", "fc1", "fc2"]
    assert [each["kind"] for each in report["layers"]] == [*3 * kinds, "projector", "projector"]
    smoothed = [each["name"] for each in report["layers"] if each["smoothing"] is not None]
    assert smoothed == [name for name in LINEARS if name.endswith(("qkv", "fc1"))]
    assert all(each["quantised"] and each["reason"] is None for each in report["layers"])
    assert report["peak_bytes"] > 1e7
    assert report["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_other_methods_clip(method: str, made: Made) -> None:
    chosen = made("outliers", dataclasses.replace(PLAIN, method=method)).report
    ranges = {each.name: each.range / each.peak for each in chosen.layers}
    assert all(0 < each <= 1.001 for each in ranges.values())
    assert min(ranges.values()) < 0.99


def histograms(values: Array) -> Histograms:
    seen = Histograms({"x": float(np.abs(values).max())}, {})
    for part in np.array_split(values, 3):
        seen.see("x", part)
    return seen


def test_percentile_leaves_a_ten_thousandth_unclipped() -> None:
    values = np.random.default_rng(0).uniform(-3, 3, (400, 1000)).astype(np.float32)
    values[0, 0] = 60  # one outlier, of 400,000 values
    seen = histograms(values)
    assert seen.counts["x"].sum() == values.size
    chosen = thresholds(seen, "percentile", "int8")["x"]
    assert 3 - 60 / BINS <= chosen <= 3 + 2 * 60 / BINS


@pytest.mark.parametrize(("precision", "grid"), [("int8", int8_grid), ("fp8", fp8_grid)])
def test_mse_finds_the_least_error(precision: Any, grid: Any) -> None:
    values = np.random.default_rng(1).standard_t(3, (300, 500)).astype(np.float32)
    chosen = thresholds(histograms(values), "mse", precision)["x"]
    magnitudes = np.abs(values).ravel().astype(np.float64)

    def error(threshold: float) -> float:
        return float(((grid(magnitudes, np.array(threshold)) - magnitudes) ** 2).mean())

    limit = float(magnitudes.max())
    best = min(error(limit * share) for share in np.linspace(0.02, 1, 200))
    assert error(chosen) <= 1.05 * best
    if precision == "int8":
        assert error(chosen) < 0.7 * error(limit)


def test_entropy_clips_a_long_tail_and_little_of_a_flat_one() -> None:
    rng = np.random.default_rng(2)
    tail = rng.standard_t(2, (500, 400)).astype(np.float32)
    assert thresholds(histograms(tail), "entropy", "int8")["x"] < 0.5 * np.abs(tail).max()
    flat = rng.uniform(-1, 1, (500, 400)).astype(np.float32)
    assert thresholds(histograms(flat), "entropy", "int8")["x"] > 0.9


def test_histograms_divide_by_what_smoothing_divides_by() -> None:
    values = np.array([[8, 1], [4, -2]], np.float32)
    seen = Histograms({"x": 2.0}, {"x": np.array([4, 1], np.float32)})
    seen.see("x", values)
    expected = np.bincount(np.minimum(np.array([2, 1, 1, 2]) * BINS // 2, BINS - 1), minlength=BINS)
    assert np.array_equal(seen.counts["x"], expected)


def test_the_pieces_together_are_the_graph(tiny: MakeBundle, pictures: Path) -> None:
    bundle = tiny("fp32")
    graph = own_graph(bundle)
    chain = Chain(graph)
    assert len(chain) == 4  # the embedding and three layers
    values: dict[str, Array] = {"image": batch_of(bundle, pictures)}
    expected = PieceSession(graph).run(values)
    for place in range(len(chain)):
        values = {**chain.live(values, place), **chain.session(place).run(values)}
    assert np.array_equal(values[KEPT], expected[KEPT])
    assert np.allclose(values[EMBEDS], expected[EMBEDS], atol=1e-4)
    assert sum(len(piece.graph) for piece in chain.pieces) == len(graph.graph)


def test_layers_that_are_not_named_stay(tiny: MakeBundle) -> None:
    graph = own_graph(tiny("fp32"))
    one = quantised(graph, {"layers.1.fc1": Setting(3.0, None)}, "int8", 17)
    changed = {each.name for each in one.graph} ^ {each.name for each in graph.graph}
    assert all(name.startswith("layers.1.fc1.") or "matmul" in name or "add" in name
               for name in changed)  # fmt: skip
    assert Counter(each.op_type for each in one.graph)["QuantizeLinear"] == 1
    before, after = graph.graph.initializers, one.graph.initializers
    gone = set(before) - set(after)
    assert gone == {"layers.1.fc1.weight"}
    altered = {x for x in set(before) - gone if after[x].const_value is not before[x].const_value}
    assert altered == {"layers.1.fc1.bias"}
    bias = "layers.1.fc1.bias"
    assert np.array_equal(array_of(one, bias)[0, 0], array_of(graph, bias))


@pytest.mark.slow
def test_peak_memory_is_this_process_s_own() -> None:
    ballast = np.ones(50_000_000)  # 400 MB, which a child's rusage would begin with
    code = "from vzip.runtime.machine.process import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e7 < int(child.stdout) < ballast.nbytes


@pytest.mark.slow
def test_limits_that_leave_no_room_are_an_error(tiny: MakeBundle, pictures: Path) -> None:
    samples = Samples.open(str(pictures), count=3)
    recipe = Recipe(keep_agreement=None, keep_cosine=1.0)
    with refused(ParityError, got="int8", expected="cosine of at least 1.0", cure="--method"):
        quantize(tiny("fp32"), samples, recipe, step=lambda _: None)


def test_another_exporter_s_graph_is_refused(tiny_bundle: Path) -> None:
    with refused(BundleError, expected="layers.0.q.weight", cure="export"):
        linear_groups(own_graph(read_bundle(tiny_bundle)))


def test_recipes_out_of_range_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        ({"precision": "int4"}, "precision='int4'", ("int8", "fp8")),
        ({"method": "max"}, "method='max'", ("minmax", "percentile", "entropy", "mse")),
        ({"precision": "fp8", "method": "entropy"}, "method='entropy'", ("minmax",)),
        ({"smoothing": 0.0}, "smoothing=0.0", ("above 0", "below 1")),
        ({"smoothing": 1}, "smoothing=1", ("above 0", "below 1")),
        ({"keep_agreement": 0}, "keep_agreement=0", ("above 0", "at most 1")),
        ({"keep_cosine": 1.5}, "keep_cosine=1.5", ("above 0", "at most 1")),
        ({"keep_cosine": float("nan")}, "keep_cosine=nan", ("a number",)),
    ]
    for values, got, expected in cases:
        with refused(InvalidInputError, got=got, expected=expected):
            Recipe(**values)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_tensorrt_rtx_compiles_it_ahead_of_time(
    name: str, precision: str, made: Made, tmp_path: Path
) -> None:
    import tensorrt_rtx as trt

    done = made(name, dataclasses.replace(FREE, precision=precision))
    done.save(tmp_path)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / done.file)), parser.get_error(0)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if name == "fp32":  # whose batch is open
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (1, 32, 32, 3), (1, 32, 32, 3), (4, 32, 32, 3))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 10_000
