"""Checkpoint in, bundle out: the steps of an export, in order.

What is needed to refuse an option is imported at the top. torch comes where weights are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from vzip.export import EXPORT_PACKAGES, defaults, hardware
from vzip.export.algorithm import selections
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.architecture import NEWLINE, Media, VisionConfig
from vzip.export.checkpoint.reader import Checkpoint, read_projector, read_vision, vision_config
from vzip.export.pictures import reference_images
from vzip.runtime import console
from vzip.runtime.bundle import manifest as form
from vzip.runtime.bundle import origin
from vzip.runtime.bundle.writer import bundle_writer
from vzip.runtime.errors import ExportError, InvalidInputError, ParityError, require
from vzip.runtime.files.plain import open_plain
from vzip.runtime.guard import door
from vzip.runtime.models import locate
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.export.checkpoint.weights import VisionWeights
    from vzip.export.graph.trace import GraphOptions
    from vzip.export.graph.traced import GraphInput
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.pictures.images import ImageSource

Precision = Literal["fp32", "fp16"]
TileOrder = Literal["reference", "newline"]

LLM_PACKAGES = ("tokenizers", "jinja2")  # of its text side, which is tried when all else is done

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
        vision_tower: Folder or hub id of original LLaVA's tower; None for the one that the
            checkpoint names.
        outliers: Plant outliers and attention sinks in the random weights; see
            `vzip.export.checkpoint.planted_outliers`.
    """

    model: str
    revision: str | None = None
    seed: int | None = None
    projector: Path | None = None
    media: Media | None = None
    vision_tower: str | None = None
    outliers: bool = False

    @classmethod
    def of(
        cls, model: origin.Model, *, projector: Path | None = None, media: Media | None = None
    ) -> WeightSource:
        """Return where a bundle's weights come from, as its manifest says it."""
        return cls(
            model.id,
            model.revision,
            model.seed,
            projector,
            media,
            model.vision_tower,
            outliers=model.weights == "random-outliers",
        )

    def config(self) -> VisionConfig:
        """Read the architecture alone, which is quick.

        Raises:
            CheckpointError: The model can't be found or isn't known.
            InvalidInputError: The model doesn't take the media asked for.
        """
        if self.seed is not None:
            return vision_config(
                self.model,
                revision=self.revision,
                media=self.media,
                vision_tower=self.vision_tower,
            )
        return self._checkpoint().vision(self.media)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.model, revision=self.revision, vision_tower=self.vision_tower)

    def load(self) -> tuple[VisionWeights, origin.Model]:
        """Read or draw the weights.

        Returns:
            The weights, and what the manifest says of them.

        Raises:
            CheckpointError: They can't be found or don't fit.
        """
        import torch

        from vzip.export.checkpoint.planted_outliers import with_outliers
        from vzip.export.checkpoint.random_weights import random_vision

        kind: origin.Weights = "checkpoint"
        if self.seed is not None:
            config = self.config()
            # FP16 whatever the precision, as published checkpoints are: both precisions of a graph
            # then have the same weights, and an FP16 graph loses none of them.
            weights = random_vision(config, self.seed, dtype=torch.float16)
            kind = "random"
            if self.outliers:
                weights, kind = with_outliers(weights, self.seed), "random-outliers"
            model_id, revision = locate(self.model).model_id, self.revision
        else:
            checkpoint = self._checkpoint()
            weights = read_vision(checkpoint, self.media)
            model_id, revision = checkpoint.model_id, checkpoint.revision
        digest = None
        if self.projector is not None:
            tuned = read_projector(self.projector, weights.config.projector)
            weights = dataclasses.replace(weights, tensors={**weights.tensors, **tuned})
            with open_plain(self.projector) as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        return weights, origin.Model(
            id=model_id,
            revision=revision,
            family=weights.config.family,
            weights=kind,
            seed=self.seed,
            projector=digest,
            dequantised=weights.dequantised,
            vision_tower=None if self.vision_tower is None else locate(self.vision_tower).model_id,
        )


