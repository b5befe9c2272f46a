"""Large images as tiles: how one is cut, and in what order the tiles' tokens reach the LLM.

LLaVA-NeXT and LLaVA-OneVision see an image several times: whole, squeezed into the tower's square
(the base tile), and at a higher resolution, cut into a grid of further tiles. Each tile is an image
to the graph and gets the whole budget.

`cut` chooses and cuts as transformers 5's `LlavaNextImageProcessorPil` and
`LlavaOnevisionImageProcessorPil` do, bit for bit (`tests/parity/test_tiles_parity.py`). `arrange`
is VisionZip's published order (`vzip.runtime.bundle.manifest.Tiling.order` "reference"),
`arrange_rows` the one with the rows that the LLM was trained with ("newline").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.preprocess import MAX_RESIZED_PIXELS, tower_image
from vzip.runtime.pictures.resize import resize

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from vzip.runtime.bundle.manifest import Tiling
    from vzip.runtime.pictures.preprocess import Preprocessing

    Array = NDArray[Any]

PATCHES = (24, 24)
"""Rows and columns of patches of LLaVA-NeXT's tiles: 336 pixels in patches of 14."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """An image, cut.

    The *canvas* is what the tiles other than the base tile make up: the picture, scaled to fit and
    centred, on black.

    Attributes:
        images: uint8 [1 + rows·columns, side, side, 3], RGB: the base tile, then the canvas's tiles
            row by row.
        grid: Rows and columns of tiles in the canvas.
        size: Height and width of the picture before it was scaled, in pixels. Where padding ends
            among patches follows from this: in the canvas it is rounded to whole pixels already.
    """

    images: NDArray[np.uint8]
    grid: tuple[int, int]
    size: tuple[int, int]


def cut(image: Image.Image, prep: Preprocessing, tiling: Tiling) -> Tiles:
    """Return the tiles of an image.

    Of the resolutions in `tiling`, the one is taken in which most of the picture's pixels survive;
    of these, the one that wastes least on padding; of these, the first.

    Args:
        image: In mode RGB and upright, as `load_image` returns it.
        prep: How the base tile is made; the other tiles have its `image_size` too.
        tiling: The resolutions.

    Raises:
        InvalidInputError: Not RGB or empty; the resolution is no multiple of `image_size`, or
            beyond `MAX_RESIZED_PIXELS`.
    """
    base = tower_image(image, prep)  # refuses what is no RGB image
    side, size = prep.image_size, (image.height, image.width)
    canvas_size = _best_resolution(size, tiling.pinpoints)
    rows, columns = (length // side for length in canvas_size)
    if (rows * side, columns * side) != canvas_size or math.prod(canvas_size) > MAX_RESIZED_PIXELS:
        raise InvalidInputError(
            f"tiling: got a resolution of {canvas_size[0]}×{canvas_size[1]} pixels (height × "
            "width)",
            expected=f"multiples of the tiles' {side} and at most {MAX_RESIZED_PIXELS} pixels",
            cause="the manifest is damaged or of another kind of model",
            cure="export the bundle again",
        )
    height, width = _fitted(size, canvas_size)
    top, left = (canvas_size[0] - height) // 2, (canvas_size[1] - width) // 2
    canvas = np.zeros((*canvas_size, 3), np.uint8)
    resized = resize(image, (width, height), prep.resample)
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)  # [rows, columns, side, …]
    images = np.concatenate([base[None], tiles.reshape(rows * columns, side, side, 3)])
    return Tiles(images, (rows, columns), size)


def arrange(
    embeds: Array,
    kept: NDArray[np.integer[Any]],
    grid: Sequence[int],
    *,
    patches: tuple[int, int] = PATCHES,
    cls_token: bool = True,
) -> Array:
    """Return the tokens of the tiles other than the base tile in VisionZip's published order.

    First the kept patches of all tiles in raster order of the whole grid of patches: row by row
    across tiles, not tile by tile. Then, where CLS is kept, the CLS token of each tile; then the
    contextual tokens, tile by tile. The base tile's tokens come before all of this, as they are.

    Source: `dvlab-research/VisionZip`, commit 3151f6d.

    Args:
        embeds: float [rows·columns, K, L]: of each tile the kept tokens by ascending index, then
            the contextual ones. Tiles are in raster order.
        kept: integers [rows·columns, dominant], ascending: the tower tokens that were kept.
        grid: Rows and columns of tiles.
        patches: Rows and columns of patches in a tile.
        cls_token: Whether the tower has a CLS token, so that `kept` counts patches from 1; if it
            was kept, 0 is in `kept`, for every tile.

    Returns:
        [rows·columns·K, L], dtype of `embeds`.

    Raises:
        InvalidInputError: Shapes that don't belong together, or tokens that a tile doesn't have.
    """
    tokens = _split(embeds, kept, grid, patches, cls_token)
    order = np.argsort(tokens.row * tokens.columns + tokens.column)
    return np.concatenate([tokens.patches[order], tokens.others])


def arrange_rows(
    embeds: Array,
    kept: NDArray[np.integer[Any]],
    grid: Sequence[int],
    newline: Array,
    size: tuple[int, int],
    *,
    patches: tuple[int, int] = PATCHES,
    cls_token: bool = True,
    max_tiles: int | None = None,
) -> Array:
    """Return the tokens of the tiles other than the base tile in rows, as the LLM was trained.

    The rows of patches of the picture from top to bottom; in each, the patches that were kept, from
    left to right, and then the newline embedding, whether any was kept or none. Rows and columns of
    padding are cut off as transformers 5 does for the uncompressed model (``unpad_image``), and
    kept patches in them are left out. The CLS and contextual tokens follow as in `arrange`.

    Where the uncompressed model shrinks a large picture (`Tiling.max_tiles`), there are as many
    rows as it leaves, and a kept patch stands in the one that its own went into.

    Args:
        embeds: As for `arrange`.
        kept: As for `arrange`.
        grid: As for `arrange`.
        newline: float [L], the LLM's embedding that ends a row.
        size: Height and width of the picture before it was scaled: `Tiles.size`.
        patches: As for `arrange`.
        cls_token: As for `arrange`.
        max_tiles: As `Tiling.max_tiles`.

    Returns:
        [n, L], dtype of `embeds`; n depends on how many patches were kept in the picture.

    Raises:
        InvalidInputError: As for `arrange`; `newline` is not [L], or too large for the dtype.
    """
    tokens = _split(embeds, kept, grid, patches, cls_token)
    top, left, bottom, right = picture_cells(size, (tokens.rows, tokens.columns))
    row, column = tokens.row, tokens.column
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    height, width = bottom - top, right - left
    left_over = rows_left(height, width, patches[0], max_tiles)
    lines_of = (row[inside] - top) * left_over // max(1, height)
    ends = np.arange(left_over)
    # A newline is one column further to the right than the last patch of its row.
    keys = np.concatenate([lines_of, ends]) * (tokens.columns + 1)
    keys += np.concatenate([column[inside], np.full(len(ends), tokens.columns)])
    newlines = np.repeat(newline_row(newline, embeds), len(ends), axis=0)
    # Of rows that became one, patches of one column stay one above the other.
    rows_of = np.concatenate([row[inside], np.full(len(ends), tokens.rows)])
    lines = np.concatenate([tokens.patches[inside], newlines])[np.lexsort([rows_of, keys])]
    return np.concatenate([lines, tokens.others])


def rows_left(height: int, width: int, side: int, max_tiles: int | None) -> int:
    """Return how many rows the uncompressed model makes of a picture's height × width patches.

    Args:
        height: Rows of patches, without padding.
        width: Columns.
        side: Rows of patches in a tile.
        max_tiles: As `Tiling.max_tiles`.
    """
    if max_tiles is None:
        return height
    ratio = math.sqrt(height * width / (max_tiles * side**2))
    return int(height // ratio) if ratio > 1.1 else height


def newline_row(newline: Array, embeds: Array) -> Array:
    """Return the newline embedding as a row [1, L] that can stand among `embeds` [..., L].

    Raises:
        InvalidInputError: Another width, or numbers beyond the dtype of `embeds`.
    """
    if newline.shape != embeds.shape[-1:]:
        raise InvalidInputError(
            f"got a newline embedding of shape {list(newline.shape)}",
            expected=f"{list(embeds.shape[-1:])} like the tokens",
            cause="it is of another model",
            cure="take the bundle's",
        )
    with np.errstate(over="ignore"):  # looked for below
        row = newline.astype(embeds.dtype)
    if not np.isfinite(row).all():
        raise InvalidInputError(
            f"the newline embedding has numbers that {embeds.dtype} can't hold",
            expected="finite ones",
            cure="export with --dtype fp32",
        )
    return row[None]


@dataclass(frozen=True)
class _Tokens:
    """Tokens of tiles, told apart.

    Attributes:
        patches: [P, L], the kept patches, tile by tile.
        row: int64 [P], each patch's row in the whole grid of patches.
        column: int64 [P].
        rows: Rows of the whole grid of patches.
        columns: Its columns.
        others: [F, L], what follows the patches: CLS tokens, then contextual ones.
    """

    patches: Array
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    rows: int
    columns: int
    others: Array


def _split(
    embeds: Array,
    kept: NDArray[np.integer[Any]],
    grid: Sequence[int],
    patches: tuple[int, int],
    cls_token: bool,
) -> _Tokens:
    """Tell patches, CLS and contextual tokens apart and place the patches, after checking."""
    tile_rows, tile_columns = (int(length) for length in grid)
    _check_shapes(embeds, kept, (tile_rows, tile_columns))
    first, count = int(cls_token), patches[0] * patches[1]
    ascending = bool((np.diff(kept, axis=1) > 0).all())
    if not ascending or kept.min() < 0 or kept.max() >= count + first:
        raise InvalidInputError(
            f"got kept tokens from {kept.min()} to {kept.max()}",
            expected=(
                f"ascending ones of 0 … {count + first - 1} for {patches[0]}×{patches[1]} patches "
                f"{('and' if cls_token else 'without')} CLS"
            ),
            cause="they are of another tower",
        )
    with_cls = (kept[:, 0] == 0) & cls_token
    if with_cls.any() != with_cls.all():
        raise InvalidInputError(
            f"got kept tokens with CLS (0) in {with_cls.sum()} of {len(kept)} tiles",
            expected="all or none",
            cause="they are of several bundles",
        )
    chosen, dominant = int(with_cls[0]), kept.shape[1]
    tile_row, tile_column = np.divmod(np.arange(len(kept), dtype=np.int64)[:, None], tile_columns)
    row, column = np.divmod(kept[:, chosen:].astype(np.int64) - first, patches[1])
    width = embeds.shape[2]
    return _Tokens(
        patches=embeds[:, chosen:dominant].reshape(-1, width),
        row=(tile_row * patches[0] + row).reshape(-1),
        column=(tile_column * patches[1] + column).reshape(-1),
        rows=tile_rows * patches[0],
        columns=tile_columns * patches[1],
        others=np.concatenate(
            [embeds[:, :chosen].reshape(-1, width), embeds[:, dominant:].reshape(-1, width)]
        ),
    )


def _check_shapes(embeds: Array, kept: NDArray[np.integer[Any]], grid: tuple[int, int]) -> None:
    """Refuse arrays that are not the tokens of a grid of tiles."""
    tiles = math.prod(grid)
    if (
        min(grid) < 1
        or (embeds.ndim, embeds.dtype.kind) != (3, "f")
        or (kept.ndim, kept.dtype.kind) != (2, "i")
        or len(embeds) != tiles
        or len(kept) != tiles
        or not 1 <= kept.shape[1] <= embeds.shape[1]
    ):
        raise InvalidInputError(
            f"got tokens {embeds.dtype} {list(embeds.shape)} and kept {kept.dtype} "
            f"{list(kept.shape)} for {grid[0]}×{grid[1]} tiles",
            expected=f"float [{tiles}, K, L] and int64 [{tiles}, dominant] with 1 ≤ dominant ≤ K",
            cure="leave the base tile out",
        )


def _best_resolution(
    size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Return the best of the pinpoints (height, width) for a picture of this height and width."""

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
        # The picture as it is scaled, in whole pixels; enlarging it adds nothing.
        effective = min(int(size[1] * scale) * int(size[0] * scale), math.prod(size))
        return effective, effective - math.prod(pinpoint)

    return max(pinpoints, key=merit)  # the first of equals


def _fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the picture, scaled to fit `target`."""
    scale_height, scale_width = target[0] / size[0], target[1] / size[1]
    if scale_width < scale_height:
        return min(math.ceil(size[0] * scale_width), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * scale_height), target[1])


def picture_cells(size: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the picture among rows × columns of patches.

    It keeps whole patches on both sides alike, so the outermost may be padding in part. Float
    arithmetic and its rounding are upstream's: another order gives another row now and then.
    """
    rows, columns = cells
    if size[1] / size[0] > columns / rows:
        height = int(round(size[0] * (columns / size[1]), 7))
        padding = (rows - height) // 2
        return padding, 0, rows - padding, columns
    width = int(round(size[1] * (rows / size[0]), 7))
    padding = (columns - width) // 2
    return 0, padding, rows, columns - padding
