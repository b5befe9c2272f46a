"""Reads an image from a path, bytes, PIL image or array, and says clearly what it can't read.

Images come from strangers. So there is a whitelist of formats, recognised by their first bytes and
never by their name (JPEG, PNG, WebP, BMP, GIF); a cap on pixels, checked from the header before any
pixel is decoded (of a draft, on those that it leaves); caps on what else keeps a decoder busy; and
a cap on the encoded size. Pillow's own `Image.open` is not used: it would try
every plugin that happens to be registered, and its bomb check hangs on a global
(`Image.MAX_IMAGE_PIXELS`) that belongs to the application and that nothing here reads or sets
(Pillow's decoders for WebP and GIF read it: where it is the lower limit, it holds, with an error).

What happens to the odd ones:

| image | result |
|---|---|
| array of OpenCV's | blue and red change places, if `channels` says ``bgr`` |
| alpha, or a transparent colour (RGBA, LA, PA, palette, GIF, PNG's tRNS) | composited onto white |
| palette, grey, one bit, CMYK, YCbCr, HSV | converted to RGB |
| 16 bits a channel, colour PNG | Pillow decodes the high byte |
| 16 or 32 bits, one channel (modes I;16, I, F) | refused: its range is not known |
| animated GIF, WebP, PNG | the first frame |
| EXIF or XMP orientation | applied, so the result is upright |
| EXIF, text, colour profile or other extras that are damaged | left out: the pixels count |
| more scans, blocks or unpacked text than any picture has | refused: see `headers` |
| truncated, corrupt, of size 0, larger than a cap, not on the whitelist | refused |

The conversions are those of transformers 5's image processors (`image_transforms.convert_to_rgb`)
for a PIL image. (Given a *path*, those processors drop alpha instead of compositing it; here one
picture gives one result, however it comes in.)
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Union
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.plain import NotPlainError, open_plain, read_plain
from vzip.runtime.guard import door
from vzip.runtime.pictures import headers
from vzip.runtime.pictures.headers import (
    MAX_BLOCKS,
    check_blocks,
    check_exif,
    check_scans,
    too_many,
    without_extras,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.ImageFile import ImageFile

ImageSource = Union[str, Path, bytes, Image.Image, "np.ndarray[Any, Any]"]
"""What `load_image` takes: a path, an encoded image, a PIL image, or a uint8 array."""

Channels = Literal["rgb", "bgr"]
"""The order of an array's last axis: ``bgr`` is what OpenCV's readers and cameras give."""

MAX_PIXELS = 2**26
"""Most pixels of an image: 67 million. The 61 and 64 megapixels of today's large sensors pass."""

MAX_ENCODED_BYTES = 4 * MAX_PIXELS + 2**20
"""Most bytes of an encoded image: 32 bits a pixel uncompressed, and 1 MiB of header."""

MAX_DRAFTED = 4 * MAX_PIXELS
"""Most pixels of a JPEG that a draft makes small; half of it, where it has several scans."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Formats that are decoded, as Pillow names them."""

# Modes that `Image.convert` takes to RGB with no choice to make. I, F and I;16 are not among them:
# Pillow clips them at 255, which turns most such pictures white.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

_HEAD = 12  # bytes that tell a format
# By the id of a PIL image, or of the file that it is read from.
_LOCKS: WeakValueDictionary[int, threading.Lock] = WeakValueDictionary()
_LOCKS_LOCK = threading.Lock()

