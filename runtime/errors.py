"""The errors that vzip raises.

Every error has fields: what was got, what was expected, the likely cause, the cure. The message is
made of them here, in one line. Command lines print the message of a `VzipError` and exit with
status 2; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib.util
from typing import Final

_LONGEST_FIELD: Final = 2000  # characters of a field in a message


class VzipError(Exception):
    """Base of every error that is the caller's to mend.

    The message is made of the fields, in their order, in one line:
    ``GOT, expected EXPECTED; CAUSE; CURE``. Fields that are empty are left out.

    Attributes:
        got: What is wrong, with the value that was found.
        expected: What was expected in its place.
        cause: What the likely cause is, where it can be told.
        cure: What the caller can do.
    """

    def __init__(self, got: str, *, expected: str = "", cause: str = "", cure: str = "") -> None:
        self.got, self.expected, self.cause, self.cure = got, expected, cause, cure
        super().__init__(_message(got, expected, cause, cure))

    def __reduce__(self) -> tuple[object, ...]:
        # An error crosses from a worker process with its fields.
        fields = (self.got, self.expected, self.cause, self.cure)
        return _remade, (type(self), *fields), self.__dict__


def _message(*fields: str) -> str:
    """Return the one line that says all; a field may quote another library's lines.

    It may also quote a name of a file or a server's answer: what a terminal would take for a
    command, or can't show, stands there escaped; and the middle of what is very long is left out.
    """
    got, expected, cause, cure = (
        printable(" ".join(part.strip() for part in _short(field).splitlines()).strip())
        for field in fields
    )
    fault = f"{got}, expected {expected}" if expected else got
    return "; ".join(part for part in (fault, cause, cure) if part)


def _short(field: str) -> str:
    """Return a field without the middle of a text that nobody reads."""
    half = _LONGEST_FIELD // 2
    return field if len(field) <= _LONGEST_FIELD else f"{field[:half]} … {field[-half:]}"


def printable(text: str) -> str:
    """Return a text whose characters that can't be printed are escaped, as Python writes them."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


def _remade(kind: type[VzipError], got: str, expected: str, cause: str, cure: str) -> VzipError:
    """Return an error again, of its fields."""
    return kind(got, expected=expected, cause=cause, cure=cure)


class InvalidInputError(VzipError, ValueError):
    """An argument, image or array that can't be used: raised before any device call."""


class BudgetError(InvalidInputError):
    """A token budget that the tower's tokens can't fill."""


class BundleError(VzipError):
    """A bundle that is missing, malformed, tampered with or of another schema version."""


class CheckpointError(VzipError):
    """A checkpoint, configuration or tensor that was not found or has the wrong form."""


class ExportError(VzipError):
    """A graph that broke one of the promises of `docs/bundle.md`; nothing was written."""


class ParityError(VzipError):
    """A graph whose tokens differ from the reference by more than the gate allows."""


class BackendError(VzipError, RuntimeError):
    """An inference backend that could not be opened, failed while running, or was closed."""


class MissingDependencyError(VzipError, ImportError):
    """An optional package that this command needs and that is not installed."""


def missing(package: str, *, needed_for: str, extra: str) -> MissingDependencyError:
    """Return the error for an optional package that can't be imported.

    Args:
        package: The import name, such as ``onnxruntime``.
        needed_for: What it is needed for, as it should stand in the message.
        extra: The extra of the distribution that brings it.

    Returns:
        The error, to be raised by the caller (``raise missing(...) from error``).
    """
    return MissingDependencyError(
        f"{needed_for} needs the package '{package}', which can't be imported here",
        cure=f"install it with: pip install 'vzip[{extra}]'",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require(*packages: str, needed_for: str, extra: str) -> None:
    """Say in one line that an extra is not installed, before the first import fails in many.

    Args:
        packages: Import names; none of them is imported.
        needed_for: As for `missing`.
        extra: As for `missing`.

    Raises:
        MissingDependencyError: One of them is not installed.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # what stands in its place can't be asked
            found = None
        if found is None:
            raise missing(package, needed_for=needed_for, extra=extra)
