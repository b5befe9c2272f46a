"""Weights that are equal share an initializer, and layers that compute the same share their nodes.

Whatever changes or looks up a layer treats each as its own: it gives what it gives for weights that
are nearly equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from vzip.calibration.quantization.pieces import linear_groups
from vzip.calibration.quantization.quantize import quantize
from vzip.calibration.quantization.recipe import QuantPrecision, Recipe
from vzip.calibration.samples import Samples
from vzip.export.algorithm.budget import Budget
from vzip.export.architecture import ProjectorConfig, TowerConfig, VisionConfig
from vzip.export.checkpoint.random_weights import random_vision
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.engines.cpu import choice
from vzip.export.graph.reading import read_graph
from vzip.export.graph.trace import GraphOptions
from vzip.export.graph.unshared import OwnLayers, read_own_graph
from vzip.export.inspect.describe import describe_graph
from vzip.export.pictures import reference_images
from vzip.export.pipeline import export_bundle
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.origin import Model
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.pictures.preprocess import Preprocessing

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
Kind = Literal["clip", "siglip"]
SIDE, WIDTH, LAYERS = 32, 32, 3
PREPROCESSING = Preprocessing(
    image_size=SIDE, mode="stretch", shortest_edge=SIDE, resample="bicubic",
    mean=(0.5,) * 3, std=(0.5,) * 3, rescale_factor=1 / 255,
)  # fmt: skip


def zero_biases(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = torch.zeros_like(tensors[name])


def untrained_norms(tensors: Tensors) -> None:
    """Ones and zeros, and so are the linear layers' biases; each layer has channels to smooth."""
    for name in tensors:
        if "_proj.weight" in name or "fc1.weight" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            tensors[name][:, 4 * layer : 4 * layer + 4] *= 32
        if "norm" in name or name.endswith(".bias"):
            tensors[name] = torch.full_like(tensors[name], float("norm" in name and "weig" in name))


def ones_everywhere(tensors: Tensors) -> None:
    """Gammas, betas and biases are the same ones."""
    for name in tensors:
        if "norm" in name or name.endswith(".bias"):
            tensors[name] = torch.ones_like(tensors[name])


