"""Reads an image from a path, bytes, PIL image or array, and says clearly what it can't read.

Images come from strangers. So there is a whitelist of formats, recognised by their first bytes and
never by their name (JPEG, PNG, WebP, BMP, GIF); a cap on pixels, checked from the header before any
pixel is decoded; and a cap on the encoded size. Pillow's own `Image.open` is not used: it would try
every plugin that happens to be registered, and its bomb check hangs on a global
(`Image.MAX_IMAGE_PIXELS`) that belongs to the application and that nothing here reads or sets
(Pillow's decoders for WebP and GIF read it: where it is the lower limit, it holds, with an error).

What happens to the odd ones:

| image | result |
|---|---|
| alpha, or a transparent colour (RGBA, LA, PA, palette, GIF, PNG's tRNS) | composited onto white |
| palette, grey, one bit, CMYK, YCbCr, HSV | converted to RGB |
| 16 bits a channel, colour PNG | Pillow decodes the high byte |
| 16 or 32 bits, one channel (modes I;16, I, F) | refused: its range is not known |
| animated GIF, WebP, PNG | the first frame |
| EXIF or XMP orientation | applied, so the result is upright |
| truncated, corrupt, of size 0, larger than a cap, not on the whitelist | refused |

The conversions are those of transformers 5's image processors (`image_transforms.convert_to_rgb`)
for a PIL image. (Given a *path*, those processors drop alpha instead of compositing it; here one
picture gives one result, however it comes in.)
"""

from __future__ import annotations

import io
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from PIL import Image

from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.ImageFile import ImageFile

ImageSource = Union[str, Path, bytes, Image.Image, "np.ndarray[Any, Any]"]
"""What `load_image` takes: a path, an encoded image, a PIL image, or a uint8 array."""

MAX_PIXELS = 2**26
"""Most pixels of an image: 67 million. The 61 and 64 megapixels of today's large sensors pass."""

MAX_ENCODED_BYTES = 4 * MAX_PIXELS + 2**20
"""Most bytes of an encoded image: 32 bits a pixel uncompressed, and 1 MiB of header."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Formats that are decoded, as Pillow names them."""

# Modes that `Image.convert` takes to RGB with no choice to make. I, F and I;16 are not among them:
# Pillow clips them at 255, which turns most such pictures white.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, draft: int | None = None) -> Image.Image:
    """Return the image that a source holds, upright and in RGB.

    With `draft`, a large JPEG is made smaller by its decoder: other pixels than the processors see,
    in a fraction of the time (docs/runtime.md, "Large pictures").

    Args:
        source: A path (str or Path, never a URL), an encoded image (bytes), a PIL image (its
            current frame), or a uint8 array: [H, W, 3] in the order red, green, blue, or [H, W]
            grey.
        draft: Decode a JPEG (a path's or bytes') to a half, quarter or eighth of its width and
            height, the smallest at which both are still at least `draft` pixels. None for all
            pixels. Other formats are decoded in full.

    Returns:
        The image in mode RGB, decoded, with the orientation applied. A PIL image that is upright
        RGB already is returned as it is, not copied.

    Raises:
        InvalidInputError: The source can't be read, is no image of a known format, is damaged, is
            larger than `MAX_PIXELS` or `MAX_ENCODED_BYTES`, or has a mode, dtype or layout whose
            meaning is not certain; `draft` is no positive integer.
    """
    if draft is not None and (type(draft) is not int or draft < 1):
        raise InvalidInputError(
            f"got draft = {draft!r}",
            expected="a positive number of pixels, or None for a full decode",
            cause="twice the tower's input is close to it",
        )
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _finish(source, "the PIL image")
    if isinstance(source, bytes):
        name = "the encoded image"
        _check_encoded_size(len(source), name)
        return _decode(io.BytesIO(source), name, draft)
    if isinstance(source, (str, Path)):
        return _from_path(source, draft)
    raise InvalidInputError(
        f"got an image of type {_type_name(source)}",
        expected=(
            "a path, bytes, a PIL image or a uint8 numpy array [H, W, 3] (a tensor becomes one "
            "with .cpu().numpy(), a file with .read())"
        ),
    )


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """Return the RGB image of a uint8 array [H, W, 3] or [H, W]; raises InvalidInputError."""
    got = f"got an image array of dtype {array.dtype} and shape {list(array.shape)}"
    expected = "uint8 [H, W, 3] (RGB) or [H, W] (grey)"
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
            cure = "for alpha give PIL.Image.fromarray(array), to drop it array[..., :3]"
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
    return Image.fromarray(array).convert("RGB") if array.ndim == 2 else Image.fromarray(array)