@door(ExportError, "'{model}' can't be exported", reads=False)
def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tokens: int | None = None,
    dominant: int | None = None,
    contextual: int | None = None,
    merge: Merge = "average",
    cls_token: bool = True,
    selection: str = selections.DEFAULT,
    selection_options: Mapping[str, float | str] | None = None,
    revision: str | None = None,
    weights: origin.Weights = "checkpoint",
    seed: int | None = None,
    projector: str | os.PathLike[str] | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    media: Media | None = None,
    tiles: TileOrder | None = None,
    target: str | None = None,
    dtype: str | None = None,
    batch: int | None = None,
    max_batch: int | None = None,
    graph_input: GraphInput = "image",
    opset: Literal[17, 18] | None = None,
    with_llm: bool = False,
    replace: bool = False,
    check_images: Sequence[ImageSource] | None = None,
    say: Callable[[str], None] = console.say,
) -> Bundle:
    """Export a checkpoint's vision side to a bundle, as ``vzip export`` does.

    The bundle appears at `output` whole, checked and published, or not at all.

    Args:
        model: An alias, a hub id ``owner/name`` or a local folder; see `vzip.runtime.models`.
        output: The folder to create, or a bundle to replace. None makes a name in the working
            directory from the model's, the tokens, the datatype and what else was asked for, such
            as ``llava-1.5-7b-64-fp16``.
        tokens: K, the tokens of an image, a tile or a frame, split 27 : 5 into dominant and
            contextual ones as in the paper, if the selection merges. None, where the parts are not
            given either, is 64, or 17 for a graph made for video.
        dominant: Tokens kept as they are; instead of `tokens`, together with `contextual`.
        contextual: Tokens merged from the rest; instead of `tokens`, together with `dominant`.
        merge: How contextual tokens are formed: "average" is the paper's, "sum" the published
            code's.
        cls_token: Keep CLS as one of the dominant tokens, where the tower has one.
        selection: Which tokens are kept: a name of `vzip.export.algorithm.selections`, such as
            "visionzip" or "coverage".
        selection_options: Name → value of the selection's options, where it has some; what is left
            out has its default.
        revision: Commit, branch or tag of a hub repository.
        weights: "random" is the architecture at its true size without the checkpoint's tensors,
            "random-outliers" the same with outliers and attention sinks as real towers have them.
        seed: Of random weights, from 0 up; None is 0.
        projector: A file with a tuned projector that replaces the checkpoint's.
        vision_tower: Folder or hub id of original LLaVA's tower, in the place of the one that its
            ``mm_vision_tower`` names. A trained copy in the checkpoint still comes first.
        media: What the graph is made for, of models that see images and video in different ways.
            None is the family's own choice.
        tiles: Order of a tiled image's tokens, see `vzip.runtime.bundle.manifest.Tiling`. None is
            "reference".
        target: A name of `vzip.export.hardware`, which sets `opset` and `dtype`.
        dtype: Of weights and activations, "fp32" or "fp16"; scores and the plan are FP32 in
            either. None is the target's, or "fp32" without one.
        batch: Images of a call, exactly. None, where `max_batch` isn't given either, is one image;
            for tiles and video 1 to those of one input, at most 10.
        max_batch: Images of a call, at most: the batch axis is open.
        graph_input: "image" is uint8 [B, H, W, 3], normalised in the graph; "pixel_values" is
            float32 [B, 3, H, W] as the processor makes it.
        opset: 17 for TensorRT 8.6, or 18. None is the target's, or 18 without one.
        with_llm: Put the language model into the bundle too, for ONNX Runtime.
        replace: Whether a bundle at `output` that holds engines, quantised graphs or a language
            model may be replaced, and they be lost.
        check_images: Pictures that the graph is compared with the untouched model on. None takes
            vzip's own; an empty list leaves the check out.
        say: Told, in lines, what was chosen and what begins.

    Returns:
        The published bundle.

    Raises:
        VzipError: Anything about the model, the options or the output that the caller can mend,
            such as `BudgetError`, `CheckpointError` or `MissingDependencyError`.
        ParityError: The graph differs from the untouched model; nothing was written.
    """
    if output is not None and not os.fspath(output).strip():
        raise InvalidInputError("-o is empty", expected="a folder to write the bundle to")
    source = WeightSource(
        os.fspath(model),
        revision,
        _seed(weights, seed, with_llm=with_llm),
        None if projector is None else Path(projector),
        media,
        None if vision_tower is None else os.fspath(vision_tower),
        outliers=weights == "random-outliers",
    )
    selections.check(selection)
    require(*EXPORT_PACKAGES, needed_for="an export", extra="export")
    if with_llm:
        require(*LLM_PACKAGES, needed_for="an export with the LLM", extra="export")
    config = source.config()
    budget = selections.budget_of(
        config,
        tokens=tokens,
        dominant=dominant,
        contextual=contextual,
        merge=merge,
        cls_token=cls_token,
        selection=selection,
        options=selection_options,
    )
    if tiles is not None and config.tiling is None:
        raise InvalidInputError(
            f"tiles is {tiles!r}",
            expected="none",
            cause=f"'{source.model}' cuts no tiles here",
            cure="leave it out",
        )
    images = _batch(config, batch, max_batch, target=target, dtype=dtype)
    chosen = hardware.resolve(target, opset=opset, precision=dtype, batch=images.size)
    if output is None:
        output = _named(source, budget, chosen.precision, tiles)
    from vzip.export.graph.trace import GraphOptions

    options = GraphOptions(graph_input, images.size, images.dynamic, chosen.opset)
    say(f"budget: {budget}")
    for note in chosen.notes:
        say(note)
    bundle = export_bundle(
        source,
        Path(output),
        budget=budget,
        tiles=tiles or "reference",
        precision=chosen.precision,
        options=options,
        check_images=reference_images() if check_images is None else check_images,
        step=lambda name: say(f"{name} …"),
        with_llm=with_llm,
        replace=replace,
    )
    if (parity := bundle.manifest.parity) is not None:
        say(
            f"parity on {counted(int(parity['images']), 'image')}: "
            f"kept overlap {parity['kept_overlap']:.4f}, "
            f"lowest cosine {parity['min_cosine']:.6f}, largest error {parity['max_error']:.1e}"
        )
    return bundle


