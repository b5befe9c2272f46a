"""The measurement of `vzip bench`: every stack of every bundle, in turns; `output` says the form.

Processes are open at once as far as memory goes. What doesn't fit is timed in a further group, with
the baseline and the ceilings again: shares and ratios are always of one group's turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vzip.export.bench import stacks as names
from vzip.export.bench.others import UNSTEADY, wait_until_idle, warnings
from vzip.export.bench.peers import Device
from vzip.export.bench.processes import Process, WorkerError, profiles, take_turns
from vzip.export.bench.remaining import Remaining
from vzip.export.bench.stacks import Stack
from vzip.runtime.bundle.manifest import REFERENCE_FILE
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.machine import sensors, timing
from vzip.runtime.machine.record import machine

OPEN_LIMIT_S: Final = 1200.0
WARM_LIMIT_S: Final = 1200.0
LEAST_CALLS: Final = 2  # timed, however slow: one alone is a call after a pause
TURN_MS: Final = 1000.0  # that a turn of slow calls may take
SCHEMA: Final = 1
MEASURED: Final = (
    "Vision encoders, from pixels of the tower's size on the host to tokens on the host: wall "
    "clock of one call at a time, each stack in a process of its own, in turns"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        peers: Whether every peer is.
        only: Stacks by name, instead of all; empty for all.
        batches: Images in a call; empty for 1, or a static bundle's own.
        rounds: Turns of every stack.
        device: Where peers run.
        judge: Of `vzip.export.bench.judging.write_judge`: what tokens are judged by instead of the
            bundle's own reference. What differs is then timed all the same, and its row says so.
        beside: Whether ceilings and preprocessing are timed too.
        wait_s: How long to wait for a machine that nobody else uses; 0 for not at all.
    """

    peers: bool = False
    only: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    rounds: int = 7
    device: Device = "cpu"
    judge: Path | None = None
    beside: bool = True
    wait_s: float = 0.0

    def stacks(self, bundle: Bundle) -> list[Stack]:
        """Return the stacks of a bundle.

        Raises:
            InvalidInputError: One that is named does not exist.
        """
        own, others = names.own(bundle), names.peers(self.device)
        if self.only:
            asked = [each for each in names.named() if str(each) in self.only]
            slow = names.peers(self.device, asked=True)
            return names.chosen([*own, *others, *slow, *asked], self.only)
        return [*own, *others] if self.peers else own


@dataclass
class _Group:
    """What was open at once, and what its turns gave.

    Attributes:
        opened: Name → its process.
        about: Name → what it said when it was opened.
    """

    opened: dict[str, Process] = field(default_factory=dict)
    about: dict[str, Row] = field(default_factory=dict)


