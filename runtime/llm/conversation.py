"""The one turn protocol: how questions follow each other in a conversation, whatever runs the LLM.

`Turns` says what is checked before a question is asked, what streaming shows, what happens after a
failure, and what of an answer counts that was cut short or left unread. `TokenConversation` says
how the ids of turns follow each other, `GreedyConversation` how a KV cache in this process follows
them. A kind of LLM adds how its answer comes.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.guard import guarded
from vzip.runtime.llm.contract import DEFAULT_MAX_NEW_TOKENS, LLM, Conversation
from vzip.runtime.llm.shown import NO_POSITIONS
from vzip.runtime.tokens.positions import along, check_ascending, left_out
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.llm.shown import Embeds, Given, Shown
    from vzip.runtime.llm.text_side import TextSide
    from vzip.runtime.tokens.positions import Positions

T = TypeVar("T")


def check_question(name: str, question: str) -> None:
    """Check a question before it is made into tokens.

    Args:
        name: The LLM's name, for the message.
        question: The question.

    Raises:
        InvalidInputError: It is empty, or text that has no UTF-8 form.
    """
    if not question.strip():
        raise InvalidInputError(
            f"{name}: the question is empty", cure="ask something about what is shown"
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{name}: the question is not valid Unicode text (at character {error.start})",
            cure="give it in UTF-8",
        ) from error


def check_max_new_tokens(name: str, max_new_tokens: int) -> None:
    """Check the limit on an answer's length.

    Raises:
        InvalidInputError: It is below 1.
    """
    if max_new_tokens < 1:
        raise InvalidInputError(
            f"{name}: got a limit of {max_new_tokens} new tokens", expected="1 or more"
        )


def check_context(
    name: str, *, earlier: int, new: int, max_new_tokens: int, context: int | None
) -> None:
    """Check that the prompt and the longest answer fit into the LLM's context.

    Args:
        name: The LLM's name, for the message.
        earlier: Tokens of the turns before, the image's included.
        new: Tokens that this turn adds before the answer.
        max_new_tokens: Longest answer.
        context: The LLM's context in tokens; ``None`` when it states none.

    Raises:
        InvalidInputError: They don't fit.
    """
    total = earlier + new + max_new_tokens
    if context is not None and total > context:
        before = f"{earlier} of earlier turns, " if earlier else ""
        cure = "begin a new conversation" if earlier else "ask a shorter question"
        raise InvalidInputError(
            f"{name}: {before}{new} of this prompt and {max_new_tokens} for the answer make "
            f"{counted(total, 'token')}",
            expected=f"at most {context}, the LLM's context",
            cure=f"{cure} or allow a shorter answer (--max-new-tokens)",
        )


class Spoken(NamedTuple):
    """What an answer took, where the LLM's tokens are counted here.

    Attributes:
        prompt: Tokens of all turns before it and of its question.
        tokens: Its own, the one that ended it included.
        ended: Whether the LLM ended it, and not the limit.
    """

    prompt: int
    tokens: int
    ended: bool


def beyond(name: str, max_new_tokens: int, reached: int, trained: int) -> str:
    """Say why tokens get consecutive positions where their own pass the LLM's context."""
    return (
        f"{name}: tokens get consecutive positions, since with their own and {max_new_tokens} new "
        f"ones the LLM would be at {reached}, beyond the {trained} that it was trained with"
    )


