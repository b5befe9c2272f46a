"""The probes of `benchmarks.sinks` can fail: planted tokens beat others, and noise wins nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import sinks
from benchmarks.harness import choices, probes
from benchmarks.harness.probes import Known
from benchmarks.harness.views import Seen, View, views
from benchmarks.readme import RESULTS, ROOT
from vzip.export.algorithm.budget import split_tokens

SIDE, WIDTH, PICTURES = 6, 48, 16
N = SIDE * SIDE
SCENES = [f"scene {number // 2}" for number in range(PICTURES)]
ROWS, COLUMNS = np.divmod(np.arange(N), SIDE)
PLACES = np.stack([ROWS, COLUMNS], axis=1).astype(np.float32)

Floats = NDArray[np.float32]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(16)


def planted(rng: np.random.Generator) -> tuple[list[Floats], list[Floats]]:
    """Return the tokens [N, WIDTH] of pictures, and what they tell of their patches [N, 4]."""
    looks, meanings = [], []
    for _ in range(PICTURES):
        meaning = rng.standard_normal((N, 4)).astype(np.float32)
        look = 0.1 * rng.standard_normal((N, WIDTH)).astype(np.float32)
        look[:, :4] += meaning
        look[:, 4:6] += (PLACES - 2.5) / 2.5
        looks.append(look)
        meanings.append(meaning)
    return looks, meanings


def explained(
    looks: list[Floats], meanings: list[Floats], kept: list[int], *, placed: bool = True
) -> float:
    """Return what some patches explain of all, CLS being noise and a patch in ten a sink."""
    folds = probes.folds_of(SCENES)
    cls = np.zeros((1, WIDTH), np.float32)
    whole = [np.concatenate([cls, look]) for look in looks]
    long = [np.arange(N) % 10 == 9] * len(looks)
    reader = probes.Reader.learnt(folds, whole, long, meanings)
    places = probes.Ridge(folds, looks, [PLACES] * len(looks))
    told = []
    for fold, look, each in zip(folds, looks, long, strict=True):
        known = Known(look[kept], PLACES[kept], each[kept])
        if not placed:
            known = probes.replaced(known, places, fold, SIDE)
        told.append(reader.told(known, fold, PLACES, SIDE, probes.WIDTHS))
    return float(probes.explained(folds, told, meanings, apart=False).mean())


def test_more_of_the_picture_explains_more_and_noise_explains_nothing(
    rng: np.random.Generator,
) -> None:
    looks, meanings = planted(rng)
    everything = explained(looks, meanings, list(range(N)))
    half = explained(looks, meanings, list(range(0, N, 2)))
    few = explained(looks, meanings, [0, 1, 2])
    others = [rng.standard_normal((N, WIDTH)).astype(np.float32) for _ in looks]
    assert everything > 0.8
    assert 0.2 < half < 0.6
    assert few < 0.15
    assert abs(explained(others, meanings, list(range(N)))) < 0.02


def test_places_are_read_from_tokens_that_know_them(rng: np.random.Generator) -> None:
    looks, meanings = planted(rng)
    kept = list(range(0, N, 2))
    assert explained(looks, meanings, kept, placed=False) > 0.1
    blind = [look.copy() for look in looks]
    for look in blind:
        look[:, 4:6] = 0
    assert explained(blind, meanings, kept) > 0.2
    assert explained(blind, meanings, kept, placed=False) < 0.05


def test_a_long_token_spoils_nothing_beside_it(rng: np.random.Generator) -> None:
    looks, meanings = planted(rng)
    folds = probes.folds_of(SCENES)
    whole = [np.concatenate([look[:1], look]) for look in looks]
    long = np.zeros(N, np.bool_)
    long[7] = True
    reader = probes.Reader.learnt(folds, whole, [long] * PICTURES, meanings)
    told = []
    for factor in (1, 100):
        look = looks[0].copy()
        look[7] *= factor
        known = Known(look, PLACES, long)
        told.append(reader.told(known, folds[0], PLACES, SIDE, probes.WIDTHS))
    same = [bool(np.array_equal(told[0][..., v], told[1][..., v])) for v in range(6)]
    assert same == [True, True, True, False, True, True]


def test_retrieval_finds_what_is_alike_and_guesses_else(rng: np.random.Generator) -> None:
    gallery = [rng.standard_normal((5, 32)).astype(np.float32) for _ in range(40)]
    near = [0.5 * rng.standard_normal(each.shape).astype(np.float32) + each for each in gallery]
    far = [rng.standard_normal((5, 32)).astype(np.float32) for _ in gallery]
    same = [np.ones((5, 32), np.float32)] * 40
    assert probes.reciprocal_ranks(near, gallery).mean() > 0.95
    assert probes.reciprocal_ranks(far, gallery).mean() < 0.25
    assert probes.reciprocal_ranks(same, same).max() == pytest.approx(1 / 20.5)


def test_views_of_one_scene_are_one_observation(rng: np.random.Generator) -> None:
    one, other = rng.standard_normal((2, 8))
    scenes = [str(number) for number in range(8)]
    once = probes.paired(one, other, scenes)
    thrice = probes.paired(np.tile(one, 3), np.tile(other, 3), scenes * 3)
    assert thrice.error == pytest.approx(once.error)
    assert once.error == pytest.approx(np.std(one - other, ddof=1) / np.sqrt(8))
    assert probes.paired(one, one, scenes).verdict == "even"
    assert probes.paired(one + 1, one, scenes).verdict == "better"
    assert probes.paired(one - 1, one, scenes).verdict == "worse"


@pytest.mark.parametrize(
    ("here", "elsewhere", "passes"),
    [
        (("better", "better", "even"), ("even", "even", "even"), True),
        (("better", "even", "even"), ("better", "better", "better"), False),
        (("better", "better", "worse"), ("even", "even", "even"), False),
        (("better", "better", "better"), ("even", "worse", "even"), False),
    ],
)
def test_the_rule(here: tuple[str, ...], elsewhere: tuple[str, ...], passes: bool) -> None:
    first, second = (dict(zip("ABC", verdicts, strict=True)) for verdicts in (here, elsewhere))
    assert probes.helps(first, [second]) is passes


def seen(rng: np.random.Generator, sinks: list[int]) -> Seen:
    hidden = rng.standard_normal((N + 1, WIDTH)).astype(np.float32)
    hidden[[1 + sink for sink in sinks]] *= 10
    attention = rng.uniform(0, 1, (12, N)).astype(np.float32)
    attention[-2, sinks] += 5
    keys = rng.standard_normal((N + 1, 8)).astype(np.float32)
    return Seen(hidden, keys, attention, np.zeros((13, N), np.float32), hidden[:0])


def test_sinks_are_kept_as_published_and_left_out_where_asked(rng: np.random.Generator) -> None:
    sinks = [3, 8, 20, 21, 33]
    picture = seen(rng, sinks)
    made: dict[str, Any] = {
        choose.__name__: choose(picture, 12, np.random.default_rng(0))
        for choose in choices.CHOICES.values()
    }
    assert np.flatnonzero(choices.sinks(picture)).tolist() == sinks
    assert set(sinks) <= set(made["published"].dominant)
    assert not set(sinks) & {*made["unscored"].dominant, *made["without"].places}
    for name, chosen in made.items():
        assert len(chosen.tokens) == len(chosen.places) == 12, name
        assert len(set(chosen.places)) == 12, name
    kept, _ = split_tokens(12)
    for name in set(made) - {"scope"}:
        given = picture.hidden[1 + made[name].dominant]
        assert np.allclose(made[name].tokens[1:kept], given, atol=1e-6), name
    picture.hidden[[1 + sink for sink in sinks]] *= 2
    again = choices.without(picture, 12, np.random.default_rng(0))
    assert np.array_equal(again.tokens, made["without"].tokens)


def test_scope_keeps_one_of_each_kind_before_a_second_of_any(rng: np.random.Generator) -> None:
    picture = seen(rng, [])
    kinds = np.arange(N) % 4
    picture.hidden[1:] = 0.01 * picture.hidden[1:] + np.eye(4, WIDTH)[kinds]
    chosen = choices.scope(picture, 4, np.random.default_rng(0))
    assert sorted(kinds[chosen.dominant]) == [0, 1, 2, 3]


def test_statistics_tell_stripes_flat_and_bright() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32, 0] = 200  # red, flat
    picture[:32, 32:] = np.where(np.arange(32) // 4 % 2, 255, 0)[None, :, None]  # upright
    picture[32:, :32] = np.where(np.arange(32) // 4 % 2, 255, 0)[:, None, None]  # lying
    flat, upright, lying, black = probes.statistics(picture, 2)
    assert flat[1] > 0.5
    assert flat[0] > black[0]
    assert upright[3] > flat[3] + 3
    assert upright[6] > 0.8
    assert lying[6] < -0.8


def test_the_document_has_the_table_of_the_result() -> None:
    result = json.loads((RESULTS / "sinks.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "choosing-a-budget.md").read_text(encoding="utf-8")
    assert sinks.summary(result) in document


def test_views_repeat_and_motorcycles_are_one_scene() -> None:
    few = list(views(("motorcycle_left.png", "motorcycle_right.png"), 2))
    assert few == list(views(("motorcycle_left.png", "motorcycle_right.png"), 2))
    assert len({view.scene for view in few}) == 1
    assert View("page.png", 0).scene != View("text.png", 0).scene
