"""Compressed tokens into an LLM: what every engine offers, and the checks made before each call.

One file per engine. The checks are here, above the engines, because several engines' own errors
mislead and some crash on a wrong shape. `prompts` holds the words around a question, `decoding` the
conversation of the engines that run in this process, `engines` what ``--llm`` can name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.llm.prompts import Kind

    Embeds = npt.NDArray[np.floating]

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
    """An LLM engine that takes the tokens of images or a video and text.

    `embeds` is float32 or float16 [n, L], in the bundle's token order: what
    `VisionEncoder.image_embeds` gives of an image, or a list of those of several images, with
    `frames` None; or what `video_embeds` gives of a video, with `frames` the number of its frames.

    Attributes:
        name: The engine's name.
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


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the first turn shows, checked.

    Attributes:
        kind: What a placeholder stands for.
        parts: One array [n, L] for each placeholder, in order; copies, of the caller's dtype.
    """

    kind: Kind
    parts: tuple[Embeds, ...]


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """What a bundle says about the tokens that it makes of one image or video.

    Attributes:
        count: Rows per image; None where they depend on its size, because it is cut into tiles.
        hidden_size: L, width of a row.
        image_token_id: Id of the placeholder in the text whose embedding a row replaces.
        video_token_id: Id of that of a video; None where the LLM has none of its own.
        frame_count: Rows per frame of a video; None for any number.
        closing: Rows behind those of a video's last frame.
    """

    count: int | None
    hidden_size: int
    image_token_id: int
    video_token_id: int | None = None
    frame_count: int | None = None
    closing: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> ImageTokens:
        """Read a bundle's manifest.

        Raises:
            InvalidInputError: The bundle was made with random weights, so that its tokens mean
                nothing to any LLM.
        """
        if manifest.model.weights == "random":
            raise InvalidInputError(
                f"this bundle holds random weights of {manifest.model.id!r}, which serve to "
                "measure speed and can't answer questions",
                cure="export it again from a checkpoint, without --weights random",
            )
        tokens = manifest.selection.dominant + manifest.selection.contextual
        return cls(
            count=tokens if manifest.tiling is None else None,
            hidden_size=manifest.llm.hidden_size,
            image_token_id=manifest.llm.image_token_id,
            video_token_id=manifest.llm.video_token_id,
            frame_count=tokens,
            # LLaVA-OneVision ends a video, whose frames it pools, with its newline embedding.
            closing=1 if manifest.tower.pool == 2 else 0,
        )

    def rows(self, frames: int | None) -> int | None:
        """Return how many rows one image, or a video of so many frames, has; None for any."""
        if frames is None:
            return self.count
        return None if self.frame_count is None else frames * self.frame_count + self.closing

    def check_llm(
        self,
        engine: str,
        *,
        model: str,
        hidden_size: int,
        image_token_id: int,
        video_token_id: int | None = None,
    ) -> None:
        """Check that the tokens are made for this LLM; before its weights are loaded.

        Args:
            engine: The engine's name, for the message.
            model: Where the LLM comes from, for the message.
            hidden_size: The LLM's width.
            image_token_id: Its placeholder's id.
            video_token_id: That of a video; None if it has none.

        Raises:
            InvalidInputError: They are not.
        """
        cure = "give the LLM of the checkpoint that the bundle was exported from (--llm)"
        if hidden_size != self.hidden_size:
            raise InvalidInputError(
                f"{engine}: the bundle makes tokens of width {self.hidden_size}, but the LLM "
                f"{model!r} takes width {hidden_size}",
                cause=f"{cure}",
            )
        if image_token_id != self.image_token_id:
            raise InvalidInputError(
                f"{engine}: the bundle's image token id is {self.image_token_id}, but that of "
                f"the LLM {model!r} is {image_token_id}",
                cause=f"{cure}",
            )
        if self.video_token_id is not None and video_token_id != self.video_token_id:
            raise InvalidInputError(
                f"{engine}: the bundle's video token id is {self.video_token_id}, but that of "
                f"the LLM {model!r} is {video_token_id}",
                cause=f"{cure}",
            )


def check_embeds(
    engine: str,
    embeds: Embeds,
    *,
    hidden_size: int,
    count: int | None,
    frames: int | None = None,
    largest: float = float("inf"),
) -> None:
    """Check the tokens of one image or video before they reach an engine.

    Args:
        engine: The engine's name, for the message.
        embeds: The tokens, float32 or float16 [n, L].
        hidden_size: L that the engine takes.
        count: n that the bundle promises; ``None`` without a bundle, or where it varies.
        frames: Frames of the video; ``None`` for an image.
        largest: Largest magnitude that the engine's dtype can hold.

    Raises:
        InvalidInputError: They are no array, of another shape or dtype, or not finite.
    """
    if frames is not None and (type(frames) is not int or frames < 1):
        raise InvalidInputError(
            f"{engine}: got a video of {frames!r} frames",
            cause="it takes 1 or more",
        )
    rows = "K" if count is None else str(count)
    whose = "one image's tokens" if frames is None else f"the tokens of a video's {frames} frames"
    takes = f"it takes {whose} as a float32 or float16 numpy array [{rows}, {hidden_size}]"
    if not isinstance(embeds, np.ndarray):
        raise InvalidInputError(
            f"{engine}: got {type(embeds).__name__}",
            cause=f"{takes}",
        )
    if embeds.dtype not in (np.float32, np.float16):
        raise InvalidInputError(
            f"{engine}: got tokens of dtype {embeds.dtype}",
            cause=f"{takes}",
        )
    right_rows = embeds.ndim == 2 and (
        embeds.shape[0] >= 1 if count is None else embeds.shape[0] == count
    )
    if not right_rows or embeds.shape[1] != hidden_size:
        hint = ", such as tokens.embeds[0]" if embeds.ndim == 3 and frames is None else ""
        raise InvalidInputError(
            f"{engine}: got tokens of shape {list(embeds.shape)}",
            cause=f"{takes}{hint}",
        )
    finite = np.isfinite(embeds)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        raise InvalidInputError(
            f"{engine}: {bad.size} of {embeds.shape[0]} tokens (first: row {bad[0]}) hold NaN "
            "or infinity",
            cause=f"{takes}, all finite",
            cure="encode the image again, and run 'vzip check' on the bundle if it repeats",
        )
    magnitude = float(np.abs(embeds).max())
    if magnitude > largest:
        raise InvalidInputError(
            f"{engine}: got tokens up to {magnitude:.4g}, but the LLM's dtype holds at most "
            f"{largest:.6g}",
            cure="open the LLM in float32",
        )


def check_shown(
    engine: str,
    embeds: Embeds | Sequence[Embeds],
    *,
    frames: int | None,
    tokens: ImageTokens | None,
    hidden_size: int,
    takes_videos: bool,
    largest: float = float("inf"),
) -> Shown:
    """Check the tokens that a conversation is about, and divide them among placeholders.

    A video has a placeholder of its own where the LLM knows videos; where it doesn't, its frames
    are images that follow each other.

    Args:
        engine: The engine's name, for messages.
        embeds: float32 or float16 [n, L], or a list or tuple of them for several images.
        frames: Frames of the video; ``None`` for images.
        tokens: What the bundle says; ``None`` to take any number.
        hidden_size: L that the LLM takes.
        takes_videos: Whether the LLM has a placeholder for videos.
        largest: Largest magnitude that the LLM's dtype can hold.

    Returns:
        Copies, so that the caller may go on using its arrays.

    Raises:
        InvalidInputError: Something is wrong with them; the message says which, if there are
            several.
    """
    several = isinstance(embeds, (list, tuple))
    if several and not embeds:
        raise InvalidInputError(
            f"{engine}: got an empty list of images",
            cause="it takes 1 or more",
        )
    if several and frames is not None:
        raise InvalidInputError(
            f"{engine}: got a list of {len(embeds)} arrays with frames={frames}",
            cause="it takes a video's tokens as one array, or a list of images without frames",
        )
    arrays = embeds if isinstance(embeds, (list, tuple)) else [embeds]
    for number, each in enumerate(arrays):
        check_embeds(
            f"{engine}: image {number}" if several and len(arrays) > 1 else engine,
            each,
            hidden_size=hidden_size,
            count=None if tokens is None else tokens.rows(frames),
            frames=frames,
            largest=largest,
        )
    if frames is None or takes_videos:
        kind: Kind = "image" if frames is None else "video"
        return Shown(kind, tuple(np.array(each) for each in arrays))
    rows = len(arrays[0])
    if rows % frames:
        raise InvalidInputError(
            f"{engine}: got {rows} tokens of {frames} frames, each of which is an image to "
            "this LLM",
            cause="it takes as many of every frame, without a closing token",
        )
    return Shown("image", tuple(np.array_split(np.array(arrays[0]), frames)))


def check_question(engine: str, question: str) -> None:
    """Check a question before it is made into tokens.

    Raises:
        InvalidInputError: It is empty, or text that has no UTF-8 form.
    """
    if not question.strip():
        raise InvalidInputError(
            f"{engine}: the question is empty",
            cure="ask something about what is shown",
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{engine}: the question is not valid Unicode text (at character {error.start})",
            cure="give it in UTF-8",
        ) from error


def check_max_new_tokens(engine: str, max_new_tokens: int) -> None:
    """Check the limit on an answer's length.

    Raises:
        InvalidInputError: It is below 1.
    """
    if max_new_tokens < 1:
        raise InvalidInputError(
            f"{engine}: got a limit of {max_new_tokens} new tokens",
            cause="it takes 1 or more",
        )


def check_context(
    engine: str, *, cached: int, new: int, max_new_tokens: int, context: int | None
) -> None:
    """Check that the prompt and the longest answer fit into the LLM's context.

    Args:
        engine: The engine's name, for the message.
        cached: Tokens of the turns before, the image's included.
        new: Tokens that this turn adds before the answer.
        max_new_tokens: Longest answer.
        context: The LLM's context in tokens; ``None`` when it states none.

    Raises:
        InvalidInputError: They don't fit.
    """
    if context is not None and cached + new + max_new_tokens > context:
        earlier = f"{cached} of earlier turns, " if cached else ""
        cure = "begin a new conversation" if cached else "ask a shorter question"
        raise InvalidInputError(
            f"{engine}: {earlier}{new} of this prompt and {max_new_tokens} for the answer make "
            f"{cached + new + max_new_tokens} tokens, but the LLM's context takes {context}",
            cause=f"{cure} or allow a shorter answer (--max-new-tokens)",
        )
