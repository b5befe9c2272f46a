"""Quantised weights made whole again, where a scheme is a number times its scale.

FP8 and INT8 weights are numbers times the scales beside them, however these are called and whatever
shares one: the matrix, an output channel or a block. bitsandbytes' 4-bit weights are places in a
table. Nothing else is undone, and no number is read as a weight while it needs a scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vzip.export.checkpoint.schemes import SCALED, Scheme, quantised, signs
from vzip.runtime.errors import CheckpointError
from vzip.runtime.guard import said_by

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]

_SCALES: Final = ("weight_scale", "weight_scale_inv", "scale_weight")
"""All three are what a weight is multiplied by, ``_inv`` too: see transformers'
``finegrained_fp8.py``, compressed-tensors' ``forward.py`` and ComfyUI's ``scale_weight``."""
_ZERO: Final = "weight_zero_point"
_SCB: Final = "SCB"  # of bitsandbytes' INT8: the largest magnitude of each output channel
_BEFORE: Final = "export from the checkpoint as it was before it was quantised"
_NF4: Final = "weight.quant_state.bitsandbytes__"
_FORMAT: Final = "weight_format"  # 0 is rows
_COMPANIONS: Final = (
    *(*_SCALES, _ZERO, _SCB, _FORMAT, "weight.absmax", "weight.quant_map"),
    *("weight.nested_absmax", "weight.nested_quant_map", f"{_NF4}nf4", f"{_NF4}fp4"),
)

ACTIVATIONS: Final = (
    *("input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "scale_input"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "kv_scale"),
)
"""Scales of what a layer takes and gives: an engine may round by them, the weights don't depend."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight as its files hold it.

    Attributes:
        name: In the file.
        where: The file.
        shape: That the weight itself has, by the model's configuration.
        tensor: The numbers.
        beside: What follows the module's name → tensor, of those that `companions` named.
        around: What follows the module's name in the names of all its tensors.
    """

    name: str
    where: str
    shape: tuple[int, ...]
    tensor: Tensor
    beside: Tensors
    around: Callable[[], Iterable[str]] = tuple

    @property
    def what(self) -> str:
        """The tensor and what it is, for errors."""
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"tensor '{self.name}' in {self.where} is {dtype} {list(self.tensor.shape)}"


def companions(name: str, available: Collection[str]) -> dict[str, str]:
    """Return what belongs to a weight: what follows the module's name → name in the files."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return {}
    names = {each: f"{module}.{each}" for each in _COMPANIONS}
    return {each: stored for each, stored in names.items() if stored in available}


def is_quantised(stored: StoredWeight) -> bool:
    """Say whether a weight needs something beside it: by its dtype, or by what is there."""
    tensor = stored.tensor
    return bool(stored.beside) or not tensor.is_floating_point() or tensor.element_size() < 2


def dequantised(stored: StoredWeight, scheme: Scheme) -> Tensor:
    """Return a quantised weight as float32.

    Args:
        stored: It, and what is beside it.
        scheme: What the checkpoint's configuration says.

    Raises:
        CheckpointError: The scheme isn't undone here, or the numbers and what is beside them don't
            fit each other.
    """
    if any(each.startswith(_NF4) for each in stored.beside):
        return _four_bits(stored, scheme)
    sign = signs((*stored.beside, *stored.around()))
    if scheme.rotated:
        why = "its transform_config says that weights and activations are rotated"
        raise quantised(stored.what, scheme, sign, why=why)
    if stored.tensor.dtype not in _numbers() or set(stored.beside) & set(_BNB4):
        raise quantised(stored.what, scheme, sign, why=_contradiction(stored))
    if tuple(stored.tensor.shape) != stored.shape:  # before scales make it look as it should
        raise CheckpointError(
            f"{stored.what} beside {' and '.join(stored.beside) or 'no scale'}",
            expected=f"the shape {list(stored.shape)} by its configuration",
            cause="numbers are packed in a way that vzip doesn't know, or of another model",
            cure=_BEFORE,
        )
    if any(bool(each.any()) for name, each in stored.beside.items() if name == _FORMAT):
        why = "its weight_format says that rows and columns stand in tiles of an older GPU's layout"
        raise quantised(stored.what, scheme, sign, why=why)
    if _SCB in stored.beside and not set(_SCALES) & set(stored.beside):
        factor = _column(stored, scheme, _SCB) / 127
    else:
        factor = _scale(stored, scheme)
    return (stored.tensor.float() - _zero(stored, scheme, factor)) * factor


