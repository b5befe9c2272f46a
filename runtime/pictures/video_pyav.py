"""Reads frames of a video file with PyAV."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.frames import check_frame_size, cut_off, damaged, without_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What a display matrix's a, b, c, d (x' = ax + cy, y' = bx + dy, y downwards) ask for.
_UPRIGHT = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}

# Containers whose header states how long they are; elsewhere the length is guessed from the data.
_STATE_THEIR_LENGTH = ("mov", "matroska", "avi")

# Containers in which libavformat finds a key frame by its time; in MPEG's it lands behind it, and
# the times that follow differ from those of an unbroken run.
_FIND_KEYS = ("mov", "matroska", "flv", "asf", "ogg")


def read(path: Path, name: str, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """Return frames of a video file.

    Args:
        path: An ordinary file.
        name: The video, as it should stand in messages.
        choose: From how many frames there are to which are taken, ascending.

    Returns:
        The frames in time order, upright, in mode RGB.

    Raises:
        InvalidInputError: No moving picture, no frames, cut off, damaged where a frame is wanted,
            or too large.
    """
    import av

    try:
        # Without "file:", libavformat takes a name such as "concat:a|b" for a protocol.
        with av.open(f"file:{path}") as container:
            index = _index(container, _picture(container, name), name)
        if index is None:
            return _by_order(path, name, choose)
        stamps = [int(index.shown[each]) for each in choose(len(index.shown))]
        with av.open(f"file:{path}") as container:
            frames = _at(container, _picture(container, name), stamps, index, name)
            return [_image(each, name) for each in frames]
    except av.FFmpegError as error:
        raise damaged(name, error.strerror or error) from error


def _by_order(path: Path, name: str, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """Return frames of a file that doesn't say when they are shown: count them, then take them."""
    import av

    with av.open(f"file:{path}") as container:
        total = sum(1 for _ in container.decode(_picture(container, name)))
    if total == 0:
        raise without_picture(name)
    wanted = set(choose(total))
    with av.open(f"file:{path}") as container:
        frames = container.decode(_picture(container, name))
        return [_image(each, name) for n, each in enumerate(frames) if n in wanted]


