"""From a bundle and some images to a graph whose linear layers are quantised, and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.calibration.quantization.folds import source_of
from vzip.calibration.quantization.pieces import (
    Chain,
    Kind,
    LinearGroup,
    PieceSession,
    array_of,
    linear_groups,
    own_graph,
)
from vzip.calibration.quantization.qdq import Setting, opset_of, quantised
from vzip.calibration.quantization.ranges import Histograms, thresholds
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.quantization.search import FormSearch, SeenTokens
from vzip.calibration.quantization.sensitivity import (
    Effect,
    Goal,
    Judge,
    Layers,
    effects,
    fewest,
    ranking,
    scores_name,
)
from vzip.calibration.samples import Samples
from vzip.export.engines.cpu.learning import varied
from vzip.export.graph import smooth
from vzip.runtime.agreement import Agreement, compare
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, Manifest
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.console import progress
from vzip.runtime.errors import BackendError, ParityError
from vzip.runtime.machine.process import cores, peak_bytes
from vzip.runtime.wording import counted

Array = NDArray[Any]
Say = Callable[[str], None]

DECIDING = 8
"""Images, of those calibrated on, by which layers are chosen to stay in high precision."""

ALONE = 2
"""Images, of these, on which each layer is quantised alone: a run for every layer."""

JUDGING = 8
"""Images held apart, of fewer than which views judge too: on two, a single token decides."""

_LARGEST_BATCH = 8  # of a graph with an open batch: what one layer makes of them is held at once
_HEADROOM = 0.1  # of the way to 1: the images that decide are not those that judge
_ROUNDS = 8
_INLINE = 1024  # bytes up to which a saved tensor stays in the graph, as the exporter has it


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, or q, k and v together.

    Attributes:
        name: Such as ``layers.3.qkv``.
        kind: ``qkv``, ``out_proj``, ``fc1``, ``fc2`` or ``projector``.
        range: Magnitude at which its input is clipped, after smoothing.
        peak: Largest magnitude of its input, before.
        smoothing: Largest ratio of two of its smoothing factors; null if it isn't smoothed.
        apart: Channels of its input that are multiplied in high precision.
        rotated: Channels that a rotation mixes; 0 for none.
        multiplications: In 8 bits and in all, for one image.
        error: Of its output when it is quantised, on tokens that were seen: mean square of the
            error over that of the output; null if it wasn't searched for.
        effect: What quantising it alone costs; null if that was not measured.
        quantised: Whether it is.
        reason: Why not; null if it is.
    """

    name: str
    kind: Kind
    range: float
    peak: float
    smoothing: float | None
    apart: int
    rotated: int
    multiplications: tuple[int, int]
    error: float | None
    effect: Effect | None
    quantised: bool
    reason: str | None


