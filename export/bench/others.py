"""What others take of the CPU while something is timed, and waiting until they take nothing.

A load average has what is timed in it, and takes a minute to forget. Here the time that the CPUs
were busy is counted, and what is timed is taken off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vzip.runtime.machine import process, sensors

IDLE: Final = 0.1
"""Share of the cores that others may take on a machine that counts as idle."""
DISTURBED: Final = 0.5
"""Share of the cores from which on others' load is warned of."""
UNSTEADY: Final = 1 / 3
"""Share of its median that a stack's quartiles may be apart; beyond it, a ratio says little."""
_LOOK_S: Final = 1.0


class Moment(NamedTuple):
    """What had been taken of the CPUs when.

    Attributes:
        wall_s: The clock.
        others_s: Seconds that the CPUs were busy for others; None where nothing says so.
    """

    wall_s: float
    others_s: float | None

    @classmethod
    def now(cls, *pids: int) -> Moment:
        """Look; what these processes took is not others'."""
        busy, own = sensors.busy_s(), [sensors.cpu_s(pid) for pid in pids]
        others = None if busy is None else busy - sum(each or 0.0 for each in own)
        return cls(time.monotonic(), others)

    def others_since(self, before: Moment) -> float | None:
        """Return how many cores others kept busy since another moment, on average.

        Where a quota allows fewer cores than there are, others may have the rest: only what they
        took beyond it counts.
        """
        if self.others_s is None or before.others_s is None or self.wall_s <= before.wall_s:
            return None
        taken = (self.others_s - before.others_s) / (self.wall_s - before.wall_s)
        return max(0.0, taken - _spare())


def wait_until_idle(
    limit_s: float,
    *,
    say: Callable[[str], None],
    look: Callable[[], float | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Wait until nobody else uses the CPUs, but no longer than so many seconds.

    Args:
        limit_s: 0 for a look alone.
        say: Told that it waits, and how it ended.
        look: Returns how many cores others keep busy now, and takes a moment for it.
        clock: Seconds.

    Returns:
        ``cores`` that this process may use, ``others_cores`` that others kept busy at last (None
        where the system doesn't say), ``idle`` (whether that is next to nothing; None likewise) and
        ``waited_s``.
    """
    cores, start = process.cores(), clock()
    look = _others_now if look is None else look
    others, told = look(), False
    while others is not None and others > IDLE * cores and clock() - start < limit_s:
        if not told:
            say(f"others keep {others:.1f} of {cores} cores busy: waiting up to {limit_s:.0f} s")
            told = True
        others = look()
    idle = None if others is None else others <= IDLE * cores
    if told:
        waited = clock() - start
        ended = "the machine is idle" if idle else "there was no idle machine; it is measured so"
        say(f"waited {waited:.0f} s: {ended}")
    return {
        "cores": cores,
        "others_cores": None if others is None else round(others, 2),
        "idle": idle,
        "waited_s": round(clock() - start, 1) if told else 0.0,
    }


def warnings(rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> list[str]:
    """Return what a reader of a result must know first.

    Args:
        rows: Of the result, of all stacks.
        before: Of `wait_until_idle`.
    """
    cores, found = before["cores"], []
    busy = [row["others_cores"] for row in rows if row.get("others_cores") is not None]
    beyond = sum(each > DISTURBED * cores for each in busy)
    if beyond:
        found.append(
            f"disturbed: in {beyond} of {len(busy)} rows, other programs kept more than half of "
            f"{cores} cores busy (up to {max(busy):.1f}); times and ratios are not this machine's"
        )
    if before["idle"] is False:
        waited = f", after {before['waited_s']:.0f} s of waiting" if before["waited_s"] else ""
        found.append(
            f"no idle machine: when it began{waited}, other programs kept "
            f"{before['others_cores']:.1f} of {cores} cores busy"
        )
    unsteady = [row for row in rows if row.get("unsteady")]
    if unsteady:
        found.append(
            f"unsteady: in {len(unsteady)} of {len(rows)} rows the quartiles are more than a third "
            "of the median apart, and their ratios say little"
        )
    return found


def _spare() -> int:
    """Return how many of the CPUs that this process may be put on its quota doesn't pay for."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(0, (every or 1) - process.cores())


def _others_now() -> float | None:
    before = Moment.now()
    if before.others_s is None:
        return None
    time.sleep(_LOOK_S)
    return Moment.now().others_since(before)
