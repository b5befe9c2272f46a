"""`vzip build --precision auto`: INT8 or FP8 where it is worth it, measured on this machine.

On some GPUs quantised encoders are slower than FP16 ones. So the engine of the bundle's own graph
is built first, and one from a quantised graph is kept only if its tokens agree with PyTorch's and
it ran faster here. The two take turns while they are timed, so that a clock that drifts or a board
that warms up slows both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from vzip.export.engines.published import BuiltEngine, Say
from vzip.export.engines.tensorrt.proof import open_staged
from vzip.export.engines.tensorrt.publish import build_engine, build_if
from vzip.export.engines.tensorrt.request import BuildRequest, this_machine
from vzip.runtime.agreement import load_reference
from vzip.runtime.backends.tensorrt.backend import TensorRt
from vzip.runtime.bundle.engine_record import EngineRecord
from vzip.runtime.bundle.manifest import REFERENCE_FILE
from vzip.runtime.bundle.precision_record import FP8_SM, Quantised
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BackendError, ExportError, InvalidInputError, ParityError
from vzip.runtime.files.codec import Scalar

AUTO: Final = "auto"

ROUNDS: Final = 21
"""How often the two engines take turns; the first turn warms up and doesn't count."""

_BURST_MS = 60.0  # a turn is as many calls as fit in this, and one at the least
_MOST_CALLS = 200
_WARMING = 3  # calls after which an engine runs as a captured CUDA graph

Turn = Callable[[], float]


@dataclass(frozen=True)
class Race:
    """How long two engines took for a call, in milliseconds.

    Attributes:
        own: Quartiles of the bundle's own engine: lower, median, upper.
        other: Those of the other.
    """

    own: tuple[float, float, float]
    other: tuple[float, float, float]

    @property
    def won(self) -> bool:
        """Whether the other is faster beyond the spread: its slow turns beat its rival's fast."""
        return self.other[2] < self.own[0]

    def to_json(self) -> dict[str, Scalar]:
        """Return the medians, as they are recorded with an engine's proof."""
        return {"ms": round(self.other[1], 4), "own_ms": round(self.own[1], 4)}

    def __str__(self) -> str:
        def shown(quartiles: tuple[float, float, float]) -> str:
            low, middle, high = quartiles
            return f"{middle:.3f} ms ({low:.3f} to {high:.3f})"

        return f"{shown(self.other)} against {shown(self.own)}"