_ORIENTATION = 0x0112  # the EXIF tag
_EXIF_AS_TEXT = "Raw profile type exif"  # where ImageMagick keeps it in a PNG
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@door(InvalidInputError, "the image '{source}' can't be read", cure="save it again")
def load_image(
    source: ImageSource, *, draft: int | None = None, channels: Channels = "rgb"
) -> Image.Image:
    """Return the image that a source holds, upright and in RGB.

    With `draft`, a large JPEG is made smaller by its decoder: other pixels than the processors see,
    in a fraction of the time (docs/runtime.md, "Large pictures").

    Args:
        source: A path (str or Path, never a URL), an encoded image (bytes), a PIL image (its
            current frame), or a uint8 array: [H, W, 3] in the order that `channels` names, or
            [H, W] grey. An array of OpenCV's is ``bgr``.
        draft: Decode a JPEG (a path's or bytes') to a half, quarter or eighth of its width and
            height, the smallest at which both are still at least `draft` pixels. None for all
            pixels. Other formats are decoded in full.
        channels: Of an array: ``rgb`` for red, green, blue; ``bgr`` for blue, green, red, as
            OpenCV has them. Everything else says it itself, and is refused with ``bgr``.

    Returns:
        The image in mode RGB, decoded, with the orientation applied. A PIL image that is upright
        RGB already is returned as it is, not copied.

    Raises:
        InvalidInputError: The source can't be read, is no image of a known format, is damaged, is
            larger than `MAX_PIXELS` or `MAX_ENCODED_BYTES`, or has a mode, dtype or layout whose
            meaning is not certain; `draft` is no positive integer; `channels` is neither, or is
            ``bgr`` for what is no array.
    """
    check_draft(draft)
    check_source(source, channels=channels)
    if isinstance(source, np.ndarray):
        return _from_array(source, channels)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, bytes):
        return _decode(source, "the encoded image", draft)
    return _decode(_read(source, MAX_ENCODED_BYTES), _named(source), draft)


@door(InvalidInputError, "the image '{source}' can't be read", cure="save it again")
def check_source(source: ImageSource, *, channels: Channels = "rgb") -> None:
    """Refuse what `load_image` refuses without decoding it: cheap, where there are many.

    Of a file, its size and first bytes are looked at.

    Args:
        source: As for `load_image`.
        channels: As for `load_image`.

    Raises:
        InvalidInputError: As for `load_image`; what is damaged is found when it is decoded.
    """
    check_channels(channels)
    if isinstance(source, np.ndarray):
        _check_array(source, channels)
        return
    if channels == "bgr" and isinstance(source, (str, Path, bytes, Image.Image)):
        raise InvalidInputError(
            f"got channels='bgr' with an image of type {_type_name(source)}",
            expected="a uint8 numpy array [H, W, 3], as OpenCV gives it",
            cause="files and PIL images say themselves which channel is red",
            cure="leave channels out; of a PIL image made from a BGR array give the array",
        )
    if isinstance(source, bytes):
        _check_encoded_size(len(source), "the encoded image")
        _known_format(source, "the encoded image")
    elif isinstance(source, (str, Path)):
        _read(source, 0)
    elif not isinstance(source, Image.Image):
        raise InvalidInputError(
            f"got an image of type {_type_name(source)}",
            expected=(
                "a path, bytes, a PIL image or a uint8 numpy array [H, W, 3] (a tensor becomes one "
                "with .cpu().numpy(), a file with .read())"
            ),
        )


def is_animated(path: str | Path) -> bool:
    """Return whether an image file that `load_image` took has more frames than the one it gives.

    A phone's multi-picture JPEG has several pictures too, of which the first is the photo.
    """
    try:
        data = read_plain(path, MAX_ENCODED_BYTES)
    except OSError:
        return False
    return headers.is_animated(format_of(data), data)


def check_channels(channels: object) -> None:
    """Raise InvalidInputError unless this names an order of an array's channels."""
    if channels not in ("rgb", "bgr"):
        raise InvalidInputError(
            f"got channels={channels!r}",
            expected="'rgb' or 'bgr', OpenCV's order",
        )


def check_draft(draft: object) -> None:
    """Raise InvalidInputError unless this is what `load_image` takes as `draft`."""
    if draft is not None and (type(draft) is not int or draft < 1):
        raise InvalidInputError(
            f"got draft = {draft!r}",
            expected="a positive number of pixels, or None for a full decode",
            cause="twice the tower's input is close to it",
        )


def _from_array(array: np.ndarray[Any, Any], channels: Channels) -> Image.Image:
    """Return the RGB image of an array that was checked."""
    if array.ndim == 2:
        return Image.fromarray(array).convert("RGB")
    return Image.fromarray(array if channels == "rgb" else np.ascontiguousarray(array[..., ::-1]))


