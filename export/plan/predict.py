"""What a model would cost on a device, predicted: encoder, prefill, answer and memory per budget.

A prediction is work over speed. Time of the encoder and of the prefill is that of their arithmetic
at the device's ceiling, or that of reading the weights once, whichever is longer; a token of the
answer takes as long as reading all weights and the cache. Of each ceiling a share is taken to be
reached, and each kernel takes a moment to start (`Pace`). An LLM program's own overhead, such as
Python between kernels, is not in it. Nothing here measures or imports anything heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from vzip.export.hardware import Device
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.export.algorithm.budget import Budget
    from vzip.export.plan.model import PlanModel

Weights = Literal["fp16", "int8", "int4"]

# Bits of a number with its part of a scale: 32 numbers share a 16-bit one, as in llama.cpp's Q8_0
# and Q4_0. Arithmetic is in 16 bits with all of them.
BITS: Final[dict[Weights, float]] = {"fp16": 16, "int8": 8.5, "int4": 4.5}

_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Pace:
    """What share of its ceilings a device is taken to reach, and what comes on top.

    Attributes:
        encoder: Of its arithmetic, by the encoder.
        prefill: Of its arithmetic, by the LLM's prefill.
        reading: Of its memory's bandwidth, by reading weights.
        start_us: Of each kernel that waits for the one before, microseconds.
    """

    encoder: float
    prefill: float
    reading: float
    start_us: float


# encoder [E]: an engine at 70 % of what matrix products alone reach (what issue 7 asks for), these
# at 70 % of the data sheet. prefill: the paper's 218 ms for LLaVA-NeXT-7B with 2880 tokens are 0.63
# of an A800's 312 TFLOPS. reading: NVIDIA's 19.1 tokens a second of Llama-3.1-8B in 4 bits on an
# Orin Nano (its blog on the Super mode) are 0.8 of 102 GB/s. start [E]: within a CUDA graph.
ON_GPU: Final = Pace(encoder=0.5, prefill=0.6, reading=0.8, start_us=3)
# encoder: issue 7's 0.98 s of matrix products against 1.22 s of ONNX Runtime in FP32. The others
# [E]: ceilings of the CPU are measured at the shapes that count, and little lies between.
ON_CPU: Final = Pace(encoder=0.8, prefill=0.8, reading=0.9, start_us=5)

_KERNELS: Final = 8  # [E] of a layer: two norms, four products, attention, activation


@dataclass(frozen=True)
class PlanLimits:
    """What a budget must meet; None where nothing is asked.

    Attributes:
        latency_ms: Of the encoder, from the tower's input to tokens.
        ttft_ms: Of the encoder and the prefill, to the first token of the answer.
        memory_gb: Of the weights and the cache, 10⁹ bytes.

    Raises:
        InvalidInputError: A value isn't above 0.
    """

    latency_ms: float | None = None
    ttft_ms: float | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                option = "--max-" + name.replace("_", "-")
                raise InvalidInputError(
                    f"got {option} {value:g}",
                    expected="a number above 0",
                )

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return any(value is not None for value in vars(self).values())


@dataclass(frozen=True)
class Prediction:
    """What one budget costs.

    Attributes:
        tokens: K, of an image, a tile or a frame.
        budget: Dominant + contextual, in words; None for all tokens, without VisionZip.
        llm_tokens: n, text and image together.
        encoder_ms: From the tower's input to tokens, all tiles or frames.
        prefill_ms: Of the LLM.
        tokens_per_second: Of the answer, at its beginning.
        kv_bytes: Of the cache with n tokens.
        memory_bytes: Weights of both, and the cache.
        cost_share: T(4nd² + 2n²d + 2ndm), as a share of that of all tokens.
    """

    tokens: int
    budget: str | None
    llm_tokens: int
    encoder_ms: float
    prefill_ms: float
    tokens_per_second: float
    kv_bytes: int
    memory_bytes: int
    cost_share: float

    @property
    def ttft_ms(self) -> float:
        """Until the first token of the answer; preprocessing is not in it."""
        return self.encoder_ms + self.prefill_ms


@dataclass(frozen=True)
class Estimator:
    """A model on a device.

    Attributes:
        model: The model.
        device: The device.
        weights: What the LLM's weights are stored in.
        text_tokens: Tokens of the text around the image.
    """

    model: PlanModel
    device: Device
    weights: Weights
    text_tokens: int

    @property
    def precision(self) -> str:
        """What the encoder runs in: FP16, as `--target` exports, and FP32 on a CPU."""
        return "fp32" if self.device.target is None else "fp16"

    @property
    def pace(self) -> Pace:
        """What is taken to be reached."""
        return ON_CPU if self.device.target is None else ON_GPU

    @property
    def weight_bytes(self) -> float:
        """What the LLM's weights take."""
        return self.model.llm_parameters * BITS[self.weights] / 8

    @property
    def vision_bytes(self) -> int:
        """What the encoder's weights take."""
        return self.model.vision_parameters * _BYTES[self.precision]

    @property
    def weights_ms(self) -> float:
        """What reading the LLM's weights once takes: no prefill and no token is faster."""
        return self._reading_ms(self.model.read_parameters * BITS[self.weights] / 8)

    def encoder_ms(self, tokens: int, precision: str) -> float:
        """Return the encoder's time in a precision of the device.

        INT8 is that of the linear layers: attention stays in 16 bits, as `vzip calibrate` has it.
        """
        linear, attention = self.model.vision_flops(tokens)
        inner = self.device.half if precision == "int8" else precision
        speed = self.device.tflops
        arithmetic = linear / speed[precision] + attention / speed[inner]  # 10⁻¹² s
        size = self.model.vision_parameters * _BYTES[precision]
        starts = self._starts_ms(self.model.vision.layers_run)
        return starts + max(arithmetic / 1e9 / self.pace.encoder, self._reading_ms(size))

    def predict(self, tokens: int) -> Prediction:
        """Return what K tokens cost; as many as there are patches means all, without VisionZip.

        Raises:
            BudgetError: The budget doesn't fit the tower.
        """
        model, everything = self.model, self.model.patches
        n = model.llm_tokens(tokens, self.text_tokens)
        kv = model.llm.kv_bytes(n)
        arithmetic = model.prefill_flops(n) / self.device.tflops[self.device.half] / 1e9
        starts = self._starts_ms(model.llm.layers)
        whole = model.llm.prefill_flops(model.llm_tokens(everything, self.text_tokens))
        return Prediction(
            tokens=tokens,
            budget=None if tokens == everything else _split(model.budget(tokens)),
            llm_tokens=n,
            encoder_ms=self.encoder_ms(tokens, self.precision),
            prefill_ms=starts + max(arithmetic / self.pace.prefill, self.weights_ms),
            tokens_per_second=1000 / (starts + self.weights_ms + self._reading_ms(kv)),
            kv_bytes=kv,
            memory_bytes=round(self.weight_bytes) + self.vision_bytes + kv,
            cost_share=model.llm.prefill_flops(n) / whole,
        )

    def fits(self, row: Prediction) -> bool:
        """Say whether the device has the memory."""
        return row.memory_bytes <= self.device.usable_gb * 1e9

    def _reading_ms(self, size: float) -> float:
        return size / self.device.bandwidth_gb / 1e6 / self.pace.reading

    def _starts_ms(self, layers: int) -> float:
        return layers * _KERNELS * self.pace.start_us / 1000


