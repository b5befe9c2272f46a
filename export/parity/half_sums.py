"""Half precision in PyTorch on a CPU: products summed in FP32, and one rounding for each operator.

PyTorch's own CPU kernels do the same and take three times as long where the processor has no
instructions for FP16. How they sum depends on the processor; this doesn't.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_ATEN: Final = torch.ops.aten
_SUMS: Final = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
        _ATEN.convolution.default,
    }
)
_HALF: Final = (torch.float16, torch.bfloat16)


def exact_sums() -> AbstractContextManager[object]:
    """Within this, matrix products and convolutions of half precision are summed in FP32."""
    mode: AbstractContextManager[object] = _ExactSums()  # type: ignore[no-untyped-call]
    return mode


class _ExactSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func not in _SUMS or not isinstance(first, torch.Tensor) or first.dtype not in _HALF:
            return func(*args, **kwargs)
        wide = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, args)
        return func(*wide, **kwargs).to(first.dtype)
