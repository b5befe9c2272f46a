"""The TensorRT backend on a fake GPU (`fake_gpu.py`); `tests/gpu` holds what needs a real one.

What every backend does is in the contract, which `test_tensorrt_contract.py` holds it to.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused
from tests.runtime import fake_gpu
from tests.runtime.fake_gpu import DEVICE, HOST, FakeTensorRt, Install, with_engine
from vzip.runtime import CompressedTokens, VisionEncoder
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.backend import TensorRt
from vzip.runtime.backends.tensorrt.device_array import DeviceArray
from vzip.runtime.bundle.engine_record import EngineBatch, KernelCache
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.bundle.writer import amend_engine
from vzip.runtime.errors import BackendError, BundleError, InvalidInputError, MissingDependencyError

GENERATIONS = ["8.6", "10", "11", "rtx"]
FUSED = {"tiny_bundle": "images", "tiny_static_bundle": "pixel_values"}


class Rig:
    """A bundle with an engine for the fake GPU of a machine, and what it must compute.

    Attributes:
        lost: An error that stays: nothing of the GPU can be given back.
    """

    def __init__(self, folder: Path, golden: dict[str, np.ndarray], trt: FakeTensorRt) -> None:
        self.folder, self.golden, self.trt, self.lib = folder, golden, trt, trt.lib
        self.images = golden["images"]
        self.lost = False

    def open(self, **options: Any) -> VisionEncoder:
        return VisionEncoder.open(self.folder, **options)

    def alone(self) -> TensorRt:
        """Open the backend without an encoder."""
        return TensorRt(read_bundle(self.folder))

    def feeds(self, count: int) -> dict[str, np.ndarray]:
        return {"image": self.images[:count]}

    def run(
        self, encoder: VisionEncoder, count: int, k: int = 0, **options: Any
    ) -> CompressedTokens:
        """Run `count` of the golden inputs from the k-th on, and check what comes."""
        name = FUSED[self.folder.name]
        tokens = encoder.run(self.golden[name][k : k + count], **options)
        self.check(tokens, count, k)
        return tokens

    def check(self, tokens: CompressedTokens, count: int, k: int = 0) -> None:
        assert tokens.kept.dtype == np.int64
        assert np.array_equal(tokens.kept, self.golden["kept"][k : k + count])
        half = tokens.embeds.dtype == np.float16
        error = np.abs(tokens.embeds.astype(np.float64) - self.golden["embeds"][k : k + count])
        assert error.max() <= (1e-2 if half else 1e-5) * np.abs(self.golden["embeds"]).max()
        if tokens.on_device is not None:
            assert np.array_equal(on_host(tokens.on_device), tokens.embeds)

    def recorded(self, run: Callable[[], object]) -> str:
        """Return which CUDA functions something calls, besides those that change nothing."""
        self.lib.fake_record(1)
        run()
        steady = {"cudaGetDevice", "cudaThreadExchangeStreamCaptureMode"}
        return " ".join(c for c in self.lib.fake_calls().decode().split() if c not in steady)

    def held(self) -> tuple[int, int]:
        return self.lib.fake_blocks(HOST | DEVICE), self.lib.fake_handles()


def on_host(array: DeviceArray | None) -> np.ndarray:
    """Read fake device memory, which is the host's."""
    assert array is not None
    array._kind = 1  # DLPack's CPU
    return np.from_dlpack(array).copy()


def backend_of(encoder: VisionEncoder) -> TensorRt:
    opened = encoder._opened
    assert isinstance(opened, TensorRt)
    return opened


Make = Callable[..., Rig]


@pytest.fixture
def make(
    request: pytest.FixtureRequest, golden: dict[str, np.ndarray], install: Install
) -> Iterator[Make]:
    """Return a way to make a rig; when the test ends nothing is left on its GPU."""
    made: list[Rig] = []

    def rig(generation: str = "10", folder: str = "tiny_bundle", **engine: Any) -> Rig:
        made.append(Rig(request.getfixturevalue(folder), golden, install(generation)))
        with_engine(made[-1].folder, generation, **engine)
        return made[-1]

    yield rig
    gc.collect()
    for each in made:
        assert not each.trt.faults
        assert each.lost or each.held() == (0, 0)


