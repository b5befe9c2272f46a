"""A baseline that looks at nothing: kept patches are drawn at random, once for all images.

A graph holds no randomness that TensorRT and ONNX Runtime would agree on, so the draw is made from
a fixed seed and the set is the same for every image. The rest is merged as in VisionZip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vzip.export.algorithm.rules import ScoredSelection, Signals
from vzip.export.algorithm.selections import register

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SEED = 0


@register("random")
class Random(ScoredSelection):
    """Patches in the order of a fixed permutation."""

    def scores(self, signals: Signals, kept: int) -> Tensor:  # noqa: ARG002 - the base's
        """Return the permutation, whatever the image."""
        from vzip.export.algorithm.visionzip import fixed_scores

        return fixed_scores(permutation(signals.patches), signals.keys)


def permutation(patches: int) -> NDArray[np.float64]:
    """Return [N]: a permutation of 0 … N − 1, exact in FP32."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    return generator.permutation(patches).astype(np.float64)
