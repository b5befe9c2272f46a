"""Arrays on a device, offered by DLPack; here on the host's memory, as DLPack's CPU."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

from vzip.runtime.backends.tensorrt import device_array
from vzip.runtime.backends.tensorrt.device_array import CPU, DeviceArray
from vzip.runtime.errors import BackendError

SHAPE = (2, 3, 4)


class Memory:
    """Stands in for what lends device memory; says what came back."""

    def __init__(self, dtype: str = "float32") -> None:
        self.data = np.arange(24, dtype=dtype).reshape(SHAPE)
        self.freed: list[int] = []

    def array(self, kind: int = CPU) -> DeviceArray:
        address = self.data.ctypes.data
        return DeviceArray(self, address, SHAPE, self.data.dtype.name, kind)

    def take_back(self, address: int, *, any_stream: bool) -> None:
        self.freed.append(address)
        self.any_stream = any_stream


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_consumer_sees_the_memory_itself(dtype: str) -> None:
    memory = Memory(dtype)
    view = np.from_dlpack(memory.array())
    assert view.dtype == dtype
    assert view.shape == SHAPE
    assert view.strides == memory.data.strides
    assert view.ctypes.data == memory.data.ctypes.data
    memory.data[1, 2, 3] = 99
    assert view[1, 2, 3] == 99


@pytest.mark.slow
def test_memory_is_freed_once_when_the_last_one_lets_go() -> None:
    memory = Memory()
    array = memory.array()
    one, other = np.from_dlpack(array), np.from_dlpack(array)
    del array, one
    gc.collect()
    assert memory.freed == []
    part = other[0]
    del other
    gc.collect()
    assert memory.freed == []
    del part
    gc.collect()
    assert memory.freed == [memory.data.ctypes.data]
    assert not device_array._lent


def test_a_capsule_that_nobody_consumes_lets_go() -> None:
    memory = Memory()
    capsule = memory.array().__dlpack__()
    gc.collect()
    assert memory.freed == []
    del capsule
    gc.collect()
    assert len(memory.freed) == 1
    assert not device_array._lent


def test_a_consumer_may_let_go_in_another_thread() -> None:
    memory = Memory()
    views = [np.from_dlpack(memory.array())]
    thread = threading.Thread(target=views.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert len(memory.freed) == 1


def test_many_exchanges_leave_nothing() -> None:
    memory = Memory()
    for _ in range(2000):
        np.from_dlpack(memory.array())
        memory.array().__dlpack__()
    gc.collect()
    assert len(memory.freed) == 4000
    assert not device_array._lent


def test_the_arguments_of_newer_consumers_are_taken() -> None:
    array = Memory().array()
    assert array.__dlpack_device__() == (CPU, 0)
    capsule: Any = array.__dlpack__(stream=1, max_version=(1, 1), dl_device=(CPU, 0), copy=False)
    assert "dltensor" in repr(capsule)
    for wrong in ({"copy": True}, {"dl_device": (10, 0)}):
        with pytest.raises(BufferError, match="expected no copy and"):
            array.__dlpack__(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stream", "any_stream"), [(None, False), (1, False), (2, True), (-1, True), (0x7F00, True)]
)
def test_whether_it_went_to_another_stream_than_the_default_one_is_told(
    stream: int | None, any_stream: bool
) -> None:
    memory = Memory()
    memory.array().__dlpack__(stream=stream)
    gc.collect()
    assert memory.any_stream == any_stream


def test_the_array_interface_names_no_stream() -> None:
    memory = Memory()
    assert memory.array(device_array.CUDA).__cuda_array_interface__
    gc.collect()
    assert memory.any_stream


def test_the_array_interface() -> None:
    memory = Memory("float16")
    array = memory.array(device_array.CUDA)
    assert array.__cuda_array_interface__ == {
        "shape": SHAPE,
        "typestr": "<f2",
        "data": (memory.data.ctypes.data, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    assert array.__dlpack_device__() == (device_array.CUDA, 0)
    assert array.nbytes == memory.data.nbytes
    assert repr(array).startswith("DeviceArray(float16 [2, 3, 4] at 0x")
    array.keep_rows(1)
    assert array.shape == (1, 3, 4)


def test_a_device_that_is_gone_does_not_spoil_the_end(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Memory):
        def take_back(self, address: int, *, any_stream: bool) -> None:
            raise BackendError("gone")

    array = Gone().array()
    with caplog.at_level("DEBUG"):
        del array
    assert "could not free an array: gone" in caplog.text
