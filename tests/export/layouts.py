"""Writes one tiny LLaVA in every layout that is out there.

The tensors are those of transformers' own LLaVA with seeded values; only names, files and
configuration differ between layouts. The LLM's tensors are in shards of their own, which are left
out, corrupted or written.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Llm = Literal["absent", "corrupt", "written"]
State = dict[str, Tensor]

IMAGE_TOKEN = 98
TOWER_FOLDER = "openai/clip-tiny"  # as mm_vision_tower names it, inside the checkpoint's folder

VISION: dict[str, Any] = {
    # hidden_act, layer_norm_eps and others are left to transformers' defaults, as published ones do
    "hidden_size": 32,
    "image_size": 32,
    "intermediate_size": 64,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 99,
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": IMAGE_TOKEN,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": TEXT,
    "vision_config": VISION,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
PROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 32},
}
OLD_PROCESSOR: dict[str, Any] = {  # as openai/clip-vit-large-patch14-336 has it
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 32,
}
ORIGINAL_CONFIG: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "image_aspect_ratio": "pad",
    "intermediate_size": 64,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": TOWER_FOLDER,
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 98,
}
CLIP_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 16,
    "text_config": {"model_type": "clip_text_model", "hidden_size": 16, "num_attention_heads": 2},
    "vision_config": VISION,
}


@dataclass(frozen=True)
class Layout:
    """How one layout names and stores things.

    Attributes:
        tower: Prefix of the tower's tensors; None where they are in a checkpoint of their own.
        projector: Prefix of the projector's.
        llm: Prefix of the LLM's.
        head: Name of the LLM's head.
        container: "safetensors" or "bin".
        sharded: Several files and an index.
        original: Original LLaVA's configuration and module numbers.
        projector_file: Whether the projector is in ``mm_projector.bin``, with no model file beside.
        processor: Where the image processor's settings are.
        tower_prefix: Prefix in the tower's own checkpoint.
    """

    tower: str | None
    projector: str
    llm: str
    head: str
    container: Literal["safetensors", "bin"] = "safetensors"
    sharded: bool = True
    original: bool = False
    projector_file: bool = False
    processor: Literal["preprocessor_config.json", "processor_config.json"] = (
        "preprocessor_config.json"
    )
    tower_prefix: str = "vision_model."


_HF = ("language_model.model.", "language_model.lm_head.weight")
_HF_MODEL = ("model.language_model.", "lm_head.weight")
_ORIGINAL = ("model.", "lm_head.weight")

_TABLE: Mapping[str, Layout] = {
    "llava-hf": Layout("vision_tower.vision_model.", "multi_modal_projector.", *_HF),
    "llava-hf-single": Layout(
        "vision_tower.vision_model.", "multi_modal_projector.", *_HF, sharded=False
    ),
    "llava-hf-bin": Layout(
        "vision_tower.vision_model.", "multi_modal_projector.", *_HF, container="bin"
    ),
    "llava-hf-bin-single": Layout(
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        *_HF,
        container="bin",
        sharded=False,
    ),
    "transformers-4.52": Layout(
        "model.vision_tower.vision_model.", "model.multi_modal_projector.", *_HF_MODEL
    ),
    "transformers-4.52-mixed": Layout(
        "model.vision_tower.vision_model.", "multi_modal_projector.", *_HF_MODEL
    ),
    "transformers-5": Layout(
        "vision_tower.", "multi_modal_projector.", *_HF, processor="processor_config.json"
    ),
    "transformers-5-model": Layout(
        "model.vision_tower.",
        "model.multi_modal_projector.",
        *_HF_MODEL,
        processor="processor_config.json",
    ),
    "original": Layout(None, "model.mm_projector.", *_ORIGINAL, container="bin", original=True),
    "original-safetensors": Layout(
        None, "model.mm_projector.", *_ORIGINAL, original=True, tower_prefix=""
    ),
    "original-copy": Layout(
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
        *_ORIGINAL,
        original=True,
    ),
    "original-projector-file": Layout(
        None, "model.mm_projector.", *_ORIGINAL, original=True, projector_file=True
    ),
}

LAYOUTS: tuple[str, ...] = tuple(_TABLE)
"""Names for `write_layout`."""


def write_layout(
    name: str,
    folder: Path,
    seed: int = 0,
    *,
    llm: Llm = "absent",
    keep: Callable[[str], bool] = lambda _: True,
    change: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Write the tiny model into a folder.

    Args:
        name: One of `LAYOUTS`.
        folder: Created where it isn't there.
        seed: Of all values; the same in every layout.
        llm: Whether the LLM's shards are left out, hold rubbish, or are written. Layouts with one
            file always hold the LLM.
        keep: Which tensors of the vision side are written, by canonical name.
        change: Keys to set in ``config.json``; None as value removes one.

    Returns:
        Canonical names → tensors of the vision side that were written.
    """
    layout = _TABLE[name]
    folder.mkdir(parents=True, exist_ok=True)
    vision, language = _split(model_state(seed))
    vision = {key: tensor for key, tensor in vision.items() if keep(key)}
    tower = {k.removeprefix("tower."): t for k, t in vision.items() if k.startswith("tower.")}
    projector = _prefixed(
        layout.projector,
        {
            _numbered(k.removeprefix("projector."), number=layout.original): t
            for k, t in vision.items()
            if k.startswith("projector.")
        },
    )
    config = dict(ORIGINAL_CONFIG if layout.original else CONFIG) | dict(change or {})
    _write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    if layout.original:
        _write_tower(folder / TOWER_FOLDER, tower, layout)
    elif layout.processor == "processor_config.json":
        nested = {"image_processor": PROCESSOR, "processor_class": "LlavaProcessor"}
        _write_json(folder / layout.processor, nested)
    else:
        _write_json(folder / layout.processor, PROCESSOR)
    if layout.projector_file:
        torch.save(projector, folder / "mm_projector.bin")
        return vision
    inside = {} if layout.tower is None else _prefixed(layout.tower, tower)
    head = {layout.head: language.pop("lm_head.weight")}
    llm_parts = [_prefixed(layout.llm, language), head]
    if layout.sharded:
        _write_shards(folder, layout, [llm_parts[0], inside, projector, llm_parts[1]], llm)
    else:
        _write_file(folder / _single(layout), inside | projector | llm_parts[0] | head)
    return vision


