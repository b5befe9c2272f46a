"""`vzip bench`: what is timed, after what proof, beside what; and what of it is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.faults import fill_disk
from tests.pages import HOSTILE, assert_shut
from tests.places import GOLDEN
from tests.references import with_reference
from tests.refusals import refused
from tests.runtime.fake_gpu import with_engine
from vzip.export.bench import measure as encoder
from vzip.export.bench import output, stacks, worker
from vzip.export.bench.measure import Wanted, bench
from vzip.export.bench.page import page
from vzip.export.bench.processes import Process, WorkerError, profiles, take_turns
from vzip.export.bench.stacks import Stack
from vzip.export.cli import bench as bench_cli
from vzip.export.cli.bench import main
from vzip.export.engines.cpu.making import build_cpu
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine.record import machine

ONNX = Stack("ours", "onnxruntime", "fp32", "fp32", "cpu")


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch):
    """Several processes with pools of their own share the few cores of a test machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the tiny bundle's model is nowhere


def measure(folder: Path, **wanted: Any) -> dict[str, Any]:
    found = Wanted(**{"only": ("onnxruntime:fp32",), "rounds": 2, **wanted})
    return bench({"tiny": read_bundle(folder)}, found, command="vzip bench", say=lambda _: None)


# --- with real workers -----------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_timed_was_proven(tiny_bundle, golden):
    result = measure(with_reference(tiny_bundle, golden).path, batches=(1, 3, 8))
    rows = {(row["stack"], row["batch"]): row for row in result["rows"]}
    for batch in (1, 3):
        row = rows["onnxruntime:fp32", batch]
        assert row["agreement"]["passed"] is True
        assert row["agreement"]["kept_overlap"] == 1
        assert row["agreement"]["runs"] >= 2 * len(golden["images"])
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p99_ms"]
        assert len(row["turn_medians_ms"]) == 2
        assert row["images_per_s"] == pytest.approx(batch / row["median_ms"] * 1000)
        assert row["times_baseline"] == 1
        assert row["peak_host_mib"] > 10
        assert row["open_s"] > 0
        assert row["packages"]["numpy"]
    assert result["baseline"] == "onnxruntime:fp32"
    assert {"cell": "tiny, batch 8", "why": "the bundle takes 1 to 3"} in result["empty"]
    picture = rows["preprocessing:china.jpg", 1]
    assert picture["pixels"] == [640, 427]
    assert ("preprocessing:china.jpg", 3) not in rows  # whatever the batch
    copies = [each for each in result["empty"] if "device" in each["cell"]]
    assert copies == [
        {
            "cell": f"tiny, {name}",
            "why": "there is no GPU: tokens are computed on the host, nothing is copied",
        }
        for name in ("host-to-device", "device-to-host")
    ]
    json.dumps(result, allow_nan=False)
    assert "| onnxruntime:fp32 | " in output.table(result)


@pytest.mark.slow
def test_a_stack_whose_tokens_differ_is_not_timed(tiny_bundle, golden):
    spoiled = np.roll(golden["embeds"].astype(np.float32), 1, axis=1)
    result = measure(with_reference(tiny_bundle, golden, embeds=spoiled).path)
    assert not [row for row in result["rows"] if row["kind"] == "ours"]
    (why,) = (each["why"] for each in result["empty"] if each["cell"] == "tiny, onnxruntime:fp32")
    assert why.startswith("the tokens differ from the reference: images 5")
    assert result["baseline"] is None


def test_a_bundle_without_a_reference_is_an_empty_cell(tiny_bundle):
    result = measure(tiny_bundle)
    assert result["rows"] == []
    (cell,) = result["empty"]
    assert cell["cell"] == "tiny"
    assert "no reference.npz" in cell["why"]


def test_a_worker_that_fails_dies_or_hangs_is_named(tmp_path):
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    for python, limit_s, said in (
        (None, 60, ("BundleError: ", "nowhere")),
        ("/bin/false", 60, ("status 1", "no message")),
        (str(hangs), 0.2, ("no answer",)),
    ):
        process = Process(ONNX, tmp_path / "nowhere", python=python)
        with refused(WorkerError, got=("onnxruntime:fp32", *said)):
            process.ask(limit_s, do="open", batches=[1])
        process.close()
        process.close()


