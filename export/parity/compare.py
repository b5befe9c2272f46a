"""The exported graph against the untouched Hugging Face tower, projector and processor.

The reference shares nothing with the graph but the weights: transformers' own modules
(`reference.py`) and the loop-by-loop `oracle`. Choices are compared with the oracle's: which tokens
are kept, and which target each other token goes to. Values are compared given the graph's own
choices, which say what each token should be. `GRAPH` has the gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.algorithm import oracle, selections
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.parity.reference import Features, projector, tower_features
from vzip.runtime.agreement import GRAPH, Agreement, Choices, Gate, Values, kept_choices
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS, Manifest
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
    short: tuple[str, ...] = ()

    @classmethod
    def of(cls, agreement: Agreement, gate: Gate) -> Parity:
        """Return the numbers of an agreement, and the verdict."""
        chosen, grouped, every = agreement.chosen, agreement.grouped, agreement.every
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
            max_error=every.error if np.isfinite(every.error) else -1.0,
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
        return {**numbers, "passed": self.passed}


class UntouchedModel:
    """What the untouched model says of some images.

    Made before the graph is run, so that tower, graph and weights need not be in memory together.

    Args:
        weights: Of the model.
        images: At least one.
    """

    def __init__(self, weights: VisionWeights, images: Sequence[ImageSource]) -> None:
        loaded = [load_image(image) for image in images]
        self._preprocessing = weights.config.preprocessing
        self._inputs = np.stack([tower_image(image, self._preprocessing) for image in loaded])
        self._features = tower_features(weights, [np.asarray(image) for image in loaded])
        # Pooled tokens are projected already.
        pooled = weights.config.pool > 1
        self._projector = torch.nn.Identity() if pooled else projector(weights)
        self._check_finite(weights)

    def _check_finite(self, weights: VisionWeights) -> None:
        """Raise where the model itself gives what is no number, so that no graph is blamed for it.

        Raises:
            CheckpointError: It does, of weights that are finite.
        """
        for features in self._features:
            with torch.no_grad():
                tokens = self._projector(torch.from_numpy(features.hidden[0]).float())
            if not bool(torch.isfinite(tokens).all()):
                size = {name: float(each.abs().max()) for name, each in weights.tensors.items()}
                name = max(size, key=lambda name: size[name])
                raise CheckpointError(
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
        outputs = _run(bundle, self._inputs, self._preprocessing)
        agreement = Agreement.of_all(
            _compared(features, output, bundle.manifest, self._projector)
            for features, output in zip(self._ranked(bundle.manifest), outputs, strict=True)
        )
        return Parity.of(agreement, GRAPH[bundle.manifest.precision])

    def write(self, path: Path, manifest: Manifest) -> None:
        """Write what an engine is compared with where there is no PyTorch.

        Args:
            path: The file, ``reference.npz``: a `vzip.runtime.agreement.Reference`.
            manifest: Of the graph: its input, and which tokens it is to keep.
        """
        selection = manifest.selection
        embeds, kept = [], []
        ranked = self._ranked(manifest)
        for features in ranked:
            tokens, chosen = oracle.compress(
                features.hidden,
                features.keys,
                features.scores,
                dominant=selection.dominant,
                contextual=selection.contextual,
                merge=selection.merge,
                cls_token=selection.cls_token,
            )
            with torch.no_grad():
                embeds.append(self._projector(torch.from_numpy(tokens[0]).float()).numpy())
            kept.append(chosen[0])
        scores = np.concatenate([features.scores for features in ranked])
        # Uncompressed: photographs and floats hardly shrink.
        np.savez(
            path,
            input=_graph_input(self._inputs, self._preprocessing, manifest),
            kept=np.stack(kept),
            scores=scores.astype(np.float32),
            embeds=np.stack(embeds),
        )

    def _ranked(self, manifest: Manifest) -> list[Features]:
        """Return the features with the scores that the graph's selection goes by."""
        chosen = manifest.selection
        ranking, kept = selections.get(chosen.method).ranking, chosen.dominant - chosen.cls_token
        scores = [each.scores for each in self._features]
        if manifest.tiling is not None and manifest.tiling.order == "newline":
            scores = [
                np.where(_black(image, manifest), -1.0, score)
                for image, score in zip(self._inputs, scores, strict=True)
            ]
        return [
            replace(each, scores=ranking(score, kept))
            for each, score in zip(self._features, scores, strict=True)
        ]


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
    """What the graph gave for one image: [K, L], [dominant] and [K, S]."""

    embeds: Array
    kept: Array
    token_weights: Array


def _run(bundle: Bundle, images: NDArray[np.uint8], prep: Preprocessing) -> list[_Output]:
    manifest = bundle.manifest
    inputs = _graph_input(images, prep, manifest)
    copies = 1 if manifest.batch.dynamic else manifest.batch.max
    graph = bundle.at(bundle.precision)  # and no CPU engine in its place
    _, session = open_backend(BACKEND, graph, extra_outputs=(TOKEN_WEIGHTS,))
    names = (EMBEDS, KEPT, TOKEN_WEIGHTS)
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


def _compared(
    features: Features, output: _Output, manifest: Manifest, untouched: torch.nn.Module
) -> Agreement:
    """Compare what the graph gave for one image."""
    selection, offset = manifest.selection, int(manifest.tower.cls_token)
    best = oracle.select(features.scores[0], selection.dominant - int(selection.cls_token))
    right = np.array([0] * selection.cls_token + [patch + offset for patch in best])
    chosen = kept_choices(right, output.kept, features.scores[0], manifest)
    grouped, groups = _grouped(features, output, manifest)
    hidden = features.hidden[0]
    contextual = oracle.merge_groups(hidden, groups, selection.merge)
    tokens = np.concatenate([hidden[output.kept], contextual])  # [K, D]
    with torch.no_grad():
        expected = untouched(torch.from_numpy(tokens).float()).numpy()  # [K, L]
    scale, dominant = float(np.abs(expected).max()), selection.dominant
    return Agreement(
        np.array([chosen.share]),
        chosen,
        Values.of(expected[:dominant], output.embeds[:dominant], scale),
        Values.of(expected[dominant:], output.embeds[dominant:], scale),
        grouped,
        bool(np.isfinite(output.embeds).all()),
    )
