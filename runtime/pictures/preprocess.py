"""From an RGB image to the tower's pixels, bit for bit as transformers' Pillow processors do it.

The reference is transformers 5 with the Pillow backend: `CLIPImageProcessorPil` and, for frames,
`VideoLlavaImageProcessor` for `resize_crop`; `LlavaImageProcessorPil(do_pad=True)` for `pad_square`
(original LLaVA's `image_aspect_ratio: pad`); `SiglipImageProcessorPil`, and the base tile of
`LlavaNextImageProcessorPil` and `LlavaOnevisionImageProcessorPil`, for `stretch`.
`tests/parity/test_preprocess_parity.py` compares every byte. Numpy and Pillow are all it takes.

Two stages, because a graph may hold the second one itself:

1. `tower_image`, uint8 [H, W, 3], with Pillow's antialiased bicubic: (pad to a square with the mean
   colour,) resize the short edge, crop the centre; or resize both edges, whatever becomes of the
   proportions.
2. `pixel_values`: rescale, subtract the mean, divide by the deviation. float32 [B, 3, H, W].
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
from PIL import Image

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.resize import resize, resize_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mode = Literal["resize_crop", "pad_square", "stretch"]

MAX_IMAGE_SIZE = 4096
"""Largest resolution of a tower that is believed: a larger one in a file is damage."""

MAX_RESIZED_PIXELS = 2**26
"""Most pixels between resize and crop: a strip of 10 × 10000 would become 336 × 336000."""

MAX_SQUARE_SIDE = 2**15
"""Longest edge that `pad_square` takes: its work grows with the square of it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the tower's input.

    Args:
        image_size: Height and width of the tower's input, in pixels (`crop_size`).
        mode: `resize_crop`, `pad_square` or `stretch`.
        shortest_edge: What the short edge is resized to, in pixels, before the crop. `stretch`
            crops nothing: there it is `image_size`.
        resample: The filter; Pillow's antialiased bicubic is the one these families use.
        mean: Of red, green, blue, on the scale from 0 to 1.
        std: Of red, green, blue, on the same scale.
        rescale_factor: What a uint8 value is multiplied with first, 1/255.

    Raises:
        InvalidInputError: A field has the wrong type or an impossible value.
    """

    image_size: int
    mode: Mode
    shortest_edge: int
    resample: Literal["bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float

    def __post_init__(self) -> None:
        for name in ("image_size", "shortest_edge"):
            value = getattr(self, name)
            if not _is_int(value) or not 1 <= value <= MAX_IMAGE_SIZE:
                raise _field_error(name, value, f"an integer from 1 to {MAX_IMAGE_SIZE}")
        if self.mode not in get_args(Mode):
            raise _field_error("mode", self.mode, " or ".join(map(repr, get_args(Mode))))
        if self.mode == "stretch" and self.shortest_edge != self.image_size:
            raise _field_error(
                "shortest_edge",
                self.shortest_edge,
                f"image_size {self.image_size}, since 'stretch' crops nothing",
            )
        if self.resample != "bicubic":
            raise _field_error("resample", self.resample, "'bicubic'")
        # Within 0 … 1: times 255 the mean is the colour that a picture is padded with.
        if not _is_triple(self.mean) or not all(0 <= x <= 1 for x in self.mean):
            raise _field_error("mean", self.mean, "three numbers from 0 to 1 (red, green, blue)")
        if not _is_triple(self.std) or not all(x > 0 for x in self.std):
            raise _field_error("std", self.std, "three positive numbers (red, green, blue)")
        if not _is_finite(self.rescale_factor) or self.rescale_factor <= 0:
            raise _field_error("rescale_factor", self.rescale_factor, "a positive number")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes; `from_json` takes them back exactly."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: object) -> Preprocessing:
        """Return the preprocessing that `to_json` described.

        Args:
            data: A mapping with exactly the fields of this class; a number may be an integer.

        Raises:
            InvalidInputError: Not a mapping, a key too many or too few, a wrong type or value.
        """
        if not isinstance(data, dict):
            raise InvalidInputError(
                f"preprocessing: got {type(data).__name__}",
                expected=f"an object with the keys {_keys()}",
                cause="the manifest was edited or damaged",
                cure="export the bundle again",
            )
        if set(data) != set(_keys()):
            unknown = sorted(map(str, set(data) - set(_keys())))
            missing = [key for key in _keys() if key not in data]
            raise InvalidInputError(
                f"preprocessing: got unknown keys {unknown} and missing keys {missing}",
                expected=f"exactly {_keys()}",
                cause="it was written by another version or edited",
                cure="export the bundle again",
            )
        values = dict(data)
        for name in ("mean", "std"):
            value = values[name]
            if isinstance(value, list) and all(_is_finite(x) for x in value):
                values[name] = tuple(float(x) for x in value)
        if _is_finite(values["rescale_factor"]):
            values["rescale_factor"] = float(values["rescale_factor"])
        return cls(**values)


def tower_image(image: Image.Image, prep: Preprocessing) -> NDArray[np.uint8]:
    """Return an image at the tower's resolution, as the processor has it before rescaling.

    Args:
        image: In mode RGB and upright, as `load_image` returns it.
        prep: How.

    Returns:
        uint8 [image_size, image_size, 3], RGB. Where the resized image is smaller than the tower's
        input it is centred on black, with the odd pixel of padding above and to the left.

    Raises:
        InvalidInputError: Not RGB, empty, or so long and thin that it would grow beyond
            `MAX_RESIZED_PIXELS` or `MAX_SQUARE_SIDE`.
    """
    if image.mode != "RGB":
        raise InvalidInputError(
            f"got an image of mode {image.mode}",
            expected="RGB",
            cure="load it with vzip.runtime's load_image",
        )
    if image.width < 1 or image.height < 1:
        raise InvalidInputError(
            f"got an image of {image.width}×{image.height} pixels",
            expected="at least 1×1",
            cause="it is empty",
            cure="make it again",
        )
    if prep.mode == "stretch":
        resized = resize(image, (prep.image_size, prep.image_size))
    elif prep.mode == "pad_square" and image.width != image.height:
        resized = _resize_padded(image, prep)
    else:
        resized = _resize_short_edge(image, prep.shortest_edge)
    return _centre(np.asarray(resized), prep.image_size)


def pixel_values(images: NDArray[np.uint8], prep: Preprocessing) -> NDArray[np.float32]:
    """Return the tower's float input for images of the tower's resolution.

    A uint8 has 256 values, so the processor's arithmetic (multiplied in float64, rounded to
    float32, mean and deviation in float32) is done once for each and looked up: the same bits,
    faster.

    Args:
        images: uint8 [B, H, W, 3], RGB, as `tower_image` returns them, stacked.
        prep: How; H and W are its `image_size`.

    Returns:
        float32 [B, 3, H, W], contiguous.

    Raises:
        InvalidInputError: Another dtype or shape.
    """
    side = prep.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
        raise InvalidInputError(
            f"got images of dtype {images.dtype} and shape {list(images.shape)}",
            expected=f"uint8 [B, {side}, {side}, 3]",
            cure="make them with tower_image and stack them",
        )
    rescaled = (np.arange(256, dtype=np.float64) * prep.rescale_factor).astype(np.float32)
    mean, std = np.array(prep.mean, np.float32), np.array(prep.std, np.float32)
    table = (rescaled[:, None] - mean) / std  # [256, 3]
    out = np.empty((images.shape[0], 3, side, side), np.float32)
    for channel in range(3):
        out[:, channel] = table[:, channel][images[..., channel]]
    return out


def _resize_short_edge(image: Image.Image, edge: int) -> Image.Image:
    """Resize so that the short edge is `edge` pixels; the long one is rounded down."""
    short, long = sorted(image.size)
    resized_long = int(edge * long / short)  # in float64 and truncated, as the processor does
    if edge * resized_long > MAX_RESIZED_PIXELS:
        raise InvalidInputError(
            f"got an image of {image.width}×{image.height} pixels, which grows to "
            f"{edge}×{resized_long} when its short edge becomes {edge}",
            expected=f"at most {MAX_RESIZED_PIXELS} pixels then: it is too long and thin",
            cure="crop it first",
        )
    size = (edge, resized_long) if image.width <= image.height else (resized_long, edge)
    return resize(image, size)


def _resize_padded(image: Image.Image, prep: Preprocessing) -> Image.Image:
    """Return `image`, padded to a square with the mean colour, resized to `shortest_edge`.

    Pillow resizes rows first and then columns, with uint8 in between, each row by itself. Doing
    the two passes in two calls gives the same bits, and the square (16 times the picture for one
    of 1:16) is never in memory.

    Args:
        image: RGB, not square.
        prep: For `shortest_edge` and `mean`.

    Returns:
        RGB, shortest_edge × shortest_edge.
    """
    width, height = image.size
    side, edge = max(width, height), prep.shortest_edge
    if side > MAX_SQUARE_SIDE:
        raise InvalidInputError(
            f"got an image of {width}×{height} pixels",
            expected=f"edges of at most {MAX_SQUARE_SIDE} where it is padded to a square",
            cure="shrink or crop it first",
        )
    red, green, blue = (int(x * 255) for x in prep.mean)  # truncated, as the processor does
    background = (red, green, blue)
    image.load()  # once, not in every thread
    if width > height:
        # Rows that are all background stay so: a row's weights sum to one.
        rows = Image.new("RGB", (edge, side), background)  # after the first pass
        rows.paste(resize(image, (edge, height)), (0, (side - height) // 2))
    else:
        left = (side - width) // 2

        def strip(top: int, bottom: int) -> Image.Image:
            padded = Image.new("RGB", (side, bottom - top), background)
            padded.paste(image, (left, -top))  # clipped to the strip
            return padded

        rows = resize_rows(strip, (side, side), edge)
    return rows.resize((edge, edge), Image.Resampling.BICUBIC)


def _centre(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Cut or pad [H, W, 3] to [side, side, 3], centred; padding is black."""
    out = np.zeros((side, side, 3), np.uint8)
    (from_y, to_y), (from_x, to_x) = (_overlap(length, side) for length in image.shape[:2])
    out[to_y, to_x] = image[from_y, from_x]
    return out


def _overlap(length: int, side: int) -> tuple[slice, slice]:
    """Return which part of an axis of `length` is kept, and where in `side` it goes."""
    if length >= side:
        start = (length - side) // 2
        return slice(start, start + side), slice(0, side)
    start = (side - length + 1) // 2  # the odd pixel of padding comes first
    return slice(0, length), slice(start, start + length)


def _keys() -> list[str]:
    """Return the names of the fields, in order."""
    return [field.name for field in fields(Preprocessing)]


def _field_error(name: str, value: object, expected: str) -> InvalidInputError:
    """Return the error for one field."""
    return InvalidInputError(
        f"preprocessing: got {name} = {value!r}",
        expected=f"{expected}",
        cause=(
            "the processor's configuration or the manifest is damaged or of another kind of model"
        ),
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether a value is an int or float (no bool) and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float's range, which JSON may hold
        return False


def _is_triple(value: object) -> bool:
    """Whether a value is a tuple of three finite numbers."""
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    return all(_is_finite(x) for x in cast("tuple[object, ...]", value))
