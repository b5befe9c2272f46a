"""The demo bundles of first contact, and a graph with the running sum that vzip's once had."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.export.layouts import write_layout
from tests.places import DOCS
from tests.refusals import refused
from vzip.export.algorithm.budget import Budget
from vzip.export.contact import preparing
from vzip.export.contact.preparing import DEMOS, prepare, with_cumsum
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.agreement.reference_file import load_reference
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import ExportError, InvalidInputError, MissingDependencyError
from vzip.runtime.machine.children import Ended

RUNTIME = (DOCS / "runtime.md").read_text(encoding="utf-8")


def exported(folder: Path, family: str, opset: int, *, cls_token: bool) -> Bundle:
    write_layout("llava-hf-single", folder / "model", family=family)
    return export_bundle(
        WeightSource(str(folder / "model"), seed=0),
        folder / "bundle",
        budget=Budget(12, 4, cls_token=cls_token),
        precision="fp32",
        options=GraphOptions(batch=1, opset=opset),
        check_images=reference_images(),
        step=lambda _: None,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "opset", "cls_token"),
    [("llava", 17, True), ("llava", 18, False), ("llava-siglip", 17, False)],
)
def test_the_running_sum_gives_the_same_tokens(
    tmp_path: Path, family: str, opset: int, cls_token: bool
) -> None:
    bundle = exported(tmp_path, family, opset, cls_token=cls_token)
    with_cumsum(bundle.path, tmp_path / "cumsum")
    path = tmp_path / "cumsum" / "model.onnx"
    onnx.checker.check_model(str(path))
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert operators.count("CumSum") == 1
    feeds = {bundle.manifest.input.name: load_reference(bundle).input[:1]}
    # What is computed does go through it.
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    own = onnxruntime.InferenceSession(
        str(bundle.path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    for one, other in zip(session.run(None, feeds), own.run(None, feeds), strict=True):
        assert np.array_equal(one, other)


def test_a_graph_without_a_rank_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with refused(ExportError, got="CumSum"):
        with_cumsum(tiny_bundle, tmp_path / "cumsum")


def test_what_can_t_be_prepared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with refused(InvalidInputError, got="taken", expected="empty"):
        prepare(tmp_path / "taken")

    def fails(*_: Any, **__: Any) -> Ended:
        return Ended(2, "ended with status 2", "one\nvzip: error: two\n", 1.0)

    monkeypatch.setattr(preparing, "run_child", fails)
    with refused(ExportError, got=("vzip export", "status 2"), cause="vzip: error: two"):
        prepare(tmp_path / "demos", say=lambda _: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused(MissingDependencyError, got="torch", cure="vzip[export]"):
        prepare(tmp_path / "others")


@pytest.mark.full
def test_the_demo_bundles_are_those_that_first_contact_builds(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "demos", say=lambda _: None)
    for name, precision in DEMOS.values():
        bundle = read_bundle(folder / name).at(precision)
        assert bundle.precision == (precision or name.replace("open", "fp16"))
        load_reference(bundle)
    assert read_bundle(folder / "open").manifest.batch.dynamic
    assert read_bundle(folder / "fp16").manifest.opset == 17
    # docs/runtime.md shows what Triton is told of this one.
    (config,) = re.findall(r"^name: \"vzip\"\n.*?^```", RUNTIME, re.MULTILINE | re.DOTALL)
    manifest = read_bundle(folder / "open").manifest
    assert f"max_batch_size: {manifest.batch.max}\n" in config
    types = {"uint8": "UINT8", "float16": "FP16", "int64": "INT64"}
    for tensor in (*manifest.inputs, *manifest.outputs):
        dims = ", ".join(map(str, tensor.shape[1:]))
        row = f'name: "{tensor.name}" data_type: TYPE_{types[tensor.dtype]} dims: [ {dims} ]'
        assert row in config
    assert config.count("data_type") == 3
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16 * 10**6
