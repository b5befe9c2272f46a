"""Outliers and attention sinks in random weights, as bad as those of real towers.

Random weights have neither, so that one scale for all of a tensor costs them nothing in eight bits.
What is planted is what OpenAI's CLIP ViT-B/16 has (`benchmarks.real`):

* Some patches' position embeddings mark one channel; the picture raises or lowers the mark.
* Below the middle of the tower are *hot* layers, a quarter of all. In the first of them a few
  neurons fire at marked patches, in the others at what these have become. So what is largest at
  fc2's input are few neurons at few tokens, hundreds of times the others. They are behind an
  activation function: nothing that a LayerNorm and the weights after it could share, which is what
  SmoothQuant does, and what outliers in LayerNorms' gammas would be undone by.
* fc2 makes of them one huge channel in the residual stream: these patches are *sinks*, of several
  times the others' norm. Hot layers write as much as trained ones do beside what is there; random
  ones write so little that it wouldn't matter how their input is rounded.
* A bias of all queries, and what keys take from that channel, make every token look at sinks, CLS
  among them.
* Another channel is large at all tokens, by the row and bias of fc2 in the first layer.

The function is another one than that of the random weights: a reference is computed from these.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vzip.export.architecture import VisionConfig
from vzip.export.checkpoint.random_weights import generator
from vzip.export.checkpoint.weights import VisionWeights
from vzip.runtime.errors import InvalidInputError

MARKED: Final = 0.04
"""Share of the patches that may become sinks."""
# All of what follows was chosen by what `benchmarks.harness.outliers` measures of LLaVA's tower.
_MARK, _LEAST_MARK = 4.0, 1.5  # what a position has, and what is left of it from which neurons fire
_STEEP = 38.0  # how much of it they make
_HOT = 170.0  # their activation at a sink; others have about .5
_NEURONS, _STEP = 4, 0.05  # of them in a layer, each so much lower than the one before
_SILENT = -10.0  # what goes into their activation function elsewhere
_LITTLE = 0.01  # of what layers write to the channel by themselves
_START = 1.3  # deviation of the stream at the first hot layer
_ORDINARY = 0.55  # and of what goes into fc2
_WRITTEN = 1.6  # and of what a hot layer adds to the stream
_NORM = 8.0  # of a sink, beside others
_EVERYWHERE, _ROW = 12.0, 8.0  # bias of the other channel; what its row is multiplied by
_LOGIT = 3.0  # that a sink has beside other tokens
_QUERY = 1.6  # length of the queries' bias


def with_outliers(weights: VisionWeights, seed: int) -> VisionWeights:
    """Plant outliers and sinks in random weights.

    Args:
        weights: Those of `random_vision`, which stay what they are.
        seed: Of the places: the same give the same.

    Returns:
        The others, in the same dtype.

    Raises:
        InvalidInputError: The tower has too few layers.
    """
    if not hot_layers(weights.config):
        raise InvalidInputError(
            f"the tower runs {weights.config.layers_run} of its layers",
            expected="at least 2, to plant outliers in",
            cure="take random weights without outliers",
        )
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    _Planting(weights.config, tensors, seed).plant()
    return VisionWeights(weights.config, tensors)


def hot_layers(config: VisionConfig) -> range:
    """Return the hot layers of a tower, counted from 0; of CLIP ViT-B/16 they are 4 to 6."""
    return range(5 * config.layers_run // 12, 8 * config.layers_run // 12)


class _Planting:
    """Changes the tensors in place."""

    def __init__(self, config: VisionConfig, tensors: dict[str, Tensor], seed: int) -> None:
        self.tower, self.tensors, self.hot = config.tower, tensors, hot_layers(config)
        self.drawn = generator(seed, "outliers")
        width = self.tower.hidden_size
        self.huge, self.everywhere = map(int, self.drawn.choice(width, 2, replace=False))
        # What the huge channel is at a sink, after a LayerNorm.
        self.normed = math.sqrt(width)

    def plant(self) -> None:
        self._mark_positions()
        self._of("layers.0.mlp.fc2.weight")[self.everywhere] *= _ROW
        self._of("layers.0.mlp.fc2.bias")[self.everywhere] = _EVERYWHERE
        for layer in range(self.hot.start):
            self._write_little(layer, "self_attn.out_proj")
            self._write_little(layer, "mlp.fc2")
        for layer in self.hot:
            self._make_hot(layer)
        for layer in range(self.hot.start + 1, self.tower.num_layers):
            self._attend_to_sinks(layer)

    def _of(self, name: str) -> Tensor:
        return self.tensors[f"tower.encoder.{name}"]

    def _mark_positions(self) -> None:
        patches, huge = self.tower.patches, self.huge
        marked = self.drawn.choice(patches, max(1, round(MARKED * patches)), replace=False)
        table = self.tensors["tower.embeddings.position_embedding.weight"]  # [S, D]
        table[:, huge] = 0
        table[torch.from_numpy(marked) + int(self.tower.cls_token), huge] = _MARK
        kernel = self.tensors["tower.embeddings.patch_embedding.weight"][huge]  # [3, p, p]
        # A flat patch, of whatever colour, leaves the mark as it is.
        kernel -= kernel.float().mean(dim=(1, 2), keepdim=True).to(kernel.dtype)
        if self.tower.cls_token:
            self.tensors["tower.embeddings.class_embedding"][huge] = 0
            self._let_through("tower.pre_layrnorm")

    def _let_through(self, norm: str) -> None:
        """Let a LayerNorm change nothing of the channel but its scale."""
        self.tensors[f"{norm}.weight"][self.huge] = 1
        self.tensors[f"{norm}.bias"][self.huge] = 0

    def _write_little(self, layer: int, linear: str) -> None:
        """Let a linear layer leave the channel nearly alone; real weights have no rows of zeros."""
        self._of(f"layers.{layer}.{linear}.weight")[self.huge] *= _LITTLE
        self._of(f"layers.{layer}.{linear}.bias")[self.huge] *= _LITTLE

    def _make_hot(self, layer: int) -> None:
        name, inner = f"layers.{layer}.mlp", self.tower.intermediate_size
        count = min(_NEURONS, inner)
        neurons = torch.from_numpy(self.drawn.choice(inner, count, replace=False))
        fc1, bias, fc2 = (
            self._of(f"{name}.{each}") for each in ("fc1.weight", "fc1.bias", "fc2.weight")
        )
        self._let_through(f"tower.encoder.layers.{layer}.layer_norm2")
        self._write_little(layer, "mlp.fc2")
        written = _ORDINARY / math.sqrt(2 * self.tower.num_layers)  # by random weights
        before = fc2[:, neurons].clone()
        fc2 *= _WRITTEN / written
        fc2[:, neurons] = before
        fc1[neurons] = 0
        heights = 1 - _STEP * torch.arange(count)
        if layer == self.hot.start:
            fc1[neurons, self.huge] = (_STEEP * heights).to(fc1.dtype)
            bias[neurons] = (-_STEEP * _LEAST_MARK * heights).to(fc1.dtype)
        else:
            fc1[neurons, self.huge] = ((_HOT * heights - _SILENT) / self.normed).to(fc1.dtype)
            bias[neurons] = _SILENT
        # As the stream grows, so do sinks.
        step = layer - self.hot.start
        after, start = math.hypot(_START, _WRITTEN * math.sqrt(step + 1)), 0.0
        if step:
            start = math.hypot(_START, _WRITTEN * math.sqrt(step))
        fc2[self.huge, neurons[0]] = _NORM * self.normed * (after - start) / _HOT

    def _attend_to_sinks(self, layer: int) -> None:
        heads, size = self.tower.num_heads, self.tower.hidden_size // self.tower.num_heads
        way = torch.from_numpy(self.drawn.standard_normal((heads, size), dtype=np.float32))
        way = (way / way.norm(dim=1, keepdim=True)).flatten()
        name = f"layers.{layer}.self_attn"
        self._let_through(f"tower.encoder.layers.{layer}.layer_norm1")
        bias, keys = self._of(f"{name}.q_proj.bias"), self._of(f"{name}.k_proj.weight")
        bias += (_QUERY * way).to(bias.dtype)
        keys[:, self.huge] = (_LOGIT * math.sqrt(size) / (_QUERY * self.normed) * way).to(
            keys.dtype
        )
