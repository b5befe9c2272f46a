"""How far two runs of a bundle's graph agree: which tokens are kept, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.manifest import EMBEDS, KEPT, Manifest

Array = NDArray[Any]


@dataclass(frozen=True)
class Agreement:
    """Over some images.

    Attributes:
        images: How many.
        mean_overlap: Mean share of the kept tokens that both keep.
        min_overlap: Of any image.
        mean_cosine: Of all tokens that can be compared: those that both keep, and merged ones that
            formed around the same tower token in both.
        min_cosine: Of any of these.
        kept_cosine: Mean of those that both keep.
        merged_cosine: Mean of the merged ones; null if none can be compared.
        merged_compared: How many merged ones these are.
    """

    images: int
    mean_overlap: float
    min_overlap: float
    mean_cosine: float
    min_cosine: float
    kept_cosine: float
    merged_cosine: float | None
    merged_compared: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


Outputs = Mapping[str, Array]


def compare(expected: Iterable[Outputs], got: Iterable[Outputs], manifest: Manifest) -> Agreement:
    """Compare outputs, image by image.

    Args:
        expected: Batches of the graph's outputs: ``image_embeds`` [b, K, L] and ``kept_indices``
            [b, dominant].
        got: Batches of another graph's, of the same images.
        manifest: Of the bundle.

    Returns:
        The numbers. A value that isn't finite has a cosine of −1.
    """
    overlaps: list[float] = []
    kept: list[Array] = []
    merged: list[Array] = []
    dominant = manifest.selection.dominant
    for there, here in zip(expected, got, strict=True):
        for image in range(len(there[KEPT])):
            right, chosen = there[KEPT][image], here[KEPT][image]
            old = there[EMBEDS][image].astype(np.float64)
            new = here[EMBEDS][image].astype(np.float64)
            _, a, b = np.intersect1d(right, chosen, return_indices=True)
            overlaps.append(len(a) / dominant)
            kept.append(_cosines(old[a], new[b]))
            _, a, b = np.intersect1d(
                _targets(right, manifest), _targets(chosen, manifest), return_indices=True
            )
            merged.append(_cosines(old[dominant + a], new[dominant + b]))
    kept_cosines, merged_cosines = np.concatenate(kept), np.concatenate(merged)
    every = np.concatenate([kept_cosines, merged_cosines])
    return Agreement(
        images=len(overlaps),
        mean_overlap=float(np.mean(overlaps)),
        min_overlap=float(np.min(overlaps)),
        mean_cosine=float(every.mean()) if len(every) else -1.0,
        min_cosine=float(every.min(initial=1.0)) if len(every) else -1.0,
        kept_cosine=float(kept_cosines.mean()) if len(kept_cosines) else -1.0,
        merged_cosine=float(merged_cosines.mean()) if len(merged_cosines) else None,
        merged_compared=len(merged_cosines),
    )


def _targets(kept: Array, manifest: Manifest) -> Array:
    """Return the tower token that each merged one forms around: every step-th of the rest."""
    selection, tower = manifest.selection, manifest.tower
    rest = np.ones(tower.tokens, bool)
    rest[kept] = False
    if tower.cls_token and not selection.cls_token:
        rest[0] = False
    places = np.flatnonzero(rest)
    step = max(1, len(places) // selection.contextual)
    return places[np.arange(selection.contextual) * step]


def _cosines(one: Array, other: Array) -> NDArray[np.float64]:
    """Return the cosine of each row [n, L] with its counterpart."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(invalid="ignore"):
        cosines = np.sum(one * other, axis=1) / np.maximum(lengths, 1e-300)
    return np.where(np.isfinite(cosines), cosines, -1.0)
