"""The encoder in PyTorch, as published and at its best.

All take uint8 [B, H, W, 3] on the host and give `image_embeds` [B, K, L] and `kept_indices`
[B, dominant] on the host, as `VisionEncoder.run` does, and merge as the bundle says. The weights
are the bundle's: drawn from its seed, or read from its checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vzip.export.algorithm.budget import Budget
from vzip.export.algorithm.visionzip import apply_plan, cls_scores, make_plan
from vzip.export.architecture import VisionConfig
from vzip.export.bench.peers import PUBLISHED, UNCOMPRESSED, Device, Outputs, prove
from vzip.export.bench.peers.ceiling import flops
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.pipeline import WeightSource
from vzip.runtime.agreement import (
    UNCOMPRESSED_PEER,
    Agreement,
    Choices,
    Reference,
    Run,
    Values,
)
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS, Manifest
from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle


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
        self._merged: tuple[Tensor, ...] = ()  # of the last call
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
        self._merged = kept, rest, targets, merged, assigned
        counts = assigned.sum(dim=1)[..., None]  # [B, contextual, 1]
        sums = torch.bmm(assigned.transpose(1, 2), features[:, merged])
        if self.selection.merge == "sum":
            formed = features[:, targets] + sums / counts.clamp(min=1)
        else:
            formed = (features[:, targets] + sums) / (counts + 1)
        return torch.cat([dominant, formed], dim=1), kept.sort(dim=1).values

    @property
    def token_weights(self) -> Tensor:
        """Return what went into which token in the last call: [B, K, S], not 0 where it did."""
        kept, rest, targets, merged, assigned = self._merged
        batch, size = rest.shape
        weights = torch.zeros((batch, self.selection.tokens, size), device=rest.device)
        rows = torch.arange(self.selection.dominant, device=rest.device)
        for picture in range(batch):
            weights[picture, rows, kept[picture].sort().values] = 1
            left = rest[picture].nonzero()[:, 0]
            below = weights[picture, self.selection.dominant :]
            below[torch.arange(len(targets), device=rest.device), left[targets]] = 1
            below[:, left[merged]] = assigned[picture].T.float()
        return weights


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
        self.budget = Budget.of(manifest.selection)
        self.token_weights: Tensor | None = None  # of the last call

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
        plan = make_plan(scores, wide, self.budget)
        if not torch.compiler.is_compiling():
            self.token_weights = plan.token_weights
        return self.projector(apply_plan(plan, hidden)), plan.kept


class Uncompressed(Sdpa):
    """The same without VisionZip: the projector runs on every patch, as in LLaVA itself."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode uint8 [B, H, W, 3] to embeds [B, N, L] and the patches' tokens [B, N]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(self.pixels(images)))
        for layer in self.tower.encoder.layers:
            hidden = layer(hidden, None)
        tokens = torch.arange(1, hidden.shape[1], device=hidden.device)
        return self.projector(hidden[:, 1:]), tokens.expand(len(hidden), -1)


