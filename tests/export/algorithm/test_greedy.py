"""Greedy selections beside their oracles, and what their plans promise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.refusals import refused
from vzip.export.algorithm import greedy, greedy_oracle, selections
from vzip.export.algorithm.budget import Budget
from vzip.export.algorithm.rules import GreedySelection, Signals
from vzip.export.algorithm.selections.coverage import ALPHAS, FEATURES, Coverage
from vzip.runtime.agreement.objective import Objective
from vzip.runtime.errors import BudgetError, InvalidInputError

GREEDY = [n for n in selections.names() if issubclass(selections.kind_of(n), GreedySelection)]
OPTIONS: tuple[Mapping[str, Any], ...] = (
    *({"alpha": alpha, "features": of} for alpha in ALPHAS for of in FEATURES),
    {"place": 0.25, "radius": 1.5},
    {"place": 1.0, "alpha": 0.0},
    {"place": 0.5, "features": "tower"},
)
CASES = [(name, {}) for name in GREEDY] + [("coverage", each) for each in OPTIONS]
SIDE = 6


def rule_of(name: str, options: Mapping[str, Any]) -> GreedySelection:
    rule = selections.get(name, options).settled((SIDE, SIDE))
    assert isinstance(rule, GreedySelection)
    return rule


def signals(seed: int, cls_token: bool, dtype: Any = torch.float32, side: int = SIDE) -> Signals:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    patches = side * side
    keys, hidden = draw(2, 4, patches + cls_token, 8) + 0.5, draw(2, patches + cls_token, 10)
    scores = draw(2, patches).exp()
    return Signals(keys, cls_token, lambda: scores, lambda: hidden, (side, side))


def image(given: Signals, number: int) -> Signals:
    here = slice(number, number + 1)
    return Signals(
        given.keys[here],
        given.cls_token,
        lambda: given.attention_scores()[here],
        lambda: given.hidden()[here],
        given.grid,
    )


def picks(rule: GreedySelection, given: Signals, count: int) -> list[list[int]]:
    plan = rule.plan(given, Budget(count, 0, cls_token=False))
    assert plan.rank is not None
    return [
        patches[torch.argsort(rank)].tolist()
        for patches, rank in zip(plan.positions, plan.rank, strict=True)
    ]


def oracle_picks(rule: GreedySelection, given: Signals, count: int) -> list[int]:
    found = rule.slow_relation(given)
    assert found is not None
    if found.weights is None:
        return greedy_oracle.spread(found.similarity, count)
    return greedy_oracle.cover(found.similarity, found.weights, count)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_picks_are_the_oracle_s(name: str, options: Mapping[str, Any], cls_token: bool) -> None:
    rule = rule_of(name, options)
    for seed in range(3):
        given = signals(seed, cls_token)
        expected = [oracle_picks(rule, image(given, number), 12) for number in range(2)]
        assert picks(rule, given, 12) == expected
        wide = signals(seed, cls_token, torch.float64)
        assert picks(rule, wide, 12) == expected


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_plan_is_ascending_and_as_it_is(name: str, cls_token: bool) -> None:
    given = signals(0, cls_token)
    plan = selections.get(name).plan(given, Budget(12, 0, cls_token=False))
    assert plan.kept.dtype == plan.positions.dtype == torch.int64
    assert bool((plan.positions.diff(dim=1) > 0).all())
    assert torch.equal(plan.kept, plan.positions + int(cls_token))
    assert plan.token_weights.dtype == torch.float32
    features = given.hidden()
    rows = torch.matmul(plan.token_weights, features)
    for number in range(2):
        assert torch.equal(rows[number], features[number, plan.kept[number]])
    assert plan.rank is not None
    assert plan.rank.dtype == torch.int64
    assert torch.equal(plan.rank.sort(dim=1).values, torch.arange(12).expand(2, 12))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_smaller_budget_is_the_first_ranks(name: str, options: Mapping[str, Any]) -> None:
    rule, given = rule_of(name, options), signals(7, cls_token=True)
    whole = rule.plan(given, Budget(36, 0, cls_token=False))
    assert whole.rank is not None
    for count in (1, 5, 22):
        few = rule.plan(given, Budget(count, 0, cls_token=False))
        for number in range(2):
            first = whole.positions[number][whole.rank[number] < count]
            assert few.positions[number].tolist() == first.tolist()


@pytest.mark.parametrize("name", GREEDY)
def test_no_patch_comes_twice_where_all_are_the_same(name: str) -> None:
    given = signals(0, cls_token=False)
    same = Signals(
        torch.ones_like(given.keys),
        False,
        lambda: torch.ones(2, 36) / 36,
        lambda: torch.ones(2, 36, 10),
        given.grid,
    )
    assert picks(selections.get(name), same, 20) == [list(range(20))] * 2  # type: ignore[arg-type]


@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([0.0, 0.4]))
@settings(max_examples=40, deadline=None)
def test_patches_that_repeat_are_picked_as_the_oracle_picks(
    side: int, seed: int, kinds: int, place: float
) -> None:
    """Few kinds of patches, so that gains tie at every step."""
    rng = np.random.default_rng(seed)
    patches = side * side
    keys = rng.integers(-2, 3, (kinds, 1, 3)).astype(np.float32)[rng.integers(0, kinds, patches)]
    scores = torch.from_numpy(rng.choice([0.25, 0.5], (1, patches)).astype(np.float32))
    given = Signals(
        torch.from_numpy(keys.transpose(1, 0, 2).copy())[None],
        False,
        lambda: scores,
        lambda: torch.zeros(1, patches, 1),
        (side, side),
    )
    rule = Coverage(place=place, radius=1.5)
    got, expected = picks(rule, given, patches)[0], oracle_picks(rule, given, patches)
    assert sorted(got) == list(range(patches))
    found = rule.slow_relation(given)
    objective = Objective(found.similarity, found.weights)
    # Sums of another order break ties in another way; both are then as good.
    for count in range(1, patches + 1):
        share = objective.share(np.array(got[:count]), np.array(expected[:count]))
        assert share > 0.99


def test_padding_is_picked_last() -> None:
    given = signals(3, cls_token=False)
    shown = torch.ones(2, 36)
    shown[:, 20:] = 0
    scores = given.attention_scores() * shown + (shown - 1)
    padded = Signals(given.keys, False, lambda: scores, given.hidden, given.grid, lambda: shown)
    for alpha in ALPHAS:
        for each in picks(Coverage(alpha=alpha), padded, 20):
            assert max(each) < 20


@pytest.mark.parametrize(("side", "radius"), [(14, 1.5), (24, 2.6), (27, 2.9), (2, 0.2)])
def test_the_radius_grows_with_the_grid(side: int, radius: float) -> None:
    assert Coverage().settled((side, side)).radius == radius
    assert Coverage(radius=3.0).settled((side, side)).radius == 3.0


@pytest.mark.parametrize(
    ("options", "got", "expected"),
    [
        ({"place": 1.5}, "place is 1.5", "from 0 to 1"),
        ({"place": "a"}, "place is 'a'", "from 0 to 1"),
        ({"radius": -1.0}, "radius is -1.0", "above 0"),
        ({"radius": float("nan")}, "radius is nan", "above 0"),
        ({"alpha": 0.3}, "alpha is 0.3", "0, 0.5 or 1"),
        ({"features": "pixels"}, "'pixels'", "keys or tower"),
        ({"sigma": 1.0}, "'sigma'", "place or radius or alpha or features"),
    ],
)
def test_options_out_of_range_are_refused(
    options: Mapping[str, Any], got: str, expected: str
) -> None:
    with refused(InvalidInputError, got=got, expected=expected):
        selections.get("coverage", options)


@pytest.mark.parametrize("name", GREEDY)
def test_merged_tokens_and_cls_are_refused(name: str) -> None:
    given = signals(0, cls_token=True)
    with refused(BudgetError, got=f"'{name}'", expected="no CLS", cure="--no-cls"):
        selections.get(name).plan(given, Budget(5, 0, method=name))
    with refused(BudgetError, got="contextual is 2", cause="merges nothing"):
        selections.get(name).plan(given, Budget(5, 2, cls_token=False, method=name))


def test_cosines_of_nothing_are_0() -> None:
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]])
    assert torch.allclose(greedy.cosines(x)[0, 0], torch.zeros(3))
    assert torch.allclose(greedy.cosines(x)[0, 1:, 1:], torch.ones(2, 2))