def status(pid: int) -> str:
    """The letter of ps; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for(pid: int, letters: set[str]) -> str:
    for _ in range(200):
        if status(pid) in letters:
            break
        time.sleep(0.05)
    return status(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_waits_stopped_and_still_ends(tmp_path):
    process = Process(ONNX, tmp_path / "nowhere")
    with pytest.raises(WorkerError):
        process.ask(60, do="open", batches=[1])
    pid = process._process.pid
    assert wait_for(pid, {"T"}) == "T"
    with pytest.raises(WorkerError):  # is asked again: goes on
        process.ask(60, do="open", batches=[1])
    assert wait_for(pid, {"T"}) == "T"
    process.close()
    assert status(pid) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children")
def test_a_stopped_worker_ends_with_its_parent(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from vzip.export.bench.processes import Process, WorkerError\n"
        "from vzip.export.bench.stacks import Stack\n"
        "process = Process(Stack('ours', 'onnxruntime', 'fp32', 'fp32', 'cpu'), Path('nowhere'))\n"
        "try:\n    process.ask(60, do='open', batches=[1])\n"
        "except WorkerError:\n    print(process._process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    assert wait_for(pid, {"", "Z"}) in {"", "Z"}


# --- on a GPU that is a fake -------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_is_timed_by_its_own_clock_too(monkeypatch, tiny, install):
    install("10")
    bundle = with_engine(tiny, "10")
    own = {str(each): each for each in stacks.own(bundle)}
    job = {"stack": own["tensorrt:orin"].to_json(), "bundle": str(tiny), "threads": None}
    opened = worker.Worker(job)
    about = opened.answer({"do": "open", "batches": [1, 3]})
    assert about["agreement"]["passed"] is True
    for batch in (1, 3):
        assert opened.answer({"do": "warm", "batch": batch})["warm_up_calls"] >= 2
        turn = opened.answer({"do": "turn", "batch": batch, "calls": 4})
        assert {name: len(times) for name, times in turn.items()} == {
            "ms": 4, "engine_ms": 4, "on_device_ms": 4,
        }  # fmt: skip

    def profile(backend, bundle, rows):
        return SimpleNamespace(to_json=lambda: {"engine": backend.engine, "rows": rows})

    monkeypatch.setattr("vzip.export.inspect.engine_profile.profile_engine", profile)
    assert opened.answer({"do": "profile", "batch": 3}) == {"engine": "orin", "rows": 3}
    opened.timed.encoder.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "copied"), [("host-to-device", 3 * 768), ("device-to-host", 600)])
def test_copies_go_where_they_should(tiny, install, name, copied):
    install("10")
    stack = Stack("phase", name, "", "", "cuda")
    opened = worker.Worker({"stack": stack.to_json(), "bundle": str(tiny), "threads": None})
    opened.answer({"do": "open", "batches": [3]})
    # uint8 [16, 16, 3]; float32 [7, 6] and int64 [4] of each of three images. The fake refuses a
    # wrong direction.
    assert opened.answer({"do": "warm", "batch": 3})["bytes"] == copied
    assert len(opened.answer({"do": "turn", "batch": 3, "calls": 2})["ms"]) == 2


def test_on_a_machine_with_a_gpu_copies_and_its_ceilings_are_timed(monkeypatch, tiny):
    Machine(monkeypatch, memory=10**6)
    result = measure(tiny, only=(), peers=True, device="cuda")
    timed = {row["stack"] for row in result["rows"]}
    assert timed > {"host-to-device", "device-to-host", "ceiling-cuda:fp16", "ceiling:fp32"}
    assert result["baseline"] == "torch-published:fp16"


def test_a_profile_that_fails_costs_no_row(monkeypatch):
    class Fake:
        def __init__(self, name):
            self.stack = Stack("ours", name, "x", "fp16", "cuda")

        def ask(self, limit_s, *, do, batch):
            if self.stack.name != "tensorrt":
                raise AssertionError("only engines have profiles")
            raise WorkerError("tensorrt:x: no profiler here")

    opened: Any = {"a": Fake("onnxruntime-cuda"), "b": Fake("tensorrt")}
    assert profiles(opened, 1) == {"b": {"error": "tensorrt:x: no profiler here"}}


# --- turns, groups, ratios -------------------------------------------------------------------


def test_turns_go_round():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self, limit_s, *, do, batch, calls):
            asked.append(self.name)
            if self.name == "d":
                raise WorkerError("d: died")
            return {"ms": [1.0] * calls}

    calls = dict.fromkeys("abc", 5)
    opened: dict[str, Any] = {name: Fake(name) for name in "abc"}
    failed: dict[str, str] = {}
    said: list[str] = []
    turns, states = take_turns(3, opened, calls, 1, failed, say=said.append)
    assert failed == {}
    assert "".join(asked) == "abcbcacab"
    assert {name: len(found) for name, found in turns.items()} == {"a": 3, "b": 3, "c": 3}
    assert len(states) == 3
    # One that dies leaves the others their turns.
    asked.clear()
    opened["d"], calls["d"] = Fake("d"), 5
    turns, _ = take_turns(3, opened, calls, 1, failed, say=said.append)
    assert failed == {"d": "d: died"}
    assert asked.count("d") == 1
    assert {name: len(found) for name, found in turns.items()} == {"a": 3, "b": 3, "c": 3, "d": 0}
    assert said == ["  d: died"]


class Machine:
    """Stands in for workers: each takes memory, and twice as long in the second group."""

    def __init__(self, monkeypatch, memory, fails=()):
        self.free, self.fails = memory, set(fails)
        self.open: list[str] = []
        self.ever: list[str] = []
        self.most = 0
        machine = self

        class Fake:
            def __init__(self, stack, bundle):
                self.stack, self.gone = stack, False
                machine.open.append(str(stack))
                machine.ever.append(str(stack))
                machine.most = max(machine.most, len(machine.open))

            def ask(self, limit_s, *, do, batches=None, batch=None, calls=0):
                if str(self.stack) in machine.fails:
                    raise WorkerError(f"{self.stack}: BackendError: there is no such device")
                if do == "open":
                    return {"open_s": 1.0}
                if do == "warm":
                    found = {"warm_ms": 500.0, "peak_host_mib": 1000.0, "warm_up_calls": 2}
                    return {**found, "flops": 4e9} if self.stack.kind == "ceiling" else found
                machine.turns += 1
                slow = 2 if machine.turns > machine.slow_after else 1
                return {"ms": [slow * (10.0 if self.stack.kind == "ceiling" else 40.0)] * calls}

            def close(self):
                if not self.gone:
                    machine.open.remove(str(self.stack))
                self.gone = True

        self.turns, self.slow_after = 0, 10**9
        monkeypatch.setattr(encoder, "Process", Fake)
        monkeypatch.setattr(encoder, "available_mib", lambda: self.free - 1000 * len(self.open))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tiny bundle with a reference and an engine for this CPU, which takes long to choose."""
    path = tmp_path_factory.mktemp("built") / "tiny_bundle"
    shutil.copytree(GOLDEN / "tiny_bundle", path)
    with np.load(GOLDEN / "tiny_golden.npz", allow_pickle=False) as arrays:
        with_reference(path, dict(arrays))
    build_cpu(path, "fastest", say=lambda _: None)
    return path


