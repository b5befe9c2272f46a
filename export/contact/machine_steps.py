"""Steps of first contact that look at the machine; each runs in a process of its own.

A step notes what it finds as it finds it. It raises `NotHereError` for what this machine lacks, and
anything else for what doesn't work.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from vzip.export.contact.notes import Notes, NotHereError
from vzip.runtime.errors import BackendError

PACKAGES: Final = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

_COMMANDS: Final = (
    ("uname", "-a"),
    ("nvpmodel", "-q"),
    ("jetson_clocks", "--show"),
    ("nvidia-smi",),
    ("dpkg-query", "-W", "*nvinfer*", "nvidia-jetpack*", "*cudart*", "*cudnn*"),
    ("ldconfig", "-p"),
)
_FILES: Final = ("/etc/nv_tegra_release", "/proc/driver/nvidia/version", "/proc/meminfo")
_LIBRARIES: Final = ("libcuda", "libcudart", "libnvinfer", "libnvonnx", "libtensorrt")


# What is here


def doctor(notes: Notes) -> None:
    """Note what `vzip doctor --json` says."""
    from vzip.runtime.doctor.environment import environment
    from vzip.runtime.doctor.verdicts import backends

    record = environment()
    notes.note(environment=record)
    notes.note(
        ready=[each.name for each in backends(record) if each.ready],
        state=record.get("state"),
    )


def system(notes: Notes) -> None:
    """Note what the system says of itself: power, packages, drivers, libraries."""
    from vzip.runtime.machine import commands

    for command in _COMMANDS:
        said = commands.ask(*command, limit_s=30)
        if said is not None and command[0] == "ldconfig":
            lines = said.splitlines()
            said = "\n".join(x for x in lines if any(name in x for name in _LIBRARIES))
        notes.note(**{" ".join(command): said})
    for name in _FILES:
        with contextlib.suppress(OSError):
            notes.note(**{name: Path(name).read_text(encoding="utf-8", errors="replace")[:4000]})
    found = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    notes.note(packages=dict(sorted(found.items(), key=lambda pair: str(pair[0]).lower())))


def names(notes: Notes, module: str) -> None:
    """Note every name of TensorRT's Python module; start its runtime and its builder."""
    if importlib.util.find_spec(module) is None:
        raise NotHereError(f"{PACKAGES[module]} is not installed")
    trt = importlib.import_module(module)
    notes.note(version=trt.__version__, file=str(trt.__file__))
    found: dict[str, Any] = {}
    for name, value in vars(trt).items():
        if inspect.isclass(value):
            members = getattr(value, "__members__", None)
            found[name] = (
                {key: int(each) for key, each in members.items()}
                if members is not None
                else [each for each in dir(value) if not each.startswith("__")]
            )
    notes.note(names=found)
    if module == "tensorrt":  # whose 8.6 ends the process with a segmentation fault without a GPU
        need_gpu()
    logger = trt.Logger(trt.Logger.VERBOSE)
    for kind in ("Runtime", "Builder"):
        print(f"starting {module}.{kind}", flush=True)  # noqa: T201  the last line before a crash
        try:
            made = getattr(trt, kind)(logger)
            notes.note(**{kind.lower(): "starts"})
        except TypeError as error:  # pybind: the factory returned nullptr
            notes.note(**{kind.lower(): f"can't be started: {error}"})
            need_gpu()
            raise
        if kind == "Builder":
            flags = ("platform_has_fast_fp16", "platform_has_fast_int8", "num_DLA_cores")
            notes.note(platform={each: getattr(made, each, None) for each in flags})


def need_gpu() -> None:
    """Say that a step can't be taken here, if that is so because there is no NVIDIA driver.

    Raises:
        NotHereError: There is no driver.
        BackendError: There is one, and no GPU that can be used.
    """
    from vzip.runtime.doctor.environment import gpus

    found = gpus()
    if not isinstance(found, str):
        return
    if "libcuda.so.1" in found:
        raise NotHereError(found)
    raise BackendError(f"no GPU can be used: {found}", cure="look at nvidia-smi and dmesg")


def cuda(notes: Notes) -> None:
    """Try what running an engine needs of CUDA: copies, pinned memory, capture, events, failure."""
    from vzip.runtime.backends.tensorrt import cuda as runtime

    need_gpu()
    device = runtime.load()
    notes.note(library=device.path, versions=device.versions(), gpu=device.device_name(),
               sm=device.compute_capability(), memory=device.memory_info())  # fmt: skip
    size = 2**20
    host, there, other = device.host_alloc(size), device.malloc(size), device.malloc(size)
    stream, first, last = device.stream_create(), device.event_create(), device.event_create()
    pattern = bytes(range(256)) * (size // 256)

    def round_trip() -> None:
        device.to_device(there, host, size, stream)
        device.on_to_device(other, there, size, stream)
        device.to_host(host, other, size, stream)

    ctypes.memmove(host, pattern, size)
    round_trip()
    device.stream_synchronize(stream)
    notes.note(copies=ctypes.string_at(host, size) == pattern)
    device.begin_capture(stream)
    round_trip()
    graph = device.end_capture(stream)
    executable = device.instantiate(graph)
    device.graph_destroy(graph)
    ctypes.memmove(host, pattern[::-1], size)
    device.event_record(first, stream)
    for _ in range(10):
        device.launch(executable, stream)
    device.event_record(last, stream)
    device.event_synchronize(last)
    notes.note(capture=ctypes.string_at(host, size) == pattern[::-1],
               graph_ms=device.event_elapsed_ms(first, last) / 10)  # fmt: skip
    try:
        device.malloc(2**50)
        notes.note(out_of_memory="a petabyte was given")
    except runtime.CudaError as error:
        notes.note(out_of_memory=f"{error.code}, sticky {error.sticky}")
    device.free(device.malloc(1))  # the next call is clean
    device.executable_destroy(executable)
    for event in (first, last):
        device.event_destroy(event)
    device.stream_destroy(stream)
    for address in (there, other):
        device.free(address)
    device.host_free(host)
    notes.note(memory_after=device.memory_info())
    if not (notes.found["copies"] and notes.found["capture"]):
        raise BackendError("copies through the GPU don't give what went in")