class Turns(Conversation, Generic[T]):
    """Turns of a conversation: a history, to which each question and its answer are added.

    * The checks of a question are made by the call of `stream`; the LLM runs as pieces are taken.
    * No piece splits a character, and there is no white space around the whole.
    * An answer counts as far as it came, whether `max_new_tokens` or the caller cut it short. One
      that a later question left behind can't be read on.
    * A question whose answer failed is taken back, so that it can be asked again. One whose answer
      was never read was never asked.

    A subclass gives `_asked` and `_answers`. It unsets `_intact` where a failure left something
    behind that can't be taken back.

    Args:
        name: The LLM's name, for messages.
        shown: What the first turn shows.

    Attributes:
        shown: As given.
        spoken: What the last answer took; None where an LLM server counts.
    """

    def __init__(self, name: str, shown: Shown) -> None:
        self.shown = shown
        self.spoken: Spoken | None = None
        self._name = name
        self._history: list[T] = []
        self._intact = True
        self._turn = 0
        self._answer: Generator[tuple[list[T], str], None, None] | None = None

    @property
    def positions(self) -> Positions:
        """Which positions the tokens of what is shown have; see `Conversation`."""
        return self.shown.positions

    @abstractmethod
    def _asked(self, question: str, max_new_tokens: int) -> list[T]:
        """Return the history with a question at its end.

        Raises:
            InvalidInputError: The question can't be asked.
        """

    @abstractmethod
    def _answers(
        self, asked: list[T], max_new_tokens: int
    ) -> Generator[tuple[list[T], str], None, None]:
        """Yield the history with the answer so far, and its text, as often as there is more of it.

        The text has no white space around it. It is yielded at least once for a whole answer.
        """

    @abstractmethod
    def _said(self, answer: str) -> list[T]:
        """Return an answer, as it stands in the history behind its question."""

    def resume(self, turns: Sequence[tuple[str, str]]) -> None:
        """Begin behind questions and answers of another conversation about the same.

        They are taken as told, and nothing runs: the LLM reads them with the next question.
        An answer's ids are those of its text, which needn't be those that an LLM once gave for it.

        Args:
            turns: Questions with their answers, in order.

        Raises:
            InvalidInputError: This conversation has begun; or as for `stream`.
        """
        if self._history or self._turn:
            raise InvalidInputError(
                f"{self._name}: the conversation has begun",
                expected="one in which nothing was asked",
                cure="begin a new conversation",
            )
        try:
            for question, answer in turns:
                check_question(self._name, question)
                asked = self._asked(question.strip(), 1)
                self._history = [*asked, *self._said(answer.strip())]
        except Exception:
            self._history = []
            raise

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Ask the next question.

        Args:
            question: The question, without any prompt around it.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            The pieces of the answer.

        Raises:
            InvalidInputError: The question is empty, contains a placeholder, or does not fit into
                the LLM's context with the turns before it; or (from the iterator) an LLM server
                refuses it, or a later question was asked.
            BackendError: A call that failed broke the conversation; or (from the iterator) the LLM
                failed, or its server is gone.
        """
        check_question(self._name, question)
        check_max_new_tokens(self._name, max_new_tokens)
        if not self._intact:
            raise BackendError(
                f"{self._name}: an earlier call of this conversation failed halfway",
                cause="its KV cache can't be continued",
                cure="begin a new conversation",
            )
        asked = self._asked(question.strip(), max_new_tokens)
        self._turn += 1
        return self._pieces(asked, max_new_tokens, self._turn)

    def _pieces(self, asked: list[T], max_new_tokens: int, turn: int) -> Iterator[str]:
        """Run the LLM, and yield what is new of the answer's text."""
        self._check_turn(turn)
        if self._answer is not None:
            self._answer.close()  # one left unread: a server stops making it
        before = self._history
        answer = self._answer = self._answers(asked, max_new_tokens)
        text = shown = ""
        try:
            with guarded(
                BackendError,
                f"{self._name}: the LLM failed while it answered",
                cure="begin a new conversation",
                reads=False,
            ):
                for self._history, text in answer:
                    # U+FFFD at the end is the beginning of a character whose other bytes follow.
                    whole = text.startswith(shown) and not text.endswith("\ufffd")
                    if whole and len(text) > len(shown):
                        piece, shown = text[len(shown) :], text
                        yield piece
                        self._check_turn(turn)
            if len(text) > len(shown):
                yield text[len(shown) :]
        except Exception:
            if turn == self._turn:
                self._history = before
            raise
        finally:
            answer.close()

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise InvalidInputError(
                f"{self._name}: a later question of the same conversation left this answer behind",
                cure="read an answer to its end before asking on",
            )


class TokenConversation(Turns[int]):
    """Turns as ids: answers as the LLM gave them, each closed as the chat template closes it.

    What closes an answer is added before the next question where it was cut short, and stands there
    for whatever token the LLM ended it with. So the ids are those of the whole conversation.

    Args:
        text: The LLM's text side.
        shown: What the first turn shows.
        context: Longest sequence in tokens, where that is another than the text side's.
        expands: Whether the ids have a placeholder for each row, and not one for each image.
    """

    def __init__(
        self, text: TextSide, shown: Shown, *, context: int | None = None, expands: bool = True
    ) -> None:
        super().__init__(text.name, shown)
        self._text = text
        self._expands = expands
        self._context = text.context if context is None else context

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all turns so far, with a placeholder for each row or image."""
        return tuple(self._history)

    @abstractmethod
    def _generate(self, ids: list[int], max_new_tokens: int) -> Generator[list[int], None, None]:
        """Yield an answer's ids so far, the one that ends it included, as they come."""

    def _asked(self, question: str, max_new_tokens: int) -> list[int]:
        text, before = self._text, self._history
        if not before:
            new = text.first(self.shown, question, expands=self._expands)
        else:
            before = text.prompts.closed(before, text.eos_ids)
            new = text.prompts.later(question)
        unseen = 0 if self._expands else text.unseen_rows(self.shown)
        check_context(
            self._name,
            earlier=len(before) + (unseen if before else 0),
            new=len(new) + (0 if before else unseen),
            max_new_tokens=max_new_tokens,
            context=self._context,
        )
        return [*before, *new]

    def _said(self, answer: str) -> list[int]:
        # As a text of its own: behind the prompt's end a word is the token of its beginning.
        return self._text.prompts.tokenizer.encode(answer, special=False)

    def _answers(
        self, asked: list[int], max_new_tokens: int
    ) -> Generator[tuple[list[int], str], None, None]:
        with contextlib.closing(self._generate(asked, max_new_tokens)) as answer:
            for made in answer:
                spoken = self._text.spoken(made)
                self.spoken = Spoken(len(asked), len(made), made[-1] in self._text.eos_ids)
                yield [*asked, *made[: len(spoken) + 1]], self._text.prompts.decode(spoken)


