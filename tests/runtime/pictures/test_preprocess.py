"""Preprocessing against the plain way to write it, and its refusals.

`tests/parity/test_preprocess_parity.py` compares it with transformers, byte for byte.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.refusals import Said, refused
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


LARGE = {"image_size": 336, "shortest_edge": 336}
PAD = {"mode": "pad_square"}
MODES = ("resize_crop", "pad_square", "stretch")
SIZES = [(1, 1), (56, 56), (1, 40), (40, 1), (90, 61), (61, 90), (30, 11), (55, 57), (3, 2500)]


@pytest.mark.parametrize(
    ("mode", "shortest_edge", "image_size"),
    [
        *((m, *s) for m in MODES[:2] for s in ((56, 56), (64, 56), (40, 57), (57, 40))),
        ("stretch", 56, 56),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_plain_way(
    size: tuple[int, int], shortest_edge: int, image_size: int, mode: str
) -> None:
    prep = preprocessing(mode=mode, shortest_edge=shortest_edge, image_size=image_size)
    image = noise(*size)
    result = tower_image(image, prep)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert np.array_equal(result, plain_tower_image(noise(*size), prep))
    result[:] = 0
    assert np.array_equal(np.asarray(image), np.asarray(noise(*size))), "the image is left alone"


def test_stretching_takes_any_length() -> None:  # nothing grows beyond the square
    prep, image = preprocessing(mode="stretch"), noise(10, 10000)
    assert np.array_equal(tower_image(image, prep), plain_tower_image(image, prep))


@pytest.mark.parametrize("size", [(7, 300), (300, 7)])
@pytest.mark.parametrize("pixels", [1, 1000, 10**6])
@pytest.mark.parametrize("mode", MODES)
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
    ("shape", "dtype"),
    [
        ([1, 56, 56, 3], "float32"),
        ([56, 56, 3], "uint8"),
        ([1, 3, 56, 56], "uint8"),
        ([1, 55, 56, 3], "uint8"),
    ],
)
def test_pixel_values_of_other_arrays(shape: list[int], dtype: str) -> None:
    with refused(InvalidInputError, got=(dtype, f"{shape}"), expected="uint8 [B, 56, 56, 3]"):
        pixel_values(np.zeros(shape, dtype), preprocessing())


@pytest.mark.parametrize(
    ("mode", "size", "prep", "said"),
    [
        ("RGBA", (5, 5), {}, {"got": "RGBA", "expected": "RGB", "cure": "load_image"}),
        ("RGB", (0, 5), {}, {"got": "0×5", "expected": "1×1"}),
        ("RGB", (10, 10000), LARGE, {"got": ("10×10000", "336×336000"), "expected": "67108864"}),
        ("RGB", (10000, 10), LARGE, {"got": ("10000×10", "336×336000"), "expected": "67108864"}),
        ("RGB", (1, MAX_SQUARE_SIDE + 1), PAD, {"expected": f"{MAX_SQUARE_SIDE}"}),
        ("RGB", (MAX_SQUARE_SIDE + 1, 1), PAD, {"expected": f"{MAX_SQUARE_SIDE}"}),
    ],
)
def test_images_that_are_refused_before_they_grow(
    mode: str,
    size: tuple[int, int],
    prep: dict[str, Any],
    said: dict[str, Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kwargs: pytest.fail("it grew"))
    with refused(InvalidInputError, **said):
        tower_image(Image.new(mode, size), preprocessing(**prep))


def test_the_cap_on_growth_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_RESIZED_PIXELS", 56 * 560)
    assert tower_image(Image.new("RGB", (2, 20)), preprocessing()).shape == (56, 56, 3)
    monkeypatch.setattr(preprocess, "MAX_RESIZED_PIXELS", 56 * 560 - 1)
    with refused(InvalidInputError, got="56×560"):
        tower_image(Image.new("RGB", (2, 20)), preprocessing())


@pytest.mark.slow
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
    assert all(type(x) is float for x in (*prep.mean, *prep.std, prep.rescale_factor))
    assert prep.mean == (0.0, 1.0, 0.0)


INTEGER, POSITIVE, SHARE = "an integer from 1 to 4096", "a positive number", "a number from 0 to 1"


@pytest.mark.parametrize(
    ("name", "place", "expected", "values"),
    [
        ("image_size", "image_size", INTEGER, [0, 4097, 336.0, True, "336"]),
        ("shortest_edge", "shortest_edge", INTEGER, [-1, None]),
        ("mode", "mode", "'resize_crop', 'pad_square', 'stretch'", ["anyres", []]),
        ("mode", "shortest_edge", "image_size 48", ["stretch"]),
        ("resample", "resample", "'bicubic'", ["mks2013", 3, None]),
        ("mean", "mean", "a list of 3", [[0.5, 0.5], 0.5]),
        ("mean", "mean[2]", SHARE, [[0.5, 0.5, x] for x in (1.5, -0.1, "0.5", True, math.nan)]),
        ("std", "std[2]", POSITIVE, [[0.5, 0.5, x] for x in (0.0, math.inf, 10**400)]),
        ("std", "std", "a list of 3", [{"r": 1}]),
        ("rescale_factor", "rescale_factor", POSITIVE, [0, math.nan, "1/255", True]),
    ],
)
def test_impossible_values(name: str, place: str, expected: str, values: list[Any]) -> None:
    for value in values:
        fields = FIELDS | {"image_size": 48} | {name: value}
        for make in (functools.partial(read, Preprocessing), lambda x: Preprocessing(**x)):
            with refused(MisfitError, got=f"Preprocessing: '{place}' is ", expected=expected):
                make(fields)
