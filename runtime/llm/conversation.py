"""Conversations with LLMs that run in this process: greedy decoding on a kept KV cache.

An engine offers one step, "these tokens, then which?"; turns, streaming, limits and what happens
after a failure are the same for all of them and are here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.llm import (
    DEFAULT_MAX_NEW_TOKENS,
    LLM,
    Conversation,
    ImageTokens,
    Shown,
    check_context,
    check_max_new_tokens,
    check_question,
    check_shown,
)

if TYPE_CHECKING:
    from vzip.runtime.llm import Embeds
    from vzip.runtime.llm.prompts import Prompts


class GreedyLLM(LLM):
    """An LLM that gives the most probable next token.

    Attributes:
        name: The engine's name.
        prompts: Its prompts.
        eos_ids: Ids that end an answer.
        hidden_size: L, the width of a token.
        context: Longest sequence in tokens; ``None`` when the LLM states none.
        tokens: What the bundle says about its tokens; ``None`` to take any number.
        largest: Largest magnitude that the LLM's dtype can hold.
    """

    prompts: Prompts
    eos_ids: frozenset[int]
    hidden_size: int
    context: int | None
    tokens: ImageTokens | None
    largest: float

    @abstractmethod
    def new_cache(self) -> Any:
        """Return an empty KV cache, which belongs to one conversation."""

    @abstractmethod
    def step(self, ids: list[int], cache: Any, rows: Embeds | None) -> int:
        """Run the LLM over new tokens.

        Args:
            ids: Their ids, [m].
            cache: The KV cache of the tokens before them, which grows by m.
            rows: float32 or float16 [n, L]: what stands at the n placeholders among `ids`, in
                order; ``None`` where a placeholder is a mere word.

        Returns:
            The most probable next id; the lower one of equals.

        Raises:
            BackendError: Out of memory, or a result that is not finite.
        """

    def conversation(
        self, embeds: Embeds | Sequence[Embeds], *, frames: int | None = None
    ) -> GreedyConversation:
        """Begin a conversation; see `LLM.conversation`."""
        return GreedyConversation(self, self.check(embeds, frames))

    def check(
        self, embeds: Embeds | Sequence[Embeds], frames: int | None, *, where: str | None = None
    ) -> Shown:
        """Check what is to be shown; see `vzip.runtime.llm.check_shown`.

        Args:
            embeds: As for `conversation`.
            frames: As for `conversation`.
            where: What messages begin with; None for the engine's name.
        """
        return check_shown(
            where or self.name,
            embeds,
            frames=frames,
            tokens=self.tokens,
            hidden_size=self.hidden_size,
            takes_videos="video" in self.prompts.placeholders,
            largest=self.largest,
        )


class GreedyConversation(Conversation):
    """Questions about images or a video; the KV cache of all turns is kept between them.

    So a later question costs neither vision nor a prefill of what came before it. Decoding is
    greedy: the most probable token each time, until an end-of-sequence token or `max_new_tokens`.
    An answer cut short by that limit, or by the caller who stops reading it, is closed by an
    end-of-sequence token before the next question, as in LLaVA's training.

    Made by `GreedyLLM.conversation`.
    """

    def __init__(self, llm: GreedyLLM, shown: Shown) -> None:
        self._llm = llm
        self._shown = shown
        self._cache: Any = llm.new_cache()
        self._ids: list[int] = []  # what the cache holds
        self._next: int | None = None  # predicted, and not in the cache yet
        self._turn = 0
        self._intact = True

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all tokens in the KV cache, among them a placeholder for each row."""
        return tuple(self._ids)

    def ask(self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> str:
        """Return the answer to the next question; see `stream`."""
        return "".join(self.stream(question, max_new_tokens=max_new_tokens))

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Ask the next question.

        The checks are made by this call; the LLM runs as the pieces are taken.

        Args:
            question: The question, without any prompt around it.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            The pieces of the answer, none of which splits a character; without white space
            around the whole.

        Raises:
            InvalidInputError: The question is empty, contains a placeholder, or does not fit into
                the LLM's context with the turns before it.
            BackendError: The conversation was broken by a call that failed; or (from the
                iterator) the LLM failed.
        """
        name = self._llm.name
        check_question(name, question)
        check_max_new_tokens(name, max_new_tokens)
        if not self._intact:
            raise BackendError(
                f"{name}: an earlier call of this conversation failed halfway, so its KV cache "
                "can't be continued",
                cure="begin a new conversation",
            )
        ids = self._later(question.strip()) if self._ids else self._first(question.strip())
        check_context(
            name,
            cached=len(self._ids),
            new=len(ids),
            max_new_tokens=max_new_tokens,
            context=self._llm.context,
        )
        self._turn += 1
        return self._pieces(ids, max_new_tokens, self._turn)

    def _first(self, question: str) -> list[int]:
        """Return the first turn's ids, with a placeholder for each row."""
        return expand(self._llm.prompts, self._shown, question)

    def _later(self, question: str) -> list[int]:
        """Return the ids that follow those in the cache."""
        ids = [] if self._next is None else [self._next]
        if self._next not in self._llm.eos_ids:
            ids.append(self._llm.prompts.eos_id)
        return ids + self._llm.prompts.later(question)

    def _pieces(self, ids: list[int], max_new_tokens: int, turn: int) -> Iterator[str]:
        """Feed a prompt, then its answer token by token, and yield the answer's text."""
        answer: list[int] = []
        shown = ""
        while len(answer) < max_new_tokens:
            if turn != self._turn:
                raise InvalidInputError(
                    f"{self._llm.name}: this answer was left behind by a later question of the "
                    "same conversation",
                    cure="read an answer to its end before asking on",
                )
            token = self._feed(ids)
            if token in self._llm.eos_ids:
                break
            answer.append(token)
            ids = [token]
            text = self._llm.prompts.decode(answer)
            # U+FFFD at the end is the beginning of a character whose other bytes follow.
            if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        text = self._llm.prompts.decode(answer)
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _feed(self, ids: list[int]) -> int:
        """Put tokens into the cache and return the most probable next one."""
        # Only the first prompt has places for them: a placeholder that the LLM says is a mere word.
        rows = None if self._ids else np.concatenate(self._shown.parts)
        self._intact = False  # until the cache is whole again
        self._next = None
        self._next = self._llm.step(ids, self._cache, rows)
        self._ids += ids
        self._intact = True
        return self._next


def expand(prompts: Prompts, shown: Shown, question: str) -> list[int]:
    """Return the first turn's ids, with as many placeholders as there are rows.

    Raises:
        CheckpointError: The LLM's words have no place for what is shown.
        InvalidInputError: The question contains a placeholder.
    """
    placeholder, parts = prompts.placeholders[shown.kind], iter(shown.parts)
    ids: list[int] = []
    for token in prompts.first(question, shown.kind, len(shown.parts)):
        ids += [token] * (len(next(parts)) if token == placeholder else 1)
    return ids
