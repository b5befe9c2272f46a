"""SmoothQuant moves sizes, not the function: the folded graph gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vzip.calibration.quantization.pieces import PieceSession, array_of, linear_groups, own_graph
from vzip.calibration.quantization.qdq import Smooth
from vzip.calibration.samples import Samples
from vzip.export.graph import smooth
from vzip.runtime.bundle.reader import Bundle

MakeBundle = Callable[[str], Bundle]


def test_factors_are_the_paper_s_within_the_rounding_to_powers_of_two() -> None:
    rng = np.random.default_rng(0)
    activations = np.exp(rng.normal(0, 3, 50)).astype(np.float32)
    weights = [rng.normal(0, 1, (50, 7)).astype(np.float32) for _ in range(3)]
    for alpha in (0.3, 0.5, 0.8):
        got = smooth.factors(activations, weights, alpha)
        assert got.dtype == np.float32
        assert np.array_equal(np.exp2(np.rint(np.log2(got))), got)
        largest = np.abs(np.stack(weights)).max(axis=(0, 2))
        paper = activations**alpha / largest ** (1 - alpha)  # equation 4
        ratio = got / paper
        # Up to one common factor, which quantisation doesn't see, within √2 either way.
        assert ratio.max() / ratio.min() <= 2.0001
        assert abs(np.log2(got).mean()) < 0.5


def test_channels_of_zeros_stay_as_they_are() -> None:
    activations = np.array([0, 8, 2, 64], np.float32)
    weights = [np.array([[1], [0], [1], [1]], np.float32)]
    got = smooth.factors(activations, weights, 0.5)
    assert got[0] == got[1] == 1
    assert got[3] / got[2] in {4, 8}  # √32, rounded
    assert np.array_equal(smooth.factors(np.zeros(4), weights, 0.5), np.ones(4))


def test_a_norm_that_can_t_hold_the_quotient_keeps_its_channel() -> None:
    gamma = np.array([1, 1, 1, 1], np.float16)
    beta = np.array([0.5, 3e-7, 0, 1], np.float16)  # 3e-7 has three bits left
    factors = np.array([64, 64, 64, 1 / 64], np.float32)
    weights = np.ones((4, 2), np.float16)
    assert smooth.exactly(factors, gamma, beta, [weights]).tolist() == [64, 1, 64, 1 / 64]
    weights[3, 1] = 1e-5  # and so have the weights that are multiplied by less than 1
    assert smooth.exactly(factors, gamma, beta, [weights]).tolist() == [64, 1, 64, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outliers", "fp16-outliers"])
def test_the_folded_graph_gives_the_same_bits(name: str, tiny: MakeBundle, pictures: Path) -> None:
    bundle = tiny(name)
    graph = own_graph(bundle)
    batch = next(Samples.open(str(pictures), count=4).batches(bundle.manifest, 4))
    chosen = {}
    rng = np.random.default_rng(1)
    for linear in linear_groups(graph):
        if linear.norm is None:
            continue
        gamma, beta = (array_of(graph, each) for each in linear.norm)
        wanted = np.exp2(rng.integers(-6, 7, len(gamma))).astype(np.float32)
        weights = [array_of(graph, each) for each in linear.weights]
        factors = smooth.exactly(wanted, gamma, beta, weights)
        assert (factors != 1).mean() > 0.3
        chosen[linear.name] = factors
    assert len(chosen) == 6  # qkv and fc1 of three layers
    folded = Smooth(chosen)(graph.clone()).model
    # What an FP16 norm gives may get so small that the dtype has fewer bits left.
    expected = PieceSession(graph).run({"image": batch})
    got = PieceSession(folded).run({"image": batch})
    for key, value in expected.items():
        if name == "outliers":
            assert np.array_equal(got[key], value), key
        else:
            assert np.allclose(got[key], value, atol=4e-3), key
    # The comparison sees a fold that forgets one side.
    weight = next(each for each in linear_groups(graph) if each.norm).weights[0]
    held = folded.graph.initializers[weight]
    held.const_value = graph.graph.initializers[weight].const_value
    other = PieceSession(folded).run({"image": batch})
    assert not np.allclose(other["image_embeds"], expected["image_embeds"], atol=1e-2)
