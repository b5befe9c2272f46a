"""Records: frozen dataclasses whose type hints are their checks, and the way to JSON and back.

A `Record` checks each field by its type hint when it is made, wherever its values come from, so
that whoever holds one holds a right one. Types are compared exactly: JSON's ``true`` is not 1. What
a type can't say stands behind it in an ``Annotated`` hint, as `Must`; relations between fields are
checked by the record's own ``__post_init__``, after this one.

`read` makes a record of parsed JSON, `write` makes JSON of a record, in the order of its fields. An
object has exactly the keys that its record has fields, be there defaults or not; fields marked with
`OPTIONAL` alone may be absent, and are not written where they are empty. Lists become tuples.
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

from vzip.runtime.errors import BundleError, InvalidInputError, VzipError

Kind = TypeVar("Kind")
Fit = Callable[[Any], Any]

OPTIONAL: Final = types.MappingProxyType({"optional": True})
"""Metadata of a field that may be absent in JSON and is left out where it is empty."""

_SCALARS: Final = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
}
_EDITED: Final = "the file was edited or made by another tool"
_EXPORT_AGAIN: Final = "export the bundle again"


class MisfitError(InvalidInputError):
    """A value that doesn't fit its place in a record.

    Attributes:
        place: Its place in the outermost record, as it stands in a file: ``selection.dominant``.
        fault: What is wrong there.
    """

    def __init__(self, record: str, place: str, fault: str, expected: str) -> None:
        self._parts = record, place, fault, expected
        self.place, self.fault = place, fault
        where = f"'{place}'" if place else "it"
        super().__init__(f"{record}: {where} {fault}", expected=expected)

    def __reduce__(self) -> tuple[Callable[..., MisfitError], tuple[object, ...]]:
        return MisfitError, self._parts

    def inside(self, record: str, step: str) -> MisfitError:
        """Return the misfit as it is seen from a record that holds this one in the field `step`."""
        joint = "." if self.place and not self.place.startswith("[") else ""
        _, _, fault, expected = self._parts
        return MisfitError(record, f"{step}{joint}{self.place}", fault, expected)


@dataclass(frozen=True)
class Must:
    """What a value must be beyond its type, in an ``Annotated`` hint.

    Attributes:
        test: Whether a value of the type is good.
        expected: The same in words.
    """

    test: Callable[[Any], bool]
    expected: str


def within(low: int, high: int = 2**53) -> Must:
    """Return that an integer is within `low` … `high`; every JSON reader has those up to 2**53."""
    limit = f"at least {low}" if high == 2**53 else f"from {low} to {high}"
    return Must(lambda value: low <= value <= high, f"an integer {limit}")


def matching(pattern: str, expected: str) -> Must:
    """Return that the whole of a text is of a pattern."""
    return Must(lambda value: re.fullmatch(pattern, value) is not None, expected)


def one_of(options: Collection[str]) -> Must:
    """Return that a text is one of some; where they are fixed, `Literal` says so itself."""
    return Must(lambda value: value in options, f"one of {', '.join(map(repr, options))}")


Text = Annotated[str, Must(lambda value: value != "" and value.isprintable(), "a printable text")]
Sha256 = Annotated[str, matching("[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
Count = Annotated[int, within(1)]
Index = Annotated[int, within(0)]
Scalar = bool | int | float | str
"""A truth value, finite number or text."""


class Record:
    """Base of frozen dataclasses whose fields are checked by their hints when one is made."""

    def __post_init__(self) -> None:
        """Check every field, and give it the form of its hint: lists become tuples.

        Raises:
            MisfitError: A value has the wrong type or is out of range.
        """
        kind: Any = type(self)
        for name, fit in _fields(kind):
            fitted = _inside(kind.__name__, name, fit, getattr(self, name))
            object.__setattr__(self, name, fitted)

    def misfit(self, place: str, expected: str, found: object = None) -> MisfitError:
        """Return the error for a field that contradicts another.

        Args:
            place: The field; or a place in it, such as ``llm.hidden_size``.
            expected: What should stand there.
            found: What to show in the place of the field's value.
        """
        shown = getattr(self, place) if found is None else found
        return MisfitError(type(self).__name__, place, f"is {_shown(shown)}", expected)


def read(kind: type[Kind], value: object) -> Kind:
    """Return the record that parsed JSON describes.

    Args:
        kind: Its class, a frozen dataclass.
        value: The JSON.

    Raises:
        MisfitError: A key is unknown or missing, a value has the wrong type or is out of range.
    """
    hint: Any = kind
    fitted: Kind = _fit(hint)(value)
    return fitted


def write(value: object) -> Any:
    """Return a record as JSON values, which `read` takes; and so for what a record may hold."""
    if is_dataclass(value):
        return {
            each.name: write(found)
            for each in fields(value)
            if (found := getattr(value, each.name)) or not each.metadata.get("optional")
        }
    if isinstance(value, Mapping):
        return {key: write(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [write(each) for each in value]
    return value


def parse(data: bytes | str) -> Any:
    """Return what strict JSON in UTF-8 holds.

    Raises:
        ValueError: It is none: keys that stand twice (two readers could disagree about them), NaN
            and infinities are refused too, and what is nested more deeply than Python can follow.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested more deeply than any record") from error


@contextmanager
def reading(
    file: str,
    *,
    kind: type[VzipError] = BundleError,
    cause: str = _EDITED,
    cure: str = _EXPORT_AGAIN,
) -> Iterator[None]:
    """Say of which file a misfit is.

    Args:
        file: Its name or path, for the message.
        kind: What is raised in the place of `MisfitError`.
        cause: Of the misfit.
        cure: For it.
    """
    try:
        yield
    except MisfitError as misfit:
        where = f"'{misfit.place}'" if misfit.place else "it"
        raise kind(
            f"{file}: {where} {misfit.fault}", expected=misfit.expected, cause=cause, cure=cure
        ) from misfit.__cause__


