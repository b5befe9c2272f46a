"""What K tokens know of their picture: three probes, in closed form, and the error of a difference.

A reader of tokens is fitted once, on single patches of other pictures, and serves every choice
alike. It is told which tokens are longer than three times the picture's median (a sink, or what was
merged with one) and reads them apart, as it does CLS, so that they can't spoil what stands beside
them: what is measured is what is missing, not what is in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.choices import NOWHERE, SINK, Chosen
from benchmarks.harness.views import Float, Seen

Double = NDArray[np.float64]
Bool = NDArray[np.bool_]

LOOK = 256
"""Principal axes that pictures are compared by; what reads tokens has all of them."""
WIDTHS = (0.75, 3.0)
"""Of the Gaussians that pool by place for a patch, in patches of a grid of 24."""
REGION_WIDTHS = (1.5, 5.0)
"""The same for a region."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""That are tried, of the mean diagonal."""
FOLDS = 8


@dataclass(frozen=True)
class Scale:
    """A tower's channels as a probe takes them: standardised, of length 1, on principal axes."""

    mean: Float
    deviation: Float
    axes: Float

    def of(self, tokens: Float) -> Float:
        """Return tokens [K, D] as [K, D]."""
        standard = (tokens - self.mean) / self.deviation
        length = np.linalg.norm(standard, axis=1, keepdims=True)
        return (standard / np.maximum(length, 1e-6)) @ self.axes


def scale(pictures: Sequence[Float]) -> Scale:
    """Learn it from patches [n, D] of pictures, of which sinks were left out."""
    patches = np.concatenate(pictures)
    mean, deviation = patches.mean(0), patches.std(0) + 1e-6
    standard = (patches - mean) / deviation
    standard /= np.maximum(np.linalg.norm(standard, axis=1, keepdims=True), 1e-6)
    values, vectors = np.linalg.eigh(standard.T @ standard)
    return Scale(mean, deviation, vectors[:, np.argsort(-values)].astype(np.float32))


@dataclass(frozen=True)
class Known:
    """Kept tokens as a reader takes them.

    Attributes:
        looks: [K, D].
        places: [K, 2], row and column in patches; NaN for what has none.
        long: bool [K], tokens that are told apart.
    """

    looks: Float
    places: Float
    long: Bool


def known(chosen: Chosen, seen: Seen, form: Scale, side: int) -> Known:
    """Prepare what was chosen of a picture of `side` × `side` patches."""
    median = np.median(np.linalg.norm(seen.hidden[1:], axis=1))
    places = np.stack(np.divmod(chosen.places, side), axis=1).astype(np.float32)
    places[chosen.places == NOWHERE] = np.nan
    long = np.linalg.norm(chosen.tokens, axis=1) > SINK * median
    return Known(form.of(chosen.tokens), places, long & (chosen.places != NOWHERE))


def grid(count: int, side: int) -> Float:
    """Return [count², 2]: the middles of count × count equal fields of a picture, in patches."""
    middles = (np.arange(count) + 0.5) * side / count - 0.5
    rows, columns = np.meshgrid(middles, middles, indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], axis=1).astype(np.float32)


Sums = tuple[Double, Double, Double]
"""Of some pictures: given × given, given × wanted, wanted². What a ridge regression needs."""


class Ridge:
    """Ridge regression over pictures, told to each by what was learnt from others.

    Of the folds one is left out, the next one chooses the ridge, and then all but the first are
    fitted.

    Args:
        folds: Of every picture.
        given: [n, features] of every picture; a constant is added.
        wanted: [n, targets] of the same.
    """

    def __init__(
        self, folds: Sequence[int], given: Sequence[Float], wanted: Sequence[Float]
    ) -> None:
        sums = [_sums(*pair) for pair in zip(given, wanted, strict=True)]
        labels = np.array(folds)
        count = max(folds) + 1
        by_fold = [
            _added([sums[index] for index in np.flatnonzero(labels == fold)])
            for fold in range(count)
        ]
        self._weights = [self._fitted(by_fold, fold) for fold in range(count)]

    @staticmethod
    def _fitted(by_fold: list[Sums], fold: int) -> Double:
        judge = (fold + 1) % len(by_fold)
        others = [sums for each, sums in enumerate(by_fold) if each != fold]
        learnt = _added([s for each, s in enumerate(by_fold) if each not in (fold, judge)])
        judged = by_fold[judge]
        errors = {ridge: _error(_solved(learnt, ridge), judged) for ridge in RIDGES}
        return _solved(_added(others), min(errors, key=lambda ridge: errors[ridge]))

    def read(self, fold: int, given: Float) -> Float:
        """Return what a picture's rows [n, features] tell: [n, targets], float32."""
        told: Float = (_with_one(given) @ self._weights[fold]).astype(np.float32)
        return told


def _with_one(given: Float) -> Float:
    return np.concatenate([given, np.ones((len(given), 1), np.float32)], axis=1)


