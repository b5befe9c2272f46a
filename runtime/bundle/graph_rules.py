"""The operators of our own list: one rule each.

A rule refuses attributes and constants out of range, and says which shape and type comes out.

Sources: the ONNX operators' specification (opsets 17 to 24); ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vzip.runtime.bundle.graph_call import (
    INTEGERS,
    MOST_FOLDED,
    RULES,
    Call,
    Numbers,
    Shape,
    UnfitError,
    Value,
    axes_of,
    axis_of,
    broadcast,
    check_dtype,
    check_scalar,
    check_shape,
    folded,
    rule,
)
from vzip.runtime.bundle.graph_check import shown
from vzip.runtime.bundle.graph_parts import (
    BOOL,
    ELEMENT_BYTES,
    FLOAT,
    FLOAT8,
    FLOATS,
    INT8,
    INT32,
    INT64,
    UINT8,
)

__all__ = ["RULES"]

_LARGEST_NUMBER = 2**31 - 1


@rule("Erf", "Sigmoid", "Sqrt", "Tanh", "Cos", "Sin", "Reciprocal", inputs=(1, 1))
def _float_function(call: Call) -> list[Value]:
    check_dtype(call[0], *FLOATS)
    return [Value(call[0].dtype, call[0].shape)]


@rule("Abs", "Neg", inputs=(1, 1))
def _abs_or_neg(call: Call) -> list[Value]:
    computed = np.abs if call.node.operator == "Abs" else np.negative
    return folded(call, Value(call[0].dtype, call[0].shape), computed)


@rule("Identity", inputs=(1, 1))
def _identity(call: Call) -> list[Value]:
    return folded(call, Value(call[0].dtype, call[0].shape), lambda x: x)


@rule("Cast", inputs=(1, 1), to=int, saturate=int, round_mode=bytes)
def _cast(call: Call) -> list[Value]:
    to = call.of("to", 0)
    if to not in ELEMENT_BYTES:
        raise UnfitError(f"casts to the data type {to}", "a number's")
    if call[0].dtype in FLOATS or to == BOOL:
        return [Value(to, call[0].shape)]
    return folded(call, Value(to, call[0].shape), lambda x: x)


@rule("Softmax", inputs=(1, 1), axis=int)
def _softmax(call: Call) -> list[Value]:
    check_dtype(call[0], *FLOATS)
    call.axis(-1, len(call[0].shape))
    return [Value(call[0].dtype, call[0].shape)]


@rule("Clip", inputs=(1, 3))
def _clip(call: Call) -> list[Value]:
    for place in (1, 2):
        if call.has(place):
            check_shape(call[place], (), "limit")
    return [Value(call[0].dtype, call[0].shape)]


_COMPUTED = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@rule("Add", "Sub", "Mul", inputs=(2, 2))
def _arithmetic(call: Call) -> list[Value]:
    made = Value(call[0].dtype, broadcast(call[0].shape, call[1].shape))
    return folded(call, made, _COMPUTED[call.node.operator])


@rule("Div", inputs=(2, 2))
def _div(call: Call) -> list[Value]:
    made = Value(call[0].dtype, broadcast(call[0].shape, call[1].shape))
    if call[0].dtype in FLOATS:
        return [made]
    # By 0, and -1 below the least integer, the processor itself refuses: whether that ends the
    # process is each kernel's own care.
    by = call[1].numbers()
    if by is None or by.size == 0 or by.min() < 1:
        raise UnfitError("divides integers by what may be 0 or negative", "constants from 1 on")
    return folded(call, made, lambda x, y: np.trunc(x / y).astype(np.int64))


@rule("Pow", inputs=(2, 2))
def _pow(call: Call) -> list[Value]:
    check_dtype(call[0], *FLOATS)
    check_dtype(call[1], *FLOATS, *INTEGERS)
    return [Value(call[0].dtype, broadcast(call[0].shape, call[1].shape))]


@rule("Equal", "Greater", "GreaterOrEqual", inputs=(2, 2))
def _comparison(call: Call) -> list[Value]:
    return [Value(BOOL, broadcast(call[0].shape, call[1].shape))]


@rule("Where", inputs=(3, 3))
def _where(call: Call) -> list[Value]:
    check_dtype(call[0], BOOL)
    return [Value(call[1].dtype, broadcast(*(each.shape for each in call.all())))]


@rule("CumSum", inputs=(2, 2), exclusive=int, reverse=int)
def _cumsum(call: Call) -> list[Value]:
    axis_of(call.one(1), len(call[0].shape))
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


@rule("ArgMax", inputs=(1, 1), axis=int, keepdims=int, select_last_index=int)
def _argmax(call: Call) -> list[Value]:
    axis = call.axis(0, len(call[0].shape))
    call.flag("select_last_index", 0)
    return [Value(INT64, _reduced(call[0].shape, [axis], keep=call.flag("keepdims", 1)))]


@rule("ReduceMax", "ReduceSum", "ReduceMean", inputs=(1, 2), axes=tuple, keepdims=int,
       noop_with_empty_axes=int)  # fmt: skip
def _reduce(call: Call) -> list[Value]:
    shape = call[0].shape
    given = call.constants(1, axes=1) if call.has(1) else list(call.of("axes", ()))
    if call.has(1) and "axes" in call.node.attributes:
        raise UnfitError("names its axes twice", "once")
    axes = axes_of(given, len(shape))
    if call.flag("noop_with_empty_axes", 0) and not axes:
        return [Value(call[0].dtype, shape)]
    keep = call.flag("keepdims", 1)
    return [Value(call[0].dtype, _reduced(shape, axes or range(len(shape)), keep=keep))]


@rule("TopK", inputs=(2, 2), axis=int, largest=int, sorted=int)
def _topk(call: Call) -> list[Value]:
    shape = list(call[0].shape)
    axis, (kept, *others) = call.axis(-1, len(shape)), call.constants(1, axes=1) or [0]
    call.flag("largest", 1)
    call.flag("sorted", 1)
    if others or not 1 <= kept <= shape[axis]:
        raise UnfitError(f"keeps {[kept, *others]} elements", f"1 to {shape[axis]}")
    shape[axis] = kept
    return [Value(call[0].dtype, tuple(shape)), Value(INT64, tuple(shape))]


@rule("LayerNormalization", inputs=(2, 3), axis=int, epsilon=float, stash_type=int)
def _layer_normalization(call: Call) -> list[Value]:
    shape = call[0].shape
    check_dtype(call[0], *FLOATS)
    part = shape[call.axis(-1, len(shape)) :]
    for value in call.all()[1:]:
        check_shape(value, part, "scale or bias")
    call.within("stash_type", FLOAT, FLOAT, FLOAT)
    return [Value(call[0].dtype, shape)]


@rule("MatMul", inputs=(2, 2))
def _matmul(call: Call) -> list[Value]:
    return [Value(call[0].dtype, _product(call, call[0].shape, call[1].shape))]


def _product(call: Call, left: Shape, right: Shape) -> Shape:
    """Return the shape of a matrix product, and say what it costs."""
    if min(len(left), len(right)) < 2 or left[-1] != right[-2]:
        raise UnfitError(f"multiplies {list(left)} and {list(right)}", "[…, m, k] and […, k, n]")
    made = (*broadcast(left[:-2], right[:-2]), left[-2], right[-1])
    call.products += math.prod(made) * left[-1]
    return made


@rule("Gemm", inputs=(2, 3), alpha=float, beta=float, transA=int, transB=int)
def _gemm(call: Call) -> list[Value]:
    check_dtype(call[0], *FLOATS)
    sides = []
    for place, name in ((0, "transA"), (1, "transB")):
        shape = call[place].shape
        if len(shape) != 2:
            raise UnfitError(f"multiplies {list(shape)}", "two axes")
        sides.append(shape[::-1] if call.flag(name, 0) else shape)
    made = _product(call, *sides)
    if call.has(2) and broadcast(made, call[2].shape) != made:
        raise UnfitError(f"adds {list(call[2].shape)}", f"at most {list(made)}")
    return [Value(call[0].dtype, made)]


@rule("Conv", inputs=(2, 3), auto_pad=bytes, dilations=tuple, group=int, kernel_shape=tuple,
       pads=tuple, strides=tuple)  # fmt: skip
def _conv(call: Call) -> list[Value]:
    shape, weights = call[0].shape, call[1].shape
    spatial = len(shape) - 2
    if spatial not in {1, 2, 3} or len(weights) != len(shape) or min(weights) < 1:
        raise UnfitError(f"takes {list(shape)} and {list(weights)}", "[N, C, …] and [M, C, …]")
    group = call.within("group", 1, 1, _LARGEST_NUMBER)
    if weights[1] * group != shape[1] or weights[0] % group:
        raise UnfitError(f"takes {list(shape)} and {list(weights)} in {group} groups",
                         "channels that agree")  # fmt: skip
    if call.has(2):
        check_shape(call[2], weights[:1], "bias")
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


def _each(call: Call, name: str, default: Shape, least: int, count: int) -> Shape:
    found: Shape = tuple(call.of(name, default))
    if len(found) != count or any(not least <= each <= _LARGEST_NUMBER for each in found):
        raise UnfitError(f"has {name} {shown(list(found))}", f"{count} from {least} on")
    return found


@rule("Concat", inputs=(1, 64), axis=int)
def _concat(call: Call) -> list[Value]:
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
    return folded(call, made, lambda *parts: np.concatenate(parts, axis))


@rule("Split", inputs=(1, 2), axis=int, num_outputs=int)
def _split(call: Call) -> list[Value]:
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


@rule("Slice", inputs=(3, 5))
def _slice(call: Call) -> list[Value]:
    shape = list(call[0].shape)
    starts, ends = call.constants(1, axes=1), call.constants(2, axes=1)
    axes = call.constants(3, axes=1) if call.has(3) else [*range(len(starts))]
    steps = call.constants(4, axes=1) if call.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise UnfitError("has starts, ends, axes and steps of different lengths", "equal ones")
    cut = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes_of(axes, len(shape)), steps, strict=True):
        if not 1 <= abs(step) <= _LARGEST_NUMBER:
            raise UnfitError(f"has the step {step}", "one that leads on")
        extent = shape[axis]
        # What lies before the first element, going backwards, is no number of Python's.
        stop = None if step < 0 and end < -extent else end
        first = 0 if start < -extent and step > 0 else start
        cut[axis] = slice(first, stop, step)
        shape[axis] = len(range(*cut[axis].indices(extent)))
    return _with(Value(call[0].dtype, tuple(shape)), call, lambda known: known[tuple(cut)])


@rule("Pad", inputs=(2, 4), mode=bytes)
def _pad(call: Call) -> list[Value]:
    shape, pads = list(call[0].shape), call.constants(1, axes=1)
    axes = axes_of(call.constants(3, axes=1), len(shape)) if call.has(3) else [*range(len(shape))]
    mode = call.of("mode", b"constant")
    if mode not in {b"constant", b"reflect", b"edge"}:
        raise UnfitError(f"pads by {shown(mode)}", "constant, reflect or edge")
    if len(pads) != 2 * len(axes) or any(not 0 <= each <= _LARGEST_NUMBER for each in pads):
        raise UnfitError(f"pads {shown(pads)}", f"{2 * len(axes)} sizes")
    if call.has(2):
        check_scalar(call[2], "constant")
    for place, axis in enumerate(axes):
        before, after = pads[place], pads[place + len(axes)]
        if mode == b"reflect" and max(before, after) >= shape[axis]:
            raise UnfitError(f"reflects {max(before, after)} of {shape[axis]}", "fewer")
        shape[axis] += before + after
    return [Value(call[0].dtype, tuple(shape))]


@rule("Transpose", inputs=(1, 1), perm=tuple)
def _transpose(call: Call) -> list[Value]:
    shape = call[0].shape
    order = tuple(call.of("perm", range(len(shape))[::-1]))
    if sorted(order) != [*range(len(shape))]:
        raise UnfitError(f"has perm {shown(list(order))}", f"an order of {len(shape)} axes")
    return [Value(call[0].dtype, tuple(shape[axis] for axis in order))]


@rule("Reshape", inputs=(2, 2), allowzero=int)
def _reshape(call: Call) -> list[Value]:
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


@rule("Expand", inputs=(2, 2))
def _expand(call: Call) -> list[Value]:
    wanted = call.constants(1, axes=1)
    if any(not 0 <= each <= _LARGEST_NUMBER for each in wanted):
        raise UnfitError(f"takes the shape {shown(wanted)}", "extents")
    return [Value(call[0].dtype, broadcast(call[0].shape, tuple(wanted)))]


@rule("Squeeze", inputs=(1, 2))
def _squeeze(call: Call) -> list[Value]:
    shape = call[0].shape
    if call.has(1):
        axes = axes_of(call.constants(1, axes=1), len(shape))
    else:
        axes = [axis for axis, extent in enumerate(shape) if extent == 1]
    if any(shape[axis] != 1 for axis in axes):
        raise UnfitError(f"leaves {axes} of {list(shape)} out", "axes of extent 1")
    return _moved(call, tuple(extent for axis, extent in enumerate(shape) if axis not in axes))


@rule("Unsqueeze", inputs=(2, 2))
def _unsqueeze(call: Call) -> list[Value]:
    given = call.constants(1, axes=1)
    rank = len(call[0].shape) + len(given)
    axes, rest = axes_of(given, rank), iter(call[0].shape)
    return _moved(call, tuple(1 if axis in axes else next(rest) for axis in range(rank)))


def _moved(call: Call, shape: Shape) -> list[Value]:
    """Return the first input in another shape, with its numbers."""
    return _with(Value(call[0].dtype, shape), call, lambda known: known.reshape(shape))


def _with(made: Value, call: Call, moved: Callable[[Numbers], Numbers]) -> list[Value]:
    """Return a value with the numbers of the first input, moved, where they are known and few."""
    known = call[0].small()
    return [made if known is None else Value(made.dtype, made.shape, moved(known))]


@rule("Gather", inputs=(2, 2), axis=int)
def _gather(call: Call) -> list[Value]:
    shape, indices = call[0].shape, call[1]
    check_dtype(indices, *INTEGERS)
    axis = call.axis(0, len(shape))
    known = indices.numbers()
    if known is not None and known.size:
        low, high = int(known.min()), int(known.max())
        if low < -shape[axis] or high >= shape[axis]:
            raise UnfitError(f"takes {low if low < 0 else high} of {shape[axis]}", "what is there")
    made = Value(call[0].dtype, shape[:axis] + indices.shape + shape[axis + 1 :])
    if known is None or made.count > MOST_FOLDED:
        return [made]
    return _with(made, call, lambda all_: np.take(all_, known, axis))


@rule("GatherElements", inputs=(2, 2), axis=int)
def _gather_elements(call: Call) -> list[Value]:
    shape, indices = call[0].shape, call[1]
    check_dtype(indices, *INTEGERS)
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


@rule("Shape", inputs=(1, 1), start=int, end=int)
def _shape(call: Call) -> list[Value]:
    shape = call[0].shape
    part = np.array(shape[call.of("start", 0) : call.of("end", len(shape))], np.int64)
    return [Value(INT64, part.shape, part)]


@rule("Range", inputs=(3, 3))
def _range(call: Call) -> list[Value]:
    check_dtype(call[0], *INTEGERS)
    start, limit, delta = (call.one(place) for place in range(3))
    if delta == 0 or max(abs(start), abs(limit), abs(delta)) > _LARGEST_NUMBER:
        raise UnfitError(f"counts from {start} to {limit} by {delta}", "what ends")
    numbers = range(start, limit, delta)
    known = np.array(numbers, np.int64) if len(numbers) <= MOST_FOLDED else None
    return [Value(call[0].dtype, (len(numbers),), known)]


def _quantised_along(call: Call, of: int) -> None:
    """Check scale and zero point of a value that is quantised, at the places 1 and 2."""
    shape, scale = call[0].shape, call[1]
    check_dtype(scale, *FLOATS)
    if scale.shape not in {(), (1,)}:
        check_shape(scale, (shape[call.axis(1, len(shape))],), "scale")
    if call.within("block_size", 0, 0, 0) or not call.has(2):
        return
    check_shape(call[2], scale.shape, "zero point")
    check_dtype(call[2], of)


@rule("QuantizeLinear", inputs=(2, 3), axis=int, block_size=int, output_dtype=int, saturate=int,
       precision=int)  # fmt: skip
def _quantize(call: Call) -> list[Value]:
    check_dtype(call[0], *FLOATS)
    to = call.of("output_dtype", 0) or (call[2].dtype if call.has(2) else UINT8)
    if to not in {UINT8, INT8, FLOAT8}:
        raise UnfitError(f"quantises to the data type {to}", "8 bits")
    _quantised_along(call, to)
    return [Value(to, call[0].shape)]


@rule("DequantizeLinear", inputs=(2, 3), axis=int, block_size=int, output_dtype=int)
def _dequantize(call: Call) -> list[Value]:
    check_dtype(call[0], UINT8, INT8, INT32, FLOAT8)
    _quantised_along(call, call[0].dtype)
    return [Value(call.of("output_dtype", 0) or call[1].dtype, call[0].shape)]


@rule("DynamicQuantizeLinear", inputs=(1, 1))
def _dynamic_quantize(call: Call) -> list[Value]:
    check_dtype(call[0], FLOAT)
    return [Value(UINT8, call[0].shape), Value(FLOAT, ()), Value(UINT8, ())]


@rule("com.microsoft::MatMulIntegerToFloat", inputs=(4, 7))
def _integer_product(call: Call) -> list[Value]:
    left, right = call[0], call[1]
    check_dtype(left, UINT8, INT8)
    check_dtype(right, UINT8, INT8)
    if len(right.shape) != 2:
        raise UnfitError(f"multiplies by {list(right.shape)}", "a matrix")
    made = _product(call, left.shape, right.shape)
    columns = right.shape[1:]
    check_dtype(call[2], FLOAT)
    check_dtype(call[3], call[2].dtype)
    check_scalar(call[2], "scale")
    if call.has(4):
        check_scalar(call[4], "zero point")
        check_dtype(call[4], left.dtype)
    for place, dtype in ((3, FLOAT), (5, right.dtype)):
        if call.has(place):
            check_dtype(call[place], dtype)
            if call[place].shape not in {(), (1,)}:
                check_shape(call[place], columns, "scale or zero point")
    if call.has(6):
        check_shape(call[6], columns, "bias")
        check_dtype(call[6], FLOAT)
    return [Value(FLOAT, made)]


@rule("com.microsoft::MatMulNBits", inputs=(3, 6), K=int, N=int, bits=int, block_size=int,
       accuracy_level=int)  # fmt: skip
def _n_bits(call: Call) -> list[Value]:
    shape = call[0].shape
    check_dtype(call[0], FLOAT, *FLOATS)
    deep = call.within("K", 0, 1, _LARGEST_NUMBER)
    wide = call.within("N", 0, 1, _LARGEST_NUMBER)
    block, bits = call.within("block_size", 0, 16, 256), call.within("bits", 4, 4, 8)
    call.within("accuracy_level", 0, 0, 4)
    if bits not in {4, 8} or block & block - 1:
        raise UnfitError(f"has {bits} bits in blocks of {block}", "4 or 8, in a power of two")
    blocks = -(-deep // block)
    if len(shape) < 2 or shape[-1] != deep:
        raise UnfitError(f"multiplies {list(shape)}", f"[…, {deep}]")
    check_dtype(call[1], UINT8)
    check_shape(call[1], (wide, blocks, block * bits // 8), "matrix")
    check_dtype(call[2], call[0].dtype)
    if call[2].shape not in {(wide, blocks), (wide * blocks,)}:
        raise UnfitError(f"has scales {list(call[2].shape)}", f"{[wide, blocks]}")
    if call.has(3) or call.has(4):
        raise UnfitError("has zero points or an order of rows", "neither")
    if call.has(5):
        check_dtype(call[5], call[0].dtype)
        check_shape(call[5], (wide,), "bias")
    call.products += math.prod(shape) * wide
    return [Value(call[0].dtype, (*shape[:-1], wide))]


@rule("com.microsoft::MultiHeadAttention", inputs=(3, 3), num_heads=int, scale=float)
def _attention(call: Call) -> list[Value]:
    queries, keys, values = call.all()
    heads = call.within("num_heads", 0, 1, 2**16)
    for each in (queries, keys, values):
        check_dtype(each, *FLOATS)
        if len(each.shape) != 3 or each.shape[2] % heads or each.shape[0] != queries.shape[0]:
            raise UnfitError(f"attends to {list(each.shape)} with {heads} heads", "[B, n, H]")
    if keys.shape[:2] != values.shape[:2] or keys.shape[2] != queries.shape[2]:
        raise UnfitError(f"has keys {list(keys.shape)} and values {list(values.shape)}", "as many")
    scores = queries.shape[0] * heads * queries.shape[1] * keys.shape[1]
    call.scratch = scores
    call.products += scores * (queries.shape[2] + values.shape[2]) // heads
    return [Value(queries.dtype, (*queries.shape[:2], values.shape[2]))]
