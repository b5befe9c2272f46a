"""A graph that is wrong in one place is refused, in FP32 and in true half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests import mutated
from tests.export.layouts import write_layout
from vzip.export.algorithm.budget import Budget
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.export.graph.trace import GraphOptions
from vzip.export.parity.compare import UntouchedModel
from vzip.export.parity.reference import PRECISIONS, _processor, _tower, tower_features
from vzip.export.parity.rounded import open_rounded
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.pictures.images import load_image

IMAGES = reference_images()[:2]
Graphs = Callable[[str], tuple[UntouchedModel, Bundle]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations") / "tiny"
    write_layout("llava-hf-single", folder)
    return folder


@pytest.fixture(scope="module")
def graphs(checkpoint: Path) -> Graphs:
    """Return what a graph of some precision is compared with, and a right one."""
    made: dict[str, tuple[UntouchedModel, Bundle]] = {}

    def both(precision: str) -> tuple[UntouchedModel, Bundle]:
        if precision not in made:
            weights = read_vision(Checkpoint.open(checkpoint))
            bundle = export_bundle(
                WeightSource(str(checkpoint)),
                checkpoint.parent / precision,
                budget=Budget(12, 4),
                precision=precision,  # type: ignore[arg-type]
                options=GraphOptions(),
                check_images=(),
                step=lambda _: None,
            )
            made[precision] = UntouchedModel(weights, IMAGES, precision), bundle
        return made[precision]

    return both


@pytest.mark.parametrize(
    ("mistake", "precision"),
    [*((each, "fp32") for each in mutated.FP32), *((each, "fp16") for each in mutated.FP16)],
)
def test_a_mutated_graph_is_refused(
    graphs: Graphs, tmp_path: Path, mistake: str, precision: str
) -> None:
    untouched, bundle = graphs(precision)
    assert untouched.compare(bundle).passed
    wrong = mutated.mutated(bundle, tmp_path / "wrong", mutated.FP32[mistake])
    assert not untouched.compare(wrong).passed


def test_an_fp16_graph_is_run_in_true_half_precision(graphs: Graphs) -> None:
    """ONNX Runtime's own run of it rounds hardly anything."""
    untouched, bundle = graphs("fp16")
    feeds = {"image": untouched._inputs[:1]}
    session = open_rounded(bundle)
    rounded = session.run(feeds)["image_embeds"]
    _, plain = open_backend("onnxruntime", bundle)
    wide = plain.run(feeds)["image_embeds"]
    assert rounded.dtype == wide.dtype == np.float16
    assert (rounded != wide).mean() > 0.2
    _, traced = open_backend("pytorch", bundle)  # rounds after every operator as well
    other = traced.run(feeds)["image_embeds"]
    apart = np.abs(rounded - other) / np.abs(other).max()
    assert np.quantile(apart, 0.9) < 5e-3  # a token may go into another group


def test_every_value_of_a_rounded_graph_is_one_that_the_narrow_type_holds(graphs: Graphs) -> None:
    _, bundle = graphs("fp32")
    session = open_rounded(bundle, narrow=ir.DataType.BFLOAT16)
    image = graphs("fp32")[0]._inputs[:1]
    found = torch.from_numpy(np.array(session.run({"image": image})["image_embeds"]))
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16().float(), found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modules_one_by_one_are_the_untouched_tower(checkpoint: Path, precision: str) -> None:
    weights = read_vision(Checkpoint.open(checkpoint))
    image = np.asarray(load_image(IMAGES[0]))
    (found,) = tower_features(weights, [image], precision=precision)
    tower = _tower(weights).to(PRECISIONS[precision])
    pixels = _processor(weights.config)(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = tower(pixels.to(PRECISIONS[precision]), output_hidden_states=True)
    expected = torch.cat([output.hidden_states[state] for state in weights.config.states], dim=-1)
    close = {"fp32": 1e-6, "bf16": 3e-2}[precision]
    assert np.abs(found.hidden - expected.double().numpy()).max() < close * found.hidden.max()
