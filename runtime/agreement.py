"""Do two runs of an encoder agree? Said in one place, judged by one table of gates.

An encoder that rounds otherwise keeps other tokens where scores are close. So two things are judged
apart, and kept and merged tokens apart from each other:

* Which tokens are kept. A kept token that the reference doesn't keep is counted with the distance
  of its score from the last one kept: within a gate's margin it is a swap by rounding, beyond it a
  disagreement. Where merged tokens tell what went into them, their groups are judged likewise.
* What the tokens hold, row by row: those that both keep, and each merged token whose target is the
  same in both. Which tokens were merged into it can still differ by rounding.

A bundle's `reference.npz` holds what the untouched model says of a few pictures, so that an engine
is judged with numpy alone, where it was built.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.manifest import EMBEDS, KEPT, REFERENCE_FILE, Manifest
from vzip.runtime.bundle.precision_record import QUANTISED
from vzip.runtime.bundle.reader import npy_header
from vzip.runtime.errors import BundleError, InvalidInputError
from vzip.runtime.guard import guarded
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle

Array = NDArray[Any]
Outputs = Mapping[str, Array]
Run = Callable[[Array], Outputs]

SCORES: Final = "scores"
"""Beside a graph's outputs: float [b, N], one of each patch, by which the kept ones are chosen."""

_TINY: Final = float(np.finfo(np.float64).tiny)


# What was found


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices that were made, and those of them that differ from the reference's.

    Attributes:
        made: How many were made.
        distances: float64, one of each that differs: how far apart the two alternatives' numbers
            are. For kept tokens the score's distance from the last one kept, relative to that; for
            groups the cosine that is lost. Infinity where no number can excuse the choice.
    """

    made: int
    distances: NDArray[np.float64]

    @property
    def share(self) -> float:
        """Share of the choices that are the reference's."""
        return 1.0 - len(self.distances) / max(1, self.made)

    def beyond(self, margin: float) -> int:
        """Return how many differ by more than a margin."""
        return int((~(self.distances <= margin)).sum())

    def within(self, margin: float) -> int:
        """Return how many differ by a margin at most: swaps by rounding."""
        return len(self.distances) - self.beyond(margin)