@pytest.fixture
def rig(make: Make) -> Rig:
    """TensorRT 10, for which the bundle has an engine."""
    return make()


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("folder", FUSED)
def test_computes_through_copies_engine_and_graph(make: Make, generation: str, folder: str) -> None:
    rig = make(generation, folder)
    with rig.open() as encoder:
        assert encoder.backend == "tensorrt"
        assert backend_of(encoder).engine == "orin"
        for count in (2, 2, 2) if folder == "tiny_static_bundle" else (1, 2, 3, 2, 1, 3):
            rig.run(encoder, count, 1)
        rig.check(encoder.encode(list(rig.images)), 5)
    assert rig.trt.host_code == [False]


def test_the_first_call_is_plain_and_from_the_second_on_a_launch_and_one_copy_do_it_all(
    rig: Rig,
) -> None:
    copies = "cudaMemcpyAsync cudaMemcpyAsync"  # the image and the indices; then the embeddings
    first = (
        f"cudaHostAlloc {copies} cudaMemcpyAsync cudaStreamSynchronize cudaStreamBeginCapture "
        f"{copies} cudaStreamEndCapture cudaGraphInstantiateWithFlags cudaGraphDestroy"
    )
    later = "cudaHostAlloc cudaGraphLaunch cudaMemcpyAsync cudaStreamSynchronize"
    with rig.open(backend="tensorrt") as encoder:
        kept: list[Any] = []
        calls = [
            rig.recorded(lambda count=count: kept.append(rig.run(encoder, count)))  # type: ignore[misc]
            for count in (2, 2, 1, 2)
        ]
        assert calls == [first, later, first, later]
        kept.clear()  # from here on there is memory
        assert "cudaHostAlloc" not in rig.recorded(lambda: rig.run(encoder, 2))
    calls = rig.trt.calls[:6]
    assert calls == ["deserialize", "enqueue", "compute", "capture", "compute", "enqueue"]


def test_an_application_on_another_gpu_keeps_its_own(rig: Rig) -> None:
    rig.lib.fake_device(2, 8, 7)
    with rig.open() as encoder:
        rig.run(encoder, 1)
        device = backend_of(encoder)._cuda
        with device.on_device(1):
            assert rig.recorded(lambda: rig.run(encoder, 1)) == (
                "cudaSetDevice cudaGraphLaunch cudaMemcpyAsync cudaStreamSynchronize cudaSetDevice"
            )
            assert device._get(cuda._int, "cudaGetDevice") == 1


@pytest.mark.slow
def test_an_engine_for_fewer_images_is_run_several_times(make: Make) -> None:
    rig = make(batch=EngineBatch(1, 1, 2))
    with rig.open() as encoder:
        for on_device in (False, True):
            rig.run(encoder, 3, on_device=on_device)


def test_an_engine_for_more_images_than_given_says_so(make: Make) -> None:
    rig = make(batch=EngineBatch(2, 2, 3))
    with rig.open() as encoder:
        for count in (2, 3, 2, 3):
            rig.run(encoder, count)
        with refused(BackendError, got="1 image", expected=("2 to 3", "'orin'")):
            rig.run(encoder, 1)
        # The caller's own error costs nobody a graph.
        for count in (2, 3):
            rig.run(encoder, count)
    assert (rig.trt.calls.count("capture"), rig.trt.calls.count("enqueue")) == (2, 2)


@pytest.mark.slow
def test_8_6_shares_the_profile_among_its_contexts_or_says_that_it_cant(make: Make) -> None:
    rig = make("8.6", shares_profile=False)
    with rig.open() as encoder:
        rig.run(encoder, 1)
        with refused(BackendError, got="Profile 0"):
            rig.run(encoder, 2)
    with_engine(rig.folder, "8.6")
    with rig.open() as encoder:
        for count in (1, 2, 3, 1, 2, 3):
            rig.run(encoder, count)
    assert rig.trt.calls.count("capture") == 4


