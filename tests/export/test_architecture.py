from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.refusals import refused
from vzip.export.architecture import (
    ProjectorConfig,
    TowerConfig,
    VisionConfig,
    needed_tensors,
    projector_shapes,
    tensor_shapes,
)
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.preprocess import Preprocessing

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
    kind="clip",
    image_size=32,
    patch_size=4,
    hidden_size=24,
    intermediate_size=40,
    num_heads=4,
    num_layers=3,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
)
SIGLIP = dataclasses.replace(TOWER, kind="siglip", image_size=38)
PROJECTOR = ProjectorConfig(24, 48, 56, activation="gelu", bias=True)
VISION = VisionConfig("llava", TOWER, PROJECTOR, (-2,), 98, PREPROCESSING)
FRAMES = VisionConfig(
    "llava-onevision",
    SIGLIP,
    PROJECTOR,
    (-1,),
    98,
    dataclasses.replace(PREPROCESSING, image_size=38, shortest_edge=38),
    media="video",
    takes=("video",),
    video_token_id=97,
    pool=2,
    newline=True,
)


def several(*layers: int) -> VisionConfig:
    wide = dataclasses.replace(PROJECTOR, in_features=24 * len(layers))
    return dataclasses.replace(VISION, projector=wide, feature_layers=layers)


def test_counts() -> None:
    assert (TOWER.grid, TOWER.patches, TOWER.tokens) == ((8, 8), 64, 65)
    assert (VISION.grid, VISION.tokens) == ((8, 8), 65)
    assert VISION.llm_hidden_size == 56


def test_counts_without_cls_and_with_pixels_that_no_patch_sees() -> None:
    assert (SIGLIP.grid, SIGLIP.patches, SIGLIP.tokens) == ((9, 9), 81, 81)


def test_pooling_rounds_up() -> None:
    assert (FRAMES.grid, FRAMES.tokens) == ((5, 5), 25)
    assert dataclasses.replace(FRAMES, pool=1).tokens == 81
    published = dataclasses.replace(SIGLIP, image_size=384, patch_size=14)
    preprocessing = dataclasses.replace(PREPROCESSING, image_size=384, shortest_edge=384)
    video = dataclasses.replace(FRAMES, tower=published, preprocessing=preprocessing)
    assert (video.grid, video.tokens) == ((14, 14), 196)


def test_the_kind_says_whether_there_is_a_cls_token() -> None:
    assert (TOWER.cls_token, SIGLIP.cls_token) == (True, False)


@pytest.mark.parametrize(("layer", "run"), [(-3, 1), (-2, 2), (-1, 3), (1, 1), (2, 2), (3, 3)])
def test_layers_run_counts_hidden_states(layer: int, run: int) -> None:
    assert dataclasses.replace(VISION, feature_layers=(layer,)).layers_run == run


@pytest.mark.parametrize(
    ("layers", "states", "run"),
    [((-2, -3, 1), (2, 1, 1), 2), ((1, -1), (1, 3), 3), ((1, 2), (1, 2), 2)],
)
def test_the_deepest_of_several_layers_counts(
    layers: tuple[int, ...], states: tuple[int, ...], run: int
) -> None:
    config = several(*layers)
    assert (config.states, config.layers_run) == (states, run)


@pytest.mark.parametrize("layer", [0, -4, 4, -5, 99])
def test_a_feature_layer_without_attention_is_refused(layer: int) -> None:
    ends = ("1 to 3", "-1 to -3")
    with refused(CheckpointError, got=f"feature_layer is {layer}", expected=ends):
        dataclasses.replace(VISION, feature_layers=(layer,))
    with refused(CheckpointError, expected=ends):
        several(-2, layer)


