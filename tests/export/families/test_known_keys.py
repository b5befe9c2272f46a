"""What is LLaVA and what is only made of its code: keys and values that are known, and the others.

The keys of each model are those of its published ``config.json``; its sizes are tiny ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import pytest

from tests.export.layouts import (
    CLIP_CONFIG,
    CONFIG,
    FAMILIES,
    OLD_PROCESSOR,
    ORIGINAL_CONFIG,
    SIGLIP,
    TINY,
    VISION,
)
from tests.refusals import Said, refused
from vzip.export import families
from vzip.runtime.errors import CheckpointError

Keys = dict[str, Any]

# liuhaotian/llava-v1.5-7b, and what LLaVA's code of 2024 writes beside it.
LLAVA_1_5: Keys = {
    "_name_or_path": "llava-v1.5-7b",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_resampler_type": None,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
}
NEWER: Keys = {
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": 2e-05,
    "mm_vision_tower_lr": 2e-06,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "unfreeze_mm_vision_tower": True,
}


def original(change: Mapping[str, Any], tower: Mapping[str, Any] = CLIP_CONFIG) -> Any:
    config = {**ORIGINAL_CONFIG, **LLAVA_1_5, **change}
    families.tower_reference(config)
    return families.describe(config, OLD_PROCESSOR, tower=tower)


@pytest.mark.parametrize(
    "change",
    [
        {},
        NEWER,
        {"model_type": "llava_llama"},
        {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]},  # LLaVA-Med
        {"model_type": "share4v", "architectures": ["Share4VLlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"]},  # of a projector alone, or an adapter
        {"mm_use_im_patch_token": True},
        {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"},
        {"mm_vision_tower_aux": None, "s2": False, "s2_scales": "336,672,1008"},
        {"mm_spatial_pool_stride": None, "vision_tower_pretrained": ""},
    ],
)
def test_what_is_llava_is_taken(change: Keys, caplog: pytest.LogCaptureFixture) -> None:
    config = original(change)
    assert config.preprocessing == original({}).preprocessing
    assert config.tower == original({}).tower
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (
            {
                "model_type": "mini_gemini",
                "architectures": ["MiniGeminiLlamaForCausalLM"],
                "mm_vision_tower_aux": "openclip-convnext-large",
                "image_size_aux": 768,
            },
            "model_type = 'mini_gemini'",
        ),
        ({"architectures": ["MGMLlamaForCausalLM"]}, "['MGMLlamaForCausalLM']"),
        ({"mm_vision_tower_aux": "openclip-convnext"}, "mm_vision_tower_aux = 'openclip-convnext'"),
        ({"mm_vision_tower_aux_list": ["a"]}, "mm_vision_tower_aux_list"),  # Cambrian-1
        ({"image_size_aux": 768}, "image_size_aux = 768"),
        ({"model_type": "geochat", "architectures": ["GeoChatLlamaForCausalLM"]}, "'geochat'"),
        ({"architectures": ["LISAForCausalLM"]}, "architectures = ['LISAForCausalLM']"),
        ({"architectures": ["LlavaLlamaAttForCausalLM"]}, "LlavaLlamaAtt"),  # LLaMA-VID
        ({"architectures": "LlavaLlamaForCausalLM2"}, "'LlavaLlamaForCausalLM2'"),
        ({"model_type": ["llava"]}, "model_type = ['llava']"),
        ({"model_type": "tiny_llava_phi"}, "'tiny_llava_phi'"),
        ({"model_type": "bunny-phi"}, "'bunny-phi'"),
        ({"model_type": "moe_llava_stablelm"}, "'moe_llava_stablelm'"),
        ({"model_type": "llava_hr"}, "'llava_hr'"),
        ({"vision_tower_slow": "convnext", "is_multipath_encoder": True}, "vision_tower_slow"),
        ({"s2": True, "s2_scales": "336,672,1008"}, "s2 = True"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type = 'spatial_pool'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type = 'qformer'"),
        ({"mm_spatial_pool_stride": 2}, "mm_spatial_pool_stride = 2"),
        ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode = 'average'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type = 'spatial_unpad'"),
        ({"mm_tunable_parts": "mm_vision_resampler"}, "mm_tunable_parts"),
        ({"mm_projector_type": "mlp2x_gelu_Norm"}, "mm_projector_type"),  # Yi-VL
        *(
            ({"mm_projector_type": name}, f"mm_projector_type = '{name}'")
            for name in ("ldpnetv2", "mlp_downsample", "spatial_pool", "mlp2x_gelu_pooled")
        ),
        ({"vision_resolution": -1, "interpolate_mode": "linear"}, "vision_resolution"),  # VILA
        ({"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]}, "LlavaLlamaModel"),
        ({"num_video_frames": 8}, "num_video_frames = 8"),
        ({"mm_video_tower": "LanguageBind/LanguageBind_Video_merge"}, "mm_video_tower"),
        ({"mm_newline_position": "grid"}, "mm_newline_position"),
        ({"mm_dense_connector_type": "dci"}, "mm_dense_connector_type"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map.AutoModelForCausalLM"),
    ],
)
def test_what_is_only_made_of_llavas_code_is_refused_by_name(change: Keys, got: str) -> None:
    with refused(CheckpointError, got=got, cause="vzip doesn't know") as caught:
        original(change)
    known = ("mm_projector_type", "mm_tunable_parts")  # another file may have the right value
    assert ("vzip models" in caught.value.cure) == (not got.startswith(known))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"architectures": ["EvaCLIPModel"]}, "architectures = ['EvaCLIPModel']"),
        ({"vision_config": {**VISION, "qkv_bias": True}}, "vision_config.qkv_bias = True"),
        ({"vision_config": {**VISION, "post_layernorm": "x"}}, "vision_config.post_layernorm"),
        ({"vision_config": "VISION"}, "vision_config = 'VISION'"),
    ],
)
def test_a_tower_that_is_another_is_refused_by_name(change: Keys, got: str) -> None:
    with refused(CheckpointError, got=got):
        original({}, tower={**CLIP_CONFIG, **change})


def test_a_tower_s_configuration_is_that_of_clip_vision_model() -> None:
    """Which reads ``vision_config`` alone: the older ``vision_config_dict`` is CLIPModel's."""
    older = {key: value for key, value in VISION.items() if key != "hidden_act"}
    tower = {
        **CLIP_CONFIG,
        "vision_config": {**VISION, "hidden_act": "gelu"},
        "vision_config_dict": older,
    }
    assert original({}, tower=tower).tower.activation == "gelu"


