"""The tensors of a vision side under canonical names, checked against its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vzip.export.architecture import VisionConfig, needed_tensors, tensor_shapes
from vzip.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionWeights:
    """Tower and projector.

    Attributes:
        config: The architecture.
        tensors: Canonical name → tensor in the checkpoint's own floating dtype. Everything in
            `needed_tensors(config)`; the dead last layers and the post-LayerNorm where the
            checkpoint has them. Nothing else.

    Raises:
        CheckpointError: A needed tensor is missing, or one is unknown, of a wrong shape or not
            floating.
    """

    config: VisionConfig
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        shapes = tensor_shapes(self.config)
        absent = sorted(needed_tensors(self.config) - set(self.tensors))
        unknown = sorted(set(self.tensors) - set(shapes))
        if absent or unknown:
            raise CheckpointError(
                f"weights lack {absent[:3]} and have the unknown {unknown[:3]} ({len(absent)} "
                f"and {len(unknown)} in all)",
                expected=f"the tensors of {self.config.family}",
            )
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor, shapes[name], source="the weights")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, source: str) -> None:
    """Raise unless `tensor` has `shape` and a floating dtype; `source` says where it came from."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor '{name}' in {source} has shape {list(tensor.shape)}",
            expected=f"{list(shape)} by its configuration",
            cause="the two are of different models",
            cure="take both from one checkpoint",
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"tensor '{name}' in {source} is {str(tensor.dtype).removeprefix('torch.')}",
            expected="floating point",
            cause="the checkpoint is quantised",
            cure="export from the original one",
        )
