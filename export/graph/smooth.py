"""SmoothQuant: difficulty moved from activations to weights, folded into the LayerNorm before them.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", arXiv 2211.10438, equation 4. Here the factors are rounded to powers of two: the
folded graph then computes the same floating-point numbers as the one before, bit for bit, and an
outlier is still within a factor of √2 of where the formula puts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def factors(activations: Array, weights: Sequence[Array], alpha: float) -> NDArray[np.float32]:
    """Return what each input channel of some linear layers is to be divided by.

    Args:
        activations: [in], the largest magnitude of each channel over all samples.
        weights: Of the layers that share the input, each [in, out].
        alpha: Share of the difficulty that goes to the weights, above 0 and below 1.

    Returns:
        float32 [in], powers of two with a geometric mean near 1; 1 for channels that are always
        zero on either side.
    """
    largest = np.max([np.abs(each).max(axis=1) for each in weights], axis=0).astype(np.float64)
    x = activations.astype(np.float64)
    used = (x > 0) & (largest > 0)
    logs = np.zeros(len(x))
    logs[used] = alpha * np.log2(x[used]) - (1 - alpha) * np.log2(largest[used])
    if used.any():
        logs[used] -= logs[used].mean()
    return np.exp2(np.rint(logs)).astype(np.float32)


def exactly(
    factors: NDArray[np.float32], gamma: Array, beta: Array, weights: Sequence[Array]
) -> NDArray[np.float32]:
    """Return the factors, 1 where the graph's dtype can't hold the results without rounding.

    In FP16 a beta of 1e-4 has no room for a division by 8.

    Args:
        factors: float32 [in], powers of two.
        gamma: [in], the norm's weight, to be divided.
        beta: [in], its bias, to be divided.
        weights: Of the layers that share the input, each [in, out], to be multiplied.
    """
    powers = factors.astype(gamma.dtype)
    exact = np.ones(len(factors), bool)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # that is what's asked
        for values in (gamma, beta):
            exact &= values / powers * powers == values
        for values in weights:
            exact &= (values * powers[:, None] / powers[:, None] == values).all(axis=1)
    return np.where(exact, factors, np.float32(1))
