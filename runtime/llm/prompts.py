r"""Questions as token ids, in the words that an LLM was trained with; without a template language.

A chat template is a program. What an LLM needs of it are a few pieces of text, which are taken from
it once (`vzip.runtime.llm.chat_template`), so that an edge box with neither Jinja nor transformers
says the same to its LLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Final, Literal, Protocol

from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.files.codec import OPTIONAL, Must, Record

Kind = Literal["image", "video"]
"""What a placeholder stands for."""

_ANSWER: Final = "a"  # stands for one, where only what follows it matters

KINDS: Final[tuple[Kind, ...]] = ("image", "video")


class Tokenizer(Protocol):
    """What a prompt needs of a tokenizer.

    Attributes:
        bos: The beginning-of-sequence token as text; None if there is none.
        eos: The end-of-sequence token as text.
        eos_id: Its id.
    """

    bos: str | None
    eos: str
    eos_id: int

    def token(self, token_id: int) -> str | None:
        """Return a token as text; None for an id beyond the vocabulary."""
        ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return a text's ids; special tokens and placeholders that it holds become theirs.

        Args:
            text: The text.
            special: Whether the tokens that begin a sequence are added.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class FirstTurn(Record):
    r"""The first turn: ``before P between P … after QUESTION end``, P being a placeholder.

    Attributes:
        before: Text before the first placeholder, such as ``USER: ``.
        between: Text between two placeholders, such as ``\n``; None where the LLM takes one only.
        after: Text between the last placeholder and the question.
        end: Text behind the question, such as `` ASSISTANT:``.
    """

    before: str
    between: str | None
    after: str
    end: str


@dataclasses.dataclass(frozen=True)
class LaterTurn(Record):
    """A later turn, behind what ends the answer: ``before QUESTION end``.

    Attributes:
        before: Text between the end of the answer and the question.
        end: Text behind the question.
        close: What ends an answer, such as ``<|eot_id|>``; empty for the end-of-sequence token.
    """

    before: str
    end: str
    close: str = dataclasses.field(default="", metadata=OPTIONAL)


@dataclasses.dataclass(frozen=True)
class Words(Record):
    """What stands around questions.

    Attributes:
        first: The first turn, by what is shown; a kind that is not there can't be shown.
        later: Later turns; None where the chat template drops the turns before.
    """

    first: Annotated[
        Mapping[Kind, FirstTurn], Must(bool, "the words around an image, a video or both")
    ]
    later: LaterTurn | None


TURN_TOKENS: Final = frozenset(
    ("<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<start_of_turn>", "<end_of_turn>")
)
"""Tokens of turns that LLaVA-1.5's LLMs lack: an LLM with one was trained with other words."""


def llava_15_words(*, videos: bool = False) -> Words:
    r"""Return LLaVA-1.5's words, for checkpoints without a chat template.

    ``USER: <image>\n{question} ASSISTANT:``, and for later turns ``USER: {question} ASSISTANT:``.

    Args:
        videos: Whether the LLM has a placeholder for videos too.
    """
    turn = FirstTurn("USER: ", "\n", "\n", " ASSISTANT:")
    kinds = KINDS if videos else KINDS[:1]
    return Words(dict.fromkeys(kinds, turn), LaterTurn("USER: ", " ASSISTANT:"))


