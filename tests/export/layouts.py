"""Writes a tiny model of each family in every layout that is out there.

The tensors are those of transformers' own classes with seeded values; only names, files and
configuration differ between layouts. The LLM's tensors are in shards of their own, which are left
out, corrupted or written.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Llm = Literal["absent", "corrupt", "written"]
State = dict[str, Tensor]

VIDEO_TOKEN = 97
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


# The other families. SigLIP's patches leave a rest of the image uncovered, as 14 does of 384.
SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "image_size": 34,
    "intermediate_size": 72,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "patch_size": 4,
}
QWEN: dict[str, Any] = TEXT | {"model_type": "qwen2"}
SIGLIP_PROCESSOR: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 34, "width": 34},
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ONEVISION_SIDE = 38  # 9 × 9 patches, an odd number as the published 27 × 27: pooling rounds up
ONEVISION_PINPOINTS = [[38, 38], [38, 76], [38, 114], [76, 38], [76, 76], [114, 38]]


@dataclass(frozen=True)
class TinyModel:
    """A tiny model of a family.

    Attributes:
        model: Name of transformers' class.
        config: Its ``config.json``.
        processor: Its ``preprocessor_config.json``.
        video_processor: Class of its video processor, where it has one.
        towers: Modules of its towers; the first is that of the family's own choice of media.
        newline: Whether it has an ``image_newline``.
    """

    model: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    video_processor: str | None = None
    towers: tuple[str, ...] = ("vision_tower",)
    newline: bool = False


TINY: Mapping[str, TinyModel] = {
    "llava": TinyModel("LlavaForConditionalGeneration", CONFIG, PROCESSOR),
    # As LLaVA-interleave, whose checkpoints have no vision head; that of this one is to be ignored.
    "llava-siglip": TinyModel(
        "LlavaForConditionalGeneration",
        CONFIG
        | {
            "text_config": QWEN,
            "vision_config": SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        SIGLIP_PROCESSOR,
    ),
    "llava-multilayer": TinyModel(
        "LlavaForConditionalGeneration", CONFIG | {"vision_feature_layer": [1, -2]}, PROCESSOR
    ),
    "vip-llava": TinyModel(
        "VipLlavaForConditionalGeneration",
        {key: value for key, value in CONFIG.items() if key != "vision_feature_select_strategy"}
        | {
            "architectures": ["VipLlavaForConditionalGeneration"],
            "model_type": "vipllava",
            "projector_layernorm_eps": 1e-3,  # not the default: leaving it out shows
            "vision_feature_layer": [-2, -4, 2],  # the deepest is not the last
        },
        PROCESSOR,
    ),
    "llava-next": TinyModel(
        "LlavaNextForConditionalGeneration",
        CONFIG
        | {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": PINPOINTS,
            "model_type": "llava_next",
        },
        PROCESSOR
        | {
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
            "image_processor_type": "LlavaNextImageProcessor",
        },
        newline=True,
    ),
    "video-llava": TinyModel(
        "VideoLlavaForConditionalGeneration",
        CONFIG
        | {
            "architectures": ["VideoLlavaForConditionalGeneration"],
            "model_type": "video_llava",
            "video_token_index": VIDEO_TOKEN,
        },
        PROCESSOR | {"image_processor_type": "VideoLlavaImageProcessor"},
        video_processor="VideoLlavaVideoProcessor",
        towers=("video_tower", "image_tower"),
    ),
    "llava-onevision": TinyModel(
        "LlavaOnevisionForConditionalGeneration",
        CONFIG
        | {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
            "model_type": "llava_onevision",
            "text_config": QWEN,
            "video_token_index": VIDEO_TOKEN,
            "vision_config": SIGLIP | {"image_size": ONEVISION_SIDE, "vision_use_head": False},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        SIGLIP_PROCESSOR
        | {
            "do_pad": True,
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": ONEVISION_SIDE, "width": ONEVISION_SIDE},
        },
        video_processor="LlavaOnevisionVideoProcessor",
        newline=True,
    ),
}

FAMILIES: tuple[str, ...] = tuple(TINY)
"""Names for `write_layout` and `upstream_model`; not all are names of `vzip.export.families`."""


@dataclass(frozen=True)
class Layout:
    """How one layout names and stores things.

    Attributes:
        tower: Prefix of the tower's tensors, with "vision_tower" for the tower's module; None where
            they are in a checkpoint of their own.
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
"""Names for `write_layout`, all of them of the family "llava"."""


def layouts_of(family: str) -> tuple[str, ...]:
    """Return the layouts that a family is out there in."""
    return tuple(n for n, layout in _TABLE.items() if family == "llava" or not layout.original)