@pytest.fixture
def tiny(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "tiny_bundle"))


def test_what_does_not_fit_into_memory_is_timed_with_the_baseline_again(monkeypatch, tiny):
    machine = Machine(monkeypatch, memory=8600)
    result = measure(tiny, only=(), peers=True)
    assert machine.open == []
    groups: dict[int, list[str]] = {}
    for row in result["rows"]:
        groups.setdefault(row["group"], []).append(row["stack"])
    assert len(groups) > 2
    assert machine.most <= 7  # the next one might take half as much again, and a gigabyte
    for names in groups.values():
        assert {"torch-published:fp32", "ceiling:fp32", "ceiling:bf16", "ceiling:int8"} < {*names}
    timed = [name for names in groups.values() for name in names if not name.startswith("ceiling")]
    others = [name for name in timed if name != "torch-published:fp32"]
    assert len(others) == len(set(others))
    wanted = Wanted(peers=True).stacks(read_bundle(tiny))
    assert {*others} >= {str(each) for each in wanted[1:]} - {"torch-published:fp32"}


def test_ratios_are_of_the_same_group(monkeypatch, tiny):
    """The machine slows down to half in the middle: nothing is said to be slower."""
    machine = Machine(monkeypatch, memory=8600)
    machine.slow_after = 30
    result = measure(tiny, only=(), peers=True, rounds=7)
    ours = [row for row in result["rows"] if row["kind"] in ("ours", "peer")]
    assert {row["median_ms"] for row in ours} >= {40.0, 80.0}
    assert {row["times_baseline"] for row in ours} == {1.0}
    assert {row["share_of_ceiling"] for row in ours if row["device"] == "cpu"} == {0.25}


