"""Fixtures that put a fake GPU into this process; see `fake_gpu.py`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from tests.runtime import fake_gpu
from tests.runtime.fake_gpu import FakeTensorRt, Install
from vzip.runtime.backends.tensorrt import cuda


@pytest.fixture(scope="session")
def cudart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_gpu.compile_cudart(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def install(cudart: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a way to put a GPU and a TensorRT of some generation into this process."""
    gc.collect()  # encoders that earlier tests left open
    lib = fake_gpu.library(cudart)
    monkeypatch.setattr(cuda, "candidates", lambda: iter([str(cudart)]))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it weren't installed

    def put(generation: str) -> FakeTensorRt:
        trt = FakeTensorRt(lib, generation)
        monkeypatch.setitem(sys.modules, trt.__name__, trt)
        return trt

    return put