@pytest.mark.parametrize(
    ("part", "change", "got", "expected"),
    [
        (TOWER, {"image_size": 0}, "tower image_size is 0", "an integer above 0"),
        (TOWER, {"image_size": [32, 32]}, "tower image_size is [32, 32]", "an integer"),
        (TOWER, {"num_layers": True}, "tower num_layers is True", "an integer above 0"),
        (TOWER, {"patch_size": 33}, "tower image_size is 32", "at least patch_size 33"),
        (TOWER, {"num_heads": 5}, "tower hidden_size is 24", "a multiple of num_heads 5"),
        (TOWER, {"activation": "relu"}, "tower activation is 'relu'", "one of quick_gelu"),
        (TOWER, {"layer_norm_eps": 0.0}, "tower layer_norm_eps is 0.0", "a number above 0"),
        (TOWER, {"layer_norm_eps": float("nan")}, "tower layer_norm_eps is nan", ""),
        (TOWER, {"kind": "dino"}, "tower kind is 'dino'", "one of clip, siglip"),
        (PROJECTOR, {"out_features": -1}, "projector out_features is -1", "an integer"),
        (PROJECTOR, {"activation": "silu"}, "projector activation is 'silu'", "one of gelu"),
        (PROJECTOR, {"bias": None}, "projector bias is None", "true or false"),
        (PROJECTOR, {"norm_eps": 0.0}, "projector norm_eps is 0.0", "a number above 0"),
        (PROJECTOR, {"norm_eps": True}, "projector norm_eps is True", "a number above 0"),
        (VISION, {"feature_layers": -2}, "feature_layer is -2", "one integer or several"),
        (VISION, {"feature_layers": ()}, "feature_layer is ()", "one integer or several"),
        (VISION, {"feature_layers": (-2, "1")}, "feature_layer is (-2, '1')", "one integer"),
        (
            VISION,
            {"feature_layers": (-2, 1)},
            "is 24",
            "48, the tower's hidden_size times 2",
        ),
        (
            VISION,
            {"media": "video", "takes": ("image",)},
            "media is 'video'",
            "one of image",
        ),
        (VISION, {"image_token_id": None}, "image_token_id is None", "one integer"),
        (VISION, {"family": ""}, "family is ''", "a name"),
        (VISION, {"feature_strategy": "cls"}, "feature_strategy is 'cls'", "one of default"),
        (
            VISION,
            {"projector": dataclasses.replace(PROJECTOR, in_features=32)},
            "projector in_features is 32",
            "24, the tower's hidden_size times 1 feature",
        ),
        (
            VISION,
            {"preprocessing": dataclasses.replace(PREPROCESSING, image_size=28)},
            "preprocessing image_size is 28",
            "the tower's image_size 32",
        ),
    ],
)
def test_wrong_values_are_refused(
    part: Any, change: dict[str, Any], got: str, expected: str
) -> None:
    with refused(CheckpointError, got=got, expected=expected):
        dataclasses.replace(part, **change)


def upstream(kind: str, *, vip: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of transformers' own tower and projector, at our canonical names."""
    import torch
    import transformers
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

    name = {"clip": "CLIPVision", "siglip": "SiglipVision"}[kind]
    vision = getattr(transformers, f"{name}Config")(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_hidden_layers=3,
        image_size=32 if kind == "clip" else 38,
        patch_size=4,
        **({} if kind == "clip" else {"vision_use_head": False}),
    )
    config = (transformers.VipLlavaConfig if vip else transformers.LlavaConfig)(
        vision_config=vision,
        text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4},
        vision_feature_layer=[-2, 1] if vip else -2,
    )
    with torch.device("meta"):
        tower = getattr(transformers, f"{name}Model")(vision).state_dict()
        projector = (VipLlavaMultiModalProjector if vip else LlavaMultiModalProjector)(config)
    shapes = {f"tower.{name}": tuple(tensor.shape) for name, tensor in tower.items()}
    return shapes | {f"projector.{n}": tuple(t.shape) for n, t in projector.state_dict().items()}


def test_shapes_are_those_of_transformers() -> None:
    square = dataclasses.replace(PROJECTOR, out_features=48)
    config = dataclasses.replace(VISION, projector=square)
    assert tensor_shapes(config) == upstream("clip", vip=False)
    frames = dataclasses.replace(FRAMES, projector=square, newline=False)
    assert tensor_shapes(frames) == upstream("siglip", vip=False)


def test_shapes_with_a_norm_before_the_projector() -> None:
    vip = dataclasses.replace(PROJECTOR, in_features=48, out_features=48, norm_eps=1e-5)
    config = dataclasses.replace(VISION, projector=vip, feature_layers=(-2, 1))
    assert tensor_shapes(config) == upstream("clip", vip=True)


def test_the_newline_embedding_is_needed_where_there_is_one() -> None:
    shapes = tensor_shapes(FRAMES)
    assert shapes["image_newline"] == (56,)
    assert "image_newline" in needed_tensors(FRAMES)
    assert "image_newline" not in tensor_shapes(dataclasses.replace(FRAMES, newline=False))


def test_tiles_are_part_of_the_architecture() -> None:
    tiling = Tiling(((32, 64),))
    assert dataclasses.replace(VISION, tiling=tiling).tiling is tiling
    assert VISION.tiling is None


def test_projector_without_bias() -> None:
    shapes = projector_shapes(dataclasses.replace(PROJECTOR, bias=False))
    assert shapes == {"linear_1.weight": (48, 24), "linear_2.weight": (56, 48)}


@pytest.mark.parametrize(("layer", "dead"), [(-1, set()), (-2, {"2"}), (1, {"1", "2"})])
def test_dead_tensors_are_not_needed(layer: int, dead: set[str]) -> None:
    config = dataclasses.replace(VISION, feature_layers=(layer,))
    spare = set(tensor_shapes(config)) - needed_tensors(config)
    assert {name for name in spare if "post_layernorm" in name} == {
        "tower.post_layernorm.weight",
        "tower.post_layernorm.bias",
    }
    assert {name.split(".")[3] for name in spare if ".layers." in name} == dead
    assert len(spare) == 2 + 16 * len(dead)
    assert needed_tensors(config) < set(tensor_shapes(config))
