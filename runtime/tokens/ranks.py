"""One encode, several budgets: which rows a smaller budget would have had.

A greedy selection chooses one patch after the other, so its first 22 picks are what a budget of 22
would have chosen. The graph of such a bundle has the output ``rank``: at which step a row was
chosen. The rows with ``rank < 22``, in the order in which they stand, are that budget's tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vzip.runtime.errors import BudgetError
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.manifest import Manifest

    Index = NDArray[np.int64]

ENDING = -1
"""Rank of a row that ends a line or a clip and belongs to every budget."""


class Ranks(NamedTuple):
    """At which step each token was chosen, 0 … K − 1.

    Attributes:
        tiles: int64 [tiles, K], of each tile, or frame, in the order of its kept indices.
        rows: int64 [n], of each row that the language model gets; `ENDING` for newlines.
    """

    tiles: Index
    rows: Index


def check_tokens(manifest: Manifest, tokens: int | None) -> None:
    """Refuse a budget that a bundle can't give.

    Args:
        manifest: The bundle's.
        tokens: Of each image, tile or frame; None for all that the graph gives.

    Raises:
        BudgetError: It is no integer of 1 … K, or the bundle's tokens have no ranks.
    """
    if tokens is None:
        return
    most = manifest.selection.tokens
    if type(tokens) is not int or not 1 <= tokens <= most:
        raise BudgetError(
            f"tokens is {tokens!r}",
            expected=f"1 to {most}, which this bundle was exported with",
            cure="export another with a larger --tokens" if type(tokens) is int else "",
        )
    if not manifest.has_rank and tokens != most:
        raise BudgetError(
            f"tokens is {tokens}",
            expected=f"{most}, the only budget of this bundle",
            cause=f"its selection {manifest.selection.method} is not nested",
            cure="export one with --selection coverage, or another for this budget",
        )


def check_within(tokens: int, most: int) -> None:
    """Refuse a number of tokens to be cut to.

    Raises:
        BudgetError: It is no integer of 1 … `most`.
    """
    if type(tokens) is not int or not 1 <= tokens <= most:
        raise BudgetError(
            f"tokens is {tokens!r}", expected=f"1 to the {counted(most, 'token')} that there are"
        )


def unranked() -> BudgetError:
    """Return the error for tokens of which a smaller budget is wanted, and that have no ranks."""
    return BudgetError(
        "these tokens have no ranks",
        expected="tokens of a nested selection, from which fewer can be taken",
        cause="the bundle's selection chooses all at once",
        cure="export one with --selection coverage",
    )
