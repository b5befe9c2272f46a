"""Seeded random weights at true size, for everything that does not depend on their values.

Each tensor has a generator of its own, seeded by the seed and its name. So the same seed gives the
same weights whatever is drawn before, and at a smaller dtype the same ones rounded.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from vzip.export.architecture import NEWLINE, Shape, VisionConfig, tensor_shapes
from vzip.export.checkpoint.weights import VisionWeights
from vzip.runtime.errors import InvalidInputError


def random_vision(
    config: VisionConfig, seed: int, *, dtype: torch.dtype = torch.float32
) -> VisionWeights:
    """Draw tower and projector, the dead last layers and the post-LayerNorm included.

    The scale differs from CLIP's initialisation on purpose. There, queries and keys are so small
    that attention is uniform, all scores nearly tie and a selection means nothing. Here attention
    logits are of order 1, position embeddings tell tokens of a plain image apart, and biases,
    gammas and betas are not 0 and 1, so that leaving one out shows.

    Args:
        config: The architecture.
        seed: 0 or above.
        dtype: Of the tensors. One FP32 tensor at a time exists besides, whatever it is.

    Returns:
        All tensors of `tensor_shapes(config)`.

    Raises:
        InvalidInputError: The seed is no integer from 0 up.
    """
    if type(seed) is not int or seed < 0:
        raise InvalidInputError(
            f"seed is {seed!r}",
            expected="an integer of 0 or above",
        )
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        mean, deviation = _distribution(name, shape, config.tower.num_layers)
        values = generator(seed, name).standard_normal(shape, dtype=np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        tensors[name] = torch.from_numpy(values).to(dtype)
    return VisionWeights(config, tensors)


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator of what a seed draws under a name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def _distribution(name: str, shape: Shape, layers: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name == NEWLINE:
        return 0.0, shape[0] ** -0.5  # the size of an LLM's embeddings, as transformers draws it
    module, kind = name.rsplit(".", 1)
    if module.endswith(("layrnorm", "layernorm", "layer_norm1", "layer_norm2")):
        return (1.0, 0.1) if kind == "weight" else (0.0, 0.1)
    if kind == "bias":
        return 0.0, 0.1
    if "_embedding" in name and "patch" not in name:
        return 0.0, 0.5  # beside patches of about 1
    inputs = math.prod(shape[1:])
    deviation = inputs**-0.5  # a variance of 1 stays 1
    if module.endswith(("out_proj", "mlp.fc2")):
        deviation *= (2 * layers) ** -0.5  # the sum of all residual branches stays of order 1
    return 0.0, deviation
