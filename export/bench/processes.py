"""Workers and their turns: every stack open at once, one of them running at a time.

The others are stopped meanwhile (SIGSTOP): thread pools that wait for work by spinning would time
each other otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vzip.export.bench import worker
from vzip.export.bench.others import Moment
from vzip.export.bench.stacks import Stack
from vzip.runtime.backends import TENSORRT
from vzip.runtime.errors import VzipError
from vzip.runtime.machine import process
from vzip.runtime.machine.record import state

TURN_LIMIT_S: Final = 600.0
_CLOSE_LIMIT_S: Final = 20.0

Turns = dict[str, list[dict[str, list[float]]]]


class WorkerError(VzipError):
    """A stack that could not be opened, proven or timed."""


class Process:
    """A worker, and the lines it exchanges with us.

    Args:
        python: Interpreter; None for this one.
        stack: What it times.
        bundle: Folder.
        paths: What comes first in its ``sys.path``; None for this process's own.
        judge: See `vzip.export.bench.measure.Wanted`.
    """

    def __init__(
        self,
        stack: Stack,
        bundle: Path,
        *,
        python: str | None = None,
        paths: Sequence[str] | None = None,
        judge: Path | None = None,
    ) -> None:
        self.stack = stack
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        first = [each for each in sys.path if each] if paths is None else paths
        limit = process.thread_limit()
        told = {"stack": stack.to_json(), "bundle": str(bundle), "threads": limit}
        job = json.dumps({**told, "judge": None if judge is None else str(judge)})
        # Peers that aren't told otherwise count so.
        bound = {} if limit is None else {"OMP_NUM_THREADS": str(limit)}
        flags = [part for path in first for part in ("--path", path)]
        self._process = subprocess.Popen(  # noqa: S603  our own worker
            [python or sys.executable, str(Path(worker.__file__)), *flags, job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **bound},
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, limit_s: float, **request: object) -> dict[str, Any]:
        """Return the answer to a request; before and after, the worker is stopped.

        A turn's has ``others_cores`` as well: how many cores others kept busy meanwhile, where the
        system says so.

        Raises:
            WorkerError: It is an error, the process died, or the limit passed.
        """
        assert self._process.stdin is not None
        pids = (self._process.pid, os.getpid())
        before = Moment.now(*pids)
        try:
            self._signal(signal.SIGCONT)
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise WorkerError(f"{self.stack}: no answer within {limit_s:.0f} s") from None
        except (BrokenPipeError, ValueError):  # it ended, or was closed
            line = ""
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self.stack}: ended with status {status} ({self._last_line()})")
        others = Moment.now(*pids).others_since(before)
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.stack}: {answer['error']}")
        found = dict(answer["ok"])
        if request.get("do") == "turn" and others is not None:
            found["others_cores"] = [others]
        return found

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def close(self) -> None:
        """End the process; closing twice does nothing."""
        try:
            self._signal(signal.SIGCONT)
            if self._process.poll() is None and self._process.stdin is not None:
                self._process.stdin.write('{"do": "close"}\n')
                self._process.stdin.close()
            self._process.wait(timeout=_CLOSE_LIMIT_S)
        except (BrokenPipeError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for each in (self._process.stdin, self._log):
            with contextlib.suppress(OSError, AttributeError):
                each.close()  # type: ignore[union-attr]


def take_turns(
    rounds: int,
    opened: Mapping[str, Process],
    calls: Mapping[str, int],
    batch: int,
    failed: dict[str, str],
    *,
    say: Callable[[str], None],
    over: Callable[[int], None] = lambda _rounds: None,
) -> tuple[Turns, list[dict[str, Any]]]:
    """Time the open stacks in turn, each round beginning with another one.

    Args:
        rounds: Turns of every stack.
        opened: Name → its process, warm.
        calls: Name → timed calls of a turn.
        batch: Images in a call.
        failed: Name → why it failed; one that fails is put here and left out from then on.
        say: Told what failed.
        over: Told after each round how many are over.

    Returns:
        Name → the answers of its turns, and the machine's state after each round.
    """
    turns: Turns = {name: [] for name in opened}
    order = list(opened)
    states = []
    for number in range(rounds):
        start = number % max(1, len(order))
        for name in order[start:] + order[:start]:
            if name in failed:
                continue
            try:
                answer = opened[name].ask(TURN_LIMIT_S, do="turn", batch=batch, calls=calls[name])
            except WorkerError as error:
                failed[name] = str(error)
                say(f"  {error}")
            else:
                turns[name].append(answer)
        states.append(state())
        over(number + 1)
    return turns, states


def profiles(opened: Mapping[str, Process], batch: int) -> dict[str, dict[str, Any]]:
    """Return where the time of every engine goes, by name; ``error`` where it can't be said.

    After the turns: a profiler makes every layer wait for the one before.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, each in opened.items():
        if each.stack.name == TENSORRT:
            try:
                found[name] = each.ask(TURN_LIMIT_S, do="profile", batch=batch)
            except WorkerError as error:
                found[name] = {"error": str(error)}
    return found
