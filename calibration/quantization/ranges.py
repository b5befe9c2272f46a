"""The range to quantise a linear layer's input with, by how often each magnitude occurs.

A second pass over the samples counts magnitudes into bins that reach up to the largest, which the
first has seen. Nothing grows with the number of samples.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.calibration.quantization.recipe import PERCENTILE, Method, QuantPrecision

Array = NDArray[Any]

BINS = 2048
"""Bins between zero and the largest magnitude."""

_ENTROPY_BINS = 512  # onnxruntime's search takes a time that grows with the square of them
_CANDIDATES = 128  # thresholds that `mse` compares


class Histograms:
    """How often each magnitude occurs.

    Args:
        limits: Value's name → its largest magnitude.
        divisors: Value's name → float32 [channels] that it is divided by first.
    """

    def __init__(
        self, limits: Mapping[str, float], divisors: Mapping[str, NDArray[np.float32]]
    ) -> None:
        self.limits = limits
        self._divisors = divisors
        self.counts = {name: np.zeros(BINS, np.int64) for name in limits}

    def see(self, name: str, values: Array) -> None:
        """Take in a batch [..., channels]."""
        magnitudes = np.abs(values.astype(np.float32, copy=False))
        if (divisor := self._divisors.get(name)) is not None:
            magnitudes = magnitudes / divisor
        magnitudes = magnitudes * np.float32(BINS / max(self.limits[name], 1e-30))
        places = np.minimum(magnitudes.astype(np.int32), BINS - 1)
        self.counts[name] += np.bincount(places.ravel(), minlength=BINS)


def thresholds(
    histograms: Histograms, method: Method, precision: QuantPrecision
) -> dict[str, float]:
    """Return the magnitude at which each value is clipped, by a method other than `minmax`."""
    if method == "mse":
        levels = int8_grid if precision == "int8" else fp8_grid
        return {
            name: _least_error(counts, histograms.limits[name], levels)
            for name, counts in histograms.counts.items()
        }
    return _by_onnxruntime(histograms, method)


def int8_grid(values: Array, threshold: Array) -> Array:
    """Return what symmetric INT8 makes of values ≥ 0, clipped at a threshold."""
    scale = threshold / 127
    rounded: Array = np.minimum(np.rint(values / scale), 127) * scale
    return rounded


def fp8_grid(values: Array, threshold: Array) -> Array:
    """Return what FP8 E4M3 makes of values ≥ 0, clipped at a threshold."""
    import ml_dtypes

    scale = threshold / 448
    clipped = np.minimum(values / scale, 448).astype(np.float32)
    rounded: Array = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return rounded


def _least_error(counts: Array, limit: float, grid: Callable[[Array, Array], Array]) -> float:
    """Return the threshold with the least squared error over a histogram."""
    centres = (np.arange(BINS) + 0.5) * (limit / BINS)
    candidates = limit * np.linspace(1 / _CANDIDATES, 1, _CANDIDATES)[:, None]
    errors = ((grid(centres, candidates) - centres) ** 2 * counts).sum(axis=1)
    return float(candidates[int(np.argmin(errors)), 0])


def _by_onnxruntime(histograms: Histograms, method: Method) -> dict[str, float]:
    """Let onnxruntime's calibrator choose from the histograms; it would hold all activations."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    entropy = method == "entropy"
    collector = HistogramCollector(
        method=method,
        symmetric=True,
        num_bins=BINS,
        num_quantized_bins=255,  # of symmetric INT8
        percentile=PERCENTILE,
        scenario="same",
    )
    for name, counts in histograms.counts.items():
        limit = np.float32(histograms.limits[name])
        if entropy:  # it wants both signs
            half = counts.reshape(_ENTROPY_BINS, -1).sum(axis=1)
            both = np.concatenate([half[::-1], half])
            edges = np.linspace(-limit, limit, 2 * _ENTROPY_BINS + 1, dtype=np.float32)
            collector.histogram_dict[name] = (both, edges, -limit, limit, limit)
        else:
            edges = np.linspace(0, limit, BINS + 1, dtype=np.float32)
            collector.histogram_dict[name] = (counts, edges, -limit, limit)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        chosen = collector.compute_collection_result()
    return {name: float(max(abs(low), abs(high))) for name, (low, high, *_) in chosen.items()}
