"""Photographs of scikit-image and scikit-learn, read out of their wheels."""

from __future__ import annotations

from pathlib import Path

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
