"""Greedy selection as pure functions with static shapes, unrolled: K steps, no loop in the graph.

Axes: B images, N patches in raster order, K tokens.

Sources: coverage with saliency, Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning",
arXiv 2510.24214; the largest minimum distance, Alvar et al., "DivPrune", arXiv 2503.02175. Written
from the papers alone.

Equal gains, and those within `TIE` of the largest, go to the lowest patch. A patch that was picked
loses 1 (coverage) or more than any distance (spread), so that none is picked twice: with fewer
different patches than K all gains are 0, and the lowest patch would come again and again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vzip.export.algorithm.visionzip import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TIE = 1e-5
"""Gains this close to the largest, relative to it, tie."""

FARTHEST = 4.0
"""More than any cosine distance, which is 2 at most."""


def cosines(x: Tensor) -> Tensor:
    """Return the cosines [B, N, N] of vectors [B, N, d]."""
    length = torch.sqrt((x * x).sum(dim=-1, keepdim=True).clamp(min=1e-24))
    directions = x / length
    return torch.matmul(directions, directions.transpose(1, 2))


def centred(x: Tensor) -> Tensor:
    """Return vectors [B, N, d] minus their mean over the N."""
    return x - x.sum(dim=1, keepdim=True) * (1.0 / x.shape[1])


def constant(array: NDArray[np.float64], like: Tensor) -> Tensor:
    """Return numbers that the graph holds as they are, in the dtype of another tensor."""
    return torch.tensor(array, dtype=like.dtype, device=like.device)


def cover(similarity: Tensor, weights: Tensor, count: int) -> Tensor:
    """Pick patches that cover all patches well.

    A patch's gain is its weight times what it adds to the similarity that each patch has with the
    most similar one picked.

    Args:
        similarity: float [B, N, N].
        weights: float [B, N], at least 0.
        count: K, from 1 to N.

    Returns:
        float [B, K, N], one-hot rows, in the order of the picks.
    """
    # Zeros, without reading the batch's shape: [B, 1, N], how well each patch is covered.
    covered = similarity[:, :1].clamp(min=0.0, max=0.0)
    lost = weights.clamp(min=0.0, max=0.0)  # [B, N]
    steps = []
    for _ in range(count):
        added = (similarity - covered).clamp(min=0.0).sum(dim=-1)  # [B, N]
        step = _best(weights * added + lost)
        steps.append(step)
        lost = lost - step.squeeze(1)
        covered = _larger(covered, torch.matmul(step, similarity))
    return torch.cat(steps, dim=1)


def spread(similarity: Tensor, count: int) -> Tensor:
    """Pick patches that are far apart: each time the one whose nearest pick is the farthest.

    The first is the one whose nearest other patch is the farthest. The distance is 1 minus the
    similarity.

    Args:
        similarity: float [B, N, N].
        count: K, from 1 to N.

    Returns:
        float [B, K, N], one-hot rows, in the order of the picks.
    """
    patches = similarity.shape[1]
    itself = FARTHEST * torch.eye(patches, dtype=similarity.dtype, device=similarity.device)
    nearest = (similarity - itself).amax(dim=-1).unsqueeze(1)  # [B, 1, N]
    lost = nearest.squeeze(1).clamp(min=0.0, max=0.0)
    steps: list[Tensor] = []
    for number in range(count):
        step = _best((1.0 - nearest.squeeze(1)).clamp(min=0.0) + lost)
        steps.append(step)
        lost = lost - FARTHEST * step.squeeze(1)
        row = torch.matmul(step, similarity)
        nearest = row if number == 0 else _larger(nearest, row)
    return torch.cat(steps, dim=1)


def plan_of_steps(steps: Tensor, *, cls_token: bool) -> Plan:
    """Return the plan that keeps the picks as they are, by ascending place.

    Args:
        steps: [B, K, N], one-hot rows, in the order of the picks.
        cls_token: Whether token 0 of the tower is CLS.
    """
    count, patches = steps.shape[1], steps.shape[2]
    # As floats, which are exact up to 2**24: integer TopK fails before TensorRT 8.6.
    numbers = torch.arange(patches, dtype=torch.float32, device=steps.device)
    picked = (steps.float() * numbers).sum(dim=-1)  # [B, K]
    lowest_first = torch.topk(-picked, count, dim=1)
    offset = int(cls_token)
    ascending = offset - lowest_first.values  # of all tower tokens
    kept = ascending.long()
    # Without CLS the two are the same, and as one value they would be a graph's two outputs.
    positions = (ascending - offset).clamp(min=0.0).long()
    rows = (kept.unsqueeze(-1) == torch.arange(patches + offset, device=steps.device)).float()
    return Plan(kept, rows, positions, lowest_first.indices)


def _best(gain: Tensor) -> Tensor:
    """Return [B, 1, N], one-hot: the lowest of those whose gain [B, N] is as good as the best."""
    patches = gain.shape[1]
    as_good = (gain >= gain.amax(dim=1, keepdim=True) * (1.0 - TIE)).to(gain.dtype)
    # Of those that tie the first has the largest number: ArgMax has one answer on every backend.
    falling = torch.arange(patches, 0, -1, dtype=gain.dtype, device=gain.device)
    choice = torch.argmax(as_good * falling, dim=1, keepdim=True)  # [B, 1]
    numbers = torch.arange(patches, device=gain.device)
    return (choice.unsqueeze(-1) == numbers).to(gain.dtype)


def _larger(one: Tensor, other: Tensor) -> Tensor:
    """Return the elementwise maximum of [B, 1, N] each, with operators that a graph may hold."""
    return torch.cat([one, other], dim=1).amax(dim=1, keepdim=True)
