"""Preprocessing against the plain way to write it, and its refusals.

`tests/parity/test_preprocess_parity.py` compares it with transformers, byte for byte.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.codec import MisfitError, read, write
from vzip.runtime.pictures import preprocess, resize
from vzip.runtime.pictures.preprocess import (
    MAX_SQUARE_SIDE,
    Preprocessing,
    pixel_values,
    tower_image,
)

FIELDS: dict[str, Any] = {
    "image_size": 56,
    "mode": "resize_crop",
    "shortest_edge": 56,
    "resample": "bicubic",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "rescale_factor": 1 / 255,
}


def preprocessing(**changes: Any) -> Preprocessing:
    return Preprocessing(**(FIELDS | changes))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def plain_tower_image(image: Image.Image, prep: Preprocessing) -> np.ndarray[Any, Any]:
    """Make the whole square, resize it in one call, pad, crop: nothing clever."""
    array = np.asarray(image)
    height, width = array.shape[:2]
    if prep.mode == "stretch":
        return np.asarray(image.resize((prep.image_size,) * 2, Image.Resampling.BICUBIC))
    if prep.mode == "pad_square":
        side = max(height, width)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(255 * x) for x in prep.mean]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = array
        array, height, width = square, side, side
    long = int(prep.shortest_edge * max(height, width) / min(height, width))
    size = (prep.shortest_edge, long) if width <= height else (long, prep.shortest_edge)
    array = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))
    for axis in (0, 1):
        missing = max(0, prep.image_size - array.shape[axis])
        before = math.ceil(missing / 2)
        pads = [(0, 0)] * 3
        pads[axis] = (before, missing - before)
        array = np.pad(array, pads)
        start = (array.shape[axis] - prep.image_size) // 2
        array = np.take(array, range(start, start + prep.image_size), axis)
    return array


SIZES = [(1, 1), (56, 56), (1, 40), (40, 1), (90, 61), (61, 90), (30, 11), (55, 57), (3, 2500)]


@pytest.mark.parametrize("mode", ["resize_crop", "pad_square"])
@pytest.mark.parametrize(("shortest_edge", "image_size"), [(56, 56), (64, 56), (40, 57), (57, 40)])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_plain_way(
    size: tuple[int, int], shortest_edge: int, image_size: int, mode: str
) -> None:
    prep = preprocessing(mode=mode, shortest_edge=shortest_edge, image_size=image_size)
    result = tower_image(noise(*size), prep)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert np.array_equal(result, plain_tower_image(noise(*size), prep))


@pytest.mark.parametrize("size", [*SIZES, (10, 10000)])  # nothing grows beyond the square
def test_stretching_equals_the_plain_way(size: tuple[int, int]) -> None:
    prep = preprocessing(mode="stretch")
    result = tower_image(noise(*size), prep)
    assert result.shape == (56, 56, 3)
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert np.array_equal(result, plain_tower_image(noise(*size), prep))


def test_stretching_crops_and_pads_nothing() -> None:
    striped = Image.new("RGB", (300, 40), "red")
    striped.paste("blue", (0, 0, 20, 40))
    striped.paste("lime", (280, 0, 300, 40))
    seen = tower_image(striped, preprocessing(mode="stretch"))
    assert (seen[:, 0] == (0, 0, 255)).all()
    assert (seen[:, -1] == (0, 255, 0)).all()
    assert (seen[:, 28] == (255, 0, 0)).all()


def test_stretching_knows_no_other_edge_than_the_towers() -> None:
    with refused(MisfitError, got="'shortest_edge' is 64", expected="image_size 56"):
        preprocessing(mode="stretch", shortest_edge=64)


@pytest.mark.parametrize("size", [(7, 300), (300, 7)])
@pytest.mark.parametrize("pixels", [1, 1000, 10**6])
@pytest.mark.parametrize("mode", ["resize_crop", "pad_square", "stretch"])
def test_strips_of_any_height(
    size: tuple[int, int], pixels: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resize, "_STRIP_PIXELS", pixels)
    prep = preprocessing(mode=mode)
    assert np.array_equal(tower_image(noise(*size), prep), plain_tower_image(noise(*size), prep))


def test_padding_has_the_mean_colour() -> None:
    prep = preprocessing(mode="pad_square")
    wide = tower_image(Image.new("RGB", (112, 56), "white"), prep)
    assert (wide[:10] == (122, 116, 104)).all()
    assert (wide[20:36] == 255).all()
    tall = tower_image(Image.new("RGB", (56, 112), "white"), prep)
    assert np.array_equal(tall, wide.transpose(1, 0, 2))


def test_the_image_is_left_alone() -> None:
    for mode in ("resize_crop", "pad_square", "stretch"):
        image = noise(56, 56)
        before = np.asarray(image).copy()
        result = tower_image(image, preprocessing(mode=mode))
        result[:] = 0
        assert np.array_equal(np.asarray(image), before)


def test_pixel_values_are_the_processors_arithmetic() -> None:
    prep = preprocessing(image_size=16)
    images = np.arange(3 * 16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(3, 16, 16, 3)
    rescaled = (images.astype(np.float64) * prep.rescale_factor).astype(np.float32)
    expected = (rescaled - np.float32(prep.mean)) / np.float32(prep.std)
    result = pixel_values(images, prep)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert np.array_equal(result, expected.transpose(0, 3, 1, 2))
    assert pixel_values(images[:0], prep).shape == (0, 3, 16, 16)
    assert np.array_equal(pixel_values(images[::-1], prep), result[::-1])


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (np.zeros((1, 56, 56, 3), np.float32), "float32 and shape [1, 56, 56, 3]"),
        (np.zeros((56, 56, 3), np.uint8), "uint8 and shape [56, 56, 3]"),
        (np.zeros((1, 3, 56, 56), np.uint8), "uint8 and shape [1, 3, 56, 56]"),
        (np.zeros((1, 55, 56, 3), np.uint8), "uint8 and shape [1, 55, 56, 3]"),
    ],
)
def test_pixel_values_of_other_arrays(images: np.ndarray[Any, Any], got: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        pixel_values(images, preprocessing())
    assert got in str(caught.value)
    assert "expected uint8 [B, 56, 56, 3]" in str(caught.value)


def test_other_modes_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="mode RGBA, expected RGB; load it with"):
        tower_image(Image.new("RGBA", (5, 5)), preprocessing())


def test_empty_images_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="0×5 pixels, expected at least 1×1"):
        tower_image(Image.new("RGB", (0, 5)), preprocessing())


@pytest.mark.parametrize("size", [(10, 10000), (10000, 10)])
def test_long_and_thin_images_are_refused_before_they_grow(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kwargs: pytest.fail("it grew"))
    prep = preprocessing(image_size=336, shortest_edge=336)
    with pytest.raises(InvalidInputError) as caught:
        tower_image(Image.new("RGB", size), prep)
    message = str(caught.value)
    assert f"got an image of {size[0]}×{size[1]} pixels, which grows to 336×336000" in message
    assert "expected at most 67108864 pixels" in message
    assert "\n" not in message


def test_the_cap_on_growth_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_RESIZED_PIXELS", 56 * 560)
    assert tower_image(Image.new("RGB", (2, 20)), preprocessing()).shape == (56, 56, 3)
    monkeypatch.setattr(preprocess, "MAX_RESIZED_PIXELS", 56 * 560 - 1)
    with pytest.raises(InvalidInputError, match="which grows to 56×560"):
        tower_image(Image.new("RGB", (2, 20)), preprocessing())


@pytest.mark.parametrize("size", [(1, MAX_SQUARE_SIDE + 1), (MAX_SQUARE_SIDE + 1, 1)])
def test_squares_that_are_too_large_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"expected edges of at most {MAX_SQUARE_SIDE}"):
        tower_image(Image.new("RGB", size), preprocessing(mode="pad_square"))


def test_padding_a_long_image_stays_small_in_memory() -> None:
    # The square would be 12000 × 12000, 576 MB.
    code = """
