"""How a bundle's graph is to be quantised; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vzip.runtime.agreement import CALIBRATED
from vzip.runtime.errors import InvalidInputError

QuantPrecision = Literal["int8", "fp8"]
Method = Literal["error", "minmax", "percentile", "entropy", "mse"]

PERCENTILE = 99.99
"""Share in percent of an activation's values that `percentile` leaves unclipped."""


@dataclass(frozen=True)
class Recipe:
    """What `vzip.calibration.quantization.quantize.quantize` does.

    Attributes:
        precision: Of the linear layers: ``int8`` (symmetric) or ``fp8`` (E4M3).
        method: ``error``: the form of each layer and its range are searched for by the error of its
            output (`vzip.calibration.quantization.search`). Otherwise every layer has the same
            form, and an activation's range is chosen from what the samples showed: its largest
            magnitude, the magnitude that 99.99 % of the values stay below, the clipping that keeps
            most of the distribution's information (KL divergence, for ``int8`` alone), or the one
            with the least mean squared error.
        smoothing: SmoothQuant's alpha, above 0 and below 1, for the layers that follow a
            LayerNorm, and with ``error`` around which it is searched for; None leaves them as they
            are.
        keep_agreement: Mean share of the kept tokens that must stay the same, above 0 and at most
            1; None for no such limit.
        keep_cosine: Mean cosine that the tokens must keep, above 0 and at most 1; None for no such
            limit.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    precision: QuantPrecision = "int8"
    method: Method = "error"
    smoothing: float | None = 0.5
    keep_agreement: float | None = CALIBRATED.overlap
    keep_cosine: float | None = CALIBRATED.every.mean

    def __post_init__(self) -> None:
        for name, kinds in (("precision", QuantPrecision), ("method", Method)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise InvalidInputError(
                    f"got {name}={value!r}",
                    expected=f"one of {', '.join(get_args(kinds))}",
                )
        if self.precision == "fp8" and self.method == "entropy":
            raise InvalidInputError(
                "got method='entropy' with precision='fp8'",
                expected=(
                    "minmax, percentile or mse: entropy counts the even steps of INT8, which FP8 "
                    "doesn't have"
                ),
            )
        if self.smoothing is not None and not (
            _is_number(self.smoothing) and 0 < self.smoothing < 1
        ):
            raise InvalidInputError(
                f"got smoothing={self.smoothing!r}",
                expected="a number above 0 and below 1, or None",
                cause="0.5 shares the difficulty evenly between activations and weights",
            )
        for name in ("keep_agreement", "keep_cosine"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise InvalidInputError(
                    f"got {name}={value!r}",
                    expected="a number above 0 and at most 1, or None",
                )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