@dataclass(frozen=True)
class Fitting:
    """What follows from limits and the device's memory.

    Attributes:
        met: Whether a budget meets them.
        row: The largest that does; where none does, the smallest there is, which comes nearest.
        text: The same in a sentence.
    """

    met: bool
    row: Prediction
    text: str


def advise(plan: Estimator, limits: PlanLimits) -> Fitting:
    """Return the largest budget that meets the limits and fits the device.

    The more tokens the more is kept, and everything here costs more with more of them: so nothing
    comes nearer to a limit than the smallest budget, two tokens.
    """
    everything = plan.predict(plan.model.patches)
    if _meets(plan, limits, everything):
        return Fitting(
            True, everything, f"{counted(everything.tokens, 'token')}, all of them, {_said(limits)}"
        )
    low, high = 2, plan.model.largest_budget
    row = plan.predict(low)
    if not _meets(plan, limits, row):
        return Fitting(False, row, _nearest(plan, limits, row))
    while low < high:  # cost grows with the budget
        middle = (low + high + 1) // 2
        if _meets(plan, limits, plan.predict(middle)):
            low = middle
        else:
            high = middle - 1
    row = plan.predict(low)
    assert row.budget is not None
    text = f"{_named(plan, row)} ({row.budget}), the most that {_said(limits)}"
    if row.tokens < min(plan.model.budgets):
        text += "; the paper tried none so small: see what it keeps with 'vzip sweep'"
    return Fitting(True, row, text)


