"""The backend 'pytorch' rebuilds the module that was traced; its contract is tests/contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests import exported
from tests.export.layouts import layouts_of, write_layout
from tests.refusals import refused
from vzip.calibration.quantization.quantize import quantize
from vzip.calibration.quantization.recipe import QuantPrecision, Recipe
from vzip.calibration.samples import Samples
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.reading import read_graph
from vzip.export.graph.rebuilt import ForeignGraphError, _round_input, rebuild
from vzip.export.graph.trace import GraphOptions
from vzip.export.graph.unshared import read_own_graph
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, POSITIONS, TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BackendError

BACKENDS = ("onnxruntime", "pytorch")


def outputs(bundle: Bundle, backend: str, array: np.ndarray) -> dict[str, np.ndarray]:
    _, opened = open_backend(backend, bundle, extra_outputs=(TOKEN_WEIGHTS,))
    return opened.run({bundle.manifest.input.name: array})


def agree(bundle: Bundle, tolerance: float) -> None:
    """Compare the backends on two random inputs."""
    tensor, rng = bundle.manifest.input, np.random.default_rng(0)
    array = rng.normal(size=tensor.shape).astype(np.float32)
    if tensor.name == "image":
        array = rng.integers(0, 256, tensor.shape, np.uint8)
    expected, got = (outputs(bundle, backend, array) for backend in BACKENDS)
    assert list(got) == [EMBEDS, KEPT, POSITIONS, TOKEN_WEIGHTS]
    for name, want in expected.items():
        assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape)
        if name == EMBEDS:
            error = np.abs(got[name].astype(float) - want.astype(float)).max()
            assert error <= tolerance * np.abs(want).max()
        else:
            assert np.array_equal(got[name], want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "media", "selection"),
    [
        ("llava", "image", "uniform"),
        ("llava-siglip", "image", "visionzip"),
        ("vip-llava", "image", "random"),  # several layers' features, and a norm before them
        ("llava-onevision", "image", "visionzip"),  # padding is left out
        ("llava-onevision", "video", "visionzip"),  # pooled behind the projector
    ],
)
def test_every_kind_of_module_is_rebuilt(
    tmp_path: Path, family: str, media: Any, selection: str
) -> None:
    write_layout(layouts_of(family)[0], tmp_path / "tiny", family=family)
    source = WeightSource(str(tmp_path / "tiny"), media=media)
    config = source.config()
    half = selection == "random"
    bundle = export_bundle(
        source,
        tmp_path / "bundle",
        budget=Budget(7, 3, config.tower.cls_token, method=selection),
        tiles="newline" if config.tiling else "reference",
        precision="fp16" if half else "fp32",
        options=GraphOptions("pixel_values" if half else "image", 2),
        check_images=(),
        step=lambda _: None,
    )
    agree(bundle, 5e-3 if half else 1e-5)


@pytest.mark.slow
def test_weights_that_share_an_initializer_are_found(tmp_path: Path) -> None:
    plain = {
        name: torch.full_like(tensor, float("norm" in name and name.endswith("weight")))
        if name.endswith("bias") or "norm" in name
        else tensor
        for name, tensor in exported.weights().tensors.items()
    }

    class Source(exported.Source):
        def load(self) -> Any:
            return VisionWeights(exported.CONFIG, plain), super().load()[1]

    source: Any = Source()
    bundle = export_bundle(source, tmp_path / "bundle", budget=Budget(4, 3),
                           precision="fp32", options=GraphOptions(batch=2),
                           check_images=(), step=lambda _: None)  # fmt: skip
    held = read_graph(bundle, "a test").graph.initializers
    assert "layers.0.k.bias" not in held, "equal biases are stored once"
    agree(bundle, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_static_bundle"])
def test_quantised_graphs_round_what_the_graph_rounds(
    tmp_path: Path, name: str, precision: QuantPrecision
) -> None:
    bundle = read_bundle(exported.bundles() / name)
    recipe = Recipe(precision, keep_agreement=None, keep_cosine=None)
    done = quantize(bundle, Samples.open("demo", count=10), recipe, step=lambda _: None)
    done.save(tmp_path)
    model = ir.load(tmp_path / done.file)
    encoder = rebuild(bundle.manifest, model.graph)
    own = rebuild(bundle.manifest, read_own_graph(bundle, "a test").graph)
    rounding = [name for name, _ in encoder.named_buffers() if name.endswith(".step")]
    assert len(rounding) == 2 * 6 + 2
    # q and k of the first layer: deeper in, a rounding that turns out otherwise spreads.
    split = next(node for node in model.graph if node.op_type == "Split")
    model.graph.outputs[:] = split.outputs[:2]
    ir.save(model, tmp_path / "first.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "first.onnx", options)
    array = exported.golden()["images" if name == "tiny_bundle" else "pixel_values"][:2]
    graph = session.run(None, {bundle.manifest.input.name: array})
    with torch.inference_mode():
        got, exact = (
            each.layers[0](each.pre_norm(each.embedding(torch.from_numpy(array))))[1:]
            for each in (encoder, own)
        )
    for value, want, whole in zip(got, graph, exact, strict=True):
        error = (value - torch.from_numpy(want)).float().norm()
        assert error < 0.2 * (value - whole).float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_saturates_and_goes_to_even(dtype: torch.dtype) -> None:
    # 17 and 19 lie between 16, 18 and 20; 448 is FP8's largest, 2**-9 its smallest magnitude.
    values = [0, 1.03, -17, 19, 448, 465, -600, 2.0**-9, 2.0**-10, 3 * 2.0**-11]
    for kind, step, given, expected in (
        (torch.float8_e4m3fn, 1.0, values, [0, 1, -16, 20, 448, 448, -448, 2.0**-9, 0, 2.0**-9]),
        (torch.int8, 2.0, [1, 3, 254, 300, -300], [0, 4, 254, 254, -256]),
    ):
        module = torch.nn.Identity()
        _round_input(module, torch.tensor(step, dtype=dtype), kind)
        got = module(torch.tensor(given, dtype=dtype))
        assert got.dtype == dtype
        assert got.tolist() == expected


def test_a_graph_of_another_tool_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    with refused(
        BackendError,
        got=("tiny_bundle", "not one that vzip export writes"),
        cure="backend='onnxruntime'",
    ):
        open_backend("pytorch", read_bundle(tiny_bundle))


@pytest.mark.slow
def test_what_is_not_the_module_s_is_named() -> None:
    bundle = read_bundle(exported.bundles() / "tiny_bundle")
    selection = dataclasses.replace(bundle.manifest.selection, dominant=3, contextual=4)

    def change(**values: Any) -> str:
        manifest = dataclasses.replace(bundle.manifest, **values.pop("manifest", {}))
        graph = read_graph(bundle, "a test").graph
        for name, new in values.items():
            weight = graph.initializers[f"layers.1.{name.replace('_', '.')}"]
            weight.const_value = ir.tensor(new)
        with pytest.raises(ForeignGraphError) as raised:
            rebuild(manifest, graph)
        return str(raised.value)

    assert "layers.1.fc2.weight" in change(fc2_weight=np.zeros((32, 15), np.float32))
    assert "torch.float16" in change(fc1_bias=np.zeros(32, np.float16))
    embeds, kept, positions = bundle.manifest.outputs
    outputs = (embeds, dataclasses.replace(kept, shape=("batch", 3)), positions)
    assert KEPT in change(manifest={"selection": selection, "outputs": outputs})
    graph = read_graph(bundle, "a test").graph
    next(node for node in graph if node.op_type == "Sigmoid").op_type = "Tanh"
    with pytest.raises(ForeignGraphError, match="activation"):
        rebuild(bundle.manifest, graph)


def test_gives_token_weights_and_nothing_else_from_inside() -> None:
    bundle = read_bundle(exported.bundles() / "tiny_bundle")
    with refused(BackendError, got="layer_norm", expected=TOKEN_WEIGHTS):
        open_backend("pytorch", bundle, extra_outputs=("layer_norm",))
