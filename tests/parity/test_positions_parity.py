"""Places of tiled pictures, against the sequence that transformers' own models pack."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.tokens.test_positions import manifest
from vzip.runtime.tokens.positions import tile_places

SIDE, PATCH = 56, 14
CELLS = SIDE // PATCH
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]]
SIZES = [(100, 100), (40, 200), (200, 41), (97, 131), (56, 113), (300, 301), (33, 55), (20, 60)]


def packed(model: str, size: tuple[int, int], tiles: int) -> np.ndarray:
    """The numbers of all patches, tile by tile, as the untouched model puts them in a row.

    A newline is −1.
    """
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    vision = SimpleNamespace(image_size=SIDE, patch_size=PATCH)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS)
    numbers = torch.arange(tiles * CELLS**2, dtype=torch.float32).reshape(tiles, -1, 1)
    options: dict[str, Any] = {"image_newline": torch.tensor([-1.0])}
    if model == "llava-next":
        options["vision_feature_select_strategy"] = "default"
    kind = LlavaNextModel if model == "llava-next" else LlavaOnevisionModel
    features, lengths = kind.pack_image_features(
        SimpleNamespace(config=config), [numbers], torch.tensor([size]), **options
    )
    assert int(lengths[0]) == len(features[0])
    return features[0][:, 0].numpy()


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, PINPOINTS)
    return height // SIDE, width // SIDE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", ["llava-next", "llava-onevision"])
def test_tiles_in_newline_order_stand_where_the_untouched_model_puts_them(
    model: str, size: tuple[int, int]
) -> None:
    grid = grid_of(size)
    tiles, patches = 1 + math.prod(grid), CELLS**2
    sequence = packed(model, size, tiles)
    cls_tower = model == "llava-next"
    found = manifest(CELLS, cls_tower=cls_tower, max_tiles=None if cls_tower else 9)
    rng = np.random.default_rng(sum(size))
    kept = np.stack([np.sort(rng.choice(patches, 6, replace=False)) for _ in range(tiles)])
    merged = rng.integers(0, patches, (tiles, 2))
    positions = np.concatenate([kept, merged], axis=1)
    where = tile_places(found, positions, kept + cls_tower, grid, size)
    assert where.places is not None
    assert where.span == len(sequence)
    numbers = (positions + np.arange(tiles)[:, None] * patches).astype(np.float64)
    there = set(sequence.tolist())
    at = sequence[where.places]
    assert at[: 6 + 2].tolist() == numbers[0].tolist()
    ends = sequence == -1
    assert sorted(where.places[at == -1]) == np.flatnonzero(ends).tolist()
    # Behind the base tile: kept patches by place with the newlines, then the merged ones.
    lines, others = where.places[8 : -2 * (tiles - 1)], at[-2 * (tiles - 1) :]
    assert (np.diff(lines) > 0).all()
    own = {number for number in numbers[1:, :6].ravel() if number in there}
    assert set(sequence[lines].tolist()) - {-1.0} == own
    for number, got in zip(numbers[1:, 6:].ravel(), others, strict=True):
        assert got == number if number in there else got != -1


@pytest.mark.parametrize("size", SIZES)
def test_tiles_in_reference_order_stand_in_the_whole_canvas(size: tuple[int, int]) -> None:
    grid = grid_of(size)
    tiles, patches = 1 + math.prod(grid), CELLS**2
    every = np.tile(np.arange(patches), (tiles, 1))
    where = tile_places(manifest(CELLS, order="reference"), every, every + 1, grid, size)
    columns = grid[1] * CELLS
    assert where.span == patches + grid[0] * CELLS * (columns + 1)
    ends = patches + np.arange(grid[0] * CELLS) * (columns + 1) + columns
    assert where.places is not None
    assert where.places.tolist() == sorted({*range(where.span)} - {*ends.tolist()})


def test_a_picture_of_which_no_patch_is_left_as_it_is_has_no_places() -> None:
    shrunk = manifest(CELLS, cls_tower=False, max_tiles=1)
    positions = np.zeros((5, 1), np.int64)
    where = tile_places(shrunk, positions, positions, (2, 2), (112, 112))
    assert where.places is None
    assert where.span is not None
    size = (7, 60)  # so flat that the untouched model cuts all of it off
    grid = grid_of(size)
    tiles = 1 + math.prod(grid)
    positions = np.zeros((tiles, 1), np.int64)
    where = tile_places(manifest(CELLS), positions, positions, grid, size)
    assert where.places is None
    assert where.span == CELLS**2 == len(packed("llava-next", size, tiles))
