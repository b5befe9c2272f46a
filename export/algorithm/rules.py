"""What a selection is: a class of a few lines, by one of three bases.

`SelectionRule` plans by itself. `ScoredSelection` says a number of each patch, the highest are kept
and the rest is merged as VisionZip does. `GreedySelection` says how alike patches are, and one is
picked after the other. The base decides how a graph is judged beside the untouched model, whose
signals go through the same plan.

Axes: B images; S tokens that are selected from, CLS first where the tower has one; N patches; H
heads; d head width; F feature width. Nothing here needs torch until a plan is made.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from vzip.runtime.errors import BudgetError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Self

    from vzip.export.algorithm.budget import Budget
    from vzip.export.algorithm.visionzip import Plan

Goal = Literal["coverage", "spread"]
"""What a greedy selection raises: how well picks cover all patches, or how far they are apart."""


@dataclass(frozen=True)
class Signals:
    """What the tower offers a selection, while the graph is traced.

    What is called is computed then: a graph holds no branch that its selection doesn't ask for.

    Attributes:
        keys: float32 [B, H, S, d], k_proj's output of the deepest feature layer (pooled, where the
            tokens are).
        cls_token: Whether token 0 is CLS; the other N tokens are patches in raster order.
        attention_scores: Gives float32 [B, N], VisionZip's score of every patch from that layer's
            attention.
        hidden: Gives float32 [B, S, F], the feature layers' output before the projector (pooled,
            where the tokens are).
        grid: Rows and columns of the patches.
        pictured: Gives float32 [B, N], 1 for patches that show something and 0 for padding; None
            where the graph tells no padding. `attention_scores` of padding are below 0 then.
    """

    keys: Tensor
    cls_token: bool
    attention_scores: Callable[[], Tensor]
    hidden: Callable[[], Tensor]
    grid: tuple[int, int]
    pictured: Callable[[], Tensor] | None = None

    @property
    def patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


class SelectionRule(ABC):
    """One way to choose. A subclass that is a frozen dataclass has its fields as options.

    Judged by the kept tokens and their weights, which must be those of the same plan on the
    untouched model's signals: no difference counts as rounding.

    Attributes:
        uses_attention: Whether `plan` asks for `Signals.attention_scores`.
        merges: Whether it can make contextual tokens.
        keeps_cls: Whether it can keep CLS.
        ranked: Whether its plans say the step at which each token was chosen (`Plan.rank`).
    """

    uses_attention: bool | property = False
    merges: ClassVar[bool] = True
    keeps_cls: ClassVar[bool] = True
    ranked: ClassVar[bool] = False

    @abstractmethod
    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """Return which tower tokens make which output token.

        Traced into the graph: see `vzip.export.algorithm.visionzip` for what that allows.

        Args:
            signals: Of a batch.
            budget: How many tokens.

        Raises:
            BudgetError: The budget doesn't fit the number of tokens.
        """

    def settled(self, grid: tuple[int, int]) -> Self:  # noqa: ARG002 - for those that depend on it
        """Return the rule with what it leaves open for a grid of rows and columns."""
        return self

    @property
    def options(self) -> Mapping[str, float | str]:
        """What it was made with, by name; as a bundle's manifest holds it."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}

    def check(self, budget: Budget) -> None:
        """Refuse a budget that it can't fill.

        Raises:
            BudgetError: CLS is to be kept, or tokens are to be merged, and it does neither.
        """
        if budget.contextual and not self.merges:
            raise BudgetError(
                f"contextual is {budget.contextual} with the selection {budget.method!r}",
                expected="0",
                cause="it merges nothing",
                cure="give tokens (--tokens) alone, or contextual 0",
            )
        if budget.cls_token and not self.keeps_cls:
            raise BudgetError(
                f"CLS is to be kept with the selection {budget.method!r}",
                expected="no CLS",
                cause="it chooses among patches alone",
                cure="export with --no-cls (cls_token=False)",
            )


class ScoredSelection(SelectionRule):
    """Keeps the patches with the highest scores and merges the rest as VisionZip does.

    Judged by the kept overlap: a token whose score is within a margin of the last one kept may be
    another.
    """

    @abstractmethod
    def scores(self, signals: Signals, kept: int) -> Tensor:
        """Return the scores [B, N], of the patches; the lower index wins a tie.

        Args:
            signals: Of a batch.
            kept: How many patches are kept.
        """

    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """See `SelectionRule.plan`."""
        from vzip.export.algorithm.visionzip import make_plan

        kept = budget.dominant - int(budget.cls_token)
        return make_plan(self.scores(signals, kept), signals.keys, budget)


class Relation(NamedTuple):
    """How patches are related.

    Attributes:
        similarity: float [B, N, N], symmetric: 1 for a patch and itself.
        weights: float [B, N], above 0, with which a patch's gain counts; None with the goal
            "spread", which has none.
    """

    similarity: Tensor
    weights: Tensor | None


class SlowRelation(NamedTuple):
    """`Relation` of one picture, in float64 and made by other code."""

    similarity: NDArray[np.float64]
    weights: NDArray[np.float64] | None


class GreedySelection(SelectionRule):
    """Picks one patch after the other, each the best beside those before it; merges nothing.

    Judged by what its picks reach of the goal: `vzip.runtime.agreement.objective`. Rounding turns
    picks into others that are as good, and tokens are compared at the same picks.

    Attributes:
        goal: See `Goal`.
    """

    merges = False
    keeps_cls = False
    ranked = True
    goal: ClassVar[Goal] = "coverage"

    @abstractmethod
    def relation(self, signals: Signals) -> Relation:
        """Return how the patches of a batch are related."""

    def slow_relation(self, signals: Signals) -> SlowRelation | None:  # noqa: ARG002
        """Return the same of one picture, loop by loop in float64; None without such an oracle.

        Args:
            signals: Of a batch of one, in float64.
        """
        return None

    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """See `SelectionRule.plan`: rows by ascending place, and the steps as ranks."""
        from vzip.export.algorithm.greedy import cover, plan_of_steps, spread

        self.check(budget)
        tokens = signals.patches + int(signals.cls_token)
        budget.check_fits(tokens, tower_has_cls=signals.cls_token)
        similarity, weights = self.relation(signals)
        if self.goal == "spread":
            steps = spread(similarity, budget.tokens)
        else:
            assert weights is not None
            steps = cover(similarity, weights, budget.tokens)
        return plan_of_steps(steps, cls_token=signals.cls_token)
