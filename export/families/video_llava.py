"""Video-LLaVA: one tower for images, another for the frames of a video, one projector for both."""

from __future__ import annotations

from collections.abc import Mapping

from vzip.export.architecture import Media, VisionConfig
from vzip.export.families import Config, HuggingFaceForm, PublishedModel, View, configs, register
from vzip.export.families.known_parts import CLIP_336, CLIP_PROCESSOR_336, LLAMA_7B
from vzip.export.families.processors import preprocessing

_CLASSES = ("VideoLlavaImageProcessor", "VideoLlavaVideoProcessor", "CLIPImageProcessor")

_PUBLISHED = PublishedModel(
    {
        "architectures": ["VideoLlavaForConditionalGeneration"],
        "image_token_index": 32000,
        "model_type": "video_llava",
        "projector_hidden_act": "gelu",
        "text_config": LLAMA_7B,
        "video_token_index": 32001,
        "vision_config": {**CLIP_336, "image_size": 224},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    {
        **CLIP_PROCESSOR_336,
        "crop_size": {"height": 224, "width": 224},
        "image_processor_type": "VideoLlavaImageProcessor",
        "size": {"shortest_edge": 224},
    },
    "17, split not given",
)


@register("video-llava")
class VideoLlava(HuggingFaceForm):
    """Hugging Face's form; the LLM gets a graph for each of the two towers."""

    model_type = "video_llava"
    media: Mapping[Media, View] = {"video": View("frame"), "image": View("image")}
    published: Mapping[str, PublishedModel] = {"LanguageBind/Video-LLaVA-7B-hf": _PUBLISHED}

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers; keys that are missing have the defaults of transformers' class."""
        assert tower is None
        from transformers import VideoLlavaConfig

        layers = configs.feature_layers(config, -2)
        full = configs.read(VideoLlavaConfig, config, kinds=("clip",))
        sizes = configs.tower(full.vision_config)
        return VisionConfig(
            family="video-llava",
            tower=sizes,
            projector=configs.projector(full, sizes, layers, bias=full.multimodal_projector_bias),
            feature_layers=layers,
            image_token_id=configs.token_id("image_token_index", full.image_token_index),
            preprocessing=preprocessing(
                preprocessor, image_size=sizes.image_size, classes=_CLASSES
            ),
            # Upstream hands on a frame's CLS token whatever the configuration says of images.
            feature_strategy="full" if media == "video" else configs.strategy(full, sizes),
            media=media,
            takes=(media,),
            tower_module=f"{media}_tower",
            video_token_id=configs.token_id("video_token_index", full.video_token_index),
        )
