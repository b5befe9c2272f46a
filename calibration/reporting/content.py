"""What a bundle's report says, gathered from the bundle and measured on this machine.

`page.py` makes the page of it. Nothing here is guessed: what can't be had is a sentence that
says why and, where there is one, the command that makes it.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vzip.calibration.reporting import MOST_IMAGES
from vzip.export.checkpoint.reader import Checkpoint
from vzip.export.defaults import FRAMES
from vzip.export.pages.rendering import mailable
from vzip.export.plan.llm_cost import LlmShape, llm_shape
from vzip.runtime.agreement import Agreement, compare
from vzip.runtime.bundle.manifest import DATA_FILE, EMBEDS, KEPT, MODEL_FILE, Manifest
from vzip.runtime.bundle.precision_record import Quantised, files_of, report_file
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.console import progress
from vzip.runtime.encoder import CompressedTokens, VisionEncoder
from vzip.runtime.errors import BackendError, BundleError, CheckpointError, InvalidInputError
from vzip.runtime.machine.record import machine
from vzip.runtime.machine.timing import Timing, interleaved
from vzip.runtime.models import DEMO
from vzip.runtime.pictures.images import ImageSource, load_image
from vzip.runtime.pictures.overlay import overlay
from vzip.runtime.pictures.preprocess import pixel_values, tower_image
from vzip.runtime.pictures.tiles import cut
from vzip.runtime.tokens.positions import image_places
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.calibration.held_out import Accuracy

Array = NDArray[Any]
Say = Callable[[str], None]

BACKEND: Final = "onnxruntime"
"""One backend, on the CPU: every precision runs there, or the report says why not."""

TEXT_TOKENS: Final = 64

_LARGEST_REPORT = 2**23  # bytes of calibration.*.json that are read; ours have a hundred thousand
_MOST_LAYERS = 2000
_SIDE = 420  # pixels of a picture in the page
_QUALITY = 84


_Accuracies = tuple[tuple[float, float], tuple[float, float] | None]


@dataclass(frozen=True)
class LayerRow:
    """One line of a calibration report; see `vzip.calibration.quantization.quantize.LayerReport`.

    Attributes:
        name: Of the layer.
        kind: Of the layer.
        quantised: Whether it is.
        overlap: Share of kept tokens that stay when it alone is quantised; None if not measured.
        cosine: Mean cosine of the tokens then; None if not measured.
        score_error: Change of the scores then, in their deviations; None if not measured.
        reason: Why it isn't quantised; None if it is.
    """

    name: str
    kind: str
    quantised: bool
    overlap: float | None
    cosine: float | None
    score_error: float | None
    reason: str | None


@dataclass(frozen=True)
class Calibration:
    """What a quantised graph was made by, and what it lost on images held apart.

    Attributes:
        agreement: By name: ``mean_overlap``, ``mean_cosine`` and others.
        recipe: By name.
        calibrated: Images it was calibrated on.
        held_apart: Images it was judged on.
        layers: In the order in which they run.
    """

    agreement: Mapping[str, float]
    recipe: Mapping[str, str]
    calibrated: int
    held_apart: int
    layers: tuple[LayerRow, ...]


@dataclass(frozen=True)
class Graph:
    """One precision of the bundle.

    Attributes:
        precision: Its name.
        bytes: Of the graph and its weights.
        unusable: Why it could not be run here; None if it was.
        calibration: None for the bundle's own graph.
        agreement: With the bundle's own graph on the images shown; None for that one itself, or if
            it was not run.
        timing: Of one call; None if it was not run.
        accuracy: Share and standard error on the demo's questions, with the tokens' original
            positions where the bundle says them; None without.
        renumbered: The same with consecutive positions; None where `accuracy` has these.
    """

    precision: str
    bytes: int
    unusable: str | None
    calibration: Calibration | None
    agreement: Agreement | None
    timing: Timing | None
    accuracy: tuple[float, float] | None
    renumbered: tuple[float, float] | None = None


@dataclass(frozen=True)
class ShownPicture:
    """One image.

    Attributes:
        name: Of the file.
        picture: JPEG of what the tower sees.
        overlays: Precision → JPEG of what was kept, and share of the own graph's kept tokens that
            are among them.
    """

    name: str
    picture: bytes
    overlays: Mapping[str, tuple[bytes, float]]


@dataclass(frozen=True)
class Savings:
    """What compression saves the language model; predicted from its sizes.

    Attributes:
        llm: Its sizes.
        text_tokens: Taken for the text around an image.
        units: Images, tiles or frames that it gets.
        unit: Which of them.
        all_tokens: n without compression.
        tokens: n with it.
    """

    llm: LlmShape
    text_tokens: int
    units: int
    unit: str
    all_tokens: int
    tokens: int


@dataclass(frozen=True)
class Content:
    """A report.

    Attributes:
        bundle: Its folder.
        manifest: Its manifest.
        graphs: The bundle's own first.
        images: Those shown.
        source: What these are.
        batch: Images of one timed call.
        questions: What the accuracy was asked with, and its share and error with all tokens; None
            where there is no accuracy.
        unasked: Why there is none.
        savings: Or why they aren't known.
        machine: Where latency was measured.
    """

    bundle: str
    manifest: Manifest
    graphs: tuple[Graph, ...]
    images: tuple[ShownPicture, ...]
    source: str
    batch: int
    questions: tuple[Mapping[str, int], tuple[float, float]] | None
    savings: Savings | str
    machine: Mapping[str, Any]
    unasked: str = "only the demo model, with its own weights, comes with questions to answer"


def gather(
    bundle: Bundle,
    images: Sequence[tuple[str, Callable[[], ImageSource]]],
    *,
    source: str,
    unasked: str = "",
    step: Say,
) -> Content:
    """Run every precision of a bundle on images, and look up the rest.

    Args:
        bundle: The bundle.
        images: Name of each, and what gives it: 1 to `MOST_IMAGES`.
        source: What they are, for the record.
        unasked: Why the demo model can't be asked its questions here; empty if it can.
        step: Told what begins.

    Raises:
        InvalidInputError: Too many images, or one that can't be used.
        BundleError: The bundle is damaged.
        BackendError: The bundle's own graph can't be run.
        MissingDependencyError: A package is missing.
    """
    if not 1 <= len(images) <= MOST_IMAGES:
        raise InvalidInputError(
            f"got {counted(len(images), 'image')}",
            expected=f"1 to {MOST_IMAGES}: each is in the page once for every precision",
            cure="take fewer with --count",
        )
    manifest = bundle.manifest
    loaded = [(name, load_image(read())) for name, read in images]
    savings = _savings(manifest, [image for _, image in loaded])
    names: list[Quantised] = list(manifest.precisions)
    calibrations: dict[str, Calibration | None] = {
        name: _calibration(bundle, name) for name in names
    }
    unusable: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        encoders: dict[str, VisionEncoder] = {
            manifest.precision: stack.enter_context(VisionEncoder.open(bundle.at(None), BACKEND))
        }
        tokens: dict[str, list[CompressedTokens]] = {}
        for name in (manifest.precision, *names):
            step(f"encoding {counted(len(loaded), 'image')} in {name}")
            try:
                if name not in encoders:
                    opened = VisionEncoder.open(bundle, BACKEND, precision=name)
                    encoders[name] = stack.enter_context(opened)
                tokens[name] = [encoders[name].encode([image]) for _, image in loaded]
            except BackendError as error:
                if name == manifest.precision:
                    raise
                unusable[name] = mailable(str(error), str(bundle.path))
        running = {name: encoders[name] for name in tokens}
        shown = _shown(loaded, tokens, manifest)
        step("timing")
        timings = _timings(running, loaded, manifest)
        accuracies, questions = ({}, None) if unasked else _accuracies(running, manifest, step)
    own = [_outputs(each) for each in tokens[manifest.precision]]
    graphs = []
    for name in (manifest.precision, *names):
        agreement = None
        if name in tokens and name != manifest.precision:
            agreement = compare(own, [_outputs(each) for each in tokens[name]], manifest)
        graphs.append(
            Graph(
                precision=name,
                bytes=_bytes(manifest, name),
                unusable=unusable.get(name),
                calibration=calibrations.get(name),
                agreement=agreement,
                timing=timings.get(name),
                accuracy=accuracies.get(name, (None, None))[0],
                renumbered=accuracies.get(name, (None, None))[1],
            )
        )
    return Content(
        bundle=bundle.path.name,
        manifest=manifest,
        graphs=tuple(graphs),
        images=tuple(shown),
        source=source,
        batch=_call_size(manifest),
        questions=questions,
        savings=savings,
        machine=machine(),
        **({"unasked": unasked} if unasked else {}),
    )


def _outputs(tokens: CompressedTokens) -> dict[str, Array]:
    return {EMBEDS: tokens.embeds, KEPT: tokens.kept}


def _bytes(manifest: Manifest, precision: str) -> int:
    """Return the size of a graph and its weights."""
    if precision == manifest.precision:
        names: Sequence[str] = (MODEL_FILE, DATA_FILE)
    else:
        names = files_of(precision)[:2]  # type: ignore[arg-type]
    return sum(manifest.files[name].bytes for name in names if name in manifest.files)


def _call_size(manifest: Manifest) -> int:
    """Return how many images a timed call has: one where the batch is open."""
    return 1 if manifest.batch.dynamic else manifest.batch.max


def _shown(
    images: Sequence[tuple[str, Image.Image]],
    tokens: Mapping[str, Sequence[CompressedTokens]],
    manifest: Manifest,
) -> list[ShownPicture]:
    """Draw what each precision keeps of each image; of a tiled one, of its base tile."""
    tower, prep = manifest.tower, manifest.preprocessing
    found = []
    for place, (name, image) in enumerate(progress(images, desc="drawing", unit="image")):
        own = tokens[manifest.precision][place].kept[0]
        overlays = {}
        for precision, encoded in tokens.items():
            kept = encoded[place].kept[0]
            picture = overlay(
                image,
                kept,
                grid=tower.grid,
                cls_token=tower.cls_token,
                prep=prep,
                groups=encoded[place].groups[0],
            )
            share = len(np.intersect1d(own, kept)) / len(own)
            overlays[precision] = (_jpeg(picture), share)
        view = Image.fromarray(tower_image(image, prep))
        found.append(ShownPicture(name, _jpeg(view.resize((_SIDE, _SIDE))), overlays))
    return found


def _jpeg(picture: Image.Image) -> bytes:
    """Return a picture small enough for a page."""
    height = round(picture.height * _SIDE / picture.width)
    data = io.BytesIO()
    small = picture.resize((_SIDE, height), Image.Resampling.LANCZOS)
    small.save(data, format="JPEG", quality=_QUALITY, optimize=True)
    return data.getvalue()


def _timings(
    encoders: Mapping[str, VisionEncoder],
    images: Sequence[tuple[str, Image.Image]],
    manifest: Manifest,
) -> dict[str, Timing]:
    """Time one call of each precision's graph, from pixels at the tower's size to tokens."""
    pixels = tower_image(images[0][1], manifest.preprocessing)[None]
    batch: Array = np.repeat(pixels, _call_size(manifest), axis=0)
    if manifest.input.name != "image":
        batch = pixel_values(batch, manifest.preprocessing)

    def call(encoder: VisionEncoder) -> Callable[[], object]:
        return lambda: encoder.run(batch)

    return interleaved({name: call(encoder) for name, encoder in encoders.items()})


def _accuracies(
    encoders: Mapping[str, VisionEncoder], manifest: Manifest, step: Say
) -> tuple[dict[str, _Accuracies], tuple[Mapping[str, int], tuple[float, float]] | None]:
    """Return each precision's accuracies, and what was asked, for the demo model."""
    if manifest.model.id != DEMO or manifest.model.weights != "checkpoint":
        return {}, None
    from vzip.calibration.held_out import DemoQuestions

    step("asking the demo's held-out questions")
    asked = DemoQuestions()
    pictures = list(asked.pictures)
    found = {}
    for name, encoder in encoders.items():
        tokens = encoder.encode(pictures)
        plain, placed = asked.answered(tokens.embeds), None
        if tokens.positions is not None and manifest.span is not None:
            where = [image_places(manifest, each) for each in tokens.positions]
            placed = asked.answered(tokens.embeds, where)
        found[name] = _pair(placed or plain), None if placed is None else _pair(plain)
    everything = asked.uncompressed()
    return found, (asked.to_json(), (everything.share, everything.error))


