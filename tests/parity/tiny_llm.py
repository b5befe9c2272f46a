"""Tiny LLaVAs with random weights, and a tokenizer, trained on two sentences, of three kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
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

from vzip.runtime.llm.local.transformers import CLASSES

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
IMAGE = SPECIAL.index("<image>")
CORPUS = ["USER: what is the shape? ASSISTANT: it is a red circle", "\nis there a 7 below it?"]


def make_tokenizer(
    kind: str = "bytes", special: tuple[str, ...] = SPECIAL
) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer.

    Args:
        kind: "bytes"; "llama", which puts a mark before every piece of text between special
            tokens; or "first", which puts it before the first piece alone (Llama's newer form).
        special: Special tokens, whose ids are their places; `SPECIAL` and more.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    elif kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = []
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        # Llama's vocabulary has no entry that goes on beyond a word.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


WIDTH, SIDE, PATCHES = 64, 56, 16
LLMS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}
TOWERS = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def tiny_llava(
    model_type: str, llm: str, tower: str, text: dict[str, Any], silent: int = 0, **settings: Any
) -> Any:
    """A LLaVA of any family with random weights, the same whenever it is made.

    Args:
        model_type: The family's class, by its configuration.
        llm: A key of `LLMS`.
        tower: A key of `TOWERS`.
        text: Settings of the LLM, beyond `TEXT`.
        silent: How many tokens, from 0 on, are never said: special ones.
        settings: Other settings of the configuration.
    """
    torch.manual_seed(7)
    vision = TOWERS[tower](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    made = getattr(transformers, CLASSES[model_type])
    several = {"image_token_index": IMAGE, "image_seq_length": PATCHES} | settings
    several.setdefault("tie_word_embeddings", False)
    config = made.config_class(
        vision_config=vision, text_config=LLMS[llm](**{**TEXT, **text}), **several
    )
    model = made(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_tower" not in name:
                parameter.mul_(6)  # at the usual scale every answer is one token repeated
        model.lm_head.weight[:silent] = 0
    return model


def embeds_of(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Tokens of an image, float32 [count, width]."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, width)).astype(np.float32)
