"""Conversations with LLMs behind servers that speak OpenAI's chat protocol; standard library only.

What an engine adds is how an image's tokens stand in a message, `ServerLLM.part`. The rest is here:
``GET /v1/models`` says what is served, and each question is one ``POST /v1/chat/completions`` whose
answer comes as server-sent events. The server keeps nothing for us: every request carries all
turns, images included, and it is the server's own prefix cache that spares it the work.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.llm import (
    DEFAULT_MAX_NEW_TOKENS,
    LLM,
    Conversation,
    ImageTokens,
    Shown,
    check_max_new_tokens,
    check_question,
    check_shown,
)
from vzip.runtime.llm.server.http_client import Client, Events

if TYPE_CHECKING:
    from vzip.runtime.llm import Embeds

    Message = Mapping[str, Any]


class ServerLLM(LLM):
    """An LLM behind a server, for the tokens of one bundle.

    An engine's class gives `name`, `key_variable` and `part`.

    Attributes:
        name: The engine's name.
        key_variable: Environment variable of the server's API key; it may be unset.
        placeholders: Texts that a question must not contain, because the server takes them for
            places of images.
        tokens: What the bundle says about its tokens. The server can't be asked for the LLM's
            width or its placeholder's id, so that tokens of another LLM of the same width are not
            noticed.
        model: The model's name on the server.
        url: The server's address, without ``/v1``.
        client: Requests to it.
    """

    key_variable: str
    placeholders: tuple[str, ...] = ("<image>", "<video>")

    def __init__(self, url: str, tokens: ImageTokens, *, model: str | None = None) -> None:
        """Ask the server what it serves.

        Args:
            url: Its address, such as ``http://127.0.0.1:8000``, with or without ``/v1``.
            tokens: What the bundle says about its tokens, from `ImageTokens.of`.
            model: The model's name, where the server has several.

        Raises:
            InvalidInputError: The address is none, or it has several models, or not that one.
            BackendError: There is no such server, or it doesn't answer as one does.
        """
        self.tokens = tokens
        self.client = Client(self.name, url, self.key_variable)
        self.url = self.client.url
        self.model = self._choose(model)

    @abstractmethod
    def part(self, embeds: Embeds, uuid: str) -> dict[str, Any]:
        """Return the part of a message's content that shows one image.

        Args:
            embeds: Its tokens, float32 or float16 [n, L], checked.
            uuid: A name of theirs, the same for the same tokens: their SHA-256 in hexadecimal.
        """

    def request(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, Any]:
        """Return a request's body: greedy decoding, streamed.

        Whether the server puts a beginning-of-sequence token in front that its chat template
        doesn't write, depends on the engine.
        """
        return {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
        }

    def conversation(
        self, embeds: Embeds | Sequence[Embeds], *, frames: int | None = None
    ) -> ServerConversation:
        """Begin a conversation; a video's frames are images that follow each other.

        See `LLM.conversation`.
        """
        if frames is not None and self.tokens.video_token_id is not None:
            raise InvalidInputError(
                f"{self.name}: got a video's tokens, which this LLM takes at a placeholder for "
                "videos, but the server takes tokens of images only",
                cure="ask about frames as images, or use --llm transformers:MODEL for videos",
            )
        shown = check_shown(
            self.name,
            embeds,
            frames=frames,
            tokens=self.tokens,
            hidden_size=self.tokens.hidden_size,
            takes_videos=False,
        )
        return ServerConversation(self, self.client, shown)

    def _choose(self, model: str | None) -> str:
        """Return the name of the model that is asked."""
        listing = self.client.get("/v1/models")
        try:
            names = [str(each["id"]) for each in listing["data"]]
        except (TypeError, KeyError):
            names = []
        if not names:
            raise BackendError(
                f"{self.name}: {self.url}/v1/models lists no models",
                cause="it is no OpenAI-compatible server, or its model is not loaded yet",
                cure="check the address and the server's log",
            )
        if model is None and len(names) == 1:
            return names[0]
        if model in names:
            return str(model)
        asked = "none was named" if model is None else f"{model!r} is not among them"
        raise InvalidInputError(
            f"{self.name}: {self.url} serves {', '.join(map(repr, names))}, but {asked}",
            cure=(
                f"serve one model, or give one of these names in Python: {type(self).__name__}(…, "
                "model=…)"
            ),
        )


class ServerConversation(Conversation):
    """Questions about images; the turns are kept here and sent with every question.

    The images stand in the first question's message, and each answer is kept as it was received,
    without white space around it. An answer cut short by `max_new_tokens`, or by the caller who
    stops reading it, counts as far as it was received. A question whose answer failed is taken
    back, so that it can be asked again; one whose answer was never read was never sent.

    Attributes:
        shown: What the first question shows.

    Made by `ServerLLM.conversation`.
    """

    def __init__(self, llm: ServerLLM, client: Client, shown: Shown) -> None:
        self._llm = llm
        self._client = client
        self.shown = shown
        self._parts = [llm.part(part, _uuid(part)) for part in shown.parts]
        self._messages: list[Message] = []
        self._turn = 0
        self._events: Events | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far, as they are sent."""
        return tuple(self._messages)

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Ask the next question.

        The checks are made by this call; the server is asked as the pieces are taken.

        Args:
            question: The question, without any prompt around it.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            The pieces of the answer; without white space around the whole.

        Raises:
            InvalidInputError: The question is empty or contains a placeholder; or (from the
                iterator) the server refuses the request, such as one beyond the LLM's context.
            BackendError: (From the iterator.) The server is gone, failed, or broke off.
        """
        name = self._llm.name
        check_question(name, question)
        check_max_new_tokens(name, max_new_tokens)
        for placeholder in self._llm.placeholders:
            if placeholder in question:
                raise InvalidInputError(
                    f"{name}: the question contains {placeholder!r}, which the server would "
                    "take for the place of an image or video",
                    cause="a question must not contain it",
                )
        self._turn += 1
        return self._pieces(question.strip(), max_new_tokens, self._turn)

    def _pieces(self, question: str, max_new_tokens: int, turn: int) -> Iterator[str]:
        """Send the turns and yield the answer's text."""
        self._check_turn(turn)
        if self._events is not None:
            self._events.close()  # an answer left unread: the server stops making it
        before = self._messages
        content = question if before else [*self._parts, {"type": "text", "text": question}]
        asked = [*before, {"role": "user", "content": content}]
        text = shown = ""
        try:
            self._events = self._client.post(
                "/v1/chat/completions", self._llm.request(asked, max_new_tokens)
            )
            for piece in self._events.pieces():
                # White space goes out with what follows it, so that the whole ends without.
                text = (text + piece).lstrip()
                complete = text.rstrip()
                self._messages = [*asked, {"role": "assistant", "content": complete}]
                if len(complete) > len(shown):
                    new, shown = complete[len(shown) :], complete
                    yield new
                    self._check_turn(turn)
            self._messages = [*asked, {"role": "assistant", "content": shown}]
        except BackendError:
            self._messages = before
            raise
        finally:
            if turn == self._turn and self._events is not None:
                self._events.close()

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise InvalidInputError(
                f"{self._llm.name}: this answer was left behind by a later question of the "
                "same conversation",
                cure="read an answer to its end before asking on",
            )


def _uuid(embeds: Embeds) -> str:
    """Return a name of an image's tokens, by which a server knows them again."""
    shape = f"{embeds.shape} ".encode()  # of as many bytes only one dtype has this shape
    return hashlib.sha256(shape + embeds.tobytes()).hexdigest()
