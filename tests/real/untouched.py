"""What the untouched model says of photographs: transformers' classes and processor, in float64.

Nothing of vzip's goes in. The selection and the merging are written from the paper once more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What a tower makes of one photograph.

    Attributes:
        hidden: float64 [S, D], the layer that config.json selects.
        keys: float64 [S, d], that layer's keys, averaged over heads, of length 1.
        scores: float64 [N], of the patches.
    """

    hidden: Float
    keys: Float
    scores: Float

    @property
    def cls(self) -> int:
        """1 where the first token is CLS."""
        return len(self.hidden) - len(self.scores)

    def groups(self, kept: NDArray[np.int64], contextual: int) -> NDArray[np.int64]:
        """Return which merged token each token went into, [S]; −1 for those kept."""
        rest = np.setdiff1d(np.arange(len(self.hidden)), kept)
        targets = rest[:: len(rest) // contextual][:contextual]
        found = np.full(len(self.hidden), -1)
        found[rest] = np.argmax(self.keys[rest] @ self.keys[targets].T, axis=1)
        found[targets] = np.arange(contextual)
        return found

    def tokens(self, kept: NDArray[np.int64], groups: NDArray[np.int64]) -> Float:
        """Return the tokens of a selection and of groups, float64 [K, D]."""
        merged = [self.hidden[groups == each].mean(axis=0) for each in range(groups.max() + 1)]
        return np.concatenate([self.hidden[kept], merged])


def see(folder: Path, photographs: list[Path]) -> list[Seen]:
    """Run a checkpoint's tower."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = json.loads((folder / "config.json").read_text())
    sizes = {**config["vision_config"], "attn_implementation": "eager"}
    tower: Any
    if sizes.pop("model_type") == "clip_vision_model":
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes))
        processor = CLIPImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes))
        processor = SiglipImageProcessorPil.from_pretrained(folder, trust_remote_code=False)
    load(tower, folder, "vision_tower.vision_model.")
    layer = tower.encoder.layers[config["vision_feature_layer"]]
    caught: dict[str, torch.Tensor] = {}
    layer.register_forward_hook(
        lambda _m, _i, out: caught.update(hidden=out[0] if isinstance(out, tuple) else out)
    )
    layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, out: caught.update(keys=out))
    layer.self_attn.register_forward_hook(lambda _m, _i, out: caught.update(attention=out[1]))
    heads, found = sizes["num_attention_heads"], []
    for path in photographs:
        with Image.open(path) as opened:
            pixels = processor(images=opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            tower(pixels.double())
        (hidden,), (attention,) = caught["hidden"], caught["attention"]  # [S, D], [H, S, S]
        keys = caught["keys"][0].unflatten(-1, (heads, -1)).mean(dim=1)
        keys /= keys.norm(dim=-1, keepdim=True)
        cls = config["vision_feature_select_strategy"] == "default"
        scores = attention[:, 0, 1:].sum(dim=0) if cls else attention.mean(dim=(0, 1))
        found.append(Seen(hidden.numpy(), keys.numpy(), scores.numpy()))
    return found


def projector(folder: Path) -> nn.Module:
    """Return a checkpoint's projector, float64."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = json.loads((folder / "config.json").read_text())
    width = {"hidden_size": config["vision_config"]["hidden_size"], "num_attention_heads": 1}
    module = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**width),
            text_config=LlamaConfig(**config["text_config"]),
        )
    )
    load(module, folder, "multi_modal_projector.")
    return module


def load(module: nn.Module, folder: Path, prefix: str) -> None:
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    assert not unexpected
    module.double().eval()
