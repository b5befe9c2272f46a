"""What was found: two runs' tokens, compared picture by picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.agreement.objective import Objective, picks_of
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, RANK, Manifest

Array = NDArray[Any]
Outputs = Mapping[str, Array]

SCORES: Final = "scores"
"""Beside a graph's outputs: float [b, N], one of each patch, by which the kept ones are chosen."""

FLOOR: Final = "floor"
"""Beside a graph's outputs: float [b, K, 2], what rounding costs each token; see `Values.floor`."""

SIMILARITY: Final = "similarity"
"""Beside a graph's outputs: float [b, N, N], of a greedy selection; see `Objective`."""

WEIGHTS: Final = "weights"
"""Beside a graph's outputs: float [b, N], of one whose picks are to cover; see `Objective`."""

PICTURES: Final = "pictures"
"""Beside a graph's outputs: int [b], which picture each result is of."""

_TINY: Final = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices that were made, and those of them that differ from the reference's.

    Attributes:
        made: How many were made.
        distances: float64, one of each that differs: how far apart the two alternatives' numbers
            are. For kept tokens the score's distance from the last one kept, relative to that; for
            groups the cosine that is lost. Infinity where no number can excuse the choice.
    """

    made: int
    distances: NDArray[np.float64]

    @property
    def share(self) -> float:
        """Share of the choices that are the reference's."""
        return 1.0 - len(self.distances) / max(1, self.made)

    def beyond(self, margin: float) -> int:
        """Return how many differ by more than a margin."""
        return int((~(self.distances <= margin)).sum())

    def within(self, margin: float) -> int:
        """Return how many differ by a margin at most: swaps by rounding."""
        return len(self.distances) - self.beyond(margin)


