"""The TensorRT backend on a fake GPU (`fake_gpu.py`); `tests/gpu` holds what needs a real one."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused, says
from tests.runtime import fake_gpu
from tests.runtime.fake_gpu import DEVICE, HOST, FakeTensorRt, Install, with_engine
from vzip.runtime import VisionEncoder
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.backend import TensorRt
from vzip.runtime.backends.tensorrt.device_array import DeviceArray
from vzip.runtime.bundle.engine_record import EngineBatch
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BackendError, BundleError, InvalidInputError, MissingDependencyError

Golden = dict[str, np.ndarray]

GENERATIONS = ["8.6", "10", "11", "rtx"]


def check(tokens: Any, golden: Golden, rows: slice) -> None:
    assert tokens.kept.dtype == np.int64
    assert np.array_equal(tokens.kept, golden["kept"][rows])
    half = tokens.embeds.dtype == np.float16
    error = np.abs(tokens.embeds.astype(np.float64) - golden["embeds"][rows]).max()
    assert error <= (1e-2 if half else 1e-5) * np.abs(golden["embeds"]).max()


def backend_of(encoder: VisionEncoder) -> TensorRt:
    opened = encoder._opened
    assert isinstance(opened, TensorRt)
    return opened


def nothing_is_left(trt: FakeTensorRt) -> bool:
    gc.collect()
    assert not trt.faults
    assert trt.lib.fake_blocks(DEVICE) == 0
    assert trt.lib.fake_blocks(HOST) == 0
    return bool(trt.lib.fake_handles() == 0)


@pytest.fixture
def trt(tiny_bundle: Path, install: Install) -> FakeTensorRt:
    """TensorRT 10, for which the bundle has an engine."""
    with_engine(tiny_bundle, "10")
    return install("10")


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_static_bundle"])
def test_computes_through_copies_engine_and_graph(
    request: pytest.FixtureRequest, golden: Golden, install: Install, generation: str, kind: str
) -> None:
    trt, folder = install(generation), request.getfixturevalue(kind)
    with_engine(folder, generation)
    static = kind == "tiny_static_bundle"
    arrays = golden["pixel_values" if static else "images"]
    with VisionEncoder.open(folder) as encoder:
        assert encoder.backend == "tensorrt"
        assert backend_of(encoder).engine == "orin"
        for count in (2, 2, 2) if static else (1, 2, 3, 2, 1, 3):
            check(encoder.run(arrays[1 : 1 + count]), golden, slice(1, 1 + count))
        check(encoder.encode(list(golden["images"])), golden, slice(5))
    assert trt.host_code == [False]
    assert nothing_is_left(trt)


def test_the_first_call_is_plain_and_from_the_second_on_a_launch_and_one_copy_do_it_all(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    copies = "cudaMemcpyAsync cudaMemcpyAsync"  # the image and the indices; then the embeddings
    with VisionEncoder.open(tiny_bundle, backend="tensorrt") as encoder:
        calls, kept = [], []
        for count in (2, 2, 1, 2):
            trt.lib.fake_record(1)
            kept.append(encoder.run(golden["images"][:count]))
            calls.append(trt.lib.fake_calls().decode().replace("cudaGetDevice ", "").strip())
        first = (
            f"cudaHostAlloc {copies} cudaMemcpyAsync cudaStreamSynchronize cudaStreamBeginCapture "
            f"{copies} cudaStreamEndCapture cudaGraphInstantiateWithFlags cudaGraphDestroy"
        )
        later = "cudaHostAlloc cudaGraphLaunch cudaMemcpyAsync cudaStreamSynchronize"
        assert calls == [first, later, first, later]
        del kept
        trt.lib.fake_record(1)
        encoder.run(golden["images"][:2])  # from here on there is memory
        assert b"cudaHostAlloc" not in trt.lib.fake_calls()
    assert trt.calls[:6] == ["deserialize", "enqueue", "compute", "capture", "compute", "enqueue"]


def test_an_application_on_another_gpu_keeps_its_own(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    trt.lib.fake_device(2, 8, 7)
    with VisionEncoder.open(tiny_bundle) as encoder:
        encoder.run(golden["images"][:1])
        device = backend_of(encoder)._cuda
        with device.on_device(1):
            trt.lib.fake_record(1)
            encoder.run(golden["images"][:1])
            assert trt.lib.fake_calls() == (
                b"cudaGetDevice cudaSetDevice cudaGraphLaunch cudaMemcpyAsync "
                b"cudaStreamSynchronize cudaSetDevice "
            )
            assert device._get(cuda._int, "cudaGetDevice") == 1


def test_an_engine_for_fewer_images_is_run_several_times(
    tiny_bundle: Path, golden: Golden, install: Install
) -> None:
    trt = install("10")
    with_engine(tiny_bundle, "10", batch=EngineBatch(1, 1, 2))
    with VisionEncoder.open(tiny_bundle) as encoder:
        check(encoder.run(golden["images"][:3]), golden, slice(3))
        tokens = encoder.run(golden["images"][:3], on_device=True)
        assert np.array_equal(on_host(tokens.on_device), tokens.embeds)
    del tokens
    assert nothing_is_left(trt)


def test_an_engine_for_more_images_than_given_says_so(
    tiny_bundle: Path, golden: Golden, install: Install
) -> None:
    trt = install("10")
    with_engine(tiny_bundle, "10", batch=EngineBatch(2, 2, 3))
    with VisionEncoder.open(tiny_bundle) as encoder:
        for _ in range(2):
            encoder.run(golden["images"][:2])
            encoder.run(golden["images"][:3])
        with refused(BackendError, got="1 images", expected=("2 to 3", "'orin'")):
            encoder.run(golden["images"][:1])
        check(encoder.run(golden["images"][:2]), golden, slice(2))
        # The caller's own error costs nobody a graph.
        assert trt.calls.count("capture") == 2
        encoder.run(golden["images"][:3])
        assert trt.calls.count("capture") == 2
        assert trt.calls.count("enqueue") == 2


# Batch sizes have contexts of their own


def test_8_6_shares_the_profile_among_its_contexts_or_says_that_it_cant(
    tiny_bundle: Path, golden: Golden, install: Install
) -> None:
    trt = install("8.6")
    with_engine(tiny_bundle, "8.6", shares_profile=False)
    with VisionEncoder.open(tiny_bundle) as encoder:
        check(encoder.run(golden["images"][:1]), golden, slice(1))
        with refused(BackendError, got="Profile 0"):
            encoder.run(golden["images"][:2])
    with_engine(tiny_bundle, "8.6")
    with VisionEncoder.open(tiny_bundle) as encoder:
        for count in (1, 2, 3, 1, 2, 3):
            check(encoder.run(golden["images"][:count]), golden, slice(count))
    assert trt.calls.count("capture") == 4
    assert nothing_is_left(trt)


# Results are in memory that was the GPU's, and the caller's own all the same


@pytest.mark.parametrize("generation", GENERATIONS)
def test_results_are_not_copied_and_outlive_later_calls_and_close(
    tiny_bundle: Path, golden: Golden, install: Install, generation: str
) -> None:
    trt = install(generation)
    with_engine(tiny_bundle, generation)
    encoder = VisionEncoder.open(tiny_bundle)
    held = [encoder.run(golden["images"][k : k + 2]) for k in range(4)]
    for tokens in held:
        assert trt.lib.fake_within(tokens.embeds.ctypes.data, tokens.embeds.nbytes, HOST)
    # No more than four at a time: what comes now is a copy.
    more = encoder.run(golden["images"][:2])
    assert not trt.lib.fake_within(more.embeds.ctypes.data, more.embeds.nbytes, HOST)
    check(more, golden, slice(2))
    again = held.pop(0).embeds.ctypes.data
    assert encoder.run(golden["images"][:2]).embeds.ctypes.data == again
    view = held.pop().embeds[1:, 0]  # a part keeps the whole
    encoder.run(golden["images"][:3])
    encoder.close()
    for k, tokens in enumerate(held, start=1):
        check(tokens, golden, slice(k, k + 2))
    assert np.allclose(view, golden["embeds"][4:5, 0], rtol=1e-3, atol=1e-4)
    assert trt.lib.fake_blocks(HOST) == 3
    held[0].embeds[:] = 0  # writable, as any array of one's own
    del held, tokens, view
    assert nothing_is_left(trt)


def test_results_may_be_dropped_by_any_thread_at_any_time(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)
    held: list[Any] = [None] * 6

    def work(thread: int) -> None:
        for turn in range(50):
            k, count = (thread + turn) % 3, 1 + (thread * turn) % 3
            tokens = encoder.run(golden["images"][k : k + count])
            held[(thread + turn) % 6] = tokens, k, count  # and another thread's goes
            check(tokens, golden, slice(k, k + count))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    encoder.close()
    for tokens, k, count in held:
        check(tokens, golden, slice(k, k + count))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda place: held.__setitem__(place, None), range(6)))
    del tokens
    assert nothing_is_left(trt)


def test_a_launch_is_timed_by_the_gpu(tiny_bundle: Path, golden: Golden, install: Install) -> None:
    trt = install("10")
    opened = TensorRt(with_engine(tiny_bundle, "10"))
    opened.run({"image": golden["images"][:2]})
    trt.lib.fake_record(1)
    assert opened.launch_ms(2, 3) == [0.5] * 3  # what the fake's events say
    said = trt.lib.fake_calls().decode()
    assert said.count("cudaEventRecord cudaGraphLaunch cudaEventRecord cudaEventSynchronize") == 3
    opened.close()
    with refused(BackendError, got="is closed"):
        opened.launch_ms(2, 1)
    assert nothing_is_left(trt)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_layers_are_timed_apart_from_what_runs(
    tiny_bundle: Path, golden: Golden, install: Install, generation: str
) -> None:
    trt = install(generation)
    opened = TensorRt(with_engine(tiny_bundle, generation))
    for _ in range(2):  # the second one captures a graph, which must stay without a profiler
        opened.run({"image": golden["images"][:2]})
    trt.calls.clear()
    assert opened.layer_ms(2, 3) == [trt.layers] * 3
    assert trt.calls == ["enqueue", "compute"] * 3
    kept = opened.run({"image": golden["images"][:2]})["kept_indices"]
    assert np.array_equal(kept, golden["kept"][:2])
    opened.close()
    with refused(BackendError, got="is closed"):
        opened.layer_ms(2, 1)
    assert nothing_is_left(trt)


# Tokens that stay on the device


def on_host(array: DeviceArray | None) -> np.ndarray:
    """Read fake device memory, which is the host's."""
    assert array is not None
    array._kind = 1  # DLPack's CPU
    return np.from_dlpack(array).copy()