class GreedyLLM(LLM):
    """A local LLM that gives the most probable next token.

    Attributes:
        name: The name that ``--llm`` knows it by.
        text: Its text side.
        largest: Largest magnitude that its dtype can hold.
        unable: Why it can't give tokens their original positions; None where it can.
        trained: How many positions it was trained with; None where it doesn't say.
    """

    text: TextSide
    largest: float
    unable: str | None = NO_POSITIONS
    trained: int | None = None

    @abstractmethod
    def new_cache(self) -> Any:
        """Return an empty KV cache, which belongs to one conversation."""

    @abstractmethod
    def step(
        self,
        ids: list[int],
        cache: Any,
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> int:
        """Run the LLM over new tokens.

        Args:
            ids: Their ids, [m].
            cache: The KV cache of the tokens before them, which grows by m.
            rows: float32 or float16 [n, L]: what stands at the n placeholders among `ids`, in
                order; ``None`` where a placeholder is a mere word.
            positions: int64 [m], that of each, which doesn't go back; None for consecutive ones
                behind the cache. An LLM that is `unable` takes no others.

        Returns:
            The most probable next id; the lower one of equals.

        Raises:
            BackendError: Out of memory, or a result that is not finite.
        """

    def conversation(
        self,
        embeds: Given | Sequence[Given],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
    ) -> GreedyConversation:
        """Begin a conversation; see `LLM.conversation`."""
        shown = self.text.shown(
            embeds, frames, largest=self.largest, positions=positions, unable=self.unable
        )
        return GreedyConversation(self, shown)


class GreedyConversation(TokenConversation):
    """Questions to a local LLM; the KV cache of all turns is kept between them.

    So a later question costs neither vision nor a prefill of what came before it. Decoding is
    greedy: the most probable token each time, until an end-of-sequence token or `max_new_tokens`.

    Made by `GreedyLLM.conversation`.
    """

    def __init__(self, llm: GreedyLLM, shown: Shown) -> None:
        super().__init__(llm.text, shown)
        self._llm = llm
        self._cache: Any = llm.new_cache()
        self._cached = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all tokens in the KV cache, among them a placeholder for each row."""
        return tuple(self._history[: self._cached])

    def _asked(self, question: str, max_new_tokens: int) -> list[int]:
        asked = super()._asked(question, max_new_tokens)
        if self.shown.where is None or self._llm.trained is None:
            return asked
        # Positions are beyond the tokens' number by what was left out of the pictures.
        longest = len(asked) + left_out(self.shown.where) + max_new_tokens
        if longest <= self._llm.trained:
            return asked
        if not self._cached:
            why = beyond(self._name, max_new_tokens, longest, self._llm.trained)
            self.shown = self.shown.consecutive(why)
            return asked
        raise InvalidInputError(
            f"{self._name}: with the tokens' original positions this turn and {max_new_tokens} "
            f"tokens for the answer reach position {longest}",
            expected=f"at most {self._llm.trained}, which the LLM was trained with",
            cure="begin a new conversation, or allow a shorter answer (--max-new-tokens)",
        )

    def _positions(self, new: list[int]) -> NDArray[np.int64] | None:
        """Return the positions of tokens that come next into the cache; None for consecutive."""
        where = self.shown.where
        if where is None:
            return None
        if not self._cached:
            return along(new, self._text.prompts.placeholders[self.shown.kind], where)
        return np.arange(len(new)) + (self._cached + left_out(where))

    def _generate(self, ids: list[int], max_new_tokens: int) -> Generator[list[int], None, None]:
        made: list[int] = []
        new = ids[self._cached :]
        while len(made) < max_new_tokens:
            # Only the first prompt has places: a placeholder that the LLM says is a mere word.
            rows = None if self._cached else np.concatenate(self.shown.parts)
            positions = self._positions(new)
            if positions is not None:
                check_ascending(self._name, positions)
            self._intact = False  # until the cache is whole again
            given = () if positions is None else (positions,)
            token = self._llm.step(new, self._cache, rows, *given)
            self._cached += len(new)
            self._intact = True
            made, new = [*made, token], [token]
            yield made
            if token in self._text.eos_ids:
                return
