"""LLaVA-NeXT: LLaVA-1.5's parts on a base tile and the tiles of a larger picture."""

from __future__ import annotations

from collections.abc import Mapping

from vzip.export.architecture import Media, VisionConfig
from vzip.export.families import Config, HuggingFaceForm, PublishedModel, View, configs, register
from vzip.export.families.known_parts import (
    CLIP_336,
    CLIP_PROCESSOR_336,
    LLAMA_7B,
    LLAMA_13B,
    MISTRAL_7B,
)
from vzip.export.families.processors import pinpoints, preprocessing

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CLASSES = ("LlavaNextImageProcessor",)


def _published(text_config: Config) -> PublishedModel:
    config = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": _PINPOINTS,
        "image_token_index": 32000,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "vision_config": CLIP_336,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    processor = {
        **CLIP_PROCESSOR_336,
        "do_pad": True,
        "image_grid_pinpoints": _PINPOINTS,
        "image_processor_type": "LlavaNextImageProcessor",
    }
    return PublishedModel(config, processor, "27+5, 54+10, 108+20")


@register("llava-next")
class LlavaNext(HuggingFaceForm):
    """Hugging Face's form."""

    model_type = "llava_next"
    media: Mapping[Media, View] = {"image": View("tile")}
    published: Mapping[str, PublishedModel] = {
        "llava-hf/llava-v1.6-vicuna-7b-hf": _published(LLAMA_7B),
        "llava-hf/llava-v1.6-vicuna-13b-hf": _published(LLAMA_13B),
        "llava-hf/llava-v1.6-mistral-7b-hf": _published(MISTRAL_7B),
    }

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers; keys that are missing have the defaults of transformers' class."""
        assert tower is None
        from transformers import LlavaNextConfig

        layers = configs.feature_layers(config, -2)
        full = configs.read(LlavaNextConfig, config, kinds=("clip", "siglip"))
        sizes = configs.tower(full.vision_config)
        base = preprocessing(preprocessor, image_size=sizes.image_size, classes=_CLASSES)
        strategy = configs.strategy(full, sizes)
        if strategy == "full" and sizes.cls_token:  # transformers lays a tile's tokens out as rows
            expected = "'default', since a CLS token has no place in a row of patches"
            raise configs.refused("vision_feature_select_strategy", strategy, expected)
        return VisionConfig(
            family="llava-next",
            tower=sizes,
            projector=configs.projector(full, sizes, layers, bias=full.multimodal_projector_bias),
            feature_layers=layers,
            image_token_id=configs.token_id("image_token_index", full.image_token_index),
            preprocessing=base,
            feature_strategy=strategy,
            media=media,
            tiling=configs.tiling(full, pinpoints(preprocessor, classes=_CLASSES), sizes),
            newline=True,
        )
