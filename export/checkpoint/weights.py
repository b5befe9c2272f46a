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
        dequantised: Name of the scheme that some of them were dequantised from; None where all
            were whole.
        tower_source: Where the tower was read, where there is a choice (original LLaVA).

    Raises:
        CheckpointError: A needed tensor is missing, or one is unknown, of a wrong shape or not
            floating.
    """

    config: VisionConfig
    tensors: Mapping[str, Tensor]
    dequantised: str | None = None
    tower_source: str = ""

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
    """Raise unless `tensor` has `shape` and a floating dtype of 16 bits or more.

    Args:
        name: As stored.
        tensor: Whole: what was quantised is made whole before, or it isn't a weight.
        shape: By the configuration.
        source: Where it came from.

    Raises:
        CheckpointError: It is something else.
    """
    if tensor.numel() == 0:
        raise CheckpointError(
            f"tensor '{name}' in {source} is empty",
            expected=f"the shape {list(shape)}",
            cause="it was saved under DeepSpeed's ZeRO-3, whose processes hold a part each",
            cure=(
                "gather it with the zero_to_fp32.py that DeepSpeed left in the training's folder, "
                "or save with stage3_gather_16bit_weights_on_model_save"
            ),
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(
            f"tensor '{name}' in {source} is {dtype} {list(tensor.shape)}",
            expected=f"floating point of 16 bits or more, {list(shape)}",
            cause=("a weight has no imaginary part" if tensor.is_complex() else _QUANTISED),
            cure="export from the checkpoint as it was before it was quantised",
        )
    if str(tensor.layout) != "torch.strided":
        raise CheckpointError(
            f"tensor '{name}' in {source} is of the layout {tensor.layout}",
            expected="a dense tensor",
            cure="save it dense",
        )
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor '{name}' in {source} has shape {list(tensor.shape)}",
            expected=f"{list(shape)} by its configuration",
            cause=_mismatch(name, tuple(tensor.shape), shape),
            cure="take both from one checkpoint",
        )


def check_finite(name: str, tensor: Tensor, *, source: str) -> None:
    """Raise where a weight that is used holds NaN or infinity.

    Raises:
        CheckpointError: It does; the message says how many and where.
    """
    import torch

    wrong = ~torch.isfinite(tensor)
    count = int(wrong.sum())
    if count:
        first = [int(index) for index in torch.nonzero(wrong)[0]]
        raise CheckpointError(
            f"tensor '{name}' in {source} holds {count} of {tensor.numel()} numbers that are NaN "
            f"or infinite, the first at {first}",
            expected="finite ones",
            cause="the file is damaged, or training diverged or overflowed a 16-bit number",
            cure="download the file again, or take an earlier checkpoint of the training",
        )


_QUANTISED = "the checkpoint is quantised, and nothing beside the tensor says how"


def _mismatch(name: str, got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    if sorted(got) == sorted(shape):
        return "its axes stand in another order: another program's layout"
    if "position_embedding" in name and got[1:] == shape[1:]:
        return (
            f"its {got[0]} positions are those of another image_size or patch_size, and vzip "
            "interpolates none"
        )
    return "the two are of different models"