_BNB4: Final = tuple(each for each in _COMPANIONS if each.startswith("weight."))


def _numbers() -> tuple[Any, ...]:
    """Dtypes whose values are the weight but for a scale."""
    import torch

    eights = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    return (*eights, torch.int8)


def _contradiction(stored: StoredWeight) -> str:
    """Why scales beside a weight that is whole, or complex, are no scheme; empty for others."""
    tensor = stored.tensor
    if tensor.is_floating_point() and tensor.element_size() > 1:
        names = " and ".join(f"'{each}'" for each in stored.beside)
        return f"{names} beside it may be applied already or not: nothing says which"
    return ""


def _scale(stored: StoredWeight, scheme: Scheme) -> Tensor:
    """Return the scale of each number, [rows or 1, columns or 1, …]."""
    names = [each for each in _SCALES if each in stored.beside]
    sign = signs((*stored.beside, *stored.around()))
    if not names and sign not in (None, SCALED):
        raise quantised(stored.what, scheme, sign)
    if len(names) != 1:
        raise CheckpointError(
            f"{stored.what} with {' and '.join(names) or 'no scale'} beside it",
            expected="floating point of 16 bits or more, or one scale such as weight_scale",
            cause=(
                "two tools wrote it"
                if names
                else "an 8-bit number is no weight without its scale, which is lost or was never "
                "there"
            ),
            cure=_BEFORE,
        )
    scale = _finite(stored, names[0])
    shape, weight = tuple(scale.shape), stored.shape
    ones = (1,) * (len(weight) - 1)
    if scale.numel() == 1:
        return scale.reshape(1, *ones)
    if shape in {weight[:1], (weight[0], 1), (weight[0], *ones)}:
        return scale.reshape(-1, *ones)
    block = scheme.block(weight, shape) if len(weight) == 2 else None
    if block is None:
        raise _misfit(stored, names[0], scheme)
    high, wide = min(block[0], weight[0]), min(block[1], weight[1])
    every = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return every[: weight[0], : weight[1]]


def _column(stored: StoredWeight, scheme: Scheme, name: str) -> Tensor:
    """Return one number for each output channel, [rows, 1, …]."""
    values = _finite(stored, name)
    if values.numel() != stored.shape[0]:
        raise _misfit(stored, name, scheme)
    return values.reshape(-1, *(1,) * (len(stored.shape) - 1))


def _zero(stored: StoredWeight, scheme: Scheme, factor: Tensor) -> Tensor:
    """Return the number that stands for 0, of the scale's shape or one for all."""
    import torch

    zero = stored.beside.get(_ZERO)
    if zero is None:
        return torch.zeros(())
    zero = zero.float()
    if not bool(zero.any()):
        return torch.zeros(())
    if zero.numel() == 1:
        return zero.reshape(())
    if zero.numel() != factor.numel():
        raise _misfit(stored, _ZERO, scheme)
    return zero.reshape(factor.shape)


def _finite(stored: StoredWeight, name: str) -> Tensor:
    import torch

    scale = stored.beside[name]
    if not scale.is_floating_point():
        dtype = str(scale.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{stored.what} with a {name} of {dtype}",
            expected="a floating-point scale",
            cure=_BEFORE,
        )
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise CheckpointError(
            f"{stored.what} with a {name} that holds NaN, infinite or negative numbers",
            expected="scales of 0 or above",
            cause="the file is damaged, or quantising went wrong",
            cure="download it again, or export from the checkpoint before it was quantised",
        )
    return scale