@dataclass(frozen=True, eq=False)
class Values:
    """What tokens hold, beside the same tokens of the reference.

    Attributes:
        cosines: float64 [n], of each token with the reference's; −1 where a number isn't finite.
        errors: float64 [n], the largest difference of a token's numbers, relative to the largest
            magnitude in all of the reference's tokens of the picture; infinity where one isn't
            finite.
        floor: float64 [n, 2]: the error, and 1 minus the cosine, that rounding alone gives the same
            tokens of the untouched model in the same precision; NaN where nobody measured that.
        places: int64 [n, 2]: picture, and the tower token that it is or formed around; −1 where
            that isn't known.
    """

    cosines: NDArray[np.float64]
    errors: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    floor: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def __post_init__(self) -> None:
        count = len(self.cosines)
        if not len(self.floor):
            object.__setattr__(self, "floor", np.full((count, 2), np.nan))
        if not len(self.places):
            object.__setattr__(self, "places", np.full((count, 2), -1))
        assert len(self.errors) == len(self.floor) == len(self.places) == count

    @classmethod
    def of(
        cls,
        expected: Array,
        got: Array,
        scale: float,
        *,
        floor: Array | None = None,
        places: Array | None = None,
    ) -> Values:
        """Compare tokens [n, L], row by row.

        Args:
            expected: The reference's.
            got: Those to judge.
            scale: The largest magnitude that `errors` are relative to.
            floor: See `floor`; None where nobody measured it.
            places: See `places`; None where they aren't known.
        """
        there, here = expected.astype(np.float64), got.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            lengths = np.linalg.norm(there, axis=1) * np.linalg.norm(here, axis=1)
            cosines = np.sum(there * here, axis=1) / np.maximum(lengths, _TINY)
            errors = np.abs(here - there).max(axis=1, initial=0.0) / max(scale, _TINY)
        return cls(
            np.where(np.isfinite(cosines), cosines, -1.0),
            np.where(np.isfinite(errors), errors, np.inf),
            np.zeros((0, 2)) if floor is None else floor.astype(np.float64),
            np.zeros((0, 2), np.int64) if places is None else places,
        )

    @classmethod
    def of_all(cls, parts: Sequence[Values]) -> Values:
        """Return all tokens of several."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("cosines", "errors", "floor", "places")
            )
        )

    @property
    def error(self) -> float:
        """The largest error; 0 if there is no token."""
        return float(self.errors.max(initial=0.0))

    def quantile(self, share: float) -> float:
        """Return the error that a share of the tokens keep to; 0 if there is none."""
        # Without interpolation, which makes NaN of infinity.
        found = np.quantile(self.errors, share, method="higher") if len(self.errors) else 0.0
        return float(found)

    @property
    def has_floor(self) -> bool:
        """Whether it is known of all of them, at least one, what rounding costs them."""
        return bool(len(self.floor)) and bool(np.isfinite(self.floor).all())

    @property
    def lowest(self) -> float:
        """The lowest cosine; −1 if there is none."""
        return float(self.cosines.min(initial=1.0)) if len(self.cosines) else -1.0

    def lowest_of(self, share: float) -> float:
        """Return the lowest cosine of a share of the tokens, the best ones; −1 if there is none."""
        if not len(self.cosines):
            return -1.0
        return float(np.quantile(self.cosines, 1.0 - share, method="lower"))

    @property
    def mean(self) -> float:
        """The mean cosine; −1 if there is none."""
        return float(self.cosines.mean()) if len(self.cosines) else -1.0


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far some results agree with a reference's.

    Attributes:
        overlaps: float64 [n], for each result the share of its kept tokens that the reference keeps
            too.
        chosen: The kept tokens of all results.
        kept: Tokens that both keep.
        merged: Merged tokens that can be compared.
        grouped: Which target each merged-away token went to; none made where that isn't known.
        finite: Whether all numbers of all tokens are.
        objectives: float64, for each result of a greedy selection the share that its picks reach of
            what the reference's do; none where that isn't known.
        merges: Whether there are merged tokens at all.
    """

    overlaps: NDArray[np.float64]
    chosen: Choices
    kept: Values
    merged: Values
    grouped: Choices = field(default_factory=lambda: Choices(0, np.zeros(0)))
    finite: bool = True
    objectives: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    merges: bool = True

    @classmethod
    def of_all(cls, each: Iterable[Agreement]) -> Agreement:
        """Return the agreement of all results that some agreements are of; at least one."""
        parts = list(each)

        def choices(name: str) -> Choices:
            found = [getattr(part, name) for part in parts]
            return Choices(
                sum(one.made for one in found), np.concatenate([one.distances for one in found])
            )

        def values(name: str) -> Values:
            return Values.of_all([getattr(part, name) for part in parts])

        return cls(
            np.concatenate([part.overlaps for part in parts]),
            choices("chosen"),
            values("kept"),
            values("merged"),
            choices("grouped"),
            all(part.finite for part in parts),
            np.concatenate([part.objectives for part in parts]),
            any(part.merges for part in parts),
        )

    @property
    def every(self) -> Values:
        """All tokens that can be compared."""
        return Values.of_all([self.kept, self.merged])

    @property
    def mean_overlap(self) -> float:
        """Mean share of the kept tokens that the reference keeps too."""
        return float(self.overlaps.mean())

    @property
    def min_overlap(self) -> float:
        """The same of the result where it is lowest."""
        return float(self.overlaps.min())

    def to_json(self) -> dict[str, int | float | None]:
        """Return what `vzip calibrate` records.

        Returns:
            ``images``, ``mean_overlap``, ``min_overlap``; ``mean_cosine`` and ``min_cosine`` of all
            tokens that can be compared; ``kept_cosine`` and ``merged_cosine``, means of those that
            both keep and of the merged ones (None if none can be compared), and
            ``merged_compared``, how many of these there are.
        """
        return {
            "images": len(self.overlaps),
            "mean_overlap": self.mean_overlap,
            "min_overlap": self.min_overlap,
            "mean_cosine": self.every.mean,
            "min_cosine": self.every.lowest,
            "kept_cosine": self.kept.mean,
            "merged_cosine": self.merged.mean if len(self.merged.cosines) else None,
            "merged_compared": len(self.merged.cosines),
        }


def compare(reference: Iterable[Outputs], got: Iterable[Outputs], manifest: Manifest) -> Agreement:
    """Compare the outputs of two runs, picture by picture.

    Args:
        reference: Batches of outputs: ``image_embeds`` [b, K, L], ``kept_indices`` [b, dominant],
            and `SCORES` where they are known, without which no difference counts as rounding;
            `FLOOR` and `PICTURES` likewise; of a greedy selection ``rank`` [b, K] and `SIMILARITY`,
            without which picks are judged as any kept tokens.
        got: Batches of another run's, of the same pictures.
        manifest: Of the bundle.
    """
    return Agreement.of_all(
        _compared(
            {name: array[row] for name, array in there.items()},
            {name: here[name][row] for name in (KEPT, EMBEDS, RANK) if name in here},
            manifest,
        )
        for there, here in zip(reference, got, strict=True)
        for row in range(len(there[KEPT]))
    )


