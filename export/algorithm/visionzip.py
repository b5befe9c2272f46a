"""VisionZip's selection and merging, as pure functions with static shapes.

Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
arXiv 2412.04467, and its published code (`merge="sum"`; the paper's average is `merge="average"`).

Axes: B images; S tower tokens, CLS first where the tower has one; N patches (S − 1 with CLS, else
S); H heads; d head width; D feature width; K = dominant + contextual output tokens.

Planning and applying are apart. `make_plan` reads scores and keys once and answers with the kept
indices, one matrix `token_weights` [B, K, S] and the patch that each row stands for; `apply_plan`
multiplies any features of those S tokens by the matrix. Row k < dominant of it is one-hot; row
dominant + c holds what is merged into contextual token c. Everything is a sort, a comparison or a
matrix product: no mask indexing, no data-dependent shape, so the same code is traced into the ONNX
graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vzip.export.algorithm.budget import Budget, Merge
from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Cosines of FP32 keys carry rounding of about 1e-7, and a matrix product may round equal columns
# differently. Targets closer than this to the best one tie, and the first of them wins.
TIE_TOLERANCE = 2.5e-7


class Plan(NamedTuple):
    """Which tower tokens make which output token.

    Attributes:
        kept: int64 [B, dominant], ascending indices of tower tokens (with CLS: 0 is CLS).
        token_weights: float32 [B, K, S]; output token k is the sum over s of
            `token_weights[b, k, s] * features[b, s]`. Dominant rows first, then contextual rows
            in target order.
        positions: int64 [B, K], the patch that each output token stands for, 0 … N − 1 in raster
            order: a kept token's own, a contextual token's target. 0 for CLS.
        rank: int64 [B, K], the step at which a greedy selection chose each output token; None where
            tokens aren't chosen one after the other.
    """

    kept: Tensor
    token_weights: Tensor
    positions: Tensor
    rank: Tensor | None = None


def cls_scores(cls_attention: Tensor) -> Tensor:
    """Score patches by the attention that CLS pays them.

    Args:
        cls_attention: [B, H, S], post-softmax attention of the CLS query, CLS column included.

    Returns:
        float32 [B, N]: the sum over heads, for the patches in raster order.
    """
    return cls_attention.float().sum(dim=1)[:, 1:]


def received_scores(attention: Tensor) -> Tensor:
    """Score tokens by the attention they receive: the score of towers without CLS (SigLIP).

    Args:
        attention: [B, H, queries, S], post-softmax.

    Returns:
        float32 [B, S]: the mean over heads and queries.
    """
    heads_and_queries = attention.shape[1] * attention.shape[2]
    return attention.float().sum(dim=(1, 2)) * (1.0 / heads_and_queries)


def fixed_scores(scores: NDArray[np.float64], keys: Tensor) -> Tensor:
    """Return the same scores [N] for every image of a batch: float32 [B, N].

    Args:
        scores: One per patch, exact in FP32.
        keys: [B, H, S, d], for the batch alone.
    """
    row = torch.tensor(scores, dtype=torch.float32)
    one = keys[:, :1, :1, :1].squeeze(3).squeeze(2)  # [B, 1]
    return row + one.float().clamp(min=0.0, max=0.0)  # zeros, without reading B


def make_plan(scores: Tensor, keys: Tensor, budget: Budget) -> Plan:
    """Choose the dominant tokens and the groups of the contextual ones.

    Equal scores: the lower index is kept. Equal similarities (within `TIE_TOLERANCE`): the first
    target takes the token.

    Args:
        scores: float32 [B, N], one per patch.
        keys: [B, H, S, d], k_proj's output of the selected layer, before any scaling.
        budget: The numbers of tokens. Its `merge` "average" is the paper's
            (target + Σ merged) / (1 + count); "sum" is the published code's target + mean(merged).

    Returns:
        The plan.

    Raises:
        BudgetError: If the budget does not fit the number of tokens.
        InvalidInputError: If shapes don't agree.
    """
    tower_tokens, patches = keys.shape[2], scores.shape[1]
    if tower_tokens - patches not in (0, 1):
        raise InvalidInputError(
            f"scores are for {patches} patches and keys for {tower_tokens} tokens",
            expected="as many tokens as patches, or one more (CLS)",
        )
    has_cls = tower_tokens == patches + 1
    budget.check_fits(tower_tokens, tower_has_cls=has_cls)

    kept = _kept_indices(scores, budget, offset=1 if has_cls else 0)
    positions = torch.arange(tower_tokens, device=scores.device)
    kept_rows = (kept.unsqueeze(-1) == positions).float()  # [B, dominant, S]
    if not budget.contextual:
        patches_kept = (kept.float() - int(has_cls)).clamp(min=0.0)
        return Plan(kept, kept_rows, patches_kept.long())
    rest = 1.0 - kept_rows.sum(dim=1)  # [B, S], 1 for tokens neither kept nor dropped
    drops_cls = has_cls and not budget.cls_token
    if drops_cls:
        rest = rest * (positions > 0).float()

    rest_count = tower_tokens - budget.dominant - (1 if drops_cls else 0)
    # How many of the rest stand before a token: all that do, less the kept and dropped ones up to
    # it. A running sum would say the same; TensorRT 8.6 to 10.7 make a loop of S steps of CumSum.
    kept_before = (positions >= kept.unsqueeze(-1)).float().sum(dim=1)  # [B, S]
    rank = (positions - int(drops_cls)).float() - kept_before  # of a token that is in the rest
    targets, contextual_rows = _contextual_rows(keys, rest, rank, budget, rest_count=rest_count)
    # As floats, exact: no number is beyond 2**24. By a sum and not a product of matrices, which a
    # GPU may round to 11 bits.
    target_tokens = (targets * positions.float()).sum(dim=-1)  # [B, contextual]
    tokens = torch.cat([kept.float(), target_tokens], dim=1) - int(has_cls)
    return Plan(kept, torch.cat([kept_rows, contextual_rows], dim=1), tokens.clamp(min=0.0).long())


def apply_plan(plan: Plan, features: Tensor) -> Tensor:
    """Gather the dominant and merge the contextual tokens.

    Args:
        plan: From `make_plan`.
        features: [B, S, D] of the same S tokens, any floating dtype.

    Returns:
        [B, K, D] in the dtype of `features`, computed in FP32.
    """
    return torch.matmul(plan.token_weights, features.float()).to(features.dtype)


def compress(
    hidden: Tensor,
    keys: Tensor,
    cls_attention: Tensor,
    *,
    dominant: int,
    contextual: int,
    merge: Merge = "average",
    cls_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compress the tokens of a tower that has a CLS token.

    Args:
        hidden: [B, S, D], features of the selected layer, CLS first.
        keys: [B, H, S, d], k_proj's output of that layer.
        cls_attention: [B, H, S], post-softmax attention of the CLS query.
        dominant: Tokens kept; CLS is one of them when `cls_token` is true.
        contextual: Tokens merged from the rest.
        merge: "average" (paper) or "sum" (published code).
        cls_token: Keep CLS; otherwise CLS is neither kept nor merged.

    Returns:
        `(tokens, kept)`: [B, K, D] in the dtype of `hidden`, dominant tokens in spatial order and
        then contextual ones in target order; int64 [B, dominant], ascending, 0 is CLS.

    Raises:
        BudgetError: If the budget does not fit the number of tokens.
        InvalidInputError: If the shapes don't agree or `merge` is unknown.
    """
    expected = "hidden [B, S, D], keys [B, H, S, d] and cls_attention [B, H, S]"
    shapes = f"{tuple(hidden.shape)}, {tuple(keys.shape)} and {tuple(cls_attention.shape)}"
    if (hidden.ndim, keys.ndim, cls_attention.ndim) != (3, 4, 3):
        raise InvalidInputError(
            f"got shapes {shapes}",
            expected=f"{expected}",
        )
    batch_heads_tokens = tuple(keys.shape[:3])
    if batch_heads_tokens != tuple(cls_attention.shape) or tuple(hidden.shape[:2]) != (
        keys.shape[0],
        keys.shape[2],
    ):
        raise InvalidInputError(
            f"got shapes {shapes} that don't agree",
            expected=f"{expected}",
        )
    budget = Budget(dominant, contextual, cls_token, merge=merge)
    plan = make_plan(cls_scores(cls_attention), keys, budget)
    return apply_plan(plan, hidden), plan.kept


