"""Weights that are equal share an initializer; calibration treats every layer as its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.export.layouts import write_layout
from vzip.calibration.quantization.pieces import linear_groups, own_graph
from vzip.calibration.quantization.quantize import quantize
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.samples import Samples
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.reading import read_graph
from vzip.export.graph.trace import GraphOptions
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.bundle.manifest import Model
from vzip.runtime.bundle.reader import Bundle

Tensors = dict[str, torch.Tensor]


def untrained_norms(tensors: Tensors) -> None:
    """As a tower's that nobody trained: ones and zeros, and so are the linear layers' biases.

    Each layer has its own channels to smooth.
    """
    for name in tensors:
        if "_proj.weight" in name or "fc1.weight" in name:
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 3
            tensors[name][:, 4 * layer : 4 * layer + 4] *= 32
        if "norm" in name or name.endswith(".bias"):
            tensors[name] = torch.full_like(tensors[name], float("norm" in name and "weig" in name))


def like_another(*parts: str, layer: int = 1) -> Callable[[Tensors], None]:
    """Tensors of a layer are those of the first."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if f".layers.{layer}." in name and any(part in name for part in parts):
                tensors[name] = tensors[name.replace(f".layers.{layer}.", ".layers.0.")].clone()

    return change


def within_a_layer(tensors: Tensors) -> None:
    for name in tensors:
        if ".self_attn.out_proj." in name:
            tensors[name] = tensors[name.replace("out_proj", "q_proj")].clone()


SHARED: Mapping[str, Callable[[Tensors], None]] = {
    "untrained norms": untrained_norms,
    "q": like_another("q_proj"),
    "k": like_another("k_proj.weight"),
    "q and v of the last": like_another("q_proj", "v_proj", layer=2),
    "attention": like_another("self_attn"),
    "a whole layer": like_another(""),
    "out is q": within_a_layer,
}


class Changed(WeightSource):
    """Random weights of which some are equal, or nearly so."""

    change: Callable[[Tensors], None]
    nudged: bool

    def load(self) -> tuple[VisionWeights, Model]:
        weights, model = super().load()
        tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
        self.change(tensors)
        if self.nudged:  # no two are equal any more, and nothing changes that matters
            for number, tensor in enumerate(tensors.values()):
                tensor.view(-1)[0] += 1e-6 * (1 + number)
        return dataclasses.replace(weights, tensors=tensors), model


def exported(folder: Path, change: str, *, nudged: bool = False) -> Bundle:
    write_layout("llava-hf-single", folder / "model")
    source = Changed(str(folder / "model"), seed=0)
    object.__setattr__(source, "change", SHARED[change])
    object.__setattr__(source, "nudged", nudged)
    return export_bundle(
        source,
        folder / ("nudged" if nudged else "equal"),
        budget=Budget(12, 4),
        precision="fp32",
        options=GraphOptions("image", 4, dynamic_batch=True),
        check_images=(),
        step=lambda _: None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("change", SHARED)
def test_each_has_its_own_under_the_exporters_name_and_the_graph_computes_what_it_did(
    change: str, tmp_path: Path
) -> None:
    import onnx_ir as ir

    bundle = exported(tmp_path, change)
    shared, own = read_graph(bundle, "a test"), own_graph(bundle)
    names = [f"layers.{n}.{part}" for n in range(3) for part in ("qkv", "out", "fc1", "fc2")]
    found = {each.name: each for each in linear_groups(own)}
    assert list(found) == [*names, "projector.linear_1", "projector.linear_2"]
    assert len(shared.graph.initializers) < len(own.graph.initializers)
    for name, each in found.items():
        stem, _, part = name.rpartition(".")
        assert set(each.weights) == {
            f"{stem}.{x}.weight" for x in ("qkv" if part == "qkv" else [part])
        }
        if part in ("qkv", "fc1"):
            norm = "norm1" if part == "qkv" else "norm2"
            assert each.norm == (f"{stem}.{norm}.weight", f"{stem}.{norm}.bias")
    picture = np.random.default_rng(3).integers(0, 256, (1, *bundle.manifest.input.shape[1:]))
    outputs = []
    for graph in (shared, own):
        for value in graph.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
        outputs.append(session.run(None, {"image": picture.astype(np.uint8)}))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["untrained norms", "q", "a whole layer"])
def test_calibration_gives_what_it_gives_for_weights_that_are_nearly_equal(
    change: str, tmp_path: Path, pictures: Path
) -> None:
    samples = Samples.open(str(pictures), count=10)
    recipe = Recipe(keep_agreement=None, keep_cosine=None)
    equal, nearly = (
        quantize(exported(tmp_path, change, nudged=x), samples, recipe, step=lambda _: None).report
        for x in (False, True)
    )
    assert [each.name for each in equal.layers] == [each.name for each in nearly.layers]
    for one, other in zip(equal.layers, nearly.layers, strict=True):
        assert one.range == pytest.approx(other.range, rel=1e-3)
        assert (one.smoothing or 0) == pytest.approx(other.smoothing or 0, rel=1e-3)
    assert equal.agreement.every.mean == pytest.approx(nearly.agreement.every.mean, abs=2e-3)
