"""Where tokens stand in the sequence that the language model was trained with.

An image's *uncompressed sequence* is what transformers' model puts at its placeholder without
compression. It has `span` places, 0 … span − 1. The graph says of each token which patch it stands
for (``token_positions``: a merged token for its target, CLS for patch 0); what place that patch has
depends on family, tiles and each picture's padding, and is computed here. So are the positions of a
prompt's tokens.

| what | place of patch i, or of row r and column c | places |
|---|---|---|
| an image, or a base tile, of N patches | i | N |
| where the uncompressed model hands on CLS (Video-LLaVA's frames) | i + 1; CLS 0 | N + 1 |
| several images of LLaVA-OneVision, the newline embedding last | i | N + 1 |
| tiles, order "newline", W columns and H rows without padding | N + r·(W+1) + c | N + H·(W+1) |
| the newline that ends row r of these | N + r·(W+1) + W | |
| tiles, order "reference", C columns and R rows with padding | N + r·(C+1) + c | N + R·(C+1) |
| frame f of a clip with `s` places a frame | f·s + its place | frames·s, and 1 for a closing row |

A merged or CLS token whose patch is padding stands at the nearest patch of the picture. Pictures
that the uncompressed LLaVA-OneVision shrinks (`Tiling.max_tiles`) have no places: none of its
tokens is a patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.tiles import arrange, arrange_rows, picture_cells, rows_left
from vzip.runtime.tokens.ranks import ENDING, Ranks, check_within, unranked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.manifest import Manifest

    Array = NDArray[Any]
    Index = NDArray[np.int64]

Positions = Literal["original", "consecutive"]
"""``original``: tokens keep the positions of the patches that they stand for. ``consecutive``: they
are numbered one after the other, as published."""


class Places(NamedTuple):
    """Where the rows of one image or clip stand in its uncompressed sequence.

    Attributes:
        places: int64 [n], of each row, in the order of the rows; None where the picture has none.
        span: How many places the uncompressed sequence has; None where the bundle can't tell.
    """

    places: Index | None = None
    span: int | None = None


UNKNOWN = Places()
"""Of a bundle that was exported before graphs said which patch a token stands for."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """All that the language model gets for one image or clip, and what it was selected from.

    Attributes:
        embeds: float32 or float16 [n, L], in the order of `VisionEncoder.image_tokens`.
        kept: int64 [tiles, dominant]: of each tile, as `CompressedTokens.kept`; the base tile is
            first. A bundle that cuts no tiles has one; of a clip, of each frame.
        positions: int64 [tiles, K]: of each tile, or frame, as `CompressedTokens.positions`; None
            where the bundle was exported before graphs said so.
        where: Where the rows stand in the uncompressed sequence.
        ranks: At which step each was chosen; None where the bundle's selection isn't nested.
    """

    embeds: Array
    kept: Index
    positions: Index | None = None
    where: Places = UNKNOWN
    ranks: Ranks | None = None

    def __iter__(self) -> Iterator[Array]:
        """Yield `embeds` and `kept`, which were all that there was of it once."""
        return iter((self.embeds, self.kept))

    def first(self, tokens: int) -> EncodedImage:
        """Return what a smaller budget would have given, of the same numbers.

        Args:
            tokens: Of each tile or frame, 1 … K. Rows of newlines stay.

        Raises:
            BudgetError: There are fewer, or the selection isn't nested.
        """
        if self.ranks is None:
            raise unranked()
        check_within(tokens, self.ranks.tiles.shape[1])
        tiles, rows = self.ranks.tiles < tokens, self.ranks.rows < tokens
        kept = self.kept[tiles].reshape(-1, tokens)
        positions = None if self.positions is None else self.positions[tiles].reshape(-1, tokens)
        places = None if self.where.places is None else self.where.places[rows]
        ranks = Ranks(self.ranks.tiles[tiles].reshape(-1, tokens), self.ranks.rows[rows])
        return EncodedImage(
            self.embeds[rows], kept, positions, Places(places, self.where.span), ranks
        )


def image_places(manifest: Manifest, positions: Index | None) -> Places:
    """Return the places of an image that isn't cut.

    Args:
        manifest: The bundle's.
        positions: int64 [K], ``token_positions`` of the image; None where the bundle has none.
    """
    if positions is None or manifest.span is None:
        return UNKNOWN
    return Places(_in_tile(manifest, positions[None])[0], manifest.span)


def several_places(manifest: Manifest, positions: Index | None, *, newline: bool) -> Places:
    """Return the places of one of several images where only a single one is cut.

    Args:
        manifest: The bundle's.
        positions: As for `image_places`.
        newline: Whether the newline embedding follows the image's rows.
    """
    alone = image_places(manifest, positions)
    if alone.places is None or alone.span is None:
        return alone
    last = [alone.span] if newline else []
    return Places(np.append(alone.places, last).astype(np.int64), alone.span + 1)


def tile_places(
    manifest: Manifest,
    positions: Index | None,
    kept: Index,
    grid: tuple[int, int],
    size: tuple[int, int],
) -> Places:
    """Return the places of an image that was cut into tiles, in the order of its rows.

    Args:
        manifest: The bundle's, with a tiling.
        positions: int64 [1 + tiles, K], ``token_positions`` of the base tile and the others.
        kept: int64 [1 + tiles, dominant], the kept indices of the same.
        grid: Rows and columns of tiles.
        size: Height and width of the picture before it was scaled: `Tiles.size`.
    """
    tiling, tower = manifest.tiling, manifest.tower
    assert tiling is not None
    if positions is None or manifest.span is None:
        return UNKNOWN
    base, (side_rows, side_columns) = manifest.span, tower.grid
    cells = (grid[0] * side_rows, grid[1] * side_columns)
    top, left, bottom, right = picture_cells(size, cells)
    height, width = bottom - top, right - left
    shrunk = rows_left(height, width, side_rows, tiling.max_tiles) != height
    if tiling.order == "reference":
        top, left, (height, width) = 0, 0, cells
    span = base + height * (width + 1)
    if shrunk or min(height, width) < 1:
        return Places(None, span)
    tiles, count = positions[1:].shape
    chosen = _arranged(manifest, kept, grid, size, count=count)
    tile_row, tile_column = np.divmod(np.arange(tiles)[:, None], grid[1])
    row, column = np.divmod(positions[1:], side_columns)  # [tiles, K]
    row = np.clip(tile_row * side_rows + row - top, 0, height - 1).reshape(-1)[chosen]
    column = np.clip(tile_column * side_columns + column - left, 0, width - 1).reshape(-1)[chosen]
    newlines = chosen < 0
    row[newlines], column[newlines] = np.arange(newlines.sum()), width
    own = _in_tile(manifest, positions[:1])[0]
    return Places(np.concatenate([own, base + row * (width + 1) + column]), span)


def flat_ranks(rank: Index | None, rows: int) -> Ranks | None:
    """Return the ranks of images, tiles or frames whose rows follow each other as they are.

    Args:
        rank: int64 [tiles, K], of the graph; None where it gives none.
        rows: How many there are, with newlines behind them.
    """
    if rank is None:
        return None
    return Ranks(rank, np.append(rank, np.full(rows - rank.size, ENDING)).astype(np.int64))


def tile_ranks(
    manifest: Manifest,
    rank: Index | None,
    kept: Index,
    grid: tuple[int, int],
    size: tuple[int, int],
) -> Ranks | None:
    """Return the ranks of an image that was cut into tiles.

    Args:
        manifest: The bundle's, with a tiling.
        rank: int64 [1 + tiles, K], of the graph; None where it gives none.
        kept: As for `tile_places`.
        grid: As for `tile_places`.
        size: As for `tile_places`.
    """
    if rank is None:
        return None
    # A newline's number is -1, and what stands last is its rank.
    chosen = _arranged(manifest, kept, grid, size, count=rank.shape[1])
    others = np.append(rank[1:], ENDING)[chosen]
    return Ranks(rank, np.concatenate([rank[0], others]))


def _arranged(
    manifest: Manifest, kept: Index, grid: tuple[int, int], size: tuple[int, int], *, count: int
) -> Index:
    """Return which row of the tiles stands where: int64 [n], tile · K + row, −1 for newlines.

    K is `count`.
    """
    tiling, tower = manifest.tiling, manifest.tower
    assert tiling is not None
    # What arranges the tokens arranges their numbers; a newline is -1.
    tiles = len(kept) - 1
    numbers = np.arange(tiles * count, dtype=np.float64).reshape(tiles, count, 1)
    if tiling.order == "newline":
        order = arrange_rows(
            numbers,
            kept[1:],
            grid,
            np.array([-1.0]),
            size,
            patches=tower.grid,
            cls_token=tower.cls_token,
            max_tiles=tiling.max_tiles,
        )
    else:
        order = arrange(numbers, kept[1:], grid, patches=tower.grid, cls_token=tower.cls_token)
    return order[:, 0].astype(np.int64)


def clip_places(manifest: Manifest, positions: Index | None, *, closing: bool) -> Places:
    """Return the places of a clip's frames, one after the other.

    Args:
        manifest: The bundle's.
        positions: int64 [frames, K], ``token_positions`` of each.
        closing: Whether a newline embedding ends the clip.
    """
    if positions is None or manifest.span is None:
        return UNKNOWN
    frames = len(positions)
    places = np.arange(frames)[:, None] * manifest.span + _in_tile(manifest, positions)
    last = [frames * manifest.span] if closing else []
    every = np.append(places.reshape(-1), last).astype(np.int64)
    return Places(every, frames * manifest.span + closing)


def frame_places(where: Places, frames: int) -> list[Places]:
    """Return the places of each of a clip's frames, where each is an image of its own to the LLM.

    Args:
        where: Of the clip, without a closing row.
        frames: How many there are.
    """
    if where.places is None or where.span is None:
        return [where] * frames
    span = where.span // frames
    parts = np.split(where.places, frames)
    return [Places(part - number * span, span) for number, part in enumerate(parts)]


def by_place(where: Places) -> Index:
    """Return the order of the rows by place, int64 [n]; rows of one place stay as they are.

    The LLM's causal mask goes by order: what stands before a row must come before it.
    """
    assert where.places is not None
    return np.argsort(where.places, kind="stable")


def check_places(name: str, where: Places, rows: int) -> None:
    """Check places that somebody gives.

    Args:
        name: Whose, for the message.
        where: The places.
        rows: How many rows there are.

    Raises:
        InvalidInputError: Not one for each row, or one out of the span.
    """
    if where.places is None:
        return
    places, span = where.places, where.span
    wanted = f"one place of 0 … {(span or 0) - 1} for each of the {rows} rows, as int64 [{rows}]"
    cure = "give them as VisionEncoder.image_tokens returned them"
    if not isinstance(places, np.ndarray) or places.dtype != np.int64 or places.shape != (rows,):
        shape = list(np.shape(places))
        got = f"{name}: got places {getattr(places, 'dtype', type(places).__name__)} {shape}"
        raise InvalidInputError(got, expected=wanted, cure=cure)
    if type(span) is not int or span < 1:
        raise InvalidInputError(f"{name}: got a span of {span!r}", expected="1 or more", cure=cure)
    if rows and (places.min() < 0 or places.max() >= span):
        wrong = int(np.flatnonzero((places < 0) | (places >= span))[0])
        raise InvalidInputError(
            f"{name}: got place {places[wrong]} for row {wrong}", expected=wanted, cure=cure
        )


def along(ids: Sequence[int], placeholder: int, parts: Sequence[Places]) -> Index:
    """Return the positions of a prompt's first turn.

    Text is numbered one after the other. A placeholder's rows have the position that comes next and
    their place, and what follows them goes on behind the whole span, not behind the rows.

    Args:
        ids: Of the prompt, with one placeholder for each row.
        placeholder: Its id.
        parts: Of each image, its rows in the order of the ids.

    Returns:
        int64 [m], of each id.
    """
    made = np.empty(len(ids), np.int64)
    left = iter(parts)
    at = coming = 0
    while at < len(ids):
        if ids[at] != placeholder:
            made[at] = coming
            at, coming = at + 1, coming + 1
            continue
        part = next(left)
        assert part.places is not None
        assert part.span is not None
        made[at : at + len(part.places)] = coming + part.places
        at, coming = at + len(part.places), coming + part.span
    return made


def left_out(parts: Sequence[Places]) -> int:
    """Return how many positions have no row: by so much later turns stand further behind."""
    return sum((part.span or 0) - len(part.places) for part in parts if part.places is not None)


def check_ascending(name: str, positions: Index) -> None:
    """Refuse positions that go back, before an LLM is run.

    Args:
        name: The LLM's name, for the message.
        positions: Of new tokens, in their order.

    Raises:
        InvalidInputError: One is below the one before it.
    """
    back = np.flatnonzero(np.diff(positions) < 0)
    if back.size:
        at = int(back[0])
        raise InvalidInputError(
            f"{name}: got position {positions[at + 1]} behind {positions[at]}",
            expected="positions that don't go back",
            cause="the LLM's causal mask goes by order",
            cure="sort the rows by place",
        )


def _in_tile(manifest: Manifest, positions: Index) -> Index:
    """Return the places int64 [B, K] of tokens in their own image, tile or frame."""
    patches = manifest.tower.grid[0] * manifest.tower.grid[1]
    assert manifest.span is not None
    places: Index = positions + (manifest.span - patches)
    if manifest.selection.cls_token:
        places[:, 0] = 0
    return places