# Results are in memory that was the GPU's, and the caller's own all the same


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_results_are_not_copied_and_outlive_later_calls_and_close(
    make: Make, generation: str
) -> None:
    rig = make(generation)

    def within(tokens: CompressedTokens) -> bool:
        return bool(rig.lib.fake_within(tokens.embeds.ctypes.data, tokens.embeds.nbytes, HOST))

    encoder = rig.open()
    held = [rig.run(encoder, 2, k) for k in range(4)]
    assert all(map(within, held))
    # No more than four at a time: what comes now is a copy.
    assert not within(rig.run(encoder, 2))
    again = held.pop(0).embeds.ctypes.data
    assert rig.run(encoder, 2).embeds.ctypes.data == again
    view = held.pop().embeds[1:, 0]  # a part keeps the whole
    rig.run(encoder, 3)
    encoder.close()
    for k, tokens in enumerate(held, start=1):
        rig.check(tokens, 2, k)
    assert np.allclose(view, rig.golden["embeds"][4:5, 0], rtol=1e-3, atol=1e-4)
    assert rig.lib.fake_blocks(HOST) == 3
    held[0].embeds[:] = 0  # writable, as any array of one's own


def test_eight_threads_get_what_one_gets_and_drop_each_others_results(rig: Rig) -> None:
    encoder = rig.open()
    held: list[Any] = [None] * 6

    def work(thread: int) -> None:
        for turn in range(50):
            k, count = (thread + turn) % 3, 1 + (thread * turn) % 3
            tokens = rig.run(encoder, count, k, on_device=turn % 2 == 0)
            held[(thread + turn) % 6] = tokens, count, k  # and another thread's goes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    encoder.close()
    for tokens, count, k in held:
        rig.check(tokens, count, k)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda place: held.__setitem__(place, None), range(6)))


@pytest.mark.slow
def test_a_launch_is_timed_by_the_gpu(rig: Rig) -> None:
    opened, times = rig.alone(), list[float]()
    opened.run(rig.feeds(2))
    said = rig.recorded(lambda: times.extend(opened.launch_ms(2, 3)))
    assert times == [0.5] * 3  # what the fake's events say
    assert said.count("cudaEventRecord cudaGraphLaunch cudaEventRecord cudaEventSynchronize") == 3
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_layers_are_timed_apart_from_what_runs(make: Make, generation: str) -> None:
    rig = make(generation)
    opened = rig.alone()
    for _ in range(2):  # the second one captures a graph, which must stay without a profiler
        opened.run(rig.feeds(2))
    rig.trt.calls.clear()
    assert opened.layer_ms(2, 3) == [rig.trt.layers] * 3
    assert rig.trt.calls == ["enqueue", "compute"] * 3
    kept = opened.run(rig.feeds(2))["kept_indices"]
    assert np.array_equal(kept, rig.golden["kept"][:2])
    opened.close()


# Tokens that stay on the device


@pytest.mark.slow
def test_tokens_stay_on_the_device_and_are_the_holders_own(rig: Rig) -> None:
    encoder = rig.open()
    tokens = [rig.run(encoder, 2, k, on_device=True) for k in range(3)]
    for each in tokens:
        left = each.on_device
        assert left is not None
        assert left.shape == each.embeds.shape
        interface = left.__cuda_array_interface__
        assert interface["data"] == (left.address, False)
        assert (interface["typestr"], interface["shape"]) == ("<f4", each.embeds.shape)
        assert rig.lib.fake_within(left.address, left.nbytes, DEVICE)
    encoder.close()
    rig.check(tokens[0], 2)  # close leaves it alone
    assert rig.lib.fake_blocks(DEVICE) == 3


def test_memory_for_tokens_is_used_again_and_not_freed(rig: Rig) -> None:
    """cudaFree waits for all that the device does, the language model's work too."""
    with rig.open() as encoder:
        for _ in range(3):
            rig.run(encoder, 2, on_device=True)
        held = rig.held()

        def pictures() -> None:
            for k in range(3):
                tokens = rig.run(encoder, 2, k, on_device=True)
                thread = threading.Thread(target=lambda gone: gone, args=[tokens])
                del tokens
                thread.start()
                thread.join()

        assert not {"cudaMalloc", "cudaFree"} & set(rig.recorded(pictures).split())
        assert rig.held() == held