def _compared(reference: Outputs, got: Outputs, manifest: Manifest) -> Agreement:
    """Compare one result: ``image_embeds`` [K, L] and ``kept_indices`` [dominant] of either."""
    right, expected, kept, embeds = reference[KEPT], reference[EMBEDS], got[KEPT], got[EMBEDS]
    dominant = manifest.selection.dominant
    scale = float(np.abs(expected).max())
    objectives = _objectives(reference, got, manifest)
    if len(objectives):
        chosen = picked_choices(right, kept)
    else:
        chosen = kept_choices(right, kept, reference.get(SCORES), manifest)
    both, there, here = np.intersect1d(right, kept, return_indices=True)
    targets, same, mine = np.intersect1d(
        merge_targets(right, manifest), merge_targets(kept, manifest), return_indices=True
    )
    picture, floor = int(reference.get(PICTURES, np.array(-1))), reference.get(FLOOR)

    def values(tokens: Array, rows: Array, mine: Array) -> Values:
        return Values.of(
            expected[rows],
            embeds[mine],
            scale,
            floor=None if floor is None else floor[rows],
            places=np.stack([np.full(len(rows), picture), tokens], axis=1),
        )

    return Agreement(
        np.array([chosen.share]),
        chosen,
        values(both, there, here),
        values(targets, dominant + same, dominant + mine),
        finite=bool(np.isfinite(embeds).all()),
        objectives=objectives,
        merges=manifest.selection.contextual > 0,
    )


def _objectives(reference: Outputs, got: Outputs, manifest: Manifest) -> NDArray[np.float64]:
    """Return the share [1] that the picks of one result reach; [0] where that can't be said."""
    if SIMILARITY not in reference or RANK not in got:  # an encoder of others may tell no steps
        return np.zeros(0)
    first = int(manifest.tower.cls_token)
    objective = Objective(reference[SIMILARITY], reference.get(WEIGHTS))
    picks, right = (picks_of(each[KEPT], each[RANK], first) for each in (got, reference))
    return np.array([objective.share(picks, right)])


def picked_choices(right: Array, kept: Array) -> Choices:
    """Compare which tokens are kept where others may be as good: none that differs is wrong alone.

    Args:
        right: The reference's, int [dominant].
        kept: Those to judge, in any order.
    """
    doubled = len(kept) - len(np.unique(kept))
    others = len(np.setdiff1d(kept, right))
    return Choices(len(right), np.array([0.0] * others + [np.inf] * doubled))


def kept_choices(right: Array, kept: Array, scores: Array | None, manifest: Manifest) -> Choices:
    """Compare which tokens are kept.

    Args:
        right: The reference's, int [dominant].
        kept: Those to judge, in any order.
        scores: Of each patch, float [N]; None where they aren't known.
        manifest: Of the bundle.
    """
    offset = int(manifest.tower.cls_token)
    foreign = np.setdiff1d(kept, right)
    distances = np.full(len(foreign), np.inf)
    patches = right[right >= offset] - offset
    if scores is not None and len(patches):
        wide = scores.astype(np.float64)
        cut = float(wide[patches].min())
        # What is no patch at all is no matter of rounding.
        inside = (foreign >= offset) & (foreign < manifest.tower.tokens)
        away = np.abs(wide[foreign[inside] - offset] - cut)
        with np.errstate(over="ignore"):
            distances[inside] = away / max(abs(cut), _TINY)
    doubled = len(kept) - len(np.unique(kept))  # nor is a duplicate
    return Choices(manifest.selection.dominant, np.append(distances, [np.inf] * doubled))


def merge_targets(kept: Array, manifest: Manifest) -> Array:
    """Return the tower token that each merged token formed around: every step-th of the rest."""
    selection, tower = manifest.selection, manifest.tower
    if not selection.contextual:
        return np.zeros(0, np.int64)
    taken = np.zeros(tower.tokens, bool)
    # What is to be judged may name tokens that don't exist.
    taken[kept[(kept >= 0) & (kept < tower.tokens)]] = True
    taken[0] |= tower.cls_token and not selection.cls_token
    rest = np.flatnonzero(~taken)
    step = max(1, len(rest) // selection.contextual)
    return rest[np.arange(selection.contextual) * step]
