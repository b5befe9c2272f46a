"""SCOPE as published: coverage of the tower's features times the attention score, no place term.

Source: Deng et al., arXiv 2510.24214, from the paper.
"""

from __future__ import annotations

from typing import ClassVar

from vzip.export.algorithm.rules import GreedySelection, Relation, Signals, SlowRelation
from vzip.export.algorithm.selections import register
from vzip.export.algorithm.selections.coverage import Coverage


class _Published(Coverage):
    """Coverage of vectors that keep their mean."""

    centres: ClassVar[bool] = False


_RULE = _Published(place=0.0, radius=1.0, alpha=1.0, features="tower")


@register("scope")
class Scope(GreedySelection):
    """It has no options: others are `coverage`'s."""

    uses_attention = True

    def relation(self, signals: Signals) -> Relation:
        """See `GreedySelection.relation`."""
        return _RULE.relation(signals)

    def slow_relation(self, signals: Signals) -> SlowRelation:
        """See `GreedySelection.slow_relation`."""
        return _RULE.slow_relation(signals)
