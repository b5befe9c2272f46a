"""What the first turn of a conversation shows, checked before it reaches an LLM.

The checks stand above the LLMs because several of their own errors mislead, and some LLM servers
crash on a wrong shape.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.llm.prompts import KINDS, Kind
from vzip.runtime.tokens.positions import (
    UNKNOWN,
    EncodedImage,
    Places,
    Positions,
    by_place,
    check_places,
    frame_places,
)
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    import numpy.typing as npt

    from vzip.runtime.bundle.manifest import Manifest

    Embeds = npt.NDArray[np.floating]
    Given: TypeAlias = Embeds | EncodedImage

_log = logging.getLogger(__name__)

NO_POSITIONS = "it takes no positions"
"""Why an LLM server gives tokens consecutive positions."""

_LLAVA_15_LIKE = ("llava", "llava-original", "vip-llava")
"""Families (`Manifest.model.family`) whose tokens keep their positions unless told otherwise."""


@dataclass(frozen=True)
class Shown:
    """What the first turn shows, checked.

    Attributes:
        kind: What a placeholder stands for.
        parts: One array [n, L] for each placeholder, in order; copies, of the caller's dtype. Their
            rows are in the bundle's order, or by place where they keep their positions.
        where: Of each part, where its rows stand in the uncompressed sequence; None where they get
            consecutive positions.
        published: The same with consecutive positions and in the bundle's order; None where these
            are so.
    """

    kind: Kind
    parts: tuple[Embeds, ...]
    where: tuple[Places, ...] | None = None
    published: Shown | None = None

    @property
    def positions(self) -> Positions:
        """Which positions the rows have."""
        return "consecutive" if self.where is None else "original"

    def consecutive(self, why: str) -> Shown:
        """Return the same with consecutive positions, and say once why."""
        if self.published is None:
            return self
        say_consecutive(why)
        return self.published


@dataclass(frozen=True)
class TokenSpec:
    """What a bundle says about the tokens that it makes of one image or video.

    Attributes:
        count: Rows per image; None where they depend on its size, because it is cut into tiles.
        hidden_size: L, width of a row.
        image_token_id: Id of the placeholder in the text whose embedding a row replaces.
        video_token_id: Id of that of a video; None where the LLM has none of its own.
        frame_count: Rows per frame of a video; None for any number.
        closing: Rows behind those of a video's last frame.
        several_count: Rows per image where the prompt holds several, if that is another number
            than `count`: LLaVA-OneVision cuts no tiles then.
        positions: Which positions the rows have unless an LLM is told otherwise.
        placed: Whether the bundle says which patch a row stands for.
        nested: Whether there may be fewer rows: a smaller budget of the same tokens.
    """

    count: int | None
    hidden_size: int
    image_token_id: int
    video_token_id: int | None = None
    frame_count: int | None = None
    closing: int = 0
    several_count: int | None = None
    positions: Positions = "consecutive"
    placed: bool = False
    nested: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> TokenSpec:
        """Read a bundle's manifest.

        Raises:
            InvalidInputError: The bundle was made with random weights, so that its tokens mean
                nothing to any LLM.
        """
        if manifest.model.weights != "checkpoint":
            raise InvalidInputError(
                f"the bundle holds random weights of {manifest.model.id!r}",
                cause="they serve to measure speed and can't answer questions",
                cure=(
                    "export a checkpoint with 'vzip export', without "
                    f"--weights {manifest.model.weights}"
                ),
            )
        tokens, tiling = manifest.selection.tokens, manifest.tiling
        several = None
        if tiling is not None and tiling.only_alone:
            several = tokens + (tiling.order == "newline")
        return cls(
            count=tokens if tiling is None else None,
            hidden_size=manifest.llm.hidden_size,
            image_token_id=manifest.llm.image_token_id,
            video_token_id=manifest.llm.video_token_id,
            frame_count=tokens,
            # LLaVA-OneVision ends a video, whose frames it pools, with its newline embedding.
            closing=1 if manifest.tower.pool == 2 else 0,
            several_count=several,
            positions="original" if manifest.model.family in _LLAVA_15_LIKE else "consecutive",
            placed=manifest.selection.span is not None,
            nested=manifest.selection.ranked,
        )

    def rows(self, frames: int | None, *, several: bool = False) -> int | None:
        """Return how many rows one image, or a video of so many frames, has; None for any."""
        if frames is None:
            return self.several_count if several and self.several_count else self.count
        return None if self.frame_count is None else frames * self.frame_count + self.closing

    def check_llm(
        self, name: str, *, model: str, hidden_size: int, placeholders: Mapping[Kind, int]
    ) -> None:
        """Check that the tokens are made for this LLM; before its weights are loaded.

        Args:
            name: The LLM's name, for the message.
            model: Where the LLM comes from, for the message.
            hidden_size: The LLM's width.
            placeholders: Id of its placeholder of an image; and of a video, if it has one.

        Raises:
            InvalidInputError: They are not.
        """
        wanted = {"image": self.image_token_id, "video": self.video_token_id}
        pairs = [("width", self.hidden_size, hidden_size)]
        pairs += [
            (f"{kind} token id", token_id, placeholders.get(kind))  # type: ignore[misc]
            for kind in KINDS
            if (token_id := wanted[kind]) is not None
        ]
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise InvalidInputError(
                    f"{name}: the {what} of the LLM {model!r} is {theirs}",
                    expected=f"{ours}, the bundle's",
                    cure="give the LLM of the checkpoint that the bundle was exported from (--llm)",
                )


def check_embeds(
    name: str,
    embeds: Embeds,
    *,
    hidden_size: int,
    count: int | None,
    nested: bool = False,
    untiled: bool = False,
    frames: int | None = None,
    largest: float = float("inf"),
) -> None:
    """Check the tokens of one image or video before they reach an LLM.

    Args:
        name: The LLM's name, for the message.
        embeds: The tokens, float32 or float16 [n, L].
        hidden_size: L that the LLM takes.
        count: n that the bundle promises; ``None`` without a bundle, or where it varies.
        nested: Whether fewer will do: a smaller budget of the same tokens.
        untiled: Whether the image is one of several, which this LLM's model doesn't cut.
        frames: Frames of the video; ``None`` for an image.
        largest: Largest magnitude that the LLM's dtype can hold.

    Raises:
        InvalidInputError: They are no array, of another shape or dtype, or not finite.
    """
    if frames is not None and (type(frames) is not int or frames < 1):
        raise InvalidInputError(f"{name}: got a video of {frames!r} frames", expected="1 or more")
    rows = "K" if count is None else f"1 … {count}" if nested else str(count)
    whose = (
        "one image's tokens"
        if frames is None
        else f"the tokens of a video's {counted(frames, 'frame')}"
    )
    takes = f"{whose} as a finite float32 or float16 numpy array [{rows}, {hidden_size}]"
    if not isinstance(embeds, np.ndarray):
        raise InvalidInputError(f"{name}: got {type(embeds).__name__}", expected=takes)
    if embeds.dtype not in (np.float32, np.float16):
        raise InvalidInputError(f"{name}: got tokens of dtype {embeds.dtype}", expected=takes)
    least = 1 if nested or count is None else count
    most = float("inf") if count is None else count
    right = embeds.ndim == 2 and least <= embeds.shape[0] <= most
    if not right or embeds.shape[1] != hidden_size:
        batch = embeds.ndim == 3 and frames is None
        cure = "give one image of the batch, such as tokens.embeds[0]" if batch else ""
        if untiled and not batch:
            cure = (
                "encode each image with image_embeds(image, several=True): of several none is cut"
            )
        raise InvalidInputError(
            f"{name}: got tokens of shape {list(embeds.shape)}",
            expected=takes,
            cure=cure,
        )
    finite = np.isfinite(embeds)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        raise InvalidInputError(
            f"{name}: {bad.size} of {embeds.shape[0]} tokens (first: row {bad[0]}) hold NaN "
            "or infinity",
            expected=takes,
            cure="encode the image again, and run 'vzip check' on the bundle if it repeats",
        )
    magnitude = float(np.abs(embeds).max())
    if magnitude > largest:
        raise InvalidInputError(
            f"{name}: got tokens up to {magnitude:.4g}",
            expected=f"at most {largest:.6g}, the largest number of the LLM's dtype",
            cure="open the LLM in float32",
        )


def check_shown(
    name: str,
    embeds: Given | Sequence[Given],
    *,
    frames: int | None,
    tokens: TokenSpec | None,
    hidden_size: int,
    takes_videos: bool,
    largest: float = float("inf"),
    positions: Positions | None = None,
    unable: str | None = NO_POSITIONS,
) -> Shown:
    """Check the tokens that a conversation is about, and divide them among placeholders.

    A video has a placeholder of its own where the LLM knows videos; where it doesn't, its frames
    are images that follow each other.

    Args:
        name: The LLM's name, for messages.
        embeds: float32 or float16 [n, L], or what `VisionEncoder.image_tokens` or `video_tokens`
            returned; or a list or tuple of them for several images.
        frames: Frames of the video; ``None`` for images.
        tokens: What the bundle says; ``None`` to take any number.
        hidden_size: L that the LLM takes.
        takes_videos: Whether the LLM has a placeholder for videos.
        largest: Largest magnitude that the LLM's dtype can hold.
        positions: Which positions the rows are to have; None for what `tokens` says, or
            ``consecutive`` where nothing says where the rows stand.
        unable: Why this LLM can't give tokens their original positions; None where it can. They
            are consecutive then, which is said once.

    Returns:
        Copies, so that the caller may go on using its arrays.

    Raises:
        InvalidInputError: Something is wrong with them; the message says which, if there are
            several. ``original`` is asked for, and the bundle doesn't say where tokens stand.
    """
    if positions not in (None, "original", "consecutive"):
        raise InvalidInputError(
            f"{name}: got positions={positions!r}", expected="'original' or 'consecutive'"
        )
    several = isinstance(embeds, (list, tuple))
    given: Sequence[Any] = embeds if isinstance(embeds, (list, tuple)) else [embeds]
    if not given:
        raise InvalidInputError(f"{name}: got an empty list of images", expected="1 or more")
    if several and frames is not None:
        raise InvalidInputError(
            f"{name}: got a list of {counted(len(given), 'array')} with frames={frames}",
            expected="a video's tokens as one array, or a list of images without frames",
        )
    arrays = [each.embeds if isinstance(each, EncodedImage) else each for each in given]
    where = tuple(each.where if isinstance(each, EncodedImage) else UNKNOWN for each in given)
    together = len(arrays) > 1
    untiled = together and tokens is not None and tokens.several_count is not None
    for number, each in enumerate(arrays):
        whose = f"{name}: image {number}" if together else name
        check_embeds(
            whose,
            each,
            hidden_size=hidden_size,
            count=None if tokens is None else tokens.rows(frames, several=together),
            nested=tokens is not None and tokens.nested,
            untiled=untiled,
            frames=frames,
            largest=largest,
        )
        check_places(whose, where[number], len(each))
    if frames is None or takes_videos:
        kind: Kind = "image" if frames is None else "video"
        shown = Shown(kind, tuple(np.array(each) for each in arrays))
        return _placed(name, shown, where, unable, _wanted(name, where, tokens, positions))
    rows = len(arrays[0])
    if rows % frames:
        raise InvalidInputError(
            f"{name}: got {counted(rows, 'token')} of {counted(frames, 'frame')}",
            expected="as many tokens of every frame, without a closing token",
            cause="each frame is an image to this LLM",
        )
    shown = Shown("image", tuple(np.array_split(np.array(arrays[0]), frames)))
    each_frame = tuple(frame_places(where[0], frames))
    return _placed(name, shown, each_frame, unable, _wanted(name, where, tokens, positions))


def _wanted(
    name: str,
    where: Sequence[Places],
    tokens: TokenSpec | None,
    positions: Positions | None,
) -> Positions:
    """Return which positions rows are to have.

    Raises:
        InvalidInputError: Original ones are asked for, and nothing says where the rows stand.
    """
    known = all(each.span is not None for each in where)
    if positions == "original" and not known:
        raise _unplaced(name, tokens)
    default = tokens.positions if known and tokens is not None else "consecutive"
    return positions or default


def _placed(
    name: str, shown: Shown, where: tuple[Places, ...], unable: str | None, wanted: Positions
) -> Shown:
    """Return what is shown with the positions that are wanted, as far as that goes."""
    if wanted == "consecutive":
        return shown
    if unable is not None:
        say_consecutive(f"{name}: tokens get consecutive positions, since {unable}")
        return shown
    if any(each.places is None for each in where):
        say_consecutive(
            f"{name}: tokens get consecutive positions, since the uncompressed model shrinks what "
            "is shown, so that no patch has a place of its own"
        )
        return shown
    orders = [by_place(each) for each in where]
    return Shown(
        shown.kind,
        tuple(part[order] for part, order in zip(shown.parts, orders, strict=True)),
        tuple(
            Places(each.places[order], each.span)  # type: ignore[index]
            for each, order in zip(where, orders, strict=True)
        ),
        shown,
    )


def _unplaced(name: str, tokens: TokenSpec | None) -> InvalidInputError:
    """Return the error for rows of which nobody knows where they stand."""
    if tokens is not None and not tokens.placed:
        return unplaced_bundle(name)
    return InvalidInputError(
        f"{name}: got rows without their places",
        expected="what VisionEncoder.image_tokens or video_tokens returned, for "
        "positions='original'",
        cure="give that as it is, instead of its embeds alone",
    )


def unplaced_bundle(name: str) -> InvalidInputError:
    """Return the error for a bundle that doesn't say where its tokens stand."""
    return InvalidInputError(
        f"{name}: the bundle doesn't say where its tokens stand",
        expected="the output token_positions, for original positions",
        cause="it was exported by an older version of vzip",
        cure="export it again, or ask with --positions consecutive",
    )


@functools.cache
def say_consecutive(why: str) -> None:
    """Say why tokens get consecutive positions; a second time it isn't news."""
    _log.warning(why)


def check_batch(name: str, embeds: Sequence[object], questions: Sequence[str]) -> None:
    """Check that a batch has one question for each picture, and at least one.

    Raises:
        InvalidInputError: It hasn't.
    """
    if len(embeds) != len(questions) or not questions:
        raise InvalidInputError(
            f"{name}: got the tokens of {counted(len(embeds), 'image')} and "
            f"{counted(len(questions), 'question')}",
            expected="as many of both, 1 or more",
        )
