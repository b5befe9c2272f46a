"""Tiles against transformers: the cut byte for byte, the rows token for token."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.pictures.preprocess import Preprocessing, pixel_values
from vzip.runtime.pictures.tiles import arrange_rows, cut

Pinpoints = tuple[tuple[int, int], ...]

# (height, width), as published, in units of a tile
NEXT_GRIDS: Pinpoints = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ONEVISION_GRIDS: Pinpoints = tuple(
    (rows, columns) for rows in range(1, 7) for columns in range(1, 7)
)
GRIDS = {"next": NEXT_GRIDS, "onevision": ONEVISION_GRIDS}
TILE = {"next": 336, "onevision": 384}
MEAN = {"next": (0.48145466, 0.4578275, 0.40821073), "onevision": (0.5, 0.5, 0.5)}
STD = {"next": (0.26862954, 0.26130258, 0.27577711), "onevision": (0.5, 0.5, 0.5)}
FAMILIES = tuple(GRIDS)
PATCH = 14  # pixels

# (width, height)
SIZES = [
    *((1, 1), (1, 97), (97, 1), (1, 3000), (3000, 1), (17, 1500), (336, 336)),
    *((335, 337), (384, 384), (640, 480), (479, 641), (672, 672), (671, 673), (1008, 336)),
    *((1000, 333), (1023, 767), (900, 1600), (1201, 1999), (2305, 1153), (3001, 2003)),
]


def pinpoints(family: str, side: int) -> Pinpoints:
    return tuple((rows * side, columns * side) for rows, columns in GRIDS[family])


def ours(family: str, side: int) -> tuple[Preprocessing, Tiling]:
    prep = Preprocessing(side, "stretch", side, "bicubic", MEAN[family], STD[family], 1 / 255)
    return prep, Tiling(pinpoints(family, side))


def upstream(
    family: str, side: int, **changes: Any
) -> LlavaNextImageProcessorPil | LlavaOnevisionImageProcessorPil:
    """Return the processor, configured as the published checkpoints are."""
    common: dict[str, Any] = {
        "image_grid_pinpoints": [list(pair) for pair in pinpoints(family, side)],
        "image_mean": list(MEAN[family]),
        "image_std": list(STD[family]),
        "resample": Image.Resampling.BICUBIC,
        **changes,
    }
    square = {"height": side, "width": side}
    if family == "next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **common)
    return LlavaOnevisionImageProcessorPil(size=square, **common)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def assert_equal_to_reference(family: str, side: int, image: Image.Image) -> None:
    stage = upstream(family, side, do_rescale=False, do_normalize=False)(image)
    prep, tiling = ours(family, side)
    result = cut(image, prep, tiling)
    (expected,) = stage["pixel_values"]
    assert expected.dtype == np.uint8
    assert result.images.dtype == np.uint8
    assert np.array_equal(result.images.transpose(0, 3, 1, 2), expected)
    assert result.size == tuple(int(length) for length in stage["image_sizes"][0])
    assert len(result.images) == 1 + math.prod(result.grid)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_published_tiles(size, family):
    assert_equal_to_reference(family, TILE[family], noise(*size))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(801, 600), (333, 999), (336, 336)])
def test_published_pixel_values(size, family):
    image, (prep, tiling) = noise(*size), ours(family, TILE[family])
    (expected,) = upstream(family, TILE[family])(image)["pixel_values"]
    result = pixel_values(cut(image, prep, tiling).images, prep)
    assert result.dtype == expected.dtype == np.float32
    assert np.array_equal(result.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.sampled_from([8, 14, 16, 21]),
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_size(*, width, height, side, family, seed):
    assert_equal_to_reference(family, side, noise(width, height, seed))


def packed(
    family: str,
    patches: int,
    size: tuple[int, int],
    features: torch.Tensor,
    newline: torch.Tensor,
    *,
    most: int = 999,
) -> torch.Tensor:
    """Return what the untouched model makes of one image's uncompressed tiles."""
    side = patches * PATCH
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=side, patch_size=PATCH),
        image_grid_pinpoints=[list(pair) for pair in pinpoints(family, side)],
    )
    kind: Any = LlavaNextModel
    options: dict[str, Any] = {"vision_feature_select_strategy": "default"}
    if family == "onevision":
        kind = LlavaOnevisionModel
        # Beyond 9 tiles' worth of patches OneVision shrinks the map of features; kept patches are
        # what they are. A limit that is never reached leaves that out.
        options = {"vision_aspect_ratio": f"anyres_max_{most}"}
    (result,), _ = kind.pack_image_features(
        SimpleNamespace(config=config), [features], [size], image_newline=newline, **options
    )
    assert isinstance(result, torch.Tensor)
    return result


