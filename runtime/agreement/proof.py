"""A run of an encoder beside the reference of its bundle, judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vzip.runtime.agreement.found import Array, Outputs, compare
from vzip.runtime.agreement.gates import Gate
from vzip.runtime.agreement.reference_file import Reference
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.wording import counted

Run = Callable[[Array], Outputs]


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
        median_error: Of the same tokens, the median of their errors.
        most_error: The error that 95 % of them keep to.
        tokens: How many tokens both keep.
        tokens_beyond: Those of them that differ by more than their floor allows; 0 where it isn't
            known what rounding alone costs them.
        on_average: Whether kept tokens are on average what they should be: where they aren't, it
            is no matter of rounding.
        objective: Of a greedy selection the lowest share that picks reach of what the reference's
            do; None, and not recorded, where it isn't known.
        short: What falls short of the gate, in words; recorded as one text, if anything does.
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
    median_error: float = 0.0
    most_error: float = 0.0
    tokens: int = 0
    tokens_beyond: int = 0
    on_average: bool = True
    objective: float | None = None
    short: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the gate was met."""
        return not self.short

    def to_json(self) -> dict[str, bool | int | float | str]:
        """Return the fields as the manifest holds them, and ``passed``."""
        numbers = asdict(self)
        del numbers["short"]
        if self.objective is None:
            del numbers["objective"]
        short = {} if self.passed else {"short": "; ".join(self.short)}
        return {**numbers, **short, "passed": self.passed}

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED ({'; '.join(self.short)})"
        reached = "" if self.objective is None else f"objective {self.objective:.4f}, "
        return (
            f"{verdict} on {counted(self.images, 'picture')} "
            f"({counted(self.runs, 'run')}): {reached}kept overlap {self.kept_overlap:.4f} "
            f"({counted(self.kept_swaps, 'swap')} by rounding, "
            f"{counted(self.kept_disagreements, 'disagreement')}), kept tokens: lowest cosine "
            f"{self.min_cosine:.6f}, mean {self.mean_cosine:.6f}, error {self.median_error:.1e} "
            f"(median), {self.most_error:.1e} (95 %), {self.max_error:.1e} (worst); merged "
            f"tokens: mean cosine {self.contextual_cosine:.6f} of "
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
        (reference.outputs(pictures, gate.precision) for pictures in chosen),
        (run(np.ascontiguousarray(reference.input[pictures])) for pictures in chosen),
        manifest,
    )
    kept, merged = agreement.kept, agreement.merged
    beside = gate.kept.beside
    return Proof(
        images=images,
        runs=len(agreement.overlaps),
        kept_overlap=agreement.mean_overlap,
        kept_swaps=agreement.chosen.within(gate.margin),
        kept_disagreements=agreement.chosen.beyond(gate.margin),
        min_cosine=kept.lowest,
        mean_cosine=kept.mean,
        max_error=_number(kept.error if agreement.finite else np.inf),
        contextual_compared=len(merged.cosines),
        contextual_cosine=merged.mean if len(merged.cosines) else 0.0,
        median_error=_number(kept.quantile(0.5)),
        most_error=_number(kept.quantile(0.95)),
        tokens=len(kept.cosines),
        tokens_beyond=(
            int(beside.beyond(kept).sum()) if beside is not None and kept.has_floor else 0
        ),
        objective=float(agreement.objectives.min()) if len(agreement.objectives) else None,
        short=gate.judge(agreement),
        on_average=gate.on_average(agreement),
    )


def _number(value: float) -> float:
    """Return a number that JSON can hold; −1 for infinity."""
    return float(value) if np.isfinite(value) else -1.0
