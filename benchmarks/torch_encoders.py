"""What a TensorRT engine is compared with: the encoder in PyTorch, as published and at its best.

All take uint8 [B, H, W, 3] on the host and give `image_embeds` [B, K, L] and `kept_indices`
[B, dominant] on the host, as `VisionEncoder.run` does, and merge as the bundle says. The weights
are the bundle's: drawn from its seed, or read from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vzip.export.architecture import VisionConfig
from vzip.export.budget import Budget
from vzip.export.pipeline import WeightSource
from vzip.export.visionzip import apply_plan, cls_scores, make_plan
from vzip.export.weights import VisionWeights
from vzip.runtime.manifest import EMBEDS, KEPT, Manifest

Outputs = dict[str, NDArray[Any]]


class Pixels(nn.Module):
    """uint8 [B, H, W, 3] → normalised [B, 3, H, W] in the tower's precision, on the device."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        prep = config.preprocessing
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (prep.mean, prep.std))
        self.register_buffer("scale", prep.rescale_factor / std)
        self.register_buffer("shift", -mean / std)
        self.target = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Normalise in FP32, then round."""
        return (images.permute(0, 3, 1, 2) * self.scale + self.shift).to(self.target)


class Published(nn.Module):
    """VisionZip as its authors published it, on the untouched tower.

    All layers run, with eager attention and ``output_attentions=True``, which keeps the attention
    of every layer; the features are of the second-to-last. Selection by boolean masks in the
    tower's precision, contextual tokens as in the published code (arXiv 2412.04467, section 3; its
    own ``sum`` merge, or ``average``), and the projector on the K tokens.
    """

    def __init__(self, weights: VisionWeights, manifest: Manifest, dtype: torch.dtype) -> None:
        super().__init__()
        self.pixels = Pixels(weights.config, dtype)
        self.tower = _tower(weights, "eager", weights.config.tower.num_layers)
        self.projector = _projector(weights)
        self.layers_run = weights.config.layers_run
        self.selection = manifest.selection
        self.keys: Tensor | None = None
        attention = self.tower.encoder.layers[self.layers_run - 1].self_attn
        attention.k_proj.register_forward_hook(self._keep_keys)

    def _keep_keys(self, _module: nn.Module, _inputs: object, keys: Tensor) -> None:
        self.keys = keys

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode uint8 [B, H, W, 3] to embeds [B, K, L] and kept [B, dominant]."""
        out = self.tower(self.pixels(images), output_hidden_states=True, output_attentions=True)
        hidden = out.hidden_states[self.layers_run]  # [B, S, D]; the first are the embeddings
        attention = out.attentions[self.layers_run - 1]  # [B, H, S, S]
        assert self.keys is not None
        heads = attention.shape[1]
        metric = torch.unflatten(self.keys, -1, (heads, -1)).mean(dim=2)  # [B, S, d]
        tokens, kept = self._select(hidden, attention, metric)
        return self.projector(tokens), kept

    def _select(self, hidden: Tensor, attention: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        batch, size, width = hidden.shape
        contextual = self.selection.contextual
        best = attention[:, :, 0, 1:].sum(dim=1).topk(self.selection.dominant - 1, dim=1).indices
        kept = torch.cat([torch.zeros_like(best[:, :1]), best + 1], dim=1)
        rest = torch.ones((batch, size), dtype=torch.bool, device=hidden.device)
        rest.scatter_(1, kept, False)
        dominant = hidden.masked_select(~rest[..., None]).view(batch, -1, width)
        left = size - self.selection.dominant
        features = hidden.masked_select(rest[..., None]).view(batch, left, width)
        keys = metric[rest].view(batch, left, -1)
        keys = keys / keys.norm(dim=-1, keepdim=True)
        positions = torch.arange(left, device=hidden.device)
        targets = positions[:: max(1, left // contextual)][:contextual]
        merged = ~torch.isin(positions, targets)
        similarity = torch.bmm(keys[:, merged], keys[:, targets].transpose(1, 2))
        assigned = torch.zeros_like(similarity)
        assigned.scatter_(2, similarity.argmax(dim=2, keepdim=True), 1)
        counts = assigned.sum(dim=1)[..., None]  # [B, contextual, 1]
        sums = torch.bmm(assigned.transpose(1, 2), features[:, merged])
        if self.selection.merge == "sum":
            formed = features[:, targets] + sums / counts.clamp(min=1)
        else:
            formed = (features[:, targets] + sums) / (counts + 1)
        return torch.cat([dominant, formed], dim=1), kept.sort(dim=1).values


class Sdpa(nn.Module):
    """The best that PyTorch does without a compiler.

    transformers' layers with scaled_dot_product_attention, no dead layer, scores from one row of
    QKᵀ in FP32, and vzip's own selection: no boolean mask, so nothing waits for the host.
    """

    def __init__(self, weights: VisionWeights, manifest: Manifest, dtype: torch.dtype) -> None:
        super().__init__()
        self.pixels = Pixels(weights.config, dtype)
        self.tower = _tower(weights, "sdpa", weights.config.layers_run)
        self.projector = _projector(weights)
        self.heads = weights.config.tower.num_heads
        selection = manifest.selection
        self.budget = Budget(selection.dominant, selection.contextual, selection.cls_token)
        self.merge = selection.merge

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode uint8 [B, H, W, 3] to embeds [B, K, L] and kept [B, dominant]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(self.pixels(images)))
        *layers, last = self.tower.encoder.layers
        for layer in layers:
            hidden = layer(hidden, None)
        # The last one by hand, for its queries and keys.
        attention, normed = last.self_attn, last.layer_norm1(hidden)
        queries, keys, values = (
            torch.unflatten(projection(normed), -1, (self.heads, -1)).transpose(
                1, 2
            )  # [B, H, S, d]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        context = functional.scaled_dot_product_attention(queries, keys, values)
        hidden = hidden + attention.out_proj(context.transpose(1, 2).flatten(2))
        hidden = hidden + last.mlp(last.layer_norm2(hidden))
        wide = keys.float()
        row = queries[:, :, :1].float() * wide.shape[-1] ** -0.5
        scores = cls_scores(torch.softmax(row @ wide.transpose(2, 3), dim=-1).squeeze(2))
        plan = make_plan(scores, wide, self.budget, merge=self.merge)
        return self.projector(apply_plan(plan, hidden)), plan.kept


FORMS: dict[str, Callable[[VisionWeights, Manifest, torch.dtype], nn.Module]] = {
    "pytorch-eager": Published,
    "pytorch-sdpa": Sdpa,
    "pytorch-compile": Sdpa,
}
COMPILE_MODE = "reduce-overhead"  # CUDA graphs; the matrix multiplications are cuBLAS's in any mode


class TorchEncoder:
    """One of `FORMS`, from host to host.

    Args:
        form: Its name.
        model: What the weights were made from, as the export's ``--model``.
        manifest: Of the bundle.
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, form: str, model: str, manifest: Manifest, device: str) -> None:
        weights, _ = WeightSource(model, seed=manifest.model.seed).load()
        dtype = torch.float16 if manifest.precision == "fp16" else torch.float32
        module = FORMS[form](weights, manifest, dtype).eval()
        self.device = device
        module = module.to(device)
        for name in ("tower", "projector"):  # not `pixels`: it normalises in FP32
            getattr(module, name).to(dtype)
        self._run: Any = module
        if form == "pytorch-compile":
            self._run = torch.compile(module, mode=COMPILE_MODE)
        shape = (manifest.batch.max, *(int(extent) for extent in manifest.input.shape[1:]))
        self._staging = torch.empty(shape, dtype=torch.uint8, pin_memory=device == "cuda")

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Return the outputs for uint8 [B, H, W, 3], B the bundle's batch."""
        with torch.inference_mode():
            self._staging.copy_(torch.from_numpy(images))
            embeds, kept = self._run(self._staging.to(self.device, non_blocking=True))
            return {EMBEDS: embeds.cpu().numpy(), KEPT: kept.cpu().numpy()}

    def memory_mib(self) -> float | None:
        """Return the most that PyTorch's allocator held on the GPU; None on the CPU."""
        return torch.cuda.max_memory_reserved() / 2**20 if self.device == "cuda" else None


def multiplications(
    config: VisionConfig, tokens: int, batch: int
) -> list[tuple[int, int, int, int, int]]:
    """Return the matrix multiplications of the encoder, without its dead layers and side branch.

    Args:
        config: The architecture.
        tokens: K, which the projector runs on.
        batch: B.

    Returns:
        (times, matrices at once, M, K, N) each; FLOPs are 2 · product.
    """
    tower, projector, layers = config.tower, config.projector, config.layers_run
    size, width, inner = tower.tokens, tower.hidden_size, tower.intermediate_size
    heads, rows = tower.num_heads, batch * tower.tokens
    return [
        (1, 1, batch * tower.patches, 3 * tower.patch_size**2, width),
        (4 * layers, 1, rows, width, width),
        (layers, batch * heads, size, width // heads, size),
        (layers, batch * heads, size, size, width // heads),
        (layers, 1, rows, width, inner),
        (layers, 1, rows, inner, width),
        (1, 1, batch * tokens, projector.in_features, projector.hidden_features),
        (1, 1, batch * tokens, projector.hidden_features, projector.out_features),
    ]


def flops(config: VisionConfig, tokens: int, batch: int) -> int:
    """Return the FLOPs of `multiplications`, a multiply-add counted as two."""
    return sum(
        2 * times * many * m * k * n
        for times, many, m, k, n in multiplications(config, tokens, batch)
    )


class Ceiling:
    """The encoder's matrix multiplications and nothing between them, as fast as PyTorch has them.

    No engine of this precision can be much faster than this: cuBLAS at the same shapes, outputs in
    place, all launches in one CUDA graph.
    """

    def __init__(self, config: VisionConfig, manifest: Manifest, device: str) -> None:
        dtype = torch.float16 if manifest.precision == "fp16" else torch.float32
        tokens = manifest.selection.dominant + manifest.selection.contextual
        self.flops = flops(config, tokens, manifest.batch.max)
        self._work = []
        for times, many, m, k, n in multiplications(config, tokens, manifest.batch.max):
            left, right = (
                torch.randn(shape, device=device).to(dtype)
                for shape in ((many, m, k), (many, k, n))
            )
            out = torch.empty((many, m, n), dtype=dtype, device=device)
            self._work.append((times, left, right, out))
        self._graph: Any = None
        if device == "cuda":
            self._multiply()  # cuBLAS chooses and allocates outside the graph
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._multiply()

    def _multiply(self) -> None:
        for times, left, right, out in self._work:
            for _ in range(times):
                torch.matmul(left, right, out=out)

    def call(self) -> None:
        """Run them once and wait."""
        if self._graph is None:
            self._multiply()
            return
        self._graph.replay()
        torch.cuda.synchronize()


def _tower(weights: VisionWeights, attention: str, layers: int) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = weights.config.tower
    config = CLIPVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=tower.num_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        hidden_act=tower.activation,
        layer_norm_eps=tower.layer_norm_eps,
        attn_implementation=attention,
    )
    model = CLIPVisionModel(config)
    # A checkpoint may lack the dead last layer and the post-LayerNorm, which change no token.
    model.load_state_dict(_named(weights, "tower."), strict=False)
    return model


def _projector(weights: VisionWeights) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    sizes = weights.config.projector
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=sizes.in_features, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=sizes.out_features, num_attention_heads=1),
        projector_hidden_act=sizes.activation,
        multimodal_projector_bias=sizes.bias,
    )
    module: nn.Module = LlavaMultiModalProjector(config)
    module.load_state_dict(_named(weights, "projector."))
    return module


def _named(weights: VisionWeights, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