@dataclass(frozen=True, eq=False)
class Values:
    """What tokens hold, beside the same tokens of the reference.

    Attributes:
        cosines: float64 [n], of each token with the reference's; −1 where a number isn't finite.
        error: The largest difference of a number, relative to the largest magnitude in all of the
            reference's tokens of the picture; infinity where a number isn't finite.
    """

    cosines: NDArray[np.float64]
    error: float

    @classmethod
    def of(cls, expected: Array, got: Array, scale: float) -> Values:
        """Compare tokens [n, L], row by row.

        Args:
            expected: The reference's.
            got: Those to judge.
            scale: The largest magnitude that `error` is relative to.
        """
        there, here = expected.astype(np.float64), got.astype(np.float64)
        lengths = np.linalg.norm(there, axis=1) * np.linalg.norm(here, axis=1)
        with np.errstate(invalid="ignore"):
            cosines = np.sum(there * here, axis=1) / np.maximum(lengths, _TINY)
            error = float(np.abs(here - there).max(initial=0.0)) / max(scale, _TINY)
        return cls(
            np.where(np.isfinite(cosines), cosines, -1.0),
            error if np.isfinite(error) else float("inf"),
        )

    @property
    def lowest(self) -> float:
        """The lowest cosine; −1 if there is none."""
        return float(self.cosines.min(initial=1.0)) if len(self.cosines) else -1.0

    @property
    def mean(self) -> float:
        """The mean cosine; −1 if there is none."""
        return float(self.cosines.mean()) if len(self.cosines) else -1.0


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far some results agree with a reference's.

    Attributes:
        overlaps: float64 [n], for each result the share of its kept tokens that the reference keeps
            too.
        chosen: The kept tokens of all results.
        kept: Tokens that both keep.
        merged: Merged tokens that can be compared.
        grouped: Which target each merged-away token went to; none made where that isn't known.
        finite: Whether all numbers of all tokens are.
    """

    overlaps: NDArray[np.float64]
    chosen: Choices
    kept: Values
    merged: Values
    grouped: Choices = field(default_factory=lambda: Choices(0, np.zeros(0)))
    finite: bool = True

    @classmethod
    def of_all(cls, each: Iterable[Agreement]) -> Agreement:
        """Return the agreement of all results that some agreements are of; at least one."""
        parts = list(each)

        def choices(name: str) -> Choices:
            found = [getattr(part, name) for part in parts]
            return Choices(
                sum(one.made for one in found), np.concatenate([one.distances for one in found])
            )

        def values(name: str) -> Values:
            found = [getattr(part, name) for part in parts]
            return Values(
                np.concatenate([one.cosines for one in found]), max(one.error for one in found)
            )

        return cls(
            np.concatenate([part.overlaps for part in parts]),
            choices("chosen"),
            values("kept"),
            values("merged"),
            choices("grouped"),
            all(part.finite for part in parts),
        )

    @property
    def every(self) -> Values:
        """All tokens that can be compared."""
        return Values(
            np.concatenate([self.kept.cosines, self.merged.cosines]),
            max(self.kept.error, self.merged.error),
        )

    @property
    def mean_overlap(self) -> float:
        """Mean share of the kept tokens that the reference keeps too."""
        return float(self.overlaps.mean())

    @property
    def min_overlap(self) -> float:
        """The same of the result where it is lowest."""
        return float(self.overlaps.min())

    def to_json(self) -> dict[str, int | float | None]:
        """Return what `vzip calibrate` records.

        Returns:
            ``images``, ``mean_overlap``, ``min_overlap``; ``mean_cosine`` and ``min_cosine`` of all
            tokens that can be compared; ``kept_cosine`` and ``merged_cosine``, means of those that
            both keep and of the merged ones (None if none can be compared), and
            ``merged_compared``, how many of these there are.
        """
        return {
            "images": len(self.overlaps),
            "mean_overlap": self.mean_overlap,
            "min_overlap": self.min_overlap,
            "mean_cosine": self.every.mean,
            "min_cosine": self.every.lowest,
            "kept_cosine": self.kept.mean,
            "merged_cosine": self.merged.mean if len(self.merged.cosines) else None,
            "merged_compared": len(self.merged.cosines),
        }


def compare(reference: Iterable[Outputs], got: Iterable[Outputs], manifest: Manifest) -> Agreement:
    """Compare the outputs of two runs, picture by picture.

    Args:
        reference: Batches of outputs: ``image_embeds`` [b, K, L], ``kept_indices`` [b, dominant],
            and `SCORES` where they are known. Without them no difference counts as rounding.
        got: Batches of another run's, of the same pictures.
        manifest: Of the bundle.
    """
    return Agreement.of_all(
        _compared(
            {name: array[row] for name, array in there.items()},
            {name: here[name][row] for name in (KEPT, EMBEDS)},
            manifest,
        )
        for there, here in zip(reference, got, strict=True)
        for row in range(len(there[KEPT]))
    )


def _compared(reference: Outputs, got: Outputs, manifest: Manifest) -> Agreement:
    """Compare one result: ``image_embeds`` [K, L] and ``kept_indices`` [dominant] of either."""
    right, expected, kept, embeds = reference[KEPT], reference[EMBEDS], got[KEPT], got[EMBEDS]
    dominant = manifest.selection.dominant
    scale = float(np.abs(expected).max())
    chosen = kept_choices(right, kept, reference.get(SCORES), manifest)
    _, there, here = np.intersect1d(right, kept, return_indices=True)
    _, same, mine = np.intersect1d(
        _targets(right, manifest), _targets(kept, manifest), return_indices=True
    )
    return Agreement(
        np.array([chosen.share]),
        chosen,
        Values.of(expected[there], embeds[here], scale),
        Values.of(expected[dominant + same], embeds[dominant + mine], scale),
        finite=bool(np.isfinite(embeds).all()),
    )


def kept_choices(right: Array, kept: Array, scores: Array | None, manifest: Manifest) -> Choices:
    """Compare which tokens are kept.

    Args:
        right: The reference's, int [dominant].
        kept: Those to judge, in any order.
        scores: Of each patch, float [N]; None where they aren't known.
        manifest: Of the bundle.
    """
    offset = int(manifest.tower.cls_token)
    foreign = np.setdiff1d(kept, right)
    distances = np.full(len(foreign), np.inf)
    patches = right[right >= offset] - offset
    if scores is not None and len(patches):
        wide = scores.astype(np.float64)
        cut = float(wide[patches].min())
        # What is no patch at all is no matter of rounding.
        inside = (foreign >= offset) & (foreign < manifest.tower.tokens)
        away = np.abs(wide[foreign[inside] - offset] - cut)
        with np.errstate(over="ignore"):
            distances[inside] = away / max(abs(cut), _TINY)
    doubled = len(kept) - len(np.unique(kept))  # nor is a duplicate
    return Choices(manifest.selection.dominant, np.append(distances, [np.inf] * doubled))


def _targets(kept: Array, manifest: Manifest) -> Array:
    """Return the tower token that each merged token formed around: every step-th of the rest."""
    selection, tower = manifest.selection, manifest.tower
    taken = np.zeros(tower.tokens, bool)
    # What is to be judged may name tokens that don't exist.
    taken[kept[(kept >= 0) & (kept < tower.tokens)]] = True
    taken[0] |= tower.cls_token and not selection.cls_token
    rest = np.flatnonzero(~taken)
    step = max(1, len(rest) // selection.contextual)
    return rest[np.arange(selection.contextual) * step]


# What is demanded


@dataclass(frozen=True)
class Limits:
    """What some tokens must reach; None demands nothing.

    Attributes:
        lowest: Smallest cosine of any of them.
        mean: Smallest mean of their cosines.
        error: Largest difference, relative to the largest magnitude.
    """

    lowest: float | None = None
    mean: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Gate:
    """What an agreement must reach; None demands nothing. Numbers that aren't finite always fail.

    Attributes:
        margin: Distance of two alternatives up to which a choice between them counts as rounding;
            see `Choices.distances`.
        disagreements: Largest share of choices beyond the margin, of kept tokens and of groups.
        overlap: Smallest mean share of kept tokens that the reference keeps too.
        kept: Of the tokens that both keep.
        merged: Of the merged ones that can be compared.
        every: Of both together.
    """

    margin: float = 0.0
    disagreements: float | None = None
    overlap: float | None = None
    kept: Limits = Limits()
    merged: Limits = Limits()
    every: Limits = Limits()

    def judge(self, agreement: Agreement) -> tuple[str, ...]:
        """Return what falls short, in words with the number and the limit; nothing if none does."""
        short = [] if agreement.finite else ["tokens hold NaN or infinity"]

        def at_least(what: str, got: float, limit: float | None) -> None:
            if limit is not None and not got >= limit:  # so that NaN falls short
                short.append(f"{what} {got:.6g}, expected at least {limit}")

        def at_most(what: str, got: float, limit: float | None) -> None:
            if limit is not None and not got <= limit:
                short.append(f"{what} {got:.3g}, expected at most {limit}")

        for what, choices in (("kept", agreement.chosen), ("group", agreement.grouped)):
            beyond = choices.beyond(self.margin)
            share = beyond / max(1, choices.made)
            at_most(f"share of {what} disagreements", share, self.disagreements)
        at_least("kept overlap", agreement.mean_overlap, self.overlap)
        for what, values, limits in (
            ("kept tokens", agreement.kept, self.kept),
            ("merged tokens", agreement.merged, self.merged),
            ("tokens", agreement.every, self.every),
        ):
            at_least(f"lowest cosine of {what}", values.lowest, limits.lowest)
            at_least(f"mean cosine of {what}", values.mean, limits.mean)
            at_most(f"largest error of {what}", values.error, limits.error)
        return tuple(short)


# Every gate of vzip: who is judged, by which numbers, and why these.

GRAPH: Final[Mapping[str, Gate]] = {
    # An exported graph beside the untouched model, on the CPU; values by the graph's own choices,
    # those of merged tokens too. FP32 sums in another order, nothing else: right graphs of the
    # tests differ by less than 1e-5, and a single value that is 1e-3 off must not pass.
    "fp32": Gate(margin=1e-5, disagreements=0.0, every=Limits(lowest=0.99999, error=1e-4)),
    # FP16 moves scores by about 1e-3, and random weights crowd them; values stay close.
    "fp16": Gate(margin=1e-5, disagreements=0.1, every=Limits(lowest=0.999, error=2e-2)),
}

_QUANTISED: Final = Gate(
    # Wide enough for the rounding of eight bits, and too narrow for engines known to be wrong,
    # whose cosines were .14 to .65.
    margin=0.5,
    disagreements=0.0,
    overlap=0.85,
    kept=Limits(lowest=0.9, error=0.3),
    merged=Limits(mean=0.95),
)

ENGINE: Final[Mapping[str, Gate]] = {
    # An engine beside `reference.npz`, by the precision of the graph it was built from. It fuses
    # and orders sums as it likes, so the gate is wider than a graph's. Which tokens went into a
    # merged one can't be seen: rounding may decide it, so merged tokens are judged by their mean.
    "fp32": Gate(
        margin=1e-3,
        disagreements=0.0,
        overlap=0.99,
        kept=Limits(lowest=0.9999, error=1e-3),
        merged=Limits(mean=0.999),
    ),
    # FP16 moves scores by about a hundredth at worst. Right engines had cosines of .9997 on
    # average, wrong ones .14 to .65 (TensorRT-LLM issue 3223).
    "fp16": Gate(
        margin=5e-2,
        disagreements=0.0,
        overlap=0.85,
        kept=Limits(lowest=0.99, error=0.1),
        merged=Limits(mean=0.98),
    ),
    **dict.fromkeys(QUANTISED, _QUANTISED),
}

CPU_FORM: Final = Gate(
    # A form of the graph that is made for a CPU, beside `reference.npz`. Nobody asked for its
    # precision, so it must lose less than a graph that a user had quantised, and it must merge the
    # same: an INT8 encoder can keep the same tokens and have a cosine of .56 in the merged ones
    # (OpenVINO's, in the README). Scores say nothing more than the overlap does.
    overlap=0.95,
    kept=Limits(lowest=0.99),
    merged=Limits(mean=0.99),
)

COARSER_PEER: Final = replace(
    # An encoder in a benchmark that is coarser than the bundle's own graph. Its merged tokens are
    # shown and not judged: where keys are much alike, rounding decides into which a token goes.
    _QUANTISED,
    merged=Limits(),
)

UNCOMPRESSED_PEER: Final[Mapping[str, Gate]] = {
    # An encoder in a benchmark that gives every patch: nothing was chosen, so the tokens that the
    # reference keeps are compared, by an engine's limit.
    precision: Gate(kept=Limits(lowest=gate.kept.lowest))
    for precision, gate in {**ENGINE, "bf16": _QUANTISED}.items()
}

CALIBRATED: Final = Gate(
    # A calibrated graph beside the bundle's own on images held apart: the defaults of
    # --min-agreement and --min-cosine. Calibration leaves as many layers as it takes in high
    # precision, so the limits are near to 1 (benchmarks/results/quantization.md).
    overlap=0.95,
    every=Limits(mean=0.995),
)

LLM_LOGITS: Final[Mapping[str, Limits]] = {
    # An exported LLM beside the untouched one: the error of its logits, and the logit that another
    # choice of token loses, relative to the largest logit. What differs is rounding alone.
    "fp32": Limits(error=1e-4),
    "fp16": Limits(error=2e-2),
}


def missed_limits(parity: Mapping[str, object], manifest: Manifest) -> dict[str, str]:
    """Return which numbers of a manifest's ``parity`` miss its gate, each with its limit in words.

    Args:
        parity: As `vzip check` records it; numbers that it lacks miss nothing.
        manifest: Of the bundle.
    """
    gate, selection = GRAPH[manifest.precision], manifest.selection
    images = _number(parity, "images") or 1
    merged = manifest.tower.tokens - selection.tokens
    found = {}
    for name, limit, made in (
        ("kept_disagreements", gate.disagreements, selection.dominant),
        ("group_disagreements", gate.disagreements, merged),
    ):
        value = _number(parity, name)
        if value is not None and limit is not None and value > limit * images * max(1, made):
            found[name] = f"expected at most {limit * images * made:.6g}"
    lowest, error = _number(parity, "min_cosine"), _number(parity, "max_error")
    if lowest is not None and gate.every.lowest is not None and not lowest >= gate.every.lowest:
        found["min_cosine"] = f"expected at least {gate.every.lowest}"
    # −1 stands for what isn't finite.
    if error is not None and gate.every.error is not None and not 0 <= error <= gate.every.error:
        found["max_error"] = f"expected at most {gate.every.error}"
    return found


def missed_shown(parity: Mapping[str, object], manifest: Manifest) -> str:
    """Return what `missed_limits` finds, in words: each number and its limit."""
    missed = missed_limits(parity, manifest)
    return "; ".join(
        f"{name.replace('_', ' ')} {_number(parity, name):.6g}, {limit}"
        for name, limit in missed.items()
    )


def _number(parity: Mapping[str, object], name: str) -> float | None:
    value = parity.get(name)
    return float(value) if isinstance(value, (int, float)) else None


# A run beside the reference of its bundle


@dataclass(frozen=True)
class Reference:
    """What the untouched model says of n pictures: the content of `reference.npz`.

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

    def outputs(self, pictures: Sequence[int]) -> Outputs:
        """Return what is right for some of the pictures, for `compare`."""
        chosen = list(pictures)
        return {
            EMBEDS: self.embeds[chosen],
            KEPT: self.kept[chosen],
            SCORES: self.scores[chosen],
        }


