"""The untouched Hugging Face model: its tower's features, projector, pooling, image processor.

Nothing of ours but the weights goes in: transformers' own modules with eager attention, the one
that returns attention, read through forward hooks. They run one after the other, each on all images
and in every precision that is asked for, so that no second copy of the tower is in memory in FP64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.architecture import VisionConfig, needed_tensors
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.parity.half_sums import exact_sums
from vzip.runtime.console import progress
from vzip.runtime.pictures.resize import pillows

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, SiglipVisionModel

    Tower: TypeAlias = CLIPVisionModel | SiglipVisionModel


PRECISIONS: Final[Mapping[str, torch.dtype]] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Features:
    """What the untouched tower says of one image.

    Where the LLM gets pooled tokens, S counts those; `hidden` then holds what upstream pools, the
    projected features, so F is L.

    Attributes:
        hidden: float64 [1, S, F], features of the selected layers, side by side.
        keys: float64 [1, H, S, d], k_proj's output of the deepest of them.
        scores: float64 [1, N], of the patches: the attention of CLS, summed over heads; without CLS
            the attention that each receives, averaged over heads and queries.
        narrow: Precision → what `hidden` is where the tower computes in that; same shape, in the
            precision's own dtype.
        unprojected: float64 [1, S, tower's F], the selected layers' features themselves, pooled;
            None where `hidden` is that.
    """

    hidden: NDArray[np.float64]
    keys: NDArray[np.float64]
    scores: NDArray[np.float64]
    narrow: Mapping[str, torch.Tensor] = field(default_factory=dict)
    unprojected: NDArray[np.float64] | None = None

    @property
    def before_projector(self) -> NDArray[np.float64]:
        """float64 [1, S, F] of the tower itself."""
        return self.hidden if self.unprojected is None else self.unprojected


def tower_features(
    weights: VisionWeights,
    images: Sequence[NDArray[np.uint8]],
    *,
    precision: str = "fp64",
    narrow: Sequence[str] = (),
) -> list[Features]:
    """Run the untouched tower on some images; it is freed on return.

    Args:
        weights: Of the model.
        images: uint8 [H, W, 3] RGB, of any size; transformers' own processor prepares them. Of an
            image that it cuts into tiles, the base tile is taken.
        precision: What it computes in, a name of `PRECISIONS`.
        narrow: Others, in which it runs as well, for `Features.narrow`.

    Returns:
        One entry an image.
    """
    config = weights.config
    processor = _processor(config)
    pixels = []
    for image in images:
        made = processor(images=[image], return_tensors="np")["pixel_values"]
        # The base tile is the first of [1, tiles, 3, H, W].
        pixels.append(torch.from_numpy(made if config.tiling is None else made[:, 0]))
    tower = _tower(weights)
    finish = _Pooled(weights) if config.pool == 2 else None
    runs = {
        name: [_Run(each.to(PRECISIONS[name])) for each in pixels] for name in (precision, *narrow)
    }
    stages = [_Embeddings(tower), *tower.encoder.layers[: config.layers_run]]
    for number, stage in enumerate(progress(stages, desc="reference", unit="layer")):
        for name, each in runs.items():
            _advance(stage, each, PRECISIONS[name], number == config.layers_run)
        for run in (run for each in runs.values() for run in each):
            if number in config.states:
                run.states[number] = run.hidden
    del tower, stages
    heads, features = config.tower.num_heads, []
    for place, run in enumerate(runs[precision]):
        assert run.keys is not None
        assert run.attention is not None
        hidden = run.features(config.states)
        keys = run.keys.reshape(1, hidden.shape[1], heads, -1).transpose(1, 2)  # [1, H, S, d]
        if config.tower.cls_token:
            scores = run.attention[:, :, 0, 1:].sum(dim=1)  # [1, N]
        else:
            scores = run.attention.mean(dim=(1, 2))
        others = {name: runs[name][place].features(config.states) for name in narrow}
        unprojected = None
        if finish is not None:
            unprojected = finish.pool(hidden).double().numpy()
            hidden, keys, scores = (
                finish(hidden),
                finish.pool(keys[0])[None],
                finish.pool(scores[..., None])[..., 0],
            )
            others = {name: finish(each) for name, each in others.items()}
        features.append(
            Features(
                hidden.double().numpy(),
                keys.double().numpy(),
                scores.double().numpy(),
                others,
                unprojected,
            )
        )
    return features


@dataclass
class _Run:
    """One image on its way through the tower: pixels [1, 3, H, W] at first, then [1, S, D]."""

    hidden: torch.Tensor
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    def features(self, layers: Sequence[int]) -> torch.Tensor:
        """Return [1, S, F]."""
        return torch.cat([self.states[layer] for layer in layers], dim=-1)


class _Embeddings(torch.nn.Module):
    """What the tower does before its first layer."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.embeddings = tower.embeddings
        self.norm = getattr(tower, "pre_layrnorm", torch.nn.Identity())  # CLIP's

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.norm(self.embeddings(pixels))
        return hidden


def _advance(stage: torch.nn.Module, runs: Sequence[_Run], dtype: torch.dtype, last: bool) -> None:
    """Bring images one stage further in some precision; keep keys and attention of the last."""
    module = as_dtype(stage, dtype)
    for run in runs:
        with torch.no_grad(), exact_sums():
            if isinstance(module, _Embeddings):
                run.hidden = module(run.hidden)
                continue
            caught: dict[str, torch.Tensor] = {}
            attention: Any = module.self_attn
            hooks = [
                attention.k_proj.register_forward_hook(
                    lambda _m, _i, output, caught=caught: caught.update(keys=output)
                ),
                attention.register_forward_hook(
                    lambda _m, _i, output, caught=caught: caught.update(attention=output[1])
                ),
            ]
            run.hidden = module(run.hidden, attention_mask=None)
            for hook in hooks:
                hook.remove()
            if last:
                run.keys, run.attention = caught["keys"], caught["attention"]


def as_dtype(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return a module in some precision: a copy, unless it is of that already."""
    if all(each.dtype == dtype for each in module.parameters()):
        return module
    return copy.deepcopy(module).to(dtype)


class _Pooled:
    """LLaVA-OneVision's projector and pooling of a video frame, its own code."""

    def __init__(self, weights: VisionWeights) -> None:
        self._projector = projector(weights)
        tower = weights.config.tower
        sizes = SimpleNamespace(image_size=tower.image_size, patch_size=tower.patch_size)
        self._model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=sizes))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return projected and pooled features of the tower's [1, S, F], in their precision."""
        with torch.no_grad(), exact_sums():
            return self.pool(as_dtype(self._projector, hidden.dtype)(hidden))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pool [1, S, n]."""
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
