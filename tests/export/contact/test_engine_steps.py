"""Steps that only a GPU can take, on the fake one: what they note of an engine."""

from __future__ import annotations

import dataclasses
import enum
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundles import engine_record
from tests.references import with_reference
from tests.refusals import refused
from tests.runtime import fake_gpu
from tests.runtime.fake_gpu import Install
from vzip.export.contact import engine_steps, machine_steps
from vzip.export.contact.notes import Notes, NotHereError
from vzip.runtime.agreement.reference_file import load_reference
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.backend import TensorRt
from vzip.runtime.bundle.engine_record import EngineBatch
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError
from vzip.runtime.files import codec


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine_steps, machine_steps):
        monkeypatch.setattr(module, "need_gpu", lambda: None)
    monkeypatch.setattr(engine_steps, "_CALLS", 8)  # the fake stream holds no more
    monkeypatch.setattr(engine_steps, "_LAYER_CALLS", 5)


@pytest.fixture
def bundle(tiny_bundle: Path, golden: dict[str, np.ndarray]) -> Bundle:
    return with_reference(tiny_bundle, golden)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes.json")


def built(bundle: Bundle, folder: Path) -> Path:
    """Put an engine where the step `build` would."""
    batch = EngineBatch(1, 3, 3)
    plan = fake_gpu.plan_of(bundle, "10", batch=batch)
    record = engine_record(bundle, plan, gpu="Fake Orin", batch=batch)
    (folder / "engines").mkdir(parents=True)
    (folder / "engines" / "first.plan").write_bytes(plan)
    (folder / engine_steps.RECORD).write_text(json.dumps(codec.write(record)))
    return folder


def test_an_engine_is_proven_token_by_token_plainly_and_by_its_graph(
    bundle: Bundle,
    notes: Notes,
    tmp_path: Path,
    install: Install,
) -> None:
    install("10")
    engine_steps.run(notes, str(bundle.path), str(built(bundle, tmp_path / "e")), None, long=True)
    found = json.loads((tmp_path / "notes.json").read_text())
    assert found["proof"]["passed"] is True
    assert found["captured"] == {"1": True, "3": True}
    assert set(found["tokens"]) == {
        f"{way}, batch {size}" for way in ("plain", "graph") for size in (1, 3)
    }
    assert [len(found["tokens"][f"graph, batch {size}"]) for size in (1, 3)] == [5, 5]
    assert [len(found["tokens"][f"plain, batch {size}"]) for size in (1, 3)] == [1, 3]
    for pictures in found["tokens"].values():
        assert all(max(one["error"]) < 1e-4 for one in pictures)
    assert {way: len(times) for way, times in found["launch_ms"].items()} == {
        "graph": 8, "plain": 8,
    }  # fmt: skip
    assert found["slowest"] == [["_gemm_mha_v2", 0.5], ["conv", 0.25]]
    # The fake has no inspector: that is told, and stops nothing.
    assert found["inspector"].startswith("failed")
    assert {"before", "after", "device_memory_after"} <= found.keys()


def test_an_engine_whose_tokens_differ_is_looked_at_and_then_failed(
    bundle: Bundle,
    notes: Notes,
    tmp_path: Path,
    install: Install,
    monkeypatch: Any,
) -> None:
    install("10")
    right = load_reference(bundle)
    wrong = dataclasses.replace(right, embeds=right.embeds[..., ::-1].copy())
    monkeypatch.setattr(engine_steps, "load_reference", lambda _: wrong)
    with refused(BackendError, got="FAILED"):
        engine_steps.run(notes, str(bundle.path), str(built(bundle, tmp_path / "e")), None)
    assert notes.found["proof"]["passed"] is False
    assert len(notes.found["launch_ms"]["plain"]) == 8
    assert "slowest" in notes.found


