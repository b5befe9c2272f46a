"""A baseline that looks at nothing: kept patches are spread evenly over the raster.

The rest is merged as in VisionZip, so a comparison shows what the choice of patches is worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vzip.export.algorithm.rules import ScoredSelection, Signals
from vzip.export.algorithm.selections import register

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@register("uniform")
class Uniform(ScoredSelection):
    """Every n-th patch, in raster order."""

    def scores(self, signals: Signals, kept: int) -> Tensor:
        """Return 1 for the patches that are kept, else 0, whatever the image."""
        from vzip.export.algorithm.visionzip import fixed_scores

        return fixed_scores(middles(signals.patches, kept), signals.keys)


def middles(patches: int, kept: int) -> NDArray[np.float64]:
    """Return [N]: 1 for the middle of each of `kept` equal stretches of the raster, else 0."""
    scores = np.zeros(patches)
    scores[(2 * np.arange(kept) + 1) * patches // (2 * max(1, kept))] = 1.0
    return scores
