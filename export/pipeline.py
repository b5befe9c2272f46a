"""Checkpoint in, bundle out: the steps of an export, in order."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.architecture import NEWLINE, Media, VisionConfig
from vzip.export.checkpoint.random_weights import random_vision
from vzip.export.checkpoint.reader import Checkpoint, read_projector, read_vision, vision_config
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.trace import GraphOptions, save, trace
from vzip.export.graph.traced import Encoder
from vzip.export.llm import onnx_decoder as llm
from vzip.export.parity.compare import UntouchedModel
from vzip.runtime.bundle import manifest as form
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.errors import ParityError
from vzip.runtime.models import locate
from vzip.runtime.pictures.images import ImageSource

Precision = Literal["fp32", "fp16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
PACKAGES = ("vzip", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class WeightSource:
    """Which weights an encoder is made from; enough to find the same ones again.

    Attributes:
        model: An alias, a hub id or a local folder.
        revision: Commit, branch or tag of a hub repository.
        seed: Draw random weights from this seed instead of reading the checkpoint's.
        projector: A file with a tuned projector that replaces the checkpoint's.
        media: "image" or "video", for models that see the two in different ways; None for the
            family's own choice.
    """

    model: str
    revision: str | None = None
    seed: int | None = None
    projector: Path | None = None
    media: Media | None = None

    def config(self) -> VisionConfig:
        """Read the architecture alone, which is quick.

        Raises:
            CheckpointError: The model can't be found or isn't known.
            InvalidInputError: The model doesn't take the media asked for.
        """
        if self.seed is not None:
            return vision_config(self.model, revision=self.revision, media=self.media)
        return Checkpoint.open(self.model, revision=self.revision).vision(self.media)

    def load(self) -> tuple[VisionWeights, form.Model]:
        """Read or draw the weights.

        Returns:
            The weights, and what the manifest says of them.

        Raises:
            CheckpointError: They can't be found or don't fit.
        """
        if self.seed is not None:
            config = self.config()
            # FP16 whatever the precision, as published checkpoints are: both precisions of a graph
            # then have the same weights, and an FP16 graph loses none of them.
            weights = random_vision(config, self.seed, dtype=torch.float16)
            model_id, revision = locate(self.model).model_id, self.revision
        else:
            checkpoint = Checkpoint.open(self.model, revision=self.revision)
            weights = read_vision(checkpoint, self.media)
            model_id, revision = checkpoint.model_id, checkpoint.revision
        digest = None
        if self.projector is not None:
            tuned = read_projector(self.projector, weights.config.projector)
            weights = dataclasses.replace(weights, tensors={**weights.tensors, **tuned})
            with self.projector.open("rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        return weights, form.Model(
            id=model_id,
            revision=revision,
            family=weights.config.family,
            weights="checkpoint" if self.seed is None else "random",
            seed=self.seed,
            projector=digest,
        )


@dataclass(frozen=True)
class Method:
    """Which tokens leave the graph, and in which order the LLM gets those of tiles.

    Attributes:
        budget: How many, of an image, a tile or a frame.
        merge: How contextual tokens are formed.
        selection: A name of `vzip.export.algorithm.selections`.
        tiles: Order of a tiled image's tokens, see `form.Tiling`.
    """

    budget: Budget
    merge: Merge = "average"
    selection: str = selections.DEFAULT
    tiles: Literal["reference", "newline"] = "reference"

    def tiled(self, config: VisionConfig) -> VisionConfig:
        """Return the architecture with the order asked for."""
        if config.tiling is None:
            return config
        return dataclasses.replace(
            config, tiling=dataclasses.replace(config.tiling, order=self.tiles)
        )


def export_bundle(
    source: WeightSource,
    output: Path,
    *,
    method: Method,
    precision: Precision,
    options: GraphOptions,
    check_images: Sequence[ImageSource],
    step: Callable[[str], None],
    with_llm: bool = False,
) -> Bundle:
    """Export one bundle; it appears at `output` whole, checked and published, or not at all.

    Args:
        source: The weights.
        output: The folder to create, or a bundle to replace.
        method: Which tokens leave the graph.
        precision: Of weights and activations; scores and the plan are FP32 in either.
        options: The graph's interface.
        check_images: Images for the parity check; none leaves it out.
        step: Told what begins.
        with_llm: Put the language model into the bundle too, for ONNX Runtime.

    Returns:
        The published bundle.

    Raises:
        VzipError: Anything about the model, the options or the output that the caller can mend;
            `ParityError` if the graph differs from the reference.
    """
    with bundle_writer(output) as writer:
        if with_llm:
            step(f"the LLM has {llm.plan(source.model, source.revision)}")
        step("reading weights")
        weights, model = source.load()
        config = method.tiled(weights.config)
        reference = None
        if check_images:
            step("running the untouched model")
            reference = UntouchedModel(weights, check_images)
        step("tracing")
        encoder = Encoder(
            config,
            weights.tensors,
            budget=method.budget,
            merge=method.merge,
            graph_input=options.graph_input,
            dtype=DTYPES[precision],
            selection=method.selection,
        )
        if config.newline:
            newline = weights.tensors[NEWLINE].float().numpy()
            np.save(writer.folder / form.NEWLINE_FILE, newline, allow_pickle=False)
        del weights  # each of these is half a gigabyte or more for a ViT-L
        graph = trace(encoder, options, image_size=config.tower.image_size)
        step("writing the graph")
        save(graph, writer.folder)
        del encoder, graph
        manifest = describe(config, model, method=method, precision=precision, options=options)
        if reference is not None:
            step("comparing the graph with it")
            result = reference.compare(writer.stage(manifest))
            if not result.passed:
                raise ParityError(
                    f"the graph differs from the untouched model: {'; '.join(result.short)}",
                    cause="nothing was written",
                    cure=(
                        "please report this with the model's name and the installed versions of "
                        "torch and onnxruntime"
                    ),
                )
            manifest = dataclasses.replace(manifest, parity=result.to_json())
            reference.write(writer.folder / form.REFERENCE_FILE, manifest)
        if with_llm:
            llm.add_llm(writer, manifest, model=source.model, revision=source.revision, step=step)
        step("publishing")
        return writer.publish(manifest)


def describe(
    config: VisionConfig,
    model: form.Model,
    *,
    method: Method,
    precision: Precision,
    options: GraphOptions,
) -> form.Manifest:
    """Return the manifest of a graph, without files and parity."""
    tower, budget = config.tower, method.budget
    batch: int | Literal["batch"] = "batch" if options.dynamic_batch else options.batch
    side = tower.image_size
    if options.graph_input == "image":
        graph_input = form.Tensor("image", "uint8", (batch, side, side, 3))
    else:
        graph_input = form.Tensor("pixel_values", "float32", (batch, 3, side, side))
    return form.Manifest(
        model=model,
        selection=form.Selection(
            method.selection, budget.dominant, budget.contextual, method.merge, budget.cls_token
        ),
        tower=form.Tower(
            config.tokens, config.grid, tower.cls_token, side, tower.patch_size, config.pool
        ),
        inputs=(graph_input,),
        outputs=(
            form.Tensor(
                form.EMBEDS,
                "float32" if precision == "fp32" else "float16",
                (batch, budget.tokens, config.llm_hidden_size),
            ),
            form.Tensor(form.KEPT, "int64", (batch, budget.dominant)),
        ),
        batch=form.Batch(options.batch, options.dynamic_batch),
        preprocessing=config.preprocessing,
        llm=form.Llm(config.llm_hidden_size, config.image_token_id, config.video_token_id),
        tiling=config.tiling,
        media=config.takes,
        precision=precision,
        opset=options.opset,
        versions={
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    )
