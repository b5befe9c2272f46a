"""The selections beside each other: what they keep, and how one is added."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.export.algorithm import oracle, selections
from vzip.export.algorithm.budget import Budget
from vzip.export.algorithm.rules import ScoredSelection, Signals
from vzip.export.algorithm.selections.random import permutation
from vzip.export.algorithm.selections.uniform import middles
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BudgetError, ExportError, InvalidInputError

SCORED = [n for n in selections.names() if issubclass(selections.kind_of(n), ScoredSelection)]
BLIND = [name for name in SCORED if not selections.get(name).uses_attention]


def signals(cls_token: bool = True, side: int = 8) -> Signals:
    generator = torch.Generator().manual_seed(5)
    patches = side * side
    keys = torch.randn(2, 4, patches + cls_token, 8, generator=generator)
    scores = torch.rand(2, patches, generator=generator)
    hidden = torch.randn(2, patches + cls_token, 6, generator=generator)
    return Signals(keys, cls_token, lambda: scores, lambda: hidden, (side, side))


def test_the_default_comes_first_and_every_file_is_found() -> None:
    folder = Path(selections.__file__).parent
    assert selections.names()[0] == selections.DEFAULT
    assert len(selections.names()) >= len(list(folder.glob("*.py"))) - 1
    assert len(set(selections.names())) == len(selections.names())
    assert BLIND


def test_a_name_that_is_none_is_refused() -> None:
    with refused(InvalidInputError, got="'uniforn'", expected=", ".join(selections.names())):
        selections.get("uniforn")


def test_an_option_that_a_selection_has_not_is_refused() -> None:
    with refused(InvalidInputError, got=("'visionzip'", "'place'"), expected="no option"):
        selections.get("visionzip", {"place": 0.5})


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("merge", ["average", "sum"])
def test_the_scores_say_what_the_plan_keeps(name: str, cls_token: bool, merge: Any) -> None:
    given = signals(cls_token)
    selection = selections.get(name)
    assert isinstance(selection, ScoredSelection)
    budget = Budget(9, 4, cls_token, merge=merge)
    plan = selection.plan(given, budget)
    hidden = np.random.default_rng(0).normal(size=(2, 64 + cls_token, 6))
    tokens, kept = oracle.compress(
        hidden,
        given.keys.double().numpy(),
        selection.scores(given, budget.dominant - cls_token).double().numpy(),
        dominant=9,
        contextual=4,
        merge=merge,
        cls_token=cls_token,
    )
    assert plan.kept.tolist() == kept.tolist()
    got = torch.matmul(plan.token_weights.double(), torch.from_numpy(hidden)).numpy()
    assert np.abs(got - tokens).max() < 1e-6


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("cls_token", [True, False])
def test_nothing_is_merged_with_contextual_0(name: str, cls_token: bool) -> None:
    given, selection = signals(cls_token), selections.get(name)
    plan = selection.plan(given, Budget(9, 0, cls_token))
    merging = selection.plan(given, Budget(9, 4, cls_token))
    assert torch.equal(plan.kept, merging.kept)
    assert torch.equal(plan.token_weights, merging.token_weights[:, :9])
    assert torch.equal(plan.positions, merging.positions[:, :9])


@pytest.mark.parametrize("name", selections.names())
@pytest.mark.parametrize("cls_token", [True, False])
def test_all_patches_may_be_kept(name: str, cls_token: bool) -> None:
    given = signals(cls_token)
    plan = selections.get(name).plan(given, Budget(64, 0, cls_token=False))
    assert plan.positions.tolist() == [list(range(64))] * 2
    assert torch.equal(plan.token_weights[:, :, int(cls_token) :], torch.eye(64).expand(2, 64, 64))
    with refused(BudgetError, got="65 tokens", expected="at most the 64", cure="at most 64"):
        selections.get(name).plan(given, Budget(65, 0, cls_token=False))


@pytest.mark.parametrize("name", BLIND)
def test_a_baseline_looks_at_nothing(name: str) -> None:
    selection = selections.get(name)

    def asked() -> torch.Tensor:
        raise AssertionError("the tower was asked for more")

    given = dataclasses.replace(signals(), attention_scores=asked, hidden=asked)
    budget = Budget(9, 4)
    plan = selection.plan(given, budget)
    other = selection.plan(dataclasses.replace(given, keys=-3 * given.keys), budget)
    assert plan.kept[0].tolist() == plan.kept[1].tolist() == other.kept[0].tolist()


@pytest.mark.parametrize("patches", [196, 576, 729])
@pytest.mark.parametrize("count", [1, 4, 53, 107, 195])
def test_uniform_is_spread_evenly(patches: int, count: int) -> None:
    (kept,) = np.nonzero(middles(patches, count))
    assert len(kept) == count
    # Every gap is the even one, rounded; the half gaps at the ends too.
    gaps = np.diff(kept)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert abs(kept[0] - (patches - 1 - kept[-1])) <= 1


@pytest.mark.parametrize("patches", [1, 2, 63, 576, 729])
def test_random_ranks_every_patch_once(patches: int) -> None:
    assert sorted(permutation(patches)) == list(range(patches))


def test_random_is_one_fixed_draw() -> None:
    kept = np.sort(np.argsort(-permutation(576))[:8])
    assert kept.tolist() == [10, 40, 78, 150, 265, 392, 481, 523]


# Selections of others' packages

FIRST = """
from vzip.export.algorithm.rules import ScoredSelection

