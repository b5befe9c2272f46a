"""The resize on several cores: Pillow's own bits, whatever the strips and threads."""

from __future__ import annotations

import threading
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from vzip.runtime.pictures import resize as module
from vzip.runtime.pictures.resize import on_cores, resize


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("pixels", [1, 999, 2**20])
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((301, 203), (57, 38)),
        ((301, 203), (301, 38)),  # rows stay as they are
        ((301, 203), (57, 203)),  # columns do
        ((301, 203), (301, 203)),
        ((31, 203), (97, 411)),  # enlarged
        ((31, 203), (97, 41)),  # in one direction: Pillow 13 begins with the columns
        ((203, 31), (41, 97)),
        ((203, 301), (200, 295)),  # twice as many rows go as columns
        ((203, 301), (200, 294)),  # more: Pillow 13 begins with the columns
        ((203, 301), (200, 302)),
        ((90, 160), (33, 33)),
        ((1601, 1307), (411, 336)),  # two strips of the real height
        ((1, 997), (3, 5)),
        ((997, 1), (5, 3)),
    ],
)
def test_equals_pillows(
    size: tuple[int, int],
    target: tuple[int, int],
    pixels: int,
    cores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_STRIP_PIXELS", pixels)
    monkeypatch.setattr(module, "cores", lambda: cores)
    image = noise(*size)
    expected = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(resize(image, target)), expected)
    assert np.array_equal(np.asarray(image), np.asarray(noise(*size)))  # left alone


def test_filters_are_pillows_in_the_order_of_their_numbers() -> None:
    numbers = [int(module.pillows(name)) for name in get_args(module.Resample)]
    assert numbers == list(range(6))


@pytest.mark.parametrize("resample", get_args(module.Resample))
def test_any_size_equals_pillows(resample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_PIXELS", 500)
    for width, height, columns, rows in np.random.default_rng(0).integers(1, 130, (200, 4)):
        image = noise(width, height)
        expected = np.asarray(image.resize((columns, rows), module.pillows(resample)))
        got = np.asarray(resize(image, (int(columns), int(rows)), resample))
        assert np.array_equal(got, expected), (width, height, columns, rows)


def test_a_newer_pillow_resizes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_PIXELS", 500)
    strips: list[int] = []
    real = module.resize_rows
    monkeypatch.setattr(module, "resize_rows", lambda *a: (strips.append(1), real(*a))[1])
    for version, known in (("10.1.0", 1), ("12.3.0.dev0", 1), ("13.0.1", 1), ("13.1.0", 0)):
        monkeypatch.setattr(module.PIL, "__version__", version)
        strips.clear()
        resize(noise(60, 50), (12, 10))
        assert len(strips) == known, version


def test_the_pillow_of_the_tests_is_known() -> None:
    got = module._pillow()
    assert got <= module.KNOWN, "run the tests with it as KNOWN; if they pass, it is"


def test_a_large_picture_is_resized_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 2)
    both = threading.Barrier(2, timeout=20)  # passed only by two at a time

    def strip(top: int, bottom: int) -> Image.Image:
        both.wait()
        return Image.new("RGB", (2048, bottom - top), (top // 256, 0, 0))

    rows = module.resize_rows(strip, (2048, 1024), 10)  # two strips of 512 rows
    assert rows.size == (10, 1024)
    assert np.asarray(rows)[:, 0, 0].tolist() == [0] * 512 + [2] * 512


def test_results_are_in_order_and_the_first_error_is_raised() -> None:
    assert on_cores(lambda item: item * item, range(7)) == [0, 1, 4, 9, 16, 25, 36]
    assert on_cores(str, []) == []
    with pytest.raises(ZeroDivisionError):
        on_cores(lambda item: 1 // item, [2, 0, 1])
