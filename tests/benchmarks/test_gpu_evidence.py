"""`python -m benchmarks.gpu_evidence`: refusals, the protocol with its workers, and a CPU dry run.

What needs a GPU, engines and PyTorch's CUDA kernels, is not run here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu_evidence
from benchmarks.gpu_evidence import RESULTS, ROOT, EvidenceError
from tests.refusals import refused
from vzip.export.bench.processes import Process, WorkerError
from vzip.export.bench.stacks import Stack
from vzip.runtime.doctor import environment
from vzip.runtime.errors import InvalidInputError


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_evidence", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


def plan(*arguments: str) -> gpu_evidence.Measurement:
    parser = gpu_evidence._parser()
    return gpu_evidence._plan(parser.parse_args(["-o", "x.json", *arguments]))


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    return gpu_evidence._tree(tmp_path_factory.mktemp("tree"))


def worker(paths, bundle) -> Process:
    return Process(Stack("ours", "onnxruntime", "fp32", "fp32", "cpu"), bundle, paths=paths)


# --- refusals --------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(environment, "gpus", lambda: "no NVIDIA driver (no libcuda.so.1)")
    monkeypatch.setattr(sys, "argv", ["gpu_evidence", "-o", str(tmp_path / "r.json")])
    assert gpu_evidence._entry() == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "no NVIDIA driver (no libcuda.so.1)" in captured.err
    assert "--dry-run-cpu" in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_results_of_a_dry_run_never_lie_among_the_evidence():
    with refused(InvalidInputError, got="--dry-run-cpu", cause="benchmarks/results"):
        gpu_evidence.main(["-o", str(RESULTS / "x.json"), "--dry-run-cpu"])
    assert not (RESULTS / "x.json").exists()


def test_no_result_of_a_dry_run_is_committed():
    for path in RESULTS.glob("*.json"):
        assert not json.loads(path.read_text()).get("dry_run"), path


def test_bad_options():
    for option, value, expected in (
        ("--stack", "tensorrt", "NAME=PYTHON"),
        ("--stack", "jax=python", "tensorrt-rtx, onnxruntime, torch"),
        ("--batches", "1,0", "from 1 on"),
        ("--batches", "8,8", "different"),
        ("--rounds", "0", "1"),
    ):
        with refused(InvalidInputError, got=(option, value), expected=expected):
            plan(option, value)
    with refused(InvalidInputError, got="-o is", cure="'/nowhere/at/all'"):
        gpu_evidence.main(["-o", "/nowhere/at/all/r.json"])


def test_each_family_in_its_python():
    found = plan("--stack", "tensorrt=/opt/py310", "--stack", "torch=/opt/py312")
    assert found.pythons == {
        "tensorrt": "/opt/py310",
        "tensorrt-rtx": sys.executable,
        "onnxruntime": sys.executable,
        "torch": "/opt/py312",
    }
    assert found.asked == {"tensorrt", "torch"}
    assert found.batches == (1, 8, 32)
    assert "--weights" in found.export


# --- what fails ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("tensorrt-rtx", "tensorrt:tensorrt-rtx"),  # the engine is named after the family
        ("onnxruntime-cuda", "onnxruntime-cuda:fp16"),
        ("torch-compile", "torch-compile:fp16"),
        ("ceiling", "ceiling-cuda:fp16"),
    ],
)
def test_every_name_is_a_stack_on_the_gpu(name, stack):
    found = gpu_evidence._stack(plan(), name)
    assert str(found) == stack
    assert (found.precision, found.device) == ("fp16", "cuda")
    assert found.kind == {"torch-compile": "peer", "ceiling": "ceiling"}.get(name, "ours")


def test_a_build_that_fails_is_recorded_with_its_reason(tmp_path, paths):
    said: dict[str, list[str]] = {}
    built, failed = gpu_evidence.build(plan(), tmp_path / "nowhere", paths, said)
    assert set(said) == set(failed)
    assert all(any("error" in line for line in lines) for lines in said.values())
    assert built == {}
    assert set(failed) == {"tensorrt", "tensorrt-rtx"}
    assert "vzip build in" in failed["tensorrt"]
    assert "ended with 2: vzip: error:" in failed["tensorrt"]


class Machine:
    """Runs `main` with exports, builds and workers that answer as `fails` says."""

    def __init__(self, monkeypatch, tmp_path):
        self.output = tmp_path / "r.json"
        self.fails = {}  # (batch, stack or "export") → reason
        self.written = []  # the batches in the file, whenever a batch begins
        self.options = ["-o", str(self.output), "--bundles", str(tmp_path / "bundles")]
        monkeypatch.setattr(environment, "gpus", lambda: [{"name": "H200"}])
        monkeypatch.setattr(gpu_evidence, "environment", lambda **_: {})
        monkeypatch.setattr(gpu_evidence, "export", self.export)
        monkeypatch.setattr(gpu_evidence, "build", self.build)
        monkeypatch.setattr(gpu_evidence, "time_stacks", self.time)

    def export(self, plan, bundle, batch, paths):
        done = json.loads(self.output.read_text()) if self.output.exists() else {"batches": {}}
        self.written.append(list(done["batches"]))
        if (batch, "export") in self.fails:
            raise EvidenceError(self.fails[batch, "export"])
        return {"carried": False}

    def build(self, plan, bundle, paths, said):
        batch = int(bundle.name.split("-")[1])
        failed = {f: self.fails[batch, f] for f in gpu_evidence.BUILT if (batch, f) in self.fails}
        return {}, failed

    def time(self, plan, bundle, paths, *, skip):
        batch = int(bundle.name.split("-")[1])
        one = {"median_ms": 2.0, "p90_ms": 2.5, "iqr_ms": 0.1, "images_per_s": 500.0}
        every = [stack for stacks in plan.families.values() for stack in stacks]
        failed = {s: self.fails[batch, s] for s in every if (batch, s) in self.fails}
        stacks = {s: dict(one) for s in every if s not in failed and s not in skip}
        return {"stacks": stacks, "failed": failed, "states": []}

    def run(self, *options):
        return gpu_evidence.main([*self.options, *options])


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def test_a_stack_that_fails_is_recorded_and_the_rest_is_kept(machine, capsys):
    machine.fails = {(n, "tensorrt-rtx"): "no kernel for SM 9.0" for n in (1, 8, 32)}
    assert machine.run() == 0  # nobody asked for it
    assert machine.run("--stack", "tensorrt-rtx=python", "--stack", "tensorrt=python") == 1
    result = json.loads(machine.output.read_text())
    for batch in ("1", "8", "32"):
        found = result["batches"][batch]
        assert found["failed"] == {"tensorrt-rtx": "no kernel for SM 9.0"}
        assert "tensorrt" in found["stacks"]
    said = capsys.readouterr()
    assert "tensorrt-rtx at batch 1, tensorrt-rtx at batch 8, tensorrt-rtx at ba" in said.err
    assert "tensorrt at" not in said.err
    assert "failed: no kernel for SM 9.0" in said.out


def test_the_file_is_written_after_each_batch(machine):
    machine.fails = {(8, "export"): "the disk is full"}
    assert machine.run("--stack", "torch=python") == 1
    assert machine.written == [[], ["1"], ["1", "8"]]
    result = json.loads(machine.output.read_text())
    assert result["batches"]["8"] == {"stacks": {}, "failed": {"export": "the disk is full"}}
    assert result["batches"]["32"]["stacks"]


def test_where_nothing_was_timed_nothing_is_written(machine):
    machine.fails = {(1, "export"): "no room", (8, "export"): "no room"}
    with refused(EvidenceError, got="nothing", cause="no room; "):
        machine.run("--batches", "1,8")
    assert not machine.output.exists()


def test_everything_is_set_beside_the_ceiling():
    stacks = {"ceiling": {"median_ms": 2.0, "flops": 4e12}, "tensorrt": {"median_ms": 4.0}}
    gpu_evidence._relate(stacks, batch=8)
    assert stacks["tensorrt"] == {
        "median_ms": 4.0,
        "images_per_s": 2000.0,
        "tflops": 1000.0,
        "share_of_ceiling": 0.5,
    }


# --- the dry run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    # One thread: idle pools of several processes on few cores would time each other.
    options = ("--batches", "2", "--rounds", "2", "--bundles", str(folder / "bundles"))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run("-o", str(folder / "r.json"), "--dry-run-cpu", *options, env=environ)
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "r.json").read_text())


@pytest.mark.slow
def test_a_dry_run_is_labelled_and_complete(dry_run):
    _, done, result = dry_run
    assert result["dry_run"] is True
    assert "says nothing about any GPU" in result["what"]
    assert "says nothing about any GPU" in done.stdout
    assert result["environment"]["packages"]["numpy"]
    assert str(dry_run[0]) not in json.dumps(result)
    found = result["batches"]["2"]
    assert set(found["stacks"]) == {"onnxruntime", "torch-published", "torch-sdpa", "ceiling"}
    assert found["failed"] == {}
    assert len(found["states"]) == 2
    for stack, one in found["stacks"].items():
        assert 0 < one["min_ms"] <= one["median_ms"] <= one["p90_ms"]
        assert len(one["turn_medians_ms"]) == 2
        assert one["calls"] >= 10
        assert one["images_per_s"] == pytest.approx(2000 / one["median_ms"])
        assert one["warm_up_calls"] >= 2
        if stack != "ceiling":
            assert one["agreement"]["passed"] is True
            assert one["agreement"]["kept_disagreements"] == 0


@pytest.mark.slow
def test_a_bundle_that_was_carried_is_used_only_if_it_is_the_right_one(dry_run):
    folder, _, _ = dry_run
    found = plan("--dry-run-cpu")
    assert gpu_evidence.export(found, folder / "bundles" / "batch-2", 2, []) == {"carried": True}
    other = dataclasses.replace(found, export=("--merge", "average", *found.export[2:]))
    with refused(
        EvidenceError, got="'merge': 'sum'", expected="'merge': 'average'", cure="--bundles"
    ):
        gpu_evidence.export(other, folder / "bundles" / "batch-2", 2, [])
    with refused(EvidenceError, got="'batch': 2", expected="'batch': 8"):
        gpu_evidence.export(found, folder / "bundles" / "batch-2", 8, [])


@pytest.mark.slow
def test_a_stack_whose_tokens_differ_is_not_timed(dry_run, paths, tmp_path):
    folder, _, _ = dry_run
    bundle = tmp_path / "bundle"
    shutil.copytree(folder / "bundles" / "batch-2", bundle)
    with np.load(bundle / "reference.npz", allow_pickle=False) as arrays:
        spoiled = dict(arrays)
    spoiled["embeds"] = np.roll(spoiled["embeds"], 1, axis=1)
    np.savez(bundle / "reference.npz", **spoiled)
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / "reference.npz").read_bytes()
    import hashlib

    manifest["files"]["reference.npz"] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    process = worker(paths, bundle)
    with refused(WorkerError, got=("differ from the reference", "passed False")):
        process.ask(120, do="open", batches=[2])
    process.close()


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_an_engine_is_built_proven_and_timed(tmp_path):
    """The whole of it at batch 1, with the stacks of this Python; takes minutes."""
    done = run("-o", str(tmp_path / "r.json"), "--batches", "1", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["dry_run"] is False
    found = result["batches"]["1"]
    engines = {"tensorrt", "tensorrt-rtx"} & set(found["stacks"])
    assert engines, found["failed"]
    for engine in engines:
        assert found["build"][engine]["proof"]["passed"] is True
        assert found["stacks"][engine]["agreement"]["passed"] is True
        assert 0 < found["stacks"][engine]["engine_ms"] < found["stacks"][engine]["median_ms"]
        assert found["stacks"][engine]["on_device_ms"] > 0
    assert {"torch-published", "torch-sdpa", "torch-compile", "ceiling"} <= set(found["stacks"])
