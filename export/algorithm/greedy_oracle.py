"""A slow oracle of greedy selection, loop by loop in float64, that shares no code with `greedy.py`.

`vzip check` and the tests compare with it. It is written for clarity alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

TIE = 1e-5


def unit_rows(x: Float, *, centre: bool) -> Float:
    """Return vectors [N, d] at length 1, after their mean was taken off where `centre`."""
    mean = np.zeros(x.shape[1])
    if centre:
        for row in x:
            mean += row
        mean /= len(x)
    made = np.zeros_like(x)
    for place, row in enumerate(x):
        shifted = row - mean
        made[place] = shifted / math.sqrt(max(float(np.sum(shifted * shifted)), 1e-24))
    return made


def similarity(
    x: Float, grid: tuple[int, int], *, centre: bool, place: float = 0.0, radius: float = 1.0
) -> Float:
    """Return the similarity [N, N] of patches: cosines of their vectors, and how near they are.

    Args:
        x: [N, d].
        grid: Rows and columns of the patches.
        centre: Whether cosines are of the vectors minus their mean.
        place: The share that nearness has.
        radius: The distance, in patches, of the nearness' normal curve.
    """
    rows = unit_rows(x, centre=centre)
    made = np.zeros((len(x), len(x)))
    others = np.arange(len(x))
    for one in range(len(x)):
        cosine = np.sum(rows * rows[one], axis=1)
        down = others // grid[1] - one // grid[1]
        right = others % grid[1] - one % grid[1]
        near = np.exp(-(down * down + right * right) / (2 * radius * radius))
        made[one] = (1 - place) * cosine + place * near
    return made


def cover(similar: Float, weights: Float, count: int) -> list[int]:
    """Return the patches picked, in order, so that all are covered well.

    Args:
        similar: [N, N].
        weights: [N].
        count: How many to pick.
    """
    patches = range(len(similar))
    covered = np.zeros(len(similar))
    picked: list[int] = []
    for _ in range(count):
        gains = []
        for patch in patches:
            added = float(np.sum(np.maximum(similar[patch] - covered, 0.0)))
            gains.append(float(weights[patch]) * added - picked.count(patch))
        best = max(gains)
        pick = next(patch for patch in patches if gains[patch] >= best * (1 - TIE))
        picked.append(pick)
        covered = np.maximum(covered, similar[pick])
    return picked


def spread(similar: Float, count: int) -> list[int]:
    """Return the patches picked, in order, so that they are far apart.

    Args:
        similar: [N, N].
        count: How many to pick.
    """
    patches = range(len(similar))
    picked: list[int] = []
    for _ in range(count):
        gains = []
        for patch in patches:
            others = picked or [other for other in patches if other != patch]
            nearest = float(max(similar[patch, others], default=0.0))
            gains.append(max(0.0, 1.0 - nearest) - 4.0 * picked.count(patch))
        best = max(gains)
        picked.append(next(patch for patch in patches if gains[patch] >= best * (1 - TIE)))
    return picked
