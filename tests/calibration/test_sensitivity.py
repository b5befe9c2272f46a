"""Which layers stay in high precision: those that cost most, no more than are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.agreements import agreement
from vzip.calibration.quantization.pieces import Chain, linear_groups, own_graph
from vzip.calibration.quantization.qdq import Setting
from vzip.calibration.quantization.quantize import quantize
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.quantization.sensitivity import (
    Effect,
    Goal,
    Judge,
    Layers,
    effects,
    fewest,
    ranking,
    scores_name,
)
from vzip.calibration.samples import Samples
from vzip.runtime.agreement import compare
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.reader import Bundle

MakeBundle = Callable[[str], Bundle]

PLAIN = Recipe(method="minmax", smoothing=None, keep_agreement=None, keep_cosine=None)
SMOOTH = dataclasses.replace(PLAIN, smoothing=0.5)


@pytest.mark.slow
def test_outliers_break_minmax_and_smoothing_with_limits_mends_it(
    tiny: MakeBundle, pictures: Path
) -> None:
    samples, bundle = Samples.open(str(pictures), count=14), tiny("outliers")
    said: list[str] = []
    plain = quantize(bundle, samples, PLAIN, step=said.append).report
    mended = quantize(bundle, samples, Recipe(method="minmax"), step=said.append).report
    assert plain.agreement.mean_overlap < 0.85
    assert plain.agreement.kept.mean < 0.99
    assert mended.agreement.mean_overlap >= 0.95
    assert mended.agreement.every.mean >= 0.995
    assert (mended.calibrated, mended.held_apart, mended.deciding) == (12, 2, 8)
    assert mended.unrefined is not None
    assert plain.unrefined is None
    quantised = [each for each in mended.layers if each.quantised]
    left = [each for each in mended.layers if not each.quantised]
    assert quantised
    assert all(each.effect is not None for each in mended.layers)
    assert all(each.reason is None for each in quantised)
    assert all("alone it leaves an overlap of" in (each.reason or "") for each in left)
    # Smoothing pays where the outliers are, and there alone.
    for before, after in zip(plain.layers, mended.layers, strict=True):
        if after.smoothing is not None:
            assert after.smoothing >= 4
            assert after.range < 0.3 * before.range
        else:
            assert after.range == before.range
    assert said[0] == "calibrating on 12 images"


def test_the_layer_that_is_spoiled_has_the_largest_effect(tiny: MakeBundle, pictures: Path) -> None:
    bundle = tiny("fp32")
    graph = own_graph(bundle)
    linears, scores = linear_groups(graph), scores_name(graph)
    assert scores is not None
    chain = Chain(graph, [scores])
    batch = next(Samples.open(str(pictures), count=4).batches(bundle.manifest, 4))
    live: dict[str, np.ndarray] = {"image": batch}  # type: ignore[type-arg]
    stored = []
    for place in range(len(chain)):
        live = chain.live(live, place)
        stored.append(live)
        live = {**live, **chain.session(place).run(live)}
    # Each input clipped at 5, which is about right, but for one that is rounded to steps of 8.
    settings = {each.name: Setting(5.0, None) for each in linears}
    settings["layers.1.out"] = Setting(1000.0, None)
    judge = Judge(chain, [stored], [3], scores, bundle.manifest)
    layers = Layers(chain, settings, "int8", 17, scores)
    found = effects(judge, chain, layers, linears)
    assert list(found) == [each.name for each in linears]
    goal = Goal(0.99, 0.9999)
    first, error = judge.compare(0, layers.all(linears, frozenset()))
    assert len(first.overlaps) == 3
    assert ranking(found, goal, first, dict.fromkeys(settings, 1))[0] == "layers.1.out"
    assert found["layers.1.out"].score_error == max(each.score_error for each in found.values())
    # What lies behind the scores moves none of them, and the projector no kept token.
    for name in ("layers.2.out", "layers.2.fc1", "layers.2.fc2", "projector.linear_2"):
        assert found[name].score_error == 0
        assert found[name].kept_overlap == 1
        assert found[name].cosine < 1
    # Together they are worse than the worst alone; without the worst, better.
    assert error > 0.5 * found["layers.1.out"].score_error
    rest, less = judge.compare(0, layers.all(linears, frozenset({"layers.1.out"})))
    assert less < error
    assert rest.every.mean > first.every.mean
    nothing, none = judge.compare(0, layers.all(linears, frozenset(settings)))
    assert none == 0
    assert nothing.mean_overlap == 1
    assert nothing.every.lowest == pytest.approx(1)


def test_only_what_falls_short_ranks_the_layers() -> None:
    found = {
        "a": Effect(1.0, 0.99, 0.01, 0.0),
        "b": Effect(0.9, 1.0, 0.0, 0.5),
        "c": Effect(0.99, 0.999, 0.001, 0.1),
    }
    goal = Goal(0.95, 0.995)
    sizes = dict.fromkeys(found, 7)
    assert ranking(found, goal, agreement(0.9, 0.999), sizes) == ["b", "c", "a"]
    assert ranking(found, goal, agreement(0.99, 0.9), sizes) == ["a", "c", "b"]
    assert set(ranking(found, goal, agreement(0.9, 0.9), sizes)[:2]) == {"a", "b"}
    # What saves a thousand times as much may cost more.
    sizes["b"] = 7000
    assert ranking(found, goal, agreement(0.9, 0.999), sizes) == ["c", "b", "a"]


@pytest.mark.parametrize("needed", range(8))
def test_no_more_layers_stay_than_are_needed(needed: int) -> None:
    ordered = [str(number) for number in range(7)]
    asked = []

    def reached(high: frozenset[str]) -> bool:
        asked.append(len(high))
        assert high == frozenset(ordered[: len(high)])
        return len(high) >= needed

    assert fewest(ordered, reached) == needed
    assert len(asked) <= 3
    assert fewest(ordered, reached, least=6) == max(6, needed)


def test_goals() -> None:
    goal = Goal.of(Recipe(keep_agreement=0.9, keep_cosine=None))
    assert goal.met(agreement(0.9, 0.1))
    assert not goal.met(agreement(0.89, 1.0))
    assert goal.nearer(0.1) == Goal(pytest.approx(0.91), None)
    assert Goal(None, 0.9).met(agreement(0.0, 0.9))
    assert not Goal(None, 0.9).met(agreement(1.0, float("nan")))


def test_agreement_compares_tokens_that_are_the_same(tiny: MakeBundle) -> None:
    manifest = tiny("fp32").manifest  # 12 + 4 of 65 tokens
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2, 16, 48)).astype(np.float32)
    kept = np.stack([np.arange(12), np.arange(12)])
    same = {EMBEDS: embeds, KEPT: kept}
    full = compare([same], [same], manifest)
    assert (full.mean_overlap, full.min_overlap, len(full.merged.cosines)) == (1, 1, 8)
    assert full.every.lowest == pytest.approx(1)
    # In image 1, token 11 goes and 64 comes: the rows in between stay in their places, and the
    # first merged token forms around 11 instead of 12.
    moved = kept.copy()
    moved[1, 11] = 64
    spoiled = embeds.copy()
    spoiled[1, 11] = -embeds[1, 11]  # is not compared: it is another token
    spoiled[1, 0] = -embeds[1, 0]
    other = compare([same], [{EMBEDS: spoiled, KEPT: moved}], manifest)
    assert other.mean_overlap == pytest.approx(1 - 1 / 24)
    assert other.min_overlap == pytest.approx(11 / 12)
    assert other.every.lowest == pytest.approx(-1)
    assert other.kept.mean == pytest.approx(1 - 2 / 23)
    broken = compare([same], [{EMBEDS: embeds * np.nan, KEPT: kept}], manifest)
    assert broken.every.mean == -1
