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

from vzip.export.algorithm import selections
from vzip.export.graph import passes
from vzip.export.graph.traced import Encoder, GraphInput, LayerNorm
from vzip.runtime.bundle import graph_check
from vzip.runtime.bundle.manifest import (
    DATA_FILE,
    MODEL_FILE,
    TOKEN_WEIGHTS,
    graph_outputs,
)
from vzip.runtime.errors import ExportError, VzipError
from vzip.runtime.guard import said_by


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
        `kept_indices`, `token_positions`, and `rank` where the selection ranks], all passes
        applied.

    Raises:
        ExportError: If the graph breaks a promise of `docs/bundle.md`, or the selection computes
            with an operator that a graph may not hold.
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
    with quiet_exporter(), torch.no_grad(), _naming_the_selection(encoder):
        program = torch.onnx.export(
            encoder.eval(),
            (torch.zeros(shape, dtype=dtype),),
            dynamo=True,
            opset_version=18,
            input_names=[options.graph_input],
            output_names=[*graph_outputs(ranked=encoder.selection.ranked), TOKEN_WEIGHTS],
            dynamic_shapes=({0: batch_axis},) if options.dynamic_batch else None,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _check_operators(encoder, model)
    finish = Sequential(
        passes.HideTokenWeights(ranked=encoder.selection.ranked),
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


@contextlib.contextmanager
def _naming_the_selection(encoder: Encoder) -> Iterator[None]:
    """Let what a selection raises leave as it is, and name the file of one that can't be traced."""
    try:
        yield
    except Exception as error:
        inside: BaseException | None = error
        while inside is not None:
            if isinstance(inside, VzipError):
                raise inside from error
            last, inside = inside, inside.__cause__
        if encoder.budget.method == selections.DEFAULT:
            raise
        raise ExportError(
            f"a graph with the selection {encoder.budget.method!r} can't be traced",
            expected="a plan without a branch, a loop or a shape that depends on values",
            cause=said_by(last),
            cure=f"write it otherwise in {selections.file_of(encoder.selection)}",
        ) from error


def _check_operators(encoder: Encoder, model: ir.Model) -> None:
    """Refuse operators that a graph may not hold, and name the selection that brought them."""
    if encoder.budget.method == selections.DEFAULT:
        return  # whose graph is what the passes promise
    others = sorted({node.op_type for node in model.graph} - graph_check.EXPORTED)
    if others:
        raise ExportError(
            f"the selection {encoder.budget.method!r} computes with {', '.join(others)}",
            expected="the operators that docs/operators.md lists",
            cause="engines make loops of others, or have none",
            cure=f"write it otherwise in {selections.file_of(encoder.selection)}",
        )


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