def test_tokens_stay_on_the_device_and_are_the_holders_own(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)
    tokens = [encoder.run(golden["images"][k : k + 2], on_device=True) for k in range(3)]
    for k, each in enumerate(tokens):
        check(each, golden, slice(k, k + 2))
        assert each.on_device is not None
        assert each.on_device.shape == each.embeds.shape
        assert np.array_equal(on_host(each.on_device), each.embeds)
        interface = each.on_device.__cuda_array_interface__
        assert interface["data"] == (each.on_device.address, False)
        assert (interface["typestr"], interface["shape"]) == ("<f4", each.embeds.shape)
        assert trt.lib.fake_within(each.on_device.address, each.on_device.nbytes, DEVICE)
    encoder.close()
    assert np.array_equal(on_host(tokens[0].on_device), tokens[0].embeds)  # close leaves it alone
    assert trt.lib.fake_blocks(DEVICE) == 3
    del tokens, each
    assert nothing_is_left(trt)


def test_a_padded_batch_is_cut_on_the_device_too(
    tiny_static_bundle: Path, golden: Golden, install: Install
) -> None:
    install("8.6")
    with_engine(tiny_static_bundle, "8.6")
    with VisionEncoder.open(tiny_static_bundle) as encoder:
        tokens = encoder.encode(golden["images"][0], on_device=True)
        assert on_host(tokens.on_device).shape == tokens.embeds.shape == (1, 7, 6)
        assert np.array_equal(on_host(tokens.on_device), tokens.embeds)
        with refused(InvalidInputError, got="images for 2 calls"):
            encoder.encode(list(golden["images"][:3]), on_device=True)


