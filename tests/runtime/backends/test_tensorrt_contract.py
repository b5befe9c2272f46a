"""The contract of backends, held by TensorRT on the fake GPU, in each generation's form."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import test_backends
from tests.places import GOLDEN
from tests.runtime.fake_gpu import DEVICE, HOST, Install, with_engine


@pytest.fixture(params=["8.6", "10", "rtx"], autouse=True)
def generation(request: pytest.FixtureRequest, install: Install) -> Iterator[str]:
    trt = install(request.param)
    yield request.param
    gc.collect()
    assert not trt.faults
    assert (trt.lib.fake_blocks(HOST | DEVICE), trt.lib.fake_handles()) == (0, 0)


@pytest.fixture
def backend() -> str:
    return "tensorrt"


@pytest.fixture
def tiny_bundle(tmp_path: Path, generation: str) -> Path:
    return golden_bundle("tiny_bundle", tmp_path, generation)


@pytest.fixture
def tiny_static_bundle(tmp_path: Path, generation: str) -> Path:
    return golden_bundle("tiny_static_bundle", tmp_path, generation)


def golden_bundle(name: str, folder: Path, generation: str) -> Path:
    source, target = GOLDEN / name, folder / name
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    with_engine(target, generation)
    return target


@pytest.mark.slow
class TestContractOnTheFakeGpu(test_backends.TestContract):
    """Every test of the contract but one."""

    BACKENDS = ("tensorrt",)

    # It starts a process, where there is no fake GPU; `test_tensorrt_backend.py` forks this one.
    test_a_fork_is_told_and_neither_hangs_nor_crashes = None  # type: ignore[assignment]
