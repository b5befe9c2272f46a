"""From an RGB image to the tower's pixels, bit for bit as transformers' Pillow processors do it.

The reference is transformers 5 with the Pillow backend: `CLIPImageProcessorPil` and, for frames,
`VideoLlavaImageProcessor` for `resize_crop`; `LlavaImageProcessorPil(do_pad=True)` for `pad_square`
(original LLaVA's `image_aspect_ratio: pad`); `SiglipImageProcessorPil`, and the base tile of
`LlavaNextImageProcessorPil` and `LlavaOnevisionImageProcessorPil`, for `stretch`.
`tests/parity/test_preprocess_parity.py` compares every byte. Numpy and Pillow are all it takes.

Two stages, because a graph may hold the second one itself:

1. `tower_image`, uint8 [H, W, 3], with one of Pillow's filters: (pad to a square with the mean
   colour,) resize the short edge, crop the centre; or resize both edges, whatever becomes of the
   proportions.
2. `pixel_values`: rescale, subtract the mean, divide by the deviation. float32 [B, 3, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.codec import Must, Record, within
from vzip.runtime.pictures.resize import Resample, pillows, resize, resize_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mode = Literal["resize_crop", "pad_square", "stretch"]

MAX_IMAGE_SIZE = 4096
"""Largest resolution of a tower that is believed: a larger one in a file is damage."""

MAX_RESIZED_PIXELS = 2**26
"""Most pixels between resize and crop: a strip of 10 × 10000 would become 336 × 336000."""

MAX_SQUARE_SIDE = 2**15
"""Longest edge that `pad_square` takes: its work grows with the square of it."""


Side = Annotated[int, within(1, MAX_IMAGE_SIZE)]
# Times 255 the mean is the colour that a picture is padded with.
Share = Annotated[float, Must(lambda value: 0 <= value <= 1, "a number from 0 to 1")]
Positive = Annotated[float, Must(lambda value: value > 0, "a positive number")]


@dataclass(frozen=True)
class Preprocessing(Record):
    """How an image becomes the tower's input.

    Args:
        image_size: Height and width of the tower's input, in pixels (`crop_size`).
        mode: `resize_crop`, `pad_square` or `stretch`.
        shortest_edge: What the short edge is resized to, in pixels, before the crop. `stretch`
            crops nothing: there it is `image_size`.
        resample: Pillow's filter; nearly all use the antialiased bicubic, SigLIP2 bilinear.
        mean: Of red, green, blue, on the scale from 0 to 1.
        std: Of red, green, blue, on the same scale.
        rescale_factor: What a uint8 value is multiplied with first, 1/255.

    Raises:
        InvalidInputError: A field has the wrong type or an impossible value.
    """

    image_size: Side
    mode: Mode
    shortest_edge: Side
    resample: Resample
    mean: tuple[Share, Share, Share]
    std: tuple[Positive, Positive, Positive]
    rescale_factor: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "stretch" and self.shortest_edge != self.image_size:
            expected = f"image_size {self.image_size}, since 'stretch' crops nothing"
            raise self.misfit("shortest_edge", expected)


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
    check_size(image, prep)
    if prep.mode == "stretch":
        resized = resize(image, (prep.image_size, prep.image_size), prep.resample)
    elif prep.mode == "pad_square" and image.width != image.height:
        resized = _resize_padded(image, prep)
    else:
        resized = _resize_short_edge(image, prep.shortest_edge, prep.resample)
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


def check_size(image: Image.Image, prep: Preprocessing) -> None:
    """Refuse an image that `tower_image` can't resize, before it is.

    Raises:
        InvalidInputError: It is empty, or so long and thin that it would grow beyond
            `MAX_RESIZED_PIXELS`.
    """
    if image.width < 1 or image.height < 1:
        raise InvalidInputError(
            f"got an image of {image.width}×{image.height} pixels",
            expected="at least 1×1",
            cause="it is empty",
            cure="make it again",
        )
    if prep.mode == "stretch" or (prep.mode == "pad_square" and image.width != image.height):
        return
    edge, resized_long = prep.shortest_edge, _resized_long(image, prep.shortest_edge)
    if edge * resized_long > MAX_RESIZED_PIXELS:
        raise InvalidInputError(
            f"got an image of {image.width}×{image.height} pixels, which grows to "
            f"{edge}×{resized_long} when its short edge becomes {edge}",
            expected=f"at most {MAX_RESIZED_PIXELS} pixels then: it is too long and thin",
            cure="crop it first",
        )


def _resized_long(image: Image.Image, edge: int) -> int:
    """Return the long edge when the short one is `edge`, in float64 and truncated, as there."""
    short, long = sorted(image.size)
    return int(edge * long / short)


def _resize_short_edge(image: Image.Image, edge: int, resample: Resample) -> Image.Image:
    """Resize so that the short edge is `edge` pixels; the long one is rounded down."""
    resized_long = _resized_long(image, edge)
    size = (edge, resized_long) if image.width <= image.height else (resized_long, edge)
    return resize(image, size, resample)


def _resize_padded(image: Image.Image, prep: Preprocessing) -> Image.Image:
    """Return `image`, padded to a square with the mean colour, resized to `shortest_edge`.

    Pillow resizes rows first and then columns, with uint8 in between, each row by itself. Doing
    the two passes in two calls gives the same bits, and the square (16 times the picture for one
    of 1:16) is never in memory.

    Args:
        image: RGB, not square.
        prep: For `shortest_edge`, `resample` and `mean`.

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
        rows.paste(resize(image, (edge, height), prep.resample), (0, (side - height) // 2))
    else:
        left = (side - width) // 2

        def strip(top: int, bottom: int) -> Image.Image:
            padded = Image.new("RGB", (side, bottom - top), background)
            padded.paste(image, (left, -top))  # clipped to the strip
            return padded

        rows = resize_rows(strip, (side, side), edge, prep.resample)
    return rows.resize((edge, edge), pillows(prep.resample))


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
