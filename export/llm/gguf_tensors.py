"""The tensors of an LLM: which there are, where the checkpoint has them, what they are in a GGUF.

Names are the package gguf's; forms are from llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch

from vzip.export.checkpoint.containers import read_index, read_tensors, tensor_names
from vzip.export.checkpoint.folders import Folder
from vzip.export.checkpoint.leftovers import check_llm_leftovers
from vzip.export.checkpoint.store import INDEX_SUFFIX, SINGLE_FILES
from vzip.export.checkpoint.tensor_names import Part, missing, resolve
from vzip.export.checkpoint.weights import check_tensor
from vzip.runtime.errors import CheckpointError
from vzip.runtime.wording import counted

Arch = Literal["llama", "qwen2", "qwen2vl"]

ARCHS: Final[Mapping[str, Arch]] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""A text configuration's ``model_type`` → llama.cpp's name of the architecture."""

SECTIONED: Final[Arch] = "qwen2vl"
"""The one that takes positions with gaps: Qwen2's, whose rotary embeddings have sections (M-RoPE).
With one section alone they are the ordinary ones.
"""

_DECODER: Final = Part(
    canonical="decoder.",
    prefixes=(
        "language_model.model.",  # as published
        "model.language_model.",  # transformers from 4.52
    ),
)
_HEAD: Final = Part(canonical="lm_head.", prefixes=("language_model.lm_head.", "lm_head."))

EMBEDDINGS: Final = "decoder.embed_tokens.weight"
HEAD: Final = "lm_head.weight"


@dataclass(frozen=True)
class Sizes:
    """An LLM's architecture.

    Attributes:
        arch: llama.cpp's name of it.
        layers: Number of layers.
        hidden_size: L.
        intermediate_size: Width inside the MLP.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        rows: Rows of the embeddings; at least as many as there are tokens.
        context: Longest sequence that it was made for.
        rms_eps: Of its norms.
        rope_theta: Base of the rotary frequencies.
        biased: Whether the checkpoint has biases of queries, keys and values. The file has them
            where the architecture wants them, as zeros if the checkpoint hasn't.
        tied: Whether the embeddings serve as head.
    """

    arch: Arch
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    context: int
    rms_eps: float
    rope_theta: float
    tied: bool
    biased: bool

    @classmethod
    def of(cls, config: Any, *, positions: bool = False) -> Sizes:
        """Read the configuration of a LLaVA.

        Args:
            config: transformers' object.
            positions: Whether the file is to take positions with gaps.

        Raises:
            CheckpointError: llama.cpp has no such LLM.
        """
        text = config.get_text_config()
        kind = text.model_type
        if kind not in ARCHS:
            raise CheckpointError(
                f"convert: the LLM is a {kind!r} model",
                expected=f"one of {', '.join(ARCHS)}, which LLaVAs have",
                cure="make the GGUF with llama.cpp's own convert_hf_to_gguf.py, if that knows it",
            )
        rope = text.rope_parameters
        wrong = {
            "hidden_act": (text.hidden_act, "silu"),
            "rope_type": (rope["rope_type"], "default"),
            "attention_bias": (getattr(text, "attention_bias", False), False),
            "mlp_bias": (getattr(text, "mlp_bias", False), False),
        }
        for key, (got, expected) in wrong.items():
            if got != expected:
                raise CheckpointError(
                    f"convert: the LLM's {key} is {got!r}",
                    expected=f"{expected!r}, as LLaVAs' are",
                    cure="make the GGUF with llama.cpp's own convert_hf_to_gguf.py",
                )
        # llama.cpp has no sliding window for these; within one, there is no difference.
        window = getattr(text, "sliding_window", None)
        context = int(text.max_position_embeddings)
        return cls(
            arch=SECTIONED if positions else ARCHS[kind],
            layers=int(text.num_hidden_layers),
            hidden_size=int(text.hidden_size),
            intermediate_size=int(text.intermediate_size),
            heads=int(text.num_attention_heads),
            kv_heads=int(text.num_key_value_heads),
            head_dim=int(
                getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            ),
            rows=int(text.vocab_size),
            context=context if window is None else min(context, int(window)),
            rms_eps=float(text.rms_norm_eps),
            rope_theta=float(rope["rope_theta"]),
            tied=bool(config.tie_word_embeddings or text.tie_word_embeddings),
            biased=kind == "qwen2",
        )

    def zeros(self) -> dict[str, tuple[int, ...]]:
        """Return the canonical names and shapes of biases that the file has as zeros."""
        if self.arch == "llama" or self.biased:
            return {}
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            f"decoder.layers.{index}.self_attn.{name}_proj.bias": (rows,)
            for index in range(self.layers)
            for name, rows in (("q", queries), ("k", keys), ("v", keys))
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the canonical names of all tensors and their shapes in a checkpoint."""
        width, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (self.rows, width)}
        for index in range(self.layers):
            layer = f"decoder.layers.{index}"
            shapes[f"{layer}.input_layernorm.weight"] = (width,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
                if self.biased:
                    shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (width, queries)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
            shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, width)
            shapes[f"{layer}.mlp.up_proj.weight"] = (inner, width)
            shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes["decoder.norm.weight"] = (width,)
        return shapes if self.tied else {**shapes, HEAD: (self.rows, width)}


@dataclass(frozen=True)
class Stored:
    """Where a checkpoint's folder has the tensors of its LLM.

    Attributes:
        folder: The folder.
        sizes: The architecture.
        names: Canonical name → name in the file.
        files: Canonical name → file name.
        source: Where the names were read, for messages.
    """

    folder: Folder
    sizes: Sizes
    names: Mapping[str, str]
    files: Mapping[str, str]
    source: str

    @classmethod
    def find(cls, folder: Folder, sizes: Sizes) -> Stored:
        """Look for all of them, by their names alone.

        Raises:
            CheckpointError: One is missing or there twice, or there is no file of tensors.
        """
        files, source = _files(folder)
        wanted = list(sizes.shapes())
        names: dict[str, str] = {}
        for part in (_DECODER, _HEAD):
            mine = [name for name in wanted if name.startswith(part.canonical)]
            found = resolve(part, mine, files, source=source)
            for name in mine:
                if name not in found:
                    check_llm_leftovers(files, where=source, signs_alone=True)
                    raise missing(part, name, files, source=source)
            names |= found
        llm = (*_DECODER.prefixes, *_HEAD.prefixes)
        left = {name for name in files if name.startswith(llm)} - set(names.values())
        check_llm_leftovers(left - set(_HEAD.stored(HEAD)) if sizes.tied else left, where=source)
        # Sorted by file, so that from a hub one after the other is fetched.
        order = sorted(wanted, key=lambda name: files[names[name]])
        return cls(
            folder,
            sizes,
            {name: names[name] for name in order},
            {name: files[names[name]] for name in order},
            source,
        )

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield canonical names and tensors, mapped from their files, in the order of `names`.

        Raises:
            CheckpointError: A file is missing or damaged, or a tensor has another shape or dtype.
        """
        shapes = self.sizes.shapes()
        for name, stored in self.names.items():
            path = self.folder.find(self.files[name])
            if path is None:
                count = sum(file == self.files[name] for file in self.files.values())
                raise self.folder.missing(
                    [self.files[name]],
                    purpose=f"{counted(count, 'tensor')} of the LLM that {self.source} places "
                    "there",
                )
            tensor = read_tensors(path, [stored])[stored]
            check_tensor(stored, tensor, shapes[name], source=self.source)
            yield name, tensor


