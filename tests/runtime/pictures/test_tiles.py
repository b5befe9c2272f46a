"""Tiles: cut as the plain way would, and put in order as loops over rows and columns would.

`tests/parity/test_tiles_parity.py` compares both with transformers.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.preprocess import Preprocessing, tower_image
from vzip.runtime.pictures.tiles import arrange, arrange_rows, cut, newline_row

Array = np.ndarray[Any, Any]

ANYRES = GOLDEN / "conformance" / "anyres.npz"
SIDE = 16
PINPOINTS = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))  # LLaVA-NeXT's, with small tiles
PREP = Preprocessing(SIDE, "stretch", SIDE, "bicubic", (0.5,) * 3, (0.5,) * 3, 1 / 255)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


# Cutting


@pytest.mark.parametrize(
    ("size", "grid", "content"),
    [  # (width, height), (rows, columns), (top, left, bottom, right)
        ((32, 32), (2, 2), (0, 0, 32, 32)),
        ((16, 16), (1, 2), (0, 8, 16, 24)),  # enlarging adds nothing, so the least waste decides
        ((100, 50), (1, 2), (0, 0, 16, 32)),
        ((50, 100), (2, 1), (0, 0, 32, 16)),
        ((100, 20), (1, 3), (3, 0, 13, 48)),  # 9.6 pixels are rounded up
        ((20, 100), (3, 1), (0, 3, 48, 13)),
        ((90, 80), (2, 2), (1, 0, 30, 32)),  # the odd pixel of padding lies below …
        ((80, 90), (2, 2), (0, 1, 32, 30)),  # … or to the right
    ],
)
def test_cuts_row_by_row_behind_the_base_tile(
    size: tuple[int, int], grid: tuple[int, int], content: tuple[int, int, int, int]
) -> None:
    image = noise(*size)
    result = cut(image, PREP, Tiling(PINPOINTS))
    assert (result.grid, result.size) == (grid, (size[1], size[0]))
    top, left, bottom, right = content
    canvas = np.zeros((grid[0] * SIDE, grid[1] * SIDE, 3), np.uint8)
    canvas[top:bottom, left:right] = image.resize((right - left, bottom - top), 3)
    assert result.images.dtype == np.uint8
    assert result.images.shape == (1 + grid[0] * grid[1], SIDE, SIDE, 3)
    assert np.array_equal(result.images[0], tower_image(image, PREP))
    for place, tile in enumerate(result.images[1:]):
        y, x = place // grid[1] * SIDE, place % grid[1] * SIDE
        assert np.array_equal(tile, canvas[y : y + SIDE, x : x + SIDE])


def test_of_resolutions_that_keep_as_much_the_smallest_then_the_first_is_taken() -> None:
    assert cut(noise(16, 16), PREP, Tiling(((48, 48), (32, 16), (32, 32)))).grid == (2, 1)
    square = noise(40, 40)
    assert cut(square, PREP, Tiling(((16, 48), (48, 16)))).grid == (1, 3)
    assert cut(square, PREP, Tiling(((48, 16), (16, 48)))).grid == (3, 1)


def test_the_image_is_left_alone() -> None:
    image = noise(40, 33)
    before = np.asarray(image).copy()
    cut(image, PREP, Tiling(PINPOINTS)).images[:] = 0
    assert np.array_equal(np.asarray(image), before)


@pytest.mark.parametrize("size", [(1, 48), (1, 49), (3, 1000), (1, 5000)])
def test_thin_images_keep_a_pixel(size: tuple[int, int]) -> None:
    # Of the last three no pixel is left in any resolution: the first of the smallest is taken.
    grid, column = ((1, 2), 15) if size[1] > 48 else ((3, 1), 7)
    tall = cut(Image.new("RGB", size, "white"), PREP, Tiling(PINPOINTS))
    assert tall.grid == grid
    rows = tall.images[1:].reshape(*grid, SIDE, SIDE, 3).swapaxes(1, 2)
    canvas = rows.reshape(grid[0] * SIDE, grid[1] * SIDE, 3)
    assert (canvas[:, column] == 255).all()
    assert canvas.sum() == canvas[:, column].sum(), "black beside it"


def test_refuses_other_modes() -> None:
    with refused(InvalidInputError, got="mode L", expected="RGB", cure="load_image"):
        cut(noise(20, 20).convert("L"), PREP, Tiling(PINPOINTS))


@pytest.mark.parametrize("pinpoint", [(16, 40), (40, 16), (2**16, 2**16)])
def test_refuses_resolutions_that_tiles_do_not_make_up(
    pinpoint: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, _: Image.new("RGB", size))
    got = f"{pinpoint[0]}×{pinpoint[1]}"
    with refused(InvalidInputError, got=got, expected=("16", "67108864"), cure="export"):
        cut(noise(20, 20), PREP, Tiling((pinpoint,)))


# Order


def conformance() -> list[Any]:
    data = np.load(ANYRES, allow_pickle=False)
    names = sorted({key.partition("/")[0] for key in data.files})
    assert len(names) == 3
    return [
        pytest.param(*(data[f"{name}/{key}"] for key in ("features", "kept", "grid", "tokens")))
        for name in names
    ]


@pytest.mark.parametrize(("features", "kept", "grid", "tokens"), conformance())
def test_the_published_codes_order(
    features: Array, kept: Array, grid: Array, tokens: Array
) -> None:
    result = arrange(features, kept, grid)  # type: ignore[arg-type] # an array of two is taken too
    assert result.dtype == features.dtype
    assert np.array_equal(result, tokens)


class Case(NamedTuple):
    """Tiles and budgets; cls is none (the tower has no CLS token), kept or dropped."""

    grid: tuple[int, int]
    patches: tuple[int, int]
    cls: str
    dominant: int
    contextual: int
    dtype: type

    @property
    def options(self) -> dict[str, Any]:
        return {"patches": self.patches, "cls_token": self.cls != "none"}


CASES = [
    Case((2, 2), (24, 24), "kept", 54, 10, np.float32),
    Case((1, 3), (24, 24), "kept", 27, 5, np.float16),
    Case((3, 1), (24, 24), "dropped", 27, 5, np.float32),
    Case((2, 2), (27, 27), "none", 40, 9, np.float16),
    Case((3, 5), (4, 7), "none", 11, 2, np.float32),
    Case((4, 2), (5, 3), "kept", 6, 1, np.float32),
    Case((1, 1), (3, 3), "dropped", 8, 1, np.float64),
    Case((2, 3), (4, 4), "kept", 1, 3, np.float32),  # CLS is all that is kept
    Case((2, 3), (2, 2), "none", 4, 0, np.float32),  # every patch is kept
]


def vectors(case: Case) -> tuple[Array, Array]:
    """Return random tokens [tiles, K, 5] and kept [tiles, dominant]."""
    rng = np.random.default_rng([*case.grid, *case.patches, case.dominant])
    tiles_, with_cls = math.prod(case.grid), case.cls == "kept"
    rows = []
    for _ in range(tiles_):
        chosen = rng.choice(math.prod(case.patches), case.dominant - with_cls, replace=False)
        rows.append([0] * with_cls + sorted((chosen + (case.cls != "none")).tolist()))
    embeds = rng.normal(size=(tiles_, case.dominant + case.contextual, 5)).astype(case.dtype)
    return embeds, np.array(rows, np.int64)


def looked_up(embeds: Array, kept: Array, case: Case) -> dict[tuple[int, int], Array]:
    """Return (row, column) in the whole grid of patches → token, by walking through all of it."""
    found = {}
    (rows, columns), (high, wide) = case.grid, case.patches
    for y in range(rows * high):
        for x in range(columns * wide):
            tile = (y // high) * columns + x // wide
            token = (y % high) * wide + x % wide + (case.cls != "none")
            if token in kept[tile].tolist():
                found[y, x] = embeds[tile, kept[tile].tolist().index(token)]
    return found


def rest(embeds: Array, case: Case) -> list[Array]:
    """Return CLS tokens, if kept, and the contextual tokens."""
    tokens = [tile[0] for tile in embeds] if case.cls == "kept" else []
    for tile in embeds:
        tokens.extend(tile[case.dominant :])
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_arrange_equals_a_walk_through_the_grid(case: Case) -> None:
    embeds, kept = vectors(case)
    found = looked_up(embeds, kept, case)
    expected = [found[place] for place in sorted(found)] + rest(embeds, case)
    result = arrange(embeds, kept, case.grid, **case.options)
    assert result.dtype == case.dtype
    assert result.shape == (embeds.shape[0] * embeds.shape[1], 5)
    assert np.array_equal(result, np.stack(expected))


@pytest.mark.parametrize("size", [(700, 700), (500, 900), (901, 404), (3, 500), (500, 3)])
@pytest.mark.parametrize("case", CASES)
def test_arrange_rows_equals_a_walk_through_the_rows(case: Case, size: tuple[int, int]) -> None:
    embeds, kept = vectors(case)
    newline = np.arange(5, dtype=np.float32) + 100
    rows, columns = case.grid[0] * case.patches[0], case.grid[1] * case.patches[1]
    # Fractions, rounded down: patches that are whole in the picture, were it in a corner.
    height = min(rows, int(Fraction(size[0] * columns, size[1])))
    width = min(columns, int(Fraction(size[1] * rows, size[0])))
    above, before = (rows - height) // 2, (columns - width) // 2
    found = looked_up(embeds, kept, case)
    expected: list[Array] = []
    for y in range(above, rows - above):
        expected += [found[y, x] for x in range(before, columns - before) if (y, x) in found]
        expected.append(newline.astype(case.dtype))
    expected += rest(embeds, case)
    result = arrange_rows(embeds, kept, case.grid, newline, size, **case.options)
    assert result.dtype == case.dtype
    assert np.array_equal(result, np.stack(expected) if expected else embeds[:0, 0])


def test_a_row_without_kept_patches_ends_too() -> None:
    embeds = np.arange(3, dtype=np.float32).reshape(1, 3, 1)
    tokens = arrange_rows(
        embeds, np.array([[0, 5]]), (1, 1), np.array([9.0]), (3, 3), patches=(3, 3), cls_token=False
    )
    assert tokens[:, 0].tolist() == [0, 9, 1, 9, 9, 2]


def test_kept_patches_of_the_padding_are_left_out() -> None:
    embeds = np.arange(6, dtype=np.float32).reshape(1, 6, 1)
    kept = np.array([[0, 1, 5, 9, 16]])  # CLS, a corner, the start of row 1, of row 2, the end
    tokens = arrange_rows(embeds, kept, (1, 1), np.array([9.0]), (50, 100), patches=(4, 4))
    assert tokens[:, 0].tolist() == [2, 9, 3, 9, 0, 5]


def test_tokens_are_not_changed() -> None:
    embeds, kept = vectors(Case((2, 2), (4, 4), "kept", 5, 2, np.float32))
    before = embeds.copy(), kept.copy()
    arrange(embeds, kept, (2, 2), patches=(4, 4))[:] = 0
    arrange_rows(embeds, kept, (2, 2), np.zeros(5), (9, 9), patches=(4, 4))[:] = 0
    assert np.array_equal(embeds, before[0])
    assert np.array_equal(kept, before[1])


GOOD = np.zeros((4, 7, 5), np.float32), np.tile(np.arange(5), (4, 1))


@pytest.mark.parametrize(
    ("embeds", "kept", "grid"),
    [
        (GOOD[0][:3], GOOD[1][:3], (2, 2)),
        (GOOD[0][:3], GOOD[1], (2, 2)),
        (GOOD[0], GOOD[1][:3], (2, 2)),
        (*GOOD, (1, 2)),
        (*GOOD, (-2, -2)),
        (GOOD[0][0], GOOD[1], (2, 2)),
        (GOOD[0].astype(np.int64), GOOD[1], (2, 2)),
        (GOOD[0], GOOD[1].astype(np.float32), (2, 2)),
        (GOOD[0], GOOD[1][0], (2, 2)),
        (GOOD[0], GOOD[1][:, :0], (2, 2)),
        (GOOD[0][:, :4], GOOD[1], (2, 2)),
    ],
)
def test_refuses_arrays_that_do_not_belong_together(
    embeds: Array, kept: Array, grid: tuple[int, int]
) -> None:
    arrays = (f"{each.dtype} {list(each.shape)}" for each in (embeds, kept))
    got = (*arrays, f"{grid[0]}×{grid[1]}")
    with refused(InvalidInputError, got=got, expected=f"float [{grid[0] * grid[1]}, K, L]"):
        arrange(embeds, kept, grid)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(
    "row", [[0, 1, 2, 3, 17], [-1, 0, 1, 2, 3], [0, 2, 1, 3, 4], [0, 1, 1, 2, 3]]
)
def test_refuses_tokens_that_a_tile_does_not_have(row: list[int], cls_token: bool) -> None:
    kept = GOOD[1].copy()
    kept[2] = row
    with refused(InvalidInputError, got=f"to {kept.max()}", expected=f"0 … {15 + cls_token}"):
        arrange(GOOD[0], kept, (2, 2), patches=(4, 4), cls_token=cls_token)
    kept[2] = [0, 1, 2, 3, 15 + cls_token]
    arrange(GOOD[0], kept, (2, 2), patches=(4, 4), cls_token=cls_token)


def test_refuses_a_cls_token_in_some_tiles_only() -> None:
    kept = GOOD[1].copy()
    kept[2] += 1
    with refused(InvalidInputError, got="3 of 4 tiles", expected="all or none"):
        arrange(GOOD[0], kept, (2, 2))
    arrange(GOOD[0], kept, (2, 2), cls_token=False)


def test_refuses_a_newline_that_does_not_fit() -> None:
    embeds, kept = GOOD
    with refused(InvalidInputError, got="[4]", expected="[5]"):
        arrange_rows(embeds, kept, (2, 2), np.zeros(4), (9, 9))
    large = np.full(5, 1e5, np.float32)
    assert np.isfinite(arrange_rows(embeds, kept, (2, 2), large, (9, 9))).all()
    with refused(InvalidInputError, got="float16", expected="finite", cure="--dtype fp32"):
        newline_row(large, embeds.astype(np.float16))