def _misfit(stored: StoredWeight, name: str, scheme: Scheme) -> CheckpointError:
    known = " or ".join(f"{high} × {wide}" for high, wide in scheme.blocks)
    return CheckpointError(
        f"{stored.what} with a {name} of the shape {list(stored.beside[name].shape)}",
        expected=(
            f"one scale, one for each of {stored.shape[0]} output channels, or one for each block"
            + (f" of {known}" if known else "")
        ),
        cause=(
            "" if known else "the quantization_config in config.json names no weight_block_size"
        ),
        cure=(
            "compare config.json and the file with the published ones, or export from the "
            "checkpoint as it was before it was quantised"
        ),
    )


def _four_bits(stored: StoredWeight, scheme: Scheme) -> Tensor:
    """Return a weight of bitsandbytes' NF4 or FP4: two numbers a byte, the first in the high bits.

    Each is a place in a table of 16, times the largest magnitude of its block; those magnitudes may
    be quantised likewise. Source: bitsandbytes' ``QuantState`` and ``backends/cpu/ops.py``, whose
    own kernel (0.50) takes other scales where a row is no multiple of a block, as SigLIP's 4304 is.
    """
    import torch

    beside = {name.removeprefix("weight."): tensor for name, tensor in stored.beside.items()}
    count = math.prod(stored.shape)
    try:
        state = _quant_state(beside)
        _expect(tuple(state["shape"]) == stored.shape, f"its shape is {state['shape']}")
        _expect(stored.tensor.shape[-1] == 1, "its numbers stand in a row")
        # Bytes whatever they are called: bnb_4bit_quant_storage names a dtype to keep them in.
        packed = stored.tensor.contiguous().view(torch.uint8).flatten()
        absmax = beside["absmax"]
        if "nested_absmax" in beside:
            largest = _spread(beside["nested_absmax"], state["nested_blocksize"], absmax.numel())
            absmax = _looked_up(beside["nested_quant_map"], absmax, 256) * largest
            absmax = absmax + float(state["nested_offset"])
        largest = _spread(absmax, state["blocksize"], count)
        places = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
        _expect(0 <= places.numel() - count <= 1, f"{places.numel()} numbers are packed")
        weight = _looked_up(beside["quant_map"], places[:count], 16) * largest
    except (ValueError, KeyError, TypeError) as error:
        why = f"what is beside it doesn't fit it ({said_by(error)})"
        raise quantised(stored.what, scheme, signs(stored.beside), why=why) from error
    return weight.reshape(stored.shape)


def _quant_state(beside: Tensors) -> dict[str, Any]:
    """Return the sizes of bitsandbytes' 4-bit numbers, which are JSON in a tensor of bytes."""
    name = next(name for name in beside if name.startswith("quant_state."))
    state = json.loads(bytes(beside[name].tolist()).decode("utf-8"))
    if not isinstance(state, dict):
        raise TypeError("its quant_state is no JSON object")
    return state


def _spread(values: Tensor, size: object, count: int) -> Tensor:
    """Return one number for each of `count`: `values` has one for each block of `size`."""
    _expect(type(size) is int and size > 0, f"its blocks are of {size!r}")
    assert isinstance(size, int)
    _expect(values.numel() == -(-count // size), f"it has {values.numel()} scales")
    return values.flatten().float().repeat_interleave(min(size, count))[:count]


def _looked_up(table: Tensor, places: Tensor, size: int) -> Tensor:
    """Return what stands in a table of `size` at places of uint8."""
    import torch

    _expect(table.numel() == size, f"its table has {table.numel()} entries")
    _expect(places.dtype == torch.uint8, f"its places are of {places.dtype}")
    return table.flatten().float()[places.flatten().long()]


def _expect(right: bool, otherwise: str) -> None:
    if not right:
        raise ValueError(otherwise)