@pytest.mark.parametrize("anywhere", [False, True])
def test_memory_is_not_written_again_under_work_that_reads_it(rig: Rig, anywhere: bool) -> None:
    """A tensor goes when Python lets go of it, not when the GPU has done what reads it."""
    read: list[np.ndarray] = []
    with rig.open() as encoder:
        for k in range(2):
            rig.run(encoder, 2, k, on_device=True)
        tokens = rig.run(encoder, 2, on_device=True)
        left, expected = tokens.on_device, tokens.embeds.copy()
        assert left is not None
        address, size = left.address, left.nbytes

        @fake_gpu._WORK
        def reader(_: int) -> None:
            read.append(np.frombuffer(ctypes.string_at(address, size), np.float32))

        other = backend_of(encoder)._cuda.stream_create()
        stream = other if anywhere else rig.lib.fake_legacy()
        rig.lib.fake_enqueue(stream, reader, 0)
        if anywhere:
            assert left.__cuda_array_interface__["data"][0] == address
        del tokens, left
        gc.collect()
        later = rig.run(encoder, 2, 1, on_device=True)
        assert not np.array_equal(later.embeds, expected)
        assert len(read) == 1
        assert np.array_equal(read[0], expected.ravel())
        backend_of(encoder)._cuda.stream_destroy(other)


def test_nothing_here_breaks_a_neighbour_s_capture(rig: Rig) -> None:
    """PyTorch captures in the global mode, in which CUDA refuses every thread's allocations."""
    rig.lib.fake_neighbour(1)
    encoder = rig.open()
    for count in (1, 2, 1):
        rig.run(encoder, count, on_device=True)
    gc.collect()
    encoder.close()
    assert rig.lib.fake_spoilt() == 0
    assert rig.held() == (0, 0)


def test_blocks_that_wait_are_given_up_before_memory_is_short(rig: Rig) -> None:
    with rig.open() as encoder:
        kept = [rig.run(encoder, 2, on_device=True) for _ in range(2)]
        rig.run(encoder, 1)
        kept.clear()
        gc.collect()
        blocks = rig.lib.fake_blocks(DEVICE)
        rig.lib.fake_fail(b"cudaMalloc", 0, 2)
        small = rig.run(encoder, 1, on_device=True)  # of another size
        assert rig.lib.fake_blocks(DEVICE) == blocks - 2 + 1
        assert small.on_device is not None
        rig.lib.fake_fail(b"cudaMalloc", 0, 2)
        with refused(BackendError, got="cudaMalloc"):
            kept = [rig.run(encoder, 1, on_device=True) for _ in range(3)]


def test_a_traceback_that_is_kept_does_not_keep_a_context(rig: Rig) -> None:
    """Its frames name what they worked with; a context must go before its scratch memory."""
    encoder = rig.open()
    kept: list[BaseException] = []
    for method in ("execute_async_v3", "set_tensor_address", "create_execution_context"):
        rig.trt.refuse, rig.trt.say = method, "no"
        try:
            rig.run(encoder, 1)
        except BackendError as error:
            kept.append(error)
    opened = backend_of(encoder)
    rig.trt.refuse = ""
    rig.run(encoder, 1)
    rig.trt.refuse = "execute_async_v3"
    try:
        opened.layer_ms(1, 1)
    except BackendError as error:
        kept.append(error)
    encoder.close()
    assert len(kept) == 4
    assert not rig.trt.faults
    assert rig.held() == (0, 0)


def test_a_padded_batch_is_cut_on_the_device_too(make: Make) -> None:
    rig = make("8.6", "tiny_static_bundle")
    with rig.open() as encoder:
        tokens = encoder.encode(rig.images[0], on_device=True)
        assert on_host(tokens.on_device).shape == tokens.embeds.shape == (1, 7, 6)
        rig.check(tokens, 1)
        with refused(InvalidInputError, got="images for 2 calls"):
            encoder.encode(list(rig.images[:3]), on_device=True)


def test_other_backends_leave_nothing_on_a_device(rig: Rig) -> None:
    with rig.open(backend="onnxruntime") as encoder, refused(BackendError, got="'onnxruntime'"):
        rig.run(encoder, 1, on_device=True)


# Failures


@pytest.mark.slow
@pytest.mark.parametrize("step", ["BeginCapture", "EndCapture", "Instantiate", "engine", "invalid"])
def test_a_capture_may_fail_at_any_step_which_is_said_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    fails = {
        "BeginCapture": (b"cudaStreamBeginCapture", 0, 900),
        "EndCapture": (b"cudaMemcpyAsync", 3, 900),  # the first of the captured ones
        "Instantiate": (b"cudaGraphInstantiateWithFlags", 0, 1),
    }
    if step in fails:
        rig.lib.fake_fail(*fails[step])
    run = fake_gpu._Context.execute_async_v3

    def refuse(context: Any, stream: int) -> bool:
        if rig.lib.fake_capturing(stream):
            if step == "invalid":
                rig.lib.fake_break_capture(stream)
            if step == "engine":
                return False
        return run(context, stream)

    monkeypatch.setattr(fake_gpu._Context, "execute_async_v3", refuse)
    with rig.open() as encoder, caplog.at_level(logging.WARNING):
        for count in (1, 1, 2, 3, 2):
            rig.run(encoder, count)
    (record,) = caplog.records
    assert "no CUDA graph could be captured" in record.message
    assert "the engine 'orin' is enqueued plainly" in record.message
    said = {"BeginCapture": "cudaStreamBeginCapture failed with cudaErrorFake (900)"}
    assert said.get(step, "") in record.message
    assert rig.trt.calls.count("enqueue") == 5


