"""The exported graph against the untouched Hugging Face tower, projector and processor.

The reference shares nothing with the graph but the weights: transformers' own modules
(`reference.py`), and what chooses among their tokens (`choosing.py`), loop by loop where the
selection has an oracle. Choices are compared with that: which tokens are kept, and which target
each other token goes to; of a greedy selection, what its picks reach. Values are compared given the
graph's own choices, which say what each token should be. `GRAPH` has the gates.

An FP32 graph is judged by the model in FP64, beside what FP32 costs the model itself. An FP16 graph
runs in true half precision (`rounded.py`) and is judged by the model in FP32, beside what half
precision costs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.algorithm import oracle
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.parity.choosing import Chosen, Tokens, choose, weighed_choices
from vzip.export.parity.half_sums import exact_sums
from vzip.export.parity.reference import PRECISIONS, Features, as_dtype, projector, tower_features
from vzip.export.parity.rounded import open_rounded
from vzip.runtime.agreement import GRAPH, Agreement, Choices, Gate, Reference, Values, kept_choices
from vzip.runtime.agreement.floor import floor_of
from vzip.runtime.agreement.found import merge_targets, picked_choices
from vzip.runtime.agreement.objective import picks_of
from vzip.runtime.backends import open_backend
from vzip.runtime.backends.protocol import Backend
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, RANK, TOKEN_WEIGHTS, Manifest
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.console import progress
from vzip.runtime.encoder import check_outputs
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.images import ImageSource, load_image
from vzip.runtime.pictures.preprocess import Preprocessing, pixel_values, tower_image

Array = NDArray[Any]

# One backend, on the CPU: the verdict is about the graph, not about a device's arithmetic.
BACKEND = "onnxruntime"


@dataclass(frozen=True)
class Parity:
    """What was measured over all images; the manifest's ``parity``.

    Attributes:
        images: How many.
        kept_overlap: Mean share of kept tokens that the reference keeps too.
        kept_swaps: Kept tokens that differ within the margin.
        kept_disagreements: Kept tokens that differ beyond it.
        group_agreement: Mean share of merged tokens that go to the reference's target.
        group_swaps: Merged tokens whose target differs within the margin.
        group_disagreements: Merged tokens whose target differs beyond it.
        min_cosine: Of any token with the reference's; −1 if a number isn't finite.
        mean_cosine: Of all tokens.
        max_error: Largest difference relative to the largest magnitude of the reference; −1 if it
            isn't finite.
        median_error: The median of the tokens' errors.
        most_error: The error that 95 % of the tokens keep to.
        floor_median_error: As `median_error`, of the untouched model that computes in the graph's
            precision, beside itself in a finer one.
        floor_most_error: As `most_error`.
        floor_max_error: As `max_error`.
        tokens_beyond: How many tokens differ by more than the gate allows beside their floor.
        objective: Of a greedy selection the lowest share that picks reach of what the reference's
            do; None, and not recorded, of others.
        short: What falls short of the precision's gate, in words; not recorded.
    """

    images: int
    kept_overlap: float
    kept_swaps: int
    kept_disagreements: int
    group_agreement: float
    group_swaps: int
    group_disagreements: int
    min_cosine: float
    mean_cosine: float
    max_error: float
    median_error: float
    most_error: float
    floor_median_error: float
    floor_most_error: float
    floor_max_error: float
    tokens_beyond: int
    objective: float | None = None
    short: tuple[str, ...] = ()

    @classmethod
    def of(cls, agreement: Agreement, gate: Gate) -> Parity:
        """Return the numbers of an agreement, and the verdict."""
        chosen, grouped, every = agreement.chosen, agreement.grouped, agreement.every
        floor, beside = every.floor[:, 0], gate.every.beside
        assert beside is not None
        return cls(
            images=len(agreement.overlaps),
            kept_overlap=chosen.share,
            kept_swaps=chosen.within(gate.margin),
            kept_disagreements=chosen.beyond(gate.margin),
            group_agreement=grouped.share,
            group_swaps=grouped.within(gate.margin),
            group_disagreements=grouped.beyond(gate.margin),
            min_cosine=every.lowest,
            mean_cosine=every.mean,
            max_error=_number(every.error),
            median_error=_number(every.quantile(0.5)),
            most_error=_number(every.quantile(0.95)),
            floor_median_error=float(np.quantile(floor, 0.5)),
            floor_most_error=float(np.quantile(floor, 0.95)),
            floor_max_error=float(floor.max()),
            tokens_beyond=int(beside.beyond(every).sum()),
            objective=float(agreement.objectives.min()) if len(agreement.objectives) else None,
            short=gate.judge(agreement),
        )

    @property
    def passed(self) -> bool:
        """Whether the gate was met."""
        return not self.short

    def to_json(self) -> dict[str, int | float | bool]:
        """Return the fields as the manifest holds them, and ``passed``."""
        numbers = asdict(self)
        del numbers["short"]
        if self.objective is None:
            del numbers["objective"]
        return {**numbers, "passed": self.passed}


def _number(value: float) -> float:
    """Return a number that JSON can hold; −1 for infinity."""
    return float(value) if np.isfinite(value) else -1.0


# Precision of a graph → in which the model is what is right, and in which its floor is measured.
# BF16 as well, for engines that compute in it, and because it shows which tokens are unsteady.
_RIGHT: Final = {"fp32": "fp64", "fp16": "fp32"}
_MEASURED: Final = {"fp32": ("fp32", "bf16"), "fp16": ("fp16", "bf16")}


class UntouchedModel:
    """What the untouched model says of some images.

    Made before the graph is run, so that tower, graph and weights need not be in memory together.

    Args:
        weights: Of the model.
        images: At least one.
        precision: Of the graphs that it is to be compared with.
    """

    def __init__(
        self, weights: VisionWeights, images: Sequence[ImageSource], precision: str = "fp32"
    ) -> None:
        loaded = [load_image(image) for image in images]
        self._precision = precision
        self._preprocessing = weights.config.preprocessing
        self._inputs = np.stack([tower_image(image, self._preprocessing) for image in loaded])
        self._features = tower_features(
            weights,
            [np.asarray(image) for image in loaded],
            precision=_RIGHT[precision],
            narrow=_MEASURED[precision],
        )
        # Pooled tokens are projected already.
        pooled = weights.config.pool > 1
        plain = torch.nn.Identity() if pooled else projector(weights)
        self._projectors = {
            name: as_dtype(plain, PRECISIONS[name])
            for name in (_RIGHT[precision], *_MEASURED[precision])
        }
        self._check_finite(weights)

    def _check_finite(self, weights: VisionWeights) -> None:
        """Raise where the model itself gives what is no number, so that no graph is blamed for it.

        Raises:
            CheckpointError: It does, of weights that are finite.
        """
        for features in self._features:
            # FP64 holds numbers that FP32, in which the graph computes, doesn't.
            for name in ("fp32", self._precision):
                right = name == _RIGHT[self._precision]
                hidden = features.hidden if right else features.narrow[name].double().numpy()
                if not np.isfinite(self._projected(hidden[0], name)).all():
                    raise self._overflown(weights, name)

    def _overflown(self, weights: VisionWeights, precision: str) -> CheckpointError:
        size = {name: float(each.abs().max()) for name, each in weights.tensors.items()}
        name = max(size, key=lambda name: size[name])
        if precision == "fp16":
            return CheckpointError(
                "the untouched model gives tokens that hold NaN or infinity in FP16",
                expected="finite ones, as in FP32",
                cause=f"numbers inside are above 65504, its largest; '{name}' has {size[name]:.1e}",
                cure="export with --dtype fp32",
            )
        return CheckpointError(
            "the untouched model gives tokens that hold NaN or infinity",
            expected="finite ones",
            cause=f"numbers of its weights are too large, {size[name]:.1e} in '{name}'",
            cure="download the file again, or take an earlier checkpoint of the training",
        )

    @property
    def keys(self) -> NDArray[np.float64]:
        """The keys that tokens are merged by, [n, H, S, d]."""
        return np.concatenate([each.keys for each in self._features])

    def compare(self, bundle: Bundle) -> Parity:
        """Run a bundle's graph on the images and judge what it gives.

        Args:
            bundle: Made from the same weights; any precision, budget and batch. A graph with a
                static batch sees each image B times.

        Returns:
            The numbers and the verdict.
        """
        assert bundle.manifest.precision == self._precision
        outputs = _run(bundle, self._inputs, self._preprocessing)
        chosen = self._chosen(bundle.manifest)
        agreement = Agreement.of_all(
            self._compared(picture, right, output, bundle.manifest)
            for picture, (right, output) in enumerate(zip(chosen, outputs, strict=True))
        )
        return Parity.of(agreement, GRAPH[bundle.manifest.precision])

    def write(self, path: Path, manifest: Manifest) -> None:
        """Write what an engine is compared with where there is no PyTorch.

        Args:
            path: The file, ``reference.npz``: a `vzip.runtime.agreement.Reference`.
            manifest: Of the graph: its input, and which tokens it is to keep.
        """
        embeds = []
        floors: dict[str, list[Array]] = {name: [] for name in _MEASURED[self._precision]}
        chosen = self._chosen(manifest)
        for each in chosen:
            right = self._projected(each.compressed(each.features.hidden[0]))
            embeds.append(right)
            for name, found in floors.items():
                hidden = each.features.narrow[name][0].double().numpy()
                found.append(_floor(right, self._projected(each.compressed(hidden), name)))
        scores = np.concatenate([each.features.scores for each in chosen])
        objectives = [each.objective for each in chosen if each.objective is not None]
        weights = [each.weights for each in objectives if each.weights is not None]
        ranks = [each.rank for each in chosen if each.rank is not None]
        reference = Reference(
            _graph_input(self._inputs, self._preprocessing, manifest),
            np.stack([each.kept for each in chosen]),
            scores.astype(np.float32),
            np.stack(embeds).astype(np.float32),
            {name: np.stack(each).astype(np.float32) for name, each in floors.items()},
            np.stack(ranks) if objectives else None,
            np.stack([each.similarity for each in objectives]).astype(np.float16)
            if objectives
            else None,
            np.stack(weights).astype(np.float32) if weights else None,
        )
        # Uncompressed: photographs and floats hardly shrink.
        np.savez(path, **reference.to_arrays())  # type: ignore[arg-type]

    def _projected(
        self, tokens: NDArray[np.float64], precision: str | None = None
    ) -> NDArray[np.float64]:
        """Return what the untouched projector makes of features [n, F]: [n, L].

        Args:
            tokens: The features.
            precision: It computes in; None for the one that is right.
        """
        name = precision or _RIGHT[self._precision]
        with torch.no_grad(), exact_sums():
            made = self._projectors[name](torch.from_numpy(tokens).to(PRECISIONS[name]))
        found: NDArray[np.float64] = made.double().numpy()
        return found

    def _compared(
        self, picture: int, right: Chosen, output: _Output, manifest: Manifest
    ) -> Agreement:
        """Compare what the graph gave for one image."""
        selection, features = manifest.selection, right.features
        objectives = np.zeros(0)
        if right.objective is None or right.rank is None or output.rank is None:
            scores = features.scores[0] if right.scored else None
            chosen = kept_choices(right.kept, output.kept, scores, manifest)
        else:
            first = int(manifest.tower.cls_token)
            picks = picks_of(output.kept, output.rank, first)
            best = picks_of(right.kept, right.rank, first)
            objectives = np.array([right.objective.share(picks, best)])
            chosen = picked_choices(right.kept, output.kept)
        grouped, tokens = _merged(right, output, manifest)

        expected = self._projected(tokens(features.hidden[0]))  # [K, L]
        measured = {
            name: _floor(expected, self._projected(tokens(hidden[0].double().numpy()), name))
            for name, hidden in features.narrow.items()
        }
        floor = floor_of(measured, manifest.precision)
        scale, dominant = float(np.abs(expected).max()), selection.dominant
        tokens_of = np.concatenate([output.kept, merge_targets(output.kept, manifest)])
        places = np.stack([np.full(len(expected), picture), tokens_of], axis=1)

        def values(rows: slice) -> Values:
            return Values.of(
                expected[rows],
                output.embeds[rows],
                scale,
                floor=None if floor is None else floor[rows],
                places=places[rows],
            )

        return Agreement(
            np.array([chosen.share]),
            chosen,
            values(slice(dominant)),
            values(slice(dominant, None)),
            grouped,
            bool(np.isfinite(output.embeds).all()),
            objectives,
            selection.contextual > 0,
        )

    def _chosen(self, manifest: Manifest) -> list[Chosen]:
        """Return what is right for each image."""
        padded = manifest.tiling is not None and manifest.tiling.order == "newline"
        return [
            choose(each, _black(image, manifest) if padded else None, manifest)
            for image, each in zip(self._inputs, self._features, strict=True)
        ]


def _floor(right: Array, narrow: Array) -> NDArray[np.float64]:
    """Return the error, and 1 minus the cosine, of each token [n, L]: [n, 2].

    Where the narrow precision gives what is no number, the floor is as high as can be said.
    """
    found = Values.of(right, narrow, float(np.abs(right).max()))
    largest = float(np.finfo(np.float32).max)
    return np.stack([np.minimum(found.errors, largest), 1 - found.cosines], axis=1)


def _graph_input(images: NDArray[np.uint8], prep: Preprocessing, manifest: Manifest) -> Array:
    """Return images [n, H, W, 3] as the graph takes them."""
    return images if manifest.input.name == "image" else pixel_values(images, prep)


def _black(image: NDArray[np.uint8], manifest: Manifest) -> NDArray[np.bool_]:
    """Return [1, N]: which patches of an image [H, W, 3] are black all over."""
    (rows, columns), side = manifest.tower.grid, manifest.tower.patch_size
    black = [
        not image[row * side : (row + 1) * side, column * side : (column + 1) * side].any()
        for row in range(rows)
        for column in range(columns)
    ]
    return np.array([black])


class _Output(NamedTuple):
    """What the graph gave for one image: [K, L], [dominant], [K, S] and, if it ranks, [K]."""

    embeds: Array
    kept: Array
    token_weights: Array
    rank: Array | None = None


def _run(bundle: Bundle, images: NDArray[np.uint8], prep: Preprocessing) -> list[_Output]:
    manifest = bundle.manifest
    inputs = _graph_input(images, prep, manifest)
    copies = 1 if manifest.batch.dynamic else manifest.batch.max
    session = _opened(bundle.at(bundle.precision))  # and no CPU engine in its place
    names = (EMBEDS, KEPT, TOKEN_WEIGHTS, *((RANK,) if manifest.has_rank else ()))
    results = []
    try:
        for image in progress(inputs, desc="graph", unit="image"):
            output = session.run({manifest.input.name: np.repeat(image[None], copies, axis=0)})
            check_outputs(manifest, BACKEND, output, copies)
            # The last copy: it shows whether the batch axis is handled.
            results.append(_Output(*(output[name][-1] for name in names)))
    finally:
        session.close()
    return results


def _opened(bundle: Bundle) -> Backend:
    """Open a bundle's graph; an FP16 graph so that it computes in true half precision."""
    if bundle.manifest.precision == "fp32":
        return open_backend(BACKEND, bundle, extra_outputs=(TOKEN_WEIGHTS,))[1]
    return open_rounded(bundle, extra_outputs=(TOKEN_WEIGHTS,))


