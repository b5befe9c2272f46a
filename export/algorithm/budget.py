"""Which tokens leave the graph: parsed once, checked once against the architecture, trusted after.

Nothing here needs torch: command lines read a budget before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, get_args

from vzip.export import defaults
from vzip.runtime.errors import BudgetError, InvalidInputError
from vzip.runtime.files.codec import OPTIONAL
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.export.architecture import VisionConfig
    from vzip.runtime.bundle.manifest import Selection

Merge = Literal["average", "sum"]
VISIONZIP = "visionzip"
"""The selection that is the paper's."""

# The paper's budgets (54 + 10, 108 + 20, 162 + 30; per tile 27 + 5) all have this ratio.
DOMINANT_PARTS, ALL_PARTS = 27, 32


@dataclass(frozen=True)
class Budget:
    """How many tokens leave the graph, of which kind, and how they are chosen and merged.

    A bundle's manifest holds these fields as its ``selection``.

    Attributes:
        method: A name of `vzip.export.algorithm.selections`, which chooses the dominant tokens.
        dominant: Tokens kept as they are. With `cls_token`, CLS is one of them.
        contextual: Tokens merged from the rest; with 0 the rest is left out.
        merge: How contextual tokens are formed: "average" is the paper's, "sum" the published
            code's.
        cls_token: Whether CLS is kept. False drops CLS where the tower has one.
        options: Name → value of what the method is made with, all of them.

    Raises:
        BudgetError: A number isn't an integer, of at least 1, or 0 for `contextual`.
        InvalidInputError: `merge` is unknown.
    """

    method: str = field(default=VISIONZIP, kw_only=True)
    dominant: int
    contextual: int
    merge: Merge = field(default="average", kw_only=True)
    cls_token: bool = True
    options: Mapping[str, float | str] = field(
        default_factory=dict, kw_only=True, hash=False, metadata=OPTIONAL
    )

    def __post_init__(self) -> None:
        _check_count("dominant", self.dominant, least=1)
        _check_count("contextual", self.contextual, least=0)
        if self.merge not in get_args(Merge):
            raise InvalidInputError(
                f"merge is {self.merge!r}", expected=f"one of {', '.join(get_args(Merge))}"
            )

    @classmethod
    def of(cls, selection: Selection) -> Budget:
        """Return the budget that a bundle's manifest holds."""
        return cls(**{each.name: getattr(selection, each.name) for each in fields(cls)})

    @classmethod
    def from_options(
        cls,
        config: VisionConfig,
        *,
        tokens: int | None = None,
        dominant: int | None = None,
        contextual: int | None = None,
        merge: Merge = "average",
        cls_token: bool = True,
        selection: str = VISIONZIP,
        options: Mapping[str, float | str] | None = None,
        merges: bool = True,
    ) -> Budget:
        """Return the budget that a user asked for; it fits the tower.

        A tower without CLS keeps none.

        Args:
            config: The architecture.
            tokens: K of an image, a tile or a frame, see `split_tokens`. None, where the parts are
                not given either, is the model's default.
            dominant: Instead of `tokens`, together with `contextual`.
            contextual: Instead of `tokens`, together with `dominant`.
            merge: As the attribute.
            cls_token: As the attribute.
            selection: The attribute `method`.
            options: As the attribute.
            merges: Whether `tokens` is split; else all of them are dominant.

        Raises:
            BudgetError: The options contradict each other, or the tower's tokens can't fill the
                budget.
            InvalidInputError: `merge` is unknown.
        """
        if tokens is not None and (dominant, contextual) != (None, None):
            raise BudgetError(
                f"tokens {tokens}, dominant {dominant} and contextual {contextual} were given",
                expected="either tokens, the sum, or its parts",
                cure="leave out one or the other",
            )
        if dominant is None and contextual is None:
            tokens = defaults.tokens(config) if tokens is None else tokens
            dominant, contextual = split_tokens(tokens) if merges else (tokens, 0)
        if dominant is None or contextual is None:
            raise BudgetError(
                f"dominant is {dominant} and contextual is {contextual}",
                expected="both of them",
                cure="give the other one too, or tokens for the sum",
            )
        has_cls = config.tower.cls_token
        budget = cls(
            dominant,
            contextual,
            cls_token and has_cls,
            merge=merge,
            method=selection,
            options=dict(options or {}),
        )
        budget.check_fits(config.tokens, tower_has_cls=has_cls)
        return budget

    @property
    def tokens(self) -> int:
        """K, the tokens that leave the graph."""
        return self.dominant + self.contextual

    @property
    def name(self) -> str:
        """What tells it from other budgets of a sweep, such as ``64-average``."""
        return f"{self.tokens}-{self.merge}"

    def __str__(self) -> str:
        cls = "CLS among the dominant" if self.cls_token else "without CLS"
        parts = f"{self.dominant} dominant + {self.contextual} contextual"
        if not self.contextual:
            parts = "none merged"
        return f"{counted(self.tokens, 'token')} = {parts}, {cls}"

    def check_fits(self, tower_tokens: int, *, tower_has_cls: bool) -> None:
        """Refuse a budget that the tower's tokens can't fill.

        Args:
            tower_tokens: S, CLS included where the tower has one.
            tower_has_cls: Whether token 0 is CLS.

        All patches as they are, with nothing merged and without CLS, are the uncompressed image.

        Raises:
            BudgetError: With the numbers, if fewer tokens are left over than `contextual` asks
                for, if nothing would be left out of a budget that merges or keeps CLS, or if CLS is
                to be kept and there is none.
        """
        if self.cls_token and not tower_has_cls:
            raise BudgetError(
                "cls_token is true",
                expected="false, since this tower has no CLS token",
                cure="ask for cls_token=False",
            )
        available = tower_tokens - (1 if tower_has_cls and not self.cls_token else 0)
        whole = not (self.contextual or self.cls_token)
        if self.tokens >= available + whole:
            limit = "at most" if whole else "fewer than"
            raise BudgetError(
                f"dominant {self.dominant} + contextual {self.contextual} = {self.tokens} tokens",
                expected=f"{limit} the {available} tokens that the tower has to choose from",
                cure=f"lower the budget to at most {available - 1 + whole}",
            )


def split_tokens(tokens: int) -> tuple[int, int]:
    """Split K tokens into dominant and contextual ones in the paper's ratio, 27 : 5.

    64, 128 and 192 give the paper's own splits. Other K are rounded to the nearest dominant count
    (half up) that leaves at least one contextual token.

    Args:
        tokens: K, at least 2.

    Raises:
        BudgetError: `tokens` is no integer of at least 2.
    """
    _check_count("tokens", tokens, least=2)
    dominant = min((tokens * DOMINANT_PARTS + ALL_PARTS // 2) // ALL_PARTS, tokens - 1)
    return dominant, tokens - dominant


def _check_count(name: str, value: object, *, least: int) -> None:
    """Refuse what is no number of tokens."""
    if type(value) is not int or value < least:
        raise BudgetError(f"{name} is {value!r}", expected=f"an integer of at least {least}")
