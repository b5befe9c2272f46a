"""Pillow's resizing, bit for bit, on all cores that this process may use.

Pillow resizes in two passes with uint8 in between, mostly first along rows, then along columns. In
the first pass each row is by itself, so strips of rows can be resized at the same time, and where a
large picture becomes small, it is nine tenths of the work. Pillow lets go of Python's lock
meanwhile.

The other order gives other bits. Until Pillow 12 rows are always first; 13.0 begins with the
columns where more than twice as many rows as columns go. Where columns may be first, and where
Pillow is newer than what was looked at, it resizes by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

import PIL
from PIL import Image

from vzip.runtime.machine.process import cores
from vzip.runtime.pictures.ahead import share

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""Pillow's filters in the order of their numbers; all but the first are antialiased."""

KNOWN = (13, 0)
"""The newest Pillow whose order of passes is known: 13.0's was found by comparing with both."""

_STRIP_PIXELS = 2**20  # of the picture, in a strip: 4 ms of work, and 4 MiB of memory

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def resize(
    image: Image.Image, size: tuple[int, int], resample: Resample = "bicubic"
) -> Image.Image:
    """Return what ``image.resize(size, Image.Resampling.BICUBIC)`` returns, or another filter.

    Args:
        image: RGB.
        size: Width and height in pixels.
        resample: The filter.
    """
    image.load()  # once, not in every thread

    def strip(top: int, bottom: int) -> Image.Image:
        return image.crop((0, top, image.width, bottom))

    whole = image.height <= _strip_rows(image.width) or resample == "nearest"  # of one pass
    if whole or not _rows_first(image.size, size):
        return image.resize(size, pillows(resample))
    rows = resize_rows(strip, image.size, size[0], resample)
    return rows.resize(size, pillows(resample))


def pillows(resample: Resample) -> Image.Resampling:
    """Return Pillow's own name of a filter."""
    return Image.Resampling[resample.upper()]


def resize_rows(
    strip: Callable[[int, int], Image.Image],
    size: tuple[int, int],
    width: int,
    resample: Resample = "bicubic",
) -> Image.Image:
    """Return Pillow's first pass of a picture: resized along its rows alone.

    Args:
        strip: Returns rows top … bottom − 1 of the picture, RGB; called in several threads.
        size: The picture's width and height.
        width: That rows are resized to.
        resample: The filter.

    Returns:
        RGB, `width` and the picture's height.
    """
    rows = Image.new("RGB", (width, size[1]))
    count = _strip_rows(size[0])

    def pass_over(top: int) -> None:
        part = strip(top, min(size[1], top + count))
        rows.paste(part.resize((width, part.height), pillows(resample)), (0, top))

    on_cores(pass_over, range(0, size[1], count))
    return rows


def on_cores(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return the function of each item, in their order, computed in as many threads as cores.

    A thread of `ahead` has its share of them.

    Raises:
        Exception: What the function raises, of the first item for which it does.
    """
    threads = min(len(items), share() or cores())
    if threads <= 1:
        return [function(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor  # few pictures need it

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _rows_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Return whether Pillow, of any version that is known, begins with the rows."""
    columns_away, rows_away = size[0] - target[0], size[1] - target[1]
    return _pillow() <= KNOWN and columns_away > 0 and rows_away <= 2 * columns_away


def _pillow() -> tuple[int, int]:
    """Return Pillow's version, major and minor."""
    major, minor, *_ = PIL.__version__.split(".")
    return int(major), int(minor)


def _strip_rows(width: int) -> int:
    """Return how many rows of a picture make a strip."""
    return max(1, _STRIP_PIXELS // width)
