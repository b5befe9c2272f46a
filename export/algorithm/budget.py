"""Token budgets, without torch: command lines read them before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vzip.runtime.errors import BudgetError

Merge = Literal["average", "sum"]

# The paper's budgets (54 + 10, 108 + 20, 162 + 30; per tile 27 + 5) all have this ratio.
DOMINANT_PARTS, ALL_PARTS = 27, 32


@dataclass(frozen=True)
class Budget:
    """How many tokens leave the graph, and of which kind.

    Attributes:
        dominant: Tokens kept as they are. With `cls_token`, CLS is one of them.
        contextual: Tokens merged from the rest.
        cls_token: Whether CLS is kept. False drops CLS where the tower has one.
    """

    dominant: int
    contextual: int
    cls_token: bool = True

    def __post_init__(self) -> None:
        for name in ("dominant", "contextual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise BudgetError(
                    f"{name} is {value!r}",
                    expected="an integer of at least 1",
                )
            if value < 1:
                raise BudgetError(
                    f"{name} is {value}",
                    expected="at least 1",
                )

    @property
    def tokens(self) -> int:
        """K, the tokens that leave the graph."""
        return self.dominant + self.contextual

    def check_fits(self, tower_tokens: int, *, tower_has_cls: bool) -> None:
        """Refuse a budget that the tower's tokens can't fill.

        Args:
            tower_tokens: S, CLS included where the tower has one.
            tower_has_cls: Whether token 0 is CLS.

        Raises:
            BudgetError: With the numbers, if fewer tokens are left over than `contextual` asks
                for, if nothing would be compressed, or if CLS is to be kept and there is none.
        """
        if self.cls_token and not tower_has_cls:
            raise BudgetError(
                "cls_token is true but this tower has no CLS token",
                cure="ask for cls_token=False",
            )
        available = tower_tokens - (1 if tower_has_cls and not self.cls_token else 0)
        if self.tokens >= available:
            raise BudgetError(
                f"dominant {self.dominant} + contextual {self.contextual} = {self.tokens} "
                f"tokens, but the tower has {available} to choose from, which leaves nothing "
                "to merge",
                cure=f"lower the budget to at most {available - 1}",
            )


def split_tokens(tokens: int, *, cls_token: bool = True) -> Budget:
    """Split K tokens into dominant and contextual ones in the paper's ratio, 27 : 5.

    64, 128 and 192 give the paper's own splits. Other K are rounded to the nearest dominant count
    (half up) that leaves at least one contextual token.

    Args:
        tokens: K, at least 2.
        cls_token: Whether CLS is kept, as one of the dominant tokens.

    Raises:
        BudgetError: If `tokens` is below 2.
    """
    if tokens < 2:
        raise BudgetError(
            f"tokens is {tokens}",
            expected="at least 2, one dominant and one contextual",
        )
    dominant = min((tokens * DOMINANT_PARTS + ALL_PARTS // 2) // ALL_PARTS, tokens - 1)
    return Budget(dominant, tokens - dominant, cls_token)
