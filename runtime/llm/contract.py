"""What every LLM offers, whether a local LLM or one behind an LLM server: questions and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vzip.runtime.llm.shown import Embeds

DEFAULT_MAX_NEW_TOKENS = 256


class Conversation(Protocol):
    """Questions about what is shown in the first turn; each of them sees the turns before it."""

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Yield the answer piece by piece; the pieces joined are what `ask` returns."""
        ...

    def ask(self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> str:
        """Return the whole answer, without white space around it."""
        return "".join(self.stream(question, max_new_tokens=max_new_tokens)).strip()


class LLM(Protocol):
    """An LLM that takes the tokens of images or a video and text.

    `embeds` is float32 or float16 [n, L], in the bundle's token order: what
    `VisionEncoder.image_embeds` gives of an image, or a list of those of several images (each made
    with ``several=True``), with `frames` None; or what `video_embeds` gives of a video, with
    `frames` the number of its frames.

    Attributes:
        name: The name that ``--llm`` knows it by.
    """

    name: str

    def conversation(
        self, embeds: Embeds | Sequence[Embeds], *, frames: int | None = None
    ) -> Conversation:
        """Begin a conversation.

        Args:
            embeds: The tokens, of one image, several, or a video.
            frames: How many frames the video has; ``None`` for images.

        Raises:
            InvalidInputError: They are of another shape or dtype, not finite, or don't divide into
                frames where the LLM takes those as images.
        """
        ...

    def stream(
        self,
        embeds: Embeds | Sequence[Embeds],
        question: str,
        *,
        frames: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> Iterator[str]:
        """Answer one question piece by piece; see `conversation` and its `stream`."""
        conversation = self.conversation(embeds, frames=frames)
        return conversation.stream(question, max_new_tokens=max_new_tokens)

    def ask(
        self,
        embeds: Embeds | Sequence[Embeds],
        question: str,
        *,
        frames: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> str:
        """Answer one question; see `conversation` and its `ask`."""
        conversation = self.conversation(embeds, frames=frames)
        return conversation.ask(question, max_new_tokens=max_new_tokens)
