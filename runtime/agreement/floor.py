"""What rounding alone costs each token, and how far beside that a token may be.

Rounding moves a few tokens of a trained tower a hundred times as far as the others: patches that
are half-way to attention sinks. The untouched model in the same precision moves them too, and by
how much is a matter of chance: 0.1 of the largest number in one order of sums and 0.02 in another.
So no single worst token says whether an encoder is right. Its tokens in the mass are judged by
quantiles, and each token beside what was measured of that token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.agreement.found import Values

ROUNDOFF: Final[Mapping[str, float]] = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Precision → the largest relative error of rounding to it once."""

_LISTED: Final = 5


def floor_of(measured: Mapping[str, NDArray[Any]], precision: str) -> NDArray[np.float64] | None:
    """Return what rounding costs each token in a precision.

    A token that magnifies rounding does so in every precision, and may have been lucky in one. So
    what was measured in coarser ones counts as well, in proportion: on real towers that brings the
    largest ratio of a right run's error to the floor from 20 to 3.

    Args:
        measured: Precision → [..., 2], error and 1 minus cosine of each token.
        precision: "fp32", "fp16" or "bf16".

    Returns:
        The same for the precision; None where it wasn't measured in it.
    """
    if precision not in measured:
        return None
    unit = ROUNDOFF[precision]
    scaled = [
        array.astype(np.float64) * np.array([unit / ROUNDOFF[name], (unit / ROUNDOFF[name]) ** 2])
        for name, array in measured.items()
        if ROUNDOFF[name] >= unit
    ]
    highest: NDArray[np.float64] = np.max(scaled, axis=0)
    return highest


_UNSTEADY: Final = 10.0
"""A token is unsteady whose floor is this many times the tokens' median."""


@dataclass(frozen=True)
class Beside:
    """How far tokens may be from the reference's, beside their floor.

    Attributes:
        times: As often as the floor; 1 minus cosine goes with the square.
        error: No token counts whose error is up to this.
        turned: Nor one whose cosine is up to this below 1.
        median: Up to this error the median counts as none, whatever the floor.
        most: Nor does the error that 95 % of the tokens keep to.
        unsteady: Share of the tokens that may be beyond all the same, if rounding alone moves them
            ten times as far as the median: what happens to these is chaos, thirty times the floor
            in a run as right as the next.
    """

    times: float
    error: float
    turned: float
    median: float
    most: float
    unsteady: float = 0.02

    def beyond(self, values: Values) -> NDArray[np.bool_]:
        """Return which tokens are beyond, without those that may be."""
        errors = np.maximum(self.error, self.times * values.floor[:, 0])
        turned = np.maximum(self.turned, self.times**2 * values.floor[:, 1])
        beyond: NDArray[np.bool_] = ~((values.errors <= errors) & (1 - values.cosines <= turned))
        floor = values.floor[:, 0]
        excused = beyond & (floor >= _UNSTEADY * np.median(floor)) & np.isfinite(values.errors)
        if excused.sum() <= self.unsteady * len(beyond):
            beyond &= ~excused
        return beyond

    def judge(self, what: str, values: Values) -> list[str]:
        """Return what falls short, in words; nothing if nothing does.

        Args:
            what: The tokens, for messages.
            values: Of them, with their floor.
        """
        short = []
        for name, share, free in (("median", 0.5, self.median), ("95 %", 0.95, self.most)):
            got, floor = values.quantile(share), np.quantile(values.floor[:, 0], share)
            limit = max(free, self.times * float(floor))
            if not got <= limit:
                short.append(f"error of {what} ({name}) {got:.3g}, expected at most {limit:.3g}")
        if (beyond := self.beyond(values)).any():
            short.append(
                f"{int(beyond.sum())} of {len(beyond)} {what} differ beyond the gate: "
                + _listed(values, beyond)
            )
        return short


def _listed(values: Values, beyond: NDArray[np.bool_]) -> str:
    """Return the worst of some tokens in words."""
    worst = sorted(np.flatnonzero(beyond), key=lambda row: -values.errors[row])
    shown = [
        f"picture {values.places[row, 0]} token {values.places[row, 1]} by "
        f"{values.errors[row]:.2g} (cosine {values.cosines[row]:.4g}, "
        f"rounding alone {values.floor[row, 0]:.2g})"
        for row in worst[:_LISTED]
    ]
    return ", ".join([*shown, *["…"] * (len(worst) > _LISTED)])
