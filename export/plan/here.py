"""This machine's CPU as a device of `vzip plan`: its ceilings, measured in a few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from vzip.export.hardware import HERE, Device
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine import sensors
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.export.plan.model import PlanModel

_SECONDS: Final = 0.7  # of each measurement
_CHUNKS: Final = 5  # of which the fastest counts: whatever else runs only takes away
_READ_BYTES: Final = 2**28  # beyond every cache


def measure(model: PlanModel) -> Device:
    """Measure products of the encoder's largest matrices, and reading a matrix once.

    Args:
        model: Whose shapes are multiplied.

    Raises:
        InvalidInputError: The size of the memory isn't known here.
    """
    import torch

    from vzip.export.bench.peers.ceiling import fastest_product

    memory = sensors.memory()
    if memory is None:
        raise InvalidInputError(
            f"--target {HERE} needs the size of this machine's memory, which /proc/meminfo "
            "doesn't say here",
            cure="name another device",
        )
    tower = model.vision.tower
    work = 2 * tower.tokens * tower.hidden_size * tower.intermediate_size
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sizes = (1, tower.tokens, tower.hidden_size, tower.intermediate_size)
        rates[name] = work / _seconds(fastest_product(dtype, sizes, "cpu").multiply) / 1e12
    vector = torch.randn(1, 4096, dtype=torch.bfloat16)
    matrix = torch.ones(_READ_BYTES // 2 // 4096, 4096, dtype=torch.bfloat16)  # as weights lie
    read = partial(torch.nn.functional.linear, vector, matrix)
    bandwidth = _READ_BYTES / _seconds(read) / 1e9
    return Device(
        name=HERE,
        title=f"{sensors.processor() or 'a CPU'}, {counted(torch.get_num_threads(), 'thread')}",
        memory_gb=memory.total * 2**20 / 1e9,
        tflops=MappingProxyType(rates),
        bandwidth_gb=bandwidth,
        source=f"PyTorch or ONNX Runtime, measured now at a load of {os.getloadavg()[0]:.1f}",
    )


def _seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one call, after one that isn't counted."""
    call()
    fastest, calls = float("inf"), 1
    end = time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken = time.perf_counter() - start
        fastest = min(fastest, taken / calls)
        if start + taken > end:
            return fastest
        calls = max(1, round(calls * _SECONDS / _CHUNKS / taken))