def _check_array(array: np.ndarray[Any, Any], channels: Channels) -> None:
    """Refuse an array that isn't uint8 [H, W, 3] or [H, W]; raises InvalidInputError."""
    got = f"got an image array of dtype {array.dtype} and shape {list(array.shape)}"
    expected = f"uint8 [H, W, 3] ({channels.upper()}) or [H, W] (grey)"
    if array.dtype != np.uint8:
        cure = (
            "pixels from 0 to 1 become uint8 with (array * 255).round().astype('uint8')"
            if np.issubdtype(array.dtype, np.floating)
            else "scale it to 0 … 255 and use .astype('uint8')"
        )
        raise InvalidInputError(
            got,
            expected=expected,
            cure=cure,
        )
    if array.ndim == 4:
        raise InvalidInputError(
            got,
            expected=expected,
            cure="for a batch give a list of images",
        )
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        cure = "check the order of its axes"
        if array.ndim == 3 and array.shape[2] == 4:
            rgba = "array" if channels == "rgb" else "array[..., [2, 1, 0, 3]]"
            cure = f"for alpha give PIL.Image.fromarray({rgba}), to drop it array[..., :3]"
        elif array.ndim == 3 and array.shape[2] == 1:
            cure = "drop the last axis with array[..., 0]"
        elif array.ndim == 3 and array.shape[0] == 3:
            cure = "channels come last here: array.transpose(1, 2, 0)"
        raise InvalidInputError(
            got,
            expected=expected,
            cure=cure,
        )
    _check_size(array.shape[1], array.shape[0], "the image array")


def _named(source: str | Path) -> str:
    """Return what messages call the file at a path."""
    return f"the image {str(source)!r}"


def _read(source: str | Path, most: int) -> bytes:
    """Return the first bytes of an image file, and `most` more; raises InvalidInputError."""
    text, name = str(source), _named(source)
    # A Path has collapsed the slashes of a URL that was made into one: `https:/host`. One letter
    # before the colon is a drive.
    if re.match(r"(?i)([a-z][a-z0-9+.-]+:/|data:)", text):
        raise InvalidInputError(
            f"got the URL {text[:80]!r} as an image",
            expected="the path of a local file, for nothing is downloaded here",
            cure="download it first, or give its bytes",
        )
    if text == "":
        raise InvalidInputError(
            "got an empty path as an image",
            expected="the path of an image file",
        )
    path = Path(source)
    try:
        with open_plain(path) as file:
            _check_encoded_size(os.fstat(file.fileno()).st_size, name)
            head = file.read(_HEAD)
            _known_format(head, name)
            data = head + file.read(most)
        _check_encoded_size(len(data), name)  # it may have grown
    except NotPlainError as error:
        folder = error.errno == errno.EISDIR
        raise InvalidInputError(
            f"{name} is a {'folder' if folder else 'device, pipe or socket'}",
            expected="an ordinary image file",
            cure="name one inside it" if folder else "copy its content into one",
        ) from error
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"{name} does not exist (looked for at {str(path.absolute())!r})",
            expected="an image file",
            cure="check the path",
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInputError(
            f"{name} can't be read: {reason}",
            expected="a readable image file",
            cure="check the path and its permissions",
        ) from error
    return data


def _decode(data: bytes, name: str, draft: int | None) -> Image.Image:
    """Decode an encoded image; raises InvalidInputError."""
    kind = _known_format(data, name)
    try:
        return _finish(_pixels(kind, data, name, draft), name)
    except InvalidInputError:
        raise
    except Exception as error:  # on hostile bytes a decoder may raise anything
        # Damaged may be what is no pixel: a text, a colour profile, a camera's notes.
        with contextlib.suppress(Exception):
            less = without_extras(kind, data)
            if less != data:
                return _finish(_pixels(kind, less, name, draft), name)
        raise _undecodable(f"{name} can't be decoded as {kind}", error) from error


