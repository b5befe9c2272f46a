"""A slow oracle of VisionZip, loop by loop in float64, that shares no code with `visionzip.py`.

`vzip check` and the tests compare with it. It is written from `arXiv 2412.04467` and the published
code's behaviour, for clarity alone.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]

# Cosines of FP32 keys carry rounding of about 1e-7; closer ones tie.
TIE = 2.5e-7


def select(scores: Float, count: int) -> list[int]:
    """Return the patches kept, ascending; the lower index wins a tie.

    Args:
        scores: [N], one per patch.
        count: How many patches to keep.
    """
    by_score = sorted(range(len(scores)), key=lambda patch: (-float(scores[patch]), patch))
    return sorted(by_score[:count])


def direction(keys: Float, token: int) -> Float:
    """Return the unit vector [d] of a token's keys [H, S, d], averaged over heads."""
    mean = np.zeros(keys.shape[2])
    for head in range(keys.shape[0]):
        mean += keys[head, token]
    mean /= keys.shape[0]
    length = float(np.sqrt(np.sum(mean * mean)))
    return mean / length if length > 0 else mean


def cosine(keys: Float, one: int, other: int) -> float:
    """Return the similarity of two tokens by their keys [H, S, d]."""
    return float(np.sum(direction(keys, one) * direction(keys, other)))


def group(keys: Float, rest: list[int], contextual: int, tie: float = TIE) -> dict[int, list[int]]:
    """Assign every token of the rest that is not a target to its most similar target.

    Args:
        keys: [H, S, d].
        rest: Tower tokens that were neither kept nor dropped, ascending.
        contextual: How many targets.
        tie: Cosines closer than this tie, and the first target wins.

    Returns:
        Target → the tokens merged into it, in target order.
    """
    if contextual == 0:
        return {}
    step = max(1, len(rest) // contextual)
    groups: dict[int, list[int]] = {rest[number * step]: [] for number in range(contextual)}
    directions = {token: direction(keys, token) for token in rest}
    for token in rest:
        if token in groups:
            continue
        similarity = [float(np.sum(directions[token] * directions[target])) for target in groups]
        best = max(similarity)
        for target, value in zip(groups, similarity, strict=True):
            if value >= best - tie:
                groups[target].append(token)
                break
    return groups


def merge_groups(
    hidden: Float, groups: dict[int, list[int]], merge: Literal["average", "sum"]
) -> Float:
    """Return the contextual tokens [contextual, D] of features `hidden` [S, D]."""
    rows = [np.zeros((0, hidden.shape[1]))]
    for target, merged in groups.items():
        row = hidden[target].copy()
        total = np.zeros_like(row)
        for token in merged:
            total += hidden[token]
        if merge == "average":
            row = (row + total) / (1 + len(merged))
        elif merged:
            row = row + total / len(merged)
        rows.append(row[None])
    return np.concatenate(rows)


def compress(
    hidden: Float,
    keys: Float,
    scores: Float,
    *,
    dominant: int,
    contextual: int,
    merge: Literal["average", "sum"],
    cls_token: bool,
    kept: Int | None = None,
    tie: float = TIE,
) -> tuple[Float, Int]:
    """Compress one batch.

    Args:
        hidden: [B, S, D].
        keys: [B, H, S, d].
        scores: [B, N], one per patch; S = N + 1 says that token 0 is CLS.
        dominant: Tokens kept, CLS included where it is kept.
        contextual: Tokens merged from the rest; 0 leaves the rest out.
        merge: The paper's average or the published code's sum.
        cls_token: Whether CLS is kept.
        kept: [B, dominant]; take this selection instead of the scores' own, to judge the merging
            of an implementation whose scores are rounded otherwise.
        tie: Cosines closer than this tie.

    Returns:
        Tokens [B, K, D] and kept indices [B, dominant].
    """
    has_cls = hidden.shape[1] == scores.shape[1] + 1
    tokens, indices = [], []
    for image in range(hidden.shape[0]):
        if kept is None:
            first = [0] if cls_token else []
            patches = select(scores[image], dominant - len(first))
            chosen = first + [patch + int(has_cls) for patch in patches]
        else:
            chosen = [int(index) for index in kept[image]]
        dropped = [0] if has_cls and not cls_token else []
        rest = [t for t in range(hidden.shape[1]) if t not in chosen and t not in dropped]
        groups = group(keys[image], rest, contextual, tie)
        tokens.append(
            np.concatenate([hidden[image][chosen], merge_groups(hidden[image], groups, merge)])
        )
        indices.append(chosen)
    return np.stack(tokens), np.array(indices, dtype=np.int64)
