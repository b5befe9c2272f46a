"""LLaVA-1.5: a CLIP tower, one feature layer, a two-layer projector.

Two forms of configuration are out there: Hugging Face's (``llava-hf/…``, and BakLLaVA's, which is
the same) and that of the original code (``liuhaotian/llava-v1.5-7b``), whose tower is usually a
checkpoint of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from vzip.export.architecture import (
    FeatureStrategy,
    ProjectorActivation,
    ProjectorConfig,
    TowerActivation,
    TowerConfig,
    VisionConfig,
)
from vzip.export.families import Config, register
from vzip.export.families.clip_processor import preprocessing
from vzip.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

ORIGINAL_IMAGE_TOKEN = -200
"""``IMAGE_TOKEN_INDEX`` of the original code: a placeholder, no entry of the vocabulary."""

_CLIP_336: Config = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_PROCESSOR_336: Config = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}


def _published(text_config: Config) -> tuple[Config, Config]:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", "vocab_size": 32064, **text_config},
        "vision_config": _CLIP_336,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    return config, _PROCESSOR_336


@register("llava")
class Llava:
    """Hugging Face's form."""

    claimed_by = "model_type 'llava' with a vision_config"
    # The 7B's names no sizes: they are LlamaConfig's own.
    published: Mapping[str, tuple[Config, Config]] = {
        "llava-hf/llava-1.5-7b-hf": _published({}),
        "llava-hf/llava-1.5-13b-hf": _published(
            {
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_attention_heads": 40,
                "num_hidden_layers": 40,
                "num_key_value_heads": 40,
            }
        ),
    }

    def claims(self, config: Config) -> bool:
        """Say whether this is Hugging Face's form."""
        return config.get("model_type") == "llava" and "vision_config" in config

    def tower_reference(self, config: Config) -> str | None:  # noqa: ARG002 - the Protocol's
        """Return None: the tower is in the checkpoint."""
        return None

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None
    ) -> VisionConfig:
        """Read the numbers; keys that are missing have the defaults of transformers' classes."""
        assert tower is None
        from transformers import LlavaConfig

        # Before transformers looks at it: its own refusals of these two are long or absent.
        vision = config["vision_config"]
        kind = vision.get("model_type", "clip_vision_model") if isinstance(vision, dict) else vision
        if kind != "clip_vision_model":
            raise _refused("vision_config.model_type", kind, "'clip_vision_model'")
        layer = config.get("vision_feature_layer", -2)
        if type(layer) is not int:
            raise _refused("vision_feature_layer", layer, "one layer: an integer")
        full = _complete(LlavaConfig, config)
        sizes = _tower(full.vision_config)
        return VisionConfig(
            family="llava",
            tower=sizes,
            projector=ProjectorConfig(
                in_features=sizes.hidden_size,
                hidden_features=full.text_config.hidden_size,
                out_features=full.text_config.hidden_size,
                activation=cast("ProjectorActivation", full.projector_hidden_act),
                bias=full.multimodal_projector_bias,
            ),
            feature_layer=full.vision_feature_layer,
            image_token_id=full.image_token_index,
            preprocessing=preprocessing(_present(preprocessor), image_size=sizes.image_size),
            feature_strategy=cast("FeatureStrategy", full.vision_feature_select_strategy),
        )


@register("llava-original")
class LlavaOriginal:
    """The original code's form."""

    claimed_by = "mm_vision_tower and mm_projector_type"
    published: Mapping[str, tuple[Config, Config]] = {}

    def claims(self, config: Config) -> bool:
        """Say whether this is the original code's form."""
        return "mm_vision_tower" in config

    def tower_reference(self, config: Config) -> str | None:
        """Return the checkpoint that ``mm_vision_tower`` names."""
        reference = config["mm_vision_tower"]
        if not isinstance(reference, str) or not reference:
            raise _refused("mm_vision_tower", reference, "a hub id or a folder")
        return reference

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None
    ) -> VisionConfig:
        """Read the numbers: the tower's from its own checkpoint, the others from the mm_ keys."""
        assert tower is not None
        # "linear" is what the original code takes where the key is missing.
        projector = config.get("mm_projector_type", "linear")
        if projector != "mlp2x_gelu":
            raise _refused("mm_projector_type", projector, "'mlp2x_gelu'")
        feature = config.get("mm_vision_select_feature", "patch")
        if feature not in tuple(_STRATEGIES):
            raise _refused("mm_vision_select_feature", feature, "'patch' or 'cls_patch'")
        ratio = config.get("image_aspect_ratio")
        if ratio not in tuple(_RATIOS):  # a list in the file is no key
            raise _refused("image_aspect_ratio", ratio, "'pad', 'square' or none")
        sizes = _tower(_clip_vision(tower))
        width = _integer(config, "mm_hidden_size")
        if width != sizes.hidden_size:
            raise _refused("mm_hidden_size", width, f"{sizes.hidden_size}, the tower's width")
        llm = _integer(config, "hidden_size")
        return VisionConfig(
            family="llava-original",
            tower=sizes,
            projector=ProjectorConfig(width, llm, llm, activation="gelu", bias=True),
            feature_layer=_integer(config, "mm_vision_select_layer"),
            image_token_id=ORIGINAL_IMAGE_TOKEN,
            preprocessing=preprocessing(
                _present(preprocessor),
                image_size=sizes.image_size,
                pad_to_square=_RATIOS[ratio],
            ),
            feature_strategy=_STRATEGIES[feature],
        )


_STRATEGIES: Mapping[str, FeatureStrategy] = {"patch": "default", "cls_patch": "full"}
_RATIOS: Mapping[str | None, bool] = {"pad": True, "square": False, None: False}  # pad to a square?


def _tower(config: CLIPVisionConfig) -> TowerConfig:
    if config.num_channels != 3:
        raise _refused("num_channels", config.num_channels, "3")
    return TowerConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        activation=cast("TowerActivation", config.hidden_act),
        layer_norm_eps=config.layer_norm_eps,
        cls_token=True,
    )


def _clip_vision(config: Config) -> CLIPVisionConfig:
    """The vision part of a tower checkpoint's configuration."""
    from transformers import CLIPConfig, CLIPVisionConfig

    kind = config.get("model_type")
    if kind == "clip":
        return _complete(CLIPConfig, config).vision_config
    if kind == "clip_vision_model":
        return _complete(CLIPVisionConfig, config)
    raise _refused("model_type of mm_vision_tower", kind, "'clip' or 'clip_vision_model'")


def _complete(config_class: Any, config: Config) -> Any:
    """Let transformers' class fill in what a configuration leaves out."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(dict(config))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"config.json is no {config_class.__name__}: {reason[:200]}; compare it with the "
            "published one"
        ) from error


def _present(preprocessor: Config | None) -> Config:
    if preprocessor is None:
        raise CheckpointError(
            "the checkpoint has no settings of an image processor, expected "
            "preprocessor_config.json; take it from the published model"
        )
    return preprocessor


def _integer(config: Config, key: str) -> int:
    value = config.get(key)
    if type(value) is not int:
        raise _refused(key, value, "an integer")
    return value


def _refused(key: str, got: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"config.json has {key} = {got!r}, expected {expected}; vzip doesn't know this variant of "
        "LLaVA-1.5"
    )
