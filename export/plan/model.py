"""What a model takes, counted from its configuration: work and weights of vision side and LLM.

Unlike `vzip.export.plan.llm_cost`, whose form is the paper's, the LLM's work is counted here as it
is done: grouped keys and values, three matrices in the feed-forward part, half of the attention's
square, and the output layer for one token. A multiply-add counts as two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from vzip.export import defaults
from vzip.export.algorithm.budget import Budget
from vzip.export.architecture import VisionConfig, needed_tensors, tensor_shapes
from vzip.export.plan.llm_cost import LlmShape, llm_shape, text_config
from vzip.runtime.errors import CheckpointError
from vzip.runtime.models import locate

# Of all patches, what the paper gives: 64, 128 and 192 of 576; per tile 32, 64 and 128; 17 of a
# frame's 256 and, as it names no others, twice and four times that.
_SHARES: Final[Mapping[str, tuple[float, ...]]] = {
    "image": (1 / 9, 2 / 9, 3 / 9),
    "tile": (1 / 18, 2 / 18, 4 / 18),
    "frame": (1 / 15, 2 / 15, 4 / 15),
}


@dataclass(frozen=True)
class PlanModel:
    """A model, as far as its cost goes.

    Attributes:
        name: What was asked for.
        vision: The architecture of its vision side.
        llm: Sizes of its language model.
        heads: Heads of queries.
        vocabulary: Rows of the embedding.
        tied: Whether the output layer is the embedding.
    """

    name: str
    vision: VisionConfig
    llm: LlmShape
    heads: int
    vocabulary: int
    tied: bool

    @property
    def unit(self) -> str:
        """What a budget counts the tokens of: image, tile or frame."""
        if self.vision.tiling is not None:
            return "tile"
        return "frame" if self.vision.media == "video" else "image"

    @property
    def units(self) -> int:
        """How many of them make one input: the most tiles, up to ten, or eight frames."""
        return defaults.batch(self.vision).size

    @property
    def patches(self) -> int:
        """Tokens of a unit that the LLM gets without VisionZip."""
        return math.prod(self.vision.grid)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Tokens of a unit that are worth a look: the paper's, or as large a share as those."""
        return tuple(round(share * self.patches) for share in _SHARES[self.unit])

    @property
    def largest_budget(self) -> int:
        """The most tokens of a unit that still are fewer than its patches."""
        return self.patches - 1

    def budget(self, tokens: int) -> Budget:
        """Return a budget as `vzip export --tokens` takes it.

        Raises:
            BudgetError: It is too small or doesn't fit.
        """
        return Budget.from_options(self.vision, tokens=tokens)

    @cached_property
    def vision_parameters(self) -> int:
        """Numbers that tower and projector hold, without the dead layers."""
        shapes = tensor_shapes(self.vision)
        return sum(math.prod(shapes[name]) for name in needed_tensors(self.vision))

    def vision_flops(self, tokens: int) -> tuple[int, int]:
        """Return the work of all units of an input: linear layers, and products of attention.

        Args:
            tokens: K, which the projector runs on.
        """
        from vzip.export.bench.peers.ceiling import multiplications

        linear = attention = 0
        for times, many, m, k, n in multiplications(self.vision, tokens, self.units):
            work = 2 * times * many * m * k * n
            if many == 1:
                linear += work
            else:
                attention += work
        return linear, attention

    def llm_tokens(self, tokens: int, text_tokens: int) -> int:
        """Return n, what the LLM gets: the text and K tokens of each unit."""
        return text_tokens + self.units * tokens

    @property
    def linear_parameters(self) -> int:
        """Numbers in the matrices of the LLM's layers, each of which every token is put through."""
        d, m, width = self.llm.hidden_size, self.llm.intermediate_size, self.llm.head_dim
        attention = 2 * d * self.heads * width + 2 * d * self.llm.kv_heads * width
        return self.llm.layers * (attention + 3 * d * m)

    @property
    def output_parameters(self) -> int:
        """Numbers in the output layer, which the last token is put through."""
        return self.vocabulary * self.llm.hidden_size

    @property
    def llm_parameters(self) -> int:
        """Numbers that the LLM holds; biases, a ten-thousandth, are not counted."""
        embeddings = self.output_parameters * (1 if self.tied else 2)
        norms = (2 * self.llm.layers + 1) * self.llm.hidden_size
        return embeddings + self.linear_parameters + norms

    @property
    def read_parameters(self) -> int:
        """Numbers that are read for each token of the answer: not the embedding's other rows."""
        return self.linear_parameters + self.output_parameters

    def prefill_flops(self, n: int) -> int:
        """Return the work of a prefill of n tokens as it is done; see this module."""
        attention = self.llm.layers * 2 * n * n * self.heads * self.llm.head_dim
        return 2 * n * self.linear_parameters + attention + 2 * self.output_parameters


def read_model(model: str | os.PathLike[str]) -> PlanModel:
    """Read a model's configuration; published repositories behind the aliases are known by heart.

    Raises:
        CheckpointError: It isn't there, isn't known, or its language model is of another kind.
    """
    from vzip.export.checkpoint.reader import Checkpoint, vision_config
    from vzip.export.families import families

    vision, hub_id = vision_config(model), locate(model).hub_id
    known = [each.published for each in families().values()]
    published = {name: each for one in known for name, each in one.items()}
    if hub_id is not None and hub_id in published:
        config = published[hub_id].config
    else:
        config = Checkpoint.open(model).config
    text: Mapping[str, Any] = text_config(config)
    if text.get("hidden_act") != "silu":
        raise CheckpointError(
            f"config.json: the language model's hidden_act is {text.get('hidden_act')!r}",
            expected="'silu', with which its feed-forward part has three matrices",
            cause="what another kind costs isn't known here",
        )
    llm, sizes = llm_shape(config), []
    for name in ("num_attention_heads", "vocab_size"):
        value = text.get(name)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"config.json: the language model's {name} is {value!r}",
                expected="an integer above 0",
                cause="it is damaged, or of a model that vzip doesn't know",
            )
        sizes.append(value)
    tied = bool(text.get("tie_word_embeddings", False))
    return PlanModel(os.fspath(model), vision, llm, sizes[0], sizes[1], tied)