class Prompts:
    """Questions as token ids.

    Args:
        name: The LLM's name, for messages.
        tokenizer: The LLM's tokenizer.
        words: What stands around a question.
        placeholders: Id of an image's placeholder; and of a video's, if the LLM has one.

    Attributes:
        eos_id: Id of the end-of-sequence token.
        closing: Ids that end an answer before the next question; the LLM says the last of them
            itself, where that is one token.
        tokenizer: As given.
        words: As given.

    Raises:
        CheckpointError: The tokenizer has no such placeholder.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, words: Words, placeholders: Mapping[Kind, int]
    ) -> None:
        self.words = words
        self.eos_id = tokenizer.eos_id
        self.tokenizer = tokenizer
        self._close = (words.later.close if words.later else "") or tokenizer.eos
        # As they stand in a conversation, behind a word: at the beginning of a text, or behind a
        # special token, white space can be other ids.
        self._answer = f"{tokenizer.eos}{_ANSWER}"
        answer = tokenizer.encode(self._answer, special=False)
        closed = tokenizer.encode(self._answer + self._close, special=False)
        self._answered, self.closing = len(closed), tuple(closed[len(answer) :])
        self._name = name
        self._tokens: dict[Kind, tuple[str, int]] = {}
        for kind, token_id in placeholders.items():
            token = tokenizer.token(token_id)
            if token is None:
                raise CheckpointError(
                    f"{name}: the LLM's tokenizer has no token of id {token_id}",
                    expected=f"the {kind} placeholder of a LLaVA checkpoint",
                    cause="the tokenizer's files are another model's or incomplete",
                    cure="fetch the checkpoint again",
                )
            self._tokens[kind] = token, token_id

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer: the end-of-sequence token, and what the template ends it with."""
        last = self.closing[-1:]
        own = last and self.tokenizer.token(last[0]) == self._close.strip()
        return frozenset({self.eos_id, *(last if own else ())})

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        """Id of the placeholder of each kind that the LLM has."""
        return MappingProxyType({kind: token_id for kind, (_, token_id) in self._tokens.items()})

    def first(self, question: str, kind: Kind = "image", count: int = 1) -> list[int]:
        """Return the first turn's ids, with one placeholder per image or video.

        Args:
            question: The question.
            kind: What is shown.
            count: How many of them.

        Raises:
            CheckpointError: The LLM's words have no place for that.
            InvalidInputError: The question contains a placeholder.
        """
        text = self.first_text(question, kind, count)
        bos = self.tokenizer.bos
        # A template may write the beginning-of-sequence token itself; once is right.
        written = bool(bos) and text.startswith(str(bos))
        ids = self.tokenizer.encode(text, special=not written)
        return self._checked(ids, {kind: count})

    def first_text(self, question: str, kind: Kind = "image", count: int = 1) -> str:
        """Return the first turn's text; see `first`, which checks the question.

        Raises:
            CheckpointError: The LLM's words have no place for that.
        """
        turn = self.words.first.get(kind)
        if kind not in self._tokens or turn is None or (count > 1 and turn.between is None):
            several = turn is not None and turn.between is None
            raise CheckpointError(
                f"{self._name}: the LLM's chat template has no place for "
                f"{f'{count} {kind}s' if several else f'{kind}s'}",
                expected="one image or video at a time" if several else "",
                cure=f"ask about {'one' if several else 'something else'}, or repair its "
                "chat_template.jinja",
            )
        token, _ = self._tokens[kind]
        places = (turn.between or "").join([token] * count)
        return f"{turn.before}{places}{turn.after}{question}{turn.end}"

    def later(self, question: str) -> list[int]:
        """Return the ids of a later turn, which follow `closing`.

        Raises:
            CheckpointError: The LLM's words know no later turns.
            InvalidInputError: The question contains a placeholder.
        """
        turn = self.words.later
        if turn is None:
            raise CheckpointError(
                f"{self._name}: the LLM's chat template drops the assistant's turns, or changes "
                "turns that are over",
                cause="it serves one question only",
                cure="use 'vzip ask', or repair chat_template.jinja",
            )
        # Encoded as it stands in the whole conversation: a word after a special token can be
        # another id than the same word at the beginning of a text.
        text = f"{self._answer}{self._close}{turn.before}{question}{turn.end}"
        return self._checked(self.tokenizer.encode(text, special=False)[self._answered :], {})

    def closed(self, ids: Sequence[int], ends: Collection[int]) -> list[int]:
        """Return a conversation's ids with its last answer closed as the template closes it.

        Args:
            ids: All turns so far; the answer with the id that ended it, if one did.
            ends: Ids that end an answer.
        """
        said = list(ids[:-1] if ids[-1] in ends else ids)
        sizes = range(len(self.closing), 0, -1)
        held = next((n for n in sizes if tuple(said[-n:]) == self.closing[:n]), 0)
        return [*said, *self.closing[held:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return an answer's text, without special tokens and white space around it."""
        return self.tokenizer.decode(ids).strip()

    def _checked(self, ids: list[int], expected: Mapping[Kind, int]) -> list[int]:
        """Return a prompt's ids; it has a place for every image or video and no other."""
        for kind, (token, token_id) in self._tokens.items():
            got, takes = ids.count(token_id), expected.get(kind, 0)
            if got != takes:
                raise InvalidInputError(
                    f"{self._name}: the prompt has {got} {kind} placeholders {token!r} (id "
                    f"{token_id})",
                    expected=f"{takes}",
                    cure=f"ask a question without {token!r}",
                )
        return ids
