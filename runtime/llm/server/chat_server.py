"""Conversations with LLMs behind servers that speak OpenAI's chat protocol; standard library only.

A kind of server adds how an image's tokens stand in a message, `ServerLLM.part`. The rest is here:
``GET /v1/models`` says what is served, and each question is one ``POST /v1/chat/completions`` whose
answer comes as server-sent events. The server keeps nothing for us: every request carries all
turns, images included, and it is the server's own prefix cache that spares it the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.llm.contract import LLM
from vzip.runtime.llm.conversation import Turns
from vzip.runtime.llm.server.http_client import Client
from vzip.runtime.llm.shown import Shown, TokenSpec, check_shown

if TYPE_CHECKING:
    from vzip.runtime.llm.shown import Embeds, Given
    from vzip.runtime.tokens.positions import Positions

    Message = Mapping[str, Any]


_LONGEST_TOKEN: Final = 1024  # characters; the longest of public vocabularies have 256
_LISTED: Final = 20  # names of models in a message


class ServerLLM(LLM):
    """An LLM behind a server, for the tokens of one bundle.

    A subclass gives `name`, `key_variable` and `part`.

    Attributes:
        name: The name that ``--llm`` knows it by.
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

    def __init__(
        self,
        url: str,
        tokens: TokenSpec,
        *,
        model: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Ask the server what it serves.

        Args:
            url: Its address, such as ``http://127.0.0.1:8000``, with or without ``/v1``.
            tokens: What the bundle says about its tokens, from `TokenSpec.of`.
            model: The model's name, where the server has several.
            seconds: Longest time for an answer as a whole, from the connection to its last piece;
                None for `http_client.ANSWER_SECONDS`. What the server is asked here, it must tell
                within `http_client.CALL_SECONDS`, question by question.

        Raises:
            InvalidInputError: The address is none, or it has several models, or not that one.
            BackendError: There is no such server, or it doesn't answer as one does.
        """
        self.tokens = tokens
        self.client = Client(self.name, url, self.key_variable, seconds)
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
        doesn't write, depends on the server.
        """
        return {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
        }

    def conversation(
        self,
        embeds: Given | Sequence[Given],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
    ) -> ServerConversation:
        """Begin a conversation; a video's frames are images that follow each other.

        See `LLM.conversation`.
        """
        if frames is not None and self.tokens.video_token_id is not None:
            raise InvalidInputError(
                f"{self.name}: got a video's tokens",
                expected="tokens of images, which are all that the server takes",
                cause="this LLM has a placeholder of its own for videos",
                cure="ask about frames as images, or use --llm transformers:MODEL for videos",
            )
        shown = check_shown(
            self.name,
            embeds,
            frames=frames,
            tokens=self.tokens,
            hidden_size=self.tokens.hidden_size,
            takes_videos=False,
            positions=positions,
        )
        return ServerConversation(self, shown)

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
        listed = ", ".join(repr(self.client.clean(each)) for each in names[:_LISTED])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise InvalidInputError(
            f"{self.name}: {self.url} serves {listed}{more}, but {asked}",
            cure=(
                f"serve one model, or give one of these names in Python: {type(self).__name__}(…, "
                "model=…)"
            ),
        )


class ServerConversation(Turns["Message"]):
    """Questions about images; the turns are kept here as messages and sent with every question.

    The images stand in the first question's message, and each answer is kept as it was received,
    without white space around it.

    Made by `ServerLLM.conversation`.
    """

    def __init__(self, llm: ServerLLM, shown: Shown) -> None:
        super().__init__(llm.name, shown)
        self._llm = llm
        self._parts = [llm.part(part, _uuid(part)) for part in shown.parts]

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns so far, as they are sent."""
        return tuple(self._history)

    def _asked(self, question: str, max_new_tokens: int) -> list[Message]:  # noqa: ARG002
        for placeholder in self._llm.placeholders:
            if placeholder in question:
                raise InvalidInputError(
                    f"{self._name}: the question contains {placeholder!r}",
                    cause="the server would take it for the place of an image or video",
                    cure=f"ask a question without {placeholder!r}",
                )
        first = [*self._parts, {"type": "text", "text": question}]
        content = question if self._history else first
        return [*self._history, {"role": "user", "content": content}]

    def _said(self, answer: str) -> list[Message]:
        return [{"role": "assistant", "content": answer}]

    def _answers(
        self, asked: list[Message], max_new_tokens: int
    ) -> Generator[tuple[list[Message], str], None, None]:
        text = ""
        body = self._llm.request(asked, max_new_tokens)
        with contextlib.closing(self._llm.client.post("/v1/chat/completions", body)) as events:
            for piece in itertools.chain(events.pieces(), [""]):  # an empty answer is one too
                text = (text + piece).lstrip()
                if len(text) > _LONGEST_TOKEN * max_new_tokens:
                    raise self._llm.client.broken(
                        f"sent an answer of more than {_LONGEST_TOKEN * max_new_tokens} characters",
                        cause=f"it was asked for {max_new_tokens} tokens at most, and took no "
                        "notice",
                        cure="check the address",
                    )
                # White space goes out with what follows it, so that the whole ends without.
                answer = {"role": "assistant", "content": text.rstrip()}
                yield [*asked, answer], answer["content"]


def _uuid(embeds: Embeds) -> str:
    """Return a name of an image's tokens, by which a server knows them again."""
    shape = f"{embeds.shape} ".encode()  # of as many bytes only one dtype has this shape
    return hashlib.sha256(shape + embeds.tobytes()).hexdigest()
