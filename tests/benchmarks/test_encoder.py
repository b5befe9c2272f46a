"""`python -m benchmarks.encoder`: which bundles are measured, and what is written of several."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import encoder
from tests.refusals import refused
from vzip.export.bench.stacks import Stack
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine.record import machine


def found(name: str, baseline: str = "torch-published:fp32") -> dict:
    """What `bench` gives of one bundle."""
    stack = Stack("ours", "onnxruntime", "fp32", "fp32", "cpu")
    times = dict.fromkeys(("median_ms", "p90_ms", "p99_ms", "min_ms"), 5.0)
    row = {
        "bundle": name, "batch": 1, "group": 0, "stack": str(stack), **stack.to_json(), **times,
        "iqr_ms": 0.1,
        "calls": 7, "images_per_s": 200.0, "peak_host_mib": 1.0, "open_s": 1.0,
    }  # fmt: skip
    bundle = {
        "name": name, "tokens": 64, "tower_tokens": 577, "dominant": 54, "contextual": 10,
        "merge": "average",
    }  # fmt: skip
    return {
        "what": "w", "schema": 1, "command": "", "started": "now", "environment": machine(),
        "baseline": baseline, "bundles": [bundle], "rows": [row],
        "states": [{"bundle": name, "group": 0}],
        "empty": [{"cell": name, "why": "no file /home/me/x"}],
    }  # fmt: skip


def test_another_bundle_is_refused(tiny_bundle, tmp_path):
    tiny_bundle.rename(tmp_path / "tokens-64")
    with refused(InvalidInputError, got="tokens-64", expected="32)", cure="--bundles"):
        encoder.made(tmp_path, "llava-1.5-7b", 64)


@pytest.mark.slow
def test_a_bundle_is_made_once_with_its_int8_graph(tmp_path, monkeypatch):
    # The command line of this tree, in the Python that runs the tests.
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    bundle = encoder.made(tmp_path, "demo", 43, weights="checkpoint")
    manifest = bundle.manifest
    assert (manifest.batch.max, manifest.batch.dynamic) == (32, True)
    assert list(manifest.precisions) == ["int8"]
    assert "reference.npz" in manifest.files
    monkeypatch.setattr(encoder, "_vzip", lambda *_: pytest.fail("made again"))
    assert encoder.made(tmp_path, "demo", 43, weights="checkpoint").manifest == manifest


def test_several_are_one_result():
    one = encoder.joined([found("a"), found("b")], "python -m benchmarks.encoder")
    assert [row["bundle"] for row in one["rows"]] == ["a", "b"]
    # Their turns were not taken together: they are never set beside each other.
    assert [row["group"] for row in one["rows"]] == [0, 1]
    assert [state["group"] for state in one["states"]] == [0, 1]
    assert [each["name"] for each in one["bundles"]] == ["a", "b"]
    assert len(one["empty"]) == len(one["states"]) == 2
    assert one["command"] == "python -m benchmarks.encoder"
    with refused(InvalidInputError, got=("torch-published:fp32", "x")):
        encoder.joined([found("a"), found("b", baseline="x")], "")


@pytest.fixture
def asked(monkeypatch, tmp_path, tiny_bundle):
    """What is asked of `bench`, which measures nothing here."""
    asked = []

    def bench(bundles, wanted, *, command, say):
        ((name, bundle),) = bundles.items()
        assert wanted.stacks(bundle)  # raises for a name that there is not
        asked.append((name, wanted.batches, wanted.only, wanted.rounds))
        return found(name)

    def made(folder, model, tokens):
        target = tmp_path / f"tokens-{tokens}"
        if not target.exists():
            target.symlink_to(tiny_bundle)
        bundle = read_bundle(target)
        engine = SimpleNamespace(cpu="this one", precision="fp32", stack="onnxruntime")
        return SimpleNamespace(path=bundle.path, manifest=SimpleNamespace(
            precision="fp32", precisions=(), engines={encoder.CPU_ENGINE: engine},
        ))  # fmt: skip

    monkeypatch.setattr(encoder, "bench", bench)
    monkeypatch.setattr(encoder, "made", made)
    return asked


@pytest.mark.slow
def test_what_is_written(asked, monkeypatch, tmp_path, capsys):
    output = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["encoder", "--bundles", str(tmp_path), "-o", str(output)])
    encoder.main()
    assert asked == [
        ("tokens-64", (1,), encoder.MAIN, 7), ("tokens-64", (1,), encoder.OTHERS, 5),
        ("tokens-128", (1,), encoder.BEST, 5), ("tokens-192", (1,), encoder.BEST, 5),
        ("tokens-64", (8,), encoder.FEW, 3),
    ]  # fmt: skip
    assert [each["name"] for each in json.loads(output.read_text())["bundles"]] == [
        "tokens-64", "tokens-128", "tokens-192"
    ]  # fmt: skip
    result = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert result["empty"][0]["why"] == "no file x"
    assert {each["cell"] for each in result["empty"]} >= {"tokens-64, batch 16 and 32", "tensorrt"}
    assert result["command"] == f"python -m benchmarks.encoder --bundles {tmp_path.name} -o r.json"
    assert "### tokens-192" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".svg").exists()
    assert "tokens-64" in capsys.readouterr().out


def test_on_a_gpu_every_stack_of_it_is_asked_for(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "gpus", list)
    output = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["encoder", "--bundles", str(tmp_path), "-o", str(output)])
    encoder.main()
    assert [each[:3] for each in asked] == [
        ("tokens-64", (1,), ()), ("tokens-64", (8,), encoder.ON_A_GPU),
        ("tokens-64", (32,), encoder.ON_A_GPU),
        ("tokens-128", (1,), ()), ("tokens-192", (1,), ()),
    ]  # fmt: skip
    cells = {each["cell"] for each in json.loads(output.read_text())["empty"]}
    assert "tensorrt" not in cells


@pytest.mark.parametrize("option", [("--tokens", "65"), ("--tokens", "a"), ("--batches", "1,3")])
def test_runs_that_there_are_not(asked, monkeypatch, tmp_path, capsys, option):
    arguments = ["--bundles", str(tmp_path), "-o", str(tmp_path / "r.json"), *option]
    monkeypatch.setattr(sys, "argv", ["encoder", *arguments])
    with pytest.raises(SystemExit) as ended:
        encoder.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert option[0] in said
    assert repr(option[1]) in said
    assert asked == []


def test_a_batch_that_a_budget_has_no_run_of(asked, monkeypatch, tmp_path, capsys):
    arguments = ["--bundles", str(tmp_path), "--tokens", "128", "--batches", "8"]
    monkeypatch.setattr(sys, "argv", ["encoder", *arguments])
    with pytest.raises(SystemExit) as ended:
        encoder.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "[8]" in said
    assert "64" in said
    assert asked == []