def bench(
    bundles: Mapping[str, Bundle], wanted: Wanted, *, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure bundles.

    Args:
        bundles: Name, as it stands in the result → bundle.
        wanted: What is to be measured.
        command: As it stands in the result.
        say: Told what begins and what failed.

    Returns:
        The result; see `vzip.export.bench.output`.

    Raises:
        InvalidInputError: A stack that is named does not exist.
    """
    listed = {name: wanted.stacks(bundle) for name, bundle in bundles.items()}
    result: dict[str, Any] = {
        "what": MEASURED,
        "schema": SCHEMA,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": machine(),
        "before": wait_until_idle(wanted.wait_s, say=say),
        "warnings": [],
        "baseline": None,
        "bundles": [_described(name, bundle) for name, bundle in bundles.items()],
        "rows": [],
        "states": [],
        "empty": [],
    }
    beside = {
        name: [*names.ceilings(stacks, wanted.device), *names.phases(wanted.device)]
        for name, stacks in listed.items()
        if wanted.beside
    }
    progress = Remaining(sum(map(len, [*listed.values(), *beside.values()])), say)
    for name, bundle in bundles.items():
        stacks = listed[name]
        one = _Bench(name, bundle, stacks=stacks, wanted=wanted, result=result, progress=progress)
        one.run()
    result["warnings"] = warnings(result["rows"], result["before"])
    return result


class _Bench:
    """The measurement of one bundle, which adds to the result."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        *,
        stacks: Sequence[Stack],
        wanted: Wanted,
        result: dict[str, Any],
        progress: Remaining,
    ) -> None:
        self.name, self.bundle, self.stacks, self.wanted = name, bundle, list(stacks), wanted
        self.result, self.progress, self.say = result, progress, progress.say
        self.largest_mib = 0.0
        self.batches = list(self._batches())

    def run(self) -> None:
        """Measure it."""
        if not self.batches or not self.stacks:
            return
        if REFERENCE_FILE not in self.bundle.manifest.files:
            why = "it has no reference.npz, which tokens are proven with; export it without "
            self._empty(None, f"{why}--no-check")
            return
        if not self.wanted.only:
            self._say_which_engines_are_absent()
        if self.wanted.device == "cpu" and self.wanted.beside:
            for name in names.COPIES:
                self._empty(
                    name, "there is no GPU: tokens are computed on the host, nothing is copied"
                )
        held = _Group()
        try:
            pending = self._open_baseline(held)
            pending += self._open_ceilings(held) if self.wanted.beside else ()
            number = 0
            while pending or number == 0:
                group = _Group(dict(held.opened), dict(held.about))
                try:
                    pending = self._fill(group, pending)
                    self._time(group, held, number)
                finally:
                    for key, process in group.opened.items():
                        if key not in held.opened:
                            process.close()
                number += 1
        finally:
            for process in held.opened.values():
                process.close()

    def _open_ceilings(self, held: _Group) -> list[Stack]:
        """Open the ceilings, and return what else a call has beside the encoder."""
        for stack in names.ceilings(self.stacks, self.wanted.device):
            self._open(held, stack)
        return names.phases(self.wanted.device)

    def _open_baseline(self, held: _Group) -> list[Stack]:
        """Open the baseline, the first bundle's first stack that opens; return the others."""
        pending = sorted(self.stacks, key=_preference)
        known = self.result["baseline"]
        other: list[Stack] = []
        while pending and known is None:
            stack = pending.pop(0)
            if not self._open(held, stack):
                continue
            if held.about[str(stack)].get("agreement", {}).get("passed", True):
                self.result["baseline"] = str(stack)
                return [*pending, *other]
            # What computes something else is no measure of others.
            held.opened.pop(str(stack)).close()
            del held.about[str(stack)]
            other.append(stack)
        for stack in pending:
            if str(stack) == known:
                self._open(held, stack)
        return [stack for stack in (*pending, *other) if str(stack) != known]

    def _batches(self) -> Iterator[int]:
        """Yield the batches that the bundle takes."""
        batch = self.bundle.manifest.batch
        for size in self.wanted.batches or ((1,) if batch.dynamic else (batch.max,)):
            if size == batch.max or (batch.dynamic and size <= batch.max):
                yield size
            else:
                takes = f"1 to {batch.max}" if batch.dynamic else f"exactly {batch.max}"
                self._empty(f"batch {size}", f"the bundle takes {takes}")

    def _fill(self, group: _Group, pending: list[Stack]) -> list[Stack]:
        """Open what fits into memory, and return the rest."""
        first = True
        while pending:
            if not first and not self._room():
                return pending
            stack, *pending = pending
            first = not self._open(group, stack) and first
        return pending

    def _say_which_engines_are_absent(self) -> None:
        """Leave a cell empty for each kind of engine that the bundle has none of."""
        for_cpus = {each.cpu is not None for each in self.bundle.manifest.engines.values()}
        for cpu, name, option in ((False, "tensorrt", ""), (True, "onnxruntime:fastest", " --cpu")):
            if cpu not in for_cpus:
                command = f"vzip build BUNDLE{option}"
                self._empty(name, f"the bundle has no engine; make one with: {command}")

    def _room(self) -> bool:
        """Say whether another process is likely to fit: as large as the largest, and a half."""
        free = available_mib()
        return free is None or free > 1.5 * self.largest_mib + 1024

    def _open(self, group: _Group, stack: Stack) -> bool:
        """Open, prove and warm up one stack; one that fails becomes an empty cell."""
        opened = self.progress.opening(f"{self.name}: {stack}")
        judge: dict[str, Any] = {} if self.wanted.judge is None else {"judge": self.wanted.judge}
        process = Process(stack, self.bundle.path, **judge)
        try:
            about = process.ask(OPEN_LIMIT_S, do="open", batches=self.batches)
            # One after the other here, so that what is allocated lazily is there and counted.
            for batch in self.batches if stack.name not in _ONCE else self.batches[:1]:
                about[f"batch {batch}"] = process.ask(WARM_LIMIT_S, do="warm", batch=batch)
                peak = about[f"batch {batch}"]["peak_host_mib"]
                self.largest_mib = max(self.largest_mib, peak)
        except WorkerError as error:
            process.close()
            self._empty(str(stack), _reason(error, stack))
            return False
        finally:
            opened()
        self._plan(about)
        group.opened[str(stack)], group.about[str(stack)] = process, about
        return True

    def _plan(self, about: Row) -> None:
        """Count a stack's turns among those that are to come."""
        for batch in self.batches:
            if (warm := about.get(f"batch {batch}")) is not None:
                self.progress.plan(warm["warm_ms"], _calls(warm["warm_ms"]), self.wanted.rounds)

    def _time(self, group: _Group, held: _Group, number: int) -> None:
        """Take turns at every batch."""
        for about in held.about.values() if number else ():
            self._plan(about)  # again
        for batch in self.batches:
            key = f"batch {batch}"
            opened = {n: p for n, p in group.opened.items() if key in group.about[n]}
            calls = {name: _calls(group.about[name][key]["warm_ms"]) for name in opened}
            failed: dict[str, str] = {}
            over = self.progress.turns(
                f"{self.name}: {len(opened)} in turns, batch {batch}",
                [(group.about[name][key]["warm_ms"], calls[name]) for name in opened],
                self.wanted.rounds,
            )
            turns, states = take_turns(
                self.wanted.rounds, opened, calls, batch, failed, say=self.say, over=over
            )
            for name, reason in failed.items():
                self._empty(f"{name}, batch {batch}", reason)
                group.opened[name].close()
            self.result["states"] += [
                {"bundle": self.name, "batch": batch, "group": number, **each} for each in states
            ]
            timed = {name: each for name, each in turns.items() if name not in failed}
            rows = self._rows(group, opened, timed, batch, number)
            for name, found in profiles({name: opened[name] for name in timed}, batch).items():
                next(row for row in rows if row["stack"] == name)["profile"] = found
            self.result["rows"] += rows
            for name in failed:
                for each in (group, held):
                    each.opened.pop(name, None)
                    each.about.pop(name, None)

    def _rows(
        self,
        group: _Group,
        opened: Mapping[str, Process],
        turns: Mapping[str, list[dict[str, list[float]]]],
        batch: int,
        number: int,
    ) -> list[Row]:
        rows = []
        for name, answers in turns.items():
            stack = opened[name].stack
            about = {k: v for k, v in group.about[name].items() if not k.startswith("batch ")}
            row: Row = {
                "bundle": self.name,
                "tokens": self.bundle.manifest.selection.tokens,
                "batch": batch if stack.name not in _ONCE else 1,
                "stack": name,
                **stack.to_json(),
                "group": number,
                **about,
                **group.about[name][f"batch {batch}"],
                **summary(answers),
            }
            row["images_per_s"] = row["batch"] / row["median_ms"] * 1000
            rows.append(row)
        relate(rows, self.result["baseline"])
        return rows

    def _empty(self, what: str | None, why: str) -> None:
        self.result["empty"].append(
            {"cell": self.name if what is None else f"{self.name}, {what}", "why": why}
        )
        self.say(f"  {'' if what is None else f'{what}: '}{why}")


