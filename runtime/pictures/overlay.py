"""Draws what VisionZip kept: a picture of the tower's view, made to be looked at.

Kept patches stay as they are, inside a thin white line. All others are dark and grey, and where the
contextual groups are known each is tinted in its group's colour; the target of a group, which the
others were merged into, has a bright frame of that colour and the group's number. A line below
counts the tokens, and a legend the tokens of each group.

Ten colours can be told apart, with red-green and blue-yellow blindness too; from the eleventh group
on they come again with stripes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.preprocess import Preprocessing, tower_image
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_SIDE = 672
"""The picture's longer side is at least this many pixels: small towers are drawn enlarged."""

_LINE = 2  # pixels of the line around kept patches, and of a target's frame
_WHITE = (255, 255, 255)
_INK, _PAPER = (232, 233, 238), (20, 21, 25)  # of the legend
_LEGEND_HEIGHT, _FONT_SIZE = 34, 15
_SWATCH, _GAP = 16, 6  # of a group's entry in the legend
_NUMBERED = 14  # smallest patch that a number fits into, in pixels of the drawing

# The least difference between two of them, as they are and as they tint light and dark places, is
# the largest that a search over 12³ saturated colours found: in CIE Lab, of what people with full
# colour vision, protanopia, deuteranopia and tritanopia see (Machado, Oliveira and Fernandes 2009).
_COLOURS = (
    (255, 238, 0),
    (68, 0, 255),
    (255, 0, 51),
    (68, 255, 255),
    (255, 153, 153),
    (187, 68, 255),
    (255, 119, 0),
    (136, 170, 255),
    (204, 255, 136),
    (255, 17, 170),
)


