"""Does an engine give the tokens that PyTorch gives? Judged with numpy alone, where it was built.

A bundle's `reference.npz` holds reference pictures as the graph takes them and what the untouched
model says of them: which tokens VisionZip keeps, the scores behind that, and every output token.
An engine rounds otherwise than PyTorch, so two things are judged apart:

* Which tokens are kept. A token whose score is within `Gate.margin` of the last one kept may be
  swapped; any other difference is a disagreement.
* The tokens that both kept, row by row; and each merged token whose target is the same in both.
  Which tokens were merged into it can still differ by rounding, so its gate is a mean.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.manifest import EMBEDS, KEPT, REFERENCE_FILE, Manifest
from vzip.runtime.bundle.precision_record import QUANTISED, Quantised
from vzip.runtime.errors import BundleError

Array = NDArray[Any]
Run = Callable[[Array], Mapping[str, Array]]

KEYS: Final = ("input", "kept", "scores", "embeds")


@dataclass(frozen=True)
class Gate:
    """What an engine must reach.

    Attributes:
        margin: Relative distance of a score from the last kept one that counts as rounding.
        kept_overlap: Smallest mean share of kept tokens that the reference keeps too.
        cosine: Smallest cosine of any token that both keep.
        contextual: Smallest mean cosine of the merged tokens that can be compared.
        error: Largest difference in a token that both keep, relative to the largest magnitude.
    """

    margin: float
    kept_overlap: float
    cosine: float
    contextual: float
    error: float


QUANTISED_GATE: Final = Gate(margin=0.5, kept_overlap=0.85, cosine=0.9, contextual=0.95, error=0.3)

GATES: Final[Mapping[str, Gate]] = {
    "fp32": Gate(margin=1e-3, kept_overlap=0.99, cosine=0.9999, contextual=0.999, error=1e-3),
    # FP16 moves scores by about a hundredth at worst. Engines known to be wrong had cosines of .14
    # to .65, right ones .9997 on average (`docs` of TensorRT-LLM issue 3223).
    "fp16": Gate(margin=5e-2, kept_overlap=0.85, cosine=0.99, contextual=0.98, error=0.1),
    **dict.fromkeys(QUANTISED, QUANTISED_GATE),
}


@dataclass(frozen=True)
class Reference:
    """What the untouched model says of n pictures.

    Attributes:
        input: uint8 [n, H, W, 3] or float32 [n, 3, H, W], as the graph takes it.
        kept: int64 [n, dominant].
        scores: float32 [n, N], one per patch.
        embeds: float32 or float16 [n, K, L].
    """

    input: Array
    kept: NDArray[np.int64]
    scores: Array
    embeds: Array


@dataclass(frozen=True)
class Proof:
    """What was measured; the ``proof`` of an engine's record.

    Attributes:
        images: How many pictures.
        runs: How many results were judged: each picture, in each batch size that was run.
        kept_overlap: Mean share of kept tokens that the reference keeps too.
        kept_swaps: Kept tokens that differ within the margin.
        kept_disagreements: Kept tokens that differ beyond it.
        min_cosine: Of any token that both keep.
        mean_cosine: Of all of these.
        max_error: Largest difference in these, relative to the reference's largest magnitude.
        contextual_compared: Merged tokens with the same target in both.
        contextual_cosine: Mean cosine of these; 0 if there are none.
        passed: Whether the precision's gate was met.
    """

    images: int
    runs: int
    kept_overlap: float
    kept_swaps: int
    kept_disagreements: int
    min_cosine: float
    mean_cosine: float
    max_error: float
    contextual_compared: int
    contextual_cosine: float
    passed: bool

    def to_json(self) -> dict[str, bool | int | float | str]:
        """Return the fields as the manifest holds them."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{'passed' if self.passed else 'FAILED'} on {self.images} pictures ({self.runs} "
            f"runs): kept overlap {self.kept_overlap:.4f} ({self.kept_swaps} swaps by rounding, "
            f"{self.kept_disagreements} disagreements), kept tokens: lowest cosine "
            f"{self.min_cosine:.6f}, mean {self.mean_cosine:.6f}, largest error "
            f"{self.max_error:.1e}; merged tokens: mean cosine {self.contextual_cosine:.6f} of "
            f"{self.contextual_compared}"
        )


