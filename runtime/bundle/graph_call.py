"""One node of a graph as its rule sees it: values, attributes, and what is refused of them.

`vzip.runtime.bundle.graph_rules` has a rule for each operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.graph_parts import BOOL, INT32, INT64, LARGEST_RANK, Constant, Node, Read

Shape = tuple[int, ...]
Numbers = NDArray[np.int64]

MOST_FOLDED = 1024  # numbers that are followed through operators; shapes have a few
INTEGERS = (INT32, INT64)


class UnfitError(Exception):
    """An operator that can't be run as it stands: what of it, and what was expected."""

    def __init__(self, got: str, expected: str) -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


class Value:
    """A value inside a graph: type, shape, and its numbers where they are known.

    Attributes:
        dtype: As TensorProto.DataType has it.
        shape: Extents.
        count: How many elements that makes.
    """

    __slots__ = ("_constant", "_known", "_read", "count", "dtype", "shape")

    def __init__(self, dtype: int, shape: Shape, known: Numbers | None = None) -> None:
        if len(shape) > LARGEST_RANK:
            raise UnfitError(f"gives {len(shape)} axes", f"at most {LARGEST_RANK}")
        self.dtype, self.shape, self.count = dtype, shape, math.prod(shape)
        self._known = known
        self._constant: Constant | None = None
        self._read: Read | None = None

    @classmethod
    def of(cls, constant: Constant, read: Read) -> Value:
        """Return the value of a constant; its numbers are read when they are asked for."""
        self = cls(constant.dtype, constant.shape)
        self._constant, self._read = constant, read
        return self

    @property
    def constant(self) -> bool:
        """Whether the file holds its numbers."""
        return self._constant is not None

    def numbers(self) -> Numbers | None:
        """Return integers or truth values of its shape, if they are known; else None."""
        if self._known is None and self._constant is not None and self._read is not None:
            known = self._constant.numbers(self._read)
            if known is None or known.size > MOST_FOLDED:
                return known  # looked at and let go
            self._known = known
        return self._known

    def small(self) -> Numbers | None:
        """Return its numbers if they are known and few."""
        return None if self.count > MOST_FOLDED else self.numbers()


Ins = Sequence[Value | None]
Rule = Callable[["Call"], Sequence[Value]]


@dataclass(frozen=True)
class Operator:
    """A rule, and what a node of it may have.

    Attributes:
        rule: Gives the outputs, or raises `UnfitError`.
        inputs: Least and most of them.
        attributes: Name → type of the value.
    """

    rule: Rule
    inputs: tuple[int, int]
    attributes: Mapping[str, type]


RULES: Final[dict[str, Operator]] = {}
"""Operator → its rule; of another domain than ONNX's with the domain before."""


def rule(*names: str, inputs: tuple[int, int], **attributes: type) -> Callable[[Rule], Rule]:
    """Register a rule."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = Operator(rule, inputs, attributes)
        return rule

    return register


class Call:
    """One node, as its rule sees it.

    Attributes:
        node: The node.
        products: Multiplications that it makes, which its rule says.
        scratch: Elements that it needs besides, which its rule says.
    """

    def __init__(self, node: Node, ins: Ins) -> None:
        self.node, self._ins = node, ins
        self.products = self.scratch = 0

    def has(self, place: int) -> bool:
        """Whether an optional input is given."""
        return place < len(self._ins) and self._ins[place] is not None

    def __getitem__(self, place: int) -> Value:
        found = self._ins[place] if place < len(self._ins) else None
        if found is None:
            raise UnfitError(f"lacks its input {place}", "one")
        return found

    def all(self) -> list[Value]:
        """Return every input, none of which may be left out."""
        return [self[place] for place in range(len(self._ins))]

    def of(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return self.node.attributes.get(name, default)

    def flag(self, name: str, default: int) -> bool:
        """Return an attribute that is 0 or 1."""
        return bool(self.within(name, default, 0, 1))

    def within(self, name: str, default: int, low: int, high: int) -> int:
        """Return an integer attribute in its range."""
        found: int = self.of(name, default)
        if not low <= found <= high:
            raise UnfitError(f"has {name} {found}", f"{low} to {high}")
        return found

    def axis(self, default: int, rank: int, name: str = "axis") -> int:
        """Return an attribute that names one of `rank` axes, counted from the first."""
        return axis_of(self.of(name, default), rank)

    def constants(self, place: int, *, axes: int | None = None) -> list[int]:
        """Return an input's integers, which must be known: one axis of them, or a single one."""
        value = self[place]
        known = value.small()
        if known is None or value.dtype not in INTEGERS:
            raise UnfitError(f"computes its input {place} from what it is given", "constants")
        if len(value.shape) != 1 and not (axes is None and value.shape == ()):
            raise UnfitError(f"has an input {place} {list(value.shape)}", "one axis")
        if known.size > 2 * LARGEST_RANK:
            raise UnfitError(f"has {known.size} numbers in its input {place}", "one for each axis")
        return [int(each) for each in known.ravel()]

    def one(self, place: int) -> int:
        """Return an input that is a single known integer."""
        found = self.constants(place)
        if len(found) != 1:
            raise UnfitError(f"has {len(found)} numbers in its input {place}", "one")
        return found[0]


def axis_of(axis: int, rank: int) -> int:
    """Return one of `rank` axes, counted from the first; raises `UnfitError` if there is none."""
    if not -rank <= axis < rank:
        raise UnfitError(f"names the axis {axis}", f"one of {rank}")
    return axis % rank


def axes_of(axes: Sequence[int], rank: int) -> list[int]:
    """Return several axes as `axis_of` does, each of which may stand once."""
    found = [axis_of(axis, rank) for axis in axes]
    if len({*found}) != len(found):
        raise UnfitError(f"names the axes {found}", "each once")
    return found


def broadcast(*shapes: Shape) -> Shape:
    """Return what ONNX's broadcasting makes of shapes; raises `UnfitError` if they don't agree."""
    rank = max(map(len, shapes))
    made = []
    for extents in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        others = {each for each in extents if each != 1}
        if len(others) > 1:
            raise UnfitError(f"takes {' and '.join(map(str, map(list, shapes)))}",
                             "shapes that agree or are 1")  # fmt: skip
        made.append(others.pop() if others else 1)
    return tuple(made)


def check_scalar(value: Value, what: str) -> None:
    """Refuse what is no single number."""
    if value.shape not in {(), (1,)}:
        raise UnfitError(f"has a {what} {list(value.shape)}", "a single number")


def check_shape(value: Value, shape: Shape, what: str) -> None:
    """Refuse another shape."""
    if value.shape != shape:
        raise UnfitError(f"has a {what} {list(value.shape)}", f"{list(shape)}")


def check_dtype(value: Value, *dtypes: int) -> None:
    """Refuse another data type than those of TensorProto.DataType."""
    if value.dtype not in dtypes:
        raise UnfitError(f"takes the data type {value.dtype}", f"one of {sorted(dtypes)}")


def folded(call: Call, made: Value, compute: Callable[..., Any]) -> list[Value]:
    """Return a value with its numbers, where those of the inputs are known and it has few."""
    if made.count > MOST_FOLDED or made.dtype not in (*INTEGERS, BOOL):
        return [made]
    known = [value.small() for value in call.all()]
    if any(each is None for each in known):
        return [made]
    with np.errstate(all="ignore"):
        numbers = np.asarray(compute(*known))
    if made.dtype == INT32:
        numbers = numbers.astype(np.int32)
    return [Value(made.dtype, made.shape, numbers.astype(np.int64).reshape(made.shape))]
