"""VisionZip: the patches that CLS looks at (or, without CLS, that all tokens look at) are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vzip.export.algorithm.rules import ScoredSelection, Signals
from vzip.export.algorithm.selections import register

if TYPE_CHECKING:
    from torch import Tensor


@register("visionzip")
class VisionZip(ScoredSelection):
    """The default; the algorithm is in `vzip.export.algorithm.visionzip`."""

    uses_attention = True

    def scores(self, signals: Signals, kept: int) -> Tensor:  # noqa: ARG002 - the base's
        """Return the attention scores as they are."""
        return signals.attention_scores()
