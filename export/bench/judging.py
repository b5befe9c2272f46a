"""What a stack's tokens are judged by, and how: the bundle's own pictures, or others.

A stack may have been chosen by the bundle's own, as an engine for a CPU is: benchmarks give others.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vzip.export.algorithm import oracle
from vzip.runtime.agreement import CPU_FORM, Gate, Reference, Run, compare, prove, read_reference
from vzip.runtime.bundle.manifest import KEPT, TOKEN_WEIGHTS, Manifest
from vzip.runtime.files.plain import open_plain

if TYPE_CHECKING:
    from vzip.export.checkpoint.weights import VisionWeights
    from vzip.runtime.pictures.images import ImageSource

Array = NDArray[Any]
_KEYS = "keys"


@dataclass(frozen=True, eq=False)
class JudgedBy:
    """What the untouched model says of some pictures.

    Attributes:
        reference: Pictures and tokens.
        keys: float32 [n, H, S, d], by which tokens are merged; None for a bundle's own reference,
            which lacks them.
    """

    reference: Reference
    keys: Array | None = None


def write_judge(
    path: Path, manifest: Manifest, weights: VisionWeights, images: Sequence[ImageSource]
) -> None:
    """Write what `load_judge` reads: ``reference.npz`` of other pictures, with keys.

    Args:
        path: The file.
        manifest: Of the bundle.
        weights: Its own.
        images: The pictures.
    """
    from vzip.export.parity.compare import UntouchedModel

    model = UntouchedModel(weights, images)
    with path.open("wb") as file:
        model.write(file, manifest)  # type: ignore[arg-type]
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive,
        archive.open(f"{_KEYS}.npy", "w") as member,
    ):
        np.lib.format.write_array(member, model.keys.astype(np.float32))


def load_judge(path: Path, manifest: Manifest) -> JudgedBy:
    """Read what `write_judge` wrote.

    Raises:
        BundleError: It is not of this bundle's tower and budget.
    """
    with open_plain(path) as file:
        reference = read_reference(file, manifest)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return JudgedBy(reference, arrays[_KEYS])


def judged(
    run: Run,
    judge: JudgedBy,
    manifest: Manifest,
    batches: Sequence[int],
    gate: Gate,
    *,
    merging: Run | None = None,
) -> dict[str, Any]:
    """Run an encoder on the pictures and say how far it agrees.

    Args:
        run: The encoder.
        judge: The pictures and what is right.
        manifest: Of the bundle.
        batches: Sizes of batches to run.
        gate: What must be reached.
        merging: Like `run`, with ``token_weights`` and ``kept_indices``; None where it can't be
            seen what goes into which merged token.

    Returns:
        The numbers of `vzip.runtime.agreement.Proof`, ``passed`` among them, and
        ``first_percentile_cosine`` of the tokens that both keep, ``contextual_share`` of the merged
        tokens that can be compared, as their target is the same; ``group_agreement``, the share of
        the merged-away tokens that went to the target that the untouched model's keys are most like
        (None where it can't be seen); ``short``, what falls short of the gate, and ``disagrees``,
        what falls short of the gate of an engine for a CPU, which nobody asked to lose anything;
        both empty where nothing does.
    """
    reference, images = judge.reference, len(judge.reference.input)
    chosen = [
        [number % images for number in range(start, start + size)]
        for size in batches
        for start in range(0, images, size)
    ]
    outputs = [run(np.ascontiguousarray(reference.input[pictures])) for pictures in chosen]
    given = iter(outputs)
    proof = prove(lambda _images: next(given), reference, manifest, batches, gate)
    agreement = compare(map(reference.outputs, chosen), outputs, manifest)
    cosines, contextual = agreement.kept.cosines, manifest.selection.contextual
    groups = None
    if merging is not None and judge.keys is not None:
        groups = _groups(merging, judge.keys, chosen[: -(-images // batches[0])], judge, manifest)
    return {
        **proof.to_json(),
        "first_percentile_cosine": float(np.quantile(cosines, 0.01)) if len(cosines) else -1.0,
        "contextual_share": len(agreement.merged.cosines)
        / max(1, contextual * len(agreement.overlaps)),
        "group_agreement": groups,
        "short": "; ".join(proof.short),
        "disagrees": "; ".join(CPU_FORM.judge(agreement)),
    }


def _groups(
    merging: Run, keys: Array, chosen: Sequence[Sequence[int]], judge: JudgedBy, manifest: Manifest
) -> float:
    """Return the share of merged-away tokens that are where the untouched model's keys say."""
    selection, tower = manifest.selection, manifest.tower
    dropped = {0} if tower.cls_token and not selection.cls_token else set()
    same = made = 0
    for pictures in chosen:
        outputs = merging(np.ascontiguousarray(judge.reference.input[list(pictures)]))
        for picture, kept, weights in zip(
            pictures, outputs[KEPT], outputs[TOKEN_WEIGHTS], strict=True
        ):
            taken = dropped | {int(index) for index in kept}
            rest = [token for token in range(tower.tokens) if token not in taken]
            expected = oracle.group(keys[picture].astype(np.float64), rest, selection.contextual)
            if not expected:  # nothing is merged
                continue
            into = np.argmax(weights[selection.dominant :], axis=0)  # [S]
            for place, merged in enumerate(expected.values()):
                same += int((into[merged] == place).sum()) if merged else 0
                made += len(merged)
    return same / max(1, made)