def write_layout(
    name: str,
    folder: Path,
    seed: int = 0,
    *,
    family: str = "llava",
    llm: Llm = "absent",
    keep: Callable[[str], bool] = lambda _: True,
    change: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Write a tiny model into a folder.

    Args:
        name: One of `layouts_of(family)`.
        folder: Created where it isn't there.
        seed: Of all values; the same in every layout.
        family: One of `FAMILIES`.
        llm: Whether the LLM's shards are left out, hold rubbish, or are written. Layouts with one
            file always hold the LLM.
        keep: Which tensors of the vision side are written, by canonical name.
        change: Keys to set in ``config.json``; None as value removes one.

    Returns:
        Canonical names → tensors of the vision side that were written. Where there are two towers,
        ``tower.`` is the first of `TinyModel.towers`, and the other's names start with its module.
    """
    layout, tiny = _TABLE[name], TINY[family]
    assert name in layouts_of(family), (name, family)
    folder.mkdir(parents=True, exist_ok=True)
    vision, language = _split(model_state(seed, family), tiny)
    vision = {key: tensor for key, tensor in vision.items() if keep(key)}
    towers = {
        module: {k.removeprefix(start): t for k, t in vision.items() if k.startswith(start)}
        for module, start in _canonical(tiny).items()
    }
    projector = _prefixed(
        layout.projector,
        {
            _numbered(k.removeprefix("projector."), number=layout.original): t
            for k, t in vision.items()
            if k.startswith("projector.")
        },
    )
    if "image_newline" in vision:
        prefix = "model." if layout.projector.startswith("model.") else ""
        projector[f"{prefix}image_newline"] = vision["image_newline"]
    trained = {"unfreeze_mm_vision_tower": True} if layout.original and layout.tower else {}
    config = dict(ORIGINAL_CONFIG | trained if layout.original else tiny.config)
    config |= dict(change or {})
    _write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    if layout.original:
        _write_tower(folder / TOWER_FOLDER, towers["vision_tower"], layout)
    else:
        _write_processor(folder / layout.processor, tiny)
    if layout.projector_file:
        torch.save(projector, folder / "mm_projector.bin")
        return _without_head(vision)
    inside: State = {}
    for module, tower in towers.items() if layout.tower is not None else ():
        assert layout.tower is not None
        inside |= _prefixed(layout.tower.replace("vision_tower", module), tower)
    head = {layout.head: language.pop("lm_head.weight")}
    llm_parts = [_prefixed(layout.llm, language), head]
    if layout.sharded:
        _write_shards(folder, layout, [llm_parts[0], inside, projector, llm_parts[1]], llm)
    else:
        _write_file(folder / _single(layout), inside | projector | llm_parts[0] | head)
    return _without_head(vision)


@functools.lru_cache(maxsize=16)
def model_state(seed: int, family: str = "llava") -> Mapping[str, Tensor]:
    """Return transformers' own state of a tiny model, with seeded values, at its own names."""
    with torch.device("meta"):
        model = _build(TINY[family])
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 100
        is_gamma = tensor.dim() == 1 and name.endswith("weight")
        state[name] = values * fan_in**-0.5 + is_gamma
    return state


def upstream_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return transformers' own model with the weights that `write_layout` writes.

    Args:
        family: One of `FAMILIES`.
        seed: As for `write_layout`.

    Returns:
        The untouched model, LLM included: FP32, eager attention, evaluation mode.
    """
    model = _build(TINY[family])
    model.load_state_dict(dict(model_state(seed, family)), strict=True)
    model.set_attn_implementation("eager")
    return model.float().eval()


def _build(tiny: TinyModel) -> PreTrainedModel:
    import transformers

    model_class = getattr(transformers, tiny.model)
    config = model_class.config_class.from_dict(copy.deepcopy(dict(tiny.config)))
    model: PreTrainedModel = model_class(config)
    return model


def _canonical(tiny: TinyModel) -> dict[str, str]:
    """Module of a tower → the start of its canonical names."""
    first, *others = tiny.towers
    return {first: "tower.", **{module: f"{module}." for module in others}}


def _split(state: Mapping[str, Tensor], tiny: TinyModel) -> tuple[State, State]:
    """Canonical vision side, and the LLM as in Llama."""
    starts = {rf"model\.{module}\.(vision_model\.)?": s for module, s in _canonical(tiny).items()}
    starts[r"model\.multi_modal_projector\."] = "projector."
    starts[r"model\.image_newline$"] = "image_newline"
    vision, language = {}, {}
    for name, tensor in state.items():
        for pattern, start in starts.items():
            if found := re.match(pattern, name):
                vision[start + name[found.end() :]] = tensor
                break
        else:
            language[name.removeprefix("model.language_model.")] = tensor
    return vision, language


def _without_head(vision: State) -> State:
    """A SigLIP tower's pooling head is written and no part of the vision side."""
    return {key: tensor for key, tensor in vision.items() if not key.startswith("tower.head.")}


def _write_processor(path: Path, tiny: TinyModel) -> None:
    if path.name == "preprocessor_config.json":
        _write_json(path, tiny.processor)
        return
    parts: dict[str, Any] = {"image_processor": tiny.processor}
    if tiny.video_processor is not None:
        other = ("image_processor_type", "image_grid_pinpoints")
        settings = {key: value for key, value in tiny.processor.items() if key not in other}
        parts["video_processor"] = settings | {"video_processor_type": tiny.video_processor}
    _write_json(path, parts | {"processor_class": "LlavaProcessor"})


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
