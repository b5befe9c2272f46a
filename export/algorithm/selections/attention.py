"""VisionZip: the patches that CLS looks at (or, without CLS, that all tokens look at) are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vzip.export.algorithm.selections import Signals, register
from vzip.export.algorithm.visionzip import Plan, make_plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vzip.export.algorithm.budget import Budget


@register("visionzip")
class VisionZip:
    """The default; the algorithm is in `vzip.export.algorithm.visionzip`."""

    uses_attention = True

    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """Keep by attention, merge by key similarity."""
        return make_plan(signals.attention_scores(), signals.keys, budget)

    def ranking(
        self,
        attention_scores: NDArray[np.float64],
        kept: int,  # noqa: ARG002 - the Protocol's
    ) -> NDArray[np.float64]:
        """Return the attention scores as they are."""
        return attention_scores
