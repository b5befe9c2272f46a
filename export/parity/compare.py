"""The exported graph against the untouched Hugging Face tower, projector and processor.

The reference shares nothing with the graph but the weights: transformers' own modules
(`reference.py`) and the loop-by-loop `oracle`. Two things are judged apart.

* Choices: which tokens were kept, and which target each other token went to. A choice that differs
  from the oracle's where the numbers behind it differ by less than `Gate.margin` is a swap: it is
  counted and not failed, for rounding decides it. Anything else is a disagreement.
* Values: given the graph's own choices, cosine and largest error of every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.export.algorithm import oracle, selections
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.parity.reference import Features, projector, tower_features
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, TOKEN_WEIGHTS, Manifest
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.console import progress
from vzip.runtime.encoder import check_outputs
from vzip.runtime.pictures.images import ImageSource, load_image
from vzip.runtime.pictures.preprocess import Preprocessing, pixel_values, tower_image

Array = NDArray[Any]

# One backend, on the CPU: the verdict is about the graph, not about a device's arithmetic.
BACKEND = "onnxruntime"


@dataclass(frozen=True)
class Gate:
    """What a graph must reach.

    Attributes:
        margin: Relative difference of two scores, or difference of two cosines, below which a
            choice between them counts as rounding.
        kept_overlap: Smallest mean share of kept tokens that the reference keeps too, or could have
            kept within the margin.
        group_agreement: Smallest mean share of merged tokens that go to the reference's target, or
            to one within the margin of it.
        cosine: Smallest cosine of any token with the reference's.
        error: Largest difference of any value, relative to the largest magnitude.
        disagreements: Choices that may differ beyond the margin; None leaves them to the shares.
    """

    margin: float
    kept_overlap: float
    group_agreement: float
    cosine: float
    error: float
    disagreements: int | None


GATES: Mapping[str, Gate] = {
    "fp32": Gate(1e-5, 0.99, 0.99, 0.99999, 1e-4, 0),
    # FP16 moves scores by about 1e-3, and random weights crowd them; values stay close.
    "fp16": Gate(1e-5, 0.90, 0.90, 0.999, 2e-2, None),
}


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
        min_cosine: Of any token with the reference's.
        mean_cosine: Of all tokens.
        max_error: Largest difference relative to the largest magnitude of the reference.
        passed: Whether the precision's gate was met.
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
    passed: bool

    def to_json(self) -> dict[str, int | float | bool]:
        """Return the fields as the manifest holds them."""
        return asdict(self)


class Reference:
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

    def compare(self, bundle: Bundle) -> Parity:
        """Run a bundle's graph on the images and judge what it gives.

        Args:
            bundle: Made from the same weights; any precision, budget and batch. A graph with a
                static batch sees each image B times.

        Returns:
            The numbers and the verdict.
        """
        gate = GATES[bundle.manifest.precision]
        outputs = _run(bundle, self._inputs, self._preprocessing)
        judged = [
            _judge(features, output, bundle.manifest, self._projector, margin=gate.margin)
            for features, output in zip(self._ranked(bundle.manifest), outputs, strict=True)
        ]
        return _verdict(judged, gate)

    def write(self, path: Path, manifest: Manifest) -> None:
        """Write what `proof.py` compares an engine with, where there is no PyTorch.

        Args:
            path: The file, ``reference.npz``; see `proof.Reference` for the arrays.
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
    _, session = open_backend(BACKEND, bundle, extra_outputs=(TOKEN_WEIGHTS,))
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


class _Choices(NamedTuple):
    """How many choices were made, how many differ, and how many of those beyond the margin."""

    made: int
    differing: int
    beyond: int


