"""The untouched Hugging Face model: its tower's features, its projector, its image processor.

Nothing of ours but the weights goes in: transformers' own modules in FP32 with eager attention, the
one that returns attention, read through forward hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.architecture import needed_tensors
from vzip.export.weights import VisionWeights
from vzip.runtime.console import progress
from vzip.runtime.preprocess import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPVisionModel


@dataclass(frozen=True)
class Features:
    """What the untouched tower says of one image.

    Attributes:
        hidden: float64 [1, S, D], features of the selected layer.
        keys: float64 [1, H, S, d], k_proj's output of that layer.
        scores: float64 [1, N], attention of CLS to the patches, summed over heads in FP32.
    """

    hidden: NDArray[np.float64]
    keys: NDArray[np.float64]
    scores: NDArray[np.float64]


def tower_features(weights: VisionWeights, images: Sequence[NDArray[np.uint8]]) -> list[Features]:
    """Run the untouched tower, image by image; it is freed on return.

    Args:
        weights: Of the model.
        images: uint8 [H, W, 3] RGB, of any size; transformers' own processor prepares them.

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
    processor = _processor(config.preprocessing)
    features = []
    for image in progress(images, desc="reference", unit="image"):
        pixels = processor(images=[image], return_tensors="np")["pixel_values"]
        with torch.no_grad():
            output = tower(torch.from_numpy(pixels), output_hidden_states=True)
        hidden = output.hidden_states[config.feature_layer]  # [1, S, D]
        heads = config.tower.num_heads
        keys = caught["keys"].reshape(1, hidden.shape[1], heads, -1).transpose(1, 2)  # [1, H, S, d]
        scores = caught["attention"][:, :, 0, 1:].sum(dim=1)  # [1, N]
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


def _tower(weights: VisionWeights) -> CLIPVisionModel:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = weights.config.tower
    config = CLIPVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.num_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        hidden_act=tower.activation,
        layer_norm_eps=tower.layer_norm_eps,
        attn_implementation="eager",  # the one that returns attention
    )
    model = CLIPVisionModel(config).float().eval()
    _load(model, weights, "tower.")
    return model


def projector(weights: VisionWeights) -> torch.nn.Module:
    """Return the untouched projector, float32 [K, D] → [K, L]."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    sizes = weights.config.projector
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=sizes.in_features, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=sizes.out_features, num_attention_heads=1),
        projector_hidden_act=sizes.activation,
        multimodal_projector_bias=sizes.bias,
    )
    module: torch.nn.Module = LlavaMultiModalProjector(config).float().eval()
    _load(module, weights, "projector.")
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


def _processor(prep: Preprocessing) -> Any:
    """Return transformers' own processor of the same settings, Pillow backend."""
    from transformers import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = {
        "size": {"shortest_edge": prep.shortest_edge},
        "crop_size": {"height": prep.image_size, "width": prep.image_size},
        "image_mean": list(prep.mean),
        "image_std": list(prep.std),
        "rescale_factor": prep.rescale_factor,
    }
    if prep.mode == "pad_square":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    return CLIPImageProcessorPil(**settings)