@cache
def _fields(kind: Any) -> tuple[tuple[str, Fit], ...]:
    """Return name and check of each field of a record, in order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple((each.name, _fit(hints[each.name])) for each in fields(kind))


@cache
def _fit(hint: Any, expected: str = "") -> Fit:
    """Return what gives a value the form of a hint, or raises `MisfitError`; see `Record`."""
    form = _FORMS.get(get_origin(hint), _fit_plain)
    return form(hint, expected or _expected(hint))


def _fit_plain(hint: Any, expected: str) -> Fit:
    def number(value: Any) -> float:
        if type(value) in (int, float) and _finite(value):
            return float(value)
        raise _refuse(value, expected)

    def scalar(value: Any) -> Any:
        if type(value) is hint:
            return value
        raise _refuse(value, expected)

    def record(value: Any) -> Any:
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return _made(hint, value)
        raise _refuse(value, expected)

    return number if hint is float else scalar if hint in _SCALARS else record


def _fit_annotated(hint: Any, _: str) -> Fit:
    base, *musts = get_args(hint)
    fit = _fit(base, musts[-1].expected)

    def annotated(value: Any) -> Any:
        fitted = fit(value)
        for must in musts:
            if not must.test(fitted):
                raise _refuse(value, must.expected)
        return fitted

    return annotated


def _fit_union(hint: Any, expected: str) -> Fit:
    """Return what takes the first arm that a value fits."""
    arms = [_fit(arm) for arm in get_args(hint) if arm is not types.NoneType]
    nullable = types.NoneType in get_args(hint)

    def union(value: Any) -> Any:
        if value is None and nullable:
            return None
        if len(arms) == 1:
            return arms[0](value)
        for arm in arms:
            with suppress(MisfitError):
                return arm(value)
        raise _refuse(value, expected)

    return union


def _fit_literal(hint: Any, expected: str) -> Fit:
    options = get_args(hint)

    def literal(value: Any) -> Any:
        for option in options:
            if type(value) is type(option) and value == option:
                return option
        raise _refuse(value, expected)

    return literal


def _fit_tuple(hint: Any, expected: str) -> Fit:
    """Return what makes a tuple of a JSON list."""
    *hints, last = get_args(hint)
    each = [_fit(one) for one in (hints if last is Ellipsis else (*hints, last))]

    def several(value: Any) -> tuple[Any, ...]:
        if isinstance(value, (list, tuple)):
            fits = each * len(value) if last is Ellipsis else each
            if len(fits) == len(value):
                pairs = enumerate(zip(fits, value, strict=True))
                return tuple(_inside("", f"[{place}]", *pair) for place, pair in pairs)
        raise _refuse(value, expected)

    return several


def _fit_mapping(hint: Any, expected: str) -> Fit:
    fit_key, fit_value = map(_fit, get_args(hint))

    def entry(key: Any, value: Any) -> Any:
        try:
            fit_key(key)
        except MisfitError as misfit:
            raise MisfitError("", "", f"has the key {_shown(key)}", misfit.expected) from None
        return _inside("", key, fit_value, value)

    def mapping(value: Any) -> dict[Any, Any]:
        if isinstance(value, Mapping):
            return {key: entry(key, each) for key, each in value.items()}
        raise _refuse(value, expected)

    return mapping


_FORMS: Final[dict[Any, Callable[[Any, str], Fit]]] = {
    Annotated: _fit_annotated,
    typing.Union: _fit_union,
    types.UnionType: _fit_union,
    Literal: _fit_literal,
    tuple: _fit_tuple,
    Mapping: _fit_mapping,
}


def _made(kind: Any, value: Mapping[str, Any]) -> Record:
    """Return the record with the fields that a mapping holds, which it checks itself."""
    optional = {each.name for each in fields(kind) if each.metadata.get("optional")}
    keys = {each.name for each in fields(kind)}
    absent, unknown = sorted(keys - optional - set(value)), sorted(set(value) - keys)
    if absent or unknown:
        faults = [f"lacks {absent}"] * bool(absent) + [f"has the unknown {unknown}"] * bool(unknown)
        raise MisfitError(kind.__name__, "", " and ".join(faults), f"exactly {sorted(keys)}")
    record: Record = kind(**value)
    return record


def _inside(record: str, step: str, fit: Fit, value: Any) -> Any:
    """Return a value in its form, or say where it stands."""
    try:
        return fit(value)
    except MisfitError as misfit:
        raise misfit.inside(record, step) from misfit.__cause__


def _expected(hint: Any) -> str:
    """Return in words what a hint asks for."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return str(inner[-1].expected)
    if origin is Literal:
        return f"{'one of ' * (len(inner) > 1)}{', '.join(map(repr, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(arm) for arm in inner)
    if origin is tuple:
        return "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
    return _SCALARS.get(hint, "null" if hint is types.NoneType else "an object")


def _finite(value: float) -> bool:
    """Return whether a float holds a number, which may be an integer beyond all floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _refuse(value: object, expected: str) -> MisfitError:
    """Return the error for a value that has the wrong type or range."""
    return MisfitError("", "", f"is {_shown(value)}", expected)


def _shown(value: object) -> str:
    """Return a value as it stands in messages."""
    shown = repr(write(value) if isinstance(value, tuple) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return JSON pairs as a dict; two readers could disagree about a key that stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {_shown(twice)} stands twice in an object")
    return result


def _no_constant(name: str) -> object:
    """Refuse NaN and infinities, which Python's json takes and JSON has not."""
    raise ValueError(f"{name} is not JSON")
