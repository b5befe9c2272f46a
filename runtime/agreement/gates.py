"""What is demanded: every gate of vzip, who is judged by it, and why its numbers are these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from vzip.runtime.agreement.floor import Beside
from vzip.runtime.agreement.found import Agreement, Values
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.precision_record import QUANTISED


@dataclass(frozen=True)
class Limits:
    """What some tokens must reach; None demands nothing.

    Attributes:
        lowest: Smallest cosine of any of them, or of a share of them.
        mean: Smallest mean of their cosines.
        error: Largest difference, relative to the largest magnitude.
        of: The share of the tokens, the best ones, that `lowest` and `error` are asked of.
        beside: What stands in the place of `lowest` and `error` where it is known of every token
            what rounding alone costs it.
    """

    lowest: float | None = None
    mean: float | None = None
    error: float | None = None
    of: float = 1.0
    beside: Beside | None = None

    def judge(self, what: str, values: Values) -> list[str]:
        """Return what falls short, in words; nothing if nothing does."""
        short = []

        def at_least(name: str, got: float, limit: float | None) -> None:
            if limit is not None and not got >= limit:  # so that NaN falls short
                short.append(f"{name} cosine of {what} {got:.6g}, expected at least {limit}")

        at_least("mean", values.mean, self.mean)
        if self.beside is not None and values.has_floor:
            return short + self.beside.judge(what, values)
        if self.of < 1.0 and len(values.cosines):
            what = f"{self.of:.0%} of {what}"
        at_least("lowest", values.lowest_of(self.of), self.lowest)
        error = values.quantile(self.of)
        if self.error is not None and not error <= self.error:
            short.append(f"largest error of {what} {error:.3g}, expected at most {self.error}")
        return short


OBJECTIVE: Final = 0.99
"""Rounding turns greedy picks into others of equal worth: INT8 towers of the demo change 9 to 16 %
of them, and at most .001 of the accuracy."""


@dataclass(frozen=True)
class Gate:
    """What an agreement must reach; None demands nothing. Numbers that aren't finite always fail.

    Attributes:
        margin: Distance of two alternatives up to which a choice between them counts as rounding;
            see `Choices.distances`.
        disagreements: Largest share of choices beyond the margin, of kept tokens and of groups.
        overlap: Smallest mean share of kept tokens that the reference keeps too.
        objective: Smallest share that the picks of a greedy selection reach, of any result, of what
            the reference's do; where that is known it stands in the place of `overlap`.
        kept: Of the tokens that both keep.
        merged: Of the merged ones that can be compared.
        every: Of both together.
        precision: Beside whose rounding tokens are judged, for `Limits.beside`.
    """

    margin: float = 0.0
    disagreements: float | None = None
    overlap: float | None = None
    objective: float = OBJECTIVE
    kept: Limits = Limits()
    merged: Limits = Limits()
    every: Limits = Limits()
    precision: str | None = None

    def judge(self, agreement: Agreement) -> tuple[str, ...]:
        """Return what falls short, in words with the number and the limit; nothing if none does."""
        short = [] if agreement.finite else ["tokens hold NaN or infinity"]

        for what, choices in (("kept", agreement.chosen), ("group", agreement.grouped)):
            share = choices.beyond(self.margin) / max(1, choices.made)
            if self.disagreements is not None and not share <= self.disagreements:
                short.append(
                    f"share of {what} disagreements {share:.3g}, "
                    f"expected at most {self.disagreements}"
                )
        if len(agreement.objectives):
            reached = float(agreement.objectives.min())
            if not reached >= self.objective:
                short.append(
                    f"share of the objective {reached:.6g}, expected at least {self.objective}"
                )
        elif self.overlap is not None and not agreement.mean_overlap >= self.overlap:
            short.append(
                f"kept overlap {agreement.mean_overlap:.6g}, expected at least {self.overlap}"
            )
        short += self.kept.judge("kept tokens", agreement.kept)
        if agreement.merges:
            short += self.merged.judge("merged tokens", agreement.merged)
        short += self.every.judge("tokens", agreement.every)
        return tuple(short)

    def on_average(self, agreement: Agreement) -> bool:
        """Return whether kept tokens, or all, are on average what they should be, and numbers."""
        return agreement.finite and all(
            limits.mean is None or values.mean >= limits.mean
            for limits, values in ((self.kept, agreement.kept), (self.every, agreement.every))
        )


# Every gate of vzip: who is judged, by which numbers, and why these.

GRAPH: Final[Mapping[str, Gate]] = {
    # An exported graph beside the untouched model, on the CPU; values by the graph's own choices,
    # those of merged tokens too. FP32 sums in another order, nothing else. Right graphs have the
    # floor's quantiles within a factor of 1.5 and no token beyond twice the larger of 1e-4 and its
    # floor; a single value that is 1e-3 off must not pass. `lowest` and `error` are for a model
    # whose floor nobody measured.
    "fp32": Gate(
        precision="fp32",
        margin=1e-5,
        disagreements=0.0,
        every=Limits(
            lowest=0.99999,
            error=1e-4,
            # CLIP-B/16's right graph at 384 px has 1.0e-5 where the model's own FP32 has 2.2e-6;
            # graphs that are wrong in one place have 5e-4 and more there, 2e-4 in the median.
            beside=Beside(times=4, error=1e-4, turned=1e-5, median=1e-6, most=3e-5),
        ),
    ),
    # In true half precision. It moves scores by up to a hundredth, and those of unsteady tokens by
    # more: of CLIP-B/16's own model in FP16 one kept token of 432 lies .13 beyond the cut, and one
    # group of 1064 loses .05 of its cosine. transformers' own FP16, with FP32 residuals or FP16
    # accumulators, has up to 2.7 times the floor's median (benchmarks/token_errors.py).
    "fp16": Gate(
        precision="fp16",
        margin=5e-2,
        disagreements=0.02,
        every=Limits(
            lowest=0.999,
            mean=0.999,
            error=2e-2,
            beside=Beside(times=4, error=2e-2, turned=1e-3, median=1e-4, most=4e-4),
        ),
    ),
}

_QUANTISED: Final = Gate(
    # Wide enough for the rounding of eight bits, and too narrow for engines known to be wrong,
    # whose cosines were .14 to .65. On trained towers no single token or choice can be asked for:
    # CLIP-B/16's own BF16 has tokens with a cosine of .49 and scores that move by .7, and is .997
    # on average. So the mean is, which nothing asked for before, and 95 % of the tokens are.
    margin=0.5,
    disagreements=0.02,
    overlap=0.85,
    kept=Limits(lowest=0.9, mean=0.97, error=0.3, of=0.95),
    merged=Limits(mean=0.95),
)

ENGINE: Final[Mapping[str, Gate]] = {
    # An engine beside `reference.npz`, by the precision of the graph it was built from. It fuses
    # and orders sums as it likes, so the gate is wider than a graph's. Which tokens went into a
    # merged one can't be seen: rounding may decide it, so merged tokens are judged by their mean.
    "fp32": Gate(
        precision="fp32",
        margin=1e-3,
        disagreements=0.0,
        overlap=0.99,
        kept=Limits(
            lowest=0.9999,
            mean=0.9999,
            error=1e-3,
            # GPUs take fast forms of exp, tanh and division, which err by about 1e-6 each.
            beside=Beside(times=8, error=1e-3, turned=1e-4, median=2e-5, most=1e-4),
        ),
        merged=Limits(mean=0.999),
    ),
    # FP16 moves scores by about a hundredth, and few by more, as above. Right engines had cosines
    # of .9997 on average, wrong ones .14 to .65 (TensorRT-LLM issue 3223). Beside the floor: 8 is
    # three times what FP16 accumulators, which TensorRT may take, cost.
    "fp16": Gate(
        precision="fp16",
        margin=5e-2,
        disagreements=0.02,
        overlap=0.85,
        kept=Limits(
            lowest=0.99,
            mean=0.999,
            error=0.1,
            beside=Beside(times=8, error=5e-2, turned=1e-2, median=1e-3, most=4e-3),
        ),
        merged=Limits(mean=0.98),
    ),
    **dict.fromkeys(QUANTISED, _QUANTISED),
}

CPU_FORM: Final = Gate(
    # A form of the graph that is made for a CPU, beside `reference.npz`. Nobody asked for its
    # precision, so it must lose less than a graph that a user had quantised, and it must merge the
    # same: an INT8 encoder can keep the same tokens and have a cosine of .56 in the merged ones
    # (OpenVINO's, in the README). Of trained towers one token in a thousand is far off where the
    # mean is .998, in BF16 too, and a merged one goes to .97 with one token more or less in it: so
    # means are judged. Scores say nothing more than the overlap does.
    overlap=0.95,
    kept=Limits(lowest=0.8, mean=0.995),
    merged=Limits(mean=0.955),  # of a few dozen: .970 where six times as many have .981
)

CPU_FORM_VARIED: Final = replace(
    # The same beside the bundle's own graph, on six times as many pictures, whose mean says more.
    CPU_FORM,
    overlap=0.965,
    merged=Limits(mean=0.97),
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
    precision: Gate(kept=Limits(lowest=gate.kept.lowest, mean=gate.kept.mean, of=0.95))
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
    objective = _number(parity, "objective")
    if objective is not None and not objective >= gate.objective:
        found["objective"] = f"expected at least {gate.objective}"
    limits = gate.every
    if (beyond := _number(parity, "tokens_beyond")) is None or limits.beside is None:
        # As before it was measured what rounding alone costs.
        lowest, error = _number(parity, "min_cosine"), _number(parity, "max_error")
        if lowest is not None and limits.lowest is not None and not lowest >= limits.lowest:
            found["min_cosine"] = f"expected at least {limits.lowest}"
        # −1 stands for what isn't finite.
        if error is not None and limits.error is not None and not 0 <= error <= limits.error:
            found["max_error"] = f"expected at most {limits.error}"
        return found
    if beyond > 0:
        found["tokens_beyond"] = "expected 0"
    mean = _number(parity, "mean_cosine")
    if mean is not None and limits.mean is not None and not mean >= limits.mean:
        found["mean_cosine"] = f"expected at least {limits.mean}"
    for name, free in (
        ("median_error", limits.beside.median),
        ("most_error", limits.beside.most),
    ):
        got, floor = _number(parity, name), _number(parity, f"floor_{name}")
        if got is not None and floor is not None:
            limit = max(free, limits.beside.times * floor)
            if not 0 <= got <= limit:
                found[name] = f"expected at most {limit:.3g}"
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
