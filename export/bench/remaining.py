"""How far a benchmark is, and how long it will still take, by what its parts took so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_SETTLED: Final = 1.3  # what a turn takes beyond its timed calls, as a share of them


class Remaining:
    """Stacks are opened and proven one after the other, and then have their turns.

    Args:
        stacks: How many there are, of all bundles.
        say: Told.
        clock: Seconds.
    """

    def __init__(
        self,
        stacks: int,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stacks, self.say, self._clock = stacks, say, clock
        self._opened, self._open_s = 0, 0.0
        self._planned_s = 0.0  # of the turns of all that were opened, those that were had included
        self._had_s = 0.0  # of these plans, what is over
        self._taken_s = 0.0  # that took

    def opening(self, what: str) -> Callable[[], None]:
        """Say that a stack is being opened; call what is returned when that has ended."""
        number = min(self._opened + 1, self._stacks)
        self.say(f"{what}, {number} of {self._stacks}{self._left()}")
        start = self._clock()

        def done() -> None:
            self._opened += 1
            self._open_s += self._clock() - start

        return done

    def plan(self, call_ms: float, calls: int, rounds: int) -> None:
        """Count a stack's turns at one batch, which are to come."""
        self._planned_s += _SETTLED * call_ms * calls * rounds / 1000

    def turns(
        self, what: str, plans: list[tuple[float, int]], rounds: int
    ) -> Callable[[int], None]:
        """Say that turns begin; call what is returned with the number of rounds that are over.

        Args:
            what: Whose.
            plans: Milliseconds of a call, and calls, of each stack, as they were planned.
            rounds: Turns of each.
        """
        self.say(f"{what}{self._left()}")
        start, had, taken = self._clock(), self._had_s, self._taken_s
        whole = sum(_SETTLED * ms * calls * rounds / 1000 for ms, calls in plans)

        def done(number: int) -> None:
            self._had_s = had + whole * number / rounds
            self._taken_s = taken + self._clock() - start
            if number < rounds:
                self.say(f"  round {number} of {rounds}{self._left()}")

        return done

    def left_s(self) -> float | None:
        """Return the seconds that are left, roughly; None before anything was opened."""
        if not self._opened:
            return None
        ahead = max(0, self._stacks - self._opened)
        each = (self._open_s + self._planned_s * self._slower()) / self._opened
        return ahead * each + max(0.0, self._planned_s - self._had_s) * self._slower()

    def _slower(self) -> float:
        """Return what turns took, as multiples of what was planned."""
        return self._taken_s / self._had_s if self._had_s else 1.0

    def _left(self) -> str:
        left = self.left_s()
        if left is None:
            return ""
        return f", about {left:.0f} s left" if left < 90 else f", about {left / 60:.0f} min left"