def _seed(weights: str, seed: int | None, *, with_llm: bool) -> int | None:
    """Return the seed of random weights; None where a checkpoint's are asked for."""
    if weights not in get_args(origin.Weights):
        expected = " or ".join(get_args(origin.Weights))
        raise InvalidInputError(f"weights is {weights!r}", expected=expected)
    if weights == "checkpoint" and seed is not None:
        raise InvalidInputError(
            f"seed is {seed} and weights is 'checkpoint'",
            cause="a checkpoint has no seed",
            cure="leave out the seed, or ask for random weights",
        )
    if weights != "checkpoint" and with_llm:
        raise InvalidInputError(
            "random weights and the language model were asked for",
            cause="the answers of an LLM to random tokens mean nothing",
            cure="leave out one of the two",
        )
    return None if weights == "checkpoint" else seed or 0


def _batch(
    config: VisionConfig,
    batch: int | None,
    max_batch: int | None,
    *,
    target: str | None,
    dtype: str | None,
) -> defaults.ImagesPerCall:
    """Return the batch: as asked for, else the model's default as far as the target takes it."""
    if batch is not None and max_batch is not None:
        raise InvalidInputError(
            f"batch {batch} and max_batch {max_batch} were given",
            expected="one of them",
            cure="give batch for an exact number, max_batch for an open axis",
        )
    if max_batch is not None:
        return defaults.ImagesPerCall(max_batch, dynamic=True)
    if batch is not None:
        return defaults.ImagesPerCall(batch, dynamic=False)
    default = defaults.batch(config)
    if target is None:
        return default
    machine = hardware.find(target)
    largest = machine.largest_batch(dtype or machine.precision)
    return defaults.ImagesPerCall(min(default.size, largest), default.dynamic)


