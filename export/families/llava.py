"""LLaVA-1.5 and what is built as it: a tower, one feature layer or several, a two-layer projector.

Two forms of configuration are out there: Hugging Face's (``llava-hf/…``: LLaVA-1.5, BakLLaVA, and
LLaVA-interleave with its SigLIP tower) and that of the original code
(``liuhaotian/llava-v1.5-7b``), whose tower is usually a checkpoint of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vzip.export.architecture import FeatureStrategy, Media, ProjectorConfig, VisionConfig
from vzip.export.families import (
    Config,
    HuggingFaceForm,
    PublishedModel,
    View,
    configs,
    known_keys,
    register,
)
from vzip.export.families.known_parts import (
    CLIP_336,
    CLIP_PROCESSOR_336,
    LLAMA_7B,
    LLAMA_13B,
    MISTRAL_7B,
    QWEN1_5_0_5B,
    QWEN1_5_7B,
    SIGLIP_384,
    SIGLIP_PROCESSOR_384,
)
from vzip.export.families.processors import WHOLE, preprocessing
from vzip.runtime.config_numbers import check_numbers

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

ORIGINAL_IMAGE_TOKEN = -200
"""``IMAGE_TOKEN_INDEX`` of the original code: a placeholder, no entry of the vocabulary."""

_PAPER_BUDGETS = "54+10, 108+20, 162+30"


def _clip(text_config: Config, budgets: str = "") -> PublishedModel:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "vision_config": CLIP_336,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    return PublishedModel(config, CLIP_PROCESSOR_336, budgets)


def _interleave(text_config: Config) -> PublishedModel:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 151646,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "vision_config": SIGLIP_384,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    return PublishedModel(config, SIGLIP_PROCESSOR_384)


@register("llava")
class Llava(HuggingFaceForm):
    """Hugging Face's form."""

    model_type = "llava"
    media: Mapping[Media, View] = {"image": View("image")}
    published: Mapping[str, PublishedModel] = {
        "llava-hf/llava-1.5-7b-hf": _clip(LLAMA_7B, _PAPER_BUDGETS),
        "llava-hf/llava-1.5-13b-hf": _clip(LLAMA_13B, _PAPER_BUDGETS),
        "llava-hf/bakLlava-v1-hf": _clip(MISTRAL_7B),
        "llava-hf/llava-interleave-qwen-0.5b-hf": _interleave(QWEN1_5_0_5B),
        "llava-hf/llava-interleave-qwen-7b-hf": _interleave(QWEN1_5_7B),
    }

    @property
    def claimed_by(self) -> str:
        """See `Family`."""
        return f"{super().claimed_by} with a vision_config"

    def claims(self, config: Config) -> bool:
        """Say whether this is Hugging Face's form; the original code's may say 'llava' too."""
        return super().claims(config) and "vision_config" in config

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers; keys that are missing have the defaults of transformers' classes."""
        assert tower is None
        from transformers import LlavaConfig

        layers = configs.feature_layers(config, -2)
        full = configs.read(LlavaConfig, config, kinds=("clip", "siglip"))
        sizes = configs.tower(full.vision_config)
        return VisionConfig(
            family="llava",
            tower=sizes,
            projector=configs.projector(full, sizes, layers, bias=full.multimodal_projector_bias),
            feature_layers=layers,
            image_token_id=configs.token_id("image_token_index", full.image_token_index),
            preprocessing=preprocessing(
                preprocessor,
                image_size=sizes.image_size,
                classes=(*WHOLE, "SiglipImageProcessor"),
            ),
            feature_strategy=configs.strategy(full, sizes),
            media=media,
        )


