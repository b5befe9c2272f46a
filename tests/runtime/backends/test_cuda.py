"""libcudart by ctypes, on `fake_cudart.c`, and on real libraries where this machine has any."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from tests.runtime import fake_gpu
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.cuda import Cuda, CudaError
from vzip.runtime.errors import BackendError


@pytest.fixture
def lib(cudart: Path) -> Any:
    return fake_gpu.library(cudart)


@pytest.fixture
def fake(cudart: Path, lib: Any) -> Cuda:
    return Cuda(str(cudart))


def test_tells_about_the_device(fake: Cuda, lib: Any) -> None:
    assert fake.device_count() == 1
    assert fake.device_name() == "Fake Orin"
    assert fake.compute_capability() == "87"
    lib.fake_device(1, 12, 0)
    assert fake.compute_capability() == "120"
    assert fake.versions() == (12060, 12080)
    assert fake.memory_info() == (5, 7)


def test_addresses_have_64_bits_and_copies_go_where_they_should(fake: Cuda) -> None:
    stream = fake.stream_create()
    host, device, other = fake.host_alloc(16), fake.malloc(16), fake.malloc(16)
    assert min(host, device, stream) > 2**32  # what a c_int would have cut off
    assert device % 256 == 0
    ctypes.memmove(host, b"0123456789abcdef", 16)
    fake.to_device(device, host, 16, stream)
    fake.on_to_device(other, device, 16, stream)
    fake.stream_synchronize(stream)
    ctypes.memset(host, 0, 16)
    fake.to_host(host, other, 8, stream)
    fake.stream_synchronize(stream)
    assert ctypes.string_at(host, 16) == b"01234567" + bytes(8)
    for wrong in (
        lambda: fake.to_device(host, device, 16, stream),
        lambda: fake.to_host(device, host, 16, stream),
        lambda: fake.on_to_device(device, host, 16, stream),
    ):
        with refused(CudaError, got="cudaMemcpyAsync"):
            wrong()
    fake.free(device)
    fake.free(other)
    fake.host_free(host)
    fake.stream_destroy(stream)


def test_a_graph_repeats_what_was_captured(fake: Cuda, lib: Any) -> None:
    stream, host, device = fake.stream_create(), fake.host_alloc(4), fake.malloc(4)
    fake.begin_capture(stream)
    fake.to_device(device, host, 4, stream)
    graph = fake.end_capture(stream)
    executable = fake.instantiate(graph)
    fake.graph_destroy(graph)
    for text in (b"abcd", b"efgh"):
        ctypes.memmove(host, text, 4)
        fake.launch(executable, stream)
        fake.stream_synchronize(stream)
        assert ctypes.string_at(device, 4) == text
    fake.executable_destroy(executable)
    fake.stream_destroy(stream)
    assert lib.fake_handles() == 0


def test_events_measure_time(fake: Cuda, lib: Any) -> None:
    stream, first, last = fake.stream_create(), fake.event_create(), fake.event_create()
    fake.event_record(first, stream)
    fake.event_record(last, stream)
    fake.event_synchronize(last)
    assert fake.event_elapsed_ms(first, last) == 0.5
    fake.event_destroy(first)
    fake.event_destroy(last)
    fake.stream_destroy(stream)
    assert lib.fake_handles() == 0


def test_every_return_code_is_checked(fake: Cuda, lib: Any) -> None:
    calls: dict[str, Any] = {
        "cudaGetDeviceCount": fake.device_count,
        "cudaGetDevice": lambda: fake.on_device().__enter__(),
        "cudaSetDevice": lambda: fake.on_device(1).__enter__(),
        "cudaGetDeviceProperties": fake.device_name,
        "cudaDeviceGetAttribute": fake.compute_capability,
        "cudaRuntimeGetVersion": fake.versions,
        "cudaDriverGetVersion": fake.versions,
        "cudaMemGetInfo": fake.memory_info,
        "cudaMalloc": lambda: fake.malloc(1),
        "cudaFree": lambda: fake.free(1),
        "cudaHostAlloc": lambda: fake.host_alloc(1),
        "cudaFreeHost": lambda: fake.host_free(1),
        "cudaMemcpyAsync": lambda: fake.to_host(1, 1, 1, 1),
        "cudaStreamCreateWithFlags": fake.stream_create,
        "cudaStreamSynchronize": lambda: fake.stream_synchronize(1),
        "cudaStreamDestroy": lambda: fake.stream_destroy(1),
        "cudaStreamBeginCapture": lambda: fake.begin_capture(1),
        "cudaStreamEndCapture": lambda: fake.end_capture(1),
        "cudaGraphInstantiateWithFlags": lambda: fake.instantiate(1),
        "cudaGraphLaunch": lambda: fake.launch(1, 1),
        "cudaGraphDestroy": lambda: fake.graph_destroy(1),
        "cudaGraphExecDestroy": lambda: fake.executable_destroy(1),
        "cudaThreadExchangeStreamCaptureMode": lambda: fake.relaxed().__enter__(),
        "cudaStreamWaitEvent": lambda: fake.stream_wait_event(1, 1),
        "cudaEventCreateWithFlags": fake.event_create,
        "cudaEventRecord": lambda: fake.event_record(1, 1),
        "cudaEventSynchronize": lambda: fake.event_synchronize(1),
        "cudaEventElapsedTime": lambda: fake.event_elapsed_ms(1, 1),
        "cudaEventDestroy": lambda: fake.event_destroy(1),
    }
    assert set(calls) == set(cuda._SIGNATURES) - {"cudaGetLastError"}
    for name, call in calls.items():
        lib.fake_fail(name.encode(), 0, 2)
        with refused(CudaError, got=(name, "cudaErrorMemoryAllocation (2)")):
            call()
        assert fake.take_last_error() == 0  # or a later, innocent call would report it


@pytest.mark.parametrize(
    ("code", "sticky"), [(2, False), (701, False), (900, False), (700, True), (719, True)]
)
def test_tells_errors_that_pass_from_those_that_stay(
    fake: Cuda, lib: Any, code: int, sticky: bool
) -> None:
    lib.fake_fail(b"cudaMalloc", 0, code)
    with pytest.raises(CudaError) as raised:
        fake.malloc(1)
    assert (raised.value.code, raised.value.sticky) == (code, sticky)
    assert ("can't be used by this process any more" in str(raised.value)) == sticky
    assert "\n" not in str(raised.value)


def test_another_device_is_made_current_for_a_while(fake: Cuda, lib: Any) -> None:
    lib.fake_device(2, 8, 7)
    with fake.on_device(1):
        with fake.on_device(0):
            assert fake._get(ctypes.c_int, "cudaGetDevice") == 0
        assert fake._get(ctypes.c_int, "cudaGetDevice") == 1
    with pytest.raises(KeyError), fake.on_device(1):
        raise KeyError
    assert fake._get(ctypes.c_int, "cudaGetDevice") == 0


# Finding the library


def test_the_first_library_with_a_gpu_is_taken(
    cudart: Path, lib: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "candidates", lambda: iter(["libnone.so", str(cudart)]))
    assert cuda.load().path == str(cudart)
    lib.fake_device(0, 0, 0)
    with refused(CudaError, got="cudaGetDeviceCount", cure="GPU"):
        cuda.load()


def test_a_library_that_is_newer_than_the_driver_has_a_cheap_cure(
    cudart: Path, lib: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's newest libcudart on a driver of CUDA 12, which serves all that is made for CUDA 12."""
    monkeypatch.setattr(cuda, "candidates", lambda: iter([str(cudart)]))
    lib.fake_versions(13000, 12040)
    assert cuda.served() == "12.4"
    lib.fake_fail(b"cudaGetDeviceCount", 0, cuda.INSUFFICIENT_DRIVER)
    with refused(
        CudaError,
        got="CUDA 13.0",
        expected=("CUDA 12", "12.4"),
        cure=("nvidia-cuda-runtime-cu12", "vzip[tensorrt-cu12]"),
    ):
        cuda.load()
    # Without a driver there is none to compare with.
    lib.fake_versions(13000, 0)
    assert cuda.served() is None
    lib.fake_fail(b"cudaGetDeviceCount", 0, cuda.INSUFFICIENT_DRIVER)
    with refused(CudaError, got="cudaGetDeviceCount", cure="no NVIDIA driver"):
        cuda.load()


