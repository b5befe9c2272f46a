from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vzip.export.architecture import (
    ProjectorConfig,
    TowerConfig,
    VisionConfig,
    needed_tensors,
    projector_shapes,
    tensor_shapes,
)
from vzip.runtime.errors import CheckpointError
from vzip.runtime.preprocess import Preprocessing

PREPROCESSING = Preprocessing(
    image_size=32,
    mode="resize_crop",
    shortest_edge=32,
    resample="bicubic",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
    rescale_factor=1 / 255,
)
TOWER = TowerConfig(
    image_size=32,
    patch_size=4,
    hidden_size=24,
    intermediate_size=40,
    num_heads=4,
    num_layers=3,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    cls_token=True,
)
PROJECTOR = ProjectorConfig(24, 48, 56, activation="gelu", bias=True)
VISION = VisionConfig("llava", TOWER, PROJECTOR, -2, 98, PREPROCESSING)


def test_counts() -> None:
    assert (TOWER.grid, TOWER.patches, TOWER.tokens) == ((8, 8), 64, 65)
    assert dataclasses.replace(TOWER, cls_token=False).tokens == 64
    assert VISION.llm_hidden_size == 56


@pytest.mark.parametrize(("layer", "run"), [(-3, 1), (-2, 2), (-1, 3), (1, 1), (2, 2), (3, 3)])
def test_layers_run_counts_hidden_states(layer: int, run: int) -> None:
    assert dataclasses.replace(VISION, feature_layer=layer).layers_run == run


@pytest.mark.parametrize("layer", [0, -4, 4, -5, 99])
def test_a_feature_layer_without_attention_is_refused(layer: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        dataclasses.replace(VISION, feature_layer=layer)
    assert f"feature_layer is {layer}, expected the output of one of the tower's 3 layers: 1 to 3, or -1 to -3" in str(caught.value)  # fmt: skip  # noqa: E501 - the message as it is


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (TOWER, {"image_size": 0}, "tower image_size is 0, expected an integer above 0"),
        (TOWER, {"image_size": [32, 32]}, "tower image_size is [32, 32], expected an integer"),
        (TOWER, {"num_layers": True}, "tower num_layers is True, expected an integer above 0"),
        (TOWER, {"patch_size": 5}, "tower image_size is 32, expected a multiple of patch_size 5"),
        (TOWER, {"num_heads": 5}, "tower hidden_size is 24, expected a multiple of num_heads 5"),
        (TOWER, {"activation": "relu"}, "tower activation is 'relu', expected one of quick_gelu"),
        (TOWER, {"layer_norm_eps": 0.0}, "tower layer_norm_eps is 0.0, expected a number above 0"),
        (TOWER, {"layer_norm_eps": float("nan")}, "tower layer_norm_eps is nan"),
        (TOWER, {"cls_token": 1}, "tower cls_token is 1, expected true or false"),
        (PROJECTOR, {"out_features": -1}, "projector out_features is -1, expected an integer"),
        (PROJECTOR, {"activation": "silu"}, "projector activation is 'silu', expected one of gelu"),
        (PROJECTOR, {"bias": None}, "projector bias is None, expected true or false"),
        (VISION, {"feature_layer": [-2, -5]}, "feature_layer is [-2, -5], expected one integer"),
        (VISION, {"image_token_id": None}, "image_token_id is None, expected one integer"),
        (VISION, {"family": ""}, "family is '', expected a name"),
        (VISION, {"feature_strategy": "cls"}, "feature_strategy is 'cls', expected one of default"),
        (
            VISION,
            {"projector": dataclasses.replace(PROJECTOR, in_features=32)},
            "projector in_features is 32, expected the tower's hidden_size 24",
        ),
        (
            VISION,
            {"preprocessing": dataclasses.replace(PREPROCESSING, image_size=28)},
            "preprocessing image_size is 28, expected the tower's image_size 32",
        ),
    ],
)
def test_wrong_values_are_refused(part: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        dataclasses.replace(part, **change)
    assert message in str(caught.value)


def test_shapes_are_those_of_transformers() -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_hidden_layers=3,
        image_size=32,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4},
    )
    with torch.device("meta"):
        tower = CLIPVisionModel(vision).state_dict()
        projector = LlavaMultiModalProjector(config).state_dict()
    expected = {f"tower.{name}": tuple(tensor.shape) for name, tensor in tower.items()}
    expected |= {f"projector.{name}": tuple(tensor.shape) for name, tensor in projector.items()}
    square = dataclasses.replace(PROJECTOR, out_features=48)
    assert tensor_shapes(dataclasses.replace(VISION, projector=square)) == expected


def test_projector_without_bias() -> None:
    shapes = projector_shapes(dataclasses.replace(PROJECTOR, bias=False))
    assert shapes == {"linear_1.weight": (48, 24), "linear_2.weight": (56, 48)}


@pytest.mark.parametrize(("layer", "dead"), [(-1, set()), (-2, {"2"}), (1, {"1", "2"})])
def test_dead_tensors_are_not_needed(layer: int, dead: set[str]) -> None:
    config = dataclasses.replace(VISION, feature_layer=layer)
    spare = set(tensor_shapes(config)) - needed_tensors(config)
    assert {name for name in spare if "post_layernorm" in name} == {
        "tower.post_layernorm.weight",
        "tower.post_layernorm.bias",
    }
    assert {name.split(".")[3] for name in spare if ".layers." in name} == dead
    assert len(spare) == 2 + 16 * len(dead)
    assert needed_tensors(config) < set(tensor_shapes(config))