@register("llava-original")
class LlavaOriginal:
    """The original code's form."""

    claimed_by = "mm_vision_tower and mm_projector_type"
    media: Mapping[Media, View] = {"image": View("image")}
    published: Mapping[str, PublishedModel] = {}

    def claims(self, config: Config) -> bool:
        """Say whether this is the original code's form."""
        return "mm_vision_tower" in config and "vision_config" not in config

    def tower_reference(self, config: Config) -> str | None:
        """Return the checkpoint that ``mm_vision_tower`` names."""
        self._check(config)  # before the tower is looked for, perhaps on the hub
        reference = config["mm_vision_tower"]
        if not isinstance(reference, str) or not reference:
            raise configs.refused("mm_vision_tower", reference, "a hub id or a folder")
        if reference.startswith("clip_4layer_"):
            expected = "ViP-LLaVA in Hugging Face's form, such as llava-hf/vip-llava-7b-hf"
            raise configs.refused("mm_vision_tower", reference, expected)
        return reference

    def own_tower(self, config: Config) -> bool:
        """Say whether the tower was trained: the original code takes a frozen one by its name.

        Of two versions of that code the one has a key for it, the other a list of what is trained.
        """
        parts = config.get("mm_tunable_parts") or ""
        return bool(config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in parts

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers: the tower's from its own checkpoint, the others from the mm_ keys."""
        assert tower is not None
        self._check(config)
        sizes = configs.tower(_clip_vision(tower))
        width = configs.integer(config, "mm_hidden_size")
        if width != sizes.hidden_size:
            raise configs.refused(
                "mm_hidden_size", width, f"{sizes.hidden_size}, the tower's width"
            )
        llm = configs.integer(config, "hidden_size")
        return VisionConfig(
            family="llava-original",
            tower=sizes,
            projector=ProjectorConfig(width, llm, llm, activation="gelu", bias=True),
            feature_layers=(configs.integer(config, "mm_vision_select_layer"),),
            image_token_id=ORIGINAL_IMAGE_TOKEN,
            preprocessing=preprocessing(
                preprocessor,
                image_size=sizes.image_size,
                classes=WHOLE,
                pad_to_square=_RATIOS[config.get("image_aspect_ratio")],
            ),
            feature_strategy=_STRATEGIES[config.get("mm_vision_select_feature", "patch")],
            media=media,
        )

    def _check(self, config: Config) -> None:
        """Refuse variants of the original code's models that are not LLaVA-1.5."""
        check_numbers(config)
        kind = config.get("model_type")
        if kind not in _TYPES:  # a tuple: a list in the file is no key
            expected = " or ".join(map(repr, _TYPES))
            raise configs.refused("model_type", kind, expected, cure=known_keys.OTHER_MODEL)
        known_keys.check_class(config, _CLASSES)
        ratio = config.get("image_aspect_ratio")
        if isinstance(ratio, str) and ratio.startswith("anyres"):
            raise configs.refused(
                "image_aspect_ratio",
                ratio,
                "'pad', 'square' or none: a model that cuts tiles is read in Hugging Face's form "
                "alone, such as llava-hf/llava-v1.6-vicuna-7b-hf",
                cure=known_keys.OTHER_MODEL,
            )
        if ratio not in tuple(_RATIOS):  # a list in the file is no key
            raise configs.refused("image_aspect_ratio", ratio, "'pad', 'square' or none")
        # "linear" is what the original code takes where the key is missing.
        projector = config.get("mm_projector_type", "linear")
        if projector != "mlp2x_gelu":
            raise configs.refused("mm_projector_type", projector, "'mlp2x_gelu'")
        feature = config.get("mm_vision_select_feature", "patch")
        if feature not in tuple(_STRATEGIES):
            raise configs.refused("mm_vision_select_feature", feature, "'patch' or 'cls_patch'")
        parts = config.get("mm_tunable_parts")
        if parts and not (isinstance(parts, str) and set(parts.split(",")) <= _TUNABLE):
            raise configs.refused("mm_tunable_parts", parts, " and ".join(sorted(_TUNABLE)))
        trained = config.get("unfreeze_mm_vision_tower")
        if trained is not None and type(trained) is not bool:
            raise configs.refused("unfreeze_mm_vision_tower", trained, "true or false")
        known_keys.check(config, known=known_keys.ORIGINAL, allowed=known_keys.ORIGINAL_VALUES)


# The language models of the original code. ShareGPT4V is LLaVA-1.5 with a tower of its own, whose
# model card says so.
_TYPES = (
    "llava",
    "llava_llama",
    "llava_mistral",
    "llava_mixtral",
    "llava_mpt",
    "llava_qwen",
    "llava_gemma",
    "share4v",
)
# A projector alone, and an adapter, were saved with the class of the LLM that was trained.
_CLASSES = (
    "LlavaLlamaForCausalLM",
    "LlavaMistralForCausalLM",
    "LlavaMixtralForCausalLM",
    "LlavaMptForCausalLM",
    "LlavaMPTForCausalLM",
    "LlavaQwenForCausalLM",
    "LlavaGemmaForCausalLM",
    "Share4VLlamaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "MPTForCausalLM",
    "Qwen2ForCausalLM",
    "GemmaForCausalLM",
)
_TUNABLE = {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}
_STRATEGIES: Mapping[str, FeatureStrategy] = {"patch": "default", "cls_patch": "full"}
_RATIOS: Mapping[str | None, bool] = {"pad": True, "square": False, None: False}  # pad to a square?


def _clip_vision(config: Config) -> CLIPVisionConfig:
    """The vision part of a tower checkpoint's configuration, as ``CLIPVisionModel`` reads it."""
    from transformers import CLIPVisionConfig

    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        expected = "'clip' or 'clip_vision_model'"
        raise configs.refused("model_type of mm_vision_tower", kind, expected)
    part = "the tower's config"
    if kind == "clip":
        known_keys.check_class(config, ("CLIPModel", "CLIPVisionModel"), part=part)
        # Not ``vision_config_dict``, which ``CLIPModel`` alone would read.
        config, part = config.get("vision_config") or {}, f"{part}.vision_config"
        if not isinstance(config, Mapping):
            raise configs.refused(part, config, "an object")
    configs.check_tower(config, part)
    return configs.complete(CLIPVisionConfig, config)
