"""Tiny bundles for the tests of calibration, exported once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quantization import WithOutliers
from tests.export.layouts import write_layout
from vzip.export.algorithm.budget import Budget
from vzip.export.graph.trace import GraphOptions
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.bundle.reader import Bundle

# Precision, opset and input of a graph, its batch and whether that is open, and the weights: two
# bundles hold every value, the third is for SmoothQuant.
BUNDLES = {
    "fp32": ("fp32", 17, "image", (4, True), WeightSource),
    "fp16": ("fp16", 18, "pixel_values", (3, False), WeightSource),
    "outliers": ("fp32", 18, "image", (4, True), WithOutliers),
    "fp16-outliers": ("fp16", 17, "image", (4, True), WithOutliers),
}

MakeBundle = Callable[[str], Bundle]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Return a function that gives a bundle of `BUNDLES`; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_layout("llava-hf-single", folder / "model")
    made: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in made:
            precision, opset, graph_input, (most, dynamic), source = BUNDLES[name]
            made[name] = export_bundle(
                source(str(folder / "model"), seed=0),
                folder / name,
                budget=Budget(12, 4),
                precision=precision,
                options=GraphOptions(graph_input, most, dynamic, opset),
                check_images=(),
                step=lambda _: None,
            )
        return made[name]

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 14 small pictures."""
    import numpy as np
    from PIL import Image

    folder: Path = tmp_path_factory.mktemp("pictures")
    for number in range(14):
        small = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(folder / f"{number}.png")
    return folder