@dataclass(frozen=True)
class Proof:
    """What was measured of a run; the ``proof`` of an engine's record.

    Attributes:
        images: How many pictures.
        runs: How many results were judged: each picture, in each batch size that was run.
        kept_overlap: Mean share of kept tokens that the reference keeps too.
        kept_swaps: Kept tokens that differ within the margin.
        kept_disagreements: Kept tokens that differ beyond it.
        min_cosine: Of any token that both keep; −1 if there is none, or one that isn't finite.
        mean_cosine: Of all of these.
        max_error: Largest difference in these, relative to the reference's largest magnitude; −1
            if one isn't finite.
        contextual_compared: Merged tokens with the same target in both.
        contextual_cosine: Mean cosine of these; 0 if there are none.
        short: What falls short of the gate, in words; not recorded.
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
    short: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the gate was met."""
        return not self.short

    def to_json(self) -> dict[str, bool | int | float | str]:
        """Return the fields as the manifest holds them, and ``passed``."""
        numbers = asdict(self)
        del numbers["short"]
        return {**numbers, "passed": self.passed}

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED ({'; '.join(self.short)})"
        return (
            f"{verdict} on {counted(self.images, 'picture')} "
            f"({counted(self.runs, 'run')}): kept overlap {self.kept_overlap:.4f} "
            f"({counted(self.kept_swaps, 'swap')} by rounding, "
            f"{counted(self.kept_disagreements, 'disagreement')}), kept tokens: lowest cosine "
            f"{self.min_cosine:.6f}, mean {self.mean_cosine:.6f}, largest error "
            f"{self.max_error:.1e}; merged tokens: mean cosine {self.contextual_cosine:.6f} of "
            f"{self.contextual_compared}"
        )


