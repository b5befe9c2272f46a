"""DivPrune: patches whose features are far apart, by the cosine distance.

Source: Alvar et al., arXiv 2503.02175, from the paper alone. It is published for the projector's
output; here distances are of the tower's features, so that the projector sees K tokens alone.
"""

from __future__ import annotations

from vzip.export.algorithm import greedy_oracle
from vzip.export.algorithm.rules import GreedySelection, Relation, Signals, SlowRelation
from vzip.export.algorithm.selections import register


@register("divprune")
class DivPrune(GreedySelection):
    """The largest minimum distance, picked greedily; it needs no attention."""

    goal = "spread"

    def relation(self, signals: Signals) -> Relation:
        """See `GreedySelection.relation`."""
        from vzip.export.algorithm.greedy import cosines

        return Relation(cosines(signals.hidden()[:, int(signals.cls_token) :]), None)

    def slow_relation(self, signals: Signals) -> SlowRelation:
        """See `GreedySelection.slow_relation`."""
        features = signals.hidden()[0, int(signals.cls_token) :].double().numpy()
        return SlowRelation(greedy_oracle.similarity(features, signals.grid, centre=False), None)
