"""What each budget costs and what it keeps: the numbers that a budget is chosen by.

*Agreement* is measured without an LLM. Every patch is compared with the token that stands for it
after compression, itself if it was kept, else the one it was merged into: the cosine of the two
embeddings behind the projector, averaged over the patches, each weighted by the attention that it
gets in the tower (CLS's, or in a tower without CLS everybody's). 1 is nothing lost. It orders
budgets; it does not say how many questions will be answered right, and no question has a part in
it. For the demo model accuracy on held-out questions stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vzip.calibration.sweeping.shared_tower import ALL, Seen, SweepSession, open_sweep
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.defaults import FRAMES
from vzip.export.plan.llm_cost import LlmShape, llm_shape
from vzip.runtime.console import progress
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine.record import machine
from vzip.runtime.machine.timing import Timing, interleaved
from vzip.runtime.models import DEMO
from vzip.runtime.pictures.images import ImageSource, load_image
from vzip.runtime.pictures.preprocess import tower_image
from vzip.runtime.pictures.tiles import cut
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.calibration.held_out import Accuracy
    from vzip.export.architecture import VisionConfig

Array = NDArray[Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One budget and merge; or, without them, all tokens.

    Attributes:
        name: `Budget.name`, or ``all``.
        tokens: K, of an image, a tile or a frame.
        dominant: Those kept; None for all tokens.
        contextual: Those merged; None for all tokens.
        merge: How; None for all tokens.
        agreement: See this module.
        attention_kept: Share of the patches' attention that the kept ones have.
        accuracy: Share of held-out questions answered right; None where there are none.
        accuracy_error: Standard error of it.
        latency: Of the encoder, one image, tile or frame, from uint8 pixels to embeddings.
        llm_tokens: n, text and image together, as the LLM gets them.
        prefill_flops: Of the LLM, with n tokens; see `vzip.export.plan.llm_cost`.
        kv_bytes: Of its cache, with n tokens.
    """

    name: str
    tokens: int
    dominant: int | None
    contextual: int | None
    merge: str | None
    agreement: float
    attention_kept: float
    accuracy: float | None
    accuracy_error: float | None
    latency: Timing
    llm_tokens: int
    prefill_flops: int
    kv_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


@dataclass(frozen=True)
class Sweep:
    """Everything that was measured.

    Attributes:
        model: What finds the checkpoint again.
        revision: Commit on the hub; None for a local folder.
        images: How many the agreement was measured on.
        source: What they are.
        unit: What a budget counts the tokens of: image, tile or frame.
        units: How many of them the LLM gets: the most tiles that one of the images was cut into,
            or the frames of a clip.
        patches: N, of one.
        text_tokens: Taken for the text around the image.
        llm: The language model's sizes.
        questions: What was asked for the accuracy; None where nothing was.
        everything: The row of all tokens.
        rows: By tokens, then in the order of the merges asked for.
        machine: Where latency was measured.
    """

    model: str
    revision: str | None
    images: int
    source: str
    unit: str
    units: int
    patches: int
    text_tokens: int
    llm: LlmShape
    questions: Mapping[str, int] | None
    everything: Row
    rows: tuple[Row, ...]
    machine: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


