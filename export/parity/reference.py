"""The untouched Hugging Face model: its tower's features, projector, pooling, image processor.

Nothing of ours but the weights goes in: transformers' own modules in FP32 with eager attention, the
one that returns attention, read through forward hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.architecture import VisionConfig, needed_tensors
from vzip.export.checkpoint.weights import VisionWeights
from vzip.runtime.console import progress
from vzip.runtime.pictures.resize import pillows

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, SiglipVisionModel

    Tower: TypeAlias = CLIPVisionModel | SiglipVisionModel


@dataclass(frozen=True)
class Features:
    """What the untouched tower says of one image.

    Where the LLM gets pooled tokens, S counts those; `hidden` then holds what upstream pools, the
    projected features, so F is L.

    Attributes:
        hidden: float64 [1, S, F], features of the selected layers, side by side.
        keys: float64 [1, H, S, d], k_proj's output of the deepest of them.
        scores: float64 [1, N], of the patches, in FP32: the attention of CLS, summed over heads;
            without CLS the attention that each receives, averaged over heads and queries.
    """

    hidden: NDArray[np.float64]
    keys: NDArray[np.float64]
    scores: NDArray[np.float64]


def tower_features(weights: VisionWeights, images: Sequence[NDArray[np.uint8]]) -> list[Features]:
    """Run the untouched tower, image by image; it is freed on return.

    Args:
        weights: Of the model.
        images: uint8 [H, W, 3] RGB, of any size; transformers' own processor prepares them. Of an
            image that it cuts into tiles, the base tile is taken.

    Returns:
        One entry an image.
    """
    config = weights.config
    tower = _tower(weights)
    attention = tower.encoder.layers[config.layers_run - 1].self_attn
    caught: dict[str, torch.Tensor] = {}
    hooks = [
        attention.k_proj.register_forward_hook(
            lambda _module, _inputs, output: caught.update(keys=output)
        ),
        attention.register_forward_hook(
            lambda _module, _inputs, output: caught.update(attention=output[1])
        ),
    ]
    processor = _processor(config)
    finish = _Pooled(weights) if config.pool == 2 else None
    features = []
    for image in progress(images, desc="reference", unit="image"):
        pixels = processor(images=[image], return_tensors="np")["pixel_values"]
        if config.tiling is not None:
            pixels = pixels[:, 0]  # [1, tiles, 3, H, W], the base tile first
        with torch.no_grad():
            output = tower(torch.from_numpy(pixels), output_hidden_states=True)
        chosen = [output.hidden_states[layer] for layer in config.feature_layers]
        hidden = torch.cat(chosen, dim=-1)  # [1, S, F]
        heads = config.tower.num_heads
        keys = caught["keys"].reshape(1, hidden.shape[1], heads, -1).transpose(1, 2)  # [1, H, S, d]
        if config.tower.cls_token:
            scores = caught["attention"][:, :, 0, 1:].sum(dim=1)  # [1, N]
        else:
            scores = caught["attention"].mean(dim=(1, 2))
        if finish is not None:
            hidden, keys, scores = finish(hidden, keys, scores)
        features.append(
            Features(
                hidden.double().numpy(),
                keys.double().numpy(),
                scores.double().numpy(),
            )
        )
    for hook in hooks:
        hook.remove()
    return features


class _Pooled:
    """LLaVA-OneVision's projector and pooling of a video frame, its own code."""

    def __init__(self, weights: VisionWeights) -> None:
        self._projector = projector(weights)
        tower = weights.config.tower
        sizes = SimpleNamespace(image_size=tower.image_size, patch_size=tower.patch_size)
        self._model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=sizes))

    def __call__(
        self, hidden: torch.Tensor, keys: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pool projected features [1, S, L], keys [1, H, S, d] and scores [1, S] alike."""
        with torch.no_grad():
            return (
                self._pool(self._projector(hidden)),
                self._pool(keys[0])[None],
                self._pool(scores[..., None])[..., 0],
            )

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        from transformers import LlavaOnevisionModel

        pooled: torch.Tensor = LlavaOnevisionModel.apply_pooling(self._model, x)
        return pooled


def _tower(weights: VisionWeights) -> Tower:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    tower = weights.config.tower
    sizes: dict[str, Any] = {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.layer_norm_eps,
        "attn_implementation": "eager",  # the one that returns attention
    }
    model: Tower
    if tower.kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**sizes))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
    _load(model.float().eval(), weights, "tower.")
    return model


def projector(weights: VisionWeights) -> torch.nn.Module:
    """Return the untouched projector, float32 [K, F] → [K, L]."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, VipLlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

    sizes = weights.config.projector
    parts: dict[str, Any] = {
        # One layer of the width of all: only the product of the two counts.
        "vision_config": CLIPVisionConfig(hidden_size=sizes.in_features, num_attention_heads=1),
        "text_config": LlamaConfig(hidden_size=sizes.out_features, num_attention_heads=1),
        "projector_hidden_act": sizes.activation,
        "vision_feature_layer": -1,
    }
    module: torch.nn.Module
    if sizes.norm_eps is None:
        # The other families' projectors are this one under other names.
        module = LlavaMultiModalProjector(
            LlavaConfig(**parts, multimodal_projector_bias=sizes.bias)
        )
    else:
        module = VipLlavaMultiModalProjector(
            VipLlavaConfig(**parts, projector_layernorm_eps=sizes.norm_eps)
        )
    _load(module.float().eval(), weights, "projector.")
    return module


def _load(module: torch.nn.Module, weights: VisionWeights, prefix: str) -> None:
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
    result = module.load_state_dict(state, strict=False)
    # A checkpoint may lack what no feature depends on; the rest was checked when it was read.
    needed = needed_tensors(weights.config)
    assert not [name for name in result.missing_keys if prefix + name in needed]
    assert not result.unexpected_keys


def _processor(config: VisionConfig) -> Any:
    """Return transformers' own processor of the same settings, Pillow backend."""
    from transformers import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    prep = config.preprocessing
    square = {"height": prep.image_size, "width": prep.image_size}
    settings: dict[str, Any] = {
        "image_mean": list(prep.mean),
        "image_std": list(prep.std),
        "rescale_factor": prep.rescale_factor,
        "resample": pillows(prep.resample),
    }
    if config.tiling is not None:
        # LLaVA-OneVision's is this one with other settings.
        pinpoints = [list(pair) for pair in config.tiling.pinpoints]
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": prep.image_size},
            crop_size=square,
            image_grid_pinpoints=pinpoints,
            **settings,
        )
    if prep.mode == "stretch":
        return SiglipImageProcessorPil(size=square, **settings)
    settings |= {"size": {"shortest_edge": prep.shortest_edge}, "crop_size": square}
    if prep.mode == "pad_square":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    return CLIPImageProcessorPil(**settings)
