"""DINOv2 in the form of other architectures that vzip knows, since it isn't a LLaVA's tower."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.real.weights import State, resized

WIDTH, LAYERS, PATCH, HEADS, FFN = 384, 12, 14, 6, 1536
EXTRA = 64
"""Channels that are added: one more head."""
_LARGE = 100.0


def dinov2_as_clip(dinov2: State, image_size: int) -> State:
    """Return DINOv2 as the weights of a CLIPVisionModel of width 448 with 7 heads.

    The same function up to rounding:

    * Layer scale goes into out_proj and fc2, and the convolution's bias into the positions.
    * Nothing but LayerNorms reads the residual stream, and they take away its mean, so all that is
      written to it is centred beforehand.
    * CLIP's LayerNorm before the first layer, which DINOv2 lacks, is made to do nothing: 64 more
      channels hold ±100 there, so that the variance is theirs, and their gamma is 0. Afterwards
      they stay 0. Of a centred stream, LayerNorm over 448 channels of which 64 are 0 is the one
      over 384 with gamma times √(384/448) and epsilon times 384/448.
    * They are a seventh head of zeros, which attends evenly and adds nothing. Sums of attention
      over heads gain a constant, and sums of keys nothing.
    """
    wide = WIDTH + EXTRA
    embeddings, state = "embeddings.", State()
    side = image_size // PATCH
    table = resized(dinov2[embeddings + "position_embeddings"][0], side).double()
    table[1:] += dinov2[embeddings + "patch_embeddings.projection.bias"].double()
    table = _centred(table.T).T
    positions = _padded(table, 1 + side * side, wide)
    positions[:, WIDTH:] = _LARGE * torch.tensor([1.0, -1.0]).repeat(EXTRA // 2)
    cls = _centred(dinov2[embeddings + "cls_token"][0, 0])
    kernel = _centred(dinov2[embeddings + "patch_embeddings.projection.weight"])
    state[embeddings + "class_embedding"] = _padded(cls, wide)
    state[embeddings + "patch_embedding.weight"] = _padded(kernel, wide, 3, PATCH, PATCH)
    state[embeddings + "position_embedding.weight"] = positions
    # What that LayerNorm divides by; for CLS, and nearly so for every token.
    square = float((cls + table[0]).square().sum())
    deviation = math.sqrt((EXTRA * _LARGE**2 + square) / wide)
    state["pre_layrnorm.weight"] = _padded(torch.full((WIDTH,), deviation), wide)
    state["pre_layrnorm.bias"] = torch.zeros(wide)
    shrink = math.sqrt(WIDTH / wide)
    for layer in range(LAYERS):
        old, new = f"encoder.layer.{layer}.", f"encoder.layers.{layer}."
        for ours, theirs in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
            state[f"{new}{ours}.weight"] = _padded(dinov2[f"{old}{theirs}.weight"] * shrink, wide)
            state[f"{new}{ours}.bias"] = _padded(dinov2[f"{old}{theirs}.bias"], wide)
        for part in ("q_proj", "k_proj", "v_proj"):
            source, target = f"{old}attention.{part}", f"{new}self_attn.{part}"
            state[f"{target}.weight"] = _padded(dinov2[f"{source}.weight"], wide, wide)
            state[f"{target}.bias"] = _padded(dinov2[f"{source}.bias"], wide)
        for source, target in (("attention.o_proj", "self_attn.out_proj"), ("mlp.fc2", "mlp.fc2")):
            weight, bias = (_centred(each) for each in _scaled(dinov2, old, source))
            columns = wide if source == "attention.o_proj" else FFN
            state[f"{new}{target}.weight"] = _padded(weight, wide, columns)
            state[f"{new}{target}.bias"] = _padded(bias, wide)
        state[f"{new}mlp.fc1.weight"] = _padded(dinov2[f"{old}mlp.fc1.weight"], FFN, wide)
        state[f"{new}mlp.fc1.bias"] = dinov2[f"{old}mlp.fc1.bias"].clone()
    state["post_layernorm.weight"] = _padded(dinov2["layernorm.weight"] * shrink, wide)
    state["post_layernorm.bias"] = _padded(dinov2["layernorm.bias"], wide)
    return state


def dinov2_as_siglip(dinov2: State, image_size: int) -> State:
    """Return DINOv2's patches without its CLS token as the weights of a SiglipVisionModel.

    Trained weights, but of no published model: without CLS they compute something else.
    """
    embeddings, state = "embeddings.", State()
    table = resized(dinov2[embeddings + "position_embeddings"][0], image_size // PATCH)
    state[embeddings + "position_embedding.weight"] = table[1:].clone()
    for kind in ("weight", "bias"):
        name = f"patch_embeddings.projection.{kind}"
        state[f"{embeddings}patch_embedding.{kind}"] = dinov2[embeddings + name].clone()
    for layer in range(LAYERS):
        old, new = f"encoder.layer.{layer}.", f"encoder.layers.{layer}."
        for source, target in (
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"),
            *((f"attention.{part}_proj", f"self_attn.{part}_proj") for part in "qkv"),
        ):  # fmt: skip
            for kind in ("weight", "bias"):
                state[f"{new}{target}.{kind}"] = dinov2[f"{old}{source}.{kind}"].clone()
        for source, target in (("attention.o_proj", "self_attn.out_proj"), ("mlp.fc2", "mlp.fc2")):
            weight, bias = _scaled(dinov2, old, source)
            state[f"{new}{target}.weight"], state[f"{new}{target}.bias"] = (
                weight.float(),
                bias.float(),
            )
    for kind in ("weight", "bias"):
        state[f"post_layernorm.{kind}"] = dinov2[f"layernorm.{kind}"].clone()
    return state


def _scaled(dinov2: State, layer: str, name: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, with the layer scale behind them multiplied in."""
    scale = "layer_scale1" if name.startswith("attention") else "layer_scale2"
    factor = dinov2[f"{layer}{scale}.lambda1"].double()
    weight, bias = dinov2[f"{layer}{name}.weight"], dinov2[f"{layer}{name}.bias"]
    return factor[:, None] * weight.double(), factor * bias.double()


def _centred(tensor: Tensor) -> Tensor:
    """Return it, float64, with mean 0 along its first axis."""
    wide = tensor.double()
    return wide - wide.mean(0, keepdim=True)


def _padded(tensor: Tensor, *shape: int) -> Tensor:
    """Return it, float32, in the corner of zeros of a shape."""
    out = torch.zeros(shape)
    out[tuple(slice(0, length) for length in tensor.shape)] = tensor.float()
    return out
