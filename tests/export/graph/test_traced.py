"""The traced module against transformers' untouched LLaVA of the same tiny weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.export.layouts import CONFIG, PROCESSOR, VISION, model_state, write_layout
from tests.refusals import refused
from vzip.export import families
from vzip.export.algorithm import oracle
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.traced import Encoder, GraphInput
from vzip.runtime.errors import BudgetError
from vzip.runtime.pictures.preprocess import pixel_values

DEAD_LAYER = "tower.encoder.layers.3."
BUDGET = Budget(11, 5)


@dataclass(frozen=True)
class Upstream:
    """What the untouched model gives for some pixel values.

    Attributes:
        features: float32 [B, N, L], `get_image_features` of the uncompressed model: what a kept
            patch must look like, whoever chose it.
        cls: float32 [B, L], CLS through the projector.
        hidden: float64 [B, S, D], hidden_states of the feature layer.
        keys: float64 [B, H, S, d].
        scores: float64 [B, N].
        project: The model's own projector.
    """

    features: Tensor
    cls: Tensor
    hidden: np.ndarray
    keys: np.ndarray
    scores: np.ndarray
    project: Any


def upstream(pixels: Tensor, config: dict[str, Any], *, layer: int = -2) -> Upstream:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    settings = LlavaConfig.from_dict(config)
    settings.vision_config._attn_implementation = "eager"  # returns attention
    model = LlavaForConditionalGeneration(settings).eval()
    model.load_state_dict(dict(model_state(0)), strict=True)
    tower = model.model.vision_tower
    keys: list[Tensor] = []
    chosen = tower.encoder.layers[layer].self_attn
    chosen.k_proj.register_forward_hook(lambda _module, _args, output: keys.append(output))
    project = model.model.multi_modal_projector
    with torch.no_grad():
        both = [
            model.get_image_features(
                pixels,
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                return_dict=True,
            ).pooler_output
            for strategy in ("default", "full")
        ]
        output = tower(pixels, output_hidden_states=True, output_attentions=True)
    patches, full = (torch.stack(list(each)) for each in both)
    assert torch.equal(patches, full[:, 1:])
    heads = settings.vision_config.num_attention_heads
    split = keys[-1].unflatten(-1, (heads, -1)).transpose(1, 2)
    return Upstream(
        patches,
        full[:, 0],
        output.hidden_states[layer].double().numpy(),
        split.double().numpy(),
        output.attentions[layer][:, :, 0, 1:].double().sum(dim=1).numpy(),
        project,
    )


def read(folder: Path, **change: Any) -> VisionWeights:
    write_layout("llava-hf-single", folder, change=change)
    return read_vision(Checkpoint.open(folder))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> VisionWeights:
    return read(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Return uint8 [3, 32, 32, 3]: noise, a gradient, and a plain image with a spot."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images[1] = np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None]
    images[2] = 90
    images[2, 9:14, 17:25] = [250, 10, 60]
    return images


def encoder(weights: VisionWeights, **options: Any) -> Encoder:
    defaults: dict[str, Any] = {
        "budget": BUDGET,
        "graph_input": "image",
        "dtype": torch.float32,
    }
    return Encoder(weights.config, weights.tensors, **defaults | options).eval()


def assert_close(got: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def assert_equals_upstream(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], there: Upstream, budget: Budget
) -> None:
    embeds, kept, positions, token_weights = outputs
    tokens, expected_kept = oracle.compress(
        there.hidden,
        there.keys,
        there.scores,
        dominant=budget.dominant,
        contextual=budget.contextual,
        merge=budget.merge,
        cls_token=budget.cls_token,
    )
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected_kept.tolist()
    with torch.no_grad():
        assert_close(embeds, there.project(torch.from_numpy(tokens).float()))
    # The dominant ones once more, without our oracle: they are rows of the uncompressed model.
    full = torch.cat([there.cls[:, None], there.features], dim=1)
    for image in range(len(kept)):
        assert_close(embeds[image, : budget.dominant], full[image, kept[image]])
        taken = {*kept[image].tolist(), 0}  # CLS, where it isn't kept, is dropped
        rest = [token for token in range(there.hidden.shape[1]) if token not in taken]
        targets = oracle.group(there.keys[image], rest, budget.contextual)
        patches = [max(token - 1, 0) for token in (*kept[image].tolist(), *targets)]
        assert positions[image].tolist() == patches
    assert positions.dtype == torch.int64
    assert token_weights.shape == (len(kept), budget.tokens, there.hidden.shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["average", "sum"])
@pytest.mark.parametrize("cls_token", [True, False], ids=["cls", "patches"])
@pytest.mark.parametrize("graph_input", ["image", "pixel_values"])
def test_it_is_the_untouched_model_and_the_oracle(
    weights: VisionWeights,
    images: np.ndarray,
    graph_input: GraphInput,
    cls_token: bool,
    merge: Merge,
) -> None:
    budget = Budget(11, 5, cls_token, merge=merge)
    module = encoder(weights, budget=budget, graph_input=graph_input)
    pixels = torch.from_numpy(pixel_values(images, weights.config.preprocessing))
    given = torch.from_numpy(images) if graph_input == "image" else pixels
    with torch.no_grad():
        outputs = module(given)
    assert_equals_upstream(outputs, upstream(pixels, CONFIG), budget)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_every_activation(tmp_path: Path, images: np.ndarray, activation: str) -> None:
    change = {"vision_config": VISION | {"hidden_act": activation, "layer_norm_eps": 1e-3}}
    weights = read(tmp_path, **change)
    assert weights.config.tower.activation == activation
    pixels = torch.from_numpy(pixel_values(images, weights.config.preprocessing))
    with torch.no_grad():
        outputs = encoder(weights)(torch.from_numpy(images))
    assert_equals_upstream(outputs, upstream(pixels, CONFIG | change), BUDGET)


@pytest.mark.parametrize("layer", [-1, -3])
def test_every_feature_layer(tmp_path: Path, images: np.ndarray, layer: int) -> None:
    weights = read(tmp_path, vision_feature_layer=layer)
    module = encoder(weights)
    assert len(module.layers) == 5 + layer
    pixels = torch.from_numpy(pixel_values(images, weights.config.preprocessing))
    with torch.no_grad():
        outputs = module(torch.from_numpy(images))
    assert_equals_upstream(outputs, upstream(pixels, CONFIG, layer=layer), BUDGET)


def test_the_tanh_and_the_exact_gelu_can_be_told_apart(
    weights: VisionWeights, images: np.ndarray
) -> None:
    """Otherwise the test of activations could not fail."""
    first, second = (
        encoder(
            VisionWeights(
                dataclasses.replace(
                    weights.config,
                    tower=dataclasses.replace(weights.config.tower, activation=activation),
                ),
                weights.tensors,
            )
        )(torch.from_numpy(images))[0]
        for activation in ("gelu", "gelu_pytorch_tanh")
    )
    assert (first - second).abs().max() > 3e-5 * first.abs().max()


def test_normalisation_is_folded_exactly(weights: VisionWeights, images: np.ndarray) -> None:
    folded, plain = encoder(weights), encoder(weights, graph_input="pixel_values")
    assert folded.embedding.folded
    assert not hasattr(folded.embedding, "scale")
    pixels = torch.from_numpy(pixel_values(images, weights.config.preprocessing))
    with torch.no_grad():
        one, other = folded(torch.from_numpy(images)), plain(pixels)
        assert_close(
            folded.embedding(torch.from_numpy(images)), plain.embedding(pixels), tolerance=2e-6
        )
    assert torch.equal(one[1], other[1])
    assert_close(one[0], other[0])


def test_unusual_normalisation_is_folded_too(images: np.ndarray) -> None:
    settings = PROCESSOR | {
        "image_mean": [0.1, 0.9, 0.5],
        "image_std": [0.05, 2.0, 0.4],
        "rescale_factor": 1 / 127.5,
    }
    config = families.describe(CONFIG, settings)
    tensors = {
        name.replace("model.vision_tower.vision_model.", "tower.")
        .replace("model.vision_tower.", "tower.")
        .replace("model.multi_modal_projector.", "projector."): tensor
        for name, tensor in model_state(0).items()
        if "vision_tower" in name or "projector" in name
    }
    weights = VisionWeights(config, tensors)
    pixels = torch.from_numpy(pixel_values(images, config.preprocessing))
    with torch.no_grad():
        one = encoder(weights).embedding(torch.from_numpy(images))
        other = encoder(weights, graph_input="pixel_values").embedding(pixels)
    assert_close(one, other, tolerance=2e-6)


@pytest.mark.parametrize("graph_input", ["image", "pixel_values"])
def test_fp16_weights_are_all_fp16(
    weights: VisionWeights, images: np.ndarray, graph_input: GraphInput
) -> None:
    module = encoder(weights, dtype=torch.float16, graph_input=graph_input)
    wide = {name for name, value in module.named_parameters() if value.dtype != torch.float16}
    # Three numbers each, applied to pixels of 0 … 255 before they are cast.
    expected = {"embedding.scale", "embedding.shift"} if graph_input == "image" else set()
    assert wide == expected
    assert [name for name, _ in module.named_buffers()] == ["embedding.brighter"]
    given = (
        torch.from_numpy(images)
        if graph_input == "image"
        else torch.from_numpy(pixel_values(images, weights.config.preprocessing))
    )
    with torch.no_grad():
        embeds, kept, positions, token_weights = module(given)
        exact = encoder(weights)(torch.from_numpy(images))
    assert embeds.dtype == torch.float16
    assert kept.dtype == positions.dtype == torch.int64
    assert token_weights.dtype == torch.float32
    for image in range(3):
        alike = [t for t in kept[image].tolist() if t in exact[1][image].tolist()]
        assert len(alike) >= 9
        here = [kept[image].tolist().index(token) for token in alike]
        there = [exact[1][image].tolist().index(token) for token in alike]
        assert_close(embeds[image, here].float(), exact[0][image, there], tolerance=1e-2)


def test_parameters_take_no_gradient_and_share_no_memory(weights: VisionWeights) -> None:
    module = encoder(weights)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in weights.tensors.values()}
    for parameter in module.parameters():
        assert not parameter.requires_grad
        assert parameter.untyped_storage().data_ptr() not in theirs


def test_the_dead_layer_is_absent(weights: VisionWeights, images: np.ndarray) -> None:
    dead = {
        name for name in weights.tensors if name.startswith((DEAD_LAYER, "tower.post_layernorm."))
    }
    assert len(dead) == 18
    poisoned = {
        name: torch.full_like(tensor, torch.nan) if name in dead else tensor
        for name, tensor in weights.tensors.items()
    }
    absent = {name: tensor for name, tensor in weights.tensors.items() if name not in dead}
    given = torch.from_numpy(images)
    with torch.no_grad():
        expected = encoder(weights)(given)
        for tensors in (poisoned, absent):
            outputs = encoder(VisionWeights(weights.config, tensors))(given)
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.slow
def test_every_other_tensor_matters(weights: VisionWeights, images: np.ndarray) -> None:
    given = torch.from_numpy(images)
    with torch.no_grad():
        embeds, _, _, token_weights = encoder(weights)(given)
        for name, tensor in weights.tensors.items():
            if name.startswith((DEAD_LAYER, "tower.post_layernorm.")):
                continue
            other = {**weights.tensors, name: torch.full_like(tensor, torch.nan)}
            changed = encoder(VisionWeights(weights.config, other))(given)
            assert not torch.equal(changed[0], embeds), name
    assert token_weights.isfinite().all()


def test_images_of_a_batch_do_not_meet(weights: VisionWeights, images: np.ndarray) -> None:
    module = encoder(weights)
    with torch.no_grad():
        together = module(torch.from_numpy(images))
        for index in range(3):
            alone = module(torch.from_numpy(images[index : index + 1]))
            assert torch.equal(alone[1][0], together[1][index])
            assert_close(alone[0][0], together[0][index])


def test_the_input_stays_as_it_is(weights: VisionWeights, images: np.ndarray) -> None:
    given = torch.from_numpy(images.copy())
    with torch.no_grad():
        encoder(weights)(given)
    assert np.array_equal(given.numpy(), images)


def test_a_budget_that_does_not_fit(weights: VisionWeights, images: np.ndarray) -> None:
    with refused(BudgetError, got="60 + contextual 5", expected="65 tokens"):
        encoder(weights, budget=Budget(60, 5))(torch.from_numpy(images))