def available_mib() -> float | None:
    """Return the memory that processes can still have; None where the system doesn't say."""
    memory = sensors.memory()
    return None if memory is None else memory.available


_ONCE: Final = (names.PREPROCESSING,)  # whatever the batch


def summary(answers: Sequence[Mapping[str, list[float]]]) -> Row:
    """Return `timing.summary` of one stack's turns, and medians of what else they saw.

    ``spread`` is the distance of the quartiles as a share of the median, ``unsteady`` whether that
    is more than `UNSTEADY`, ``others_cores`` how many cores others kept busy.

    ``host_ms`` is what a call costs beyond the GPU's time for its launch: checks, copies into and
    out of pinned memory, the launch itself, waiting, and the copy of the embeddings to the host.
    """
    found = timing.summary([answer["ms"] for answer in answers])
    found["spread"] = found["iqr_ms"] / found["median_ms"]
    found["unsteady"] = found["spread"] > UNSTEADY
    for name in ("engine_ms", "on_device_ms", "others_cores"):
        every = [value for answer in answers for value in answer.get(name, ())]
        if every:
            found[name] = statistics.median(every)
    if "engine_ms" in found:
        found["host_ms"] = found["median_ms"] - found["engine_ms"]
    return found


def relate(rows: Sequence[Row], baseline: str | None) -> None:
    """Set the rows of one group and batch beside its ceilings and its baseline.

    Adds ``flops``, ``gflop_per_s`` and ``share_of_ceiling`` (of the rate of the multiplications
    alone, in the precision of `ceiling_of`), and ``times_baseline``: how many times as fast as the
    baseline. Both are medians over the rounds of ratios of turns, as machines drift. And
    ``times_baseline_best``, of the fastest call of each, and ``ratio_unsteady`` and
    ``share_unsteady``, whether one of the two is `unsteady`. None where there is nothing to relate
    to.
    """
    named = {row["stack"]: row for row in rows}
    base = named.get(baseline or "")
    for row in rows:
        if row["kind"] == "phase":
            continue
        precision = names.ceiling_of(row["precision"])
        ceiling = named.get(f"{names.CEILINGS[row['device']]}:{precision}")
        flops = row.get("flops") or next(
            (each["flops"] for each in rows if each["kind"] == "ceiling"), None
        )
        row["flops"] = flops
        row["gflop_per_s"] = None if flops is None else flops / row["median_ms"] / 1e6
        row["share_of_ceiling"] = (
            None if ceiling is None else flops / ceiling["flops"] * _ratio(ceiling, row)
        )
        row["share_unsteady"] = None if ceiling is None else ceiling["unsteady"] or row["unsteady"]
        row["times_baseline"] = None if base is None else _ratio(base, row)
        row["times_baseline_best"] = None if base is None else base["min_ms"] / row["min_ms"]
        row["ratio_unsteady"] = None if base is None else base["unsteady"] or row["unsteady"]


