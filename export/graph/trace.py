"""Trace the encoder with torch.export, finish the ONNX graph, save it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential, common

from vzip.export.graph import passes
from vzip.export.graph.traced import Encoder, GraphInput, LayerNorm
from vzip.runtime.bundle.manifest import (
    DATA_FILE,
    EMBEDS,
    KEPT,
    MODEL_FILE,
    POSITIONS,
    TOKEN_WEIGHTS,
)
from vzip.runtime.errors import ExportError


@dataclass(frozen=True)
class GraphOptions:
    """What the graph's interface looks like.

    Attributes:
        graph_input: "image" (uint8 [B, H, W, 3]) or "pixel_values" (float32 [B, 3, H, W]).
        batch: B, or the largest B when `dynamic_batch`.
        dynamic_batch: Leave the batch axis open; every other axis is static in any case.
        opset: 17 (TensorRT 8.6) or 18.
    """

    graph_input: GraphInput = "image"
    batch: int = 1
    dynamic_batch: bool = False
    opset: Literal[17, 18] = 18

    def __post_init__(self) -> None:
        if type(self.batch) is not int or self.batch < 1:
            raise ExportError(
                f"batch is {self.batch!r}",
                expected="an integer of at least 1",
            )
        if self.opset not in (17, 18):
            raise ExportError(
                f"opset is {self.opset}",
                expected=(
                    "18, or 17 for TensorRT 8.6: later opsets change no operator of this graph, "
                    "and older ones have no LayerNormalization"
                ),
            )


def trace(encoder: Encoder, options: GraphOptions, *, image_size: int) -> ir.Model:
    """Trace `encoder` into a finished ONNX graph.

    Args:
        encoder: On the CPU, in the precision of the graph. Its parameters are shared with the
            result until that is saved.
        options: The interface.
        image_size: H and W of the input.

    Returns:
        The model with inputs [`image` or `pixel_values`] and outputs [`image_embeds`,
        `kept_indices`, `token_positions`], all passes applied.

    Raises:
        ExportError: If the graph breaks a promise of `docs/bundle.md`.
    """
    # Two images where the batch is open: torch.export specialises on a batch of one.
    count = min(2, options.batch) if options.dynamic_batch else options.batch
    shape = (
        (count, image_size, image_size, 3)
        if options.graph_input == "image"
        else (count, 3, image_size, image_size)
    )
    dtype = torch.uint8 if options.graph_input == "image" else torch.float32
    batch_axis = torch.export.Dim("batch", min=1, max=max(2, options.batch))
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            encoder.eval(),
            (torch.zeros(shape, dtype=dtype),),
            dynamo=True,
            opset_version=18,
            input_names=[options.graph_input],
            output_names=[EMBEDS, KEPT, POSITIONS, TOKEN_WEIGHTS],
            dynamic_shapes=({0: batch_axis},) if options.dynamic_batch else None,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model
    finish = Sequential(
        passes.HideTokenWeights(),
        passes.PlainReshape(),
        *((passes.LowerToOpset17(),) if options.opset == 17 else ()),
        passes.Anonymise(),
        common.RemoveUnusedNodesPass(),
        passes.Promises(
            opset=options.opset,
            softmaxes=len(encoder.layers) + encoder.selection.uses_attention,
            norms=sum(isinstance(module, LayerNorm) for module in encoder.modules()),
            half=encoder.projector.linear_1.weight.dtype == torch.float16,
        ),
    )
    try:
        result = finish(model)
    except ir.passes.PassError as error:
        raise ExportError(
            f"the traced graph breaks a promise: {error.__cause__ or error}",
            cause=(
                f"most likely the installed torch {torch.__version__} or onnxscript exports "
                "differently from the versions in constraints.txt"
            ),
            cure="install those, or report this",
        ) from error
    return result.model


def save(
    model: ir.Model, folder: Path, *, graph: str = MODEL_FILE, weights: str = DATA_FILE
) -> None:
    """Write a graph and the file of its weights into `folder`, weights one tensor at a time."""
    ir.save(model, folder / graph, external_data=weights, max_workers=1)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's warnings, none of which a user can act on.

    They are that torchvision is absent, and deprecations inside torch.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