@dataclass(frozen=True)
class Report:
    """What was done and what it gave.

    Attributes:
        recipe: How.
        samples: `Samples.to_json` of all images.
        calibrated: Images that ranges and layers were chosen by.
        held_apart: Images that the agreement was measured on, and nothing else; of fewer than
            `JUDGING` also their mirror images and their quarters.
        deciding: Images, of those calibrated on, that layers were chosen by.
        rounds: How often the images held apart were looked at: more than once if a choice didn't
            hold on them.
        opset: Of the quantised graph.
        layers: In the order in which they run.
        agreement: Of the quantised graph with the bundle's own, on the images held apart.
        unrefined: The same with every layer quantised, on the deciding images; null if nothing
            asked for it.
        seconds: That it took.
        peak_bytes: Largest resident memory of the process.
        threads: Processor cores of the machine, one thread on each.
    """

    recipe: Recipe
    samples: Mapping[str, Any]
    calibrated: int
    held_apart: int
    deciding: int
    rounds: int
    opset: int
    layers: tuple[LayerReport, ...]
    agreement: Agreement
    unrefined: Agreement | None
    seconds: float
    peak_bytes: int
    threads: int

    @property
    def eight_bits(self) -> float:
        """Share of the linear layers' multiplications that are in 8 bits."""
        small = sum(each.multiplications[0] for each in self.layers)
        return small / sum(each.multiplications[1] for each in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes, and ``eight_bits``."""
        agreements = {"agreement": self.agreement, "unrefined": self.unrefined}
        shown = {
            name: None if each is None else each.to_json() for name, each in agreements.items()
        }
        return asdict(self) | shown | {"eight_bits": self.eight_bits}


class Quantised:
    """A quantised graph, not yet on disk.

    Attributes:
        report: What was done.
        precision: ``int8`` or ``fp8``.
        opset: Of the graph.
    """

    def __init__(self, graph: ir.Model, report: Report) -> None:
        self.graph = graph
        self.report = report
        self.precision = report.recipe.precision
        self.opset = graph.opset_imports[""]

    @property
    def file(self) -> str:
        """Name of the graph's file; its weights are in the file of that name and ``.data``."""
        return f"model.{self.precision}.onnx"

    def save(self, folder: Path) -> None:
        """Write the graph and its weights into a folder."""
        ir.save(self.graph, folder / self.file, external_data=f"{self.file}.data",
                size_threshold_bytes=_INLINE, max_workers=1)  # fmt: skip


def quantize(bundle: Bundle, samples: Samples, recipe: Recipe, *, step: Say) -> Quantised:
    """Quantise the linear layers of a bundle's graph.

    Args:
        bundle: Whose own graph is read, whatever other precisions it holds.
        samples: One in five is held apart to judge by.
        recipe: How.
        step: Told what begins.

    Returns:
        The graph and the report; nothing was written.

    Raises:
        BundleError: The bundle is damaged, or its graph is another exporter's.
        InvalidInputError: An image changed since it was hashed.
        BackendError: ONNX Runtime can't run the graph.
        ParityError: The recipe's limits can't be kept; says what was reached.
    """
    started = time.monotonic()
    calibrate, apart = samples.split()
    work = _Work(bundle, recipe, calibrate, step)
    settings = work.settings()
    goal = Goal.of(recipe)
    unrefined, found, order = None, dict[str, Effect](), list[str]()
    if goal != Goal(None, None):
        unrefined, found, order = work.effects(settings, goal)
    step(f"running the bundle's own graph on {counted(len(apart), 'image')} held apart")
    work.chain.close()
    expected = _outputs(work.graph, bundle.manifest, apart)
    aim, count, rounds = goal.nearer(_HEADROOM), 0, 0
    while True:
        rounds += 1
        if unrefined is not None:
            step("choosing the layers that stay in high precision")
            count = work.choose(settings, order, aim, count)
        high = frozenset(order[:count])
        if len(high) == len(work.linears):
            raise _unreachable(recipe, unrefined)
        chosen = {name: each for name, each in settings.items() if name not in high}
        graph = quantised(work.graph, chosen, recipe.precision, work.opset)
        step(f"judging {counted(len(chosen), 'quantised layer')} on the images held apart")
        work.close()
        agreement = compare(expected, _outputs(graph, bundle.manifest, apart), bundle.manifest)
        if goal.met(agreement):
            break
        if rounds == _ROUNDS:
            raise _missed(recipe, agreement, rounds)
        # Steps grow: images that decide may be kinder than those that judge, all the way.
        aim, count = aim.nearer(0.25), min(count + 2 ** (rounds - 1), len(order))
    report = Report(
        recipe=recipe,
        samples=samples.to_json(),
        calibrated=len(calibrate),
        held_apart=len(apart),
        deciding=min(DECIDING, len(calibrate)) if unrefined else 0,
        rounds=rounds,
        opset=work.opset,
        layers=tuple(work.report(each, settings[each.name], found, high) for each in work.linears),
        agreement=agreement,
        unrefined=unrefined,
        seconds=round(time.monotonic() - started, 1),
        peak_bytes=peak_bytes(),
        threads=cores(),
    )
    return Quantised(graph, report)


class _Work:
    """What the steps share."""

    def __init__(self, bundle: Bundle, recipe: Recipe, calibrate: Samples, step: Say) -> None:
        self.manifest, self.recipe, self.calibrate, self.step = (
            bundle.manifest,
            recipe,
            calibrate,
            step,
        )
        self.graph = own_graph(bundle)
        self.linears = linear_groups(self.graph)
        self.opset = opset_of(self.graph, recipe.precision)
        self.scores = scores_name(self.graph)
        observed = {linear.input for linear in self.linears}
        self.chain = Chain(self.graph, {*observed, *([self.scores] if self.scores else [])})
        self.stored: list[list[dict[str, Array]]] = []
        self.counts: list[int] = []
        self.peaks: dict[str, float] = {}
        self.lengths: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self._layers: Layers | None = None
        self._judge: Judge | None = None

    def settings(self) -> dict[str, Setting]:
        """Look at the samples and say how each linear layer is to be quantised."""
        self.step(f"calibrating on {counted(len(self.calibrate), 'image')}")
        tokens = SeenTokens(len(self.calibrate))
        self._stream(tokens.see, keep=self.recipe.keep_agreement or self.recipe.keep_cosine)
        self.lengths = tokens.lengths
        channels = {name: tokens.peaks(name) for name in tokens.lengths}
        self.peaks = {name: float(each.max()) for name, each in channels.items()}
        self._check_peaks()
        if self.recipe.method == "error":
            return self._searched(tokens, channels)
        divisors = {}
        if self.recipe.smoothing is not None:
            divisors = {
                linear.input: self._factors(linear, channels[linear.input], self.recipe.smoothing)
                for linear in self.linears
                if linear.norm is not None
            }
        limits = {
            name: float((peaks / divisors.get(name, np.float32(1))).max())
            for name, peaks in channels.items()
        }
        if self.recipe.method != "minmax":
            self.step(f"counting magnitudes for {self.recipe.method}")
            histograms = Histograms(limits, divisors)
            self._stream(histograms.see, keep=None)
            limits = thresholds(histograms, self.recipe.method, self.recipe.precision)
        return {
            linear.name: Setting(limits[linear.input], divisors.get(linear.input))
            for linear in self.linears
        }

    def _searched(self, tokens: SeenTokens, channels: Mapping[str, Array]) -> dict[str, Setting]:
        """Return each linear layer's best form."""
        middle = self.recipe.smoothing
        alphas = () if middle is None else (middle / 2, middle, (1 + middle) / 2)
        settings = {}
        for linear in progress(self.linears, desc="search", unit="layer"):
            weights = [array_of(self.graph, name) for name in linear.weights]
            factors = partial(self._factors, linear, channels[linear.input])
            found = FormSearch(
                linear,
                tokens,
                np.concatenate(weights, axis=1),
                source_of(self.graph, linear) if linear.norm is None else None,
                None if linear.norm is None else factors,
                self.recipe.precision,
            ).best(alphas)
            settings[linear.name] = found.setting
            self.errors[linear.name] = found.error
        return settings

    def _check_peaks(self) -> None:
        """Refuse what has no range: a report couldn't even hold it."""
        for linear in self.linears:
            if not np.isfinite(peak := self.peaks[linear.input]):
                raise BackendError(
                    f"the input of {linear.name} reaches {peak} on these images",
                    expected="finite numbers",
                    cause=f"the graph overflows in {self.manifest.precision}, or is damaged",
                    cure="compare it with vzip check, or export it with --dtype fp32",
                )

    def _factors(self, linear: LinearGroup, channels: Array, alpha: float) -> NDArray[np.float32]:
        assert linear.norm is not None
        weights = [array_of(self.graph, name) for name in linear.weights]
        found = smooth.factors(channels, weights, alpha)
        gamma, beta = (array_of(self.graph, name) for name in linear.norm)
        return smooth.exactly(found, gamma, beta, weights)

    def _stream(self, see: Callable[[str, Array], None], *, keep: float | None) -> None:
        """Run the samples through the pieces and show what each linear layer gets."""
        inputs = {linear.input for linear in self.linears}
        batches = _batches(self.calibrate, self.manifest)
        total = -(-len(self.calibrate) // _batch_size(self.manifest))
        for values, count in progress(batches, desc="calibration", total=total, unit="batch"):
            live, kept = dict(values), []
            for place in range(len(self.chain)):
                live = self.chain.live(live, place)
                kept.append(live)
                session = self.chain.session(place)
                made = session.run(live)
                for name in made.keys() & inputs:
                    see(name, made[name][:count])
                outputs = self.chain.outputs[place]
                live = {**live, **{name: made[name] for name in outputs}}
            if keep is not None and sum(self.counts) < DECIDING:
                self.stored.append(kept)
                self.counts.append(min(count, DECIDING - sum(self.counts)))

    def effects(
        self, settings: Mapping[str, Setting], goal: Goal
    ) -> tuple[Agreement, dict[str, Effect], list[str]]:
        """Measure all layers together and each alone.

        Returns:
            The agreement with all quantised, the effects, and the layers, the worst first.
        """
        layers, judge = self._opened(settings)
        self.step(
            f"running all {counted(len(self.linears), 'layer')} quantised on "
            f"{counted(sum(self.counts), 'image')}"
        )
        first, _ = judge.compare(0, layers.all(self.linears, frozenset()))
        few = self._judge_of(ALONE)
        self.step(f"running each alone on {ALONE} images")
        found = effects(few, self.chain, layers, self.linears)
        sizes = {linear.name: self._multiplications(linear) for linear in self.linears}
        return first, found, ranking(found, goal, first, sizes)

    def choose(
        self, settings: Mapping[str, Setting], order: Sequence[str], aim: Goal, least: int
    ) -> int:
        """Return how many of the first layers in `order` must stay as they are."""
        layers, judge = self._opened(settings)

        def reached(high: frozenset[str]) -> bool:
            sessions = layers.all(self.linears, high)
            return aim.met(judge.compare(0, sessions)[0])

        return fewest(order, reached, least)

    def _opened(self, settings: Mapping[str, Setting]) -> tuple[Layers, Judge]:
        if self._layers is None:
            self._layers = Layers(
                self.chain, settings, self.recipe.precision, self.opset, self.scores
            )
        if self._judge is None:
            self._judge = self._judge_of(DECIDING)
        return self._layers, self._judge

    def _judge_of(self, images: int) -> Judge:
        """Return a judge by the first images of those that decide."""
        stored, counts = [], list[int]()
        for batch, count in zip(self.stored, self.counts, strict=True):
            if (left := images - sum(counts)) > 0:
                stored.append(batch)
                counts.append(min(count, left))
        return Judge(self.chain, stored, counts, self.scores, self.manifest)

    def _multiplications(self, linear: LinearGroup) -> int:
        """Return how many numbers an image's tokens multiply in a linear layer."""
        sizes = [self.graph.graph.initializers[name].shape for name in linear.weights]
        return self.lengths[linear.input] * sum(
            int(np.prod(each.numpy())) for each in sizes if each
        )

    def close(self) -> None:
        """Free all sessions; they are opened again when needed."""
        self._layers = None
        self.chain.close()

    def report(
        self,
        linear: LinearGroup,
        setting: Setting,
        found: Mapping[str, Effect],
        high: frozenset[str],
    ) -> LayerReport:
        """Return what the report says of a layer."""
        factors, effect = setting.factors, found.get(linear.name)
        every, high_precision = self._multiplications(linear), linear.name in high
        width = self.graph.graph.initializers[linear.weights[0]].shape
        assert width is not None
        small = every - every // int(width.numpy()[0]) * len(setting.apart)
        reason = None
        if high_precision and effect is not None:
            reason = (
                f"alone it leaves an overlap of {effect.kept_overlap:.4f}, a cosine of "
                f"{effect.cosine:.6f} and moves scores by {effect.score_error:.4f} deviations"
            )
        return LayerReport(
            name=linear.name,
            kind=linear.kind,
            range=setting.threshold,
            peak=self.peaks[linear.input],
            smoothing=None if factors is None else float(factors.max() / factors.min()),
            apart=len(setting.apart),
            rotated=setting.block,
            multiplications=(0 if high_precision else small, every),
            error=self.errors.get(linear.name),
            effect=effect,
            quantised=not high_precision,
            reason=reason,
        )


def _batch_size(manifest: Manifest) -> int:
    """Return how many images a call takes: the graph's own number, or few of an open batch."""
    batch = manifest.batch
    return min(batch.max, _LARGEST_BATCH) if batch.dynamic else batch.max


def _batches(samples: Samples, manifest: Manifest) -> Iterator[tuple[dict[str, Array], int]]:
    """Iterate the graph's inputs, and how many of their images count."""
    for array in samples.batches(manifest, _batch_size(manifest)):
        yield _filled(array, manifest)


def _filled(images: Array, manifest: Manifest) -> tuple[dict[str, Array], int]:
    """Return the graph's input and how many of its images count: the last one fills it up."""
    count = len(images)
    absent = 0 if manifest.batch.dynamic else _batch_size(manifest) - count
    filled = np.concatenate([images, np.repeat(images[-1:], absent, axis=0)])
    return {manifest.input.name: filled}, count


def _outputs(graph: ir.Model, manifest: Manifest, samples: Samples) -> list[dict[str, Array]]:
    """Run a whole graph on samples held apart, and on views of them where they are few."""
    session = PieceSession(graph)
    batches = _batches(samples, manifest)
    if len(samples) < JUDGING:
        images = np.concatenate([values[manifest.input.name][:n] for values, n in batches])
        views = varied(images, channels_last=manifest.input.dtype == "uint8")
        size = _batch_size(manifest)
        parts = (views[first : first + size] for first in range(0, len(views), size))
        batches = (_filled(part, manifest) for part in parts)
    return [
        {name: value[:count] for name, value in session.run(values, [EMBEDS, KEPT]).items()}
        for values, count in batches
    ]


def _asked(recipe: Recipe) -> str:
    limits = (("overlap", recipe.keep_agreement), ("cosine", recipe.keep_cosine))
    return " and ".join(f"a mean {name} of at least {x}" for name, x in limits if x is not None)


def _unreachable(recipe: Recipe, unrefined: Agreement | None) -> ParityError:
    assert unrefined is not None
    return ParityError(
        f"no linear layer can be quantised to {recipe.precision} within the limits (with all of "
        f"them: overlap {unrefined.mean_overlap:.4f}, cosine {unrefined.every.mean:.6f})",
        expected=_asked(recipe),
        cause="the limits leave no room for rounding, or ranges are wrong",
        cure="lower the limits, give more and more representative images, or another --method",
    )


def _missed(recipe: Recipe, agreement: Agreement, rounds: int) -> ParityError:
    return ParityError(
        f"on images held apart the {recipe.precision} graph reaches a mean overlap of "
        f"{agreement.mean_overlap:.4f} and a mean cosine of {agreement.every.mean:.6f} after "
        f"{counted(rounds, 'round')}",
        expected=_asked(recipe),
        cause="the samples differ too much from each other",
        cure="give more of them, or lower the limits",
    )
