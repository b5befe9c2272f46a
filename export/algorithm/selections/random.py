"""A baseline that looks at nothing: kept patches are drawn at random, once for all images.

A graph holds no randomness that TensorRT and ONNX Runtime would agree on, so the draw is made from
a fixed seed and the set is the same for every image. The rest is merged as in VisionZip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vzip.export.algorithm.selections import Signals, register
from vzip.export.algorithm.visionzip import Plan, fixed_scores, make_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.export.algorithm.budget import Budget

SEED = 0


@register("random")
class Random:
    """Patches in the order of a fixed permutation."""

    uses_attention = False

    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """Keep the first patches of the permutation, whatever the image."""
        patches = signals.keys.shape[2] - int(signals.cls_token)
        scores = fixed_scores(_scores(patches), signals.keys)
        return make_plan(scores, signals.keys, budget)

    def ranking(
        self,
        attention_scores: NDArray[np.float64],
        kept: int,  # noqa: ARG002 - the Protocol's
    ) -> NDArray[np.float64]:
        """Return the same scores for every image."""
        count, patches = attention_scores.shape
        return np.repeat(_scores(patches)[None], count, axis=0)


def _scores(patches: int) -> NDArray[np.float64]:
    """Return [N]: a permutation of 0 … N − 1, exact in FP32."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    return generator.permutation(patches).astype(np.float64)