@functools.lru_cache(maxsize=4)
def model_state(seed: int) -> Mapping[str, Tensor]:
    """Return transformers' own state of the tiny model, with seeded values, at its own names."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(CONFIG))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 100
        is_gamma = tensor.dim() == 1 and name.endswith("weight")
        state[name] = values * fan_in**-0.5 + is_gamma
    return state


def _split(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Canonical vision side, and the LLM as in Llama."""
    vision, language = {}, {}
    for name, tensor in state.items():
        key = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "tower.", name)
        key = re.sub(r"^model\.multi_modal_projector\.", "projector.", key)
        if key.startswith(("tower.", "projector.")):
            vision[key] = tensor
        else:
            language[name.removeprefix("model.language_model.")] = tensor
    return vision, language


def _write_tower(folder: Path, tower: State, layout: Layout) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", CLIP_CONFIG if layout.tower_prefix else VISION)
    _write_json(folder / "preprocessor_config.json", OLD_PROCESSOR)
    if layout.tower is None:
        other = (
            {"text_model.final_layer_norm.weight": torch.ones(16)} if layout.tower_prefix else {}
        )
        _write_file(folder / _single(layout), _prefixed(layout.tower_prefix, tower) | other)


def _write_shards(folder: Path, layout: Layout, shards: list[State], llm: Llm) -> None:
    """Shards 1 and 4 hold the LLM, 2 the tower (none if it is elsewhere), 3 the projector."""
    stem, _, ending = _single(layout).rpartition(".")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        if not shard:
            continue
        file = f"{stem}-{number:05}-of-{len(shards):05}.{ending}"
        weight_map |= dict.fromkeys(shard, file)
        if number in (2, 3) or llm == "written":
            _write_file(folder / file, shard)
        elif llm == "corrupt":
            (folder / file).write_bytes(b"not a tensor file")
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    _write_json(folder / f"{_single(layout)}.index.json", index)


def _single(layout: Layout) -> str:
    return "model.safetensors" if layout.container == "safetensors" else "pytorch_model.bin"


def _write_file(path: Path, state: State) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _numbered(name: str, *, number: bool) -> str:
    """linear_1 → 0, linear_2 → 2, as in original LLaVA's nn.Sequential."""
    return name.replace("linear_1", "0").replace("linear_2", "2") if number else name
