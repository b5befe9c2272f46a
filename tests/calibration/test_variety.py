"""Images that can't tell anything are named, by what they show themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from vzip.calibration.samples import Samples, images_of
from vzip.calibration.variety import ADVISED, check_variety
from vzip.export.pictures import reference_images
from vzip.export.pictures.glance import Glance
from vzip.runtime.cli.main import main
from vzip.runtime.errors import InvalidInputError

Folder = Callable[..., Path]


def photograph(number: int, side: int = 96) -> Image.Image:
    """A picture that is like a photograph: colours that change slowly, and edges."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (value, value // 2, value))


def warnings_of(folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    check_variety(*Samples.open(str(folder), count=None).split(), said.append, **options)
    return said


@pytest.fixture
def write(tmp_path: Path) -> Folder:
    def make(*pictures: Image.Image, suffix: str = ".png", **options: Any) -> Path:
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / f"{number}{suffix}", **options)
        return tmp_path

    return make


def test_pictures_that_differ_are_fine(write: Folder) -> None:
    folder = write(*[photograph(n) for n in range(ADVISED)])
    assert warnings_of(folder) == []


def test_noise_is_neither_flat_nor_alike(write: Folder) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (336, 336, 3), dtype=np.uint8) for _ in range(4)]
    assert warnings_of(write(*map(Image.fromarray, noise)), advised=2) == []


def test_flat_and_dark_pictures_by_their_spread() -> None:
    rng = np.random.default_rng(0)
    black = np.zeros((90, 120, 3), np.uint8)
    speck = black.copy()
    speck[3, 3] = 255
    grain = (black + 20 + rng.integers(0, 3, black.shape)).astype(np.uint8)
    for picture in (black, speck, grain, black + 255):
        assert Glance.of(picture).flat
    night = black.copy()
    night[20:40, 30:60] = (30, 30, 60)  # a window
    ramp = np.broadcast_to(np.linspace(0, 20, 120, dtype=np.uint8)[None, :, None], black.shape)
    for picture in (night, np.ascontiguousarray(ramp), *reference_images()):
        shown = Image.open(picture) if isinstance(picture, Path) else Image.fromarray(picture)
        assert not Glance.of(shown.convert("RGB")).flat


@pytest.mark.parametrize("count", [2, 6])
def test_flat_pictures_alone_are_refused(write: Folder, count: int) -> None:
    folder = write(*[flat(20 * n) for n in range(count)])
    with refused(InvalidInputError, got=(f"all {count} images", str(folder), "one colour")):
        warnings_of(folder)


def test_one_picture_again_and_again_is_refused(write: Folder, tmp_path: Path) -> None:
    big = photograph(3, 320)
    for number, quality in enumerate((95, 80, 70)):
        big.save(tmp_path / f"{number}.jpg", quality=quality)
    big.resize((300, 300)).save(tmp_path / "small.png")
    with refused(InvalidInputError, got=("all 4 images", "the same picture")):
        warnings_of(tmp_path)


def test_some_flat_ones_are_counted_and_one_is_named(write: Folder) -> None:
    folder = write(*[photograph(n) for n in range(8)], flat(0), flat(100))
    (line,) = warnings_of(folder, advised=2)
    assert "2 of 10 images are flat" in line
    assert "8.png" in line or "9.png" in line


def test_a_verdict_on_flat_pictures_alone_says_nothing() -> None:
    pictures = [photograph(n) for n in range(4)]

    class Some(Samples):
        def __init__(self, *images: Any) -> None:
            super().__init__(images, source="x", seed=0)

    class Each:
        def __init__(self, picture: Image.Image) -> None:
            self.name, self.glance = "one", Glance.of(picture)

    said: list[str] = []
    check_variety(Some(*map(Each, pictures)), Some(Each(flat(0))), said.append, advised=2)
    assert "1 of 5 images is flat" in said[0]
    assert "0 of 4 to calibrate on and 1 of 1 to judge by" in said[0]
    assert "the agreement is that of flat images alone" in said[1]
    said.clear()
    check_variety(Some(Each(flat(0))), Some(*map(Each, pictures)), said.append, advised=2)
    assert "ranges are chosen by flat images alone" in said[1]
    # Those judged by are those calibrated on, in another file.
    said.clear()
    check_variety(Some(*map(Each, pictures)), Some(Each(pictures[1])), said.append, advised=2)
    assert "1 of 5 images show nearly the same" in said[0]
    assert "every image to judge by" in said[1]


def test_two_photographs_are_few_and_the_numbers_are_said(
    tiny_bundle: Path, write: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(photograph(0), photograph(1))
    (line,) = warnings_of(folder)
    for said in ("1 image to calibrate on and 1 to judge by", str(ADVISED), "80"):
        assert said in line
    # The command says so before it begins.
    arguments = ["calibrate", str(tiny_bundle), "--images", str(folder), "--precision", "int8"]
    main(arguments)
    assert line in capsys.readouterr().err.splitlines()


def test_calibrate_refuses_black_pictures_before_any_work(
    tiny_bundle: Path, write: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(*[flat(n) for n in range(5)])
    assert (
        main(["calibrate", str(tiny_bundle), "--images", str(folder), "--precision", "int8"]) == 2
    )
    said = capsys.readouterr().err
    assert "all 5 images" in said
    assert "calibrating on" not in said


def test_other_commands_warn_of_flat_pictures(write: Folder) -> None:
    folder, said = write(flat(9), photograph(1), flat(90)), list[str]()
    images_of(str(folder), model="x", count=None, say=said.append)
    assert "2 of 3 images are flat" in said[0]
