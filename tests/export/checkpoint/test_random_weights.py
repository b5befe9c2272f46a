from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.export.layouts import CONFIG, PROCESSOR
from tests.refusals import refused
from vzip.export import families
from vzip.export.architecture import tensor_shapes
from vzip.export.checkpoint.random_weights import random_vision
from vzip.runtime.errors import InvalidInputError

TINY = families.describe(CONFIG, PROCESSOR)


def test_every_tensor_of_the_architecture_dead_ones_included() -> None:
    tensors = random_vision(TINY, 0).tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(TINY)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_same_seed_same_weights_another_seed_others() -> None:
    first, again, other = (random_vision(TINY, seed).tensors for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_no_two_tensors_share_values() -> None:
    tensors = random_vision(TINY, 0).tensors
    layers = [tensors[f"tower.encoder.layers.{i}.self_attn.q_proj.weight"] for i in range(4)]
    assert not any(torch.equal(layers[0], layer) for layer in layers[1:])


def test_a_smaller_dtype_has_the_same_weights_rounded() -> None:
    wide = random_vision(TINY, 3).tensors
    half = random_vision(TINY, 3, dtype=torch.float16).tensors
    assert all(torch.equal(wide[name].half(), half[name]) for name in wide)


def test_a_tensor_does_not_depend_on_the_others() -> None:
    deeper = dataclasses.replace(TINY, tower=dataclasses.replace(TINY.tower, num_layers=5))
    name = "tower.encoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(random_vision(TINY, 0).tensors[name], random_vision(deeper, 0).tensors[name])


def test_golden_values() -> None:
    # The same on every machine and in every version: seeds stand in manifests.
    tensor = random_vision(TINY, 0).tensors["tower.embeddings.class_embedding"]
    assert tensor[:3].tolist() == pytest.approx([-0.1143747, -0.9654414, -0.7990119], abs=1e-6)


@pytest.mark.parametrize("image", ["noise", "plain"])
def test_scores_are_spread_and_tokens_differ(image: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 12, "image_size": 64, "patch_size": 8}
    change = {
        "vision_config": {"model_type": "clip_vision_model", **sizes},
    }
    processor = PROCESSOR | {"size": {"shortest_edge": 64}, "crop_size": 64}
    config = families.describe(CONFIG | change, processor)
    tower = CLIPVisionModel._from_config(CLIPVisionConfig(**sizes), attn_implementation="eager")
    tensors = random_vision(config, 0).tensors
    tower.load_state_dict(
        {k.removeprefix("tower."): t for k, t in tensors.items() if k.startswith("tower.")}
    )
    noise = torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    pixels = noise if image == "noise" else torch.full((1, 3, 64, 64), 0.3)
    with torch.no_grad():
        output = tower.eval()(pixels, output_attentions=True, output_hidden_states=True)
    scores = output.attentions[-2][0, :, 0, 1:].double().sum(0).sort().values
    gaps = scores.diff() / scores[1:]
    assert scores[-1] > 1.5 * scores[0]  # attention is not uniform
    assert gaps.median() > 1e-4  # FP32 rounds at 1e-7, and sums a little above it
    tokens = torch.nn.functional.normalize(output.hidden_states[-2][0], dim=-1)
    assert ((tokens @ tokens.T).fill_diagonal_(0) < 0.999).all()
    assert output.hidden_states[-2].abs().max() < 100


@pytest.mark.parametrize("seed", [-1, 1.0, True, None, "0"])
def test_seeds_are_integers_from_0(seed: Any) -> None:
    with refused(InvalidInputError, got=f"seed is {seed!r}", expected="0 or above"):
        random_vision(TINY, seed)
