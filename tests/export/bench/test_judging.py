"""What stacks are judged by where a benchmark gives pictures, and what is said of what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.references import with_reference
from vzip.export.algorithm.budget import Budget, split_tokens
from vzip.export.bench.judging import JudgedBy, judged, load_judge, write_judge
from vzip.export.bench.measure import Wanted, bench
from vzip.export.bench.output import table
from vzip.export.bench.peers.torch_forms import TorchEncoder
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, describe
from vzip.runtime.agreement import ENGINE
from vzip.runtime.bundle.manifest import EMBEDS, TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle, read_bundle


@pytest.fixture(scope="module")
def demo() -> Any:
    return WeightSource("demo").load()


@pytest.fixture(scope="module")
def manifest(demo: Any) -> Any:
    budget = Budget(*split_tokens(43), merge="sum")
    return describe(
        demo[0].config, demo[1], budget=budget, precision="fp32", options=GraphOptions(batch=1)
    )


@pytest.fixture(scope="module")
def judge(demo: Any, manifest: Any, tmp_path_factory: pytest.TempPathFactory) -> JudgedBy:
    path = tmp_path_factory.mktemp("judge") / "judge.npz"
    write_judge(path, manifest, demo[0], reference_images()[2:4])
    return load_judge(path, manifest)


@pytest.mark.parametrize("form", ["torch-published", "torch-sdpa"])
def test_pytorchs_forms_agree_in_what_goes_where(manifest: Any, judge: JudgedBy, form: str) -> None:
    encoder = TorchEncoder(form, "fp32", Bundle(Path(), manifest), "cpu")
    found = encoder.prove(judge.reference, [1], judge.keys)
    assert found["passed"] is True
    assert found["group_agreement"] == 1
    assert found["contextual_share"] == 1
    assert found["first_percentile_cosine"] >= found["min_cosine"] > 0.9999
    assert found["short"] == found["disagrees"] == ""
    # Without the keys nobody can say.
    assert encoder.prove(judge.reference, [1])["group_agreement"] is None


def test_what_went_elsewhere_and_what_falls_short_is_said(manifest: Any, judge: JudgedBy) -> None:
    encoder = TorchEncoder("torch-sdpa", "fp32", Bundle(Path(), manifest), "cpu")

    def merging(images: Any) -> Any:
        outputs = encoder._merging(images)
        weights = outputs[TOKEN_WEIGHTS].copy()
        first = manifest.selection.dominant
        weights[:, first:] = np.roll(weights[:, first:], 1, axis=1)
        return {**outputs, TOKEN_WEIGHTS: weights}

    def run(images: Any) -> Any:
        outputs = encoder.run(images)
        noise = np.random.default_rng(0).standard_normal(outputs[EMBEDS].shape)
        return {**outputs, EMBEDS: outputs[EMBEDS] + outputs[EMBEDS].std() * noise}

    found = judged(run, judge, manifest, [1], ENGINE["fp32"], merging=merging)
    assert found["group_agreement"] < 0.2
    assert found["passed"] is False
    assert "cosine" in found["short"]
    assert "cosine" in found["disagrees"]


@pytest.mark.slow
def test_a_stack_that_computes_something_else_is_timed_says_so_and_is_no_baseline(
    tiny_bundle: Path, golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bundle = with_reference(tiny_bundle, golden)
    tower = read_bundle(bundle.path).manifest.tower
    with np.load(bundle.path / "reference.npz", allow_pickle=False) as arrays:
        right = dict(arrays)
    keys = np.random.default_rng(0).standard_normal((len(right["kept"]), 2, tower.tokens, 4))

    def rows(**change: Any) -> tuple[Any, dict[str, Any], str]:
        path = tmp_path / "judge.npz"
        np.savez(path, **{**right, "keys": keys.astype(np.float32), **change})
        wanted = Wanted(only=("onnxruntime:fp32",), rounds=1, judge=path, beside=False)
        found = bench({"tiny": bundle}, wanted, command="", say=lambda _: None)
        (row,) = found["rows"]
        assert found["empty"] == []
        return found["baseline"], row, table(found)

    baseline, row, shown = rows()
    assert baseline == "onnxruntime:fp32"
    assert row["agreement"]["passed"] is True
    assert 0 <= row["agreement"]["group_agreement"] < 1  # these keys are nobody's
    assert "other tokens" not in shown
    baseline, row, shown = rows(embeds=np.roll(right["embeds"], 1, axis=1))
    assert baseline is None
    assert row["agreement"]["passed"] is False
    assert row["median_ms"] > 0
    assert row["times_baseline"] is None
    assert "| onnxruntime:fp32, other tokens |" in shown


def test_half_precision_and_forms_run_on_a_cpu_where_they_are_named_alone(
    tiny_bundle: Path,
) -> None:
    bundle = read_bundle(tiny_bundle)
    every = {str(each) for each in Wanted(peers=True).stacks(bundle)}
    by_name = {str(each) for each in Wanted(only=("torch-published",)).stacks(bundle)}
    assert by_name == {"torch-published:fp32", "torch-published:bf16"}
    for name in ("torch-published:fp16", "onnxruntime-form:tokens"):
        assert name not in every
        assert [str(each) for each in Wanted(only=(name,)).stacks(bundle)] == [name]
