"""Patches that cover the picture: like the others, near to them, and looked at.

One patch is picked after the other. Each time it is the one that adds most to how well all patches
are covered, times the power `alpha` of its attention score. A patch is covered by the picks' most
similar one: by the cosine of keys or features, and with the share `place` by nearness in the grid.

Without the place term, vectors lose their mean over the picture first: what all patches have in
common makes them alike. The place term gains more than that, and was tuned on a grid of 14 × 14
patches of one demo model alone: calibrate it before it is believed (docs/selections.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from vzip.export.algorithm import greedy_oracle
from vzip.export.algorithm.rules import GreedySelection, Relation, Signals, SlowRelation
from vzip.export.algorithm.selections import register
from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Self

FEATURES = ("keys", "tower")
ALPHAS = (0.0, 0.5, 1.0)
SIDE = 0.107
"""The radius as a share of the grid's side, where none is given: 1.5 of 14 patches, 2.6 of 24."""

SMALLEST = 1e-24


@register("coverage")
@dataclass(frozen=True)
class Coverage(GreedySelection):
    """The selection, with its options.

    Attributes:
        place: The share of nearness in the similarity, from 0 to 1.
        radius: The distance, in patches, of nearness' normal curve; 0 is `SIDE` of the grid's side.
        alpha: The power of the attention score: 0, 0.5 or 1. Others need operators that a graph
            may not hold.
        features: What similarity is of: ``keys``, summed over heads, or ``tower``, the features
            that the projector takes.

    Raises:
        InvalidInputError: An option is out of range.
    """

    place: float = 0.0
    radius: float = 0.0
    alpha: float = 0.5
    features: str = "keys"

    centres: ClassVar[bool] = True
    """Whether vectors lose their mean where there is no place term."""

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("place", lambda value: 0 <= value <= 1, "from 0 to 1"),
            ("radius", lambda value: 0 <= value <= 1e6, "patches above 0, or 0 for the grid's own"),
            ("alpha", lambda value: value in ALPHAS, "0, 0.5 or 1"),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not good(value):
                raise InvalidInputError(f"the option {name} is {value!r}", expected=expected)
            object.__setattr__(self, name, float(value))
        if self.features not in FEATURES:
            raise InvalidInputError(
                f"the option features is {self.features!r}", expected=" or ".join(FEATURES)
            )

    @property
    def uses_attention(self) -> bool:  # type: ignore[override] # a property of the options
        """Whether the attention's side branch is in the graph."""
        return self.alpha > 0

    def settled(self, grid: tuple[int, int]) -> Self:
        """Return the rule with a radius for the grid."""
        return replace(self, radius=self.radius or max(round(SIDE * grid[0], 1), 0.1))

    def relation(self, signals: Signals) -> Relation:
        """See `GreedySelection.relation`."""
        from vzip.export.algorithm import greedy

        vectors = _vectors(self.features, signals)
        if self.centres and not self.place:
            vectors = greedy.centred(vectors)
        similarity = greedy.cosines(vectors)
        if self.place:
            near = greedy.constant(
                nearness(signals.grid, self.settled(signals.grid).radius), vectors
            )
            similarity = similarity * (1.0 - self.place) + near * self.place
        return Relation(similarity, self._weights(signals, vectors))

    def _weights(self, signals: Signals, vectors: Tensor) -> Tensor:
        import torch

        if self.alpha:
            scores = signals.attention_scores().clamp(min=SMALLEST)  # below 0 in the padding
            return torch.sqrt(scores) if self.alpha == 0.5 else scores
        if signals.pictured is not None:
            return signals.pictured().clamp(min=math.sqrt(SMALLEST))
        return vectors[:, :, 0].clamp(min=1.0, max=1.0)  # ones, without reading the batch's shape

    def slow_relation(self, signals: Signals) -> SlowRelation:
        """See `GreedySelection.slow_relation`."""
        found = _vectors(self.features, signals)[0].double().numpy()
        similarity = greedy_oracle.similarity(
            found,
            signals.grid,
            centre=self.centres and not self.place,
            place=self.place,
            radius=self.settled(signals.grid).radius,
        )
        weights = np.ones(signals.patches)
        if self.alpha:
            scores = signals.attention_scores()[0].double().numpy()
            weights = np.maximum(scores, SMALLEST) ** self.alpha
        elif signals.pictured is not None:
            weights = np.maximum(signals.pictured()[0].double().numpy(), math.sqrt(SMALLEST))
        return SlowRelation(similarity, weights)


def nearness(grid: tuple[int, int], radius: float) -> NDArray[np.float64]:
    """Return [N, N]: 1 for a patch and itself, less the farther two are apart in the grid."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    squares = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2
    near: NDArray[np.float64] = np.exp(-squares / (2 * radius**2))
    return near


def _vectors(features: str, signals: Signals) -> Tensor:
    """Return what similarity is of, [B, N, d]."""
    first = int(signals.cls_token)
    if features == "tower":
        return signals.hidden()[:, first:]
    return signals.keys.sum(dim=1)[:, first:]