@pytest.mark.slow
def test_rtx_is_captured_when_it_says_that_it_can_be(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make("rtx")
    rig.trt.capturable = False
    with rig.open() as encoder, caplog.at_level(logging.WARNING):
        for _ in range(2):
            rig.run(encoder, 1)
        assert caplog.records == []  # it may only be warming up
        for _ in range(3):
            rig.run(encoder, 1)
        assert "capture" not in rig.trt.calls
        rig.trt.capturable = True
        for _ in range(3):
            rig.run(encoder, 1)
    assert (rig.trt.calls.count("capture"), rig.trt.calls.count("enqueue")) == (1, 6)
    (record,) = caplog.records
    assert "after 3 calls that the engine 'orin' can't be captured" in record.message


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["compute", "captured", "left"])
def test_ctrl_c_in_a_call_leaves_nothing_running(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    encoder = rig.open()
    if moment == "captured":
        rig.run(encoder, 2)
    real, interrupt = cuda.Cuda.stream_synchronize, True

    def interrupted(self: cuda.Cuda, stream: int) -> None:
        nonlocal interrupt
        if interrupt:
            interrupt = False
            raise KeyboardInterrupt  # before the wait: the work is still under way
        real(self, stream)

    monkeypatch.setattr(cuda.Cuda, "stream_synchronize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rig.run(encoder, 2, on_device=moment == "left")
    if moment == "left":
        rig.run(encoder, 2)
    encoder.close()


@pytest.mark.slow
def test_closing_waits_for_what_runs(rig: Rig) -> None:
    opened = rig.alone()
    opened.run(rig.feeds(2))
    opened._launch(opened._prepared[2])  # as a call that was left in the middle
    computed = rig.trt.calls.count("compute")
    assert rig.recorded(opened.close).startswith("cudaStreamSynchronize")
    assert rig.trt.calls.count("compute") == computed + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "warm"),
    [
        *(("cudaMemcpyAsync", False), ("cudaStreamSynchronize", False)),
        *(("cudaGraphLaunch", True), ("cudaStreamSynchronize", True)),
    ],
)
def test_a_call_that_fails_leaves_the_next_one_clean(rig: Rig, function: str, warm: bool) -> None:
    with rig.open() as encoder:
        if warm:
            rig.run(encoder, 2)
        rig.lib.fake_fail(function.encode(), 0, 2)
        with refused(BackendError, got=(function, "(2)")):
            rig.run(encoder, 2)
        rig.lib.fake_fail(b"", 0, 0)
        for count in (2, 2, 1):
            rig.run(encoder, count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "code", "got", "on_device"),
    [
        ("cudaStreamSynchronize", 700, "cudaStreamSynchronize failed with", False),
        ("cudaMalloc", 700, "cudaMalloc failed with", True),
        ("cudaStreamSynchronize", 719, "Code 1: CUDA failure", False),  # TensorRT swallowed it
    ],
)
def test_a_sticky_error_ends_the_encoder_and_every_later_call_says_so(
    rig: Rig, function: str, code: int, got: str, on_device: bool
) -> None:
    rig.lost = True
    encoder = rig.open()
    if code == 719:
        rig.trt.refuse, rig.trt.say = "execute_async_v3", "CUDA failure"
    else:
        rig.run(encoder, 1)
    rig.lib.fake_fail(function.encode(), 0, code)
    with refused(BackendError, got=got):
        rig.run(encoder, 1, on_device=on_device)
    rig.trt.refuse = ""
    for later in (False, True, False):
        with refused(BackendError, got="'orin'", cause=f"({code})"):
            rig.run(encoder, 1, on_device=later)
    encoder.close()  # everything fails now, and that is no news
    encoder.close()
    with refused(BackendError, got="the encoder is closed"):
        rig.run(encoder, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("Runtime", "TensorRT 10.3.0.30"),
        ("deserialize_cuda_engine", "the engine"),
        ("create_execution_context", "context"),
        ("set_input_shape", "[1, 16, 16, 3] for image"),
        ("set_tensor_address", "memory for image"),
        ("execute_async_v3", "enqueue"),
    ],
)
def test_what_tensorrt_refuses_is_one_line_with_its_reason(
    make: Make, method: str, what: str
) -> None:
    rig = make("8.6" if method == "create_execution_context" else "10")
    rig.trt.refuse, rig.trt.say = method, "out of\nmemory"
    cause = "NVIDIA driver" if method == "Runtime" else ()
    with refused(BackendError, got=(what, "Code 1: out of memory"), cause=cause) as raised:
        encoder = rig.open()
        rig.run(encoder, 1)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize(("function", "times"), [("cudaMalloc", 4), ("cudaHostAlloc", 3)])