def _kept_indices(scores: Tensor, budget: Budget, *, offset: int) -> Tensor:
    """Return int64 [B, dominant], ascending tower indices of the kept tokens."""
    patches = budget.dominant - (1 if budget.cls_token else 0)
    if patches == 0:
        return (scores[:, :1] * 0.0).long()  # CLS alone, without reading the batch's shape
    best = _top_indices(scores, patches)
    # A second sort, on positions, brings spatial order. As floats: integer TopK input fails before
    # TensorRT 8.6. Positions are far below 2**24, so they are exact.
    ascending = offset - torch.topk(-best.float(), patches, dim=1).values
    if budget.cls_token:
        ascending = functional.pad(ascending, (1, 0))  # CLS, index 0, in front
    return ascending.long()


def _top_indices(scores: Tensor, count: int) -> Tensor:
    """Return int64 [B, count], best first; the lower index wins a tie."""
    if torch.compiler.is_exporting():
        return torch.topk(scores, count, dim=1).indices  # ONNX TopK has this rule
    # torch.topk leaves the order of equal values open; a stable sort has TopK's rule.
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]


def _contextual_rows(
    keys: Tensor, rest: Tensor, rank: Tensor, budget: Budget, *, rest_count: int
) -> tuple[Tensor, Tensor]:
    """Return targets and weights of contextual tokens, each float32 [B, contextual, S].

    A row of targets is one-hot; weights are those of every tower token in the contextual ones.

    `rest` is float32 [B, S], 1 for the `rest_count` tokens of every image that can be merged, and
    `rank` float32 [B, S], a token's number among them in spatial order.
    """
    contextual = budget.contextual
    target_number = torch.arange(contextual, device=keys.device)

    # Targets: every `step`-th of the rest, by rank in spatial order.
    step = max(1, rest_count // contextual)
    target_ranks = (target_number * step).to(rank.dtype).unsqueeze(-1)  # [contextual, 1]
    targets = (rank.unsqueeze(1) == target_ranks).float() * rest.unsqueeze(1)  # [B, contextual, S]
    merged = rest - targets.sum(dim=1)  # [B, S]

    # Cosine similarity of the head-averaged keys. Their sum serves as well: length cancels out.
    summed = keys.float().sum(dim=1)  # [B, S, d]
    square_length = (summed * summed).sum(dim=-1, keepdim=True)
    directions = summed / torch.sqrt(square_length.clamp(min=1e-24))
    target_directions = torch.matmul(targets, directions)  # [B, contextual, d], exact: one-hot
    similarity = torch.matmul(directions, target_directions.transpose(1, 2))  # [B, S, contextual]

    # Among the targets as good as the best the first has the largest number here, so the ArgMax
    # has one answer on every backend, also where ties are left open (TensorRT).
    as_good = (similarity >= similarity.amax(dim=-1, keepdim=True) - TIE_TOLERANCE).float()
    choice = torch.argmax(as_good * (contextual - target_number).float(), dim=-1)  # [B, S]
    assigned = (choice.unsqueeze(1) == target_number.unsqueeze(-1)).float() * merged.unsqueeze(1)
    count = assigned.sum(dim=-1, keepdim=True)  # [B, contextual, 1]
    if budget.merge == "average":
        return targets, (targets + assigned) / (1.0 + count)
    return targets, targets + assigned / count.clamp(min=1.0)
