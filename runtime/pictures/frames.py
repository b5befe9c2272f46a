"""Which frames of a video are taken, and how large they may be; whatever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.images import MAX_PIXELS

DEFAULT_FRAMES = 8
"""As many as Video-LLaVA was trained with."""


MAX_FRAMES = 2**24
"""Most frames of a video: 38 hours at 120 a second."""


def frame_positions(total: int, count: int) -> list[int]:
    """Return which frames of a video are taken.

    They are evenly spaced from the first frame to the last, as published Video-LLaVA takes them:
    frame ⌊i · (total − 1) / (count − 1)⌋ for i = 0 … count − 1, in the arithmetic of
    ``numpy.linspace(0, total - 1, count, dtype=int)``. One frame alone is the first.

    A video with fewer frames gives all of them, each once: a repeated frame would cost the
    language model tokens and tell it nothing.

    Args:
        total: Frames that the video has, at least 1.
        count: Frames that are wanted, at least 1.

    Returns:
        Ascending positions, 0 … total − 1, without duplicates.
    """
    if total <= count:
        return list(range(total))
    chosen: list[int] = np.linspace(0, total - 1, count, dtype=int).tolist()
    return chosen


def check_frame_size(width: int, height: int, name: str) -> None:
    """Refuse frames that are larger than any image may be, before they are converted.

    Raises:
        InvalidInputError: They have more than `MAX_PIXELS` pixels.
    """
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"{name} has frames of {width}×{height} = {width * height} pixels",
            expected=f"at most {MAX_PIXELS}: a larger one is most likely a decompression bomb",
            cure="if it is a video, shrink it first",
        )


def damaged(name: str, reason: object) -> InvalidInputError:
    """Return the error, on one line, for a video that can't be decoded.

    Args:
        name: The video, as it should stand in the message.
        reason: What the library said.
    """
    text = " ".join(str(reason).split())
    return InvalidInputError(
        f"{name} can't be decoded: {text}",
        expected="a whole video",
        cause="it is cut off, damaged or of a kind that is not known here",
        cure="copy it again, or convert it with 'ffmpeg -i IN OUT.mp4'",
    )


def cut_off(name: str, got: str, stated: str) -> InvalidInputError:
    """Return the error for a video that ends before it should.

    Args:
        name: The video, as it should stand in the message.
        got: What is there, such as ``12.0 s``.
        stated: What its header states, such as ``60.0 s``.
    """
    return InvalidInputError(
        f"{name} holds {got}, but its header states {stated}",
        expected="a whole video",
        cause="it is cut off",
        cure="copy or record it again, or save what is there with 'ffmpeg -i IN -c copy OUT.mp4'",
    )


def check_frame_count(count: int, path: Path, name: str) -> None:
    """Refuse a video that goes on and on, such as one whose header shows one frame for ever.

    Args:
        count: Frames, or packets of all streams, that were found until now.
        path: The file.
        name: The video, as it should stand in the message.

    Raises:
        InvalidInputError: There are more than `MAX_FRAMES`, or more than the file has bytes.
    """
    if count > MAX_FRAMES or (count % 1024 == 0 and count > path.stat().st_size):
        raise InvalidInputError(
            f"{name} has more than {count - 1} frames",
            expected=f"at most {MAX_FRAMES}, and a byte at least for each",
            cause="its header is damaged, or it never ends",
            cure="take a part of it with 'ffmpeg -ss FROM -t LENGTH -i IN OUT.mp4'",
        )


def without_picture(name: str) -> InvalidInputError:
    """Return the error for a file that has sound, or nothing, to give."""
    return InvalidInputError(
        f"{name} has no moving picture",
        expected="a video",
        cause="it holds sound alone, or is cut off before anything is shown",
        cure="give a file that shows something, or copy it again",
    )