def test_a_stack_that_fails_is_an_empty_cell_with_its_reason(monkeypatch, tiny):
    Machine(monkeypatch, memory=10**6, fails=["torch-published:fp32", "openvino:bf16"])
    result = measure(tiny, only=(), peers=True)
    why = {each["cell"]: each["why"] for each in result["empty"]}
    assert why["tiny, openvino:bf16"] == "there is no such device"
    assert why["tiny, tensorrt"] == "the bundle has no engine; make one with: vzip build BUNDLE"
    assert result["baseline"] == "torch-published:bf16"  # the next best


def test_what_a_call_costs_beyond_the_gpu():
    turns = [
        {"ms": [3.0, 3.2], "engine_ms": [2.5, 2.7], "on_device_ms": [2.9, 3.0]},
        {"ms": [3.1, 3.3], "engine_ms": [2.6, 2.8], "on_device_ms": [2.8, 3.1]},
    ]
    found = encoder.summary(turns)
    assert found["engine_ms"] == pytest.approx(2.65)
    assert found["host_ms"] == pytest.approx(3.15 - 2.65)
    assert found["on_device_ms"] == pytest.approx(2.95)
    assert "host_ms" not in encoder.summary([{"ms": [1.0]}])


def row(stack: Stack, *turns: float, **more: Any) -> dict[str, Any]:
    found = {
        "stack": str(stack),
        **stack.to_json(),
        **encoder.summary([{"ms": [t]} for t in turns]),
    }
    return {"bundle": "b", "batch": 1, "group": 0, **found, **more}


def test_rows_are_related_to_ceiling_and_baseline():
    base = Stack("peer", "torch-published", "fp32", "fp32", "cpu")
    whole = Stack("peer", "torch-uncompressed", "fp32", "fp32", "cpu")
    rows = [
        row(base, 100.0, 200.0, 400.0),
        row(ONNX, 50.0, 100.0, 200.0),
        row(whole, 60.0, 60.0, 60.0, flops=5e9),
        row(Stack("ours", "onnxruntime", "int8", "int8", "cpu"), 10.0, 10.0, 10.0),
        row(Stack("ceiling", "ceiling", "fp32", "fp32", "cpu"), 40.0, 40.0, 40.0, flops=4e9),
        row(Stack("phase", "preprocessing", "china.jpg", "", "cpu"), 5.0),
    ]
    encoder.relate(rows, str(base))
    ours, uncompressed, int8, phase = rows[1], rows[2], rows[3], rows[5]
    assert ours["times_baseline"] == 2  # in every round, though the machine slowed down
    assert ours["gflop_per_s"] == pytest.approx(40)
    assert ours["share_of_ceiling"] == pytest.approx(0.4)
    assert uncompressed["gflop_per_s"] == pytest.approx(5 / 0.06)  # its own work
    assert int8["share_of_ceiling"] is None  # another precision
    assert "times_baseline" not in phase


def test_slow_calls_get_short_turns():
    assert [encoder._calls(warm) for warm in (1.0, 150.0, 400.0, 3000.0)] == [200, 5, 2, 2]


# --- which stacks ----------------------------------------------------------------------------


def test_the_stacks_of_a_bundle(tiny):
    bundle = read_bundle(tiny)
    own = [str(each) for each in stacks.own(bundle)]
    assert own == ["onnxruntime:fastest", "onnxruntime-cuda:fp32", "onnxruntime:fp32",
                   "pytorch:fp32"]  # fmt: skip
    assert (stacks.own(bundle)[0].form, stacks.own(bundle)[0].device) == ("fastest", "cpu")
    cpu, cuda = ([str(each) for each in stacks.peers(device)] for device in ("cpu", "cuda"))
    assert "torch-sdpa:bf16" in cpu
    assert "torch-sdpa:fp16" in cuda
    assert "openvino:bf16" in cuda  # which has a CPU too
    assert not [each for each in cpu + cuda if "compile" in each]  # which takes minutes
    devices = {each.device for each in stacks.peers("cuda") if each.name == "openvino"}
    assert devices == {"cpu"}
    found = stacks.ceilings(stacks.own(bundle), "cpu")
    assert {str(each) for each in found} == {"ceiling:fp32", "ceiling:int8"}
    assert "ceiling-cuda:fp32" in map(str, stacks.ceilings(stacks.own(bundle), "cuda"))


