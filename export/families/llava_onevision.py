"""LLaVA-OneVision: a SigLIP tower on tiles of a picture, or on frames, whose tokens are pooled."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vzip.export.architecture import Media, VisionConfig
from vzip.export.families import Config, HuggingFaceForm, PublishedModel, View, configs, register
from vzip.export.families.known_parts import (
    QWEN2_0_5B,
    QWEN2_7B,
    SIGLIP_384,
    SIGLIP_PROCESSOR_384,
)
from vzip.export.families.processors import pinpoints, preprocessing

_PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_IMAGE = ("LlavaOnevisionImageProcessor",)
_VIDEO = ("LlavaOnevisionVideoProcessor", "LlavaOnevisionImageProcessor")


def _published(text_config: Config) -> PublishedModel:
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": _PINPOINTS,
        "image_token_index": 151646,
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "video_token_index": 151647,
        "vision_config": SIGLIP_384,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    processor = {
        **SIGLIP_PROCESSOR_384,
        "do_pad": True,
        "image_grid_pinpoints": _PINPOINTS,
        "image_processor_type": "LlavaOnevisionImageProcessor",
    }
    return PublishedModel(config, processor)


@register("llava-onevision")
class LlavaOnevision(HuggingFaceForm):
    """Hugging Face's form."""

    model_type = "llava_onevision"
    media: Mapping[Media, View] = {"image": View("tile"), "video": View("frame", pool=2)}
    published: Mapping[str, PublishedModel] = {
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _published(QWEN2_0_5B),
        "llava-hf/llava-onevision-qwen2-7b-ov-hf": _published(QWEN2_7B),
    }

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers; keys that are missing have the defaults of transformers' class."""
        assert tower is None
        from transformers import LlavaOnevisionConfig

        layers = configs.feature_layers(config, -1)
        full = configs.read(LlavaOnevisionConfig, config, kinds=("siglip",))
        sizes = configs.tower(full.vision_config)
        most = _max_tiles(full.vision_aspect_ratio)
        video = media == "video"
        return VisionConfig(
            family="llava-onevision",
            tower=sizes,
            projector=configs.projector(full, sizes, layers, bias=full.multimodal_projector_bias),
            feature_layers=layers,
            image_token_id=configs.token_id("image_token_index", full.image_token_index),
            preprocessing=preprocessing(
                preprocessor, image_size=sizes.image_size, classes=_VIDEO if video else _IMAGE
            ),
            feature_strategy=configs.strategy(full, sizes),
            media=media,
            takes=("video",) if video else ("image", "video"),
            video_token_id=configs.token_id("video_token_index", full.video_token_index),
            pool=self.media[media].pool,
            tiling=(
                None
                if video
                else configs.tiling(
                    full,
                    pinpoints(preprocessor, classes=_IMAGE),
                    sizes,
                    only_alone=True,
                    max_tiles=most,
                )
            ),
            newline=True,
        )


def _max_tiles(ratio: object) -> int:
    """Return the number of tiles in a ``vision_aspect_ratio``: 9 of ``anyres_max_9``."""
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio) if isinstance(ratio, str) else None
    if found is None:
        raise configs.refused("vision_aspect_ratio", ratio, "'anyres_max_9', or another number")
    return int(found[1])