DYNAMIC = "torch-dynamic"
COMPILED = "torch-compile"
FORMS: dict[str, Callable[[VisionWeights, Manifest, torch.dtype], nn.Module]] = {
    PUBLISHED: Published,
    "torch-sdpa": Sdpa,
    DYNAMIC: Sdpa,
    COMPILED: Sdpa,
    UNCOMPRESSED: Uncompressed,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES["int8"] = torch.float32  # around the 8-bit products of `DYNAMIC`

# CUDA graphs on a GPU; the matrix multiplications are cuBLAS's in any mode. On a CPU the weights
# are constants, which oneDNN then keeps in its own layout.
_COMPILE: dict[Device, dict[str, Any]] = {
    "cuda": {"mode": "reduce-overhead"},
    "cpu": {"options": {"freezing": True}},
}


class TorchEncoder:
    """One of `FORMS`, from host to host; see `Peer`.

    Args:
        form: Its name.
        precision: Of weights and activations, a key of `DTYPES`.
        bundle: Whose weights are drawn or read again, as its manifest names them.
        device: ``cuda`` or ``cpu``.

    Raises:
        InvalidInputError: The bundle is none of those that these forms can be.
        CheckpointError: Its checkpoint can't be read.
    """

    def __init__(self, form: str, precision: str, bundle: Bundle, device: Device) -> None:
        weights = _weights(bundle.manifest)
        dtype, self._config = DTYPES[precision], weights.config
        module = FORMS[form](weights, bundle.manifest, dtype).eval()
        self._bundle, self._form = bundle, form
        self._precision, self._device = precision, device
        module = module.to(device)
        for name in ("tower", "projector"):  # not `pixels`: it normalises in FP32
            getattr(module, name).to(dtype)
        if form == DYNAMIC:
            # Deprecated for torchao, which has no such kernels for CPUs without a compiler.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            quantise: Any = torch.ao.quantization.quantize_dynamic
            quantise(module, {nn.Linear}, dtype=torch.qint8, inplace=True)
        self._run: Any = module
        if form == COMPILED:
            self._run = torch.compile(module, dynamic=False, **_COMPILE[device])
        self._staging: dict[int, Tensor] = {}

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Return the outputs for uint8 [B, H, W, 3]; see `Peer`. BF16 is widened on the host."""
        with torch.inference_mode() if self._device == "cuda" else torch.no_grad():
            if len(images) not in self._staging:
                pinned = self._device == "cuda"
                buffer = torch.empty(images.shape, dtype=torch.uint8, pin_memory=pinned)
                self._staging[len(images)] = buffer
            staging = self._staging[len(images)]
            staging.copy_(torch.from_numpy(images))
            embeds, kept = self._run(staging.to(self._device, non_blocking=True))
            embeds = embeds.cpu()
            wide = embeds.float() if embeds.dtype == torch.bfloat16 else embeds
            return {EMBEDS: wide.numpy(), KEPT: kept.cpu().numpy()}

    def prove(
        self, reference: Reference, batches: Sequence[int], keys: NDArray[Any] | None = None
    ) -> Mapping[str, Any]:
        """See `Peer`."""
        if self._form == UNCOMPRESSED:
            return _prove_patches(self.run, reference, batches, self._precision)
        return prove(
            self.run, reference, self._bundle, batches, self._precision,
            keys=keys, merging=None if self._form == COMPILED else self._merging,
        )  # fmt: skip

    def _merging(self, images: NDArray[np.uint8]) -> Outputs:
        """Return what `run` does, and ``token_weights``."""
        outputs = self.run(images)
        weights = self._run.token_weights
        assert isinstance(weights, Tensor)
        return {**outputs, TOKEN_WEIGHTS: weights.float().cpu().numpy()}

    def about(self, batch: int) -> Mapping[str, Any]:
        """See `Peer`."""
        found: dict[str, Any] = {}
        if self._device == "cuda":
            found["torch_reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
        if self._form == UNCOMPRESSED:
            found["flops"] = flops(self._config, self._config.tower.patches, batch)
        return found


def _prove_patches(
    run: Run, reference: Reference, batches: Sequence[int], precision: str
) -> dict[str, Any]:
    """Compare the patches that the reference keeps with what an encoder of all patches gives."""
    found = []
    for size in batches:
        for first in range(0, len(reference.input), size):
            chosen = np.arange(first, first + size) % len(reference.input)
            embeds = run(np.ascontiguousarray(reference.input[chosen]))[EMBEDS]
            for picture, tokens in zip(chosen, embeds, strict=True):
                kept = reference.kept[picture]
                patches = kept > 0  # CLS is no patch
                expected = reference.embeds[picture, : len(kept)][patches]
                values = Values.of(expected, tokens[kept[patches] - 1], np.abs(expected).max())
                none = Choices(0, np.zeros(0))
                found.append(Agreement(np.ones(1), none, values, Values(np.zeros(0))))
    agreement = Agreement.of_all(found)
    return {
        "images": len(reference.input),
        "min_cosine": agreement.kept.lowest,
        "mean_cosine": agreement.kept.mean,
        "passed": not UNCOMPRESSED_PEER[precision].judge(agreement),
    }


def _weights(manifest: Manifest) -> VisionWeights:
    """Return the bundle's weights, from its seed or checkpoint, if these forms can have them."""
    model = manifest.model
    if model.projector is not None:
        raise InvalidInputError(
            "the bundle has a tuned projector, whose file is not in it",
            cause="PyTorch's forms would need it",
            cure="compare a bundle that was exported without --projector",
        )
    weights, _ = WeightSource.of(model).load()
    config = weights.config
    lacking = {
        "a tower without CLS": config.tower.kind != "clip",
        "features of several layers": len(config.feature_layers) > 1,
        "pooled tokens": config.pool > 1,
        "another input than 'image'": manifest.input.name != "image",
        f"the selection '{manifest.selection.method}'": manifest.selection.method != "visionzip",
        "a budget without CLS": not manifest.selection.cls_token,
        "a LayerNorm in the projector": config.projector.norm_eps is not None,
    }
    if unlike := [what for what, true in lacking.items() if true]:
        raise InvalidInputError(
            f"the bundle has {' and '.join(unlike)}",
            expected=(
                "LLaVA's tower and projector, which is what VisionZip was published for and what "
                "PyTorch's forms are"
            ),
        )
    return weights


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
