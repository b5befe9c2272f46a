"""The module that is traced: tower, VisionZip selection and merging, projector.

It is written for the graph, not taken from transformers: attention as MatMul → Softmax → MatMul
with the scale once on the queries (what TensorRT fuses), scores and keys in an FP32 side branch of
the selected layer alone, and no layer behind it. `vzip.export.parity` compares the result with the
untouched upstream model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Budget
from vzip.export.algorithm.rules import Signals
from vzip.export.algorithm.visionzip import Plan, apply_plan, cls_scores, received_scores
from vzip.export.architecture import ProjectorConfig, TowerConfig, VisionConfig
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.preprocess import Preprocessing

GraphInput = Literal["image", "pixel_values"]
Weights = Mapping[str, Tensor]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
"""Of weights, activations and `image_embeds`, by the manifest's precision."""


def _tanh_gelu(x: Tensor) -> Tensor:
    """SigLIP's GELU, without the Pow that the exporter makes of torch's.

    A square beyond FP16's range is infinite, and so is the tanh's argument: no NaN comes of it.
    """
    return 0.5 * x * (1.0 + torch.tanh((2 / math.pi) ** 0.5 * x * (1.0 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}


class Linear(nn.Module):
    """x · W + b, W stored [in, out]: the graph then holds MatMul and Add and no Transpose."""

    def __init__(self, weights: Weights, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(weights[f"{name}.weight"].t(), dtype)
        bias = weights.get(f"{name}.bias")
        self.bias = None if bias is None else _parameter(bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """LayerNormalization over the last axis; stays one operator in the graph."""

    def __init__(self, weights: Weights, name: str, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(weights[f"{name}.weight"], dtype)
        self.bias = _parameter(weights[f"{name}.bias"], dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class PatchEmbedding(nn.Module):
    """Image or pixel values to the tokens that enter the first layer's pre-LayerNorm."""

    def __init__(
        self,
        config: TowerConfig,
        weights: Weights,
        preprocessing: Preprocessing,
        graph_input: GraphInput,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.stride = config.patch_size
        self.graph_input = graph_input
        self.grid = config.grid
        kernel = weights["tower.embeddings.patch_embedding.weight"]  # [D, 3, p, p]
        bias = weights.get("tower.embeddings.patch_embedding.bias")  # [D], SigLIP's
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        # pixel_values = (image * rescale - mean) / std = image * scale + shift, per channel.
        scale, shift = preprocessing.rescale_factor / std, -mean / std
        self.folded = graph_input == "image" and dtype == torch.float32
        if self.folded:
            wide = kernel.double()
            shifted = (wide * shift.view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
            bias = shifted if bias is None else shifted + bias.double()
            kernel = wide * scale.view(1, 3, 1, 1)
        elif graph_input == "image":
            # Folded FP16 weights would be near 1e-4, where FP16 has few bits left.
            self.scale = _parameter(scale.view(1, 3, 1, 1), torch.float32)
            self.shift = _parameter(shift.view(1, 3, 1, 1), torch.float32)
        # What a pixel of 0 is in `pixel_values`, and half of the step from it to one of 1.
        black = shift if graph_input == "pixel_values" else torch.zeros(3, dtype=torch.float64)
        step = scale if graph_input == "pixel_values" else torch.ones(3, dtype=torch.float64)
        self.brighter: Tensor
        self.register_buffer("brighter", (black + 0.5 * step).view(1, 3, 1, 1).float())
        self.kernel = _parameter(kernel, dtype)
        self.bias = None if bias is None else _parameter(bias, dtype)
        self.cls_token = config.cls_token
        positions = weights["tower.embeddings.position_embedding.weight"].float().clone()  # [S, D]
        if config.cls_token:
            positions[0] += weights["tower.embeddings.class_embedding"].float()
        self.positions = _parameter(positions.unsqueeze(0), dtype)

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            image: uint8 [B, H, W, 3] RGB, or float32 [B, 3, H, W] as the processor makes it.

        Returns:
            [B, S, D], CLS first where the tower has one.
        """
        pixels = image
        if self.graph_input == "image":
            # The cast comes before the transpose: TensorRT takes uint8 as input of Cast alone.
            pixels = image.float().permute(0, 3, 1, 2)  # [B, 3, H, W]
            if not self.folded:
                pixels = pixels * self.scale + self.shift
        pixels = pixels.to(self.kernel.dtype)
        patches = functional.conv2d(pixels, self.kernel, self.bias, stride=self.stride)
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        if self.cls_token:
            # A row of zeros becomes CLS by what is added to it: no shape of the batch is read.
            patches = functional.pad(patches, (0, 0, 1, 0))
        return patches + self.positions

    def pictured(self, image: Tensor) -> Tensor:
        """Tell patches that show something from those that are black all over, as padding is.

        Args:
            image: As for `forward`.

        Returns:
            float32 [B, N], 1 or 0.
        """
        pixels = image.float()
        if self.graph_input == "image":
            pixels = pixels.permute(0, 3, 1, 2)
        (rows, columns), side = self.grid, self.stride
        above = (pixels >= self.brighter).float()[:, :, : rows * side, : columns * side]
        # [B, 3, rows, side, columns, side]
        patches = torch.unflatten(torch.unflatten(above, 3, (columns, side)), 2, (rows, side))
        return patches.amax(dim=(1, 3, 5)).flatten(1)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, config: TowerConfig, weights: Weights, index: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        name = f"tower.encoder.layers.{index}"
        self.heads = config.num_heads
        self.head_width = config.hidden_size // config.num_heads
        self.activation = ACTIVATIONS[config.activation]
        self.norm1 = LayerNorm(weights, f"{name}.layer_norm1", config.layer_norm_eps, dtype)
        self.norm2 = LayerNorm(weights, f"{name}.layer_norm2", config.layer_norm_eps, dtype)
        self.q = Linear(weights, f"{name}.self_attn.q_proj", dtype)
        self.k = Linear(weights, f"{name}.self_attn.k_proj", dtype)
        self.v = Linear(weights, f"{name}.self_attn.v_proj", dtype)
        self.out = Linear(weights, f"{name}.self_attn.out_proj", dtype)
        self.fc1 = Linear(weights, f"{name}.mlp.fc1", dtype)
        self.fc2 = Linear(weights, f"{name}.mlp.fc2", dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: [B, S, D].

        Returns:
            The layer's output, and the outputs of its q_proj and k_proj before any scaling, each
            [B, S, D].
        """
        normed = self.norm1(x)
        queries, keys, values = self.q(normed), self.k(normed), self.v(normed)
        scaled = _split_heads(queries * self.head_width**-0.5, self.heads)
        logits = torch.matmul(scaled, _split_heads(keys, self.heads).transpose(2, 3))
        attention = torch.softmax(logits, dim=-1)  # [B, H, S, S]
        context = torch.matmul(attention, _split_heads(values, self.heads))  # [B, H, S, d]
        x = x + self.out(context.transpose(1, 2).flatten(2))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x)))), queries, keys


class Projector(nn.Module):
    """(LayerNorm,) Linear, GELU, Linear: tower features to the LLM's embeddings."""

    def __init__(self, config: ProjectorConfig, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.norm = (
            None
            if config.norm_eps is None
            else LayerNorm(weights, "projector.projector_layernorm", config.norm_eps, dtype)
        )
        self.linear_1 = Linear(weights, "projector.linear_1", dtype)
        self.linear_2 = Linear(weights, "projector.linear_2", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, F] → [B, K, L]."""
        if self.norm is not None:
            x = self.norm(x)
        embeds: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return embeds


class Encoder(nn.Module):
    """The whole graph.

    Args:
        config: Architecture, feature layers and preprocessing.
        weights: Canonical names → tensors, any floating dtype; each is read once.
        budget: Which tokens leave the graph.
        graph_input: What `forward` takes.
        dtype: torch.float32 or torch.float16, of weights, activations and `image_embeds`.
    """

    def __init__(
        self,
        config: VisionConfig,
        weights: Weights,
        *,
        budget: Budget,
        graph_input: GraphInput,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        tower = config.tower
        self.budget = budget
        self.selection = selections.get(budget.method, budget.options)
        self.grid = config.grid
        self.states = config.states
        # In rows ended by newlines patches of the padding are left out; none is to be kept then.
        self.skips_padding = config.tiling is not None and config.tiling.order == "newline"
        self.cls_token = tower.cls_token
        self.heads, self.head_width = tower.num_heads, tower.hidden_size // tower.num_heads
        self.embedding = PatchEmbedding(tower, weights, config.preprocessing, graph_input, dtype)
        self.pre_norm = (
            LayerNorm(weights, "tower.pre_layrnorm", tower.layer_norm_eps, dtype)
            if tower.kind == "clip"
            else None
        )
        self.layers = nn.ModuleList(
            Layer(tower, weights, index, dtype) for index in range(config.layers_run)
        )
        self.projector = Projector(config.projector, weights, dtype)
        pooling = None if config.pool == 1 else _parameter(_pooling(tower.grid), torch.float32)
        self.pooling = pooling  # [S, patches], the selection's tokens from the tower's

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode a batch of images.

        Args:
            image: uint8 [B, H, W, 3], or float32 [B, 3, H, W].

        Returns:
            `image_embeds` [B, K, L], `kept_indices` int64 [B, dominant] ascending (0 = CLS, where
            there is one), `token_positions` int64 [B, K] (of `Plan.positions`), `rank` int64
            [B, K] where the selection ranks, and `token_weights` float32 [B, K, S], which the graph
            holds but does not output.
        """
        features, signals = self.look(image)
        return self.compress(features, signals, self.budget)

    def look(self, image: Tensor) -> tuple[Tensor, Signals]:
        """Run the tower alone.

        Args:
            image: As for `forward`.

        Returns:
            Features [B, tower tokens, F] that the projector is made for, and what a selection may
            look at.
        """
        hidden = self.embedding(image)
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        queries = keys = hidden
        passed: dict[int, Tensor] = {}
        for state, layer in enumerate(self.layers, start=1):
            hidden, queries, keys = layer(hidden)
            passed[state] = hidden
        # Several layers' features side by side; scores and keys are the deepest one's.
        features = [passed[state] for state in self.states]
        selected = features[0] if len(features) == 1 else torch.cat(features, dim=-1)  # [B, S, F]
        split_keys = _split_heads(keys.float(), self.heads)  # [B, H, S, d]

        def attention_scores() -> Tensor:
            scores = self._attention_scores(queries, split_keys)
            if not self.skips_padding:
                return scores
            pictured = self.embedding.pictured(image)
            return scores * pictured + (pictured - 1.0)  # below all scores, which are above 0

        pictured = (lambda: self.embedding.pictured(image)) if self.skips_padding else None
        return selected, self.signals(selected, split_keys, attention_scores, pictured)

    def signals(
        self,
        features: Tensor,
        split_keys: Tensor,
        attention_scores: Callable[[], Tensor],
        pictured: Callable[[], Tensor] | None = None,
    ) -> Signals:
        """Return what a selection may look at.

        Args:
            features: [B, tower tokens, F].
            split_keys: float32 [B, H, tower tokens, d].
            attention_scores: As `Signals.attention_scores`.
            pictured: As `Signals.pictured`.
        """
        return Signals(
            keys=self._pooled(split_keys),
            cls_token=self.cls_token,
            attention_scores=attention_scores,
            hidden=lambda: self._pooled(features.float()),
            grid=self.grid,
            pictured=pictured,
        )

    def compress(self, features: Tensor, signals: Signals, budget: Budget) -> tuple[Tensor, ...]:
        """Select, merge and project what `look` returned.

        Args:
            features: [B, tower tokens, F].
            signals: Of the same images.
            budget: Which tokens are left; its `method` is the encoder's own.

        Returns:
            As `forward`.

        Raises:
            InvalidInputError: The selection doesn't do what its class says of it.
        """
        asked: list[bool] = []

        def attention_scores() -> Tensor:
            asked.append(True)
            return signals.attention_scores()

        watched = dataclasses.replace(signals, attention_scores=attention_scores)
        rule = self.selection
        plan = rule.plan(watched, budget)
        said = {"uses_attention": rule.uses_attention, "ranked": rule.ranked}
        for name, found in (("uses_attention", bool(asked)), ("ranked", plan.rank is not None)):
            if said[name] != found:
                raise InvalidInputError(
                    f"the selection {budget.method!r} says {name} = {said[name]}",
                    expected=f"{found}, as its plan does",
                    cure=f"change it in {selections.file_of(rule)}",
                )
        rank = () if plan.rank is None else (plan.rank,)
        embeds = self._embeds(plan, features)
        return embeds, plan.kept, plan.positions, *rank, plan.token_weights

    def _attention_scores(self, queries: Tensor, split_keys: Tensor) -> Tensor:
        """Score patches by attention, in FP32 and apart from the layer's own.

        That layer's softmax keeps a single consumer and so stays fusable.

        Args:
            queries: [B, S, D], q_proj's output before any scaling.
            split_keys: float32 [B, H, S, d].

        Returns:
            float32 [B, N].
        """
        # CLS is one row of QKᵀ. Without it every query counts.
        asking = queries[:, :1] if self.cls_token else queries
        split_queries = _split_heads(asking.float(), self.heads) * self.head_width**-0.5
        attention = torch.softmax(torch.matmul(split_queries, split_keys.transpose(2, 3)), dim=-1)
        if self.cls_token:
            return cls_scores(attention.squeeze(2))
        return self._pooled(received_scores(attention).unsqueeze(-1)).squeeze(-1)

    def _pooled(self, x: Tensor) -> Tensor:
        """[…, tower tokens, n] → […, S, n], where the selection's tokens are pooled ones."""
        return x if self.pooling is None else torch.matmul(self.pooling, x)

    def _embeds(self, plan: Plan, features: Tensor) -> Tensor:
        """[B, tower tokens, F] → [B, K, L].

        The projector sees K tokens, unless the LLM was trained with pooled ones: those are pooled
        behind the projector, so it has to see all.
        """
        if self.pooling is None:
            projected: Tensor = self.projector(apply_plan(plan, features))
            return projected
        weights = torch.matmul(plan.token_weights, self.pooling)  # [B, K, tower tokens]
        return apply_plan(plan._replace(token_weights=weights), self.projector(features))


def _pooling(grid: tuple[int, int]) -> Tensor:
    """Return the matrix of LLaVA-OneVision's pooling of a frame, [pooled, patches].

    Bilinear interpolation to half the rows and columns, rounded up, with the centres of the outer
    pixels half a pixel inside (``align_corners=False``); no antialiasing.
    """
    rows, columns = (_halved(length) for length in grid)
    return torch.kron(rows, columns)


def _halved(length: int) -> Tensor:
    """Return the weights [(length + 1) // 2, length] of one axis."""
    count = (length + 1) // 2
    place = (torch.arange(count, dtype=torch.float64) + 0.5) * (length / count) - 0.5
    low = place.floor()
    matrix = torch.zeros(count, length, dtype=torch.float64)
    for row in range(count):
        share = float(place[row] - low[row])
        for index, weight in ((int(low[row]), 1 - share), (int(low[row]) + 1, share)):
            matrix[row, min(max(index, 0), length - 1)] += weight
    return matrix


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, D] → [B, H, S, d]."""
    return torch.unflatten(x, -1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    # `contiguous` after the cast: a view of a memory-mapped shard must not outlive its file.
    return nn.Parameter(tensor.to(dtype, copy=True).contiguous(), requires_grad=False)
