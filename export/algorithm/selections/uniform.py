"""A baseline that looks at nothing: kept patches are spread evenly over the raster.

The rest is merged as in VisionZip, so a comparison shows what the choice of patches is worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vzip.export.algorithm.selections import Signals, register
from vzip.export.algorithm.visionzip import Plan, fixed_scores, make_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.export.algorithm.budget import Budget


@register("uniform")
class Uniform:
    """Every n-th patch, in raster order."""

    uses_attention = False

    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """Keep the same patches of every image."""
        patches = signals.keys.shape[2] - int(signals.cls_token)
        kept = budget.dominant - int(budget.cls_token)
        scores = fixed_scores(_scores(patches, kept), signals.keys)
        return make_plan(scores, signals.keys, budget)

    def ranking(self, attention_scores: NDArray[np.float64], kept: int) -> NDArray[np.float64]:
        """Return the same scores for every image."""
        count, patches = attention_scores.shape
        return np.repeat(_scores(patches, kept)[None], count, axis=0)


def _scores(patches: int, kept: int) -> NDArray[np.float64]:
    """Return [N]: 1 for the middle of each of `kept` equal stretches of the raster, else 0."""
    scores = np.zeros(patches)
    scores[(2 * np.arange(kept) + 1) * patches // (2 * max(1, kept))] = 1.0
    return scores