def test_opening_that_fails_leaves_nothing_behind(
    rig: Rig, function: str, times: int, place: int
) -> None:
    rig.lib.fake_fail(function.encode(), place, 2)
    if place < times:
        with refused(BackendError, got="(2): out of memory"):
            rig.open()
    else:
        rig.open().close()


@pytest.mark.slow
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
def test_refuses_an_engine_with_other_tensors(rig: Rig, what: str, value: Any, found: str) -> None:
    rig.trt.spoil[what] = getattr(rig.trt.DataType, value) if isinstance(value, str) else value
    expected = "plain" if what in {"location", "format"} else "image uint8 [batch, 16, 16, 3]"
    with refused(BackendError, got=found, expected=expected):
        rig.open()


# Forks, closing, memory


@pytest.mark.slow
def test_a_fork_is_told_and_frees_nothing(rig: Rig) -> None:
    encoder = rig.open()
    tokens = rig.run(encoder, 1, on_device=True)
    opened, left = backend_of(encoder), tokens.on_device
    assert left is not None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for use in (
                lambda: encoder.run(rig.images[:1]),
                lambda: opened.run(rig.feeds(1)),
                lambda: opened.run_on_device(rig.feeds(1)),
                left.__dlpack__,
            ):
                with refused(BackendError, cause="fork", cure="in this process"):
                    use()
            alive = rig.held()
            encoder.close()
            opened.close()
            del encoder, opened, tokens, left
            gc.collect()
            assert rig.held() == alive
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    rig.run(encoder, 1)
    encoder.close()


def test_an_encoder_that_is_dropped_frees_what_it_held(rig: Rig) -> None:
    encoder = rig.open()
    for _ in range(2):
        rig.run(encoder, 1)


def test_the_backend_itself_can_be_closed_twice_and_not_used_afterwards(rig: Rig) -> None:
    opened = rig.alone()
    opened.close()
    opened.close()
    for use in (
        lambda: opened.run(rig.feeds(1)),
        lambda: opened.run_on_device(rig.feeds(1)),
        lambda: opened.launch_ms(1, 1),
        lambda: opened.layer_ms(1, 1),
    ):
        with refused(BackendError, got="'tensorrt' is closed"):
            use()


