"""Agreements with given numbers, for what judges, shows or records them."""

from __future__ import annotations

import numpy as np

from vzip.runtime.agreement import Agreement, Choices, Values


def agreement(
    overlap: float,
    cosine: float,
    *,
    least_overlap: float | None = None,
    least_cosine: float | None = None,
) -> Agreement:
    """Return one of two pictures without merged tokens, with these means and lowest numbers."""

    def two(mean: float, least: float | None) -> np.ndarray:
        low = mean if least is None else least
        return np.array([low, 2 * mean - low])

    nothing = np.zeros(0)
    return Agreement(
        two(overlap, least_overlap),
        Choices(2, nothing),
        Values(two(cosine, least_cosine), np.zeros(2)),
        Values(nothing),
    )
