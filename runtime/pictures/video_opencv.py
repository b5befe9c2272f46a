"""Reads frames of a video file with OpenCV.

OpenCV's own positions (``CAP_PROP_POS_FRAMES``, ``CAP_PROP_FRAME_COUNT``) are estimates in many
containers. So frames are counted by decoding them, and taken by decoding them once more.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.containers import is_whole, joined_avis
from vzip.runtime.pictures.frames import (
    check_frame_count,
    check_frame_size,
    cut_off,
    damaged,
    without_picture,
)
from vzip.runtime.wording import counted

_RETRIES = 64  # packets in a row that give no frame, after which a file is taken to be at its end


def read(path: Path, name: str, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """Return frames of a video file.

    Args:
        path: An ordinary file.
        name: The video, as it should stand in messages.
        choose: From how many frames there are to which are taken, ascending.

    Returns:
        The frames in time order, upright, in mode RGB.

    Raises:
        InvalidInputError: No moving picture, no frames, cut off, damaged, or too large.
    """
    _check_joined(path, name)
    with _opened(path, name) as capture:
        total = skipped = 0
        for total, skipped in enumerate(_grabbed(capture), 1):  # noqa: B007
            check_frame_count(total, path, name)
        _check_end(capture, total, skipped > 0, is_whole(path), name)
    wanted = choose(total)
    images = []
    with _opened(path, name) as capture:
        for position, _ in enumerate(itertools.islice(_grabbed(capture), wanted[-1] + 1)):
            if position in wanted:
                whole, pixels = capture.retrieve()  # uint8 [H, W, 3], blue first
                if whole:
                    images.append(Image.fromarray(pixels[:, :, ::-1].copy()))
    if len(images) != len(wanted):
        raise damaged(name, f"OpenCV gives {len(images)} of {counted(len(wanted), 'frame')}")
    return images


def _check_joined(path: Path, name: str) -> None:
    """Refuse AVIs one after the other, of which FFmpeg before 7 sees the first alone."""
    import cv2

    parts = joined_avis(path)
    if parts > 1 and int(cv2.__version__.partition(".")[0]) < 5:
        raise InvalidInputError(
            f"{name} is {parts} recordings, one after the other",
            expected="one",
            cause=f"OpenCV {cv2.__version__} sees the first alone",
            cure="install PyAV, which sees them all: pip install 'vzip[video]'",
        )


def _grabbed(capture: Any) -> Iterator[int]:
    """Yield after each frame; how many packets before it gave none, which ends no file."""
    skipped = 0
    while True:
        for failed in range(_RETRIES):
            if capture.grab():
                skipped += failed
                break
        else:
            return
        yield skipped


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    """Open a file, by FFmpeg alone: other backends would take a name with digits for a pattern."""
    import cv2

    # Without "file:", libavformat takes a name such as "concat:a|b" for a protocol.
    capture = cv2.VideoCapture(f"file:{path}", cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise damaged(name, "OpenCV can't open it, or finds no moving picture in it")
        width, height = (
            int(capture.get(each)) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        check_frame_size(width, height, name)
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        yield capture
    finally:
        capture.release()


def _check_end(capture: Any, total: int, skipped: bool, whole: bool | None, name: str) -> None:
    """Refuse a file without frames, or one that holds fewer than it states for it is damaged."""
    import cv2

    stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    # This is length times rate, and far too high where time starts late or has holes. So it is
    # believed where boxes say that the file is cut off, or where frames can't be decoded.
    if total < 0.9 * stated - 2:
        if whole is False or total == 0:
            raise cut_off(name, f"{counted(total, 'frame')}", f"{counted(stated, 'frame')}")
        if skipped and whole:
            raise damaged(name, f"OpenCV gives {total} of {counted(stated, 'frame')}")
    if total == 0:
        raise without_picture(name)