def like(one: str, other: str) -> Callable[[Tensors], None]:
    """Tensors with one in their name are those with the other in its place, where there are any."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if one in name and name.replace(one, other) in tensors:
                tensors[name] = tensors[name.replace(one, other)].clone()

    return change


def several(*changes: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for each in changes:
            each(tensors)

    return change


def every_weight(tensors: Tensors) -> None:
    """All linear layers are the first one."""
    first = tensors["tower.encoder.layers.0.self_attn.q_proj.weight"]
    for name in tensors:
        if name.endswith(".weight") and tensors[name].shape == first.shape and "embed" not in name:
            tensors[name] = first.clone()
    zero_biases(tensors)


SHARED: Mapping[str, Callable[[Tensors], None]] = {
    "zero biases": zero_biases,
    "untrained norms": untrained_norms,
    "ones everywhere": ones_everywhere,
    "q of two layers": like(".1.self_attn.q_proj", ".0.self_attn.q_proj"),
    "k of two layers, but for its bias": like(
        ".1.self_attn.k_proj.weight", ".0.self_attn.k_proj.weight"
    ),
    "q and v of two layers": several(
        like(".2.self_attn.q_proj", ".0.self_attn.q_proj"),
        like(".2.self_attn.v_proj", ".0.self_attn.v_proj"),
    ),
    "v of a layer and k of the one before": like(".1.self_attn.v_proj", ".0.self_attn.k_proj"),
    "two layers": like(".layers.1.", ".layers.0."),
    "all layers": several(like(".layers.1.", ".layers.0."), like(".layers.2.", ".layers.0.")),
    "out and q": like("out_proj", "q_proj"),
    "fc1 and fc2": like("fc2", "fc1"),
    "fc1 and out of the layer before": like(".1.mlp.fc1", ".0.self_attn.out_proj"),
    "q and k": like("k_proj", "q_proj"),
    "k and v": like("v_proj", "k_proj"),
    "q and v": like("v_proj", "q_proj"),
    "q, k and v": several(like("k_proj", "q_proj"), like("v_proj", "q_proj")),
    "projector's two": like("projector.linear_2", "projector.linear_1"),
    "projector and tower": like("projector.linear_1", "tower.encoder.layers.0.self_attn.q_proj"),
    "every weight": every_weight,
    "every tensor": several(every_weight, untrained_norms, every_weight),
}


QUICK = {"zero biases", "untrained norms", "fc1 and fc2", "q, k and v", "every tensor"}


def cases(*quick: str) -> list[Any]:
    """Each kind of equal weights; all but a few are for `make test-rest`."""
    return [
        pytest.param(name, marks=[] if name in (quick or QUICK) else pytest.mark.full)
        for name in SHARED
    ]


def config(kind: Kind = "clip", *, norm: bool = False) -> VisionConfig:
    """A tower whose linear layers all have one shape, so that any two may be equal."""
    activation: Any = "quick_gelu" if kind == "clip" else "gelu_pytorch_tanh"
    return VisionConfig(
        family="vip-llava" if norm else "llava",
        tower=TowerConfig(kind, SIDE, 4, WIDTH, WIDTH, 4, LAYERS, activation, 1e-5),
        projector=ProjectorConfig(
            WIDTH, WIDTH, WIDTH, "gelu", bias=True, norm_eps=1e-5 if norm else None
        ),
        feature_layers=(-1,),
        image_token_id=7,
        preprocessing=PREPROCESSING,
    )


@dataclasses.dataclass
class Changed:
    """Random weights of which some are equal, or nearly so; what `export_bundle` asks of."""

    change: str
    config: VisionConfig
    nudged: bool
    model: str = "tests/shared"
    revision: str | None = None

    def load(self) -> tuple[VisionWeights, Model]:
        drawn = random_vision(self.config, seed=3, dtype=torch.float16)
        tensors = {name: tensor.float() for name, tensor in drawn.tensors.items()}
        SHARED[self.change](tensors)
        if self.nudged:  # no two are equal any more, and nothing changes that matters
            for number, tensor in enumerate(tensors.values()):
                tensor.view(-1)[0] += 1e-6 * (1 + number)
        return VisionWeights(self.config, tensors), Model(self.model, None, "llava", "random", 3)


def exported(
    folder: Path,
    change: str,
    *,
    nudged: bool = False,
    checked: bool = False,
    of: VisionConfig | None = None,
    precision: Literal["fp32", "fp16"] = "fp32",
    opset: Literal[17, 18] = 18,
) -> Bundle:
    source: Any = Changed(change, of or config(), nudged)
    return export_bundle(
        source,
        folder / ("nudged" if nudged else "equal"),
        budget=Budget(12, 4, source.config.tower.cls_token),
        precision=precision,
        options=GraphOptions("image", 4, dynamic_batch=True, opset=opset),
        check_images=reference_images() if checked else (),
        step=lambda _: None,
    )


def pictures() -> np.ndarray[Any, Any]:
    small = np.random.default_rng(3).integers(0, 256, (3, SIDE // 4, SIDE // 4, 3), np.uint8)
    return small.repeat(4, axis=1).repeat(4, axis=2)


def results(model: ir.Model) -> list[np.ndarray[Any, Any]]:
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"image": pictures()})


def check_layers(bundle: Bundle, *, norm: bool = False) -> None:
    """All layers are there under their names, share nothing, and compute what they did."""
    own = read_own_graph(bundle, "a test")
    names = [f"layers.{n}.{part}" for n in range(LAYERS) for part in ("qkv", "out", "fc1", "fc2")]
    found = {each.name: each for each in linear_groups(own)}
    assert list(found) == [*names, "projector.linear_1", "projector.linear_2"]
    norms = {"qkv": "norm1", "fc1": "norm2", **({"linear_1": "norm"} if norm else {})}
    for name, each in found.items():
        stem, _, part = name.rpartition(".")
        parts = "qkv" if part == "qkv" else [part]
        assert each.weights == tuple(f"{stem}.{x}.weight" for x in parts)
        if gamma := norms.get(part):
            assert each.norm == (f"{stem}.{gamma}.weight", f"{stem}.{gamma}.bias")
    ours = [n for n in own.graph.initializers if n.endswith((".weight", ".bias", ".kernel"))]
    assert all(len(own.graph.initializers[name].uses()) == 1 for name in ours)
    for one, other in zip(results(read_graph(bundle, "a test")), results(own), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("change", cases())
def test_each_layer_has_its_own_and_the_module_is_rebuilt_of_them(
    change: str, tmp_path: Path
) -> None:
    bundle = exported(tmp_path, change)
    shared, own = read_graph(bundle, "a test"), read_own_graph(bundle, "a test")
    assert len(shared.graph.initializers) < len(own.graph.initializers)
    check_layers(bundle)
    tokens = []
    for backend in ("onnxruntime", "pytorch"):
        with VisionEncoder.open(bundle, backend=backend) as encoder:
            tokens.append(encoder.encode(list(pictures())))
    np.testing.assert_array_equal(tokens[0].kept, tokens[1].kept)
    largest = np.abs(tokens[0].embeds).max()
    np.testing.assert_allclose(tokens[0].embeds, tokens[1].embeds, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("kind", "norm", "precision", "opset"),
    [("siglip", False, "fp32", 18), ("clip", True, "fp32", 17), ("clip", False, "fp16", 17)],
)
def test_so_has_each_of_other_towers(
    kind: Kind, norm: bool, precision: Any, opset: Any, tmp_path: Path
) -> None:
    of = config(kind, norm=norm)
    check_layers(
        exported(tmp_path, "every tensor", of=of, precision=precision, opset=opset), norm=norm
    )


def test_a_graph_that_shares_nothing_stays_as_it_is(tmp_path: Path) -> None:
    model = read_graph(exported(tmp_path, "two layers", nudged=True), "a test")
    assert not OwnLayers()(model).modified


def test_a_quantised_graph_stays_as_it_is(tmp_path: Path) -> None:
    done = quantised(exported(tmp_path, "two layers"), "int8")
    done.save(tmp_path)
    assert not OwnLayers()(ir.load(tmp_path / done.file)).modified


def quantised(bundle: Bundle, precision: QuantPrecision) -> Any:
    recipe = Recipe(precision, "minmax", keep_agreement=None, keep_cosine=None)
    return quantize(bundle, Samples.open("demo", count=10), recipe, step=lambda _: None)


@pytest.mark.parametrize("change", cases("untrained norms", "every tensor"))
def test_calibration_gives_what_it_gives_for_nearly_equal_weights(
    change: str, tmp_path: Path
) -> None:
    equal, nearly = (
        quantised(exported(tmp_path, change, nudged=nudged), "int8").report
        for nudged in (False, True)
    )
    assert [each.name for each in equal.layers] == [each.name for each in nearly.layers]
    for one, other in zip(equal.layers, nearly.layers, strict=True):
        assert one.range == pytest.approx(other.range, rel=1e-2)
        assert (one.smoothing or 0) == pytest.approx(other.smoothing or 0, rel=1e-3)
    assert equal.agreement.every.mean == pytest.approx(nearly.agreement.every.mean, abs=2e-2)


@pytest.mark.parametrize("change", cases("untrained norms", "every tensor"))
def test_the_cpu_s_forms_agree_as_those_of_nearly_equal_weights(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "SECONDS", 0.01)
    equal, nearly = (
        choice.choose(exported(tmp_path, change, nudged=nudged, checked=True), say=lambda _: None)
        for nudged in (False, True)
    )
    assert equal.measured.keys() == nearly.measured.keys()
    for form, one in equal.measured.items():
        other = nearly.measured[form]
        assert ("refused" in one) == ("refused" in other), (form, one, other)
        # The nudge may move a near-tie of 8 bits: a token or two of all pictures' kept ones.
        # Weights smoothed or quantised together for both differ by far more (.46 for .93).
        for name in ("kept_overlap", "min_cosine", "contextual_cosine"):
            assert one[name] == pytest.approx(other[name], abs=3e-2), (form, name)


def test_what_a_graph_holds_is_told_as_it_is_stored(tmp_path: Path) -> None:
    bundle = exported(tmp_path, "every tensor")
    stored = len(read_graph(bundle, "a test").graph.initializers)
    (line,) = (line for line in describe_graph(bundle.path) if line.startswith("weights:"))
    assert f"{stored} tensors" in line