def _from_path(source: str | Path, draft: int | None) -> Image.Image:
    """Decode the file at a path; raises InvalidInputError."""
    text = str(source)
    name = f"the image {text!r}"
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
        # Before opening: opening a named pipe blocks, and a device may never end.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InvalidInputError(
                f"{name} is a folder",
                expected="an image file",
                cure="name one inside it",
            )
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInputError(
                f"{name} is a device, pipe or socket",
                expected="an ordinary image file",
                cure="copy its content into one",
            )
        _check_encoded_size(status.st_size, name)
        with path.open("rb") as file:
            return _decode(file, name, draft)
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


def _decode(file: BinaryIO, name: str, draft: int | None) -> Image.Image:
    """Decode an image file that is open at its start; raises InvalidInputError."""
    head = file.read(32)
    file.seek(0)
    kind = _format_of(head)
    if kind is None:
        what = f"begins with {head[:12]!r}" if head else "is empty"
        raise InvalidInputError(
            f"{name} is not in a format read here: it {what}",
            expected=f"one of {', '.join(FORMATS)}",
            cure="convert it to PNG or JPEG",
        )
    try:
        # WebP's decoder allocates its canvas, and GIF's its first frame, when the file is opened.
        if kind in _SIZE_READERS:
            _check_size(*_SIZE_READERS[kind](file), name)
            file.seek(0)
        image = _plugin(kind)(file)
        _check_size(image.width, image.height, name)
        if draft is not None:
            image.draft(None, (draft, draft))  # does nothing but to a JPEG
        image.load()
    except InvalidInputError:
        raise
    except Exception as error:  # on hostile bytes a decoder may raise anything
        raise _undecodable(f"{name} can't be decoded as {kind}", error) from error
    return _finish(image, name)


def _format_of(head: bytes) -> str | None:
    """Return the whitelisted format that the first bytes of a file announce, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "BMP" if head.startswith(b"BM") else None


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


def _webp_size(file: BinaryIO) -> tuple[int, int]:
    """Return (width, height) of a WebP canvas from its header (RFC 9649); raises on a bad one."""
    head = file.read(30)
    chunk, data = head[12:16], head[20:]
    if len(head) == 30 and chunk == b"VP8X":
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if len(head) == 30 and chunk == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width = int.from_bytes(data[6:8], "little")
        height = int.from_bytes(data[8:10], "little")
        return width & 0x3FFF, height & 0x3FFF
    if len(head) >= 25 and chunk == b"VP8L" and data[:1] == b"\x2f":
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise ValueError("its header is damaged")


def _gif_size(file: BinaryIO) -> tuple[int, int]:
    """Return (width, height) that Pillow gives a GIF: the screen, or a first frame beyond it."""

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) != count:
            raise ValueError("its first frame is missing")
        return data

    head = take(13)
    width, height = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    if head[10] & 0x80:  # a global palette
        take(3 << (head[10] & 7) + 1)
    while True:
        marker = take(1)
        if marker == b"!":  # an extension: its label, then blocks up to an empty one
            take(1)
            while length := take(1)[0]:
                take(length)
        elif marker == b",":  # the first frame: left, top, width, height
            left, top, w, h = (int.from_bytes(take(2), "little") for _ in range(4))
            return max(width, left + w), max(height, top + h)
        elif marker != b"\0":  # Pillow skips stray zeros, so do we
            raise ValueError("its first frame is missing")


_SIZE_READERS: dict[str, Callable[[BinaryIO], tuple[int, int]]] = {
    "WEBP": _webp_size,
    "GIF": _gif_size,
}


def _finish(image: Image.Image, name: str) -> Image.Image:
    """Return a PIL image in RGB and upright; raises InvalidInputError."""
    _check_size(image.width, image.height, name)
    if image.mode not in _MODES:
        raise InvalidInputError(
            f"{name} has mode {image.mode}",
            expected=(
                "8 bits a channel (RGB, L, P, RGBA, CMYK …): the range of a 16- or 32-bit picture "
                "is not known"
            ),
            cure="scale it to 0 … 255 and convert it to 8 bits",
        )
    try:
        image.load()
        # After loading: PNG may carry its EXIF block behind the pixels.
        method = _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
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
    except Exception as error:  # lazy images decode here: see _decode
        raise _undecodable(f"{name} can't be decoded", error) from error
    # The orientation and the transparent colour have been used up: left in, they'd be used again.
    rgb.info = {}
    return rgb


def _check_size(width: int, height: int, name: str) -> None:
    """Raise InvalidInputError if an image is empty or has more than `MAX_PIXELS` pixels."""
    if width < 1 or height < 1:
        raise InvalidInputError(
            f"{name} is {width}×{height} pixels",
            expected="at least 1×1",
            cause="it is empty",
            cure="make it again",
        )
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"{name} is {width}×{height} = {width * height} pixels",
            expected=f"at most {MAX_PIXELS}: a larger one is most likely a decompression bomb",
            cure="if it is a picture, shrink it first",
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