def _sums(given: Float, wanted: Float) -> Sums:
    rows = _with_one(given)
    return (
        (rows.T @ rows).astype(float), (rows.T @ wanted).astype(float), (wanted**2).sum(0)
    )  # fmt: skip


def _added(sums: Sequence[Sums]) -> Sums:
    squares, products, wanted = (np.sum(parts, axis=0) for parts in zip(*sums, strict=True))
    return squares, products, wanted


def _solved(sums: Sums, ridge: float) -> Double:
    squares, products, _ = sums
    size = len(squares)
    penalty = np.full(size, ridge * np.trace(squares) / size)
    penalty[-1] = 0
    solved: Double = np.linalg.solve(squares + np.diag(penalty + 1e-9), products)
    return solved


def _error(weights: Double, sums: Sums) -> float:
    squares, products, wanted = sums
    return float(
        (wanted - 2 * (weights * products).sum(0)).sum() + (weights * (squares @ weights)).sum()
    )


@dataclass(frozen=True)
class Reader:
    """What reads targets off tokens: one for patches, one for sinks, one for CLS.

    Attributes:
        patch: Reads a patch's own targets.
        sink: Reads the picture's mean targets off a sink, whose own patch it doesn't tell.
        cls: Reads the picture's mean targets off CLS.
    """

    patch: Ridge
    sink: Ridge
    cls: Ridge

    @classmethod
    def learnt(
        cls,
        folds: Sequence[int],
        looks: Sequence[Float],
        long: Sequence[Bool],
        wanted: Sequence[Float],
    ) -> Reader:
        """Learn it.

        Args:
            folds: Of every picture.
            looks: [1 + N, D] of all of a picture's tokens, CLS first.
            long: bool [N], its sinks.
            wanted: [N, targets].
        """
        patches = [each[1:] for each in looks]
        means = [each.mean(0, keepdims=True) for each in wanted]
        usual = [~each for each in long]
        return cls(
            Ridge(folds, _of(patches, usual), _of(wanted, usual)),
            Ridge(
                folds, _of(patches, long),
                [np.repeat(mean, each.sum(), 0) for mean, each in zip(means, long, strict=True)],
            ),
            Ridge(folds, [each[:1] for each in looks], means),
        )  # fmt: skip

    def told(
        self, kept: Known, fold: int, at: Float, side: int, widths: tuple[float, float]
    ) -> Float:
        """Return [P, targets, 6]: what the tokens say of some places [P, 2], in six voices.

        The tokens nearby, with Gaussian weights of two widths that add up to 1; the mean of all
        tokens, that of the long ones, CLS (0 where there are none), and 1.
        """
        placed = ~np.isnan(kept.places[:, 0])
        near = placed & ~kept.long
        if not near.any():
            near = placed
        said = self.patch.read(fold, kept.looks[near])
        distance = ((at[:, None] - kept.places[near][None]) ** 2).sum(-1)
        distance -= distance.min(1, keepdims=True)
        voices = []
        for width in widths:
            weights = np.exp(-distance / (2 * (width * side / 24) ** 2))
            voices.append((weights / weights.sum(1, keepdims=True)) @ said)
        far = [said.mean(0)]
        for ridge, some in ((self.sink, kept.long), (self.cls, ~placed)):
            heard = ridge.read(fold, kept.looks[some])
            far.append(heard.mean(0) if some.any() else np.zeros_like(far[0]))
        voices += [np.broadcast_to(each, voices[0].shape) for each in (*far, np.ones_like(far[0]))]
        return np.stack(voices, axis=-1).astype(np.float32)


def explained(
    folds: Sequence[int], told: Sequence[Float], wanted: Sequence[Float], *, apart: bool
) -> Double:
    """Return of every picture 1 − squared error / mean square over all pictures: [pictures].

    The voices [P, targets, 6] are weighed, for every target, by least squares on other folds.

    Args:
        folds: Of every picture.
        told: `Reader.told` of every picture.
        wanted: [P, targets], of mean 0 over all pictures.
        apart: Every target counts alike; otherwise, as much as it varies.
    """
    squares = np.stack([np.einsum("ptv,ptw->tvw", one, one).astype(float) for one in told])
    products = np.stack(
        [np.einsum("ptv,pt->tv", *pair).astype(float) for pair in zip(told, wanted, strict=True)]
    )
    total = np.mean([(each**2).sum(0, dtype=float) for each in wanted], axis=0)
    labels, errors = np.array(folds), []
    for picture, (voices, truth) in enumerate(zip(told, wanted, strict=True)):
        others = labels != folds[picture]
        gram = squares[others].sum(0)
        slack = 1e-3 * np.trace(gram, axis1=1, axis2=2) / gram.shape[-1]
        gram += slack[:, None, None] * np.eye(gram.shape[-1])
        weights = np.linalg.solve(gram, products[others].sum(0)[..., None])[..., 0]
        errors.append(((np.einsum("ptv,tv->pt", voices, weights) - truth) ** 2).sum(0))
    stacked = np.stack(errors)
    if apart:
        return 1 - (stacked / total).mean(1)
    return 1 - stacked.sum(1) / total.sum()


