"""How far a build is, on a terminal; and the way by which Ctrl-C ends one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from vzip.runtime.console import visible, watched

_SHOWN = 2  # phases at a time: the build, and what it is at; deeper ones come by the thousand


class Progress:
    """Bars for the phases of a build, behind an IProgressMonitor of TensorRT.

    Python runs its signal handlers when TensorRT calls the monitor. An exception must not pass
    through TensorRT's own frames: it is kept, the build is cancelled, and `reraise` raises it.
    """

    def __init__(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Prepare to show.

        Args:
            interrupted: Whether the build is to be cancelled: Ctrl-C may come up in a logger too.
        """
        self._interrupted = interrupted
        self._lock = threading.Lock()  # TensorRT may call from several threads
        self._bars: dict[str, Bar] = {}
        self._error: BaseException | None = None

    def monitor(self, trt: Any) -> Any:
        """Return the monitor for a builder's configuration.

        Args:
            trt: The module, which has IProgressMonitor.
        """
        progress = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of an untyped module
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, steps: int) -> None:
                progress.guarded(lambda: progress.start(phase_name, parent_phase, steps))

            def step_complete(self, phase_name: str, step: int) -> bool:
                return progress.guarded(lambda: progress.step(phase_name, step))

            def phase_finish(self, phase_name: str) -> None:
                progress.guarded(lambda: progress.finish(phase_name))

        return Monitor()

    def guarded(self, action: Callable[[], None]) -> bool:
        """Do something; False, now and ever after, if it raised."""
        try:
            with self._lock:
                if self._error is None:
                    action()
        except BaseException as error:  # noqa: BLE001 - raised again by `reraise`
            self._error = error
        return self._error is None and not self._interrupted()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Begin a phase of so many steps."""
        if len(self._bars) < _SHOWN and (parent is None or parent in self._bars):
            bar = _bar(phase, steps)
            if bar is not None:
                self._bars[phase] = bar

    def step(self, phase: str, number: int) -> None:
        """Note that a step of a phase, counted from 0, is done."""
        if phase in self._bars:
            bar = self._bars[phase]
            bar.update(number + 1 - bar.n)

    def finish(self, phase: str) -> None:
        """End a phase."""
        if phase in self._bars:
            self._bars.pop(phase).close()

    def reraise(self) -> None:
        """Close the bars and raise what ended the build, if anything did."""
        for name in list(self._bars)[::-1]:
            self.finish(name)
        if self._error is not None:
            raise self._error


class Bar(Protocol):
    """What a phase is shown by; tqdm's bars are of this kind."""

    n: int

    def update(self, count: int) -> object:
        """Note that so many more steps are done."""

    def close(self) -> object:
        """Take it off the terminal."""


class _Counter:
    """A phase in one line of a terminal, where tqdm isn't installed, as on most Jetsons."""

    def __init__(self, phase: str, steps: int) -> None:
        self.n = 0
        self._phase, self._steps = phase, steps
        self.update(0)

    def update(self, count: int) -> None:
        self.n += count
        self._write(f"{self._phase} {self.n}/{self._steps}")

    def close(self) -> None:
        self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{visible(text)}\x1b[K")  # and erase what a longer line left
        sys.stderr.flush()


def _bar(phase: str, steps: int) -> Bar | None:
    """Return a bar on standard error; None where that is no terminal."""
    if not watched():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return _Counter(phase, steps)
    bar: Bar = tqdm(desc=phase, total=steps, unit="step", leave=False)
    return bar