def _judge_kept(features: Features, kept: list[int], manifest: Manifest, margin: float) -> _Choices:
    """Compare the kept set with the best scores of the untouched tower."""
    selection, offset = manifest.selection, int(manifest.tower.cls_token)
    scores = features.scores[0]
    here = {index - offset for index in kept if index >= offset}
    there = set(oracle.select(scores, selection.dominant - int(selection.cls_token)))
    # Rounding may swap only what lies at the cut: the lowest score that the reference keeps.
    cut = min((float(scores[patch]) for patch in there), default=0.0)
    wrong = [p for p in here - there if abs(float(scores[p]) - cut) > margin * abs(cut)]
    return _Choices(selection.dominant, len(here - there), len(wrong))


def _judge_groups(
    features: Features, output: _Output, manifest: Manifest, margin: float
) -> tuple[_Choices, dict[int, list[int]]]:
    """Compare targets with the most similar ones; return the graph's own groups beside that."""
    selection, keys = manifest.selection, features.keys[0]
    dropped = {0} if manifest.tower.cls_token and not selection.cls_token else set()
    taken = dropped | {int(index) for index in output.kept}
    rest = [token for token in range(manifest.tower.tokens) if token not in taken]
    expected = oracle.group(keys, rest, selection.contextual)
    targets = list(expected)
    rows = output.token_weights[selection.dominant :]  # [contextual, S]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    made = differing = beyond = 0
    for best, merged in expected.items():
        for token in merged:
            made += 1
            chosen = targets[int(np.argmax(rows[:, token]))]
            groups[chosen].append(token)
            if chosen != best:
                differing += 1
                loss = oracle.cosine(keys, token, best) - oracle.cosine(keys, token, chosen)
                beyond += loss > margin
    return _Choices(made, differing, beyond), groups


class _Judged(NamedTuple):
    """One image's numbers; see `Parity`."""

    kept: _Choices
    groups: _Choices
    cosines: NDArray[np.float64]
    error: float


def _judge(
    features: Features,
    output: _Output,
    manifest: Manifest,
    untouched: torch.nn.Module,
    *,
    margin: float,
) -> _Judged:
    kept = [int(index) for index in output.kept]
    group_choices, groups = _judge_groups(features, output, manifest, margin)
    hidden = features.hidden[0]
    contextual = oracle.merge_groups(hidden, groups, manifest.selection.merge)
    tokens = np.concatenate([hidden[kept], contextual])  # [K, D]
    with torch.no_grad():
        expected = untouched(torch.from_numpy(tokens).float()).double().numpy()  # [K, L]
    got = output.embeds.astype(np.float64)
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return _Judged(
        _judge_kept(features, kept, manifest, margin),
        group_choices,
        np.sum(got * expected, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny),
        float(np.abs(got - expected).max() / np.abs(expected).max()),
    )


def _sum(choices: Iterable[_Choices]) -> _Choices:
    return _Choices(*(sum(column) for column in zip(*choices, strict=True)))


def _verdict(judged: Sequence[_Judged], gate: Gate) -> Parity:
    kept, groups = _sum(one.kept for one in judged), _sum(one.groups for one in judged)
    cosines = np.concatenate([one.cosines for one in judged])
    parity = Parity(
        images=len(judged),
        kept_overlap=1.0 - kept.differing / kept.made,
        kept_swaps=kept.differing - kept.beyond,
        kept_disagreements=kept.beyond,
        group_agreement=1.0 - groups.differing / max(1, groups.made),
        group_swaps=groups.differing - groups.beyond,
        group_disagreements=groups.beyond,
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_error=max(one.error for one in judged),
        passed=False,
    )
    # Written so that a NaN fails.
    passed = (
        # Swaps within the margin are reported and don't count against the graph.
        1.0 - kept.beyond / kept.made >= gate.kept_overlap
        and 1.0 - groups.beyond / max(1, groups.made) >= gate.group_agreement
        and parity.min_cosine >= gate.cosine
        and parity.max_error <= gate.error
        and (gate.disagreements is None or kept.beyond + groups.beyond <= gate.disagreements)
    )
    return replace(parity, passed=passed)