def describe(family: str, change: Mapping[str, Any]) -> Any:
    return families.describe({**TINY[family].config, **change}, TINY[family].processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_keys_of_hugging_faces_form_are_taken(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    vision = {**TINY[family].config["vision_config"], "vocab_size": 32000, "projection_dim": 768}
    keys = {
        "ignore_index": -100,
        "image_seq_length": 576,
        "pad_token_id": 32001,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "use_image_newline_parameter": True,
        "vocab_size": 32064,
        "vision_config": {**vision, "dropout": 0.0, "torch_dtype": "float16"},
        "image_token_id": 98,
        "unsloth_fixed": True,
        # left by a conversion
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "unfreeze_mm_vision_tower": True,
    }
    assert describe(family, keys) == describe(family, {})
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_vision_keys_of_hugging_faces_form_are_refused(family: str) -> None:
    vision = TINY[family].config["vision_config"]
    for change, got in (
        ({"mm_resampler": "qformer"}, "mm_resampler = 'qformer'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type = 'qformer'"),
        ({"mm_projector_type": "ldpnetv2"}, "mm_projector_type = 'ldpnetv2'"),
        ({"s2": True}, "s2 = True"),
        ({"vision_downsample_ratio": 0.5}, "vision_downsample_ratio = 0.5"),
        ({"spatial_merge_size": 2}, "spatial_merge_size = 2"),
        ({"architectures": ["ThisForConditionalGeneration"]}, "ThisForConditionalGeneration"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map.AutoModel"),
        ({"vision_config": {**vision, "layer_scale_init": 0.1}}, "vision_config.layer_scale_init"),
    ):
        with refused(CheckpointError, got=got):
            describe(family, change)


OTHER = ("num_register_tokens", "layer_scale_init_value", "qk_norm", "pruned_heads", "rope_theta")


@pytest.mark.parametrize("key", OTHER)
def test_a_part_that_towers_lack_is_known_where_it_is_off(key: str) -> None:
    vision = TINY["llava"].config["vision_config"]
    for off in (0, 0.0, False, None, {}):
        assert describe("llava", {"vision_config": {**vision, key: off}}) == describe("llava", {})
    for on in (1, 0.5, True, {"0": [1]}):
        with refused(CheckpointError, got=f"vision_config.{key}"):
            describe("llava", {"vision_config": {**vision, key: on}})


def test_keys_that_nobody_knows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        describe("llava", {"speculative_heads": 3, "moon_phase": "full"})
        describe("llava", {"speculative_heads": 3, "moon_phase": "full"})
        original({"lunar_phase": "full"})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "speculative_heads, moon_phase" in said[0]
    assert "lunar_phase" in said[1]


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(
    "value",
    [-1, 0, 4.0, "4", True, 10**7, 10**30, pytest.param(10**1000, id="1e1000"), float("nan")],
)
def test_sizes_out_of_bounds_are_refused_at_once(key: str, value: object) -> None:
    begun = time.process_time()
    for family, vision in (("llava", VISION), ("llava-siglip", SIGLIP)):
        with refused(CheckpointError, got=key):
            describe(family, {"vision_config": {**vision, key: value}})
    with refused(CheckpointError, got=key):
        original({}, tower={**CLIP_CONFIG, "vision_config": {**VISION, key: value}})
    if not key.startswith(("image", "patch")):
        with refused(CheckpointError, got=f"text_config.{key}"):
            describe("llava", {"text_config": {**CONFIG["text_config"], key: value}})
        with refused(CheckpointError, got=key):
            original({key: value})
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"num_labels": 10**9}, "num_labels"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"vision_feature_layer": [-2] * 100_000}, "vision_feature_layer"),
        ({"vision_config": {**VISION, "image_size": 4096, "patch_size": 1}}, "patches"),
        (
            {
                "vision_config": {
                    **VISION,
                    "hidden_size": 2**17,
                    "num_hidden_layers": 1000,
                    "intermediate_size": 2**20,
                }
            },
            "parameters",
        ),
    ],
)
def test_sizes_that_are_too_large_together_are_refused(change: Keys, got: Said) -> None:
    with refused(CheckpointError, got=got):
        describe("llava", change)
    if "vision_config" not in change and "vision_feature_layer" not in change:
        with refused(CheckpointError, got=got):
            original(change)


def test_parts_in_parts_without_end_are_refused() -> None:
    deep: Any = {}
    for _ in range(500):
        deep = {"a": deep}
    with refused(CheckpointError, got="inside each other"):
        describe("llava", {"text_config": deep})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with refused(CheckpointError, got="inside each other"):
        describe("llava", {"id2label": deep})
