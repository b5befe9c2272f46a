"""Answers: an LLM asked by many; conversations are kept, so that later turns cost no prefill.

A request carries all turns, as OpenAI's protocol has it. The KV cache of the turns before is found
again by what was shown and said; where it isn't there any more, the turns are read anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from vzip.runtime.errors import BackendError
from vzip.runtime.llm.conversation import Turns
from vzip.runtime.service.admission import Ticket
from vzip.runtime.service.figures import Figures

if TYPE_CHECKING:
    from typing import Any

    from vzip.runtime.llm.contract import LLM

Turn = tuple[str, str]
"""A question and its answer."""

_SERVER_ANSWERS = 256  # at once, where an LLM server makes them


@dataclass(frozen=True)
class Talk:
    """What a question follows.

    Attributes:
        shown: Digests of what the first turn shows; equal where the same is shown.
        turns: The turns before, as the client tells them.
    """

    shown: tuple[str, ...]
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Answered:
    """What an answer took.

    Attributes:
        text: The whole answer.
        prompt_tokens: Tokens of all before it; None where an LLM server doesn't say.
        tokens: Its own tokens; None likewise.
        finish: ``stop`` where the LLM ended it, ``length`` where the limit did.
        first: Seconds until its first piece.
        rest: Seconds from there to its end.
        continued: Whether the KV cache of the turns before was still there.
    """

    text: str
    prompt_tokens: int | None
    tokens: int | None
    finish: Literal["stop", "length"]
    first: float
    rest: float
    continued: bool


class _Asked(NamedTuple):
    """A question, and who hears its answer; see `Answering.ask`."""

    ticket: Ticket
    talk: Talk
    question: str
    max_new_tokens: int
    say: Callable[[str], None]


class Answering:
    """Asks an LLM for many clients.

    Args:
        llm: The LLM.
        local: Whether it runs in this process, where answers take turns piece by piece.
        answers: Most answers that are made at once.
        kept: How many conversations are kept for later turns.
        figures: Counts answers.

    Attributes:
        llm: As given.
    """

    def __init__(self, llm: LLM, *, local: bool, answers: int, kept: int, figures: Figures) -> None:
        self.llm = llm
        self._figures = figures
        self._most_kept = kept
        self._lock = threading.Lock()
        self._kept: OrderedDict[Talk, Turns[Any]] = OrderedDict()
        self._turns: contextlib.AbstractContextManager[Any]
        self._turns = _InTurn() if local else contextlib.nullcontext()
        workers = answers if local else _SERVER_ANSWERS
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vzip-answer")

    @property
    def kv_token_bytes(self) -> int | None:
        """Bytes of the KV cache for a token; None where the LLM doesn't say its sizes."""
        settings: Any = getattr(self.llm, "settings", None)  # of a bundle's own LLM
        if settings is not None:
            width = 4 if settings.dtype == "float32" else 2
            return int(2 * settings.layers * settings.kv_heads * settings.head_size * width)
        model: Any = getattr(self.llm, "model", None)  # of transformers
        if model is None or not hasattr(model, "config"):
            return None
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return int(2 * text.num_hidden_layers * kv_heads * size * model.dtype.itemsize)

    @property
    def kept(self) -> int:
        """How many conversations are kept."""
        return len(self._kept)

    def has(self, talk: Talk) -> bool:
        """Return whether the KV cache of a talk is there, so that its pictures aren't needed."""
        return talk in self._kept

    def ask(
        self,
        ticket: Ticket,
        talk: Talk,
        question: str,
        *,
        max_new_tokens: int,
        embeds: Callable[[], Any] | None,
        frames: int | None,
        say: Callable[[str], None],
    ) -> Future[Answered]:
        """Ask a question; pieces of its answer are handed to `say`, in another thread.

        Args:
            ticket: The request.
            talk: What it follows.
            question: The question.
            max_new_tokens: Longest answer.
            embeds: Gives the tokens of what is shown, as `LLM.conversation` takes them; None where
                `has` said that they aren't needed.
            frames: Of a clip; None for pictures.
            say: Takes each piece.

        Returns:
            What it took; or of the errors of `LLM.conversation` and `Conversation.stream` one, or
            RefusedError.
        """

        def begin() -> Turns[Any]:
            if embeds is None:
                raise BackendError(
                    "the conversation was forgotten meanwhile", cure="send the request again"
                )
            begun = self.llm.conversation(embeds(), frames=frames)
            assert isinstance(begun, Turns)
            if talk.turns:
                begun.resume(talk.turns)
            return begun

        def work() -> Answered:
            ticket.check()
            found = self._take(talk)
            if talk.turns:
                self._figures.continued(found is not None)
            said: list[str] = []

            def heard(piece: str) -> None:
                said.append(piece)
                say(piece)

            asked = _Asked(ticket, talk, question, max_new_tokens, heard)
            try:
                return self._answer(asked, found or begin(), continued=found is not None)
            except BackendError:
                # Memory that was short is given back with what is kept.
                if said or not self._forget() or embeds is None:
                    raise
            return self._answer(asked, begin(), continued=False)

        return self._pool.submit(work)

    def close(self) -> None:
        """Forget all conversations; answers that are being made come to their end first."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._forget()

    def _answer(self, asked: _Asked, conversation: Turns[Any], *, continued: bool) -> Answered:
        begun = first = time.monotonic()
        text = ""
        pieces = conversation.stream(asked.question, max_new_tokens=asked.max_new_tokens)
        with contextlib.closing(pieces):  # type: ignore[type-var]
            for piece in self._in_turn(pieces):
                asked.ticket.check()  # before anything is said to nobody
                if not text:
                    first = time.monotonic()
                text += piece
                asked.say(piece)
        ended = time.monotonic()
        spoken = conversation.spoken
        turns = (*asked.talk.turns, (asked.question.strip(), text))
        self._keep(Talk(asked.talk.shown, turns), conversation)
        first = first if text else ended
        self._figures.spoken(spoken.tokens if spoken else 0, first - begun, ended - first)
        return Answered(
            text=text,
            prompt_tokens=spoken.prompt if spoken else None,
            tokens=spoken.tokens if spoken else None,
            finish="stop" if spoken is None or spoken.ended else "length",
            first=first - begun,
            rest=ended - first,
            continued=continued,
        )

    def _in_turn(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yield pieces, one for each turn of this answer among those that are being made."""
        while True:
            with self._turns:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _take(self, talk: Talk) -> Turns[Any] | None:
        with self._lock:
            return self._kept.pop(talk, None)

    def _keep(self, talk: Talk, conversation: Turns[Any]) -> None:
        with self._lock:
            self._kept[talk] = conversation
            self._kept.move_to_end(talk)
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)

    def _forget(self) -> bool:
        with self._lock:
            there = bool(self._kept)
            self._kept.clear()
        return there


class _InTurn:
    """A lock that those who wait for it get in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False