def read_reference(data: Any, manifest: Manifest) -> Reference:
    """Read the content of `reference.npz`, whose digest was already checked.

    Args:
        data: The file, open for reading in binary.
        manifest: Of the bundle.

    Raises:
        BundleError: It isn't what the manifest's graph takes and gives.
    """
    try:
        with np.load(data, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(
            f"{REFERENCE_FILE} can't be read ({error})",
            expected="an archive of numpy arrays",
            cure="export the bundle again",
        ) from error
    count = len(found["input"]) if "input" in found and found["input"].ndim else 0
    expected = {
        "input": ((count, *manifest.input.shape[1:]), (manifest.input.dtype,)),
        "kept": ((count, manifest.selection.dominant), ("int64",)),
        "scores": ((count, manifest.tower.grid[0] * manifest.tower.grid[1]), ("float32",)),
        "embeds": ((count, *manifest.embeds.shape[1:]), ("float32", "float16")),
    }
    for name, (shape, dtypes) in expected.items():
        got = found.get(name)
        if got is None or got.shape != shape or got.dtype.name not in dtypes or not count:
            shown = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
            raise BundleError(
                f"{REFERENCE_FILE} has {shown} for '{name}'",
                expected=f"{' or '.join(dtypes)} {[*shape]} of at least one picture",
                cure="export the bundle again",
            )
    return Reference(**{name: found[name] for name in KEYS})


def prove(
    run: Run,
    reference: Reference,
    manifest: Manifest,
    batches: Sequence[int],
    quantised: Quantised | None = None,
) -> Proof:
    """Run an engine on the reference pictures and judge what it gives.

    Args:
        run: Runs the engine on one batch of the graph's input.
        reference: The pictures and what is right.
        manifest: Of the bundle.
        batches: Batch sizes to run, such as the smallest and the largest that the engine takes:
            some miscompiles show in one of them alone.
        quantised: Which of the bundle's quantised graphs it was built from; None for its own.

    Returns:
        The numbers and the verdict. NaN and infinity fail.
    """
    gate = GATES[quantised or manifest.precision]
    images = len(reference.input)
    rows: list[tuple[int, Array, Array]] = []  # picture, embeds [K, L], kept [dominant]
    for size in batches:
        for start in range(0, images, size):
            # A batch that the pictures don't fill starts over with the first one.
            chosen = [number % images for number in range(start, start + size)]
            outputs = run(np.ascontiguousarray(reference.input[chosen]))
            rows.extend(zip(chosen, outputs[EMBEDS], outputs[KEPT], strict=True))
    judged = [_judge(row, reference, manifest, gate) for row in rows]
    dominant = manifest.selection.dominant
    swapped = sum(each.swapped for each in judged)
    beyond = sum(each.beyond for each in judged)
    cosines = np.concatenate([each.cosines for each in judged])
    contextual = np.concatenate([each.contextual for each in judged])
    numbers = {
        "kept_overlap": 1.0 - swapped / (dominant * len(rows)),
        "min_cosine": _finite(cosines.min(initial=1.0)),
        "mean_cosine": _finite(cosines.mean()) if len(cosines) else 0.0,
        "max_error": _finite(max(each.error for each in judged)),
        "contextual_cosine": _finite(contextual.mean()) if len(contextual) else 0.0,
    }
    finite = all(np.isfinite(each.error) for each in judged)
    passed = (
        finite
        and not beyond
        and numbers["kept_overlap"] >= gate.kept_overlap
        and len(cosines) > 0
        and numbers["min_cosine"] >= gate.cosine
        and numbers["max_error"] <= gate.error
        and len(contextual) > 0
        and numbers["contextual_cosine"] >= gate.contextual
    )
    return Proof(
        images=images,
        runs=len(rows),
        kept_swaps=swapped - beyond,
        kept_disagreements=beyond,
        contextual_compared=len(contextual),
        passed=bool(passed),
        **numbers,
    )


@dataclass(frozen=True)
class _Judged:
    """One result's numbers; see `Proof`."""

    swapped: int
    beyond: int
    cosines: NDArray[np.float64]
    contextual: NDArray[np.float64]
    error: float


def _judge(
    row: tuple[int, Array, Array], reference: Reference, manifest: Manifest, gate: Gate
) -> _Judged:
    image, embeds, kept = row
    right, scores = reference.kept[image], reference.scores[image].astype(np.float64)
    expected = reference.embeds[image].astype(np.float64)
    got = embeds.astype(np.float64)
    offset = int(manifest.tower.cls_token)
    patches = right[right >= offset] - offset
    cut = float(scores[patches].min()) if len(patches) else 0.0
    foreign = np.setdiff1d(kept, right)
    in_range = (foreign >= offset) & (foreign < manifest.tower.tokens)
    distance = np.abs(scores[foreign[in_range] - offset] - cut)
    # What is no patch at all is no matter of rounding, and neither is a duplicate.
    absent = len(kept) - len(np.unique(kept))
    beyond = int((~in_range).sum() + (distance > gate.margin * abs(cut)).sum()) + absent
    _, here, there = np.intersect1d(kept, right, return_indices=True)
    mine, same = _same_targets(kept, right, manifest)
    dominant = manifest.selection.dominant
    error = np.abs(got[here] - expected[there]).max(initial=0.0) / np.abs(expected).max()
    return _Judged(
        swapped=len(foreign) + absent,
        beyond=beyond,
        cosines=_cosines(got[here], expected[there]),
        contextual=_cosines(got[dominant + mine], expected[dominant + same]),
        error=float(error) if np.isfinite(got).all() else float("inf"),
    )


def _same_targets(kept: Array, right: Array, manifest: Manifest) -> tuple[Array, Array]:
    """Return the numbers of the merged tokens whose target is one token in both."""
    _, mine, same = np.intersect1d(
        _targets(kept, manifest), _targets(right, manifest), return_indices=True
    )
    return mine, same


def _targets(kept: Array, manifest: Manifest) -> Array:
    """Return the tower token that each merged token formed around: every step-th of the rest."""
    selection, tower = manifest.selection, manifest.tower
    taken = np.zeros(tower.tokens, bool)
    taken[kept[(kept >= 0) & (kept < tower.tokens)]] = True
    taken[0] |= tower.cls_token and not selection.cls_token
    rest = np.flatnonzero(~taken)
    step = max(1, len(rest) // selection.contextual)
    return rest[np.arange(selection.contextual) * step]


def _cosines(one: Array, other: Array) -> NDArray[np.float64]:
    """Return the cosine of each row [n, L] with its counterpart."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    with np.errstate(invalid="ignore"):
        cosines: NDArray[np.float64] = np.sum(one * other, axis=1) / np.maximum(lengths, 1e-300)
    return cosines


def _finite(value: Any) -> float:
    """Return a number that JSON can hold: what isn't finite becomes the worst there is."""
    number = float(value)
    return number if np.isfinite(number) else -1.0
