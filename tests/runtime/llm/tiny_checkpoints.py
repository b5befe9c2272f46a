"""Tiny LLaVA checkpoints with the tokenizers that llama.cpp runs: SentencePiece and Qwen2's BPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.parity.tiny_llm import tiny_llava

MARK = "\u2581"
CORPUS = [
    "USER: what is the shape? ASSISTANT: it is a red circle",
    "\nis there a 7 below it?  don't you see three    of them",
    "<|im_start|>user assistant 12 345 caf\u00e9",
] * 4
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPECIAL = ("<image>", "<pad>")
WIDTH = 48

# As Qwen's published templates: nothing before the first turn, and an end after each.
CHAT_ML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pieces() -> list[str]:
    """SentencePiece's pieces of more than one letter, best first, and then its letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    return [MARK * 2, MARK * 4, *(p for p in learned if len(p) > 1)] + [
        p for p in learned if len(p) == 1
    ]


def all_merges(ordered: list[str]) -> list[tuple[str, str]]:
    """Every two pieces that make a piece, in the order of what they make."""
    known = set(ordered)
    return [
        (piece[:place], piece[place:])
        for piece in ordered
        for place in range(1, len(piece))
        if {piece[:place], piece[place:]} <= known
    ]


def sentencepiece(
    form: str = "prepend", *, merges: list[tuple[str, str]] | None = None, **model: Any
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of Llama's kind.

    Args:
        form: "prepend", as the published tokenizer.json of Llama; or "always" and "first", the
            two schemes of Metaspace that transformers makes Llama's tokenizer with.
        merges: Others than all.
        model: Other settings of the model.
    """
    ordered = pieces()
    texts = ["<unk>", "<s>", "</s>", *BYTES, *ordered]
    settings = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **model}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate(texts)},
            merges=all_merges(ordered) if merges is None else merges,
            **settings,
        )
    )
    if form == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<unk>", "<s>", "</s>", *SPECIAL)
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def qwen2() -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of transformers' own class for Qwen2."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    import json

    model = json.loads(trained.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<image>", "<video>"]}
    )
    return tokenizer


def save_checkpoint(
    folder: Path,
    tokenizer: transformers.PreTrainedTokenizerBase,
    llm: str = "llama",
    *,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    width: int = WIDTH,
    shards: str = "5GB",
    **text: Any,
) -> torch.nn.Module:
    """Write a LLaVA with random weights and return the model.

    Args:
        folder: Where to.
        tokenizer: Its tokenizer.
        llm: "llama", "mistral" or "qwen2" (as LLaVA-OneVision, with a placeholder for videos).
        template: Its chat template.
        dtype: Of all weights.
        padding: Rows of the embeddings beyond the tokens.
        width: L.
        shards: Largest size of a file.
        text: Other settings of the LLM.
    """
    settings = {
        "hidden_size": width,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + padding,
        "rms_norm_eps": 3e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **text,
    }
    kinds = ("image", "video") if llm == "qwen2" else ("image",)
    places = {f"{it}_token_index": tokenizer.convert_tokens_to_ids(f"<{it}>") for it in kinds}
    kind, tower = ("llava_onevision", "siglip") if llm == "qwen2" else ("llava", "clip")
    tied = bool(text.get("tie_word_embeddings", False))
    model = tiny_llava(kind, llm, tower, settings, tie_word_embeddings=tied, **places)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "vision_tower" not in name:  # ones would hide a mix-up
                scale = 0.3 if "norm" in name else 0.5
                parameter.add_(scale * torch.randn_like(parameter))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return model