def test_without_a_library_it_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "candidates", lambda: iter(["libnone.so.1"]))
    with refused(BackendError, expected="libcudart", cure="apt install cuda-cu"):
        cuda.load()
    monkeypatch.setattr(cuda, "candidates", lambda: iter(["libc.so.6"]))
    with refused(BackendError, got=("libc.so.6", "CUDA 11.4")):
        cuda.load()


def test_looks_into_packages_and_toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        tmp_path / "site" / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12",
        tmp_path / "site" / "nvidia" / "cu13" / "lib" / "libcudart.so.13",
        tmp_path / "cuda" / "lib64" / "libcudart.so.11.0",
    ]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = list(cuda.candidates())
    assert found[:4] == list(cuda.SONAMES)
    assert set(map(str, files)) <= set(found)


def test_real_libraries_have_every_function_and_know_the_errors() -> None:
    # Those that this machine has: a GPU isn't needed, and there may be none of them.
    for library in dict.fromkeys(each for each in cuda.candidates() if "/" in each):
        real = Cuda(library)
        runtime, _ = real.versions()
        assert runtime >= 11040
        said = str(real.error("x", 2))
        assert said.startswith("x failed with cudaErrorMemoryAllocation (2): out of memory; ")
        newer = {721} if runtime < 12080 else set()
        unknown = {code for code in cuda.STICKY if real._name(code) == b"unrecognized error code"}
        assert unknown <= newer
