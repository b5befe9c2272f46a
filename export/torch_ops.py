"""ONNX operators in PyTorch: one small function each, and the table that names them.

What isn't covered by the operator's definition at opsets 17 to 20 for dense tensors is refused, not
approximated. `tests/parity/test_pytorch_backend.py` compares each with ONNX Runtime.
Source: Operators.md of ONNX 1.23.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

Inputs = Sequence["Tensor | None"]
Attributes = Mapping[str, Any]
Result = Any  # a Tensor, or a tuple of several; PyTorch annotates its own functions only in part
Operator = Callable[[list[Any], Attributes, int], Result]
"""(inputs with None where one is left out, attributes, number of outputs) → output or outputs."""

# ONNX's TensorProto.DataType → PyTorch's name.
DTYPES: Final[dict[int, str]] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8_e4m3fn",
}

OPERATORS: Final[dict[str, Operator]] = {}


def operator(name: str) -> Callable[[Operator], Operator]:
    """Register the function below as the ONNX operator `name`."""

    def register(function: Operator) -> Operator:
        OPERATORS[name] = function
        return function

    return register


def _elementwise(name: str, function: str) -> None:
    """Register an operator that is a function of torch, of its inputs alone, without attributes."""

    def apply(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
        import torch

        return getattr(torch, function)(*inputs)

    OPERATORS[name] = apply


def _folded(name: str, function: str) -> None:
    """Register an operator of one or more inputs that is a fold of a function of two."""

    def fold(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
        import torch

        return functools.reduce(getattr(torch, function), inputs)

    OPERATORS[name] = fold


def _unsupported(what: str) -> BackendError:
    """Return the error for a form of an operator that isn't covered here."""
    return BackendError(
        f"the backend 'pytorch' doesn't know {what}",
        cause="the graph was made by another exporter or version",
        cure="run it with backend='onnxruntime'",
    )


def _numbers(tensor: Tensor) -> list[int]:
    """Return the integers in a one-dimensional (or scalar) tensor."""
    return [int(number) for number in tensor.reshape(-1).tolist()]


def _axes(inputs: Inputs, attributes: Attributes) -> list[int] | None:
    """Return axes given as second input (newer opsets) or as attribute (older), if any."""
    if len(inputs) > 1 and inputs[1] is not None:
        return _numbers(inputs[1])
    return list(attributes["axes"]) if "axes" in attributes else None


def _positive(indices: Tensor, extent: int) -> Tensor:
    """Return indices with those from the end (−1 is the last) counted from the start."""
    import torch

    return torch.where(indices < 0, indices + extent, indices)


# Elementwise

for _name, _function in (
    ("Neg", "neg"),
    ("Abs", "abs"),
    ("Sqrt", "sqrt"),
    ("Reciprocal", "reciprocal"),
    ("Erf", "erf"),
    ("Tanh", "tanh"),
    ("Sigmoid", "sigmoid"),
    ("Floor", "floor"),
    ("Add", "add"),
    ("Sub", "sub"),
    ("Mul", "mul"),
    ("Equal", "eq"),
    ("Greater", "gt"),
    ("GreaterOrEqual", "ge"),
    ("Less", "lt"),
    ("LessOrEqual", "le"),
    ("And", "logical_and"),
    ("Or", "logical_or"),
    ("Not", "logical_not"),
    ("Where", "where"),
    ("MatMul", "matmul"),
):
    _elementwise(_name, _function)

_folded("Max", "maximum")
_folded("Min", "minimum")