import resource
from PIL import Image
from vzip.runtime.pictures.preprocess import Preprocessing, tower_image
prep = Preprocessing(56, "pad_square", 56, "bicubic", (0.5,) * 3, (0.5,) * 3, 1 / 255)
tower_image(Image.new("RGB", (8, 9)), prep)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tower_image(Image.new("RGB", (12, 12000)), prep)
tower_image(Image.new("RGB", (12000, 12)), prep)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000  # KiB


# ---- the description -----------------------------------------------------------------------------


def test_json_round_trip_is_exact() -> None:
    for mode in ("resize_crop", "pad_square", "stretch"):
        prep = preprocessing(mode=mode, mean=(1 / 3, 0.1, 2 / 7), rescale_factor=0.1 + 0.2)
        data = json.loads(json.dumps(write(prep)))
        assert list(data) == list(FIELDS)
        assert read(Preprocessing, data) == prep
        assert hash(read(Preprocessing, data)) == hash(prep)


def test_json_numbers_may_be_integers() -> None:
    data = FIELDS | {"mean": [0, 1, 0], "std": [1, 1, 1], "rescale_factor": 1}
    prep = read(Preprocessing, data)
    assert prep.mean == (0.0, 1.0, 0.0)
    assert all(type(x) is float for x in (*prep.mean, *prep.std, prep.rescale_factor))


