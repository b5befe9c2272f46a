"""What a graph computes is bounded before anything native sees it.

ONNX Runtime believes constants: a TopK with a negative K ends the process (a failed assertion of
1.31's shape inference, seen in a Slice behind it), what it divides by is for it to check, and
nothing stops a graph of a few bytes from asking for all memory or for a day. So each operator of
our own list has a rule here. It refuses attributes and constants out of range, and says which shape
and type comes out; sizes, and with them memory and work, are then bounded for the whole graph.

Extents are numbers throughout: those that a caller chooses, such as the batch, are tried at the
values that bound them.

Sources: the ONNX operators' specification (opsets 17 to 24); ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.graph_check import MalformedError, shown
from vzip.runtime.bundle.graph_parts import (
    BOOL,
    ELEMENT_BYTES,
    FLOAT,
    FLOAT8,
    FLOATS,
    INT8,
    INT32,
    INT64,
    LARGEST_RANK,
    UINT8,
    Constant,
    Node,
    Parts,
    Read,
)
from vzip.runtime.errors import BundleError

Shape = tuple[int, ...]
Numbers = NDArray[np.int64]

_A_PROMPT_S_TOKENS = 256
# New tokens, and those before. What grows with the cube of a prompt shows in the last.
_PROMPTS: Final = ((2, 0), (1, 255), (256, 256), (4096, 0))
_MOST_FOLDED = 1024  # numbers that are followed through operators; shapes have a few
_LARGEST_NUMBER = 2**31 - 1
_INTEGERS = (INT32, INT64)


class UnfitError(Exception):
    """An operator that can't be run as it stands: what of it, and what was expected."""

    def __init__(self, got: str, expected: str) -> None:
        super().__init__(got)
        self.got, self.expected = got, expected


@dataclass(frozen=True)
class GraphLimits:
    """What a graph may take at the most.

    Attributes:
        value: Elements of one value.
        values: Elements of all values together.
        alive: Elements of the values that are needed at the same time, in the file's order.
        products: Multiplications of matrix products and convolutions.
    """

    value: int
    values: int
    alive: int
    products: int

    def times(self, count: int) -> GraphLimits:
        """Return the limits of a graph that takes several pictures."""
        return GraphLimits(*(count * each for each in (self.value, self.values, self.alive,
                                                  self.products)))  # fmt: skip


A_PICTURE: Final = GraphLimits(value=2**27, values=2**34, alive=2**29, products=2**43)
"""Of each picture of a call. LLaVA-1.5's tower, CLIP ViT-L/14 at 336 pixels, has 2**23, 2**30,
2**24 and 2**38; SigLIP so400m at 384 has about twice as much."""

A_PROMPT: Final = GraphLimits(value=2**28, values=2**36, alive=2**31, products=2**46)
"""Of a decoder that is given 256 tokens after 256 others, and so for each 256; one of 70 billion
weights has about 2**34 elements in all and 2**44 products."""


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
            if known is None or known.size > _MOST_FOLDED:
                return known  # looked at and let go
            self._known = known
        return self._known

    def small(self) -> Numbers | None:
        """Return its numbers if they are known and few."""
        return None if self.count > _MOST_FOLDED else self.numbers()


Ins = Sequence[Value | None]
Rule = Callable[["_Call"], Sequence[Value]]


@dataclass(frozen=True)
class _Operator:
    """A rule, and what a node of it may have.

    Attributes:
        rule: Gives the outputs, or raises `UnfitError`.
        inputs: Least and most of them.
        attributes: Name → type of the value.
    """

    rule: Rule
    inputs: tuple[int, int]
    attributes: Mapping[str, type]


RULES: Final[dict[str, _Operator]] = {}
"""Operator → its rule; of another domain than ONNX's with the domain before."""


def _rule(*names: str, inputs: tuple[int, int], **attributes: type) -> Callable[[Rule], Rule]:
    """Register a rule."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = _Operator(rule, inputs, attributes)
        return rule

    return register


class _Call:
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
        return _axis(self.of(name, default), rank)

    def constants(self, place: int, *, axes: int | None = None) -> list[int]:
        """Return an input's integers, which must be known: one axis of them, or a single one."""
        value = self[place]
        known = value.small()
        if known is None or value.dtype not in _INTEGERS:
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


def check_encoder(model: bytes, read: Read, *, file: str, batch: int) -> None:
    """Refuse a graph of pictures with an operator that can't be run, or that takes too much.

    Args:
        model: A serialised ModelProto.
        read: Gives bytes of the file of weights.
        file: Where it comes from, for messages.
        batch: The most pictures of a call.

    Raises:
        BundleError: There is such an operator, it takes more than `A_PICTURE`, or it is malformed
            otherwise.
    """
    with _naming_node(file) as place:
        parts = Parts(model)
        names = {extent for each in parts.inputs for extent in each.shape if type(extent) is str}
        sizes = sorted({1, batch}) if names else [batch]
        uses = _last_uses(parts)
        for size in sizes:
            choice = dict.fromkeys(names, size)
            _Walk(parts, read, choice, A_PICTURE.times(size), uses=uses, place=place).run()