def test_a_plain_launch_is_none_of_the_graph(
    bundle: Bundle, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10")
    opened = TensorRt(fake_gpu.with_engine(bundle.path, "10"))
    given = {"image": load_reference(bundle).input[:1]}
    for _ in range(2):
        opened.run(given)
    assert opened.captured == {1: True}
    launched: list[int] = []
    launch = cuda.Cuda.launch

    def counted(self: cuda.Cuda, executable: int, stream: int) -> None:
        launched.append(executable)
        launch(self, executable, stream)

    monkeypatch.setattr(cuda.Cuda, "launch", counted)
    assert len(opened.launch_ms(1, 3, plain=True)) == 3
    assert not launched
    assert len(opened.launch_ms(1, 3)) == len(launched) == 3
    opened.close()


def test_a_graph_that_can_t_be_captured_is_noted(
    bundle: Bundle,
    notes: Notes,
    tmp_path: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("10")

    def prohibited(self: cuda.Cuda, _: int) -> None:
        raise self.error("cudaStreamBeginCapture", 900)

    monkeypatch.setattr(cuda.Cuda, "begin_capture", prohibited)
    engine_steps.run(notes, str(bundle.path), str(built(bundle, tmp_path / "e")), None)
    assert set(notes.found["captured"].values()) == {False}
    assert notes.found["proof"]["passed"] is True


def test_an_engine_is_opened_and_closed_many_times(
    bundle: Bundle,
    notes: Notes,
    tmp_path: Path,
    install: Install,
    monkeypatch: Any,
) -> None:
    trt = install("10")
    monkeypatch.setattr(engine_steps, "_OPENINGS", 5)
    monkeypatch.setattr(engine_steps, "_ahead_of_time", lambda: False)
    engine_steps.reopened(notes, str(bundle.path), str(built(bundle, tmp_path / "e")), None)
    assert notes.found["backend"] == "tensorrt"
    assert notes.found["different_results"] == 1
    assert len(notes.found["memory"]) == 5
    assert trt.calls.count("deserialize") == 5


def test_without_an_engine_there_is_nothing_to_run(
    bundle: Bundle, notes: Notes, tmp_path: Path
) -> None:
    with refused(NotHereError, got="no engine"):
        engine_steps.run(notes, str(bundle.path), str(tmp_path), None)


def test_every_name_of_a_tensorrt_is_noted_before_it_is_started(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt: Any = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.__version__, trt.__file__ = "10.3.0", "/home/kowalski/tensorrt.py"
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", {"FP16": 0, "TF32": 7})
    trt.Logger = type("Logger", (), {"VERBOSE": 4, "__init__": lambda self, level: None})
    trt.Runtime = type("Runtime", (), {"__init__": lambda self, logger: None, "load": None})

    class Builder:
        num_DLA_cores = 2  # noqa: N815  TensorRT's

        def __init__(self, logger: object) -> None:
            if failing:
                raise TypeError("factory function returned nullptr")

    failing = False
    trt.Builder = Builder
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    machine_steps.names(notes, "tensorrt")
    assert notes.found["names"]["BuilderFlag"] == {"FP16": 0, "TF32": 7}
    assert "load" in notes.found["names"]["Runtime"]
    assert (notes.found["runtime"], notes.found["builder"]) == ("starts", "starts")
    assert notes.found["platform"]["num_DLA_cores"] == 2
    failing = True  # a driver that is too old
    with pytest.raises(TypeError, match="nullptr"):
        machine_steps.names(notes, "tensorrt")
    assert "nullptr" in notes.found["builder"]

    def absent() -> None:
        raise NotHereError("no NVIDIA driver")

    monkeypatch.setattr(machine_steps, "need_gpu", absent)
    trt.Runtime = None  # must not be started
    with refused(NotHereError, got="no NVIDIA driver"):
        machine_steps.names(notes, "tensorrt")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ends; the fake library's is the machine's."""
    malloc = cuda.Cuda.malloc

    def limited(self: cuda.Cuda, size: int) -> int:
        if size > 2**40:
            raise self.error("cudaMalloc", 2)
        return malloc(self, size)

    monkeypatch.setattr(cuda.Cuda, "malloc", limited)


def test_cuda_is_tried_by_ctypes(notes: Notes, install: Install, full: None) -> None:
    install("10")
    machine_steps.cuda(notes)
    found = notes.found
    assert found["copies"] is True
    assert found["capture"] is True
    assert found["graph_ms"] >= 0
    assert found["out_of_memory"] == "2, sticky False"


def test_cuda_that_copies_wrongly_is_a_failure(
    notes: Notes, install: Install, full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10")
    monkeypatch.setattr(cuda.Cuda, "on_to_device", lambda *_: None)
    with refused(BackendError, got="copies"):
        machine_steps.cuda(notes)
    assert notes.found["copies"] is False


@pytest.mark.parametrize(
    ("said", "kind"),
    [("no NVIDIA driver (no libcuda.so.1)", NotHereError), ("cuInit says 999", BackendError)],
)
def test_a_broken_driver_is_a_failure_and_an_absent_one_is_not(
    said: str, kind: type[BackendError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("vzip.runtime.doctor.environment.gpus", lambda: said)
    with refused(kind, got=said):
        machine_steps.need_gpu()
