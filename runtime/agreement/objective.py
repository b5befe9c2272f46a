"""What greedy picks reach: by it two runs are judged that pick other patches of equal worth.

The objective is the sum of what each pick gained when it was picked, in their order. With weights a
pick gains its weight times what it adds to how well each patch is covered; without, the distance to
the nearest pick before it, and the first one that to its nearest patch
(`vzip.export.algorithm.rules.Goal`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Objective:
    """How the patches of one picture are related, as the reference sees it.

    Attributes:
        similarity: float [N, N].
        weights: float [N]; None where picks are to be far apart.
    """

    similarity: Array
    weights: Array | None = None

    def reached(self, picks: Array) -> float:
        """Return what picks reach; NaN for what is no selection at all.

        Args:
            picks: int [K], patches in the order in which they were picked. Two that are the same,
                or one that is no patch, are no selection.
        """
        patches = len(self.similarity)
        if len(np.unique(picks)) < len(picks) or picks.min() < 0 or picks.max() >= patches:
            return float("nan")
        rows = self.similarity[picks].astype(np.float64)  # [K, N]
        if self.weights is None:
            return self._spread(picks, rows)
        covered = np.maximum.accumulate(np.maximum(rows, 0.0), axis=0)
        before = np.concatenate([np.zeros((1, patches)), covered[:-1]])
        added = np.maximum(rows - before, 0.0).sum(axis=1)  # [K]
        return float((self.weights[picks].astype(np.float64) * added).sum())

    def share(self, picks: Array, right: Array) -> float:
        """Return what picks reach, as a share of what the reference's reach; 0 for no selection.

        Args:
            picks: As for `reached`.
            right: The reference's, likewise.
        """
        mine, best = self.reached(picks), self.reached(right)
        if mine == best == 0:  # where nothing can be gained, all picks are as good
            return 1.0
        share = mine / best if best else float("nan")
        return share if np.isfinite(share) else 0.0

    def _spread(self, picks: Array, rows: Array) -> float:
        among = rows[:, picks]  # [K, K]
        others = np.delete(rows[0], picks[0])
        nearest = [others.max(initial=-1.0)]
        nearest += [among[place, :place].max() for place in range(1, len(picks))]
        return float(np.maximum(1.0 - np.array(nearest), 0.0).sum())


def picks_of(kept: Array, rank: Array, first_patch: int) -> Array:
    """Return the patches [K] in the order in which they were picked.

    Args:
        kept: int [K], tower tokens.
        rank: int [K], the step of each.
        first_patch: The tower token that is patch 0: 1 behind CLS.
    """
    order: Array = np.argsort(rank, kind="stable")
    return kept[order] - first_patch
