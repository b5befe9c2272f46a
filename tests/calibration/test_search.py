"""The form of each layer: outliers stand apart or are spread, and the graph does what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vzip.calibration.quantization.folds import InputSource, hadamard, rotated, source_of
from vzip.calibration.quantization.pieces import (
    LinearGroup,
    PieceSession,
    array_of,
    linear_groups,
    own_graph,
)
from vzip.calibration.quantization.qdq import Setting, quantised
from vzip.calibration.quantization.search import FormSearch, FoundForm, SeenTokens
from vzip.calibration.samples import Samples
from vzip.runtime.bundle.reader import Bundle

MakeBundle = Callable[[str], Bundle]
Array = np.ndarray[Any, Any]

NORMED = LinearGroup("layers.0.fc1", "fc1", "x", ("w",), ("n",), ("gamma", "beta"))
HIDDEN = LinearGroup("layers.0.fc2", "fc2", "x", ("w",), ("n",), None)
FEED_FORWARD = InputSource("before", "bias", None)


def searched(
    values: Array,
    linear: LinearGroup = NORMED,
    *,
    source: InputSource | None = None,
    precision: Any = "int8",
) -> FoundForm:
    """Search for the form of a layer with random weights, by an input [images, tokens, in]."""
    tokens = SeenTokens(len(values))
    for image in values:
        tokens.see("x", image[None])
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(values.shape[-1], 48)).astype(np.float32)
    return FormSearch(linear, tokens, weights, source, None, precision).best(())


def values(channels: int) -> Array:
    return np.random.default_rng(0).normal(size=(4, 32, channels)).astype(np.float32)


def test_what_has_no_outliers_costs_no_time() -> None:
    setting = searched(values(256)).setting
    assert (len(setting.apart), setting.block) == (0, 0)
    setting = searched(values(256), HIDDEN, source=FEED_FORWARD).setting
    assert (len(setting.apart), setting.block, setting.shift) == (0, 0, None)


def test_the_channels_of_outliers_stand_apart_and_cost_the_others_no_steps() -> None:
    clean = searched(values(256))
    spoiled = values(256)
    spoiled[:, ::7, [5, 200]] *= 300  # for some tokens, in every picture
    found = searched(spoiled)
    assert {5, 200} <= set(found.setting.apart)
    assert found.setting.threshold < 6
    assert found.error < 1.5 * clean.error


def test_what_is_always_there_is_taken_off() -> None:
    shifted = values(64)
    shifted[..., 9] += 40
    found = searched(shifted)
    assert found.setting.folded
    assert found.setting.shift is not None
    assert found.setting.shift[9] == pytest.approx(40, abs=2)
    assert found.setting.threshold < 6


def test_what_stands_alone_within_a_token_is_spread() -> None:
    spiky = values(256) * 0.1
    rng = np.random.default_rng(3)
    for image in spiky:
        image[np.arange(32), rng.integers(0, 256, 32)] = 8  # another channel each time
    plain = searched(spiky, HIDDEN)
    found = searched(spiky, HIDDEN, source=FEED_FORWARD)
    assert plain.setting.block == 0
    assert found.setting.block == 16
    assert found.setting.order is not None
    assert sorted(found.setting.order) == list(range(256))
    assert found.error < 0.5 * plain.error


def test_fp8_keeps_its_form() -> None:
    spoiled = values(256)
    spoiled[..., 5] *= 300
    setting = searched(spoiled, precision="fp8").setting
    assert dataclasses.replace(setting, threshold=0.0, correction=None) == Setting(
        0.0, apart=setting.apart
    )
    assert not len(setting.apart)


def test_a_rotation_is_its_own_inverse() -> None:
    array = values(64)[0]
    assert np.allclose(rotated(rotated(array, 16, 1), 16, 1), array, atol=1e-5)
    assert np.allclose(hadamard(16) @ hadamard(16), np.eye(16), atol=1e-6)


def test_what_makes_an_input_is_found(tiny: MakeBundle) -> None:
    graph = own_graph(tiny("fp32"))
    found = {each.name: source_of(graph, each) for each in linear_groups(graph)}
    width = array_of(graph, "layers.0.q.weight").shape[1]
    for layer in range(3):
        values = InputSource(f"layers.{layer}.v.weight", f"layers.{layer}.v.bias", width // 4)
        assert found[f"layers.{layer}.out"] == values
        hidden = InputSource(f"layers.{layer}.fc1.weight", f"layers.{layer}.fc1.bias", None)
        assert found[f"layers.{layer}.fc2"] == hidden
        assert found[f"layers.{layer}.qkv"] is None
    assert found["projector.linear_2"] is not None
    assert found["projector.linear_1"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_the_graph_computes_what_was_searched_for(
    name: str, tiny: MakeBundle, pictures: Path
) -> None:
    bundle = tiny(name)
    graph = own_graph(bundle)
    linears = [each for each in linear_groups(graph) if each.name.startswith("layers.1.")]
    size = bundle.manifest.batch.max
    batch = next(Samples.open(str(pictures), count=size).batches(bundle.manifest, size))
    feeds = {bundle.manifest.input.name: batch}
    ends = {each.name: _end(graph, each) for each in linears}
    seen = PieceSession(graph, [*{each.input for each in linears}, *ends.values()]).run(feeds)
    tokens = SeenTokens(size)
    for value in {each.input for each in linears}:
        tokens.see(value, seen[value])
    for linear in linears:
        weights = np.concatenate([array_of(graph, x) for x in linear.weights], axis=1)
        source = source_of(graph, linear)
        search = FormSearch(linear, tokens, weights, source, None, "int8")
        for setting in _forms(search, linear, source):
            form = search._judged(setting)
            done = quantised(
                graph, {linear.name: search._corrected(form.setting)}, "int8",
                19 if name == "fp16" else 17,
            )  # fmt: skip
            got = PieceSession(done, [ends[linear.name]]).run(feeds)[ends[linear.name]]
            wanted = seen[ends[linear.name]].astype(np.float64)
            error = ((got - wanted) ** 2).sum() / (wanted**2).sum()
            assert error < 3 * form.error + 1e-5, (linear.name, form.setting)
            assert error > form.error / 20, (linear.name, form.setting)


def _forms(search: FormSearch, linear: LinearGroup, source: InputSource | None) -> list[Setting]:
    """Return every kind of form that a layer may get, taken or not."""
    plain = Setting(0.0)
    size = len(search._high)
    if linear.norm is not None:
        centred = search._centred(dataclasses.replace(plain, folded=True))
        return [centred, search._without(centred, 8)]
    assert source is not None
    if source.head is not None:
        turned = dataclasses.replace(plain, folded=True, block=8)
        return [turned, search._centred(turned)]
    spread = dataclasses.replace(
        plain, order=search._order(16), apart=np.arange(size - 16, size), block=16
    )
    return [search._centred(plain), spread, search._centred(spread), search._without(plain, 8)]


def _end(graph: Any, linear: LinearGroup) -> str:
    """Return the name of a layer's output, of the first of three."""
    (product,) = (node for node in graph.graph if node.name == linear.nodes[0])
    (use,) = product.outputs[0].uses()
    return str(use.node.outputs[0].name)
