"""Questions that only an import can answer, each asked in a process of its own.

A broken installation of TensorRT, PyTorch or CUDA can crash or hang whoever imports it, so
`vzip.runtime.doctor.environment` runs this file as a script, one probe a time, and survives
either::

    python probes.py torch

It answers with one line of JSON: what it found, ``{"absent": true}`` for a package that is not
installed, or ``{"error": "…"}``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]

# Of CUdevice_attribute: stable numbers of the driver's C interface.
_SM_MAJOR, _SM_MINOR = 75, 76


def onnxruntime() -> Answer:
    """Version and execution providers."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    module = importlib.import_module("onnxruntime")
    return {"version": module.__version__, "providers": module.get_available_providers()}


def torch() -> Answer:
    """Version, the CUDA it was built for, and the GPU it can use."""
    module = importlib.import_module("torch")
    usable = bool(module.cuda.is_available())
    return {
        "version": module.__version__,
        "cuda": module.version.cuda,
        "gpu": module.cuda.get_device_name(0) if usable else None,
    }


def tensorrt() -> Answer:
    """Version of TensorRT."""
    return {"version": importlib.import_module("tensorrt").__version__}


def tensorrt_rtx() -> Answer:
    """Version of TensorRT-RTX."""
    return {"version": importlib.import_module("tensorrt_rtx").__version__}


def driver() -> Answer:
    """GPUs and the newest CUDA that the driver serves, from the driver's own library."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        absent = "No such file" in str(error)
        return {"error": "no NVIDIA driver (no libcuda.so.1)" if absent else str(error)}
    if status := cuda.cuInit(0):
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(name))
        code = name.value.decode() if name.value else str(status)
        return {"error": f"the NVIDIA driver can't be used: cuInit says {code}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = [_gpu(cuda, index) for index in range(count.value)]
    return {"cuda": _cuda_version(version.value), "gpus": gpus}


def _gpu(cuda: ctypes.CDLL, index: int) -> Answer:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _SM_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _SM_MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return {
        "name": name.value.decode(errors="replace"),
        "sm": f"{major.value}{minor.value}",
        "memory_mib": total.value // 2**20,
    }


def cudart() -> Answer:
    """Version and file of the CUDA runtime library that the TensorRT backend takes."""
    from vzip.runtime.backends.tensorrt import cuda

    first: Answer | None = None
    for path in cuda.candidates():
        try:
            library = cuda.Cuda(path)
        except (OSError, AttributeError):
            continue
        found = {"version": _cuda_version(library.versions()[0]), "file": path}
        try:
            library.device_count()
        except cuda.CudaError:
            first = first or found  # it is there, whatever the driver makes of it
            continue
        return found
    absent = "no libcudart in the library path, in this Python's packages or in /usr/local/cuda"
    return first or {"error": absent}


def _cuda_version(number: int) -> str:
    """Return 12060 as ``12.6``."""
    return f"{number // 1000}.{number % 1000 // 10}"


PROBES: dict[str, tuple[str | None, Callable[[], Answer]]] = {
    "driver": (None, driver),
    "cudart": (None, cudart),
    "tensorrt": ("tensorrt", tensorrt),
    "tensorrt_rtx": ("tensorrt_rtx", tensorrt_rtx),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "torch": ("torch", torch),
}
"""Name → the package it imports (None for none), and the function that answers."""


def answer(name: str) -> Answer:
    """Return what one probe finds; whatever an import raises becomes its ``error``."""
    package, function = PROBES[name]
    if package is not None and importlib.util.find_spec(package) is None:
        return {"absent": True}
    try:
        return function()
    except BaseException as error:  # noqa: BLE001 - imports raise everything, SystemExit included
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def _main() -> None:
    # As a script, the first entry is this folder, whose modules (errors, images, …) must not stand
    # in for those of other packages.
    sys.path.pop(0)
    out = os.dup(1)
    os.dup2(2, 1)  # what a package prints as it is imported is no answer
    with os.fdopen(out, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(answer(sys.argv[1])) + "\n")
        stream.flush()
        os._exit(0)  # a broken library may crash as it is unloaded; the answer is given


if __name__ == "__main__":
    _main()