def test_stacks_by_name(tiny):
    bundle = read_bundle(tiny)
    found = Wanted(only=("onnxruntime", "openvino:bf16")).stacks(bundle)
    assert list(map(str, found)) == ["onnxruntime:fastest", "onnxruntime:fp32", "openvino:bf16"]
    for device, form in (("cpu", "bf16"), ("cuda", "fp16")):
        found = Wanted(only=("torch-compile",), device=device).stacks(bundle)
        assert f"torch-compile:{form}" in map(str, found)
    assert Wanted(only=("torch-compile:fp32",)).stacks(bundle)


# --- what is written -------------------------------------------------------------------------


@pytest.fixture
def result() -> dict[str, Any]:
    described = {
        "name": "<b>", "model": "m & n", "weights": "random", "seed": 0, "precision": "fp32",
        "tokens": 64, "tower_tokens": 577, "dominant": 54, "contextual": 10, "merge": "average",
        "image_size": 336,
    }  # fmt: skip
    more = {"bundle": "<b>", "images_per_s": 1.0, "peak_host_mib": 1234.5, "open_s": 2.0}
    proven = {"agreement": {"kept_overlap": 0.987, "mean_cosine": 0.99912, "passed": True}}
    picture = {"picture": "china.jpg", "pixels": [640, 427]}
    rows = [
        row(Stack("peer", "torch-published", "fp32", "fp32", "cpu"), 200.0, **more, **proven),
        row(ONNX, 100.0, **more, **proven, others_cores=0.25),
        row(Stack("ceiling", "ceiling", "fp32", "fp32", "cpu"), 50.0, flops=2e9, **more),
        row(ONNX, 999.0, **more, **proven, group=1),
        row(Stack("phase", "preprocessing", "china.jpg", "", "cpu"), 5.0, **more, **picture),
    ]
    encoder.relate(rows[:3], "torch-published:fp32")
    return {
        "what": "w", "schema": 1, "command": "vzip bench <b>", "started": "now",
        "environment": machine(), "baseline": "torch-published:fp32", "bundles": [described],
        "rows": rows, "states": [], "empty": [{"cell": "gpu", "why": "none <here> | at all"}],
    }  # fmt: skip


def test_the_table(result):
    lines = output.table(result).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| ceiling:fp32"))
    assert [line.split(" | ")[0] for line in lines[first : first + 3]] == [
        "| ceiling:fp32",
        "| onnxruntime:fp32",
        "| torch-published:fp32",
    ]
    assert lines[first + 1] == (
        "| onnxruntime:fp32 | 100 | 100 | 100 | 100 | 0.00 | 1 | 1.00 | 2.00× | 2.00× | 0.02 | "
        "50% | 0.9870 | 0.999120 | – | 1234 | 2.0 | – | 0.25 |"
    )
    assert lines[first + 3] == ""
    # What was timed at another moment stands apart, and is not related to the baseline of this one.
    assert [line.split(" | ")[0] for line in lines if line.startswith("| onnxruntime:fp32 | 999")]
    assert sum(line.startswith("### <b>: 64 of 577") for line in lines) == 2
    assert "| <b> | preprocessing, china.jpg (640 × 427) | 1 | 5.00 | 5.00 | 5.00 | 1 |" in lines
    assert "| gpu | none <here> \\| at all |" in lines


def test_an_unsteady_run_says_so_in_place_of_its_ratio(result):
    base, ours = result["rows"][:2]
    steady, wild = {"spread": 0.1, "unsteady": False}, {"spread": 0.48, "unsteady": True}
    for theirs, own, times, said in (
        (steady, steady, 6.204, "6.20×"),
        (steady, wild, 6.204, "about 6.2×, unsteady (spread 48%)"),
        (wild, steady, 6.204, "about 6.2×, unsteady (baseline)"),
        (wild, wild, 3277.0, "unsteady (spread 48%)"),
        (wild, wild, 1 / 3277, "unsteady (spread 48%)"),
        (wild, wild, 0.0312, "about 0.031×, unsteady (spread 48%)"),
    ):
        base.update(theirs)
        ours.update(own)
        encoder.relate([base, ours], base["stack"])
        ours["times_baseline"] = times
        assert ours["ratio_unsteady"] is (theirs["unsteady"] or own["unsteady"])
        assert output.ratio(ours) == said
        assert f"| {said} |" in output.table(result)
        assert said in assert_shut(page(result, None)).words
        assert "3277" not in output.table(result)


