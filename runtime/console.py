"""What every command line of vzip shares: its streams, one-line errors, and exit statuses.

Standard output has results alone. Standard error has errors (`complain`), what goes on (`say`, not
with ``--quiet``) and, with ``--verbose``, what the modules of vzip log. What a terminal would take
for a command, or show in another order than it has, is escaped in all of it (`visible`).

Exit statuses: 0 done, 1 a verdict that says no (``vzip check``), 2 an error that is the caller's to
mend (a `VzipError`, or an option that does not exist), 130 interrupted, 141 the reader of our
output went away. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

from vzip.runtime.errors import InvalidInputError, VzipError
from vzip.runtime.guard import said_by
from vzip.runtime.machine import process

if TYPE_CHECKING:
    import logging

T = TypeVar("T")

FAILED = 2
_LOOK = "free some memory or disk, or run it with -vv, which says where it stopped"
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE

_NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


# What moves the cursor, colours, answers, beeps or hides (C0 but for line ends and tabs, DEL, C1),
# what ends a line for some alone, and what lets a text look as if it stood in another order.
_HIDDEN: Final = (*range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0), 0x2028, 0x2029,
                  *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # fmt: skip
_VISIBLE: Final = {code: chr(code).encode("unicode_escape").decode() for code in _HIDDEN}
_JSON: Final = {code: f"\\u{code:04x}" for code in _HIDDEN}


class Verbosity(enum.IntEnum):
    """How much a command says on standard error."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2
    DEBUG = 3


_verbosity = Verbosity.NORMAL
_log_handler: logging.Handler | None = None