def prove(
    run: Run, reference: Reference, manifest: Manifest, batches: Sequence[int], gate: Gate
) -> Proof:
    """Run an encoder on the reference pictures and judge what it gives.

    Args:
        run: Runs it on one batch of the graph's input.
        reference: The pictures and what is right.
        manifest: Of the bundle.
        batches: Batch sizes to run, such as the smallest and the largest that an engine takes: some
            miscompiles show in one of them alone.
        gate: What must be reached.

    Returns:
        The numbers and the verdict.
    """
    images = len(reference.input)
    # A batch that the pictures don't fill starts over with the first one.
    chosen = [
        [number % images for number in range(start, start + size)]
        for size in batches
        for start in range(0, images, size)
    ]
    agreement = compare(
        (reference.outputs(pictures) for pictures in chosen),
        (run(np.ascontiguousarray(reference.input[pictures])) for pictures in chosen),
        manifest,
    )
    kept, merged = agreement.kept, agreement.merged
    error = kept.error if agreement.finite else float("inf")
    return Proof(
        images=images,
        runs=len(agreement.overlaps),
        kept_overlap=agreement.mean_overlap,
        kept_swaps=agreement.chosen.within(gate.margin),
        kept_disagreements=agreement.chosen.beyond(gate.margin),
        min_cosine=kept.lowest,
        mean_cosine=kept.mean,
        max_error=error if np.isfinite(error) else -1.0,  # a number that JSON can hold
        contextual_compared=len(merged.cosines),
        contextual_cosine=merged.mean if len(merged.cosines) else 0.0,
        short=gate.judge(agreement),
    )


