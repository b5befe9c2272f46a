"""Conversations as token ids: the prompts that the LLM is asked with, and the answers it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.llm.chat_template import HubTokenizer
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.calibration.tuning.data import Turn
    from vzip.runtime.llm.local.transformers import TransformersLLM
    from vzip.runtime.llm.prompts import Prompts


@dataclass(frozen=True)
class Example:
    """A conversation of T tokens.

    Attributes:
        ids: int32 [T]; K times the placeholder where the image's tokens go.
        learned: bool [T]; the tokens of the answers and of what closes each.
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]


@dataclass(frozen=True)
class TextBatch:
    """B conversations, padded on the right to T tokens.

    Attributes:
        ids: int64 [B, T].
        mask: int64 [B, T]; 1 for a token, 0 for padding.
        learned: bool [B, T], as `Example.learned`.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    learned: NDArray[np.bool_]


class Wording:
    """Turns conversations into token ids.

    Args:
        llm: The LLM, for its prompts, tokenizer and context.
        tokens: K, the tokens of an image.
    """

    def __init__(self, llm: TransformersLLM, tokens: int) -> None:
        self._prompts: Prompts = llm.text.prompts
        self._tokenizer = HubTokenizer("tune", llm.tokenizer)
        self._context = llm.text.context
        self._tokens = tokens
        self._placeholder = llm.text.prompts.placeholders["image"]

    def example(self, turns: Sequence[Turn]) -> Example:
        """Return a conversation's ids.

        Args:
            turns: At least one.

        Raises:
            InvalidInputError: It is longer than the LLM's context, holds a placeholder, or an
                answer runs into the prompt before it.
            CheckpointError: The LLM's words have no place for an image, or for later turns.
        """
        ids: list[int] = []
        learned: list[bool] = []
        words = self._prompts.words
        for number, turn in enumerate(turns):
            if number == 0:
                prompt = self._expanded(self._prompts.first(turn.question))
                end = words.first["image"].end
            else:
                # Behind what closes the answer before.
                prompt = self._prompts.later(turn.question)
                assert words.later is not None  # `later` checks it
                end = words.later.end
            answer = self._answer(end, turn.answer)
            ids += prompt + answer
            learned += [False] * len(prompt) + [True] * len(answer)
        if self._context is not None and len(ids) > self._context:
            raise InvalidInputError(
                f"has {counted(len(ids), 'token')}",
                expected=f"at most the LLM's context of {self._context}",
            )
        return Example(np.array(ids, np.int32), np.array(learned))

    def batch(self, examples: Sequence[Example]) -> TextBatch:
        """Return conversations as one batch."""
        longest = max(len(example.ids) for example in examples)
        shape = len(examples), longest
        # Under the mask nothing is read, so any ordinary token pads.
        ids = np.full(shape, self._prompts.eos_id, np.int64)
        mask, learned = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, example in enumerate(examples):
            length = len(example.ids)
            ids[row, :length], mask[row, :length] = example.ids, 1
            learned[row, :length] = example.learned
        return TextBatch(ids, mask, learned)

    def _expanded(self, prompt: list[int]) -> list[int]:
        """Return a first turn with K placeholders for its one."""
        place = prompt.index(self._placeholder)
        return [*prompt[:place], *[self._placeholder] * self._tokens, *prompt[place + 1 :]]

    def _answer(self, end: str, answer: str) -> list[int]:
        """Return the ids of an answer and its end, as they follow a prompt that ends with `end`.

        A blank stands between the two, as LLaVA was trained, unless the prompt ends with white
        space of its own (``assistant`` and a new line).
        """
        gap = "" if end[-1:].isspace() else " "
        # As in the whole conversation: a word at the beginning of a text can be another id.
        before = self._encode(end)
        whole = self._encode(end + gap + answer)
        ids = whole[len(before) :]
        if whole[: len(before)] != before or not ids:
            raise InvalidInputError(
                f"has an answer {answer[:40]!r} whose first token runs into the prompt's {end!r}"
            )
        if self._placeholder in ids or self._prompts.ends & set(ids):
            raise InvalidInputError(
                f"has an answer {answer[:40]!r} that holds one of the LLM's special tokens"
            )
        return [*ids, *self._prompts.closing]

    def _encode(self, text: str) -> list[int]:
        """Return a text's ids as they stand behind a special token."""
        return self._tokenizer.encode(self._tokenizer.eos + text, special=False)[1:]