def _pair(accuracy: Accuracy) -> tuple[float, float]:
    return accuracy.share, accuracy.error


def _savings(manifest: Manifest, images: Sequence[Image.Image]) -> Savings | str:
    """Return what the language model is saved, or why that isn't known here."""
    try:
        checkpoint = Checkpoint.open(manifest.model.id, revision=manifest.model.revision)
        llm = llm_shape(checkpoint.config)
    except CheckpointError as error:
        said = mailable(str(error), manifest.model.id)
        return f"The language model's sizes can't be read here: {said}"
    unit, units = "image", 1
    if manifest.tiling is not None:
        tiling, prep = manifest.tiling, manifest.preprocessing
        unit, units = "tile", max(len(cut(image, prep, tiling).images) for image in images)
    elif manifest.media == ("video",):
        unit, units = "frame", FRAMES
    rows, columns = manifest.tower.grid
    return Savings(
        llm,
        TEXT_TOKENS,
        units,
        unit,
        all_tokens=TEXT_TOKENS + units * rows * columns,
        tokens=TEXT_TOKENS + units * manifest.selection.tokens,
    )


def _calibration(bundle: Bundle, precision: Quantised) -> Calibration | None:
    """Read what `vzip calibrate` left in the bundle; None if its report isn't there.

    Raises:
        BundleError: It isn't what the manifest promises, or not in the form of a report.
    """
    name = report_file(precision)
    if name not in bundle.manifest.files:
        return None
    with bundle.open_file(name) as file:
        data = file.read(_LARGEST_REPORT + 1)
    if len(data) > _LARGEST_REPORT:
        raise BundleError(
            f"{bundle.path}: {name} has more than {_LARGEST_REPORT} bytes",
            expected="a tenth of it",
            cause="it was not made by vzip calibrate",
            cure="calibrate again",
        )
    try:
        return parse_calibration(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{bundle.path}: {name} is no report of vzip calibrate ({type(error).__name__}: "
            f"{error})",
            cause="it was made by another version or by something else",
            cure="calibrate again",
        ) from error


def parse_calibration(value: Any) -> Calibration:
    """Return what `Report.to_json` of `vzip.calibration.quantization.quantize` gave.

    Args:
        value: Parsed JSON.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: It has another form.
    """
    layers = value["layers"]
    if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
        raise ValueError(f"'layers' is no list of at most {_MOST_LAYERS}")
    numbers = {
        str(name): float(each)
        for name, each in value["agreement"].items()
        if isinstance(each, (int, float))
    }
    for name in ("mean_overlap", "min_overlap", "mean_cosine", "min_cosine"):
        if name not in numbers:
            raise ValueError(f"'agreement' has no {name}")
    return Calibration(
        agreement=numbers,
        recipe={str(name): str(each) for name, each in value["recipe"].items()},
        calibrated=int(value["calibrated"]),
        held_apart=int(value["held_apart"]),
        layers=tuple(_layer(each) for each in layers),
    )


def _layer(value: Mapping[str, Any]) -> LayerRow:
    effect = value["effect"] or {}
    reason = value["reason"]

    def number(name: str) -> float | None:
        return float(effect[name]) if effect else None

    return LayerRow(
        name=str(value["name"]),
        kind=str(value["kind"]),
        quantised=bool(value["quantised"]),
        overlap=number("kept_overlap"),
        cosine=number("cosine"),
        score_error=number("score_error"),
        reason=None if reason is None else str(reason),
    )