def _merged(right: Chosen, output: _Output, manifest: Manifest) -> tuple[Choices, Tokens]:
    """Compare what was merged with what; return also what makes tokens by the graph's choices."""
    if right.weights is not None:
        weights = output.token_weights.astype(np.float64)
        return weighed_choices(right, output.kept, output.token_weights), lambda x: weights @ x
    if not manifest.selection.contextual:
        return Choices(0, np.zeros(0)), lambda hidden: hidden[output.kept]
    grouped, groups = _grouped(right.features, output, manifest)

    def tokens(hidden: NDArray[np.float64]) -> NDArray[np.float64]:
        merged = oracle.merge_groups(hidden, groups, manifest.selection.merge)
        return np.concatenate([hidden[output.kept], merged])  # [K, F]

    return grouped, tokens


def _grouped(
    features: Features, output: _Output, manifest: Manifest
) -> tuple[Choices, dict[int, list[int]]]:
    """Compare targets with the most similar ones; return the graph's own groups beside that."""
    selection, keys = manifest.selection, features.keys[0]
    dropped = {0} if manifest.tower.cls_token and not selection.cls_token else set()
    taken = dropped | {int(index) for index in output.kept}
    rest = [token for token in range(manifest.tower.tokens) if token not in taken]
    expected = oracle.group(keys, rest, selection.contextual)
    targets = list(expected)
    rows = output.token_weights[selection.dominant :]  # [contextual, S]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    lost = []
    for best, merged in expected.items():
        for token in merged:
            chosen = targets[int(np.argmax(rows[:, token]))]
            groups[chosen].append(token)
            if chosen != best:
                lost.append(oracle.cosine(keys, token, best) - oracle.cosine(keys, token, chosen))
    return Choices(sum(map(len, groups.values())), np.array(lost, np.float64)), groups