@pytest.mark.slow
def test_10000_runs_take_no_memory_and_give_one_result(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is measured is the backend: the fake engine writes what it wrote before.
    with rig.open() as encoder:
        first = rig.run(encoder, 3)
        monkeypatch.setattr(fake_gpu._Context, "compute", lambda self: None)
        encoder.run(rig.images[:3], on_device=True)

        def runs(count: int) -> None:
            for turn in range(count):
                tokens = encoder.run(rig.images[:3], on_device=turn % 2 == 0)
                assert np.array_equal(tokens.embeds, first.embeds)
            rig.trt.calls.clear()
            gc.collect()

        runs(500)
        before, held = resident(), rig.held()
        runs(10_000)
        assert resident() - before < 400_000  # 40 bytes a run
        assert rig.held() == held


# Which engine


def test_rtx_s_kernels_are_kept_by_digest_and_passed_over_when_damaged(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make("rtx")
    with rig.open() as encoder:
        rig.run(encoder, 1)
        kernels = backend_of(encoder).kernels()
    assert kernels == b"kernels of the Fake Orin"
    assert "kernels taken" not in rig.trt.calls
    bundle = read_bundle(rig.folder)
    entry = KernelCache(hashlib.sha256(kernels).hexdigest(), len(kernels))
    record = dataclasses.replace(bundle.manifest.engines["orin"], kernels=entry)
    amend_engine(bundle, "orin", record, kernels)
    file = rig.folder / "engines" / "orin.rtxcache"

    def opened() -> list[str]:
        rig.trt.calls.clear()
        with rig.open() as encoder:
            rig.run(encoder, 1)
        return [call for call in rig.trt.calls if "kernels" in call]

    assert opened() == ["kernels taken"]
    assert not caplog.records
    for spoilt in (b"kernels of the Fake Orim", b"", None):
        file.unlink(missing_ok=True)
        if spoilt is not None:
            file.write_bytes(spoilt)
        caplog.clear()
        assert opened() == []
        assert "compiled anew" in caplog.text


def test_of_several_engines_the_one_that_fits_is_taken(make: Make) -> None:
    rig = make(name="thor", sm=("110",))
    with_engine(rig.folder, "10", name="old", version="10.2.0.19")
    with_engine(rig.folder, "rtx", name="desktop")
    causes = (
        *("'thor' was built for SM 110", "SM 87", "'old' was built with TensorRT 10.2.0.19"),
        *("TensorRT 10.3.0.30", "'tensorrt_rtx'"),
    )
    with refused(BackendError, cause=causes) as raised:
        rig.open(backend="tensorrt")
    assert str(raised.value).count(f"vzip build {rig.folder}") == 2
    with_engine(rig.folder, "10", name="fits")
    with rig.open() as encoder:
        assert backend_of(encoder).engine == "fits"
        assert backend_of(encoder).machine.gpu == "Fake Orin"
    with_engine(rig.folder, "10", name="fits-too")
    for backend in ("auto", "tensorrt"):
        with refused(BackendError, got="2 engines", cure="engine=, one of fits, fits-too"):
            rig.open(backend=backend)
        with rig.open(backend=backend, engine="fits-too") as encoder:
            assert backend_of(encoder).engine == "fits-too"
    with refused(BackendError, got=("'thor'", "SM 110"), expected="SM 87"):
        rig.open(engine="thor")
    with refused(InvalidInputError, got="'x'", expected="desktop, fits, fits-too"):
        rig.open(engine="x")
    with refused(InvalidInputError, got=("engine='fits'", "backend='onnxruntime'")):
        rig.open(backend="onnxruntime", engine="fits")


def test_an_engine_of_another_gpu_of_the_same_sm_runs_with_a_warning(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make(gpu="Another Orin")
    with rig.open() as encoder:
        rig.run(encoder, 1)
    (record,) = caplog.records
    assert "'orin' was tuned for and proven on Another Orin, this is Fake Orin" in record.message
    assert f"vzip build {rig.folder}" in record.message
    caplog.clear()
    with_engine(rig.folder, "10", gpu=None, proof=None)  # ahead of time: for every such GPU
    rig.open().close()
    with_engine(rig.folder, "10")
    rig.open().close()
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
    with refused(BackendError, got="no engine", cure=f"vzip build {tiny_bundle}"):
        VisionEncoder.open(tiny_bundle, backend="tensorrt")
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


@pytest.mark.slow
def test_a_damaged_engine_that_fits_is_an_error_even_for_auto(rig: Rig) -> None:
    path = rig.folder / "engines" / "orin.plan"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with refused(BundleError, got=("'orin'", "SHA-256")):
        rig.open()
    assert rig.trt.calls == []  # TensorRT saw nothing of it


def test_an_engine_of_another_graph_is_refused(rig: Rig) -> None:
    manifest = read_bundle(rig.folder).manifest
    record = dataclasses.replace(manifest.engines["orin"], model_sha256="0" * 64)
    manifest = dataclasses.replace(manifest, engines={"orin": record})
    (rig.folder / "manifest.json").write_bytes(manifest.to_bytes())
    with refused(BackendError, got="SHA-256 000000000000…", expected="model.onnx"):
        rig.open(backend="tensorrt")


def test_a_library_that_is_missing_is_named(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "raise ImportError('libcudnn.so.8: cannot open shared object file')"
    (tmp_path / "tensorrt.py").write_text(said)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(MissingDependencyError, got="libcudnn.so.8"):
        rig.open(backend="tensorrt")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