def load_reference(bundle: Bundle) -> Reference:
    """Read a bundle's `reference.npz`, after checking its digest.

    Raises:
        InvalidInputError: The bundle was exported without it.
        BundleError: It is damaged, or not what the graph takes and gives.
    """
    if REFERENCE_FILE not in bundle.manifest.files:
        raise InvalidInputError(
            f"{bundle.path} has no {REFERENCE_FILE}",
            expected="the untouched model's tokens to compare with",
            cause="it was exported with --no-check",
            cure="export it again without --no-check",
        )
    with bundle.open_file(REFERENCE_FILE) as file:
        return read_reference(file, bundle.manifest)


def read_reference(data: Any, manifest: Manifest) -> Reference:
    """Read the content of `reference.npz`, whose digest was already checked.

    Args:
        data: The file, open for reading in binary.
        manifest: Of the bundle.

    Raises:
        BundleError: It isn't what the manifest's graph takes and gives.
    """
    with (
        guarded(
            BundleError,
            f"{REFERENCE_FILE} can't be read",
            expected="an archive of numpy arrays",
            cure="export the bundle again",
        ),
        zipfile.ZipFile(data) as archive,
    ):
        found = _arrays(archive, data, manifest)
    return Reference(**found)


def _arrays(archive: zipfile.ZipFile, data: Any, manifest: Manifest) -> dict[str, Array]:
    """Return the arrays of `reference.npz`, each checked before memory is taken for it."""
    members = {each.filename: each for each in archive.infolist()}
    room = data.seek(0, os.SEEK_END)
    headers: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {}
    for name in ("input", "kept", "scores", "embeds"):
        member = members.get(f"{name}.npy")
        if member is None:
            continue
        with archive.open(member) as file:
            shape, dtype = npy_header(file, f"{REFERENCE_FILE}: '{name}'", "an array")  # type: ignore[arg-type]
            begin = file.tell()
        # vzip packs nothing; an array that is packed may be of any size.
        size = math.prod(shape) * dtype.itemsize
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or begin + size != member.file_size or member.file_size > room:
            raise BundleError(
                f"{REFERENCE_FILE} has {member.file_size} {'packed ' * packed}bytes for '{name}', "
                f"{dtype} {list(shape)}",
                expected="the bytes of the array as they are",
                cause="it was made by another tool",
                cure="export the bundle again",
            )
        headers[name] = shape, dtype, begin
    count = headers["input"][0][0] if "input" in headers and headers["input"][0] else 0
    expected: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
        "input": ((count, *manifest.input.shape[1:]), (manifest.input.dtype,)),
        "kept": ((count, manifest.selection.dominant), ("int64",)),
        "scores": ((count, manifest.tower.grid[0] * manifest.tower.grid[1]), ("float32",)),
        "embeds": ((count, *manifest.embeds.shape[1:]), ("float32", "float16")),
    }
    found = {}
    for name, (wanted, dtypes) in expected.items():
        got = headers.get(name)
        if got is None or got[0] != wanted or got[1].name not in dtypes or not count:
            shown = "nothing" if got is None else f"{got[1]} {list(got[0])}"
            raise BundleError(
                f"{REFERENCE_FILE} has {shown} for '{name}'",
                expected=f"{' or '.join(dtypes)} {[*wanted]} of at least one picture",
                cure="export the bundle again",
            )
        shape, dtype, begin = got
        with archive.open(f"{name}.npy") as file:
            file.seek(begin)
            array = np.empty(shape, dtype)
            array.reshape(-1).view(np.uint8)[:] = np.frombuffer(file.read(), np.uint8)
        found[name] = array
    return found
