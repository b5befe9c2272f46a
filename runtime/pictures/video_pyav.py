"""Reads frames of a video file with PyAV."""

from __future__ import annotations

import contextlib
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
from vzip.runtime.pictures.containers import is_whole
from vzip.runtime.pictures.frames import (
    check_frame_count,
    check_frame_size,
    cut_off,
    damaged,
    without_picture,
)
from vzip.runtime.pictures.images import MAX_PIXELS

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

# Most bytes of a packet by which MPEG-4 says that the last frame stays; no decoder shows it again.
_REPEATS = 16

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
            index = _index(container, _picture(container, name), path, name)
        if index is None:
            return _by_order(path, name, choose)
        stamps = [int(index.shown[each]) for each in choose(len(index.shown))]
        with av.open(f"file:{path}") as container:
            images = []
            for frame, stamp in _at(container, _picture(container, name), stamps, index, name):
                # The decoder gives other frames than the packets announce, or can't go to them.
                if frame is None or frame.pts != stamp:
                    return _by_order(path, name, choose)
                images.append(_image(frame, name))
            return images
    except av.FFmpegError as error:
        raise damaged(name, error.strerror or error) from error


def _by_order(path: Path, name: str, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """Return frames of a file whose stamps don't say in what order they are shown.

    They are counted by decoding them, and taken by decoding them once more.
    """
    import av

    with av.open(f"file:{path}") as container:
        total = 0
        for total, _ in enumerate(_decoded(container, _picture(container, name)), 1):
            check_frame_count(total, path, name)
    if total == 0:
        raise without_picture(name)
    wanted = set(choose(total))
    with av.open(f"file:{path}") as container:
        frames = _decoded(container, _picture(container, name))
        taken = itertools.islice(frames, max(wanted) + 1)
        return [_image(each, name) for n, each in enumerate(taken) if n in wanted]


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a stream; of one that has no header, those that can be decoded.

    A broadcast begins, ends and is joined in the middle of pictures that need others.
    """
    import av

    errors: tuple[type[Exception], ...] = ()
    if not _has_header(container):
        errors = (av.InvalidDataError,)
        stream.thread_type = "SLICE"  # with several frames at once, others go with a damaged one
    for packet in container.demux(stream):
        with contextlib.suppress(*errors):
            yield from packet.decode()


def _has_header(container: Any) -> bool:
    """Return whether a container has a header that says what it holds."""
    found: bool = container.format.name.startswith(_STATE_THEIR_LENGTH)
    return found


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
    # Frames may grow behind the header: the decoder refuses them before it allocates them.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
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
    ordered: bool = True
    first: float = math.inf
    last: float = -math.inf
    broken: bool = False


def _is_hidden(packet: Any, stream: Any) -> bool:
    """Return whether a packet is a frame of VP8 that others refer to, and that is never shown."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


class _Order:
    """Whether stamps come as those of one unbroken recording do.

    A key frame is shown after all that was decoded before it, and what is decoded after it is shown
    after that too. Where a recording is joined to another, stamps start again and this fails.
    """

    def __init__(self) -> None:
        self._before: float = -math.inf  # the last stamp that was decoded before the last key frame
        self._last: float = -math.inf
        self._first: int | None = None

    def takes(self, stamp: int | None, key: bool) -> bool:
        """Take the next packet's stamp; return whether it fits to those before it."""
        if stamp is None or (self._first is None and not key):
            return False
        if self._first is None:
            self._first = stamp
        if key:
            self._before = self._last
        fits = stamp > self._before and stamp >= self._first
        self._last = max(self._last, stamp)
        return fits


def _index(container: Any, stream: Any, path: Path, name: str) -> _Index | None:
    """Read a file to its end without decoding.

    Returns:
        None where the packets don't say in what order their frames are shown: no stamps, stamps
        that start again or come twice, or a beginning that needs what isn't there.

    Raises:
        InvalidInputError: It holds no frame, or is cut off.
    """
    # An AVI has no such times; libavformat's are those of decoding.
    found, order = _Demuxed(ordered=container.format.name != "avi"), _Order()
    for count, packet in enumerate(container.demux()):
        check_frame_count(count, path, name)
        if packet.size == 0:  # ends a stream
            continue
        found.broken = packet.is_corrupt
        if packet.pts is not None:
            base = float(packet.time_base)
            found.first = min(found.first, packet.pts * base)
            found.last = max(found.last, (packet.pts + (packet.duration or 0)) * base)
        if packet.stream.index != stream.index:
            continue
        # What bad reception damaged may be shown or not, and so may what stands at a joint.
        found.ordered &= order.takes(packet.pts, packet.is_keyframe) and not packet.is_corrupt
        if packet.is_discard or packet.pts is None or _is_hidden(packet, stream):
            continue  # cut away by an edit list, say
        found.ordered &= stream.codec_context.name != "mpeg4" or packet.size > _REPEATS
        found.shown.append(packet.pts)
        if packet.is_keyframe:
            found.keys.append(packet.pts)
    shown = np.sort(np.array(found.shown, np.int64))
    if not is_whole(path):
        _check_end(container, found, shown * float(stream.time_base), name)
    if not found.ordered or (np.diff(shown) == 0).any():
        return None
    if not len(shown):
        raise without_picture(name)
    # libavformat doesn't find times below zero.
    found_by_time = container.format.name.startswith(_FIND_KEYS) and shown[0] >= 0
    keys = np.sort(np.array(found.keys if found_by_time else [], np.int64))
    return _Index(shown, keys)


def _check_end(container: Any, found: _Demuxed, seconds: NDArray[np.floating], name: str) -> None:
    """Refuse a file that ends in the middle of a packet, or long before its header says."""
    if not _has_header(container):
        return
    stated = 0.0 if container.duration is None else container.duration / 1e6
    if container.format.name.startswith("matroska") and 0 < found.first < stated:
        stated -= found.first  # it states when it ends, and may begin late
    got = max(found.last - found.first, 0.0)
    # A file need not say how long its last frame is shown: as long as any other, at most.
    longest = (
        float(np.diff(seconds).max()) if len(seconds) > 1 else (math.inf if len(seconds) else 0.0)
    )
    if found.broken or got + longest < 0.9 * stated:
        raise cut_off(name, f"{got:.1f} s", f"{stated:.1f} s" if stated else "more")


def _at(
    container: Any, stream: Any, stamps: list[int], index: _Index, name: str
) -> Iterator[tuple[Any, int]]:
    """Yield the first frame at or after each of ascending times, and the time; None for no frame.

    The file is just opened.
    """
    frames: Iterator[Any] | None = container.decode(stream)
    frame, reached = None, int(index.shown[0])
    for stamp in stamps:
        keys = index.keys[index.keys <= stamp]
        if len(keys) and keys[-1] > reached:
            frame, frames = None, _from_key(container, stream, keys, stamp)
        while frames is not None and (frame is None or frame.pts < stamp):
            frame = next((each for each in frames if each.pts is not None), None)
            if frame is None:
                if _has_header(container):
                    at = float(stamp * stream.time_base)
                    raise damaged(name, f"nothing comes of it at {at:.2f} s")
                break
            reached = frame.pts
        yield frame, stamp


def _from_key(
    container: Any, stream: Any, keys: NDArray[np.int64], stamp: int
) -> Iterator[Any] | None:
    """Return decoded frames from a key frame at or before a time; None where none is found."""
    import av

    for key in keys[::-1]:  # the last; those before it where libavformat lands behind it
        try:
            container.seek(int(key), stream=stream)
        except av.FFmpegError:  # a live recording has no table of its key frames
            return None
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= stamp:
            return itertools.chain([first], frames)
    return None


def _image(frame: Any, name: str) -> Image.Image:
    """Return a decoded frame upright and in RGB."""
    from av.sidedata.sidedata import Type

    if frame.is_corrupt:
        at = "of unknown time" if frame.time is None else f"at {frame.time:.2f} s"
        raise damaged(name, f"the frame {at} is damaged")
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