def _named(
    source: WeightSource, budget: Budget, precision: Precision, tiles: TileOrder | None
) -> Path:
    """Return a folder's name made of model, tokens, precision and what else was asked for."""
    parts = [Path(source.model).resolve().name, str(budget.tokens), precision]
    parts += [part for part in (source.media, tiles) if part is not None]
    if budget.method != selections.DEFAULT:
        parts.append(budget.method)
    return Path("-".join(parts))


def export_bundle(
    source: WeightSource,
    output: Path,
    *,
    budget: Budget,
    tiles: TileOrder = "reference",
    precision: Precision,
    options: GraphOptions,
    check_images: Sequence[ImageSource],
    step: Callable[[str], None],
    with_llm: bool = False,
    replace: bool = False,
) -> Bundle:
    """Export one bundle; it appears at `output` whole, checked and published, or not at all.

    Args:
        source: The weights.
        output: The folder to create, or a bundle to replace.
        budget: Which tokens leave the graph; it fits the tower.
        tiles: Order of a tiled image's tokens.
        precision: Of weights and activations; scores and the plan are FP32 in either.
        options: The graph's interface.
        check_images: Images for the parity check; none leaves it out.
        step: Told what begins.
        with_llm: Put the language model into the bundle too, for ONNX Runtime.
        replace: As for `export`.

    Returns:
        The published bundle.

    Raises:
        VzipError: Anything about the model, the options or the output that the caller can mend;
            `ParityError` if the graph differs from the reference.
    """
    from vzip.export.graph.trace import save, trace
    from vzip.export.graph.traced import DTYPES, Encoder
    from vzip.export.llm import onnx_decoder as llm
    from vzip.export.parity.compare import UntouchedModel

    with bundle_writer(output, replace=replace) as writer:
        if with_llm:
            step(f"the LLM has {llm.plan(source.model, source.revision)}")
        step("reading weights")
        weights, model = source.load()
        if weights.tower_source:
            step(f"took the tower from {weights.tower_source}")
        if model.dequantised is not None:
            step(f"weights quantised by {model.dequantised} are made whole")
        config = weights.config.with_tile_order(tiles)
        manifest = describe(config, model, budget=budget, precision=precision, options=options)
        reference = None
        if check_images:
            step("running the untouched model")
            reference = UntouchedModel(weights, check_images, precision)
        step("tracing")
        encoder = Encoder(
            config,
            weights.tensors,
            budget=budget,
            graph_input=options.graph_input,
            dtype=DTYPES[precision],
        )
        if config.newline:
            newline = weights.tensors[NEWLINE].float().numpy()
            np.save(writer.folder / form.NEWLINE_FILE, newline, allow_pickle=False)
        del weights  # each of these is half a gigabyte or more for a ViT-L
        graph = trace(encoder, options, image_size=config.tower.image_size)
        step("writing the graph")
        save(graph, writer.folder)
        del encoder, graph
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
    model: origin.Model,
    *,
    budget: Budget,
    precision: Precision,
    options: GraphOptions,
) -> form.Manifest:
    """Return the manifest of a graph, without files and parity."""
    tower = config.tower
    ranked = selections.get(budget.method, budget.options).ranked
    batch: int | Literal["batch"] = "batch" if options.dynamic_batch else options.batch
    side = tower.image_size
    if options.graph_input == "image":
        graph_input = form.Tensor("image", "uint8", (batch, side, side, 3))
    else:
        graph_input = form.Tensor("pixel_values", "float32", (batch, 3, side, side))
    return form.Manifest(
        model=model,
        selection=form.Selection(**vars(budget), span=config.span, ranked=ranked),
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
            *(
                form.Tensor(name, "int64", (batch, budget.tokens))
                for name in (form.POSITIONS, *((form.RANK,) if ranked else ()))
            ),
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