@dataclass(frozen=True)
class _Grid:
    """The patches: `rows` × `cols` squares of `patch` pixels of the tower, drawn `scale` larger."""

    rows: int
    cols: int
    patch: int
    scale: int

    @property
    def cell(self) -> int:
        """Pixels of the drawing along one edge of a patch."""
        return self.patch * self.scale

    def spread(self, values: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return one value per patch [rows, cols] as one per pixel of the drawing."""
        pixels: NDArray[np.bool_] = values.repeat(self.cell, axis=0).repeat(self.cell, axis=1)
        return pixels


def overlay(
    image: Image.Image,
    kept: NDArray[np.int64],
    *,
    grid: tuple[int, int],
    cls_token: bool,
    prep: Preprocessing,
    groups: NDArray[np.int64] | None,
    rank: NDArray[np.int64] | None = None,
) -> Image.Image:
    """Return a picture of which tokens were kept and which were merged.

    Args:
        image: In mode RGB and upright, as `load_image` returns it.
        kept: int64 [dominant], ascending: indices of the tower's tokens. With a CLS tower 0 is CLS
            and patch p (row by row) is p + 1.
        grid: Rows and columns of patches. The patch size is the tower's resolution divided by the
            larger of them, rounded down; what is left at the right and lower edge, which the
            tower's convolution does not reach, is not drawn.
        cls_token: Whether the tower has a CLS token (kept or not).
        prep: How the image becomes the tower's input.
        groups: int64 [tokens], or None where they are not known: for each of the tower's tokens,
            which contextual token, counted from 0, it was merged into or is the target of; −1 for
            one that was kept or dropped.
        rank: int64 [dominant], at which step each kept token was chosen, from 0; its number, from
            1, is written into the patch. None where the selection has no order.

    Returns:
        RGB: the tower's view, enlarged by a whole number until its longer side has `MIN_SIDE`
        pixels or more, and a legend below.

    Raises:
        InvalidInputError: The image, indices, groups and grid don't fit together.
    """
    cells = _grid(grid, prep.image_size)
    first_patch = int(cls_token)
    tokens = first_patch + cells.rows * cells.cols
    _check_kept(kept, tokens)
    _check_rank(rank, kept)
    token_kept = np.zeros(tokens, bool)
    token_kept[kept] = True
    patch_kept = token_kept[first_patch:].reshape(cells.rows, cells.cols)

    view = _view(image, prep, cells)
    picture = _dimmed(view)
    targets = np.empty(0, np.int64)
    if groups is not None:
        targets = _targets(groups, kept, tokens=tokens, cls_token=cls_token)
        patch_groups = groups[first_patch:].reshape(cells.rows, cells.cols)
        _tint(picture, patch_groups, cells)
    inside = cells.spread(patch_kept)
    picture[_grown(inside, _LINE)] = _WHITE
    picture[inside] = view[inside]
    places = [divmod(int(target), cells.cols) for target in targets - first_patch]
    for colour, place in zip(_colours(np.arange(len(places))), places, strict=True):
        _frame(picture, *place, colour, cells)

    has_cls = cls_token and 0 in kept
    what = (
        f"CLS + {counted(len(kept) - 1, 'patch', 'patches')}"
        if has_cls
        else f"{counted(len(kept), 'patch', 'patches')}"
    )
    if groups is None:
        ordered = () if rank is None else ("numbers: the order in which they were chosen",)
        texts: tuple[str, ...] = (f"{len(kept)} of {tokens} tokens kept ({what})", *ordered)
    else:
        texts = (
            f"K = {len(kept) + len(targets)} of {tokens} tokens",
            f"{len(kept)} kept ({what})",
            f"{len(targets)} contextual (merged from {np.count_nonzero(groups >= 0)})",
        )
    counts = [] if groups is None else np.bincount(groups[groups >= 0]).tolist()
    page = _with_legend(picture, texts, counts)
    if cells.cell >= _NUMBERED:
        _number(page, dict(enumerate(places)), cells)
        if rank is not None:
            steps = zip(rank, kept - first_patch, strict=True)
            _number(page, {int(s) + 1: divmod(int(patch), cells.cols) for s, patch in steps}, cells)
    return page


def _grid(grid: tuple[int, int], image_size: int) -> _Grid:
    """Return the layout of a grid of patches; raises InvalidInputError."""
    rows, cols = grid
    if not 1 <= min(rows, cols) <= max(rows, cols) <= image_size:
        raise InvalidInputError(
            f"overlay: got a grid of {rows}×{cols} patches",
            expected=f"1 to {image_size} each way for a tower of {image_size} pixels",
            cure="take both from the same manifest",
        )
    patch = image_size // max(rows, cols)
    return _Grid(rows, cols, patch, scale=-(-MIN_SIDE // (patch * max(rows, cols))))


def _check_kept(kept: NDArray[np.int64], tokens: int) -> None:
    """Raise InvalidInputError unless `kept` is int64 [dominant], ascending, within the tokens."""
    if kept.dtype != np.int64 or kept.ndim != 1:
        raise InvalidInputError(
            f"overlay: got kept of dtype {kept.dtype} and shape {list(kept.shape)}",
            expected="int64 [dominant]",
            cure="give the kept indices of one image, as the encoder returns them",
        )
    if kept.size and not (kept[0] >= 0 and kept[-1] < tokens and (np.diff(kept) > 0).all()):
        raise InvalidInputError(
            f"overlay: got kept from {kept.min()} to {kept.max()}",
            expected=f"ascending, different indices from 0 to {tokens - 1}",
            cause="they belong to another tower or are not sorted",
        )


def _check_rank(rank: NDArray[np.int64] | None, kept: NDArray[np.int64]) -> None:
    """Raise InvalidInputError unless `rank` has each step of the kept tokens once."""
    if rank is not None and not np.array_equal(np.sort(rank), np.arange(len(kept))):
        raise InvalidInputError(
            f"overlay: got ranks {np.asarray(rank).tolist()}",
            expected=f"each of 0 … {len(kept) - 1} once",
            cure="give those of the same image",
        )


def _targets(
    groups: NDArray[np.int64], kept: NDArray[np.int64], *, tokens: int, cls_token: bool
) -> NDArray[np.int64]:
    """Return int64 [contextual], the token that is the target of each group.

    Targets are evenly spaced among the tokens that are in a group, in spatial order (VisionZip's
    rule), so they need not be handed over; that each lies in its own group is checked.
    """
    if groups.dtype != np.int64 or groups.shape != (tokens,):
        raise InvalidInputError(
            f"overlay: got groups of dtype {groups.dtype} and shape {list(groups.shape)}",
            expected=f"int64 [{tokens}], one for each token of the tower",
            cure="take them from the same encoder",
        )
    rest = np.flatnonzero(groups >= 0)
    contextual = int(groups.max()) + 1
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    if (
        groups.min() < -1
        or contextual > len(rest)
        or (groups[kept] != -1).any()
        or (cls_token and groups[0] != -1)
        or not np.array_equal(groups[targets], np.arange(contextual))
    ):
        raise InvalidInputError(
            f"overlay: got groups from {groups.min()} to {groups.max()} that don't fit the "
            "kept tokens",
            expected=(
                "−1 for kept tokens and CLS, and each group's evenly spaced target in that group"
            ),
            cause="kept and groups are of different images",
        )
    return targets.astype(np.int64)


def _view(image: Image.Image, prep: Preprocessing, cells: _Grid) -> NDArray[np.uint8]:
    """Return what the tower sees, enlarged: uint8 [rows · cell, cols · cell, 3]."""
    seen = tower_image(image, prep)[: cells.rows * cells.patch, : cells.cols * cells.patch]
    size = (cells.cols * cells.cell, cells.rows * cells.cell)
    enlarged = Image.fromarray(seen).resize(size, Image.Resampling.BICUBIC)
    return np.array(enlarged, np.uint8)


def _dimmed(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a dark and nearly grey copy of [H, W, 3]."""
    grey = view.mean(axis=2, keepdims=True, dtype=np.float32)
    dimmed: NDArray[np.uint8] = (0.40 * (0.75 * grey + 0.25 * view)).astype(np.uint8)
    return dimmed


def _tint(picture: NDArray[np.uint8], groups: NDArray[np.int64], cells: _Grid) -> None:
    """Colour the patches of each group of a picture, in place; groups: int64 [rows, cols]."""
    spread = groups.repeat(cells.cell, axis=0).repeat(cells.cell, axis=1)
    where = spread >= 0
    wash = _colours(spread[where]) * _striped(spread)[where][:, None]
    # Partly as light falls on the picture, so that its shapes stay; partly flat, for dark places.
    light = picture[where].max(axis=1, keepdims=True).astype(np.float32) / 102
    tinted = 0.45 * picture[where] + (0.16 + 0.34 * light) * wash
    picture[where] = tinted.clip(0, 255).astype(np.uint8)


def _striped(groups: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return how strong the colour of each pixel is; groups: int64 [H, W], one group for each.

    The first ten groups are flat, the next ten have stripes, the next ten stripes the other way,
    and so on with finer ones.
    """
    rows, columns = np.indices(groups.shape)
    turn, direction = np.divmod(groups // len(_COLOURS) - 1, 2)
    width = 6 // (1 + np.maximum(turn, 0)) + 2
    dark = (rows + np.where(direction == 0, columns, -columns)) // width % 2 == 1
    strong: NDArray[np.float32] = np.where(dark & (groups >= len(_COLOURS)), 0.35, 1)
    return strong.astype(np.float32)


def _grown(inside: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Return the mask [H, W], larger by some pixels on every side, corners included."""
    grown: NDArray[np.bool_] = inside.copy()
    for _ in range(pixels):
        grown[1:] |= grown[:-1].copy()
        grown[:-1] |= grown[1:].copy()
        grown[:, 1:] |= grown[:, :-1].copy()
        grown[:, :-1] |= grown[:, 1:].copy()
    return grown


def _frame(
    picture: NDArray[np.uint8], row: int, col: int, colour: NDArray[np.uint8], cells: _Grid
) -> None:
    """Draw a frame just inside one patch, in place."""
    top, left = row * cells.cell, col * cells.cell
    patch = picture[top : top + cells.cell, left : left + cells.cell]
    line = min(_LINE + 1, cells.cell // 2)
    patch[:line] = patch[-line:] = colour
    patch[:, :line] = patch[:, -line:] = colour


def _colours(groups: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return uint8 [count, 3], the colour of each of some groups, int64 [count]."""
    return np.array(_COLOURS, np.uint8)[groups % len(_COLOURS)]


def _number(page: Image.Image, places: dict[int, tuple[int, int]], cells: _Grid) -> None:
    """Write numbers into the patches at their places."""
    font = ImageFont.load_default(min(_FONT_SIZE, cells.cell * 0.45))
    draw = ImageDraw.Draw(page)
    for number, (row, col) in places.items():
        middle = ((col + 0.5) * cells.cell, (row + 0.5) * cells.cell)
        draw.text(
            middle, str(number), _WHITE, font, anchor="mm", stroke_width=1, stroke_fill=_PAPER
        )


def _with_legend(
    picture: NDArray[np.uint8], texts: tuple[str, ...], counts: list[int]
) -> Image.Image:
    """Return the picture with a line of text below, and the number of tokens in each group."""
    height, width = picture.shape[:2]
    font, small = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_FONT_SIZE - 2)
    entries = [f"{group}: {count}" for group, count in enumerate(counts)]
    wide = _SWATCH + 3 * _GAP + max((int(small.getlength(each)) for each in entries), default=0)
    columns, high = (width - 2 * _GAP) // wide, _SWATCH + _GAP
    below = _LEGEND_HEIGHT + -(-len(entries) // columns) * high
    page = Image.new("RGB", (width, height + below), _PAPER)
    page.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(page)
    place = (2 * _GAP, height + _LEGEND_HEIGHT // 2)
    draw.text(place, "   ·   ".join(texts), _INK, font, anchor="lm")
    for group, entry in enumerate(entries):
        row, column = divmod(group, columns)
        left, top = 2 * _GAP + column * wide, height + _LEGEND_HEIGHT + row * high - _GAP // 2
        flat = np.full((_SWATCH, _SWATCH), group, np.int64)
        swatch = _colours(flat) * _striped(flat)[..., None]
        page.paste(Image.fromarray(swatch.astype(np.uint8)), (left, top))
        middle = (left + _SWATCH + _GAP, top + _SWATCH // 2)
        draw.text(middle, entry, _INK, small, anchor="lm")
    return page