def _meets(plan: Estimator, limits: PlanLimits, row: Prediction) -> bool:
    return plan.fits(row) and not any(value > limit for _, limit, value in _judged(limits, row))


def _judged(limits: PlanLimits, row: Prediction) -> Iterator[tuple[str, float, float]]:
    """Yield text, limit and value of each limit there is."""
    values = (row.encoder_ms, row.ttft_ms, row.memory_bytes / 1e9)
    for (name, limit), value in zip(vars(limits).items(), values, strict=True):
        if limit is not None:
            yield _TEXTS[name], limit, value


_TEXTS: Final = {
    "latency_ms": "an encoder latency of {} ms",
    "ttft_ms": "a first token after {} ms",
    "memory_gb": "a memory of {} GB",
}


def _said(limits: PlanLimits) -> str:
    """Return what a budget does that meets the limits."""
    asked = {name: limit for name, limit in vars(limits).items() if limit is not None}
    parts = [_TEXTS[name].format(f"at most {limit:g}") for name, limit in asked.items()]
    return f"have {' and '.join(parts)}" if parts else "fit the device"


def _nearest(plan: Estimator, limits: PlanLimits, row: Prediction) -> str:
    """Return why no budget will do, what is nearest, and what would help."""
    missed = [each for each in _judged(limits, row) if each[2] > each[1]]
    wanted = " and ".join(text.format(f"at most {limit:g}") for text, limit, _ in missed)
    found = " and ".join(text.format(short(value)) for text, _, value in missed)
    device, nearest = plan.device, f"nearest is the smallest, {_named(plan, row)}"
    if not plan.fits(row):
        said = (
            f"{plan.model.name} doesn't fit {device.name}, which has {device.usable_gb:.1f} of its "
            f"{device.memory_gb:.3g} GB to give; {nearest}: {gb(row.memory_bytes)} GB, "
            f"{gb(plan.weight_bytes)} of them the LLM's weights in {plan.weights}"
        )
    else:
        parts = (
            f"encoder {short(row.encoder_ms)} ms, prefill {short(row.prefill_ms)} ms, the LLM's "
            f"weights {gb(plan.weight_bytes)} GB in {plan.weights}"
        )
        said = f"no budget has {wanted}; {nearest}, with {found} ({parts})"
    return f"{said}; {_cure(plan, limits)}"


def _cure(plan: Estimator, limits: PlanLimits) -> str:
    """Return what to change: to the most precise weights with which a budget will do, if any."""
    for weights, bits in BITS.items():
        other = replace(plan, weights=weights)
        if bits < BITS[plan.weights] and _meets(other, limits, other.predict(2)):
            return f"with --llm-weights {weights} some do ({gb(other.weight_bytes)} GB)"
    return "take a faster or larger device, or a smaller model"


def _split(budget: Budget) -> str:
    return f"{budget.dominant} + {budget.contextual}"


def _named(plan: Estimator, row: Prediction) -> str:
    per = "" if plan.model.unit == "image" else f" a {plan.model.unit}"
    return f"{counted(row.tokens, 'token')}{per}"


def gb(size: float) -> str:
    """Return bytes as gigabytes of 10⁹, without the unit."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def short(value: float) -> str:
    """Return a number with three digits, without an exponent: no prediction is worth more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
