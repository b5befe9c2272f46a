"""Frames of a video: from a file, a folder of images, or a list of images.

A video is recognised by its first bytes, never by its name, and never fetched from anywhere. It is
decoded by PyAV or, where that is not installed, by OpenCV; both give the same frames.

| container | recognised |
|---|---|
| MP4, MOV, M4V, 3GP | yes |
| Matroska (MKV), WebM | yes |
| AVI, FLV, WMV (ASF), Ogg | yes |
| MPEG transport and program stream | yes |
| GIF, animated WebP and PNG | no: they are images, of which the first frame is taken |
| a folder | its images, in the natural order of their names (``2.png`` before ``10.png``) |

What happens to the odd ones:

| video | result |
|---|---|
| rotated or mirrored by its metadata, as phones do | upright; with OpenCV rotation only |
| fewer frames than asked | all of them, each once |
| several pictures in one file | the first that is no cover art |
| time that starts late or again, jumps, comes twice or is missing | all frames, in order |
| recordings joined by `cat`: TS, VOB and other MPEG, MKV, WebM, AVI, Ogg, fragments | all of them |
| recordings joined by `cat`: MP4, FLV, WMV, of which readers see the first alone | refused |
| alpha, more than 8 bits a channel, HDR | 8 bits RGB, without alpha and tone mapping |
| pixels that are not square | taken as they are, as Video-LLaVA's decoder does |
| cut off: MP4, MOV, MKV, WebM, AVI, whose boxes state their length | refused |
| cut off: others | what is there, unless a wanted frame is damaged |
| damaged where a frame is wanted, no frames, sound alone, too large | refused |
| more frames stated than a file of its size can hold | refused before it is opened |

Memory holds the frames that are returned and what the decoder keeps, however long the video is.
PyAV reads a file once to learn when its frames are shown and decodes from the key frame before each
wanted one. OpenCV (and PyAV, where packets don't say in what order they are shown, as in an AVI and
where recordings are joined) decodes a file twice from its beginning, which takes minutes for a long
film. Where frames change their size, OpenCV gives all of them in the size of the first.
"""

from __future__ import annotations

import errno
import importlib
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vzip.runtime.errors import InvalidInputError, missing
from vzip.runtime.files.plain import NotPlainError, open_plain
from vzip.runtime.guard import door
from vzip.runtime.pictures.containers import check_container
from vzip.runtime.pictures.frames import DEFAULT_FRAMES, frame_positions
from vzip.runtime.pictures.images import Channels, ImageSource, check_channels, load_image

VideoSource = str | Path | Sequence[ImageSource]
"""What `sample_frames` takes: a video file, a folder of images, or a list of images."""

