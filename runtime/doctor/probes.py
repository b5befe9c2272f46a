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
    """Version of TensorRT, and the distribution that it comes from where that names its CUDA."""
    return _bindings("tensorrt")


def tensorrt_rtx() -> Answer:
    """The same of TensorRT-RTX, and the compute capabilities that it knows."""
    answer = _bindings("tensorrt_rtx")
    enumeration = getattr(importlib.import_module("tensorrt_rtx"), "ComputeCapability", None)
    names = [name for name in getattr(enumeration, "__members__", ()) if name.startswith("SM")]
    return {**answer, "sm": sorted((name[2:] for name in names), key=int)} if names else answer


def _bindings(name: str) -> Answer:
    from vzip.runtime.backends.tensorrt.bindings import distribution_of

    answer: Answer = {"version": importlib.import_module(name).__version__}
    if (distribution := distribution_of(name)) is not None:
        answer["distribution"] = distribution
    return answer


def tensorrt_runtime() -> Answer:
    """Whether TensorRT starts: the cheapest proof that driver and library fit together."""
    return _started("tensorrt")


def tensorrt_rtx_runtime() -> Answer:
    """Whether TensorRT-RTX starts."""
    return _started("tensorrt_rtx")


def _started(name: str) -> Answer:
    if not driver().get("gpus"):
        return {"absent": True}  # nothing to start on, which the driver's own answer says
    module: Any = importlib.import_module(name)
    severity, said = module.ILogger.Severity, list[str]()

    class Logger(module.ILogger):  # type: ignore[misc]  # a class of an untyped module
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING):
                said.append(" ".join(message.split()))

    logger = Logger()
    try:
        started = module.Runtime(logger) is not None
    except TypeError:  # pybind: the factory returned nullptr
        started = False
    return {"started": True} if started else {"error": (said or ["it gave no reason"])[0]}


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
    return {"cuda": f"{version.value // 1000}.{version.value % 1000 // 10}", "gpus": gpus}


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

    refused: Answer | None = None
    for path in cuda.candidates():
        try:
            library = cuda.Cuda(path)
        except (OSError, AttributeError):
            continue
        found: Answer = {"version": cuda.dotted(library.versions()[0]), "file": path}
        try:
            library.device_count()
        except cuda.CudaError as error:  # an older one may do
            said = f"CUDA {found['version']} ({path}) finds no GPU: {error.got}"
            refused = refused or {**found, "error": said}
            continue
        return found
    absent = "no libcudart in the library path, in this Python's packages or in /usr/local/cuda"
    return refused or {"error": absent}


PROBES: dict[str, tuple[str | None, Callable[[], Answer]]] = {
    "driver": (None, driver),
    "cudart": (None, cudart),
    "tensorrt": ("tensorrt", tensorrt),
    "tensorrt_runtime": ("tensorrt", tensorrt_runtime),
    "tensorrt_rtx": ("tensorrt_rtx", tensorrt_rtx),
    "tensorrt_rtx_runtime": ("tensorrt_rtx", tensorrt_rtx_runtime),
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
