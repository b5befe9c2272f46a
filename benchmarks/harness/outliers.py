"""What outliers and attention sinks a CLIP tower has on some pictures: `measured`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.export.checkpoint.weights import VisionWeights
from vzip.runtime.pictures.preprocess import pixel_values, tower_image

SINK = 3.0
"""Times the median norm of a picture's patches, from where a patch is a sink."""


def measured(weights: VisionWeights, images: Sequence[Image.Image]) -> dict[str, float]:
    """Measure a tower with CLS in FP32.

    Args:
        weights: Of the tower.
        images: Upright and RGB, as `load_image` gives them.

    Returns:
        Medians over the pictures, each of what is worst of a picture: ``stream``, largest magnitude
        over root mean square of the residual stream after a layer; ``fc2``, the same at fc2's
        input. Of the layer that tokens are chosen in: ``entropy`` of CLS's attention to patches,
        summed over heads, over log N; ``top5``, share of the 5 most attended; ``sinks``, patches
        whose norm is over `SINK` times the median; ``share`` of CLS's attention that they take;
        ``norm``, the largest over the median.
    """
    tower = _tower(weights)
    found = [_picture(tower, weights, image) for image in images]
    return {name: float(np.median([each[name] for each in found])) for name in found[0]}


def _picture(tower: Any, weights: VisionWeights, image: Image.Image) -> dict[str, float]:
    config = weights.config
    prep, layers = config.preprocessing, config.layers_run
    inputs: dict[int, Tensor] = {}

    def keep(number: int, _module: object, given: tuple[Tensor], _result: object) -> None:
        inputs[number] = given[0]

    hooks = [
        layer.mlp.fc2.register_forward_hook(partial(keep, number))
        for number, layer in enumerate(tower.encoder.layers)
    ]
    pixels = torch.from_numpy(pixel_values(tower_image(image, prep)[None], prep))
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    attention = out.attentions[layers - 1][0, :, 0]  # [H, S]
    scores = attention[:, 1:].double().sum(0)
    shares = scores / scores.sum()
    norms = out.hidden_states[layers][0, 1:].norm(dim=-1)
    sinks = norms > SINK * norms.median()
    return {
        "stream": max(_peak(each) for each in out.hidden_states[: layers + 1]),
        "fc2": max(_peak(inputs[number]) for number in range(layers)),
        "entropy": float(-(shares * shares.log()).sum()) / math.log(len(shares)),
        "top5": float(shares.topk(5).values.sum()),
        "sinks": float(sinks.sum()),
        "share": float(scores[sinks].sum() / attention.sum()),
        "norm": float(norms.max() / norms.median()),
    }


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max() / tensor.square().mean().sqrt())


def _tower(weights: VisionWeights) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = weights.config.tower
    model = CLIPVisionModel._from_config(
        CLIPVisionConfig(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            hidden_act=sizes.activation,
            layer_norm_eps=sizes.layer_norm_eps,
        ),
        attn_implementation="eager",
    )
    own = {
        name.removeprefix("tower."): tensor.float()
        for name, tensor in weights.tensors.items()
        if name.startswith("tower.")
    }
    model.load_state_dict(own, strict=False)
    return model.float().eval()
