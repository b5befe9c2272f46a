"""Quantised graphs for the golden bundle, put into it as `vzip calibrate` does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.places import GOLDEN
from vzip.runtime.bundle.precision_record import PrecisionRecord, Quantised, data_file, graph_file
from vzip.runtime.bundle.precision_record import report_file as report_of
from vzip.runtime.bundle.precision_writer import precision_writer
from vzip.runtime.bundle.reader import Bundle, read_bundle

DATA = GOLDEN / "tiny_precisions"
OPSETS = {"int8": 18, "fp8": 19}


def golden_precisions() -> dict[str, np.ndarray]:
    """Return precision → embeddings float64 [5, K, L] of the golden inputs."""
    with np.load(DATA / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def a_record(precision: Quantised, **change: Any) -> PrecisionRecord:
    """Return a record of a quantised graph."""
    values: dict[str, Any] = {
        "opset": OPSETS[precision],
        "samples_sha256": "a" * 64,
        "images": 64,
        "recipe": {"precision": precision, "method": "minmax", "smoothing": 0.5},
        "agreement": {"images": 12, "mean_overlap": 0.97, "mean_cosine": 0.998},
    }
    return PrecisionRecord(**{**values, **change})


def fill(folder: Path, precision: Quantised, report: str = "{}\n") -> None:
    """Put the files of a quantised graph into a folder."""
    for name in (graph_file(precision), data_file(precision)):
        shutil.copyfile(DATA / name, folder / name)
    (folder / report_of(precision)).write_text(report)


def add_precision(path: Path, precision: Quantised = "int8", report: str = "{}\n") -> Bundle:
    """Put a quantised graph into a copy of the golden bundle, and return it at that precision."""
    with precision_writer(read_bundle(path), precision) as writer:
        fill(writer.folder, precision, report)
        return writer.publish(a_record(precision))