def run_command(command: Callable[[], int], *, prog: str) -> int:
    """Run one command and turn what ended it into an exit status.

    Args:
        command: The command; returns its exit status.
        prog: What stands before ``: error:``, such as ``vzip``.

    Returns:
        The exit status, for ``sys.exit``.
    """
    with (
        _open_streams(),
        warnings.catch_warnings(),
        _visible_messages(),
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.enter_context(_bars_for_watchers())
        at_the_end.callback(set_verbosity, Verbosity.NORMAL)
        at_the_end.callback(process.limit_threads, None)
        try:
            try:
                status = command()
            except SystemExit as ended:  # argparse, after -h
                status = int(ended.code or 0)
            flush()
            _log_cost()
        except VzipError as error:
            _log_origin(error)
            complain(f"{prog}: error: {error}")
            return FAILED
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            _drop(sys.stdout)
            return PIPE_CLOSED
        except (OSError, MemoryError) as error:
            # The machine's own refusals, wherever they come up: no line of ours raises these.
            refusal = VzipError(f"'{prog}' can't go on", cause=said_by(error), cure=_LOOK)
            refusal.__cause__ = error
            _log_origin(refusal)
            complain(f"{prog}: error: {refusal}")
            return FAILED
        return status


@contextlib.contextmanager
def _bars_for_watchers() -> Iterator[None]:
    """Keep bars of huggingface_hub, transformers and tqdm out of a log while a command runs.

    They go by these variables, which they read as they are imported, and not by where they write.
    """
    before = {name: os.environ.get(name) for name in _NO_BARS}
    if not watched():
        _forbid_bars()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _forbid_bars() -> None:
    for name in _NO_BARS:
        os.environ.setdefault(name, "1")


def _log_cost() -> None:
    """Log what the process has cost up to now, for ``--verbose``."""
    if _verbosity > Verbosity.NORMAL:
        import logging
        import time

        form = "took %.2f s of this process's processor time"
        logging.getLogger(__name__).info(form, time.process_time())


def _log_origin(error: VzipError) -> None:
    """Log where an error comes from, and what of another package was its cause, for ``-vv``."""
    if _verbosity == Verbosity.DEBUG:
        import logging

        logging.getLogger(__name__).debug("the error below comes from here", exc_info=error)


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """Let the standard streams that are closed lead nowhere while a command runs.

    Where standard error is closed, Python has None for it, and `print` and argparse take standard
    output instead. The next file that is opened gets the closed descriptor, and C libraries write
    their messages into that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # noqa: PERF203  three times
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free: this one
            os.set_inheritable(nowhere, True)
    if sys.stderr is not None:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
        yield


@contextlib.contextmanager
def _visible_messages() -> Iterator[None]:
    """Let Python's warnings, and logs that nobody else shows, be `visible` while a command runs."""
    import logging

    last = logging.lastResort

    def show(*warning: Any) -> None:
        message, category, filename, line, file, source = (*warning, None, None)[:6]
        text = warnings.formatwarning(message, category, filename, line, source)
        with contextlib.suppress(OSError, AttributeError):  # closed, or not there at all
            (file or sys.stderr).write(visible(text))

    warnings.showwarning = show  # type: ignore[assignment]  # `catch_warnings` puts the old one back
    logging.lastResort = _handler("%(message)s", logging.WARNING)
    try:
        yield
    finally:
        logging.lastResort = last


def _handler(form: str, level: int = 0) -> logging.StreamHandler[TextIO]:
    """Return what writes logs to standard error."""
    import logging

    class Visible(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return visible(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Visible(form))
    handler.setLevel(level)
    return handler


def set_verbosity(verbosity: Verbosity) -> None:
    """Set how much is said on standard error until the command ends.

    Args:
        verbosity: QUIET: errors alone, so that warnings of libraries are left out too. NORMAL: also
            what goes on. VERBOSE, DEBUG: also what the modules of vzip log at the levels INFO and
            DEBUG.
    """
    global _verbosity, _log_handler  # noqa: PLW0603  a process has one standard error
    if verbosity == _verbosity:
        return
    import logging

    _verbosity = verbosity
    logger = logging.getLogger("vzip")
    if _log_handler is not None:
        logger.removeHandler(_log_handler)
        _log_handler = None
    logger.setLevel(
        {
            Verbosity.QUIET: logging.ERROR,
            Verbosity.NORMAL: logging.NOTSET,
            Verbosity.VERBOSE: logging.INFO,
            Verbosity.DEBUG: logging.DEBUG,
        }[verbosity]
    )
    if verbosity == Verbosity.QUIET:
        warnings.simplefilter("ignore")
        _forbid_bars()
    elif verbosity > Verbosity.NORMAL:
        _log_handler = _handler("%(relativeCreated).0f ms %(name)s: %(message)s")
        logger.addHandler(_log_handler)


def visible(text: str) -> str:
    """Return a text for people: control characters and such are escaped, as Python writes them.

    Line ends and tabs stay, and so do letters of all scripts and what joins them. A name in a line
    of its own has no line end to give: `vzip.runtime.errors.printable` escapes that too.
    """
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def emit(text: str, *, end: str = "\n") -> None:
    """Write to standard output at once, so that a reader sees text as it is made; see `visible`.

    Args:
        text: What to write.
        end: What follows it.

    Raises:
        InvalidInputError: Standard output is closed or full.
    """
    _write(visible(text) + end)


def emit_json(value: Any) -> None:
    """Write a command's table as JSON, of Python's own containers, to standard output.

    What is read of it is exact: characters are escaped as JSON does.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    _write(text.translate(_JSON) + "\n")


def _write(text: str) -> None:
    """Write to standard output at once."""
    if sys.stdout is None:
        raise InvalidInputError(
            "standard output is closed, so the result has nowhere to go",
            cure="start vzip without '>&-'",
        )
    with _writing():
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            # A terminal that can't show a character gets its escape rather than a traceback.
            encoding = sys.stdout.encoding
            shown = text.encode(encoding, errors="backslashreplace").decode(encoding)
            sys.stdout.write(shown)
        sys.stdout.flush()


def say(text: str, *, end: str = "\n") -> None:
    """Tell the user what goes on, on standard error, unless ``--quiet`` was asked for."""
    if _verbosity > Verbosity.QUIET:
        complain(text, end=end)


def complain(text: str, *, end: str = "\n") -> None:
    """Tell the user about an error or a verdict that says no, on standard error; see `visible`.

    Where standard error can't be written, nobody is told, and the command goes on: a log on a full
    disk, or a reader of it that went away, is no reason to lose the result.
    """
    if sys.stderr is None:  # print would take standard output in its place
        return
    try:
        print(visible(text), end=end, file=sys.stderr, flush=True)  # noqa: T201  what a command line is for
    except OSError:
        _drop(sys.stderr)


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
        _drop(sys.stdout)
        raise InvalidInputError(
            f"standard output can't be written ({error.strerror})",
            cure="free some space or send the output elsewhere",
        ) from error


def _drop(stream: TextIO) -> None:
    """Send what is still unwritten nowhere: the interpreter flushes once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def watched() -> bool:
    """Return whether somebody looks at standard error, so that a progress bar is of use."""
    return _verbosity > Verbosity.QUIET and sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def loading_quietly() -> Iterator[None]:
    """Keep transformers' progress bars away while a model is loaded, unless somebody watches."""
    from transformers.utils import logging as theirs

    if watched() or not theirs.is_progress_bar_enabled():
        yield
        return
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.enable_progress_bar()


def progress(
    items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it"
) -> Iterable[T]:
    """Go through items behind a progress bar on standard error.

    There is no bar with ``--quiet``, where standard error is no terminal, and without tqdm.

    Args:
        items: What to go through.
        desc: What is being done, such as ``reading shards``.
        total: How many items there are, where `items` has no length.
        unit: What one item is.

    Returns:
        The items, in their order.
    """
    if not watched():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=visible(desc), total=total, unit=unit, leave=False)
    return bar