def measure(
    model: str,
    budgets: Sequence[Budget],
    images: Sequence[tuple[str, Callable[[], ImageSource]]],
    *,
    revision: str | None,
    source: str,
    text_tokens: int,
    asked: bool = True,
    step: Say,
) -> Sweep:
    """Measure budgets and merges of one checkpoint, which is read once.

    Args:
        model: An alias, a hub id or a local folder.
        budgets: At least one; each fits the tower.
        images: Name of each, and what gives it; at least one.
        revision: Commit, branch or tag of a hub repository.
        source: What the images are, for the record.
        text_tokens: Tokens of the text around an image, at least 0.
        asked: Whether the demo model is asked its questions.
        step: Told what begins.

    Raises:
        CheckpointError: The checkpoint isn't there, isn't known, or lacks the LLM's sizes.
        InvalidInputError: An image can't be used.
        BackendError: ONNX Runtime failed.
    """
    checkpoint = Checkpoint.open(model, revision=revision)
    llm = llm_shape(checkpoint.config)
    step("reading weights")
    weights = read_vision(checkpoint)
    config = weights.config
    unit, units, pixels = _inputs(config, images)
    step(f"tracing the tower with {counted(len(budgets), 'way')} to compress behind it")
    session = open_sweep(weights, budgets)
    del weights
    step(f"measuring agreement on {counted(len(pixels), 'image')}")
    kept = _agreements(session, pixels, config)
    step("timing")
    latencies = _latencies(session, pixels[0])
    del session  # a gigabyte or more, for a ViT-L
    accuracies, questions = _accuracies(checkpoint.model_id if asked else "", budgets, step)

    def row(name: str, budget: Budget | None) -> Row:
        tokens = config.grid[0] * config.grid[1] if budget is None else budget.tokens
        agreement, attention = (1.0, 1.0) if budget is None else kept[name]
        n = text_tokens + units * tokens
        accuracy = accuracies.get(name)
        return Row(
            name=name,
            tokens=tokens,
            dominant=None if budget is None else budget.dominant,
            contextual=None if budget is None else budget.contextual,
            merge=None if budget is None else budget.merge,
            agreement=round(agreement, 6),
            attention_kept=round(attention, 6),
            accuracy=None if accuracy is None else round(accuracy.share, 4),
            accuracy_error=None if accuracy is None else round(accuracy.error, 4),
            latency=latencies[name],
            llm_tokens=n,
            prefill_flops=llm.prefill_flops(n),
            kv_bytes=llm.kv_bytes(n),
        )

    return Sweep(
        model=checkpoint.model_id,
        revision=checkpoint.revision,
        images=len(pixels),
        source=source,
        unit=unit,
        units=units,
        patches=config.grid[0] * config.grid[1],
        text_tokens=text_tokens,
        llm=llm,
        questions=questions,
        everything=row(ALL, None),
        rows=tuple(row(each.name, each) for each in budgets),
        machine=machine(),
    )


def _inputs(
    config: VisionConfig, images: Sequence[tuple[str, Callable[[], ImageSource]]]
) -> tuple[str, int, list[NDArray[np.uint8]]]:
    """Return what a budget is of, how many of these the LLM gets, and the tower's inputs."""
    pixels, tiles = [], 1
    for name, read in progress(images, desc="reading images", unit="image"):
        try:
            image = load_image(read())
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error}") from error
        pixels.append(tower_image(image, config.preprocessing))
        if config.tiling is not None:
            tiles = max(tiles, len(cut(image, config.preprocessing, config.tiling).images))
    if config.tiling is not None:
        return "tile", tiles, pixels
    return ("frame", FRAMES, pixels) if config.media == "video" else ("image", 1, pixels)


def agreement(seen: Seen, budget: Budget, first_patch: int) -> tuple[float, float]:
    """Return the agreement of one image, and the share of attention that was kept.

    Args:
        seen: What the image became.
        budget: The way to compress.
        first_patch: 1 where the tower's token 0 is CLS, else 0.
    """
    weights = seen.weights[budget.name][:, first_patch:]  # [K, N]
    stands_for = weights.argmax(axis=0)  # each patch goes into one token
    before = seen.everything.astype(np.float64)
    after = seen.embeds[budget.name].astype(np.float64)[stands_for]
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosines = np.sum(before * after, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    attention = seen.scores.astype(np.float64)
    attention /= attention.sum()
    kept = stands_for < budget.dominant
    return float(attention @ cosines), float(attention[kept].sum())


def _agreements(
    session: SweepSession, images: Sequence[NDArray[np.uint8]], config: VisionConfig
) -> dict[str, tuple[float, float]]:
    """Return the means over images of each budget's agreement and kept attention."""
    first_patch = int(config.tower.cls_token)
    found: dict[str, list[tuple[float, float]]] = {each.name: [] for each in session.budgets}
    for image in progress(images, desc="agreement", unit="image"):
        seen = session.see(image)
        for each in session.budgets:
            found[each.name].append(agreement(seen, each, first_patch))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {name: (float(mean[0]), float(mean[1])) for name, mean in means.items()}


def _latencies(session: SweepSession, image: NDArray[np.uint8]) -> dict[str, Timing]:
    batch = image[None]

    def encode(name: str) -> Callable[[], object]:
        return lambda: session.encode(name, batch)

    return interleaved({name: encode(name) for name in (ALL, *(v.name for v in session.budgets))})


def _accuracies(
    model: str, budgets: Sequence[Budget], step: Say
) -> tuple[dict[str, Accuracy], Mapping[str, int] | None]:
    """Return the accuracy of every row, for the demo model."""
    if model != DEMO:
        return {}, None
    from vzip.calibration.held_out import DemoQuestions

    step("asking the demo's held-out questions")
    asked = DemoQuestions()
    found = {ALL: asked.uncompressed()}
    for each in progress(budgets, desc="accuracy"):
        found[each.name] = asked.compressed(each)
    return found, asked.to_json()