Choose = Callable[[int], list[int]]
"""From how many frames there are to which are taken, ascending."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
"""Files of a folder that are frames; what they hold is then told by their content."""

CONTAINERS = ("MP4", "MOV", "MKV", "WebM", "AVI", "MPEG", "FLV", "WMV", "Ogg")
"""Containers that are recognised, for messages."""

# Boxes that an MP4 or QuickTime file may begin with, and brands of it that are still pictures.
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
_MAGIC = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF: WMV
    b"OggS",
    b"\x00\x00\x01\xba",  # MPEG program stream
)
_PACKETS = 4  # of a transport stream that are looked at
_HEAD = _PACKETS * 192


@door(InvalidInputError, "the video '{source}' can't be read", cure="copy it again")
def sample_frames(
    source: VideoSource, count: int = DEFAULT_FRAMES, *, channels: Channels = "rgb"
) -> list[Image.Image]:
    """Return evenly spaced frames of a video; `frame_positions` has the exact rule.

    Args:
        source: The path of a video file or of a folder of images (str or Path, never a URL), or a
            list or tuple of frames in time order, each anything that `load_image` takes. Only the
            frames that are taken are decoded.
        count: Most frames, at least 1.
        channels: As for `load_image`: ``bgr`` for a list of arrays from OpenCV's VideoCapture.

    Returns:
        The frames in time order, upright, in mode RGB; `count` of them, or all that there are.

    Raises:
        InvalidInputError: The source can't be read, is no video of a known container, is cut off
            or damaged, holds no frame, or has frames that `load_image` refuses; `channels` is
            ``bgr`` and the source no list of arrays.
        MissingDependencyError: It is a file, and neither PyAV nor OpenCV is installed.
    """
    if type(count) is not int or count < 1:
        raise InvalidInputError(
            f"got {count!r} frames",
            expected="1 or more",
        )
    check_channels(channels)
    if isinstance(source, (list, tuple)):
        if not source:
            raise InvalidInputError(
                "got an empty list of frames",
                expected="at least one",
            )
        taken = [source[each] for each in frame_positions(len(source), count)]
        return [load_image(each, channels=channels) for each in taken]
    if not isinstance(source, (str, Path)):
        cure = "; an array [T, H, W, 3] becomes one with list(array)"
        raise InvalidInputError(
            f"got a video of type {type(source).__name__}",
            expected=(
                "the path of a video or of a folder of images, or a list of "
                f"images{(cure if isinstance(source, np.ndarray) else '')}"
            ),
        )
    name = f"the video {str(source)!r}"
    if channels == "bgr":
        raise InvalidInputError(
            f"got channels='bgr' with {name}",
            expected="a list of arrays, as OpenCV gives them",
            cause="files say themselves which channel is red",
            cure="leave channels out",
        )
    path = _existing(source, name)
    if path.is_dir():
        return sample_frames(_images_of(path, name), count)
    if not is_video(path):
        raise InvalidInputError(
            f"{name} is not a video that is known here",
            expected=(
                f"one of {', '.join(CONTAINERS)}: it is something else under this name, or empty"
            ),
            cure="convert it with 'ffmpeg -i IN OUT.mp4'",
        )
    check_container(path, name)
    return _reader()(path, name, lambda total: frame_positions(total, count))


def is_video(path: str | Path) -> bool:
    """Return whether a path is what `sample_frames` would decode as a video.

    That is an ordinary file that begins as a video container does, or a folder. What doesn't exist
    or can't be read is not; neither is an animated GIF, which is an image here.
    """
    try:
        with open_plain(path) as file:
            head = file.read(_HEAD)
    except OSError as error:
        return isinstance(error, NotPlainError) and error.errno == errno.EISDIR
    return _begins_as_video(head)


def _begins_as_video(head: bytes) -> bool:
    """Return whether a file's first bytes announce a video container."""
    if head[4:8] in _BOXES:
        return not (head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS)
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return True
    # A transport stream has no magic number but a "G" at every packet, of 188 bytes or, on cameras,
    # of 192 with a time in front. A GIF begins with one too.
    transport = any(
        head[first : _PACKETS * size : size] == b"G" * _PACKETS
        for first, size in ((0, 188), (4, 192))
    )
    return head.startswith(_MAGIC) or (transport and not head.startswith(b"GIF8"))


def _existing(source: str | Path, name: str) -> Path:
    """Return the path of an ordinary file or folder that is there; raises InvalidInputError."""
    # A Path has collapsed the slashes of a URL: `https:/host`. One letter is a drive.
    if re.match(r"(?i)[a-z][a-z0-9+.-]+:/", str(source)):
        raise InvalidInputError(
            f"got the URL {str(source)[:80]!r} as a video",
            expected="the path of a local file, for nothing is downloaded here",
            cure="download it first",
        )
    path = Path(source)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"{name} does not exist (looked for at {str(path.absolute())!r})",
            expected="a video or a folder of images",
            cure="check the path",
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise InvalidInputError(
            f"{name} is a device, pipe or socket",
            expected="an ordinary video file",
            cure="copy its content into one",
        )
    try:
        if stat.S_ISREG(status.st_mode):
            open_plain(path).close()
    except OSError as error:
        raise _unreadable(name, error) from error
    return path


def _images_of(folder: Path, name: str) -> list[ImageSource]:
    """Return a folder's images in the natural order of their names; raises InvalidInputError."""
    try:
        found = [
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        ]
    except OSError as error:
        raise _unreadable(name, error) from error
    if not found:
        raise InvalidInputError(
            f"{name} is a folder without images",
            expected=f"frames named *{', *'.join(IMAGE_SUFFIXES)}",
            cure="check the path",
        )
    return [*sorted(found, key=_natural)]


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return a key by which ``frame2`` is before ``frame10``."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def _reader() -> Callable[[Path, str, Choose], list[Image.Image]]:
    """Return what decodes files here: PyAV, else OpenCV."""
    from vzip.runtime.pictures import video_opencv, video_pyav

    try:
        importlib.import_module("av")
    except ImportError:
        pass
    else:
        return video_pyav.read
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        raise missing("av", needed_for="reading a video file", extra="video") from error
    return video_opencv.read


def _unreadable(name: str, error: Exception) -> InvalidInputError:
    """Return the error for what the system doesn't let us read."""
    reason = getattr(error, "strerror", None) or str(error)
    return InvalidInputError(
        f"{name} can't be read: {reason}",
        expected="a readable video or a folder of images",
        cure="check the path and its permissions",
    )
