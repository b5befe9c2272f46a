"""One way to compress, of several that are compared."""

from __future__ import annotations

from dataclasses import dataclass

from vzip.export.algorithm.budget import Budget, Merge


@dataclass(frozen=True)
class Variant:
    """One way to compress.

    Attributes:
        budget: Its tokens.
        merge: How the contextual ones are formed.
    """

    budget: Budget
    merge: Merge

    @property
    def name(self) -> str:
        """What tells it from the others, such as ``64-average``."""
        return f"{self.budget.tokens}-{self.merge}"