@settings(max_examples=200, deadline=None)
@example(width=1000, height=750, patches=24, family="next")  # 36 of 48 rows exactly
@example(width=1009, height=1000, patches=24, family="next")  # a little less than 48 of 48
@example(width=328, height=861, patches=24, family="next")  # whole patches, but for …
@example(width=748, height=352, patches=24, family="next")  # … the rounding of floats
@example(width=999, height=333, patches=27, family="onevision")  # the canvas's own proportions
@example(width=2500, height=1, patches=24, family="next")  # no row at all
@example(width=1, height=2500, patches=27, family="onevision")
@given(
    width=st.integers(1, 2500),
    height=st.integers(1, 2500),
    patches=st.sampled_from([3, 4, 24, 27]),
    family=st.sampled_from(FAMILIES),
)
def test_rows_of_an_image_that_keeps_everything_are_upstreams(*, width, height, patches, family):
    size, side = (height, width), patches * PATCH
    grid = get_anyres_image_grid_shape(size, [list(p) for p in pinpoints(family, side)], side)
    tiles = math.prod(grid)
    # Every number is the token's own: a place that is wrong can't hide.
    features = torch.arange((1 + tiles) * patches**2, dtype=torch.float32)
    features = features.reshape(1 + tiles, patches**2, 1).repeat(1, 1, 2)
    newline = torch.tensor([-1.0, -2.0])
    expected = packed(family, patches, size, features, newline).numpy()
    result = arrange_rows(
        features[1:].numpy(),
        np.tile(np.arange(patches**2), (tiles, 1)),
        grid,
        newline.numpy(),
        size,
        patches=(patches, patches),
        cls_token=False,
    )
    assert np.array_equal(np.concatenate([features[0].numpy(), result]), expected)


@settings(max_examples=80, deadline=None)
@example(width=1200, height=1200, patches=27, most=9)
@example(width=2500, height=500, patches=27, most=9)
@given(
    width=st.integers(1, 2500),
    height=st.integers(1, 2500),
    patches=st.sampled_from([3, 4, 27]),
    most=st.sampled_from([1, 2, 4, 9]),
)
def test_a_picture_that_the_model_shrinks_has_as_many_rows(*, width, height, patches, most):
    assume(max(width, height) <= 6 * min(width, height))  # of a line upstream leaves no column
    size, side = (height, width), patches * PATCH
    grid = get_anyres_image_grid_shape(size, [list(p) for p in pinpoints("onevision", side)], side)
    tiles = math.prod(grid)
    # Every number is the row that the token stands in, of the whole grid; a newline is -1.
    rows = torch.arange(grid[0] * patches, dtype=torch.float32)
    features = rows.reshape(grid[0], 1, patches, 1).expand(-1, grid[1], -1, patches)
    features = torch.cat([torch.zeros(1, patches**2, 1), features.reshape(tiles, patches**2, 1)])
    newline = torch.tensor([-1.0])
    expected = packed("onevision", patches, size, features, newline, most=most)[patches**2 :, 0]
    result = arrange_rows(
        features[1:].numpy(),
        np.tile(np.arange(patches**2), (tiles, 1)),
        grid,
        newline.numpy(),
        size,
        patches=(patches, patches),
        cls_token=False,
        max_tiles=most,
    )[:, 0]

    def lines(values):
        ends = np.flatnonzero(np.asarray(values) == -1)
        return [np.asarray(part)[:-1] for part in np.split(np.asarray(values), ends + 1)[:-1]]

    ours, theirs = lines(result), lines(expected.numpy())
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        # The model's row is a mean of neighbours; the patches of ours are those around it.
        assert len(one) >= len(other) > 0
        assert one.min() - 1 <= other.mean() <= one.max() + 1