def test_an_unsteady_share_of_the_ceiling_says_so(result):
    _, ours, ceiling = result["rows"][:3]
    steady, wild = {"spread": 0.1, "unsteady": False}, {"spread": 0.48, "unsteady": True}
    for its, own, part, said in (
        (steady, steady, 0.8, "80%"),
        (steady, wild, 0.8, "about 80%, unsteady (spread 48%)"),
        (wild, steady, 0.8, "about 80%, unsteady (ceiling)"),
        (wild, wild, 327.7, "unsteady (spread 48%)"),
    ):
        ceiling.update(its)
        ours.update(own)
        encoder.relate([ours, ceiling], None)
        ours["share_of_ceiling"] = part
        assert output.share(ours) == said
        assert f"| {said} |" in output.table(result)


def test_the_spread_is_that_of_the_quartiles():
    found = encoder.summary([{"ms": [90.0, 100.0, 110.0]}, {"ms": [100.0]}])
    assert found["spread"] == pytest.approx(0.05)
    assert not found["unsteady"]
    found = encoder.summary([{"ms": [50.0, 100.0, 150.0], "others_cores": [0.5]}])
    assert (found["spread"], found["unsteady"], found["others_cores"]) == (0.5, True, 0.5)


def test_ratios_of_the_best_calls_stand_beside_those_of_medians():
    base = Stack("peer", "torch-published", "fp32", "fp32", "cpu")
    rows = [row(base, 90.0, 120.0, 120.0), row(ONNX, 20.0, 20.0, 20.0)]
    encoder.relate(rows, str(base))
    assert rows[1]["times_baseline"] == 6
    assert rows[1]["times_baseline_best"] == 4.5


def test_a_machine_in_use_is_marked_on_page_and_table_and_said(monkeypatch, tiny, capsys):
    Machine(monkeypatch, memory=10**6)
    monkeypatch.setattr("vzip.export.bench.others._others_now", lambda: 1.5)
    monkeypatch.setattr("vzip.export.bench.others.process.cores", lambda *_: 2)
    options = ["--only", "onnxruntime:fp32", "--json", "--wait", "0.05"]
    assert main([str(tiny), *options], prog="vzip bench") == 0
    said = capsys.readouterr()
    assert "no idle machine" in said.err
    result = json.loads(said.out)
    assert result["before"]["others_cores"] == 1.5
    (warning,) = result["warnings"]
    assert f"**Warning: {warning}.**" in output.table(result)
    assert f"Warning: {warning}." in assert_shut(page(result, None)).words
    assert "warning: " in said.err
    assert dict(output.facts(result))["load before"].startswith("1.5 of 2 cores in use")


def test_progress_is_said_with_the_time_left(monkeypatch, tiny):
    Machine(monkeypatch, memory=10**6)
    said: list[str] = []
    wanted = Wanted(rounds=3)
    bench({"tiny": read_bundle(tiny)}, wanted, command="", say=said.append)
    opened = [line for line in said if line.startswith("tiny: ") and " of " in line]
    count = len(wanted.stacks(read_bundle(tiny))) + 4  # two ceilings, two pictures
    assert [line.partition(f" of {count}")[0][-1] for line in opened][-1] == str(count)
    assert all(" left" in line for line in opened[1:])
    assert [line[:14] for line in said if line.startswith("  round")] == [
        "  round 1 of 3",
        "  round 2 of 3",
    ]


def test_the_page_needs_nothing_else_and_escapes_everything(result):
    result["empty"].append({"cell": HOSTILE, "why": HOSTILE})
    result["command"] = result["bundles"][0]["model"] = HOSTILE
    text = page(result, b"<svg/>")
    read = assert_shut(text)
    assert "<script" not in text
    assert read.words.count(HOSTILE) == 5  # what is empty, the command, a model in two sections
    assert "<b>: 64 of 577 tokens (54 + 10, average), batch 1" in read.words
    assert "none <here> | at all" in read.words
    assert [tag for tag, _ in read.tags].count("img") == 1
    assert [tag for tag, _ in assert_shut(page(result, None)).tags].count("img") == 0


def test_the_plot_is_the_same_each_time(result):
    pytest.importorskip("matplotlib")
    assert output.plot(result, "svg") == output.plot(result, "svg")
    assert output.plot(result, "png").startswith(b"\x89PNG")