def _ratio(base: Row, row: Row) -> float:
    pairs = zip(base["turn_medians_ms"], row["turn_medians_ms"], strict=False)
    return float(statistics.median(one / other for one, other in pairs))


def _calls(warm_ms: float) -> int:
    """Return the timed calls of a turn: fewer of what takes long."""
    return max(LEAST_CALLS, min(timing.calls_per_turn(warm_ms), int(TURN_MS / max(warm_ms, 1e-6))))


def _preference(stack: Stack) -> int:
    """Order the published form first, in the precision it was published in if it is there."""
    if stack.name != "torch-published":
        return 9
    return ("fp32", "fp16", "bf16").index(stack.precision)


def _reason(error: WorkerError, stack: Stack) -> str:
    """Return why a stack failed, without what the cell says already."""
    text = str(error).removeprefix(f"{stack}: ")
    kind, separator, rest = text.partition(": ")
    return rest if separator and kind.isidentifier() and kind.endswith("Error") else text


def _described(name: str, bundle: Bundle) -> Row:
    manifest, model = bundle.manifest, bundle.manifest.model.id
    return {
        "name": name,
        "model": "a local folder" if Path(model).is_absolute() else model,
        "weights": manifest.model.weights,
        "seed": manifest.model.seed,
        "precision": manifest.precision,
        "precisions": list(manifest.precisions),
        "engines": list(manifest.engines),
        "tokens": manifest.selection.tokens,
        "dominant": manifest.selection.dominant,
        "contextual": manifest.selection.contextual,
        "merge": manifest.selection.merge,
        "tower_tokens": manifest.tower.tokens,
        "image_size": manifest.tower.image_size,
        "batch": {"max": manifest.batch.max, "dynamic": manifest.batch.dynamic},
        "graph_sha256": manifest.files[bundle.graph_file].sha256,
    }