def _picture(container: Any, name: str) -> Any:
    """Return the first video stream that is no cover art, ready to be decoded."""
    from av.stream import Disposition

    streams = [
        each for each in container.streams.video if not each.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise without_picture(name)
    stream = streams[0]
    if stream.codec_context is None:
        raise damaged(name, "PyAV has no decoder for its codec")
    check_frame_size(stream.codec_context.width, stream.codec_context.height, name)
    stream.thread_type = "AUTO"
    return stream


@dataclass
class _Index:
    """When a stream's frames are shown, in units of its time base.

    Attributes:
        shown: int64 [n], ascending.
        keys: Those of them that decoding can begin with, where the container finds them reliably,
            else none; int64, ascending.
    """

    shown: NDArray[np.int64]
    keys: NDArray[np.int64]


@dataclass
class _Demuxed:
    """What the packets of a whole file say; times in seconds."""

    shown: array[int] = field(default_factory=lambda: array("q"))
    keys: array[int] = field(default_factory=lambda: array("q"))
    timed: bool = True
    first: float = math.inf
    last: float = -math.inf
    broken: bool = False


def _index(container: Any, stream: Any, name: str) -> _Index | None:
    """Read a file to its end without decoding; None where packets don't say when they are shown.

    Raises:
        InvalidInputError: It holds no frame, or is cut off.
    """
    # An AVI has no such times; libavformat's are those of decoding.
    found = _Demuxed(timed=container.format.name != "avi")
    for packet in container.demux():
        if packet.size == 0:  # ends a stream
            continue
        found.broken = packet.is_corrupt
        if packet.pts is not None:
            base = float(packet.time_base)
            found.first = min(found.first, packet.pts * base)
            found.last = max(found.last, (packet.pts + (packet.duration or 0)) * base)
        # Cut away by an edit list; or known to be damaged, as by bad reception.
        unwanted = packet.is_discard or packet.is_corrupt
        if packet.stream.index != stream.index or unwanted:
            continue
        if packet.pts is None:
            found.timed = False
            continue
        found.shown.append(packet.pts)
        if packet.is_keyframe:
            found.keys.append(packet.pts)
    shown = np.sort(np.array(found.shown, np.int64))
    _check_whole(container, found, shown * float(stream.time_base), name)
    if not found.timed:
        return None
    if not len(shown):
        raise without_picture(name)
    found_by_time = container.format.name.startswith(_FIND_KEYS)
    keys = np.sort(np.array(found.keys if found_by_time else [], np.int64))
    return _Index(shown, keys)


def _check_whole(container: Any, found: _Demuxed, seconds: NDArray[np.floating], name: str) -> None:
    """Refuse a file that ends in the middle of a packet, or long before its header says."""
    if not container.format.name.startswith(_STATE_THEIR_LENGTH):
        return
    stated = 0.0 if container.duration is None else container.duration / 1e6
    got = max(found.last - found.first, 0.0)
    # A file need not say how long its last frame is shown: as long as any other, at most.
    longest = (
        float(np.diff(seconds).max()) if len(seconds) > 1 else (math.inf if len(seconds) else 0.0)
    )
    if found.broken or got + longest < 0.9 * stated:
        raise cut_off(name, f"{got:.1f} s", f"{stated:.1f} s" if stated else "more")


def _at(container: Any, stream: Any, stamps: list[int], index: _Index, name: str) -> Iterator[Any]:
    """Yield the frames that are shown at ascending times, from a file that is just opened."""
    frames: Iterator[Any] = container.decode(stream)
    frame, reached = None, int(index.shown[0])
    for stamp in stamps:
        keys = index.keys[index.keys <= stamp]
        if len(keys) and keys[-1] > reached:
            frame, frames = None, _from_key(container, stream, keys, stamp, name)
        while frame is None or frame.pts < stamp:
            frame = next((each for each in frames if each.pts is not None), None)
            if frame is None:
                raise _nothing_at(stamp, stream, name)
            reached = frame.pts
        yield frame


def _from_key(
    container: Any, stream: Any, keys: NDArray[np.int64], stamp: int, name: str
) -> Iterator[Any]:
    """Return decoded frames from a key frame at or before a time."""
    for key in keys[::-1]:  # the last; those before it where libavformat lands behind it
        container.seek(int(key), stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= stamp:
            return itertools.chain([first], frames)
    raise _nothing_at(stamp, stream, name)


def _nothing_at(stamp: int, stream: Any, name: str) -> InvalidInputError:
    """Return the error for a wanted frame that the decoder doesn't give."""
    return damaged(name, f"nothing comes of it at {float(stamp * stream.time_base):.2f} s")


def _image(frame: Any, name: str) -> Image.Image:
    """Return a decoded frame upright and in RGB."""
    from av.sidedata.sidedata import Type

    if frame.is_corrupt:
        raise damaged(name, f"the frame at {frame.time:.2f} s is damaged")
    check_frame_size(frame.width, frame.height, name)
    image: Image.Image = frame.to_image()
    # By key: iterating gives the data before PyAV 19 and their types since.
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return image
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)
    method = _method(matrix[:2, :2] / 65536, name)
    return image if method is None else image.transpose(method)


def _method(matrix: NDArray[np.floating], name: str) -> Image.Transpose | None:
    """Return what a display matrix [[a, b], [c, d]] does to a picture; None for nothing."""
    signs = tuple(np.rint(matrix).astype(int).ravel().tolist())
    if signs not in _UPRIGHT or not np.allclose(matrix, np.rint(matrix), atol=1e-3):
        raise InvalidInputError(
            f"{name} asks to be shown turned or stretched by the matrix {matrix.tolist()}",
            expected="quarter turns and mirrors alone",
            cure="make it upright with 'ffmpeg -i IN OUT.mp4'",
        )
    return _UPRIGHT[signs]