def folds_of(scenes: Sequence[str]) -> list[int]:
    """Return a fold of every picture, the same for all pictures of a scene."""
    names = sorted(set(scenes))
    return [names.index(scene) % min(FOLDS, len(names)) for scene in scenes]


def _of(arrays: Sequence[Float], masks: Sequence[Bool]) -> list[Float]:
    return [array[mask] for array, mask in zip(arrays, masks, strict=True)]


def replaced(kept: Known, reader: Ridge, fold: int, side: int) -> Known:
    """Return tokens with the places that they seem to have, by a `Ridge` of (row, column)."""
    places = reader.read(fold, kept.looks).clip(0, side - 1)
    places[np.isnan(kept.places[:, 0])] = np.nan
    return Known(kept.looks, places, kept.long)


def reciprocal_ranks(queries: Sequence[Float], gallery: Sequence[Float]) -> Double:
    """Return 1 / rank of picture i of the gallery for query i; ties count half.

    Two sets of tokens [K, D] are as alike as the mean greatest cosine of each token with the
    other set's, averaged over both ways.
    """
    queries, gallery = ([_unit(each) for each in group] for group in (queries, gallery))
    every = np.concatenate(gallery).T
    starts = np.cumsum([0, *(len(each) for each in gallery[:-1])])
    sizes = np.diff([*starts, every.shape[1]])
    ranks = []
    for right, query in enumerate(queries):
        cosines = query @ every  # [K, pictures x K]
        there = np.maximum.reduceat(cosines, starts, axis=1).mean(0)
        back = np.add.reduceat(cosines.max(0), starts) / sizes
        alike = there + back
        better = (alike > alike[right]).sum() + ((alike == alike[right]).sum() - 1) / 2
        ranks.append(1 / (1 + better))
    return np.array(ranks)


def _unit(looks: Float) -> Float:
    looks = looks[:, :LOOK]
    unit: Float = looks / np.maximum(np.linalg.norm(looks, axis=1, keepdims=True), 1e-9)
    return unit


def statistics(pixels: NDArray[np.uint8], count: int) -> Float:
    """Return [count², 8] of a picture [H, W, 3]: colour, contrast, edges, texture of its fields.

    Lightness, red against green, blue against yellow; the logarithms of the deviation of the
    lightness, of its gradient and of its Laplacian; and the direction of edges as cosine and sine
    of the doubled angle, weighted by how much of one direction they are.
    """
    red, green, blue = pixels.astype(np.float32).transpose(2, 0, 1) / 255
    light = (red + green + blue) / 3
    down, right = np.gradient(light)
    laplacian = np.abs(np.gradient(down, axis=0) + np.gradient(right, axis=1))
    xx, yy, xy = right * right, down * down, right * down
    maps = np.stack([light, red - green, blue - (red + green) / 2, light**2, xx, yy, xy, laplacian])
    height, width = (length // count * count for length in light.shape)
    fields = maps[:, :height, :width].reshape(8, count, height // count, count, width // count)
    means = fields.mean((2, 4)).reshape(8, -1)
    light, warm, cold, square, xx, yy, xy, texture = means
    edges = xx + yy + 1e-8
    return np.stack(
        [
            light, warm, cold,
            np.log(np.sqrt(np.maximum(square - light**2, 0)) + 1e-3),
            np.log(np.sqrt(edges) + 1e-3), np.log(texture + 1e-3),
            (xx - yy) / edges, 2 * xy / edges,
        ],
        axis=1,
    ).astype(np.float32)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, and its standard error with scenes as what is independent."""

    mean: float
    error: float

    @property
    def verdict(self) -> str:
        """Return "better" or "worse" where it is so by two standard errors, else "even"."""
        if abs(self.mean) <= 2 * self.error or self.mean == 0:
            return "even"
        return "better" if self.mean > 0 else "worse"


def paired(one: Double, other: Double, scenes: Sequence[str]) -> Difference:
    """Return how much greater `one` is than `other`, both [views]; each scene counts once."""
    means = _by_scene(one - other, scenes)
    return Difference(float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means))))


def helps(verdicts: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> bool:
    """Return whether the rule of `benchmarks.sinks` is met.

    Args:
        verdicts: Probe → verdict where it is to help.
        others: The same at other budgets and towers, where it must not lose.
    """
    gains = sum(verdict == "better" for verdict in verdicts.values())
    losses = [probe for each in (verdicts, *others) for probe in each if each[probe] == "worse"]
    return gains >= 2 and not losses


def mean_by_scene(values: Double, scenes: Sequence[str]) -> float:
    """Return the mean over scenes of the mean over each one's views."""
    return float(_by_scene(values, scenes).mean())


def _by_scene(values: Double, scenes: Sequence[str]) -> Double:
    labels = np.array(scenes)
    return np.array([values[labels == scene].mean() for scene in sorted(set(scenes))])