@operator("Identity")
def _identity(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    return tensor


@operator("Div")
def _div(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    import torch

    mode = None if inputs[0].is_floating_point() else "trunc"
    return torch.div(inputs[0], inputs[1], rounding_mode=mode)


@operator("Mod")
def _mod(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    # fmod=0 takes the sign of the divisor, fmod=1 that of the dividend.
    function = torch.fmod if attributes.get("fmod", 0) else torch.remainder
    return function(inputs[0], inputs[1])


@operator("Pow")
def _pow(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    import torch

    base: Tensor = inputs[0]
    return torch.pow(base, inputs[1]).to(base.dtype)


@operator("Clip")
def _clip(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    import torch

    tensor, low, high = (*inputs, None, None)[:3]
    tensor = tensor if low is None else torch.maximum(tensor, low)
    return tensor if high is None else torch.minimum(tensor, high)


@operator("Cast")
def _cast(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    if attributes["to"] not in DTYPES:
        raise _unsupported(f"Cast to ONNX data type {attributes['to']}")
    tensor: Tensor = inputs[0]
    return tensor.to(getattr(torch, DTYPES[attributes["to"]]))


@operator("Gelu")
def _gelu(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    from torch.nn import functional

    return functional.gelu(inputs[0], approximate=_string(attributes.get("approximate", "none")))


def _string(value: str | bytes) -> str:
    """Return an attribute's text, which onnx holds as bytes."""
    return value.decode() if isinstance(value, bytes) else value


@operator("Softmax")
def _softmax(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    return torch.softmax(inputs[0], dim=attributes.get("axis", -1))


@operator("LayerNormalization")
def _layer_normalization(inputs: list[Any], attributes: Attributes, count: int) -> Result:
    from torch.nn import functional

    if count != 1 or attributes.get("stash_type", 1) != 1:
        raise _unsupported("LayerNormalization with more than one output or a stash_type but 1")
    tensor, scale, bias = (*inputs, None)[:3]
    axis = attributes.get("axis", -1) % tensor.ndim
    # stash_type 1: mean and variance in FP32, whatever the precision of the graph.
    normal = functional.layer_norm(
        tensor.float(), tensor.shape[axis:], None, None, attributes.get("epsilon", 1e-5)
    )
    normal = normal * scale.float()
    return (normal if bias is None else normal + bias.float()).to(tensor.dtype)


# Shapes


@operator("Shape")
def _shape(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    tensor: Tensor = inputs[0]
    extents = list(tensor.shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(extents, dtype=torch.int64, device=tensor.device)


@operator("Reshape")
def _reshape(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    shape = _numbers(inputs[1])
    if not attributes.get("allowzero", 0):
        shape = [extent or tensor.shape[axis] for axis, extent in enumerate(shape)]
    return tensor.reshape(shape)


@operator("Transpose")
def _transpose(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    return tensor.permute(list(attributes.get("perm", range(tensor.ndim)[::-1])))


@operator("Concat")
def _concat(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    return torch.cat(list(inputs), dim=attributes["axis"])


@operator("Unsqueeze")
def _unsqueeze(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    axes = _numbers(inputs[1])
    rank = tensor.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):  # axes count in the result
        tensor = tensor.unsqueeze(axis)
    return tensor


@operator("Squeeze")
def _squeeze(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    axes = _axes(inputs, attributes)
    if axes is None:
        return tensor.squeeze()
    if any(tensor.shape[axis] != 1 for axis in axes):
        raise _unsupported(f"Squeeze of axes {axes} of shape {list(tensor.shape)}")
    return tensor.squeeze(tuple(axes))


@operator("Expand")
def _expand(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    shape = np.broadcast_shapes(tuple(tensor.shape), tuple(_numbers(inputs[1])))
    return tensor.broadcast_to(shape)


@operator("Slice")
def _slice(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    import torch

    tensor, starts, ends, axes, steps = (*inputs, None, None)[:5]
    begin, end = _numbers(starts), _numbers(ends)
    dims = list(range(len(begin))) if axes is None else _numbers(axes)
    strides = [1] * len(begin) if steps is None else _numbers(steps)
    result: Tensor = tensor
    for dim, first, last, step in zip(dims, begin, end, strides, strict=True):
        # Python's slices clamp and count from the end as ONNX's do; PyTorch takes no step below 1.
        places = range(*slice(first, last, step).indices(result.shape[dim]))
        index = torch.tensor(list(places), dtype=torch.int64, device=result.device)
        result = result.index_select(dim, index)
    return result


@operator("Pad")
def _pad(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    from torch.nn import functional

    if _string(attributes.get("mode", "constant")) != "constant":
        raise _unsupported(f"Pad of mode {_string(attributes['mode'])}")
    tensor, pads, value, axes = (*inputs, None, None)[:4]
    amounts = _numbers(pads)
    dims = list(range(tensor.ndim)) if axes is None else _numbers(axes)
    both = {dim % tensor.ndim: amounts[k :: len(dims)] for k, dim in enumerate(dims)}
    # PyTorch wants (begin, end) from the last axis to the first.
    order = [both.get(dim, [0, 0]) for dim in reversed(range(tensor.ndim))]
    fill = 0 if value is None else value.item()
    return functional.pad(tensor, [amount for pair in order for amount in pair], value=fill)


@operator("Split")
def _split(inputs: list[Any], attributes: Attributes, count: int) -> Result:
    tensor: Tensor = inputs[0]
    axis = attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        sizes = _numbers(inputs[1])
    else:  # equal parts, the last one smaller where it must be
        size = math.ceil(tensor.shape[axis] / count)
        sizes = [min(size, tensor.shape[axis] - size * part) for part in range(count)]
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    return tuple(
        tensor.narrow(axis, start, size) for start, size in zip(starts, sizes, strict=True)
    )


# Constants


@operator("ConstantOfShape")
def _constant_of_shape(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    device = inputs[0].device
    value = attributes.get("value", torch.zeros(1)).to(device).reshape(())
    return value.expand(_numbers(inputs[0]))


@operator("Range")
def _range(inputs: list[Any], _attributes: Attributes, _count: int) -> Result:
    import torch

    start, limit, delta = (each.item() for each in inputs)
    return torch.arange(start, limit, delta, dtype=inputs[0].dtype, device=inputs[0].device)


# Choosing


@operator("Gather")
def _gather(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    tensor, indices = inputs
    axis = attributes.get("axis", 0) % tensor.ndim
    flat = _positive(indices, tensor.shape[axis]).reshape(-1)
    shape = (*tensor.shape[:axis], *indices.shape, *tensor.shape[axis + 1 :])
    result: Tensor = tensor.index_select(axis, flat).reshape(shape)
    return result


@operator("GatherElements")
def _gather_elements(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    tensor, indices = inputs
    axis = attributes.get("axis", 0)
    # ONNX wants equal extents on the other axes, PyTorch takes less.
    return torch.gather(tensor, axis, _positive(indices, tensor.shape[axis]).long())


@operator("GatherND")
def _gather_nd(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    tensor, indices = inputs
    batch = attributes.get("batch_dims", 0)
    lead = tensor.shape[:batch]
    flat = tensor.reshape(-1, *tensor.shape[batch:])  # [product of batch axes, …]
    places = indices.reshape(flat.shape[0], -1, indices.shape[-1])  # [same, places, depth]
    rows = torch.arange(flat.shape[0], device=flat.device)[:, None]
    depth = [_positive(places[..., k], flat.shape[1 + k]) for k in range(places.shape[-1])]
    place = (rows, *depth)
    result: Tensor = flat[place]
    return result.reshape(*lead, *indices.shape[batch:-1], *result.shape[2:])


@operator("ScatterElements")
def _scatter_elements(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    if _string(attributes.get("reduction", "none")) != "none":
        raise _unsupported("ScatterElements with a reduction")
    tensor, indices, updates = inputs
    axis = attributes.get("axis", 0)
    return torch.scatter(tensor, axis, _positive(indices, tensor.shape[axis]).long(), updates)


@operator("OneHot")
def _one_hot(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    indices, depth, values = inputs
    count = _numbers(depth)[0]
    axis = attributes.get("axis", -1) % (indices.ndim + 1)
    places = torch.arange(count, device=indices.device)
    places = places.reshape(-1, *[1] * (indices.ndim - axis))
    hot = _positive(indices, count).unsqueeze(axis) == places  # out of range: equal to none
    return torch.where(hot, values[1], values[0])


@operator("TopK")
def _top_k(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    tensor, count = inputs[0], _numbers(inputs[1])[0]
    axis = attributes.get("axis", -1)
    # torch.topk has no order for ties. A stable sort has ONNX's: the lower index comes first.
    values, indices = torch.sort(
        tensor, dim=axis, descending=bool(attributes.get("largest", 1)), stable=True
    )
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("ArgMax")
def _arg_max(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    if attributes.get("select_last_index", 0):
        raise _unsupported("ArgMax with select_last_index")
    tensor, axis = inputs[0], attributes.get("axis", 0)
    # The first of equal maxima, on every device: argmax of a mask would leave that to the kernel.
    extent = tensor.shape[axis]
    shape = [-1 if dim == axis % tensor.ndim else 1 for dim in range(tensor.ndim)]
    places = torch.arange(extent, device=tensor.device).reshape(shape)
    best = tensor == tensor.amax(dim=axis, keepdim=True)
    keep = bool(attributes.get("keepdims", 1))
    return torch.where(best, places, extent - 1).amin(dim=axis, keepdim=keep)


# Sums and products


@operator("CumSum")
def _cum_sum(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    tensor: Tensor = inputs[0]
    axis = _numbers(inputs[1])[0]
    tensor = tensor.flip(axis) if attributes.get("reverse", 0) else tensor
    total = tensor.cumsum(axis, dtype=tensor.dtype)
    total = total - tensor if attributes.get("exclusive", 0) else total
    return total.flip(axis) if attributes.get("reverse", 0) else total


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    """Register a reduction over axes."""

    def reduce(inputs: list[Any], attributes: Attributes, _count: int) -> Tensor:
        tensor: Tensor = inputs[0]
        axes = _axes(inputs, attributes)
        if not axes:
            if attributes.get("noop_with_empty_axes", 0):
                return tensor
            axes = list(range(tensor.ndim))
        return function(tensor, axes, bool(attributes.get("keepdims", 1)))

    OPERATORS[name] = reduce


_reduction("ReduceSum", lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype))
_reduction("ReduceMean", lambda x, axes, keep: x.mean(axes, keepdim=keep))
_reduction("ReduceMax", lambda x, axes, keep: x.amax(axes, keepdim=keep))
_reduction("ReduceL2", lambda x, axes, keep: x.norm(2, axes, keep))


@operator("Gemm")
def _gemm(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    left, right, bias = (*inputs, None)[:3]
    left = left.T if attributes.get("transA", 0) else left
    right = right.T if attributes.get("transB", 0) else right
    product: Tensor = (left @ right) * attributes.get("alpha", 1.0)
    return product if bias is None else product + bias * attributes.get("beta", 1.0)


# Quantisation


@operator("QuantizeLinear")
def _quantize(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    scale, zero = _steps(inputs, attributes)
    scaled = inputs[0] / scale
    if zero.dtype == torch.float8_e4m3fn:
        if not attributes.get("saturate", 1):
            raise _unsupported("QuantizeLinear to FP8 without saturation")
        largest = torch.finfo(zero.dtype).max  # PyTorch doesn't promise to saturate
        return scaled.float().clamp(-largest, largest).to(zero.dtype)
    if zero.dtype not in (torch.int8, torch.uint8):
        raise _unsupported(f"QuantizeLinear to {zero.dtype}")
    limits = torch.iinfo(zero.dtype)
    return (scaled.round() + zero).clamp(limits.min, limits.max).to(zero.dtype)


@operator("DequantizeLinear")
def _dequantize(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    import torch

    scale, zero = _steps(inputs, attributes)
    if zero.dtype not in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        raise _unsupported(f"DequantizeLinear from {zero.dtype}")
    return (inputs[0].to(scale.dtype) - zero.to(scale.dtype)) * scale


def _steps(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, Tensor]:
    """Return steps and zero points in a shape that goes with the first input."""
    tensor, scale, zero = (*inputs, None)[:3]
    if zero is None or scale.ndim > 1 or set(attributes) - {"axis", "saturate"}:
        raise _unsupported("a quantisation by blocks, or without its zero points")
    if not scale.ndim:
        return scale, zero
    shape = [1] * tensor.ndim
    shape[attributes.get("axis", 1)] = -1
    return scale.reshape(shape), zero.reshape(shape)


@operator("Conv")
def _conv(inputs: list[Any], attributes: Attributes, _count: int) -> Result:
    from torch.nn import functional

    tensor, weight, bias = (*inputs, None)[:3]
    if tensor.ndim != 4 or _string(attributes.get("auto_pad", "NOTSET")) != "NOTSET":
        raise _unsupported("Conv of other than two spatial axes, or with auto_pad")
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = functional.pad(tensor, (left, right, top, bottom))
    groups, size = attributes.get("group", 1), tuple(weight.shape[2:])
    stride = tuple(attributes.get("strides", (1, 1)))
    dilation = tuple(attributes.get("dilations", (1, 1)))
    rows, columns = (
        (extent - dilation[k] * (size[k] - 1) - 1) // stride[k] + 1
        for k, extent in enumerate(padded.shape[2:])
    )
    # As a product of matrices: cuDNN's convolution would use TF32 on its own accord.
    areas = functional.unfold(padded, size, dilation=dilation, stride=stride)
    areas = areas.reshape(len(areas), groups, -1, areas.shape[-1])  # [B, groups, in · area, places]
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1)  # [groups, out, in · area]
    result: Tensor = (kernels @ areas).reshape(tensor.shape[0], -1, rows, columns)
    return result if bias is None else result + bias[:, None, None]