def check_decoder(model: bytes, read: Read, *, file: str) -> None:
    """Refuse the graph of a language model as `check_encoder` does that of pictures.

    Its inputs have two extents that a caller chooses, in this order: new tokens, and those before.

    Args:
        model: A serialised ModelProto.
        read: Gives bytes of the file of weights.
        file: Where it comes from, for messages.

    Raises:
        BundleError: As for `check_encoder`, with `A_PROMPT`.
    """
    with _naming_node(file) as place:
        parts = Parts(model)
        extents = [extent for each in parts.inputs for extent in each.shape]
        names = list(dict.fromkeys(each for each in extents if isinstance(each, str)))
        if len(names) > len(_PROMPTS[0]):
            raise UnfitError(f"takes the extents {shown(names)}", "two that a caller chooses")
        uses = _last_uses(parts)
        for prompt in _PROMPTS:
            choice = dict(zip(names, prompt, strict=False))
            limits = A_PROMPT.times(max(1, prompt[0] // _A_PROMPT_S_TOKENS))
            _Walk(parts, read, choice, limits, uses=uses, place=place).run()


@contextmanager
def _naming_node(file: str) -> Iterator[list[str]]:
    """Turn what is wrong into the one error, which names the node that is being looked at."""
    place: list[str] = []
    try:
        yield place
    except UnfitError as error:
        got, expected = f"{file}: {''.join(place)}{error.got}", error.expected
        cause = "it was edited, or made by another tool or version"
        raise BundleError(got, expected=expected, cause=cause,
                          cure="export the bundle again") from None  # fmt: skip
    except MalformedError as error:
        raise BundleError(
            f"{file} is malformed: {error.got}",
            expected=error.expected,
            cause="the file is truncated, or was edited or made by another tool",
            cure="export the bundle again",
        ) from None


def _last_uses(parts: Parts) -> dict[str, int]:
    """Return the number of the last node that takes a value; outputs are taken at the end."""
    uses: dict[str, int] = {}
    for number, node in enumerate(parts.nodes()):
        operator = RULES.get(node.operator)
        if operator is None:
            raise UnfitError(f"holds the operator {shown(node.operator)}", "one of docs/bundle.md")
        for name in node.inputs:
            uses[name] = number
    uses.update(dict.fromkeys(parts.outputs, _LARGEST_NUMBER))
    return uses


class _Walk:
    """One pass through the nodes."""

    def __init__(
        self,
        parts: Parts,
        read: Read,
        choice: Mapping[str, int],
        limits: GraphLimits,
        *,
        uses: Mapping[str, int],
        place: list[str],
    ) -> None:
        self.parts, self.limits, self.uses, self.place = parts, limits, uses, place
        self.empty = 0 in choice.values()
        self.values: dict[str, Value] = {}
        self.made: set[str] = set()
        self.total = self.alive = self.products = 0
        for constant in parts.constants.values():
            self._add(constant.name, Value.of(constant, read), held=True)
        for each in parts.inputs:
            if unknown := [n for n in each.shape if isinstance(n, str) and n not in choice]:
                raise UnfitError(f"has an input of the extent {shown(unknown[0])}", "known ones")
            shape = tuple(choice[n] if isinstance(n, str) else n for n in each.shape)
            self._add(each.name, Value(each.dtype, shape))

    def run(self) -> None:
        """Look at every node."""
        for number, node in enumerate(self.parts.nodes()):
            self.place[:] = [f"{shown(node.operator)}, node {number}, "]
            self._node(number, node)
        self.place.clear()
        for name in self.parts.outputs:
            if name not in self.values:
                raise UnfitError(f"has no value {shown(name)}, its output", "one")

    def _node(self, number: int, node: Node) -> None:
        operator = RULES[node.operator]
        least, most = operator.inputs
        if not least <= len(node.inputs) <= most:
            raise UnfitError(f"has {len(node.inputs)} inputs", f"{least} to {most}")
        for name, value in node.attributes.items():
            kind = operator.attributes.get(name)
            if not isinstance(value, kind or ()):
                raise UnfitError(f"has the attribute {shown(name)} {shown(value)}",
                                 kind.__name__ if kind else "no such one")  # fmt: skip
        call = _Call(node, [self._taken(name) for name in node.inputs])
        made = operator.rule(call)
        if not 1 <= len(node.outputs) <= len(made) or not node.outputs[0]:
            raise UnfitError(f"has {len(node.outputs)} outputs", f"1 to {len(made)}")
        self.products += call.products
        if self.products > self.limits.products:
            raise UnfitError(f"makes {self.products} products", f"at most {self.limits.products}")
        self._count(call.scratch)
        self.alive -= call.scratch
        for name, value in zip(node.outputs, made, strict=False):
            if name:
                self._add(name, value)
                if name not in self.uses:
                    self._drop(name)
        for name in {*node.inputs}:
            if name and self.uses[name] == number:
                self._drop(name)

    def _taken(self, name: str) -> Value | None:
        if not name:
            return None
        if (found := self.values.get(name)) is None:
            raise UnfitError(f"takes {shown(name)}", "a value that is there by then")
        return found

    def _add(self, name: str, value: Value, *, held: bool = False) -> None:
        if not name or name in self.made:
            raise UnfitError(f"gives {shown(name)} again", "each value once")
        self.made.add(name)
        self.values[name] = value
        if value.dtype not in ELEMENT_BYTES:
            raise UnfitError(f"gives the data type {value.dtype}", "a number's")
        if held:
            return
        if value.count == 0 and not self.empty:
            raise UnfitError(f"gives {list(value.shape)}", "no extent of 0")
        self._count(value.count)

    def _count(self, count: int) -> None:
        """Count the elements of something that is made."""
        self.total += count
        self.alive += count
        for got, most, what in (
            (count, self.limits.value, "elements in one value"),
            (self.total, self.limits.values, "elements in all values"),
            (self.alive, self.limits.alive, "elements in values of one moment"),
        ):
            if got > most:
                raise UnfitError(f"makes {got} {what}", f"at most {most}")

    def _drop(self, name: str) -> None:
        found = self.values.pop(name, None)
        if found is not None and not found.constant:
            self.alive -= found.count


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise UnfitError(f"names the axis {axis}", f"one of {rank}")
    return axis % rank


def _axes(axes: Sequence[int], rank: int) -> list[int]:
    found = [_axis(axis, rank) for axis in axes]
    if len({*found}) != len(found):
        raise UnfitError(f"names the axes {found}", "each once")
    return found


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    made = []
    for extents in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        others = {each for each in extents if each != 1}
        if len(others) > 1:
            raise UnfitError(f"takes {' and '.join(map(str, map(list, shapes)))}",
                             "shapes that agree or are 1")  # fmt: skip
        made.append(others.pop() if others else 1)
    return tuple(made)


def _scalar(value: Value, what: str) -> None:
    if value.shape not in {(), (1,)}:
        raise UnfitError(f"has a {what} {list(value.shape)}", "a single number")


def _shaped(value: Value, shape: Shape, what: str) -> None:
    if value.shape != shape:
        raise UnfitError(f"has a {what} {list(value.shape)}", f"{list(shape)}")


def _typed(value: Value, *dtypes: int) -> None:
    if value.dtype not in dtypes:
        raise UnfitError(f"takes the data type {value.dtype}", f"one of {sorted(dtypes)}")


def _folded(call: _Call, made: Value, compute: Callable[..., Any]) -> list[Value]:
    """Return a value with its numbers, where those of the inputs are known and it has few."""
    if made.count > _MOST_FOLDED or made.dtype not in (*_INTEGERS, BOOL):
        return [made]
    known = [value.small() for value in call.all()]
    if any(each is None for each in known):
        return [made]
    with np.errstate(all="ignore"):
        numbers = np.asarray(compute(*known))
    if made.dtype == INT32:
        numbers = numbers.astype(np.int32)
    return [Value(made.dtype, made.shape, numbers.astype(np.int64).reshape(made.shape))]


@_rule("Erf", "Sigmoid", "Sqrt", "Tanh", "Cos", "Sin", "Reciprocal", inputs=(1, 1))
def _float_function(call: _Call) -> list[Value]:
    _typed(call[0], *FLOATS)
    return [Value(call[0].dtype, call[0].shape)]


@_rule("Neg", inputs=(1, 1))
def _neg(call: _Call) -> list[Value]:
    return _folded(call, Value(call[0].dtype, call[0].shape), np.negative)


@_rule("Identity", inputs=(1, 1))
def _identity(call: _Call) -> list[Value]:
    return _folded(call, Value(call[0].dtype, call[0].shape), lambda x: x)


@_rule("Cast", inputs=(1, 1), to=int, saturate=int, round_mode=bytes)
def _cast(call: _Call) -> list[Value]:
    to = call.of("to", 0)
    if to not in ELEMENT_BYTES:
        raise UnfitError(f"casts to the data type {to}", "a number's")
    if call[0].dtype in FLOATS or to == BOOL:
        return [Value(to, call[0].shape)]
    return _folded(call, Value(to, call[0].shape), lambda x: x)


@_rule("Softmax", inputs=(1, 1), axis=int)
def _softmax(call: _Call) -> list[Value]:
    _typed(call[0], *FLOATS)
    call.axis(-1, len(call[0].shape))
    return [Value(call[0].dtype, call[0].shape)]


@_rule("Clip", inputs=(1, 3))
def _clip(call: _Call) -> list[Value]:
    for place in (1, 2):
        if call.has(place):
            _shaped(call[place], (), "limit")
    return [Value(call[0].dtype, call[0].shape)]


_COMPUTED = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@_rule("Add", "Sub", "Mul", inputs=(2, 2))
def _arithmetic(call: _Call) -> list[Value]:
    made = Value(call[0].dtype, _broadcast(call[0].shape, call[1].shape))
    return _folded(call, made, _COMPUTED[call.node.operator])


@_rule("Div", inputs=(2, 2))
def _div(call: _Call) -> list[Value]:
    made = Value(call[0].dtype, _broadcast(call[0].shape, call[1].shape))
    if call[0].dtype in FLOATS:
        return [made]
    # By 0, and -1 below the least integer, the processor itself refuses: whether that ends the
    # process is each kernel's own care.
    by = call[1].numbers()
    if by is None or by.size == 0 or by.min() < 1:
        raise UnfitError("divides integers by what may be 0 or negative", "constants from 1 on")
    return _folded(call, made, lambda x, y: np.trunc(x / y).astype(np.int64))


@_rule("Pow", inputs=(2, 2))
def _pow(call: _Call) -> list[Value]:
    _typed(call[0], *FLOATS)
    _typed(call[1], *FLOATS, *_INTEGERS)
    return [Value(call[0].dtype, _broadcast(call[0].shape, call[1].shape))]


@_rule("Equal", "Greater", "GreaterOrEqual", inputs=(2, 2))
def _comparison(call: _Call) -> list[Value]:
    return [Value(BOOL, _broadcast(call[0].shape, call[1].shape))]


@_rule("Where", inputs=(3, 3))
def _where(call: _Call) -> list[Value]:
    _typed(call[0], BOOL)
    return [Value(call[1].dtype, _broadcast(*(each.shape for each in call.all())))]


@_rule("CumSum", inputs=(2, 2), exclusive=int, reverse=int)
def _cumsum(call: _Call) -> list[Value]:
    _axis(call.one(1), len(call[0].shape))
    call.flag("exclusive", 0)
    call.flag("reverse", 0)
    return [Value(call[0].dtype, call[0].shape)]


def _reduced(shape: Shape, axes: Sequence[int], *, keep: bool) -> Shape:
    if any(shape[axis] == 0 for axis in axes):
        raise UnfitError("reduces an axis of no elements", "at least one")
    return tuple(
        1 if axis in axes else extent
        for axis, extent in enumerate(shape)
        if keep or axis not in axes
    )


@_rule("ArgMax", inputs=(1, 1), axis=int, keepdims=int, select_last_index=int)
def _argmax(call: _Call) -> list[Value]:
    axis = call.axis(0, len(call[0].shape))
    call.flag("select_last_index", 0)
    return [Value(INT64, _reduced(call[0].shape, [axis], keep=call.flag("keepdims", 1)))]


@_rule("ReduceMax", "ReduceSum", "ReduceMean", inputs=(1, 2), axes=tuple, keepdims=int,
       noop_with_empty_axes=int)  # fmt: skip
def _reduce(call: _Call) -> list[Value]:
    shape = call[0].shape
    given = call.constants(1, axes=1) if call.has(1) else list(call.of("axes", ()))
    if call.has(1) and "axes" in call.node.attributes:
        raise UnfitError("names its axes twice", "once")
    axes = _axes(given, len(shape))
    if call.flag("noop_with_empty_axes", 0) and not axes:
        return [Value(call[0].dtype, shape)]
    keep = call.flag("keepdims", 1)
    return [Value(call[0].dtype, _reduced(shape, axes or range(len(shape)), keep=keep))]


@_rule("TopK", inputs=(2, 2), axis=int, largest=int, sorted=int)
def _topk(call: _Call) -> list[Value]:
    shape = list(call[0].shape)
    axis, (kept, *others) = call.axis(-1, len(shape)), call.constants(1, axes=1) or [0]
    call.flag("largest", 1)
    call.flag("sorted", 1)
    if others or not 1 <= kept <= shape[axis]:
        raise UnfitError(f"keeps {[kept, *others]} elements", f"1 to {shape[axis]}")
    shape[axis] = kept
    return [Value(call[0].dtype, tuple(shape)), Value(INT64, tuple(shape))]


@_rule("LayerNormalization", inputs=(2, 3), axis=int, epsilon=float, stash_type=int)
def _layer_normalization(call: _Call) -> list[Value]:
    shape = call[0].shape
    _typed(call[0], *FLOATS)
    part = shape[call.axis(-1, len(shape)) :]
    for value in call.all()[1:]:
        _shaped(value, part, "scale or bias")
    call.within("stash_type", FLOAT, FLOAT, FLOAT)
    return [Value(call[0].dtype, shape)]


@_rule("MatMul", inputs=(2, 2))
def _matmul(call: _Call) -> list[Value]:
    return [Value(call[0].dtype, _product(call, call[0].shape, call[1].shape))]


def _product(call: _Call, left: Shape, right: Shape) -> Shape:
    """Return the shape of a matrix product, and say what it costs."""
    if min(len(left), len(right)) < 2 or left[-1] != right[-2]:
        raise UnfitError(f"multiplies {list(left)} and {list(right)}", "[…, m, k] and […, k, n]")
    made = (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])
    call.products += math.prod(made) * left[-1]
    return made


@_rule("Gemm", inputs=(2, 3), alpha=float, beta=float, transA=int, transB=int)
def _gemm(call: _Call) -> list[Value]:
    _typed(call[0], *FLOATS)
    sides = []
    for place, name in ((0, "transA"), (1, "transB")):
        shape = call[place].shape
        if len(shape) != 2:
            raise UnfitError(f"multiplies {list(shape)}", "two axes")
        sides.append(shape[::-1] if call.flag(name, 0) else shape)
    made = _product(call, *sides)
    if call.has(2) and _broadcast(made, call[2].shape) != made:
        raise UnfitError(f"adds {list(call[2].shape)}", f"at most {list(made)}")
    return [Value(call[0].dtype, made)]


@_rule("Conv", inputs=(2, 3), auto_pad=bytes, dilations=tuple, group=int, kernel_shape=tuple,
       pads=tuple, strides=tuple)  # fmt: skip
def _conv(call: _Call) -> list[Value]:
    shape, weights = call[0].shape, call[1].shape
    spatial = len(shape) - 2
    if spatial not in {1, 2, 3} or len(weights) != len(shape) or min(weights) < 1:
        raise UnfitError(f"takes {list(shape)} and {list(weights)}", "[N, C, …] and [M, C, …]")
    group = call.within("group", 1, 1, _LARGEST_NUMBER)
    if weights[1] * group != shape[1] or weights[0] % group:
        raise UnfitError(f"takes {list(shape)} and {list(weights)} in {group} groups",
                         "channels that agree")  # fmt: skip
    if call.has(2):
        _shaped(call[2], weights[:1], "bias")
    if call.of("auto_pad", b"NOTSET") != b"NOTSET":
        raise UnfitError("pads by itself", "pads in numbers")
    kernel = weights[2:]
    if tuple(call.of("kernel_shape", kernel)) != kernel:
        raise UnfitError(f"has the kernel {call.of('kernel_shape', ())}", f"{kernel}")
    ones = (1,) * spatial
    strides = _each(call, "strides", ones, 1, spatial)
    dilations = _each(call, "dilations", ones, 1, spatial)
    pads = _each(call, "pads", (0,) * 2 * spatial, 0, 2 * spatial)
    made = []
    for place, extent in enumerate(shape[2:]):
        padded = extent + pads[place] + pads[place + spatial]
        reach = dilations[place] * (kernel[place] - 1) + 1
        if max(padded, reach) > _LARGEST_NUMBER or reach > padded:
            raise UnfitError(f"reaches over {reach} of {padded}", "what is there")
        if max(pads[place], pads[place + spatial]) >= reach:
            raise UnfitError(f"pads {list(pads)}", "less than the kernel")
        made.append((padded - reach) // strides[place] + 1)
    out = (shape[0], weights[0], *made)
    call.products += math.prod(out) * math.prod(weights[1:])
    call.scratch = math.prod(made) * math.prod(weights[1:])  # the picture, laid out for a product
    return [Value(call[0].dtype, out)]


def _each(call: _Call, name: str, default: Shape, least: int, count: int) -> Shape:
    found: Shape = tuple(call.of(name, default))
    if len(found) != count or any(not least <= each <= _LARGEST_NUMBER for each in found):
        raise UnfitError(f"has {name} {shown(list(found))}", f"{count} from {least} on")
    return found


@_rule("Concat", inputs=(1, 64), axis=int)
def _concat(call: _Call) -> list[Value]:
    values = call.all()
    shape = list(values[0].shape)
    axis = call.axis(len(shape), len(shape))
    for value in values[1:]:
        others = [*value.shape]
        if (
            len(others) != len(shape)
            or value.dtype != values[0].dtype
            or any(axis != place and others[place] != extent for place, extent in enumerate(shape))
        ):
            raise UnfitError(f"joins {list(value.shape)} to {shape}", "shapes that agree")
    shape[axis] = sum(value.shape[axis] for value in values)
    made = Value(values[0].dtype, tuple(shape))
    return _folded(call, made, lambda *parts: np.concatenate(parts, axis))


@_rule("Split", inputs=(1, 2), axis=int, num_outputs=int)
def _split(call: _Call) -> list[Value]:
    shape = list(call[0].shape)
    axis, count = call.axis(0, len(shape)), len(call.node.outputs)
    if call.has(1):
        sizes = call.constants(1, axes=1)
        if call.of("num_outputs", count) != count:
            raise UnfitError(f"has num_outputs {call.of('num_outputs', 0)}", f"{count}")
    else:
        if call.of("num_outputs", count) != count or shape[axis] % count:
            raise UnfitError(f"splits {shape[axis]} into {count}", "equal parts")
        sizes = [shape[axis] // count] * count
    if len(sizes) != count or min(sizes) < 1 or sum(sizes) != shape[axis]:
        raise UnfitError(f"splits {shape[axis]} into {sizes}", f"{count} parts of it")
    return [
        Value(call[0].dtype, tuple(size if place == axis else extent
                                   for place, extent in enumerate(shape)))
        for size in sizes
    ]  # fmt: skip


@_rule("Slice", inputs=(3, 5))
def _slice(call: _Call) -> list[Value]:
    shape = list(call[0].shape)
    starts, ends = call.constants(1, axes=1), call.constants(2, axes=1)
    axes = call.constants(3, axes=1) if call.has(3) else [*range(len(starts))]
    steps = call.constants(4, axes=1) if call.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise UnfitError("has starts, ends, axes and steps of different lengths", "equal ones")
    cut = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, _axes(axes, len(shape)), steps, strict=True):
        if not 1 <= abs(step) <= _LARGEST_NUMBER:
            raise UnfitError(f"has the step {step}", "one that leads on")
        extent = shape[axis]
        # What lies before the first element, going backwards, is no number of Python's.
        stop = None if step < 0 and end < -extent else end
        first = 0 if start < -extent and step > 0 else start
        cut[axis] = slice(first, stop, step)
        shape[axis] = len(range(*cut[axis].indices(extent)))
    return _with(Value(call[0].dtype, tuple(shape)), call, lambda known: known[tuple(cut)])


@_rule("Pad", inputs=(2, 4), mode=bytes)
def _pad(call: _Call) -> list[Value]:
    shape, pads = list(call[0].shape), call.constants(1, axes=1)
    axes = _axes(call.constants(3, axes=1), len(shape)) if call.has(3) else [*range(len(shape))]
    mode = call.of("mode", b"constant")
    if mode not in {b"constant", b"reflect", b"edge"}:
        raise UnfitError(f"pads by {shown(mode)}", "constant, reflect or edge")
    if len(pads) != 2 * len(axes) or any(not 0 <= each <= _LARGEST_NUMBER for each in pads):
        raise UnfitError(f"pads {shown(pads)}", f"{2 * len(axes)} sizes")
    if call.has(2):
        _scalar(call[2], "constant")
    for place, axis in enumerate(axes):
        before, after = pads[place], pads[place + len(axes)]
        if mode == b"reflect" and max(before, after) >= shape[axis]:
            raise UnfitError(f"reflects {max(before, after)} of {shape[axis]}", "fewer")
        shape[axis] += before + after
    return [Value(call[0].dtype, tuple(shape))]


@_rule("Transpose", inputs=(1, 1), perm=tuple)
def _transpose(call: _Call) -> list[Value]:
    shape = call[0].shape
    order = tuple(call.of("perm", range(len(shape))[::-1]))
    if sorted(order) != [*range(len(shape))]:
        raise UnfitError(f"has perm {shown(list(order))}", f"an order of {len(shape)} axes")
    return [Value(call[0].dtype, tuple(shape[axis] for axis in order))]


@_rule("Reshape", inputs=(2, 2), allowzero=int)
def _reshape(call: _Call) -> list[Value]:
    shape, wanted = call[0].shape, call.constants(1, axes=1)
    if not call.flag("allowzero", 0):
        if any(each == 0 and place >= len(shape) for place, each in enumerate(wanted)):
            raise UnfitError(f"keeps an axis of {list(shape)}", f"one of {len(shape)}")
        wanted = [each or shape[place] for place, each in enumerate(wanted)]
    rest = math.prod(each for each in wanted if each != -1)
    open_axes = wanted.count(-1)
    if open_axes > 1 or any(not -1 <= each <= _LARGEST_NUMBER for each in wanted):
        raise UnfitError(f"takes the shape {shown(wanted)}", "extents, and at most one -1")
    if open_axes and rest and call[0].count % rest == 0:
        wanted = [call[0].count // rest if each == -1 else each for each in wanted]
    elif open_axes or rest != call[0].count:
        raise UnfitError(f"makes {wanted} of {list(shape)}", "as many elements")
    made = Value(call[0].dtype, tuple(wanted))
    return _with(made, call, lambda known: known.reshape(wanted))


@_rule("Expand", inputs=(2, 2))
def _expand(call: _Call) -> list[Value]:
    wanted = call.constants(1, axes=1)
    if any(not 0 <= each <= _LARGEST_NUMBER for each in wanted):
        raise UnfitError(f"takes the shape {shown(wanted)}", "extents")
    return [Value(call[0].dtype, _broadcast(call[0].shape, tuple(wanted)))]


@_rule("Squeeze", inputs=(1, 2))
def _squeeze(call: _Call) -> list[Value]:
    shape = call[0].shape
    if call.has(1):
        axes = _axes(call.constants(1, axes=1), len(shape))
    else:
        axes = [axis for axis, extent in enumerate(shape) if extent == 1]
    if any(shape[axis] != 1 for axis in axes):
        raise UnfitError(f"leaves {axes} of {list(shape)} out", "axes of extent 1")
    return _moved(call, tuple(extent for axis, extent in enumerate(shape) if axis not in axes))


@_rule("Unsqueeze", inputs=(2, 2))
def _unsqueeze(call: _Call) -> list[Value]:
    given = call.constants(1, axes=1)
    rank = len(call[0].shape) + len(given)
    axes, rest = _axes(given, rank), iter(call[0].shape)
    return _moved(call, tuple(1 if axis in axes else next(rest) for axis in range(rank)))


def _moved(call: _Call, shape: Shape) -> list[Value]:
    """Return the first input in another shape, with its numbers."""
    return _with(Value(call[0].dtype, shape), call, lambda known: known.reshape(shape))


def _with(made: Value, call: _Call, moved: Callable[[Numbers], Numbers]) -> list[Value]:
    """Return a value with the numbers of the first input, moved, where they are known and few."""
    known = call[0].small()
    return [made if known is None else Value(made.dtype, made.shape, moved(known))]


@_rule("Gather", inputs=(2, 2), axis=int)
def _gather(call: _Call) -> list[Value]:
    shape, indices = call[0].shape, call[1]
    _typed(indices, *_INTEGERS)
    axis = call.axis(0, len(shape))
    known = indices.numbers()
    if known is not None and known.size:
        low, high = int(known.min()), int(known.max())
        if low < -shape[axis] or high >= shape[axis]:
            raise UnfitError(f"takes {low if low < 0 else high} of {shape[axis]}", "what is there")
    made = Value(call[0].dtype, shape[:axis] + indices.shape + shape[axis + 1 :])
    if known is None or made.count > _MOST_FOLDED:
        return [made]
    return _with(made, call, lambda all_: np.take(all_, known, axis))


@_rule("GatherElements", inputs=(2, 2), axis=int)
def _gather_elements(call: _Call) -> list[Value]:
    shape, indices = call[0].shape, call[1]
    _typed(indices, *_INTEGERS)
    axis = call.axis(0, len(shape))
    if len(indices.shape) != len(shape) or any(
        place != axis and of > shape[place] for place, of in enumerate(indices.shape)
    ):
        raise UnfitError(f"takes {list(indices.shape)} of {list(shape)}", "what is there")
    known = indices.numbers()
    if (
        known is not None
        and known.size
        and (known.min() < -shape[axis] or known.max() >= shape[axis])
    ):
        raise UnfitError(f"takes elements beyond {shape[axis]}", "what is there")
    return [Value(call[0].dtype, indices.shape)]


@_rule("Shape", inputs=(1, 1), start=int, end=int)
def _shape(call: _Call) -> list[Value]:
    shape = call[0].shape
    part = np.array(shape[call.of("start", 0) : call.of("end", len(shape))], np.int64)
    return [Value(INT64, part.shape, part)]


@_rule("Range", inputs=(3, 3))
def _range(call: _Call) -> list[Value]:
    _typed(call[0], *_INTEGERS)
    start, limit, delta = (call.one(place) for place in range(3))
    if delta == 0 or max(abs(start), abs(limit), abs(delta)) > _LARGEST_NUMBER:
        raise UnfitError(f"counts from {start} to {limit} by {delta}", "what ends")
    numbers = range(start, limit, delta)
    known = np.array(numbers, np.int64) if len(numbers) <= _MOST_FOLDED else None
    return [Value(call[0].dtype, (len(numbers),), known)]


def _quantised_along(call: _Call, of: int) -> None:
    """Check scale and zero point of a value that is quantised, at the places 1 and 2."""
    shape, scale = call[0].shape, call[1]
    _typed(scale, *FLOATS)
    if scale.shape not in {(), (1,)}:
        _shaped(scale, (shape[call.axis(1, len(shape))],), "scale")
    if call.within("block_size", 0, 0, 0) or not call.has(2):
        return
    _shaped(call[2], scale.shape, "zero point")
    _typed(call[2], of)


@_rule("QuantizeLinear", inputs=(2, 3), axis=int, block_size=int, output_dtype=int, saturate=int,
       precision=int)  # fmt: skip
def _quantize(call: _Call) -> list[Value]:
    _typed(call[0], *FLOATS)
    to = call.of("output_dtype", 0) or (call[2].dtype if call.has(2) else UINT8)
    if to not in {UINT8, INT8, FLOAT8}:
        raise UnfitError(f"quantises to the data type {to}", "8 bits")
    _quantised_along(call, to)
    return [Value(to, call[0].shape)]


@_rule("DequantizeLinear", inputs=(2, 3), axis=int, block_size=int, output_dtype=int)
def _dequantize(call: _Call) -> list[Value]:
    _typed(call[0], UINT8, INT8, INT32, FLOAT8)
    _quantised_along(call, call[0].dtype)
    return [Value(call.of("output_dtype", 0) or call[1].dtype, call[0].shape)]


@_rule("DynamicQuantizeLinear", inputs=(1, 1))
def _dynamic_quantize(call: _Call) -> list[Value]:
    _typed(call[0], FLOAT)
    return [Value(UINT8, call[0].shape), Value(FLOAT, ()), Value(UINT8, ())]


@_rule("com.microsoft::MatMulIntegerToFloat", inputs=(4, 7))
def _integer_product(call: _Call) -> list[Value]:
    left, right = call[0], call[1]
    _typed(left, UINT8, INT8)
    _typed(right, UINT8, INT8)
    if len(right.shape) != 2:
        raise UnfitError(f"multiplies by {list(right.shape)}", "a matrix")
    made = _product(call, left.shape, right.shape)
    columns = right.shape[1:]
    _typed(call[2], FLOAT)
    _typed(call[3], call[2].dtype)
    _scalar(call[2], "scale")
    if call.has(4):
        _scalar(call[4], "zero point")
        _typed(call[4], left.dtype)
    for place, dtype in ((3, FLOAT), (5, right.dtype)):
        if call.has(place):
            _typed(call[place], dtype)
            if call[place].shape not in {(), (1,)}:
                _shaped(call[place], columns, "scale or zero point")
    if call.has(6):
        _shaped(call[6], columns, "bias")
        _typed(call[6], FLOAT)
    return [Value(FLOAT, made)]


@_rule("com.microsoft::MatMulNBits", inputs=(3, 6), K=int, N=int, bits=int, block_size=int,
       accuracy_level=int)  # fmt: skip
def _n_bits(call: _Call) -> list[Value]:
    shape = call[0].shape
    _typed(call[0], FLOAT, *FLOATS)
    deep = call.within("K", 0, 1, _LARGEST_NUMBER)
    wide = call.within("N", 0, 1, _LARGEST_NUMBER)
    block, bits = call.within("block_size", 0, 16, 256), call.within("bits", 4, 4, 8)
    call.within("accuracy_level", 0, 0, 4)
    if bits not in {4, 8} or block & block - 1:
        raise UnfitError(f"has {bits} bits in blocks of {block}", "4 or 8, in a power of two")
    blocks = -(-deep // block)
    if len(shape) < 2 or shape[-1] != deep:
        raise UnfitError(f"multiplies {list(shape)}", f"[…, {deep}]")
    _typed(call[1], UINT8)
    _shaped(call[1], (wide, blocks, block * bits // 8), "matrix")
    _typed(call[2], call[0].dtype)
    if call[2].shape not in {(wide, blocks), (wide * blocks,)}:
        raise UnfitError(f"has scales {list(call[2].shape)}", f"{[wide, blocks]}")
    if call.has(3) or call.has(4):
        raise UnfitError("has zero points or an order of rows", "neither")
    if call.has(5):
        _typed(call[5], call[0].dtype)
        _shaped(call[5], (wide,), "bias")
    call.products += math.prod(shape) * wide
    return [Value(call[0].dtype, (*shape[:-1], wide))]


@_rule("com.microsoft::MultiHeadAttention", inputs=(3, 3), num_heads=int, scale=float)
def _attention(call: _Call) -> list[Value]:
    queries, keys, values = call.all()
    heads = call.within("num_heads", 0, 1, 2**16)
    for each in (queries, keys, values):
        _typed(each, *FLOATS)
        if len(each.shape) != 3 or each.shape[2] % heads or each.shape[0] != queries.shape[0]:
            raise UnfitError(f"attends to {list(each.shape)} with {heads} heads", "[B, n, H]")
    if keys.shape[:2] != values.shape[:2] or keys.shape[2] != queries.shape[2]:
        raise UnfitError(f"has keys {list(keys.shape)} and values {list(values.shape)}", "as many")
    scores = queries.shape[0] * heads * queries.shape[1] * keys.shape[1]
    call.scratch = scores
    call.products += scores * (queries.shape[2] + values.shape[2]) // heads
    return [Value(queries.dtype, (*queries.shape[:2], values.shape[2]))]
