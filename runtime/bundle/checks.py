"""Checks of values that were read from a file: each returns the value or raises `BundleError`.

`where` is the place of the value as it stands in the file (``selection.dominant``), so that the
message names what is to be mended. Types are compared exactly: JSON's ``true`` is not 1 here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from vzip.runtime.errors import BundleError

Choice = TypeVar("Choice", bound=str)
Scalar = bool | int | float | str

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CURE = "export the bundle again"


def refuse(where: str, got: object, expected: str) -> BundleError:
    """Return the error for a value of the manifest that has the wrong type or range."""
    shown = repr(got)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return BundleError(
        f"manifest.json: '{where}' is {shown}",
        expected=f"{expected}",
        cause="the file was edited or made by another tool",
        cure=f"{_CURE}",
    )


def mapping(where: str, value: object, keys: Collection[str]) -> Mapping[str, object]:
    """Return `value` as a mapping that has exactly `keys`."""
    if not isinstance(value, Mapping):
        raise refuse(where, value, "an object")
    absent = sorted(set(keys) - set(value))
    unknown = sorted(set(value) - set(keys))
    if absent or unknown:
        faults = [f"lacks {absent}"] * bool(absent) + [f"has the unknown {unknown}"] * bool(unknown)
        raise BundleError(
            f"manifest.json: '{where}' {' and '.join(faults)}",
            expected=f"exactly {sorted(keys)}",
            cause="the file was edited or made by another tool",
            cure=f"{_CURE}",
        )
    return value


def text(where: str, value: object) -> str:
    """Return `value` as a text that is not empty and has no control characters."""
    if type(value) is not str or not value or not value.isprintable():
        raise refuse(where, value, "a printable text")
    return value


def choice(where: str, value: object, choices: tuple[Choice, ...]) -> Choice:
    """Return the one of `choices` that equals `value`."""
    for option in choices:
        if type(value) is str and value == option:
            return option
    raise refuse(where, value, "one of " + ", ".join(repr(option) for option in choices))


def boolean(where: str, value: object) -> bool:
    """Return `value` as a truth value; 0 and 1 are none."""
    if type(value) is not bool:
        raise refuse(where, value, "true or false")
    return value


def integer(where: str, value: object, *, low: int, high: int = 2**53) -> int:
    """Return `value` as an integer within `low` … `high`."""
    if type(value) is not int or not low <= value <= high:
        limit = f"at least {low}" if high == 2**53 else f"from {low} to {high}"
        raise refuse(where, value, f"an integer {limit}")
    return value


def digest(where: str, value: object) -> str:
    """Return `value` as a SHA-256 digest."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise refuse(where, value, "64 lower-case hexadecimal digits")
    return value


def scalar(where: str, value: object) -> Scalar:
    """Return `value` as a truth value, finite number or text."""
    if type(value) is bool or type(value) is int or type(value) is str:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    raise refuse(where, value, "true, false, a finite number or a text")
