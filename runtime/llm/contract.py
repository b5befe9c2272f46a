"""What every LLM offers, whether a local LLM or one behind an LLM server: questions and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vzip.runtime.llm.shown import Given
    from vzip.runtime.tokens.positions import Positions

DEFAULT_MAX_NEW_TOKENS = 256


class Conversation(Protocol):
    """Questions about what is shown in the first turn; each of them sees the turns before it.

    Attributes:
        positions: Which positions the tokens of what is shown have in the prompt. Until the first
            question they are those that were asked for and that the LLM can give; a first question
            whose positions pass the LLM's context makes them consecutive.
    """

    @property
    def positions(self) -> Positions:
        """See above."""
        ...

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

    `embeds` is what `VisionEncoder.image_tokens` gives of an image, or a list of those of several
    images (each made with ``several=True``), with `frames` None; or what `video_tokens` gives of a
    video, with `frames` the number of its frames. Their rows alone will do as well, float32 or
    float16 [n, L] in the bundle's token order; nothing says then where they stand, so that their
    positions are consecutive.

    `positions` is ``original`` for the positions that the tokens' patches have without
    compression, ``consecutive`` for those of the published code; None for what suits the bundle's
    family (`docs/positions.md`). Where an LLM can't give tokens their own positions, or they would
    pass its context, they are consecutive, which is said once; `Conversation.positions` says which.

    Attributes:
        name: The name that ``--llm`` knows it by.
    """

    name: str

    def conversation(
        self,
        embeds: Given | Sequence[Given],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
    ) -> Conversation:
        """Begin a conversation.

        Args:
            embeds: The tokens, of one image, several, or a video.
            frames: How many frames the video has; ``None`` for images.
            positions: Which positions they have.

        Raises:
            InvalidInputError: They are of another shape or dtype, not finite, or don't divide into
                frames where the LLM takes those as images; or a row's place is out of the span, or
                ``original`` was asked for where nothing says where rows stand.
        """
        ...

    def stream(
        self,
        embeds: Given | Sequence[Given],
        question: str,
        *,
        frames: int | None = None,
        positions: Positions | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> Iterator[str]:
        """Answer one question piece by piece; see `conversation` and its `stream`."""
        conversation = self.conversation(embeds, frames=frames, positions=positions)
        return conversation.stream(question, max_new_tokens=max_new_tokens)

    def ask(
        self,
        embeds: Given | Sequence[Given],
        question: str,
        *,
        frames: int | None = None,
        positions: Positions | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> str:
        """Answer one question; see `conversation` and its `ask`."""
        conversation = self.conversation(embeds, frames=frames, positions=positions)
        return conversation.ask(question, max_new_tokens=max_new_tokens)
