"""Random weights with outliers and sinks: as bad as a real tower's, and nothing undoes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import outliers
from benchmarks.real.pictures import HELD_APART, pictures
from tests.export.layouts import CONFIG, PROCESSOR
from tests.refusals import refused
from vzip.export import families
from vzip.export.checkpoint import planted_outliers
from vzip.export.checkpoint.planted_outliers import with_outliers
from vzip.export.checkpoint.random_weights import random_vision
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import pixel_values, tower_image

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
    "num_hidden_layers": 12, "image_size": 192, "patch_size": 12,
}  # fmt: skip
KEPT = 24


def drawn(**change: Any) -> VisionWeights:
    config = CONFIG | {"vision_config": {"model_type": "clip_vision_model", **SIZES, **change}}
    processor = PROCESSOR | {"size": {"shortest_edge": 192}, "crop_size": 192}
    return random_vision(families.describe(config, processor), 0, dtype=torch.float16)


@pytest.fixture(scope="module")
def plain() -> VisionWeights:
    return drawn()


@pytest.fixture(scope="module")
def planted(plain: VisionWeights) -> VisionWeights:
    return with_outliers(plain, 0)


@pytest.fixture(scope="module")
def photographs() -> list[Any]:
    return [load_image(path) for path in reference_images()[:2]]


def test_the_same_seed_gives_the_same_and_changes_nothing_of_what_it_is_given(
    plain: VisionWeights, planted: VisionWeights
) -> None:
    before = {name: tensor.clone() for name, tensor in plain.tensors.items()}
    again, other = with_outliers(plain, 0), with_outliers(plain, 1)
    assert all(torch.equal(plain.tensors[name], each) for name, each in before.items())
    assert all(torch.equal(again.tensors[name], each) for name, each in planted.tensors.items())
    assert not all(torch.equal(other.tensors[name], each) for name, each in planted.tensors.items())
    assert {each.dtype for each in planted.tensors.values()} == {torch.float16}
    assert planted.config == plain.config


@pytest.mark.slow
def test_a_few_tokens_stand_out_and_take_the_attention(
    plain: VisionWeights, planted: VisionWeights, photographs: list[Any]
) -> None:
    before = outliers.measured(plain, photographs)
    after = outliers.measured(planted, photographs)
    assert before["sinks"] == 0
    # A few of the 256 patches, as in CLIP at 224 px (README of the real towers: 5 to 14 of 196).
    assert 4 <= after["sinks"] <= planted_outliers.MARKED * 256 + 4
    assert 4 < after["norm"] < 12
    assert 0.25 < after["share"] < 0.6
    assert after["entropy"] < 0.95
    assert before["entropy"] > 0.98
    # Of this width and this many tokens, no ratio can be as large as at true size.
    assert after["stream"] > 8 * before["stream"]
    assert after["fc2"] > 6 * before["fc2"]


@pytest.mark.slow
def test_one_scale_a_tensor_fails_smoothed_or_not_and_one_a_token_does_not(
    plain: VisionWeights, planted: VisionWeights, photographs: list[Any]
) -> None:
    for smooth in (False, True):
        assert overlap(plain, photographs, smooth=smooth, by_token=False) > 0.9
        assert overlap(planted, photographs, smooth=smooth, by_token=False) < 0.85
        assert overlap(planted, photographs, smooth=smooth, by_token=True) > 0.9


@pytest.mark.slow
@pytest.mark.full
def test_llavas_tower_is_as_bad_as_real_ones() -> None:
    weights, model = WeightSource("llava-1.5-7b", seed=0, outliers=True).load()
    assert model.weights == "random-outliers"
    found = outliers.measured(weights, [load_image(path) for path in pictures(HELD_APART[:4])])
    # Real CLIP ViT-B/16: 127 and 146; a third of the attention or more; 8 to 10; .68 to .87.
    assert found["stream"] > 127
    assert found["fc2"] > 146
    assert 0.25 < found["share"] < 0.6
    assert 5 < found["norm"] < 12
    assert found["entropy"] < 0.95


def test_a_manifest_leads_back_to_them() -> None:
    weights, model = WeightSource("demo", seed=3, outliers=True).load()
    assert (model.weights, model.seed) == ("random-outliers", 3)
    again, _ = WeightSource.of(model).load()
    assert all(torch.equal(again.tensors[name], each) for name, each in weights.tensors.items())
    plain, _ = WeightSource("demo", seed=3).load()
    assert not all(torch.equal(plain.tensors[name], each) for name, each in weights.tensors.items())


def test_a_tower_of_one_layer_has_no_room_for_them() -> None:
    with refused(InvalidInputError, got="1 of its layers", expected="at least 2"):
        with_outliers(drawn(num_hidden_layers=2), 0)


def overlap(
    weights: VisionWeights, images: Sequence[Any], *, smooth: bool, by_token: bool
) -> float:
    """Share of the kept patches that stay where every linear layer of the tower is in 8 bits.

    Args:
        weights: Of the tower.
        images: Pictures.
        smooth: SmoothQuant on what LayerNorms give, at the usual half.
        by_token: Whether inputs have one scale a token, instead of one for all.
    """
    tower, prep = outliers._tower(weights), weights.config.preprocessing
    last = weights.config.layers_run - 1
    pixels = torch.from_numpy(
        pixel_values(np.stack([tower_image(image, prep) for image in images]), prep)
    )

    def kept() -> Tensor:
        with torch.no_grad():
            attention = tower(pixels, output_attentions=True).attentions[last]
        return attention[:, :, 0, 1:].sum(1).topk(KEPT).indices

    fed = [
        linears
        for layer in tower.encoder.layers[: last + 1]
        for at, mlp in ((layer.self_attn, layer.mlp),)
        for linears in ((at.q_proj, at.k_proj, at.v_proj), (mlp.fc1,), (at.out_proj,), (mlp.fc2,))
    ]
    norms = {group[0] for group in fed[::4] + fed[1::4]}
    largest: dict[Any, Tensor] = {}
    hooks = [
        group[0].register_forward_pre_hook(
            lambda module, given: largest.update({module: given[0].abs().amax((0, 1))})
        )
        for group in fed
    ]
    right = kept()
    for hook in hooks:
        hook.remove()
    for group in fed:
        factor = torch.ones(group[0].in_features)
        after_norm = group[0] in norms
        if smooth and after_norm:
            weight = torch.stack([each.weight.detach().abs().amax(0) for each in group]).amax(0)
            factor = (largest[group[0]] / weight).sqrt()
        for linear in group:
            linear.weight.data = rounded(linear.weight.detach() * factor, 1)
            linear.register_forward_pre_hook(
                lambda _module, given, factor=factor: rounded(
                    given[0] / factor, 2 if by_token else None
                )
            )
    got = kept()
    return float(
        np.mean(
            [len({*a.tolist()} & {*b.tolist()}) / KEPT for a, b in zip(right, got, strict=True)]
        )
    )


def rounded(tensor: Tensor, axis: int | None) -> Tensor:
    """Round to symmetric INT8, with a scale for each place along the others than an axis."""
    most = tensor.abs().max() if axis is None else tensor.abs().amax(axis, keepdim=True)
    scale = (most / 127).clamp_min(1e-12)
    return (tensor / scale).round() * scale
