"""The selections beside each other: what they keep, and how one is added."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.export.algorithm import oracle, selections
from vzip.export.algorithm.budget import Budget
from vzip.export.algorithm.selections import Signals
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.errors import InvalidInputError

BASELINES = ("uniform", "random")


def signals(cls_token: bool = True, patches: int = 64) -> Signals:
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(2, 4, patches + cls_token, 8, generator=generator)
    scores = torch.rand(2, patches, generator=generator)
    return Signals(keys, cls_token, lambda: scores)


def test_the_default_comes_first() -> None:
    assert selections.names() == ("visionzip", "random", "uniform")
    assert selections.names()[0] == selections.DEFAULT


def test_a_name_that_is_none_is_refused() -> None:
    with refused(InvalidInputError, got="'uniforn'", expected="visionzip, random, uniform"):
        selections.get("uniforn")


@pytest.mark.parametrize("name", selections.names())
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("merge", ["average", "sum"])
def test_the_ranking_says_what_the_plan_keeps(name: str, cls_token: bool, merge: str) -> None:
    given = signals(cls_token)
    selection = selections.get(name)
    budget = Budget(9, 4, cls_token, merge=merge)
    plan = selection.plan(given, budget)
    scores = given.attention_scores().double().numpy()
    hidden = np.random.default_rng(0).normal(size=(2, 64 + cls_token, 6))
    tokens, kept = oracle.compress(
        hidden,
        given.keys.double().numpy(),
        selection.ranking(scores, budget.dominant - cls_token),
        dominant=9,
        contextual=4,
        merge=merge,
        cls_token=cls_token,
    )
    assert plan.kept.tolist() == kept.tolist()
    got = torch.matmul(plan.token_weights.double(), torch.from_numpy(hidden)).numpy()
    assert np.abs(got - tokens).max() < 1e-6


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_looks_at_nothing(name: str) -> None:
    selection = selections.get(name)
    assert not selection.uses_attention

    def asked() -> torch.Tensor:
        raise AssertionError("the attention was asked for")

    given = signals()
    budget = Budget(9, 4)
    plan = selection.plan(Signals(given.keys, True, asked), budget)
    other = selection.plan(Signals(-3 * given.keys, True, asked), budget)
    assert plan.kept[0].tolist() == plan.kept[1].tolist() == other.kept[0].tolist()


@pytest.mark.parametrize("patches", [196, 576, 729])
@pytest.mark.parametrize("count", [1, 4, 53, 107, 195])
def test_uniform_is_spread_evenly(patches: int, count: int) -> None:
    ranking = selections.get("uniform").ranking(np.zeros((3, patches)), count)
    assert (ranking == ranking[0]).all()
    (kept,) = np.nonzero(ranking[0])
    assert len(kept) == count
    # Every gap is the even one, rounded; the half gaps at the ends too.
    gaps = np.diff(kept)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert abs(kept[0] - (patches - 1 - kept[-1])) <= 1


@pytest.mark.parametrize("patches", [1, 2, 63, 576, 729])
def test_random_ranks_every_patch_once(patches: int) -> None:
    ranking = selections.get("random").ranking(np.zeros((3, patches)), 1)
    assert (ranking == ranking[0]).all()
    assert sorted(ranking[0]) == list(range(patches))


def test_random_is_one_fixed_draw() -> None:
    ranking = selections.get("random").ranking(np.zeros((1, 576)), 8)[0]
    kept = np.sort(np.argsort(-ranking)[:8])
    assert kept.tolist() == [10, 40, 78, 150, 265, 392, 481, 523]


@pytest.mark.slow
def test_another_selection_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first.py").write_text(
        "from vzip.export.algorithm.selections import register\n"
        "from vzip.export.algorithm.visionzip import fixed_scores, make_plan\n"
        "import numpy as np\n"
        "@register('first')\n"
        "class First:\n"
        "    uses_attention = False\n"
        "    def plan(self, signals, budget):\n"
        "        n = signals.keys.shape[2] - int(signals.cls_token)\n"
        "        scores = fixed_scores(-np.arange(n, dtype=float), signals.keys)\n"
        "        return make_plan(scores, signals.keys, budget)\n"
        "    def ranking(self, attention_scores, kept):\n"
        "        return -np.arange(attention_scores.shape[1]) + 0 * attention_scores\n"
    )
    monkeypatch.setattr(selections, "__path__", [*selections.__path__, str(tmp_path)])
    monkeypatch.setattr(selections, "_REGISTRY", dict(selections._REGISTRY))
    assert "first" in selections.names()
    plan = selections.get("first").plan(signals(), Budget(5, 2, merge="sum"))
    assert plan.kept.tolist() == [[0, 1, 2, 3, 4]] * 2
    folder = tmp_path / "tiny"
    write_layout("llava-hf-single", folder)
    bundle = export_bundle(
        WeightSource(str(folder)),
        tmp_path / "bundle",
        budget=Budget(5, 2, method="first"),
        precision="fp32",
        options=GraphOptions(),
        check_images=reference_images()[:1],
        step=lambda _: None,
    )
    assert bundle.manifest.selection.method == "first"
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["kept_overlap"] == 1.0
    monkeypatch.delitem(sys.modules, "vzip.export.algorithm.selections.first")
