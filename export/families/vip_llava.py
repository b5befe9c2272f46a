"""ViP-LLaVA: features of several layers side by side, and a LayerNorm before the projector."""

from __future__ import annotations

from collections.abc import Mapping

from vzip.export.architecture import Media, VisionConfig
from vzip.export.families import Config, HuggingFaceForm, PublishedModel, View, configs, register
from vzip.export.families.known_parts import CLIP_336, CLIP_PROCESSOR_336, LLAMA_7B, LLAMA_13B
from vzip.export.families.processors import WHOLE, preprocessing

_LAYERS = (-2, -5, -8, -11, 6)


def _published(text_config: Config) -> PublishedModel:
    config = {
        "architectures": ["VipLlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "vipllava",
        "projector_hidden_act": "gelu",
        "projector_layernorm_eps": 1e-05,
        "text_config": text_config,
        "vision_config": CLIP_336,
        "vision_feature_layers": list(_LAYERS),
    }
    return PublishedModel(config, CLIP_PROCESSOR_336)


@register("vip-llava")
class VipLlava(HuggingFaceForm):
    """Hugging Face's form."""

    model_type = "vipllava"
    media: Mapping[Media, View] = {"image": View("image")}
    published: Mapping[str, PublishedModel] = {
        "llava-hf/vip-llava-7b-hf": _published(LLAMA_7B),
        "llava-hf/vip-llava-13b-hf": _published(LLAMA_13B),
    }

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers; keys that are missing have the defaults of transformers' class."""
        assert tower is None
        from transformers import VipLlavaConfig

        # Before transformers 5 the key was `vision_feature_layers`, and published files have it.
        old = (
            {"vision_feature_layer": config["vision_feature_layers"]}
            if ("vision_feature_layers" in config)
            else {}
        )
        layers = configs.feature_layers({**old, **config}, _LAYERS)
        full = configs.read(VipLlavaConfig, config, kinds=("clip",))
        sizes = configs.tower(full.vision_config)
        return VisionConfig(
            family="vip-llava",
            tower=sizes,
            projector=configs.projector(
                full, sizes, layers, bias=True, norm_eps=full.projector_layernorm_eps
            ),
            feature_layers=layers,
            image_token_id=configs.token_id("image_token_index", full.image_token_index),
            preprocessing=preprocessing(preprocessor, image_size=sizes.image_size, classes=WHOLE),
            media=media,
        )
