"""NVIDIA's own parser and compiler take every graph that export can make, without a GPU.

The real TensorRT-RTX builds an engine of each variant for two GPUs. What that can't show without a
GPU is that the engine computes the right thing: that is what the proof of `vzip build` is for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from tests.export.layouts import write_layout
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest
from vzip.export.graph.trace import GraphOptions
from vzip.export.graph.traced import GraphInput
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.bundle.reader import Bundle, read_bundle

SIZES = {"tiny": Budget(12, 4), "llava-1.5-7b": Budget(54, 10)}


@dataclass(frozen=True)
class Variant:
    """One graph."""

    precision: Literal["fp32", "fp16"]
    opset: Literal[17, 18]
    batch: tuple[int, bool]
    graph_input: GraphInput
    merge: Merge
    cls_token: bool

    def __str__(self) -> str:
        most, dynamic = self.batch
        batch = f"1to{most}" if dynamic else str(most)
        cls = "cls" if self.cls_token else "nocls"
        parts = (self.precision, self.opset, batch, self.graph_input, self.merge, cls)
        return "-".join(map(str, parts))


AXES = (
    ("fp32", "fp16"),
    (17, 18),
    ((1, False), (3, False), (4, True)),
    ("image", "pixel_values"),
    ("average", "sum"),
    (True, False),
)
EVERY = tuple(Variant(*values) for values in itertools.product(*AXES))


def covering(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """Return some variants that hold every pair of values of two axes, chosen greedily."""

    def pairs(variant: Variant) -> set[tuple[object, ...]]:
        values = list(vars(variant).items())
        return set(itertools.combinations(values, 2))

    missing = set[tuple[object, ...]]().union(*map(pairs, variants))
    chosen = []
    while missing:
        best = max(variants, key=lambda each: len(pairs(each) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return tuple(chosen)


FEW = covering(EVERY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix") / "tiny"
    write_layout("llava-hf-single", folder)
    return folder


def build(model: str, budget: Budget, variant: Variant, folder: Path) -> tuple[Bundle, str]:
    """Export a variant with random weights and build its engine."""
    most, dynamic = variant.batch
    export_bundle(
        WeightSource(model, seed=0),
        folder / "bundle",
        budget=replace(budget, cls_token=variant.cls_token, merge=variant.merge),
        precision=variant.precision,
        options=GraphOptions(variant.graph_input, most, dynamic, variant.opset),
        check_images=(),
        step=lambda _: None,
    )
    said: list[str] = []
    result = build_engine(folder / "bundle", BuildRequest(rtx="sm89,sm86"), say=said.append)
    assert any("not proven" in line for line in said), said
    return result.bundle, result.name


def check(bundle: Bundle, name: str, variant: Variant) -> None:
    """The engine is there, whole, and its record says what it is."""
    assert read_bundle(bundle.path) == bundle
    record = bundle.manifest.engines[name]
    assert len(read_engine(bundle, name)) == record.bytes
    assert (record.stack, record.sm, record.gpu) == ("tensorrt_rtx", ("86", "89"), None)
    assert record.precision == variant.precision
    most, dynamic = variant.batch
    assert (record.batch.min, record.batch.max) == (1 if dynamic else most, most)
    assert record.proof is None
    assert record.settings["typing"] == "strong"
    # The weights are in it, in the graph's precision.
    assert record.bytes > 0.9 * bundle.manifest.files["model.onnx.data"].bytes


def test_the_few_hold_every_pair() -> None:
    assert set(FEW) < set(EVERY)
    assert len(FEW) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("variant", FEW, ids=str)
def test_tiny(variant: Variant, checkpoint: Path, tmp_path: Path) -> None:
    check(*build(str(checkpoint), SIZES["tiny"], variant, tmp_path), variant)


def demo(variant: Variant, folder: Path) -> None:
    check(*build("demo", Budget(36, 7), variant, folder), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FEW[:2], ids=str)
def test_the_demo_model(variant: Variant, tmp_path: Path) -> None:
    demo(variant, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("variant", [each for each in EVERY if each not in FEW[:2]], ids=str)
def test_the_demo_model_all_others(variant: Variant, tmp_path: Path) -> None:
    demo(variant, tmp_path)


# Every pair of options at full size; all combinations would take hours.
@pytest.mark.full
@pytest.mark.parametrize("variant", FEW, ids=str)
def test_full_size(variant: Variant, tmp_path: Path) -> None:
    check(*build("llava-1.5-7b", SIZES["llava-1.5-7b"], variant, tmp_path), variant)
