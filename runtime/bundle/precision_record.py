"""The record of a quantised graph in a bundle's manifest, and the names of its files.

Beside its own graph, in FP32 or FP16, a bundle may hold the same graph with quantised linear
layers, which takes the same inputs and gives the same outputs. `vzip calibrate` makes one,
`docs/bundle.md` specifies the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from vzip.runtime.files.codec import Count, Record, Scalar, Sha256, Text, within

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
class PrecisionRecord(Record):
    """How a quantised graph was made, and how it agrees with the bundle's own.

    Attributes:
        opset: ONNX opset of the graph; the types of FP8, and scales in FP16, need 19.
        samples_sha256: Digest of the images: those it was calibrated on and those held apart.
        images: How many these are.
        recipe: How it was quantised, by name.
        agreement: How far it agrees with the bundle's own graph, by name, on the images held apart.
    """

    opset: Annotated[int, within(17, 21)]
    samples_sha256: Sha256
    images: Count
    recipe: Mapping[Text, Scalar]
    agreement: Mapping[Text, Scalar]