def test_other_backends_leave_nothing_on_a_device(tiny_bundle: Path, golden: Golden) -> None:
    with (
        VisionEncoder.open(tiny_bundle, backend="onnxruntime") as encoder,
        refused(BackendError, got="'onnxruntime'"),
    ):
        encoder.run(golden["images"][:1], on_device=True)


# Failures


def test_a_graph_that_can_not_be_captured_is_said_once(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt, caplog: pytest.LogCaptureFixture
) -> None:
    trt.lib.fake_fail(b"cudaStreamBeginCapture", 0, 900)
    with VisionEncoder.open(tiny_bundle) as encoder, caplog.at_level(logging.WARNING):
        for count in (1, 1, 2, 3, 2):
            check(encoder.run(golden["images"][:count]), golden, slice(count))
    (record,) = caplog.records
    assert record.message == (
        "no CUDA graph could be captured (cudaStreamBeginCapture failed with cudaErrorFake (900): "
        "a fake error; the next call may succeed; otherwise look at nvidia-smi and dmesg); the "
        "engine 'orin' is enqueued plainly, which costs the host more at each call"
    )
    assert trt.calls.count("enqueue") == 5
    assert nothing_is_left(trt)


@pytest.mark.parametrize("step", ["EndCapture", "Instantiate", "engine", "invalid"])
def test_a_capture_may_fail_at_any_step(
    tiny_bundle: Path,
    golden: Golden,
    install: Install,
    request: pytest.FixtureRequest,
    step: str,
) -> None:
    caplog: pytest.LogCaptureFixture = request.getfixturevalue("caplog")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    trt = install("10")
    with_engine(tiny_bundle, "10")
    if step == "Instantiate":
        trt.lib.fake_fail(b"cudaGraphInstantiateWithFlags", 0, 1)
    elif step == "EndCapture":
        trt.lib.fake_fail(b"cudaMemcpyAsync", 3, 900)  # the first of the captured ones
    run = fake_gpu._Context.execute_async_v3

    def refuse(context: Any, stream: int) -> bool:
        if trt.lib.fake_capturing(stream):
            if step == "invalid":
                trt.lib.fake_break_capture(stream)
            if step == "engine":
                return False
        return run(context, stream)

    monkeypatch.setattr(fake_gpu._Context, "execute_async_v3", refuse)
    with VisionEncoder.open(tiny_bundle) as encoder, caplog.at_level(logging.WARNING):
        for count in (1, 1, 2):
            check(encoder.run(golden["images"][:count]), golden, slice(count))
    assert len(caplog.records) == 1
    assert "no CUDA graph could be captured" in caplog.text
    assert nothing_is_left(trt)


