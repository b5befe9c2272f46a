"""Reads frames of a video file with OpenCV.

OpenCV's own positions (``CAP_PROP_POS_FRAMES``, ``CAP_PROP_FRAME_COUNT``) are estimates in many
containers. So frames are counted by decoding them, and taken by decoding them once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vzip.runtime.pictures.frames import check_frame_size, cut_off, damaged, without_picture


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
    with _opened(path, name) as capture:
        total = 0
        while capture.grab():
            total += 1
        _check_whole(capture, total, name)
    wanted = choose(total)
    images = []
    with _opened(path, name) as capture:
        for position in range(wanted[-1] + 1):
            whole = capture.grab()
            if whole and position in wanted:
                whole, pixels = capture.retrieve()  # uint8 [H, W, 3], blue first
                if whole:
                    images.append(Image.fromarray(pixels[:, :, ::-1].copy()))
            if not whole:
                raise damaged(name, f"OpenCV gives no frame {position} of {total}")
    return images


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


def _check_whole(capture: Any, total: int, name: str) -> None:
    """Refuse a file without frames, or with far fewer than its header says."""
    import cv2

    stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if total < 0.9 * stated - 2:  # an estimate: length times rate
        raise cut_off(name, f"{total} frames", f"{stated} frames")
    if total == 0:
        raise without_picture(name)