def _pixels(kind: str, data: bytes, name: str, draft: int | None) -> Image.Image:
    """Return an image, decoded; raises InvalidInputError, or whatever the decoder raises."""
    shape = check_blocks(kind, data, name)
    if shape.size is not None:
        _check_size(*shape.size, name)
    image = _plugin(kind)(io.BytesIO(data))
    if kind != "JPEG":
        _check_size(image.width, image.height, name)
    else:
        # A decoder that goes over a JPEG more than once holds all of it, whatever size is wanted.
        most = MAX_PIXELS if draft is None else MAX_DRAFTED // min(2, shape.scans)
        smaller = "load_image(…, draft=N)" if draft is None else "a smaller draft"
        cure = f"if it is a picture, shrink it first, or take {smaller}"
        _check_size(image.width, image.height, name, most, cure)
        check_scans(shape.scans, image.width, image.height, name)
        if draft is not None:
            image.draft(None, (draft, draft))
            _check_size(image.width, image.height, name, cure=cure)
    image.load()
    return image


def format_of(data: bytes) -> str | None:
    """Return the one of `FORMATS` that a file's first 12 bytes announce; None if none of them."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "BMP" if data.startswith(b"BM") else None


def _known_format(data: bytes, name: str) -> str:
    """Return an encoded image's format; raises InvalidInputError."""
    kind = format_of(data)
    if kind is not None:
        return kind
    what = f"begins with {data[:12]!r}" if data else "is empty"
    raise InvalidInputError(
        f"{name} is not in a format read here: it {what}",
        expected=f"one of {', '.join(FORMATS)}",
        cure="convert it to PNG or JPEG",
    )


def _plugin(kind: str) -> Callable[[BinaryIO], ImageFile]:
    """Return Pillow's class for one format; imported here, so that importing vzip stays quick."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    plugins: dict[str, Callable[[BinaryIO], ImageFile]] = {
        # Not `jpeg_factory`: of a phone's multi-picture JPEG the first picture is the photo.
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
    }
    return plugins[kind]


def _from_pil(image: Image.Image) -> Image.Image:
    """Return the image of a caller's PIL image, which may not be decoded yet."""
    name = "the PIL image"
    # Decoding and reading EXIF change a PIL image, and Pillow has no lock around either. Several
    # images may be read from one open file.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock_of(image))
        if (file := getattr(image, "fp", None)) is not None:
            stack.enter_context(_lock_of(file))
        _check_size(image.width, image.height, name)
        _check_mode(image, name)
        try:
            _check_undecoded(image, name)
            return _finish(image, name)
        except InvalidInputError:
            raise
        except Exception as error:  # as for bytes
            raise _undecodable(f"{name} can't be decoded", error) from error


def _lock_of(value: object) -> threading.Lock:
    """Return the lock that all threads take around an object."""
    with _LOCKS_LOCK:
        lock = _LOCKS.get(id(value))
        if lock is None:
            lock = _LOCKS[id(value)] = threading.Lock()
        return lock


def _check_undecoded(image: Image.Image, name: str) -> None:
    """Refuse what `check_blocks` refuses in a PIL image that is open, but not decoded yet."""
    tiles, file = getattr(image, "tile", None), getattr(image, "fp", None)
    if not tiles or file is None:
        return
    codec, _, offset, _ = tiles[0]
    areas = 0
    for _, (left, top, right, bottom), *_ in tiles:
        wide, high = min(right, image.width) - left, min(bottom, image.height) - top
        areas += max(0, wide) * max(0, high)
    if len(tiles) > MAX_BLOCKS or areas > 8 * image.width * image.height:  # a layer for each band
        too_many(name, f"{len(tiles)} tiles or strips", f"at most {MAX_BLOCKS}, each pixel in one")
    kind = {"jpeg": "JPEG", "zip": "PNG", "bmp_rle": "BMP"}.get(codec)
    if kind is None or image.format not in (kind, "MPO"):
        return
    place = file.tell()
    file.seek(offset if kind == "JPEG" else 0)  # of several pictures in a file, the current
    data = file.read(MAX_ENCODED_BYTES + 1)
    file.seek(place)
    shape = check_blocks(kind, data, name)
    check_scans(shape.scans, image.width, image.height, name)


