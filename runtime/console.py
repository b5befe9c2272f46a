"""What every command line of vzip shares: one-line errors, exit statuses and progress bars.

Exit statuses: 0 done, 1 a verdict that says no (``vzip check``), 2 an error that is the caller's to
mend (a `VzipError`, or an option that does not exist), 130 interrupted, 141 the reader of our
output went away. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from vzip.runtime.errors import InvalidInputError, VzipError

T = TypeVar("T")

FAILED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def run_command(command: Callable[[], int], *, prog: str) -> int:
    """Run one command and turn what ended it into an exit status.

    Args:
        command: The command; returns its exit status.
        prog: What stands before ``: error:``, such as ``vzip``.

    Returns:
        The exit status, for ``sys.exit``.
    """
    try:
        try:
            status = command()
        except SystemExit as ended:  # argparse, after -h or about a mistyped option
            status = int(ended.code or 0)
        flush()
    except VzipError as error:
        say(f"{prog}: error: {error}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    return status


def emit(text: str, *, end: str = "\n") -> None:
    """Write to standard output at once, so that a reader sees text as it is made.

    Args:
        text: What to write.
        end: What follows it.

    Raises:
        InvalidInputError: Standard output is closed or full.
    """
    if sys.stdout is None:
        raise InvalidInputError(
            "standard output is closed, so the result has nowhere to go",
            cure="start vzip without '>&-'",
        )
    with _writing():
        try:
            sys.stdout.write(text + end)
        except UnicodeEncodeError:
            # A terminal that can't show a character gets its escape rather than a traceback.
            encoding = sys.stdout.encoding
            shown = text.encode(encoding, errors="backslashreplace").decode(encoding)
            sys.stdout.write(shown + end)
        sys.stdout.flush()


def say(text: str) -> None:
    """Tell the user what goes on, on standard error; standard output has results alone."""
    if sys.stderr is not None:  # print would take standard output in its place
        print(text, file=sys.stderr, flush=True)  # noqa: T201  what a command line is for


def flush() -> None:
    """Flush standard output, so that a full disk is an error and not a lost line.

    Raises:
        InvalidInputError: It can't be written.
    """
    if sys.stdout is not None:
        with _writing():
            sys.stdout.flush()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turn a failed write to standard output into an error of ours, unless a pipe was closed."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise InvalidInputError(
            f"standard output can't be written ({error.strerror})",
            cure="free some space or send the output elsewhere",
        ) from error


def _drop_output() -> None:
    """Send what is still unwritten nowhere: the interpreter flushes once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(
    items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it"
) -> Iterable[T]:
    """Go through items behind a progress bar on standard error.

    There is no bar where standard error is no terminal or tqdm is not installed.

    Args:
        items: What to go through.
        desc: What is being done, such as ``reading shards``.
        total: How many items there are, where `items` has no length.
        unit: What one item is.

    Returns:
        The items, in their order.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=desc, total=total, unit=unit, leave=False)
    return bar
