"""How each linear layer is quantised best, by the error of its own output on some tokens.

Outliers of trained towers sit in a handful of channels, the same for every picture: a few channels
of the residual stream, a few neurons of a feed forward. Those are multiplied apart, in high
precision. What is left is centred, channel by channel, and where large numbers still stand alone
within a token (after an activation, or in the values of an attention) a Hadamard matrix spreads
them. Then one scale for all tokens does, which is all that TensorRT takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.calibration.quantization.folds import InputSource, powers, rotated
from vzip.calibration.quantization.pieces import LinearGroup
from vzip.calibration.quantization.qdq import LARGEST, Setting, main_weights, rounded_weights
from vzip.calibration.quantization.recipe import QuantPrecision

Array = NDArray[Any]
Factors = Callable[[float], NDArray[np.float32]]

ROWS: Final = 2048
"""SeenTokens of each linear layer's input that are remembered, of all images together."""

_TRIED = 256  # of these, by which forms are compared
_CLIPS = (1.0, 0.85, 0.7, 0.55)
_APART = 48  # one channel in so many stands apart at most
_BLOCK = 16  # more spread better, and cost more
_HEAD = 64
_WORTH = 0.7  # of the error that is left, what costs time must do with


class SeenTokens:
    """What the samples show of each linear layer's input.

    Args:
        images: How many there will be.

    Attributes:
        highest: Value's name → float32 [channels], the largest number.
        lowest: The smallest.
        rows: float32 [n, channels] of some tokens of every image.
        lengths: How many tokens an image has there.
    """

    def __init__(self, images: int) -> None:
        self._share = max(1, -(-ROWS // images))
        self._rng = np.random.default_rng(0)
        self._rows: dict[str, list[NDArray[np.float32]]] = {}
        self.highest: dict[str, NDArray[np.float32]] = {}
        self.lowest: dict[str, NDArray[np.float32]] = {}
        self.lengths: dict[str, int] = {}

    def see(self, name: str, values: Array) -> None:
        """Take in a batch [images, tokens, channels]."""
        flat = values.reshape(-1, values.shape[-1])
        high, low = flat.max(axis=0).astype(np.float32), flat.min(axis=0).astype(np.float32)
        if name in self.highest:
            high = np.maximum(high, self.highest[name])
            low = np.minimum(low, self.lowest[name])
        self.highest[name], self.lowest[name] = high, low
        self.lengths[name] = len(flat) // len(values)
        count = min(len(flat), self._share * len(values))
        chosen = self._rng.choice(len(flat), count, replace=False)
        self._rows.setdefault(name, []).append(flat[np.sort(chosen)].astype(np.float32))

    def rows(self, name: str) -> NDArray[np.float32]:
        """Return the tokens that are remembered of a value, [n, channels]."""
        return np.concatenate(self._rows[name])

    def peaks(self, name: str) -> NDArray[np.float32]:
        """Return the largest magnitude of each channel of a value."""
        return np.maximum(self.highest[name], -self.lowest[name])


@dataclass(frozen=True)
class FoundForm:
    """The form that a linear layer's error is smallest in.

    Attributes:
        setting: The form.
        error: Mean square of its output's error over that of the output, token by token; the
            largest tokens count no more than the others.
    """

    setting: Setting
    error: float


class FormSearch:
    """Compares forms of one linear layer.

    Args:
        linear: The layer.
        tokens: What was seen.
        weights: float [in, out], those of all its parts side by side.
        source: What makes its input, if that can be changed.
        factors: Gives SmoothQuant's factors for an alpha, for a layer that a LayerNorm feeds.
        precision: What it is quantised to.
    """

    def __init__(  # noqa: PLR0917
        self,
        linear: LinearGroup,
        tokens: SeenTokens,
        weights: Array,
        source: InputSource | None,
        factors: Factors | None,
        precision: QuantPrecision,
    ) -> None:
        self._linear, self._source, self._factors = linear, source, factors
        self._precision, self._wide = precision, weights.dtype
        self._weights = weights.astype(np.float32)
        self._rows = tokens.rows(linear.input)
        self._high, self._low = tokens.highest[linear.input], tokens.lowest[linear.input]
        rng = np.random.default_rng(0)
        count = min(_TRIED, len(self._rows))
        self._tried = np.sort(rng.choice(len(self._rows), count, replace=False))
        size = (self._rows[self._tried] @ self._weights) ** 2
        power = np.maximum(size.sum(axis=1), 1e-20)
        # A sink's output is a thousand times another token's, and so may its error be.
        scale = 1 / np.maximum(power, 0.1 * np.median(power))
        self._scale = (scale / (power * scale).sum()).astype(np.float32)

    def best(self, alphas: Sequence[float]) -> FoundForm:
        """Return the best form; one that costs time only if it is much better.

        Args:
            alphas: SmoothQuant's, that are tried.
        """
        best = self._judged(Setting(0.0))
        for costs, setting in self._forms():
            found = self._judged(setting)
            if found.error < (_WORTH if costs else 1) * best.error:
                best = found
        factors = [] if self._factors is None else [self._factors(alpha) for alpha in alphas]
        for each in factors:
            found = self._judged(self._smoothed(best.setting, each))
            best = min(best, found, key=lambda each: each.error)
        return replace(best, setting=self._corrected(best.setting))

    def _forms(self) -> Iterator[tuple[bool, Setting]]:
        """Yield whether a form costs time, and the form, the cheapest first."""
        if self._precision != "int8":  # whose steps grow with the numbers: outliers cost it nothing
            return
        linear, source, plain = self._linear, self._source, Setting(0.0)
        if linear.norm is not None:
            centred = self._centred(replace(plain, folded=True))
            yield False, centred
            if count := self._apart(8):
                yield True, self._without(centred, count)
        elif source is not None and source.head is not None:
            folded = replace(plain, folded=True)
            for each in (folded, *self._turned()):
                yield False, each
                if source.bias is not None:
                    yield False, self._centred(each)
        else:
            yield True, self._centred(plain)
            for spread in self._turned():
                yield True, spread
                yield True, self._centred(spread)
            if source is None and (count := self._apart(8)):
                yield True, self._without(plain, count)

    def _turned(self) -> Iterator[Setting]:
        """Yield the rotations that what makes the input allows."""
        source, size = self._source, len(self._high)
        if source is not None and source.head is not None:
            for block in powers(source.head, _HEAD):
                yield Setting(0.0, folded=True, block=block)
                return
        elif source is not None and size % _BLOCK == 0:
            for count in dict.fromkeys((0, self._apart(_BLOCK))):
                order, apart = self._order(count), np.arange(size - count, size)
                yield Setting(0.0, order=order, apart=apart, block=_BLOCK)

    def _smoothed(self, setting: Setting, factors: NDArray[np.float32]) -> Setting:
        """Return a form with SmoothQuant's factors before the rest of it."""
        smoothed = replace(setting, factors=factors, shift=None, apart=np.zeros(0, np.int64))
        if setting.shift is not None:
            smoothed = self._centred(smoothed)
        return self._without(smoothed, len(setting.apart)) if len(setting.apart) else smoothed

    def _apart(self, multiple: int) -> int:
        """Return how many channels may stand apart."""
        size = len(self._high)
        return max(size // _APART // multiple, size >= 8 * multiple) * multiple

    def _order(self, count: int) -> NDArray[np.int64]:
        """Return the channels: the largest `count` last, the others dealt out over the blocks."""
        falling = np.argsort(-np.maximum(self._high, -self._low), kind="stable")
        dealt = falling[count:].reshape(_BLOCK, -1).T.ravel()
        return np.concatenate([dealt, falling[:count]]).astype(np.int64)

    def _main(self, setting: Setting, rows: Array) -> NDArray[np.float32]:
        """Return of tokens [n, in] what is quantised, before the shift: zeros for what isn't."""
        if setting.factors is not None:
            rows = rows / setting.factors
        if setting.order is not None:
            rows = rows[:, setting.order[: len(setting.order) - len(setting.apart)]]
        if setting.block:
            rows = rotated(rows, setting.block, 1)
        if setting.order is None and len(setting.apart):
            rows = rows.copy()
            rows[:, setting.apart] = 0
        return rows.astype(np.float32, copy=False)

    def _folded(self, setting: Setting) -> NDArray[np.float32]:
        """Return the weights [in, out] after what is done before the layer."""
        weights = self._weights
        if setting.factors is not None:
            weights = weights * setting.factors[:, None]
        if setting.order is not None:
            weights = weights[setting.order]
        elif setting.block:
            weights = rotated(weights, setting.block, 0)
        return weights

    def _limits(self, setting: Setting) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the largest and the smallest number of each channel that is quantised."""
        if setting.block:  # only the tokens that are remembered tell
            rows = self._main(setting, self._rows)
            return rows.max(axis=0), rows.min(axis=0)
        both = self._main(setting, np.stack([self._high, self._low]))
        return both[0], both[1]

    def _centred(self, setting: Setting) -> Setting:
        high, low = self._limits(setting)
        return replace(setting, shift=((high + low) / 2).astype(np.float32))

    def _without(self, setting: Setting, count: int) -> Setting:
        """Take the channels with the largest numbers out."""
        high, low = self._limits(setting)
        shift = np.zeros(len(high), np.float32) if setting.shift is None else setting.shift
        apart = np.sort(np.argsort(-np.maximum(high - shift, shift - low), kind="stable")[:count])
        shift = shift.copy()
        shift[apart] = 0
        return replace(
            setting, apart=apart.astype(np.int64), shift=None if setting.shift is None else shift
        )

    def _judged(self, setting: Setting) -> FoundForm:
        """Return a form with the threshold that serves it best, and its error."""
        high, low = self._limits(setting)
        shift = np.float32(0) if setting.shift is None else setting.shift
        peak = float(np.maximum(high - shift, shift - low).max())
        main = main_weights(self._folded(setting), setting)
        stored, scales = rounded_weights(main, self._precision, self._wide)
        lost = stored.astype(np.float32) * scales.astype(np.float32) - main
        rows = self._main(setting, self._rows[self._tried]) - shift
        # What is lost on average goes into the bias.
        by_weights = self._measured((rows - rows.mean(axis=0)) @ lost)
        errors = {}
        for clip in _CLIPS:
            errors[clip] = self._measured((self._rounded(rows, peak * clip) - rows) @ main)
        clip = min(errors, key=lambda each: errors[each])
        return FoundForm(replace(setting, threshold=peak * clip), errors[clip] + by_weights)

    def _measured(self, error: NDArray[np.float32]) -> float:
        return float((error**2).sum(axis=1) @ self._scale)

    def _rounded(self, rows: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
        largest = LARGEST[self._precision]
        step = np.float32(max(threshold / largest, 1e-30))
        scaled = np.clip(rows / step, -largest, largest)
        if self._precision == "int8":
            small = np.rint(scaled)
        else:
            import ml_dtypes

            small = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        back: NDArray[np.float32] = small * step
        return back

    def _corrected(self, setting: Setting) -> Setting:
        """Add what rounding takes away from the output on average."""
        shift = np.float32(0) if setting.shift is None else setting.shift
        main = main_weights(self._folded(setting), setting)
        stored, scales = rounded_weights(main, self._precision, self._wide)
        small = stored.astype(np.float32) * scales.astype(np.float32)
        rows = self._main(setting, self._rows) - shift
        mean = rows.mean(axis=0) @ main
        got = self._rounded(rows, setting.threshold).mean(axis=0) @ small
        return replace(setting, correction=(mean - got).astype(np.float32))