def gguf_names(sizes: Sizes) -> dict[str, str]:
    """Return canonical name → name in a GGUF, which the package gguf knows by transformers' own."""
    import gguf

    arch = gguf.MODEL_ARCH[sizes.arch.upper()]
    table = gguf.get_tensor_name_map(arch, sizes.layers)
    names: dict[str, str] = {}
    for name in (*sizes.shapes(), *sizes.zeros()):
        known = table.get_name(name.replace(_DECODER.canonical, "model.", 1), (".weight", ".bias"))
        assert known is not None, name
        names[name] = known
    return names


def gguf_tensor(name: str, tensor: torch.Tensor, sizes: Sizes) -> np.ndarray[Any, Any]:
    """Return a tensor as a GGUF holds it.

    Vectors are float32, which llama.cpp's arithmetic takes; matrices keep their dtype.

    Args:
        name: Its canonical name.
        tensor: As the checkpoint has it.
        sizes: The architecture.

    Returns:
        The values; bfloat16 as uint16.
    """
    if sizes.arch == "llama":
        if name.endswith("q_proj.weight"):
            tensor = _paired(tensor, sizes.heads)
        elif name.endswith("k_proj.weight"):
            tensor = _paired(tensor, sizes.kv_heads)
    if tensor.ndim == 1:
        tensor = tensor.float()
    elif tensor.dtype == torch.bfloat16:
        tensor = tensor.contiguous().view(torch.uint16)
    array: np.ndarray[Any, Any] = np.ascontiguousarray(tensor.numpy())
    return array


def _paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of each head that rotate together beside each other.

    transformers turns row i of a head with row i + half, llama.cpp's "llama" with row i + 1.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])  # [heads, 2, head_dim/2, L]
    return halves.transpose(1, 2).reshape(weight.shape)


def _files(folder: Folder) -> tuple[Mapping[str, str], str]:
    """Return name in the file → file name of all tensors in a folder, and where they were read."""
    for single in SINGLE_FILES:
        path = folder.find(single)
        if path is not None:
            return dict.fromkeys(tensor_names(path), single), str(path)
        index = folder.find(single + INDEX_SUFFIX)
        if index is not None:
            return read_index(index), str(index)
    raise folder.missing(
        [*SINGLE_FILES, *(single + INDEX_SUFFIX for single in SINGLE_FILES)],
        purpose="the tensors of the LLM",
    )
