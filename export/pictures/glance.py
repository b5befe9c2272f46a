"""What a picture looks like, as far as it says whether the picture can tell anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FLAT: Final = 3.0
"""Standard deviation of a picture's values, of 255, below which it shows one colour all over."""

_ALIKE = 2.0  # mean difference of two pictures' cells, of 255, up to which they show the same
_ALIKE_POINTS = 12.0  # and of single points: noise has equal cells and other points
_CELLS, _POINTS = 8, 24  # along one edge
_LOOKED_AT = 256  # pixels along one edge, for the spread


@dataclass(frozen=True, eq=False)
class Glance:
    """What is looked at of one picture.

    Attributes:
        spread: Largest standard deviation of a colour's values over the picture, of 255.
        cells: int16 [8, 8, 3], means of as many parts of it.
        points: int16 [24, 24, 3], single pixels of it.
    """

    spread: float
    cells: NDArray[np.int16]
    points: NDArray[np.int16]

    @classmethod
    def of(cls, picture: Image.Image | NDArray[np.uint8]) -> Glance:
        """Look at a picture, RGB."""
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        every = np.asarray(image)
        steps = [max(1, edge // _LOOKED_AT) for edge in every.shape[:2]]
        spread = every[:: steps[0], :: steps[1]].reshape(-1, every.shape[-1]).std(axis=0).max()
        cells = image.resize((_CELLS, _CELLS), Image.Resampling.BOX)
        points = image.resize((_POINTS, _POINTS), Image.Resampling.NEAREST)
        return cls(
            float(spread), np.asarray(cells).astype(np.int16), np.asarray(points).astype(np.int16)
        )

    @property
    def flat(self) -> bool:
        """Whether the picture shows one colour all over."""
        return self.spread < FLAT

    def like(self, others: Sequence[Glance]) -> int | None:
        """Return the place of the first that shows the same; None if none does."""
        if not others:
            return None
        cells = np.stack([other.cells for other in others])
        near = np.flatnonzero(np.abs(cells - self.cells).mean(axis=(1, 2, 3)) <= _ALIKE)
        for place in map(int, near):
            if np.abs(others[place].points - self.points).mean() <= _ALIKE_POINTS:
                return place
        return None