def _finish(image: Image.Image, name: str) -> Image.Image:
    """Return a PIL image in RGB and upright; raises InvalidInputError, or what Pillow raises."""
    _check_mode(image, name)
    image.load()
    # After loading: PNG may carry its EXIF block behind the pixels.
    method = _TRANSPOSE.get(_orientation(image, name))
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode == "RGB" and not transparent and method is None:
        return image
    if transparent:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgba = Image.alpha_composite(white, rgba)
        del white  # the peak has been reached: 12 to 16 bytes a pixel
        rgb = rgba.convert("RGB")
        del rgba
    else:
        rgb = image.convert("RGB")
    if method is not None:
        rgb = rgb.transpose(method)
    # The orientation and the transparent colour have been used up: left in, they'd be used again.
    rgb.info = {}
    return rgb


def _orientation(image: Image.Image, name: str) -> Any:
    """Return an image's EXIF or XMP orientation; 1, which is upright, where none can be read."""
    block = image.info.get("exif")
    if block is None and isinstance(text := image.info.get(_EXIF_AS_TEXT), str):
        with contextlib.suppress(ValueError):
            block = bytes.fromhex("".join(text.split("\n")[3:]))
    if isinstance(block, bytes):
        check_exif(block, name)
    for _ in range(2):  # where Pillow can't read all of it, a second look shows what it has read
        with contextlib.suppress(Exception):  # on hostile bytes it may raise anything
            orientation: Any = image.getexif().get(_ORIENTATION, 1)
            hash(orientation)
            return orientation
    return 1


def _check_mode(image: Image.Image, name: str) -> None:
    """Raise InvalidInputError if what a pixel's numbers mean is not certain."""
    if image.mode not in _MODES:
        raise InvalidInputError(
            f"{name} has mode {image.mode}",
            expected=(
                "8 bits a channel (RGB, L, P, RGBA, CMYK …): the range of a 16- or 32-bit picture "
                "is not known"
            ),
            cure="scale it to 0 … 255 and convert it to 8 bits",
        )


def _check_size(
    width: int,
    height: int,
    name: str,
    most: int | None = None,
    cure: str = "if it is a picture, shrink it first",
) -> None:
    """Raise InvalidInputError if an image is empty or has more than `most` pixels (MAX_PIXELS)."""
    most = MAX_PIXELS if most is None else most
    if width < 1 or height < 1:
        raise InvalidInputError(
            f"{name} is {width}×{height} pixels",
            expected="at least 1×1",
            cause="it is empty",
            cure="make it again",
        )
    if width * height > most:
        raise InvalidInputError(
            f"{name} is {width}×{height} = {width * height} pixels",
            expected=f"at most {most}: a larger one is most likely a decompression bomb",
            cure=cure,
        )


def _check_encoded_size(size: int, name: str) -> None:
    """Raise InvalidInputError if an encoded image has more than `MAX_ENCODED_BYTES` bytes."""
    if size > MAX_ENCODED_BYTES:
        raise InvalidInputError(
            f"{name} has {size} bytes",
            expected=f"at most {MAX_ENCODED_BYTES}: no image of {MAX_PIXELS} pixels needs more",
            cure="if it is a picture, save it again",
        )


def _undecodable(what: str, error: Exception) -> InvalidInputError:
    """Return the error, on one line, for an image on which Pillow raised `error`."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return InvalidInputError(
            f"{what}: {reason}",
            expected="no more pixels than this process allows Pillow",
            cure="shrink the image or raise MAX_IMAGE_PIXELS",
        )
    if isinstance(error, MemoryError):
        return InvalidInputError(
            f"{what}: there is not enough memory",
            expected="several bytes a pixel to be free",
            cure="free some, or shrink the image",
        )
    return InvalidInputError(
        f"{what}: {reason}",
        expected="a whole, open image",
        cause="the image is truncated, corrupt or closed",
        cure="save it again",
    )


def _type_name(value: object) -> str:
    """Return a type's full name, without `builtins.`."""
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
