"""PyTorch takes a device array without a copy, and keeps it alive; here as DLPack's CPU."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import torch

from vzip.runtime.backends.tensorrt import device_array
from vzip.runtime.backends.tensorrt.device_array import CPU, DeviceArray


class Memory:
    def __init__(self) -> None:
        self.data = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
        self.freed = 0

    def take_back(self, address: int, *, any_stream: bool) -> None:
        assert address == self.data.ctypes.data
        self.freed += 1


def test_torch_takes_it_without_a_copy() -> None:
    memory = Memory()
    address = memory.data.ctypes.data
    array = DeviceArray(memory, address, (2, 3, 4), "float16", CPU)
    tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == address
    assert tensor.dtype == torch.float16
    del array
    gc.collect()
    part = tensor[1]
    del tensor
    assert memory.freed == 0
    assert torch.equal(part, torch.from_numpy(memory.data[1].copy()))
    del part
    assert memory.freed == 1
    assert not device_array._lent


def test_a_process_that_ends_with_tensors_alive_ends_well() -> None:
    code = (
        "import numpy as np, torch\n"
        "from vzip.runtime.backends.tensorrt.device_array import CPU, DeviceArray\n"
        "class Memory:\n"
        "    def take_back(self, address, *, any_stream): pass\n"
        "data = np.zeros(24, np.float32)\n"
        "array = DeviceArray(Memory(), data.ctypes.data, (24,), 'float32', CPU)\n"
        "kept = [torch.from_dlpack(array)]\n"
        "kept.append(kept)  # a cycle: destroyed last of all\n"
        "torch.kept = kept"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
