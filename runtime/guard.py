"""Doors: where foreign input comes in, what other packages raise of it becomes an error of ours.

A door is a public function or command that reads what vzip didn't write: a file, a picture, an
answer of a server, an option. What a hostile or damaged one makes Python, the standard library or a
package raise has no end: OverflowError, RecursionError, MemoryError, a panic of Rust. A door says
once which error of `vzip.runtime.errors` all of it becomes, and the original stays ``__cause__``,
which ``vzip -vv`` prints with its traceback.

A guard is no place to hide behind. Errors that say what is wrong and what to do are raised where it
is known; they pass, and so does what is always a bug of ours: an assertion or an unknown name in
vzip's own code. So does what ends a program or a task, of which Python knows more than two kinds.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import string
from collections.abc import Callable, Iterator
from pathlib import PurePath
from types import TracebackType
from typing import Final, ParamSpec, TypeVar

from vzip.runtime.errors import VzipError, first_line

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST: Final = 200  # characters of a value or of another library's line in a message
# What can't come from input where vzip's own code raises it; and what can't where that code does
# not read input, but works with what was checked before.
_BUGS: Final = (AssertionError, NameError)
_BUGS_OF_WORK: Final = (
    *_BUGS, ArithmeticError, AttributeError, LookupError, NotImplementedError, StopIteration,
    TypeError, ValueError,
)  # fmt: skip


@contextlib.contextmanager
def guarded(
    kind: type[VzipError],
    got: str | Callable[[], str],
    *,
    expected: str = "",
    cure: str = "",
    reads: bool = True,
) -> Iterator[None]:
    """Let what is raised inside leave as an error of one kind; a context manager.

    Errors of vzip pass as they are. So do ``KeyboardInterrupt`` and everything else that is no
    ``Exception``, but for the panics of packages written in Rust; and bugs, see the module.

    Args:
        kind: The error that the door documents.
        got: What is wrong, naming the thing at the door: ``the token file 'a.safetensors' can't be
            read``. A function is called when it is needed.
        expected: As in `VzipError`.
        cure: As in `VzipError`.
        reads: Whether the code inside makes sense of foreign input itself. What works with what
            others have read raises no KeyError and the like by its own lines but by a bug of ours,
            and such a bug passes.

    Raises:
        VzipError: Of that kind; its cause is the original's kind and first line.
    """
    try:
        yield
    except VzipError:
        raise
    except BaseException as error:
        if not _is_foreign(error, reads=reads):
            raise
        subject = got if isinstance(got, str) else got()
        raise kind(subject, expected=expected, cause=said_by(error), cure=cure) from error


def door(
    kind: type[VzipError], got: str, *, expected: str = "", cure: str = "", reads: bool = True
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Guard a whole function; a decorator. Not for generators, whose body runs later.

    Args:
        kind: As for `guarded`.
        got: As for `guarded`; ``{path}`` stands for the function's argument of that name, and
            ``{self.path}`` for what an argument has.
        expected: As for `guarded`.
        cure: As for `guarded`; ``{path}`` likewise.
        reads: As for `guarded`.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        assert not inspect.isgeneratorfunction(function), "a generator's body runs later"
        signature = inspect.signature(function)

        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except VzipError:
                raise
            except BaseException as error:
                if not _is_foreign(error, reads=reads) or _is_miscall(error):
                    raise
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                raise kind(
                    _FILLED.vformat(got, (), bound.arguments),
                    expected=expected,
                    cause=said_by(error),
                    cure=_FILLED.vformat(cure, (), bound.arguments),
                ) from error

        return inside

    return decorate


def shown(value: object) -> str:
    """Return a value for a message: a text or path as it is, of anything else its type."""
    if isinstance(value, (str, PurePath)):
        text = str(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    if value is None or isinstance(value, (bool, float)):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 64 else "a huge integer"
    return type(value).__name__


def said_by(error: BaseException) -> str:
    """Return another library's error as a cause: its kind and its first line."""
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return f"{kind}: there is not enough memory for it"
    try:
        line = getattr(error, "strerror", None) or first_line(error)
    except Exception:  # noqa: BLE001 - an error of another library that can't even be printed
        line = kind
    line = str(line)[:_LONGEST]
    return kind if line == kind else f"{kind}: {line}"


class _Filled(string.Formatter):
    """Fills in values as `shown`."""

    def format_field(self, value: object, format_spec: str) -> str:  # noqa: ARG002
        return shown(value)


_FILLED: Final = _Filled()


def _is_foreign(error: BaseException, *, reads: bool) -> bool:
    """Return whether an error can come from input."""
    if not isinstance(error, Exception):
        return type(error).__name__ == "PanicException"  # pyo3's: it has no module to import
    bugs = _BUGS if reads else _BUGS_OF_WORK
    return not (isinstance(error, bugs) and _innermost(error.__traceback__).startswith("vzip."))


def _innermost(trace: TracebackType | None) -> str:
    """Return the name of the module whose code raised."""
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name


def _is_miscall(error: BaseException) -> bool:
    """Return whether the call itself had the wrong arguments, so that no line of it ran."""
    trace = error.__traceback__
    return isinstance(error, TypeError) and trace is not None and trace.tb_next is None
