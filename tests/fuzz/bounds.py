"""One trial: what a door did with an input, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from vzip.runtime.errors import VzipError

SECONDS = 10.0  # for an input of a few KB; a machine may be busy
MEMORY = 2**31  # bytes beyond what the process has


class TimeUp(BaseException):
    """A trial lasted too long."""


def judge(trial: Callable[[], object], seconds: float = SECONDS) -> str | None:
    """Run a trial and return what is wrong with how it ended; None if nothing is.

    It may return, or raise an error of vzip whose text is one line that can be printed.

    Args:
        trial: The trial.
        seconds: How long it may take.
    """
    try:
        with bounded(seconds):
            trial()
    except VzipError as error:
        text = str(error)
        if not text or not text.isprintable():
            return f"not one printable line: {text[:300]!r}"
        if len(text) > 9000:
            return f"a line of {len(text)} characters: {text[:200]!r}"
    except TimeUp:
        return f"more than {seconds} s"
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - what is looked for
        return _told(error)
    return None


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Bound the time and the address space of what is done inside."""
    assert threading.current_thread() is threading.main_thread(), "signals come to this one"

    def ring(*_: object) -> None:
        raise TimeUp

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text("ascii").split()[0]
    return int(pages) * resource.getpagesize()


def _told(error: BaseException) -> str:
    """Return an exception with the place in vzip that it left by."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "tests" not in code.co_filename:
            name = Path(code.co_filename)
            place += f" > {name.parent.name}/{name.name}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:150]!a}{place[-700:]}"
