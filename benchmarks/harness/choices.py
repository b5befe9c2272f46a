"""Ways to choose K tokens of a picture, as `benchmarks.sinks` compares them.

Those that merge do it as VisionZip does, with this package's own plan; places of merged tokens are
those of their targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness.views import Float, Seen
from vzip.export.algorithm.budget import Budget, split_tokens
from vzip.export.algorithm.visionzip import Plan, apply_plan, make_plan

SINK = 3.0
"""A patch is a sink whose hidden state is this many times as long as the picture's median."""
EARLY = 4
"""The layer, counted from 0, whose attention is taken instead. Sinks form in the three after it:
what becomes one has 1.3 times the others' norm after this layer, and 2.8, 6.3 and 17 times after
the next ones; of CLS's attention it gets no more here than others."""
NOWHERE = -1


@dataclass(frozen=True)
class Chosen:
    """What is kept of a picture.

    Attributes:
        tokens: [K, D].
        places: int [K], the patch that a token is, or was merged into; `NOWHERE` of CLS.
        dominant: int [patches kept as they are].
    """

    tokens: Float
    places: NDArray[np.int64]
    dominant: NDArray[np.int64]


def farness(chosen: Chosen, patches: Float) -> float:
    """Return how far the nearest dominant patch is from a patch, on average over [N, 2] places."""
    apart = patches[:, None] - patches[chosen.dominant][None]
    return float(np.sqrt((apart**2).sum(-1)).min(1).mean())


Choice = Callable[[Seen, int, np.random.Generator], Chosen]


def sinks(seen: Seen) -> NDArray[np.bool_]:
    """Return bool [N]: the patches whose hidden state is far longer than the others'."""
    norms = np.linalg.norm(seen.hidden[1:], axis=1)
    return norms > SINK * np.median(norms)


def published(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """VisionZip as published: CLS's attention in the layer before the last."""
    return _visionzip(seen, seen.attention[-2], tokens)


def unscored(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """The same, sinks left out of the score: they can be merged, and merged into, not kept."""
    return _visionzip(seen, np.where(sinks(seen), -1, seen.attention[-2]), tokens)


def without(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """The same, sinks left out altogether: neither kept nor merged."""
    return _visionzip(seen, seen.attention[-2], tokens, ~sinks(seen))


def early(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """The same by CLS's attention of an early layer."""
    return _visionzip(seen, seen.attention[EARLY], tokens)


def scope(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """SCOPE: greedily the patch whose attention times gained coverage is greatest.

    Coverage of a patch is its greatest cosine with a kept one; features of the tower, α = 1. No
    CLS, nothing merged.
    """
    patches = seen.hidden[1:].astype(np.float64)
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    similarity = patches @ patches.T
    weight = seen.attention[-2].astype(np.float64)
    covered = np.zeros(len(patches))
    bias = np.zeros(len(patches))
    for _ in range(tokens):
        gain = weight * np.maximum(similarity - covered, 0).sum(1) + bias
        best = int(np.argmax(gain >= (1 - 1e-5) * gain.max()))
        bias[best] -= 1
        covered = np.maximum(covered, similarity[best])
    kept = np.flatnonzero(bias)
    return Chosen(seen.hidden[1 + kept], kept, kept)


def random(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:
    """Patches drawn anew for every picture; the rest is merged."""
    return _visionzip(seen, rng.permutation(len(seen.hidden) - 1).astype(np.float32), tokens)


def uniform(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """Patches spread evenly over the raster; the rest is merged."""
    patches, kept = len(seen.hidden) - 1, split_tokens(tokens)[0] - 1
    scores = np.zeros(patches, np.float32)
    scores[(2 * np.arange(kept) + 1) * patches // (2 * kept)] = 1
    return _visionzip(seen, scores, tokens)


def everything(seen: Seen, tokens: int, rng: np.random.Generator) -> Chosen:  # noqa: ARG001
    """All tokens: what a probe gives at best."""
    patches = np.arange(len(seen.hidden) - 1)
    return Chosen(seen.hidden, np.concatenate([[NOWHERE], patches]), patches)


def _visionzip(
    seen: Seen, scores: Float, tokens: int, among: NDArray[np.bool_] | None = None
) -> Chosen:
    """Return VisionZip's tokens by other scores [N], of some patches alone where `among` is."""
    budget = Budget(*split_tokens(tokens))
    if among is None:
        among = np.ones(len(scores), np.bool_)
    patches = np.flatnonzero(among)
    of_tower = np.concatenate([[0], 1 + patches])
    plan: Plan = make_plan(
        torch.from_numpy(scores[patches].astype(np.float32))[None],
        torch.from_numpy(seen.keys[of_tower])[None, None],
        budget,
    )
    made = apply_plan(plan, torch.from_numpy(seen.hidden[of_tower])[None])[0].numpy()
    kept = plan.kept[0].numpy()
    rest = np.setdiff1d(np.arange(len(of_tower)), kept)
    targets = rest[:: max(1, len(rest) // budget.contextual)][: budget.contextual]
    dominant = patches[kept[1:] - 1]
    places = np.concatenate([[NOWHERE], dominant, patches[targets - 1]])
    return Chosen(made, places, dominant)


CHOICES: dict[str, Choice] = {
    "VisionZip as published": published,
    "sinks out of the score": unscored,
    "sinks out altogether": without,
    f"attention of layer {EARLY}": early,
    "SCOPE": scope,
    "uniform": uniform,
    "random": random,
}
"""What is compared, under the names of the table; the first is what the others are held against."""