def test_a_result_names_no_folder_of_the_machine():
    assert output.without_paths(
        {
            "command": ["--stack", "torch=/home/me/env/bin/python", "--bundles", "/data/b/"],
            "file": "/usr/lib/x86_64-linux-gnu/libcudart.so.12",
            "error": "vzip build in /opt/py: [Errno 2] no '/a/b c'",
            "power": "16.1 W / 72 W",
            "number": 1.5,
        }
    ) == {
        "command": ["--stack", "torch=python", "--bundles", "b"],
        "file": "libcudart.so.12",
        "error": "vzip build in py: [Errno 2] no 'b c'",
        "power": "16.1 W / 72 W",
        "number": 1.5,
    }


def test_a_power_mode_is_among_the_facts(result):
    assert "power mode" not in dict(output.facts(result))
    result["environment"]["power_mode"] = "15W"
    assert ("power mode", "15W") in output.facts(result)


# --- the command -----------------------------------------------------------------------------


def test_the_command_writes_all_of_it(monkeypatch, tiny, tmp_path, capsys):
    Machine(monkeypatch, memory=10**6)
    folder = tmp_path / "out"
    options = ["--only", "onnxruntime:fp32", "--rounds", "2", "--wait", "0", "-o", str(folder)]
    assert main([str(tiny), *options], prog="vzip bench") == 0
    stored = json.loads((folder / "result.json").read_text())
    assert stored["command"].startswith("vzip bench ")
    assert {row["stack"] for row in stored["rows"]} > {"onnxruntime:fp32", "ceiling:fp32"}
    assert (folder / "result.md").read_text() == output.table(stored)
    assert "onnxruntime:fp32" in (folder / "result.html").read_text()
    said = capsys.readouterr()
    assert said.out.startswith(output.table(stored))
    assert "onnxruntime:fp32" in said.err


def test_what_was_measured_is_written_before_it_is_told_and_told_if_it_cant_be_written(
    monkeypatch, result, tiny, tmp_path, capsys
):
    monkeypatch.setattr(encoder, "bench", lambda *_, **__: result)
    folder = tmp_path / "out"
    files = {f"result.{kind}" for kind in ("json", "md", "svg", "png", "html")}

    def broken(*_, **__):
        assert {path.name for path in folder.iterdir()} == files
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(bench_cli, "emit", broken)
        with pytest.raises(BrokenPipeError):
            main([str(tiny), "-o", str(folder)], prog="vzip bench")
    fill_disk(monkeypatch, after=1)  # the trial succeeds
    with refused(InvalidInputError, got="No space left"):
        main([str(tiny), "-o", str(tmp_path / "full")], prog="vzip bench")
    assert output.table(result).splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "left"), [("jinja2", ["md", "png", "svg"]), ("matplotlib", ["html", "md"])]
)
def test_what_cant_be_drawn_is_said_first(
    monkeypatch, result, tiny, tmp_path, *, capsys, package, left
):
    def work(*_, say, **__):
        say("measuring")
        return result

    monkeypatch.setattr(encoder, "bench", work)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(tiny), "-o", str(tmp_path)], prog="vzip bench") == 0
    said = capsys.readouterr().err.splitlines()
    assert package in said[0]
    assert "pip install 'vzip[report]'" in said[0]
    assert said[1] == "measuring"
    written = {path.suffix[1:] for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"json", *left}


def test_where_nothing_could_be_timed_the_status_says_so(tiny_bundle, capsys):
    assert main([str(tiny_bundle), "--wait", "0"], prog="vzip bench") == 1
    assert "no reference.npz" in capsys.readouterr().out


def test_bad_options(tiny):
    for said, *options in (
        ({"got": "--rounds is 0", "expected": "1"}, "--rounds", "0"),
        ({"got": "--only has 'jax'", "expected": "onnxruntime"}, "--only", "jax"),
        ({"got": __file__, "expected": "folder"}, "-o", __file__),
        ({"got": "'1,1'"}, "--batches", "1,1"),
        ({"got": "'-1', expected seconds"}, "--wait=-1"),
        ({"got": "'inf', expected seconds"}, "--wait", "inf"),
        ({"got": "'tiny_bundle'", "cure": "rename"}, str(tiny)),
    ):
        with refused(InvalidInputError, **said):
            main([str(tiny), *options], prog="vzip bench")