class First(ScoredSelection):
    def scores(self, signals, kept):
        return -signals.keys.sum(dim=(1, 3))[:, int(signals.cls_token):] * 0 - 1
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs a package of one module with a selection."""
    names = []

    def installed(source: str, *, name: str = "first", value: str = "") -> Path:
        module = f"their_{name}"
        folder = tmp_path / f"site_{len(names)}"
        names.append(module)
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(source)
        value = value or f"{module}:{name.capitalize()}"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{selections.GROUP}]\n{name} = {value}\n")
        monkeypatch.syspath_prepend(str(folder))
        return folder / f"{module}.py"

    yield installed
    for module in names:
        sys.modules.pop(module, None)


def exported(folder: Path, method: str, **change: Any) -> Bundle:
    write_layout("llava-hf-single", folder / "tiny")
    options: dict[str, Any] = {"budget": Budget(5, 2, method=method), "check_images": ()}
    return export_bundle(
        WeightSource(str(folder / "tiny")),
        folder / "bundle",
        precision="fp32",
        options=GraphOptions(),
        step=lambda _: None,
        **{**options, **change},
    )


@pytest.mark.slow
def test_a_selection_of_another_package_is_found_exported_and_checked(
    package: Any, tmp_path: Path
) -> None:
    package(FIRST)
    assert "first" in selections.names()
    plan = selections.get("first").plan(signals(), Budget(5, 2, merge="sum"))
    assert plan.kept.tolist() == [[0, 1, 2, 3, 4]] * 2
    bundle = exported(tmp_path, "first", check_images=reference_images()[:1])
    assert bundle.manifest.selection.method == "first"
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["kept_overlap"] == 1.0


PLANNED = """
import torch
from vzip.export.algorithm.rules import SelectionRule
from vzip.export.algorithm.visionzip import Plan

class Pairs(SelectionRule):
    merges = False
    keeps_cls = False

    def plan(self, signals, budget):
        first, count = int(signals.cls_token), budget.tokens
        keys = signals.keys.sum(dim=1)[:, first:first + count, :1]
        kept = torch.arange(count) + first + (keys.squeeze(2) * 0).long()
        rows = (kept.unsqueeze(-1) == torch.arange(signals.patches + first)).float()
        {merging}
        return Plan(kept, rows, kept - first)
"""


@pytest.mark.slow
def test_a_plan_of_its_own_is_judged_by_the_same_plan(package: Any, tmp_path: Path) -> None:
    package(PLANNED.replace("{merging}", "rows = rows * 0.5 + rows.roll(1, 2) * 0.5"), name="pairs")
    budget = Budget(5, 0, cls_token=False, method="pairs")
    bundle = exported(tmp_path, "pairs", budget=budget, check_images=reference_images()[:1])
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["passed"] is True


@pytest.mark.slow
def test_an_operator_that_no_graph_may_hold_names_the_selection_s_file(
    package: Any, tmp_path: Path
) -> None:
    file = package(PLANNED.replace("{merging}", "rows = rows * keys.cos().cos()"), name="pairs")
    budget = Budget(5, 0, cls_token=False, method="pairs")
    with refused(ExportError, got=("'pairs'", "Cos"), expected="operators.md", cure=str(file)):
        exported(tmp_path, "pairs", budget=budget)


@pytest.mark.slow
def test_a_plan_that_can_t_be_traced_names_the_selection_s_file(
    package: Any, tmp_path: Path
) -> None:
    merging = "rows = rows if keys.sum() > 0 else rows"
    file = package(PLANNED.replace("{merging}", merging), name="pairs")
    budget = Budget(5, 0, cls_token=False, method="pairs")
    with refused(ExportError, got=("'pairs'", "traced"), expected="a branch", cure=str(file)):
        exported(tmp_path, "pairs", budget=budget)


def test_two_selections_of_a_name_are_refused(package: Any) -> None:
    package(FIRST)
    package(FIRST.replace("First", "Visionzip"), name="visionzip")
    assert selections.get("first")
    with refused(InvalidInputError, got=("vzip", "their_visionzip"), expected="one"):
        selections.check("visionzip")


@pytest.mark.parametrize(
    ("source", "expected"), [("import nothing_there", ""), ("First = 3", "a class that is")]
)
def test_a_package_that_is_no_selection_is_named(package: Any, source: str, expected: str) -> None:
    package(source)
    with refused(InvalidInputError, got=("'first'", "their_first:First"), expected=expected):
        selections.get("first")


def test_a_class_that_says_other_than_its_plan_does_is_refused(
    package: Any, tmp_path: Path
) -> None:
    file = package(FIRST.replace("def scores", "uses_attention = True\n    def scores"))
    with refused(InvalidInputError, got="uses_attention = True", cure=str(file)):
        exported(tmp_path, "first")
