"""Exported bundles of tiny models, by what is particular about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.quantization import WithOutliers
from tests.export.layouts import write_layout
from vzip.export.algorithm.budget import Budget
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.bundle.reader import Bundle

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {},
    "pixels-17": {"options": GraphOptions("pixel_values", 2, opset=17)},
    "outliers": {"source": WithOutliers},
    "fp16": {"precision": "fp16"},
    "siglip": {"family": "llava-siglip"},
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return a function that gives a bundle of `OPTIONS`; tests must not change it."""
    done: dict[str, Bundle] = {}
    folder = tmp_path_factory.mktemp("exported")

    def make(name: str) -> Bundle:
        if name not in done:
            change = dict(OPTIONS[name])
            source, family = change.pop("source", WeightSource), change.pop("family", "llava")
            write_layout("llava-hf-single", folder / f"{name}-model", family=family)
            options: dict[str, Any] = {
                "budget": Budget(12, 4, cls_token=family == "llava"),
                "precision": "fp32",
                "options": GraphOptions(batch=4, dynamic_batch=True),
                "check_images": reference_images(),
                "step": lambda _: None,
            }
            path = folder / f"{name}-model"
            done[name] = export_bundle(
                source(str(path), seed=0), folder / name, **{**options, **change}
            )
        return done[name]

    return make