@pytest.mark.parametrize(
    ("name", "value", "place", "expected"),
    [
        ("image_size", 0, "image_size", "an integer from 1 to 4096"),
        ("image_size", 4097, "image_size", "an integer from 1 to 4096"),
        ("image_size", 336.0, "image_size", "an integer from 1 to 4096"),
        ("image_size", True, "image_size", "an integer from 1 to 4096"),
        ("image_size", "336", "image_size", "an integer from 1 to 4096"),
        ("shortest_edge", -1, "shortest_edge", "an integer from 1 to 4096"),
        ("shortest_edge", None, "shortest_edge", "an integer from 1 to 4096"),
        ("mode", "anyres", "mode", "'resize_crop', 'pad_square', 'stretch'"),
        ("mode", [], "mode", "'resize_crop', 'pad_square', 'stretch'"),
        ("mode", "stretch", "shortest_edge", "image_size 48"),
        ("resample", "bilinear", "resample", "'bicubic'"),
        ("resample", 3, "resample", "'bicubic'"),
        ("mean", [0.5, 0.5], "mean", "a list of 3"),
        ("mean", 0.5, "mean", "a list of 3"),
        ("mean", [0.5, 0.5, 1.5], "mean[2]", "a number from 0 to 1"),
        ("mean", [0.5, 0.5, -0.1], "mean[2]", "a number from 0 to 1"),
        ("mean", [0.5, 0.5, "0.5"], "mean[2]", "a number from 0 to 1"),
        ("mean", [0.5, 0.5, True], "mean[2]", "a number from 0 to 1"),
        ("mean", [0.5, 0.5, math.nan], "mean[2]", "a number from 0 to 1"),
        ("std", [0.5, 0.5, 0.0], "std[2]", "a positive number"),
        ("std", [0.5, 0.5, math.inf], "std[2]", "a positive number"),
        ("std", [0.5, 0.5, 10**400], "std[2]", "a positive number"),
        ("std", {"r": 1}, "std", "a list of 3"),
        ("rescale_factor", 0, "rescale_factor", "a positive number"),
        ("rescale_factor", math.nan, "rescale_factor", "a positive number"),
        ("rescale_factor", "1/255", "rescale_factor", "a positive number"),
        ("rescale_factor", True, "rescale_factor", "a positive number"),
    ],
)
def test_impossible_values(name: str, value: Any, place: str, expected: str) -> None:
    values = FIELDS | {"image_size": 48} | {name: value}
    with refused(MisfitError, got=f"Preprocessing: '{place}' is ", expected=expected):
        read(Preprocessing, values)
    with refused(MisfitError, got=f"Preprocessing: '{place}' is ", expected=expected):
        Preprocessing(**values)