def test_rtx_is_captured_when_it_says_that_it_can_be(
    tiny_bundle: Path, golden: Golden, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    trt = install("rtx")
    with_engine(tiny_bundle, "rtx")
    trt.capturable = False
    with VisionEncoder.open(tiny_bundle) as encoder, caplog.at_level(logging.WARNING):
        for _ in range(2):
            encoder.run(golden["images"][:1])
        assert caplog.records == []  # it may only be warming up
        for _ in range(3):
            encoder.run(golden["images"][:1])
        assert "capture" not in trt.calls
        trt.capturable = True
        for _ in range(3):
            check(encoder.run(golden["images"][:1]), golden, slice(1))
        assert trt.calls.count("capture") == 1
        assert trt.calls.count("enqueue") == 6
    (record,) = caplog.records
    assert (
        "after 3 calls that the engine 'orin' can't be captured in a CUDA graph" in record.message
    )
    assert nothing_is_left(trt)


@pytest.mark.parametrize("moment", ["compute", "captured", "left"])
def test_ctrl_c_in_a_call_leaves_nothing_running(
    tiny_bundle: Path,
    golden: Golden,
    trt: FakeTensorRt,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)
    if moment == "captured":
        encoder.run(golden["images"][:2])
    real, interrupt = cuda.Cuda.stream_synchronize, True

    def interrupted(self: cuda.Cuda, stream: int) -> None:
        nonlocal interrupt
        if interrupt:
            interrupt = False
            raise KeyboardInterrupt  # before the wait: the work is still under way
        real(self, stream)

    monkeypatch.setattr(cuda.Cuda, "stream_synchronize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.run(golden["images"][:2], on_device=moment == "left")
    if moment == "left":
        check(encoder.run(golden["images"][:2]), golden, slice(2))
    encoder.close()
    assert nothing_is_left(trt)


def test_closing_waits_for_what_runs(tiny_bundle: Path, golden: Golden, install: Install) -> None:
    trt = install("10")
    opened = TensorRt(with_engine(tiny_bundle, "10"))
    opened.run({"image": golden["images"][:2]})
    opened._launch(opened._prepared[2])  # as a call that was left in the middle
    computed = trt.calls.count("compute")
    trt.lib.fake_record(1)
    opened.close()
    assert trt.calls.count("compute") == computed + 1
    assert trt.lib.fake_calls().decode().split()[1] == "cudaStreamSynchronize"
    assert nothing_is_left(trt)


def test_a_tensorrt_that_cant_be_started_is_one_line(tiny_bundle: Path, trt: FakeTensorRt) -> None:
    trt.refuse, trt.say = "Runtime", "CUDA initialization\nfailure with error: 35"
    with refused(
        BackendError, got=("TensorRT 10.3.0.30", "error: 35"), cause="NVIDIA driver"
    ) as raised:
        VisionEncoder.open(tiny_bundle)
    assert "\n" not in str(raised.value)
    assert nothing_is_left(trt)


def test_a_sticky_error_of_an_allocation_ends_the_encoder_too(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    with VisionEncoder.open(tiny_bundle) as encoder:
        encoder.run(golden["images"][:1])
        trt.lib.fake_fail(b"cudaMalloc", 0, 700)
        with refused(BackendError, got=("cudaMalloc", "(700)")):
            encoder.run(golden["images"][:1], on_device=True)
        for on_device in (False, True):
            with refused(BackendError, got="'orin'", cause="(700)"):
                encoder.run(golden["images"][:1], on_device=on_device)


@pytest.mark.parametrize(
    ("function", "warm"),
    [
        *(("cudaMemcpyAsync", False), ("cudaStreamSynchronize", False)),
        *(("cudaGraphLaunch", True), ("cudaStreamSynchronize", True)),
    ],
)
def test_a_call_that_fails_leaves_the_next_one_clean(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt, function: str, warm: bool
) -> None:
    with VisionEncoder.open(tiny_bundle) as encoder:
        if warm:
            encoder.run(golden["images"][:2])
        trt.lib.fake_fail(function.encode(), 0, 2)
        with refused(BackendError, got=(function, "(2)")):
            encoder.run(golden["images"][:2])
        trt.lib.fake_fail(b"", 0, 0)
        for count in (2, 2, 1):
            check(encoder.run(golden["images"][:count]), golden, slice(count))
    assert nothing_is_left(trt)


def test_a_sticky_error_ends_the_encoder_and_every_later_call_says_so(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)
    encoder.run(golden["images"][:1])
    trt.lib.fake_fail(b"cudaStreamSynchronize", 0, 700)
    with refused(BackendError, got=("cudaStreamSynchronize failed with", "700"), cure="again"):
        encoder.run(golden["images"][:1])
    for _ in range(2):
        with refused(BackendError, got="'orin'"):
            encoder.run(golden["images"][:1])
        with refused(BackendError, cause="(700)"):
            encoder.run(golden["images"][:1], on_device=True)
    encoder.close()  # everything fails now, and that is no news
    encoder.close()
    with refused(BackendError, got="the encoder is closed"):
        encoder.run(golden["images"][:1])


def test_a_sticky_error_that_tensorrt_swallowed_is_found(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    with VisionEncoder.open(tiny_bundle) as encoder:
        trt.refuse, trt.say = "execute_async_v3", "CUDA failure"
        trt.lib.fake_fail(b"cudaStreamSynchronize", 0, 719)
        with refused(BackendError, got="Code 1: CUDA failure"):
            encoder.run(golden["images"][:1])
        trt.refuse = ""
        with refused(BackendError, cause="(719)"):
            encoder.run(golden["images"][:1])


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("deserialize_cuda_engine", "the engine"),
        ("create_execution_context", "context"),
        ("set_input_shape", "[1, 16, 16, 3] for image"),
        ("set_tensor_address", "memory for image"),
        ("execute_async_v3", "enqueue"),
    ],
)
def test_what_tensorrt_refuses_is_one_line_with_its_reason(
    tiny_bundle: Path, golden: Golden, install: Install, method: str, what: str
) -> None:
    generation = "8.6" if method == "create_execution_context" else "10"
    trt = install(generation)
    with_engine(tiny_bundle, generation)
    trt.refuse, trt.say = method, "out of\nmemory"
    with (
        refused(BackendError, got=(what, method, "Code 1: out of")) as raised,
        VisionEncoder.open(tiny_bundle) as encoder,
    ):
        encoder.run(golden["images"][:1])
    assert "\n" not in str(raised.value)
    assert nothing_is_left(trt)


@pytest.mark.parametrize("after", range(10))
def test_opening_that_fails_leaves_nothing_behind(
    tiny_bundle: Path, trt: FakeTensorRt, after: int
) -> None:
    function, place = (b"cudaMalloc", after) if after < 5 else (b"cudaHostAlloc", after - 5)
    trt.lib.fake_fail(function, place, 2)
    if place < (4 if after < 5 else 3):
        with refused(BackendError, got="(2): out of memory"):
            VisionEncoder.open(tiny_bundle)
    else:
        VisionEncoder.open(tiny_bundle).close()
    assert nothing_is_left(trt)


@pytest.mark.parametrize(
    ("what", "value", "found"),
    [
        ("image", "FLOAT", "image float32 [-1, 16, 16, 3]"),
        ("image_embeds", "HALF", "image_embeds float16 [-1, 7, 6]"),
        ("kept_indices", "FLOAT", "kept_indices float32 [-1, 4]"),
        ("kept_indices", "BF16", "kept_indices NewDataType.BF16 [-1, 4]"),
        ("location", fake_gpu.TensorLocation.HOST, "image"),
        ("format", fake_gpu.TensorFormat.CHW2, "image as Two wide channel"),
    ],
)
def test_refuses_an_engine_with_other_tensors(
    tiny_bundle: Path, trt: FakeTensorRt, what: str, value: Any, found: str
) -> None:
    trt.spoil[what] = getattr(trt.DataType, value) if isinstance(value, str) else value
    expected = "plain" if what in {"location", "format"} else "image uint8 [batch, 16, 16, 3]"
    with refused(BackendError, got=found, expected=expected):
        VisionEncoder.open(tiny_bundle)
    assert nothing_is_left(trt)


# Threads, forks, closing, memory


def test_eight_threads_get_what_one_gets(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    with VisionEncoder.open(tiny_bundle) as encoder:

        def work(thread: int) -> None:
            for turn in range(25):
                k, count = (thread + turn) % 3, 1 + (thread * turn) % 3
                tokens = encoder.run(golden["images"][k : k + count], on_device=turn % 2 == 0)
                check(tokens, golden, slice(k, k + count))
                if tokens.on_device is not None:
                    assert np.array_equal(on_host(tokens.on_device), tokens.embeds)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    assert nothing_is_left(trt)


def test_closing_while_others_encode_is_an_error_at_worst(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)

    def work(thread: int) -> None:
        for turn in range(10**6):
            if thread == 0 and turn == 20:
                encoder.close()
            try:
                tokens = encoder.run(golden["images"][:2])
            except BackendError as error:
                assert "closed" in str(error)  # noqa: PT017 - others raise
                return
            check(tokens, golden, slice(2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert nothing_is_left(trt)


def test_a_fork_is_told_and_frees_nothing(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)
    tokens = encoder.run(golden["images"][:1], on_device=True)
    opened, left = backend_of(encoder), tokens.on_device
    assert left is not None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for use in (
                lambda: encoder.run(golden["images"][:1]),
                lambda: opened.run({"image": golden["images"][:1]}),
                lambda: opened.run_on_device({"image": golden["images"][:1]}),
                left.__dlpack__,
            ):
                with refused(BackendError, cause="fork", cure="in this process"):
                    use()
            alive = trt.lib.fake_blocks(HOST | DEVICE), trt.lib.fake_handles()
            encoder.close()
            opened.close()
            del encoder, opened, tokens, left
            gc.collect()
            assert (trt.lib.fake_blocks(HOST | DEVICE), trt.lib.fake_handles()) == alive
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    check(encoder.run(golden["images"][:1]), golden, slice(1))
    encoder.close()
    del tokens, left
    assert nothing_is_left(trt)


def test_an_encoder_that_is_dropped_frees_what_it_held(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt
) -> None:
    encoder = VisionEncoder.open(tiny_bundle)
    encoder.run(golden["images"][:1])
    encoder.run(golden["images"][:1])
    del encoder
    assert nothing_is_left(trt)


def test_the_backend_itself_can_be_closed_twice_and_not_used_afterwards(
    tiny_bundle: Path, golden: Golden, install: Install
) -> None:
    trt = install("10")
    opened = TensorRt(with_engine(tiny_bundle, "10"))
    opened.close()
    opened.close()
    for use in (opened.run, opened.run_on_device):
        with refused(BackendError, got="'tensorrt' is closed"):
            use({"image": golden["images"][:1]})
    assert nothing_is_left(trt)


def test_10000_runs_take_no_memory_and_give_one_result(
    tiny_bundle: Path, golden: Golden, trt: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is measured is the backend: the fake engine writes what it wrote before.
    with VisionEncoder.open(tiny_bundle) as encoder:
        first = encoder.run(golden["images"][:3])
        monkeypatch.setattr(fake_gpu._Context, "compute", lambda self: None)
        encoder.run(golden["images"][:3], on_device=True)

        def runs(count: int) -> None:
            for turn in range(count):
                tokens = encoder.run(golden["images"][:3], on_device=turn % 2 == 0)
                assert np.array_equal(tokens.embeds, first.embeds)
            trt.calls.clear()

        runs(500)
        gc.collect()
        before = resident(), trt.lib.fake_blocks(HOST | DEVICE), trt.lib.fake_handles()
        runs(10_000)
        gc.collect()
        assert resident() - before[0] < 400_000  # 40 bytes a run
        assert (trt.lib.fake_blocks(HOST | DEVICE), trt.lib.fake_handles()) == before[1:]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Which engine


def test_groups_are_no_output_of_an_engine(
    tiny_bundle: Path, golden: Golden, install: Install
) -> None:
    install("10")
    with_engine(tiny_bundle, "10")
    with VisionEncoder.open(tiny_bundle) as encoder:
        tokens = encoder.run(golden["images"][:1])
        with refused(BackendError, got="token_weights", cure="--backend onnxruntime"):
            _ = tokens.groups


def test_of_several_engines_the_one_that_fits_is_taken(tiny_bundle: Path, install: Install) -> None:
    install("10")
    with_engine(tiny_bundle, "10", name="thor", sm=("110",))
    with_engine(tiny_bundle, "10", name="old", version="10.2.0.19")
    with_engine(tiny_bundle, "rtx", name="desktop")
    with refused(BackendError, cause=("'thor' was built for SM 110", "SM 87")) as raised:
        VisionEncoder.open(tiny_bundle, backend="tensorrt")
    says(
        raised.value,
        cause=("'old' was built with TensorRT 10.2.0.19", "TensorRT 10.3.0.30", "'tensorrt_rtx'"),
    )
    assert str(raised.value).count(f"vzip build {tiny_bundle}") == 2
    with_engine(tiny_bundle, "10", name="fits")
    with VisionEncoder.open(tiny_bundle) as encoder:
        assert backend_of(encoder).engine == "fits"
        assert backend_of(encoder).machine.gpu == "Fake Orin"
    with_engine(tiny_bundle, "10", name="fits-too")
    for backend in ("auto", "tensorrt"):
        with refused(BackendError, got="2 engines", cure="engine=, one of fits, fits-too"):
            VisionEncoder.open(tiny_bundle, backend=backend)
        with VisionEncoder.open(tiny_bundle, backend=backend, engine="fits-too") as encoder:
            assert backend_of(encoder).engine == "fits-too"
    with refused(BackendError, got=("'thor'", "SM 110"), expected="SM 87"):
        VisionEncoder.open(tiny_bundle, engine="thor")
    with refused(InvalidInputError, got="engine='x'", expected="desktop, fits, fits-too"):
        VisionEncoder.open(tiny_bundle, engine="x")
    with refused(InvalidInputError, got=("engine='fits'", "backend='onnxruntime'")):
        VisionEncoder.open(tiny_bundle, backend="onnxruntime", engine="fits")


def test_an_engine_of_another_gpu_of_the_same_sm_runs_with_a_warning(
    tiny_bundle: Path, golden: Golden, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("10")
    with_engine(tiny_bundle, "10", gpu="Another Orin")
    with VisionEncoder.open(tiny_bundle) as encoder:
        check(encoder.run(golden["images"][:1]), golden, slice(1))
    (record,) = caplog.records
    assert "'orin' was tuned for and proven on Another Orin, this is Fake Orin" in record.message
    assert f"vzip build {tiny_bundle}" in record.message
    caplog.clear()
    with_engine(tiny_bundle, "10", gpu=None, proof=None)  # ahead of time: for every such GPU
    VisionEncoder.open(tiny_bundle).close()
    with_engine(tiny_bundle, "10")
    VisionEncoder.open(tiny_bundle).close()
    assert caplog.records == []


def test_auto_goes_on_where_no_engine_can_run(
    tiny_bundle: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vzip.runtime import backends

    # A copy: putting a deleted key back would leave it at the end, and the order counts.
    without = {name: at for name, at in backends.BACKENDS.items() if name != "onnxruntime-cuda"}
    monkeypatch.setattr(backends, "BACKENDS", without)

    def taken() -> str:
        with VisionEncoder.open(tiny_bundle) as encoder:
            return encoder.backend

    trt = install("10")
    assert taken() == "onnxruntime"  # no engine
    with_engine(tiny_bundle, "10")
    assert taken() == "tensorrt"
    trt.lib.fake_device(0, 0, 0)
    assert taken() == "onnxruntime"  # no GPU
    with refused(BackendError, got=("'tensorrt'", "GPU")):
        VisionEncoder.open(tiny_bundle, backend="tensorrt")
    trt.lib.fake_device(1, 9, 0)
    assert taken() == "onnxruntime"  # another GPU
    trt.lib.fake_device(1, 8, 7)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert taken() == "onnxruntime"  # no TensorRT
    with refused(MissingDependencyError, got="'tensorrt'", cure="JetPack"):
        VisionEncoder.open(tiny_bundle, backend="tensorrt")
    monkeypatch.setattr(cuda, "candidates", lambda: iter(["libnone.so"]))
    assert taken() == "onnxruntime"  # no libcudart


def test_without_engines_the_message_says_how_to_make_one(tiny_bundle: Path) -> None:
    with refused(BackendError, got="no engine", cure=f"vzip build {tiny_bundle}"):
        VisionEncoder.open(tiny_bundle, backend="tensorrt")


def test_a_damaged_engine_that_fits_is_an_error_even_for_auto(
    tiny_bundle: Path, trt: FakeTensorRt
) -> None:
    path = tiny_bundle / "engines" / "orin.plan"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with refused(BundleError, got=("'orin'", "SHA-256")):
        VisionEncoder.open(tiny_bundle)
    assert trt.calls == []  # TensorRT saw nothing of it
    assert nothing_is_left(trt)


def test_an_engine_of_another_graph_is_refused(tiny_bundle: Path, install: Install) -> None:
    install("10")
    bundle = with_engine(tiny_bundle, "10")
    record = dataclasses.replace(bundle.manifest.engines["orin"], model_sha256="0" * 64)
    manifest = dataclasses.replace(bundle.manifest, engines={"orin": record})
    (tiny_bundle / "manifest.json").write_bytes(manifest.to_bytes())
    with refused(BackendError, got="SHA-256 000000000000…", expected="model.onnx"):
        VisionEncoder.open(read_bundle(tiny_bundle), backend="tensorrt")


def test_a_library_that_is_missing_is_named(
    tiny_bundle: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("10")
    with_engine(tiny_bundle, "10")
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libcudnn.so.8: cannot open shared object file')"
    )
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(MissingDependencyError, got="libcudnn.so.8"):
        VisionEncoder.open(tiny_bundle, backend="tensorrt")
