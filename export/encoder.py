"""The module that is traced: tower, VisionZip selection and merging, projector.

It is written for the graph, not taken from transformers: attention as MatMul → Softmax → MatMul
with the scale once on the queries (what TensorRT fuses), scores and keys in an FP32 side branch of
the selected layer alone, and no layer behind it. `parity.py` compares the result with the untouched
upstream model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vzip.export.architecture import ProjectorConfig, TowerConfig, VisionConfig
from vzip.export.budget import Budget, Merge
from vzip.export.visionzip import apply_plan, cls_scores, make_plan
from vzip.runtime.preprocess import Preprocessing

GraphInput = Literal["image", "pixel_values"]
Weights = Mapping[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
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
        kernel = weights["tower.embeddings.patch_embedding.weight"]  # [D, 3, p, p]
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        # pixel_values = (image * rescale - mean) / std = image * scale + shift, per channel.
        scale, shift = preprocessing.rescale_factor / std, -mean / std
        self.folded = graph_input == "image" and dtype == torch.float32
        bias = None
        if self.folded:
            wide = kernel.double()
            bias = _parameter((wide * shift.view(1, 3, 1, 1)).sum(dim=(1, 2, 3)), dtype)
            kernel = wide * scale.view(1, 3, 1, 1)
        elif graph_input == "image":
            # Folded FP16 weights would be near 1e-4, where FP16 has few bits left.
            self.scale = _parameter(scale.view(1, 3, 1, 1), torch.float32)
            self.shift = _parameter(shift.view(1, 3, 1, 1), torch.float32)
        self.kernel = _parameter(kernel, dtype)
        self.bias = bias
        positions = weights["tower.embeddings.position_embedding.weight"].float().clone()  # [S, D]
        positions[0] += weights["tower.embeddings.class_embedding"].float()
        self.positions = _parameter(positions.unsqueeze(0), dtype)

    def forward(self, image: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            image: uint8 [B, H, W, 3] RGB, or float32 [B, 3, H, W] as the processor makes it.

        Returns:
            [B, S, D], CLS first.
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
        # A row of zeros in front becomes CLS by what is added to it: no shape of the batch is read.
        return functional.pad(patches, (0, 0, 1, 0)) + self.positions


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
    """Linear, GELU, Linear: tower features to the LLM's embeddings."""

    def __init__(self, config: ProjectorConfig, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.linear_1 = Linear(weights, "projector.linear_1", dtype)
        self.linear_2 = Linear(weights, "projector.linear_2", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, D] → [B, K, L]."""
        embeds: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return embeds


class Encoder(nn.Module):
    """The whole graph.

    Args:
        config: Architecture, feature layer and preprocessing.
        weights: Canonical names → tensors, any floating dtype; each is read once.
        budget: Tokens that leave the graph.
        merge: How contextual tokens are formed.
        graph_input: What `forward` takes.
        dtype: torch.float32 or torch.float16, of weights, activations and `image_embeds`.
    """

    def __init__(
        self,
        config: VisionConfig,
        weights: Weights,
        *,
        budget: Budget,
        merge: Merge,
        graph_input: GraphInput,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        budget.check_fits(config.tower.tokens, tower_has_cls=config.tower.cls_token)
        self.budget = budget
        self.merge: Merge = merge
        tower = config.tower
        self.heads, self.head_width = tower.num_heads, tower.hidden_size // tower.num_heads
        self.embedding = PatchEmbedding(tower, weights, config.preprocessing, graph_input, dtype)
        self.pre_norm = LayerNorm(weights, "tower.pre_layrnorm", tower.layer_norm_eps, dtype)
        self.layers = nn.ModuleList(
            Layer(tower, weights, index, dtype) for index in range(config.layers_run)
        )
        self.projector = Projector(config.projector, weights, dtype)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a batch of images.

        Args:
            image: uint8 [B, H, W, 3], or float32 [B, 3, H, W].

        Returns:
            `image_embeds` [B, K, L], `kept_indices` int64 [B, dominant] ascending (0 = CLS), and
            `token_weights` float32 [B, K, S], which the graph holds but does not output.
        """
        hidden = self.pre_norm(self.embedding(image))
        queries = keys = hidden
        for layer in self.layers:
            hidden, queries, keys = layer(hidden)
        # The scores: one row of QKᵀ in FP32, apart from the layer's own attention, whose softmax
        # keeps a single consumer and so stays fusable.
        split_keys = _split_heads(keys.float(), self.heads)  # [B, H, S, d]
        cls_query = _split_heads(queries[:, :1].float(), self.heads)  # [B, H, 1, d]
        logits = torch.matmul(cls_query * self.head_width**-0.5, split_keys.transpose(2, 3))
        scores = cls_scores(torch.softmax(logits, dim=-1).squeeze(2))  # [B, N]
        plan = make_plan(scores, split_keys, self.budget, merge=self.merge)
        return self.projector(apply_plan(plan, hidden)), plan.kept, plan.token_weights


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, D] → [B, H, S, d]."""
    return torch.unflatten(x, -1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    # `contiguous` after the cast: a view of a memory-mapped shard must not outlive its file.
    return nn.Parameter(tensor.to(dtype, copy=True).contiguous(), requires_grad=False)
