"""What a bundle's selection chooses of the untouched model's signals, and what it is judged by.

Where the selection has a slow oracle, that chooses. Others' own plan runs on the same signals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.algorithm import greedy_oracle, oracle, selections
from vzip.export.algorithm.budget import Budget
from vzip.export.algorithm.rules import GreedySelection, ScoredSelection, SelectionRule, Signals
from vzip.export.parity.reference import Features
from vzip.runtime.agreement import Choices
from vzip.runtime.agreement.objective import Objective
from vzip.runtime.bundle.manifest import Manifest

Float = NDArray[np.float64]
Tokens = Callable[[Float], Float]

# Weights of FP32 are 1e-7 off; a token too many or too few in a merged one is 1e-3 and more.
_WEIGHT = 1e-4


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is right for one picture.

    Attributes:
        features: Of the untouched tower. Its scores are those that patches are kept by, where the
            selection goes by scores.
        kept: int64 [dominant].
        compressed: Gives tokens [K, F] of features [S, F].
        scored: Whether `features.scores` excuse a swap.
        weights: float64 [K, S], of the plan; None where tokens are merged as VisionZip does.
        rank: int64 [K]; None but of a greedy selection.
        objective: Likewise.
    """

    features: Features
    kept: NDArray[np.int64]
    compressed: Tokens
    scored: bool = False
    weights: Float | None = None
    rank: NDArray[np.int64] | None = None
    objective: Objective | None = None


def choose(features: Features, black: NDArray[np.bool_] | None, manifest: Manifest) -> Chosen:
    """Return what is right for one picture.

    Args:
        features: Of the untouched tower.
        black: [1, N], patches that are padding; None where the graph tells no padding.
        manifest: Of the bundle.
    """
    selection = manifest.selection
    rule = selections.get(selection.method, selection.options)
    signals = signals_of(features, black, manifest)
    if isinstance(rule, ScoredSelection):
        return _scored(rule, features, signals, manifest)
    if isinstance(rule, GreedySelection):
        return _greedy(rule, features, signals, manifest)
    return _planned(rule, features, signals, manifest)


def signals_of(features: Features, black: NDArray[np.bool_] | None, manifest: Manifest) -> Signals:
    """Return the untouched model's signals, in float64."""
    scores = features.scores if black is None else np.where(black, -1.0, features.scores)
    return Signals(
        keys=torch.from_numpy(features.keys),
        cls_token=manifest.tower.cls_token,
        attention_scores=lambda: torch.from_numpy(scores),
        hidden=lambda: torch.from_numpy(features.before_projector),
        grid=manifest.tower.grid,
        pictured=None if black is None else lambda: torch.from_numpy(1.0 - black),
    )


def _scored(
    rule: ScoredSelection, features: Features, signals: Signals, manifest: Manifest
) -> Chosen:
    selection, offset = manifest.selection, int(manifest.tower.cls_token)
    patches = selection.dominant - int(selection.cls_token)
    scores = rule.scores(signals, patches).double().numpy()
    ranked = replace(features, scores=scores)
    best = oracle.select(scores[0], patches)
    kept = np.array([0] * selection.cls_token + [patch + offset for patch in best], np.int64)

    def compressed(hidden: Float) -> Float:
        tokens, _ = oracle.compress(
            hidden[None],
            features.keys,
            scores,
            dominant=selection.dominant,
            contextual=selection.contextual,
            merge=selection.merge,
            cls_token=selection.cls_token,
        )
        first: Float = tokens[0]
        return first

    return Chosen(ranked, kept, compressed, scored=True)


def _greedy(
    rule: GreedySelection, features: Features, signals: Signals, manifest: Manifest
) -> Chosen:
    count, offset = manifest.selection.tokens, int(manifest.tower.cls_token)
    found = rule.slow_relation(signals)
    if found is None:
        similarity, given = rule.relation(signals)
        weights = None if given is None else given[0].double().numpy()
        objective = Objective(similarity[0].double().numpy(), weights)
    else:
        objective = Objective(*found)
    if rule.goal == "spread":
        picks = greedy_oracle.spread(objective.similarity, count)
    else:
        assert objective.weights is not None
        picks = greedy_oracle.cover(objective.similarity, objective.weights, count)
    rank = np.argsort(picks, kind="stable")  # of the picks by ascending place
    kept = np.array(picks, np.int64)[rank] + offset
    rows = np.zeros((count, manifest.tower.tokens))
    rows[np.arange(count), kept] = 1.0
    return Chosen(features, kept, lambda x: x[kept], False, rows, rank, objective)


def _planned(
    rule: SelectionRule, features: Features, signals: Signals, manifest: Manifest
) -> Chosen:
    plan = rule.plan(signals, Budget.of(manifest.selection))
    weights = plan.token_weights[0].double().numpy()
    kept = plan.kept[0].numpy()
    rank = None if plan.rank is None else plan.rank[0].numpy()
    return Chosen(features, kept, lambda hidden: weights @ hidden, False, weights, rank)


def weighed_choices(
    chosen: Chosen, kept: NDArray[np.int64], weights: NDArray[np.float32]
) -> Choices:
    """Compare what goes into each token with what the plan says, where it merges in its own way.

    Args:
        chosen: What is right, with weights.
        kept: int64 [dominant], what the graph kept.
        weights: float32 [K, S], of the graph.
    """
    assert chosen.weights is not None
    right = chosen.weights
    if chosen.objective is not None:  # its picks may be others, but each is what it is
        right = np.zeros_like(right)
        right[np.arange(len(kept)), kept] = 1.0
    elif not np.array_equal(kept, chosen.kept):
        return Choices(len(right), np.zeros(0))  # which the kept tokens are judged by
    wrong = np.abs(weights - right).max(axis=1) > _WEIGHT
    return Choices(len(right), np.full(int(wrong.sum()), np.inf))