def race(own: Turn, other: Turn, *, rounds: int = ROUNDS) -> Race:
    """Let two engines take turns.

    Args:
        own: Runs the bundle's own engine for a while and returns the milliseconds of a call.
        other: The same of the other engine.
        rounds: How often; who begins alternates.

    Returns:
        What was measured, without the first round.
    """
    times: tuple[list[float], list[float]] = ([], [])
    turns = (own, other)
    for number in range(rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            taken = turns[place]()
            if number:
                times[place].append(taken)
    return Race(_quartiles(times[0]), _quartiles(times[1]))


def build_best(
    path: str | os.PathLike[str], request: BuildRequest, *, say: Say
) -> tuple[BuiltEngine, list[BuiltEngine]]:
    """Build the bundle's own engine, and those from its quantised graphs that are worth it.

    Args:
        path: The bundle.
        request: What to build; `name` is that of the bundle's own engine, to which the others'
            names add their precision.
        say: Told, in lines, what goes on.

    Returns:
        The fastest engine, and all that are in the bundle now.

    Raises:
        InvalidInputError: Nothing was calibrated, there is nothing to prove by, or it is asked for
            ahead of time.
        VzipError: As for `build_engine`, of the bundle's own engine.
    """
    manifest = read_bundle(path, verify=False).manifest
    if request.rtx is not None:
        raise InvalidInputError(
            "got precision='auto' (--precision auto) with rtx (--rtx)",
            expected="a GPU to measure on",
            cure="name the precision, or build on the machine itself",
        )
    if not manifest.precisions:
        raise InvalidInputError(
            f"{os.fspath(path)} has no quantised graph to choose",
            expected="int8 or fp8",
            cure=(
                f"make one with: vzip calibrate {os.fspath(path)} --images FOLDER --precision int8"
            ),
        )
    if REFERENCE_FILE not in manifest.files:
        raise InvalidInputError(
            f"{os.fspath(path)} has no {REFERENCE_FILE}",
            expected="PyTorch's tokens to tell whether a quantised engine agrees",
            cure="export the bundle without --no-check",
        )
    own = build_engine(path, dataclasses.replace(request, precision=None), say=say)
    best, times, built = own, float("inf"), [own]
    for precision in manifest.precisions:
        rated = _rated(own, precision, request, say)
        if rated is None:
            continue
        result, taken = rated
        built.append(result)
        if taken.won and taken.other[1] < times:
            best, times = result, taken.other[1]
    return best, built


def _rated(
    own: BuiltEngine, precision: Quantised, request: BuildRequest, say: Say
) -> tuple[BuiltEngine, Race] | None:
    """Build an engine from a quantised graph and race it; None if it isn't kept."""
    if precision == "fp8" and any(int(sm) < FP8_SM for sm in this_machine().sm):
        say(f"fp8 is passed over: this GPU doesn't compute in it, SM {FP8_SM} and newer do")
        return None
    measured: list[Race] = []

    def keep(bundle: Bundle, record: EngineRecord, plan: memoryview) -> Mapping[str, Scalar] | None:
        with open_staged(bundle, record, plan) as candidate:
            measured.append(_measured(own, candidate, bundle))
        say(f"{precision}: {measured[0]} of the engine '{own.name}'")
        return measured[0].to_json() if measured[0].won else None

    name = None if request.name is None else f"{request.name}-{precision}"
    log = None if request.log is None else _beside(request.log, precision)
    asked = dataclasses.replace(request, precision=precision, name=name, log=log)
    try:
        result = build_if(own.bundle.path, asked, keep, say=say)
    except (ParityError, ExportError, BackendError) as error:
        say(f"{precision} is not kept: {error}")
        return None
    if result is None:
        say(f"{precision} is not kept: it is not faster here")
        return None
    if not measured:  # it was there already: from an earlier build, perhaps without `auto`
        with contextlib.closing(TensorRt(result.bundle, engine=result.name)) as candidate:
            measured.append(_measured(own, candidate, result.bundle))
        verdict = "" if measured[0].won else ", not faster; it was there before and is left there"
        say(f"{precision}: {measured[0]} of the engine '{own.name}'{verdict}")
    return result, measured[0]


def _beside(log: Path, precision: Quantised) -> Path:
    """Return ``x-int8.log`` for ``x.log``: each build has a log of its own."""
    return log.with_name(f"{log.stem}-{precision}{log.suffix}")


def _measured(own: BuiltEngine, candidate: TensorRt, bundle: Bundle) -> Race:
    """Race an engine that is open against the bundle's own, on the reference pictures."""
    rows = own.record.batch.opt
    images = load_reference(bundle).input
    picked = images[[number % len(images) for number in range(rows)]]
    with contextlib.closing(TensorRt(own.bundle, engine=own.name)) as opened:
        turns = [_turn(each, bundle, picked) for each in (opened, candidate)]
        return race(turns[0], turns[1])


def _turn(backend: TensorRt, bundle: Bundle, images: NDArray[Any]) -> Turn:
    """Return a turn of an engine: a burst of calls, of which the median counts."""
    rows = len(images)
    for _ in range(_WARMING):
        backend.run({bundle.manifest.input.name: images})
    once = statistics.median(backend.launch_ms(rows, _WARMING))
    calls = min(_MOST_CALLS, max(1, round(_BURST_MS / max(once, 1e-3))))
    return lambda: statistics.median(backend.launch_ms(rows, calls))


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high
