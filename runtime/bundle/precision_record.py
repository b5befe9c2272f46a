"""The record of a quantised graph in a bundle's manifest, and the names of its files.

Beside its own graph, in FP32 or FP16, a bundle may hold the same graph with quantised linear
layers, which takes the same inputs and gives the same outputs. `vzip calibrate` makes one,
`docs/bundle.md` specifies the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from vzip.runtime.bundle import checks

Quantised = Literal["int8", "fp8"]
Precision = Literal["fp32", "fp16", "int8", "fp8"]

QUANTISED: Final[tuple[Quantised, ...]] = ("int8", "fp8")
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", *QUANTISED)

FP8_SM: Final = 89
"""First compute capability, without the dot, that computes in FP8 (Ada)."""


def graph_file(precision: Quantised) -> str:
    """Return the name of a quantised graph's file."""
    return f"model.{precision}.onnx"


def data_file(precision: Quantised) -> str:
    """Return the name of the file with a quantised graph's weights."""
    return f"model.{precision}.onnx.data"


def report_file(precision: Quantised) -> str:
    """Return the name of the file that says how a graph was quantised and what it lost."""
    return f"calibration.{precision}.json"


def files_of(precision: Quantised) -> tuple[str, str, str]:
    """Return the names of all files of a quantised graph; that of its weights may be absent."""
    return graph_file(precision), data_file(precision), report_file(precision)


QUANTISED_FILES: Final = tuple(name for each in QUANTISED for name in files_of(each))


@dataclass(frozen=True)
class PrecisionRecord:
    """How a quantised graph was made, and how it agrees with the bundle's own.

    Attributes:
        opset: ONNX opset of the graph; the types of FP8, and scales in FP16, need 19.
        samples_sha256: Digest of the images: those it was calibrated on and those held apart.
        images: How many these are.
        recipe: How it was quantised, by name.
        agreement: How far it agrees with the bundle's own graph, by name, on the images held apart.
    """

    opset: int
    samples_sha256: str
    images: int
    recipe: Mapping[str, checks.Scalar]
    agreement: Mapping[str, checks.Scalar]

    def __post_init__(self) -> None:
        checks.integer("precisions.opset", self.opset, low=17, high=21)
        checks.digest("precisions.samples_sha256", self.samples_sha256)
        checks.integer("precisions.images", self.images, low=1)
        for name in ("recipe", "agreement"):
            values = getattr(self, name)
            if not isinstance(values, Mapping):
                raise checks.refuse(f"precisions.{name}", values, "an object")
            for key, value in values.items():
                checks.text(f"precisions.{name}", key)
                checks.scalar(f"precisions.{name}.{key}", value)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values, in the order of `docs/bundle.md`."""
        return {**vars(self), "recipe": dict(self.recipe), "agreement": dict(self.agreement)}

    @classmethod
    def from_json(cls, where: str, value: object) -> PrecisionRecord:
        """Return the record that `value`, parsed JSON, describes.

        Args:
            where: Its place in the manifest, for messages.
            value: The JSON.

        Raises:
            BundleError: An unknown or missing key, a wrong type, or a value out of range.
        """
        values: dict[str, Any] = dict(checks.mapping(where, value, cls.__dataclass_fields__))
        return cls(**values)
