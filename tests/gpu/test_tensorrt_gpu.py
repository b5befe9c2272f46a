"""TensorRT on a real GPU, with whatever TensorRT is installed: `VZIP_REQUIRE_GPU=1 pytest -m gpu`.

The contract of backends runs there too: `VZIP_TEST_BACKENDS=tensorrt pytest tests/contract`.
"""

from __future__ import annotations

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.refusals import refused
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest
from vzip.runtime import VisionEncoder
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.backend import TensorRt

pytestmark = pytest.mark.gpu

Golden = dict[str, np.ndarray]


def build(bundle: Path) -> None:
    build_engine(bundle, BuildRequest(name="built"), say=lambda _: None)


def test_cuda_moves_bytes_and_repeats_graphs() -> None:
    device = cuda.load()
    assert device.device_count() >= 1
    assert device.device_name()
    assert int(device.compute_capability()) >= 53
    free, total = device.memory_info()
    assert 0 < free <= total
    stream = device.stream_create()
    host, there, other = device.host_alloc(64), device.malloc(64), device.malloc(64)
    view = np.frombuffer(memoryview((cuda.ctypes.c_char * 64).from_address(host)), np.uint8)
    view[:] = 7
    device.begin_capture(stream)
    device.to_device(there, host, 64, stream)
    device.on_to_device(other, there, 64, stream)
    device.to_host(host, other, 64, stream)
    graph = device.end_capture(stream)
    executable = device.instantiate(graph)
    device.graph_destroy(graph)
    for value in (1, 2, 3):
        view[:] = value
        device.launch(executable, stream)
        device.stream_synchronize(stream)
        assert (view == value).all()
    first, last = device.event_create(), device.event_create()
    device.event_record(first, stream)
    device.event_record(last, stream)
    device.event_synchronize(last)
    assert device.event_elapsed_ms(first, last) >= 0
    for event in (first, last):
        device.event_destroy(event)
    device.executable_destroy(executable)
    device.stream_destroy(stream)
    for address in (there, other):
        device.free(address)
    device.host_free(host)
    with refused(cuda.CudaError, got="cudaErrorMemoryAllocation"):
        device.malloc(2**50)
    device.free(device.malloc(1))  # and the next call is clean


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_static_bundle"])
def test_an_engine_computes_plainly_and_as_a_graph(
    request: pytest.FixtureRequest, golden: Golden, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    build(folder)
    static = kind == "tiny_static_bundle"
    arrays = golden["pixel_values" if static else "images"]
    with VisionEncoder.open(folder, backend="tensorrt") as encoder:
        for count in (2, 2, 2) if static else (1, 2, 3, 2, 1, 3):
            tokens = encoder.run(arrays[:count])
            assert np.array_equal(tokens.kept, golden["kept"][:count])
            error = np.abs(tokens.embeds.astype(np.float64) - golden["embeds"][:count]).max()
            assert error <= (1e-2 if static else 1e-3) * np.abs(golden["embeds"]).max()
        opened = encoder._opened
        assert isinstance(opened, TensorRt)
        captured = [each.executable for each in opened._prepared.values()]
        warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
        # Either every batch size has a graph, or it was said why not.
        assert all(captured) or any("CUDA graph" in each.message for each in warnings)


def test_results_are_the_callers_own_and_outlive_the_encoder(
    tiny_bundle: Path, golden: Golden
) -> None:
    build(tiny_bundle)
    encoder = VisionEncoder.open(tiny_bundle, backend="tensorrt")
    held = [encoder.run(golden["images"][k % 5 : k % 5 + 1]).embeds for k in range(10)]
    copies = [each.copy() for each in held]
    del held[1:3]  # their memory is used again
    encoder.run(golden["images"][:3])
    encoder.close()
    for each, copy in zip(held, [copies[0], *copies[3:]], strict=True):
        assert np.array_equal(each, copy)
    for k in range(5):
        assert np.array_equal(copies[k], copies[k + 5])


def test_a_launch_is_timed_by_events(tiny_bundle: Path, golden: Golden) -> None:
    build(tiny_bundle)
    with VisionEncoder.open(tiny_bundle, backend="tensorrt") as encoder:
        for _ in range(3):
            encoder.run(golden["images"][:2])
        opened = encoder._opened
        assert isinstance(opened, TensorRt)
        assert all(0 < each < 100 for each in opened.launch_ms(2, 10))


def test_torch_takes_tokens_from_the_device_without_a_copy(
    tiny_bundle: Path, golden: Golden
) -> None:
    import torch

    build(tiny_bundle)
    with VisionEncoder.open(tiny_bundle, backend="tensorrt") as encoder:
        tokens = encoder.run(golden["images"][:3], on_device=True)
        left = tokens.on_device
        assert left is not None
        tensor, same = torch.from_dlpack(left), torch.as_tensor(left, device="cuda")
        assert tensor.device.type == "cuda"
        assert tensor.data_ptr() == same.data_ptr() == left.address
        encoder.run(golden["images"][2:5])  # a later call leaves it alone
    del left
    expected = tokens.embeds.copy()
    del tokens
    gc.collect()
    assert np.array_equal(tensor.cpu().numpy(), expected)  # so does closing
    assert np.array_equal(same.cpu().numpy(), expected)


def test_threads_share_an_engine(tiny_bundle: Path, golden: Golden) -> None:
    build(tiny_bundle)
    with VisionEncoder.open(tiny_bundle, backend="tensorrt") as encoder:
        alone = [encoder.run(golden["images"][k : k + 1]).embeds for k in range(5)]

        def work(thread: int) -> None:
            for turn in range(50):
                k = (thread + turn) % 5
                assert np.array_equal(encoder.run(golden["images"][k : k + 1]).embeds, alone[k])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


def test_10000_runs_take_no_device_memory(tiny_bundle: Path, golden: Golden) -> None:
    build(tiny_bundle)
    device = cuda.load()
    with VisionEncoder.open(tiny_bundle, backend="tensorrt") as encoder:
        first = encoder.run(golden["images"][:3])
        encoder.run(golden["images"][:3], on_device=True)
        before, _ = device.memory_info()
        for turn in range(10_000):
            tokens = encoder.run(golden["images"][:3], on_device=turn % 2 == 0)
            assert np.array_equal(tokens.embeds, first.embeds)
        del tokens
        after, _ = device.memory_info()
    assert before - after < 8 * 2**20  # other processes may use the GPU too
