"""Sizes of LLMs that benchmarks run; `llm_random` makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from vzip.export.plan.llm_cost import LlmShape, llm_shape
from vzip.runtime.models import locate

IMAGE = 4  # id of the placeholder in the demo's vocabulary
WORD = 300  # id of a token of text; any serves


@dataclass(frozen=True)
class Llm:
    """A published LLM's sizes.

    Attributes:
        name: Its name.
        layers: T.
        hidden_size: d.
        intermediate_size: m.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        vocabulary: Rows of its table of embeddings and of its head.
        context: Tokens that it is opened for. TinyLlama was trained with 2048, which LLaVA-NeXT's
            2880 exceed; no weight depends on it.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_064  # Llama's 32,000 and LLaVA's padding
    context: int = 4096

    def config(self) -> dict[str, Any]:
        """Return the ``config.json`` of a LLaVA with this LLM and the demo's tiny tower."""
        folder = locate("demo").folder
        assert folder is not None
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        config["dtype"] = "bfloat16"
        config["text_config"] |= {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden_size // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
        }
        return config

    def shape(self, dtype: str) -> LlmShape:
        """Return what the cost model takes; `dtype` is the KV cache's."""
        return replace(llm_shape(self.config()["text_config"]), dtype=dtype)

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        width, kv = self.hidden_size, self.hidden_size // self.heads * self.kv_heads
        layer = 2 * width * width + 2 * width * kv + 3 * width * self.intermediate_size + 2 * width
        return self.layers * layer + 2 * self.vocabulary * width + width


LLMS = {
    each.name: each
    for each in (
        Llm("tinyllama-1.1b", 22, 2048, 5632, 32, 4),
        Llm("llama-2-7b", 32, 4096, 11008, 32, 32),
        # For trying the benchmark and for its tests; no table has it.
        Llm("tiny", 2, 64, 160, 4, 2, vocabulary=512),
    )
}
