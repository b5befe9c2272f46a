"""CUDA's runtime library by ctypes: what running an engine needs, and nothing else.

No package is needed, so this is the same on a Jetson and in a container. Every call's return code
is checked. The functions and their signatures are the same from CUDA 11.4 to 13; streams and
memory belong to the driver, so it doesn't matter which of several libcudart of a process made them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vzip.runtime.errors import BackendError

SONAMES: Final = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")

STICKY: Final = frozenset({4, 214, 220, 700, 702, 709, 710, *range(714, 720), 721, 999})
"""Errors after which the process can't use the device any more, whatever it calls."""

INSUFFICIENT_DRIVER: Final = 35
_NO_DEVICE = 100
_CURES: Final = {
    2: "the GPU's memory is full (on a Jetson: the machine's; or, if dmesg has NvMap error 12, its "
    "contiguous memory, which the kernel's parameter cma= enlarges): stop what else uses it, or "
    "build with a smaller batch",
    3: "CUDA was in use before this process was forked: start processes with 'spawn'",
    INSUFFICIENT_DRIVER: "there is no NVIDIA driver here, or it is older than this libcudart: "
    "look at nvidia-smi, and update the driver",
    _NO_DEVICE: "no GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES, and give a "
    "container --gpus all (--runtime nvidia on a Jetson)",
}
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_NON_BLOCKING_STREAM, _CAPTURE_THREAD_LOCAL, _CAPTURE_RELAXED = 1, 1, 2
DEFAULT_STREAM: Final = 1
"""cudaStreamLegacy: the default stream of all threads, which is PyTorch's too."""
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapability…
_PROPERTIES_BYTES = 8192  # cudaDeviceProp has 1032 at most; the name comes first in all versions

_pointer, _int, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_out = ctypes.POINTER
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cudaGetDeviceCount": (_out(_int),),
    "cudaGetDevice": (_out(_int),),
    "cudaSetDevice": (_int,),
    "cudaGetDeviceProperties": (_pointer, _int),
    "cudaDeviceGetAttribute": (_out(_int), _int, _int),
    "cudaRuntimeGetVersion": (_out(_int),),
    "cudaDriverGetVersion": (_out(_int),),
    "cudaMemGetInfo": (_out(_size), _out(_size)),
    "cudaGetLastError": (),
    "cudaMalloc": (_out(_pointer), _size),
    "cudaFree": (_pointer,),
    "cudaHostAlloc": (_out(_pointer), _size, ctypes.c_uint),
    "cudaFreeHost": (_pointer,),
    "cudaMemcpyAsync": (_pointer, _pointer, _size, _int, _pointer),
    "cudaStreamCreateWithFlags": (_out(_pointer), ctypes.c_uint),
    "cudaStreamSynchronize": (_pointer,),
    "cudaStreamDestroy": (_pointer,),
    "cudaStreamBeginCapture": (_pointer, _int),
    "cudaStreamEndCapture": (_pointer, _out(_pointer)),
    "cudaThreadExchangeStreamCaptureMode": (_out(_int),),
    "cudaStreamWaitEvent": (_pointer, _pointer, ctypes.c_uint),
    "cudaGraphInstantiateWithFlags": (_out(_pointer), _pointer, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_pointer, _pointer),
    "cudaGraphDestroy": (_pointer,),
    "cudaGraphExecDestroy": (_pointer,),
    "cudaEventCreateWithFlags": (_out(_pointer), ctypes.c_uint),
    "cudaEventRecord": (_pointer, _pointer),
    "cudaEventSynchronize": (_pointer,),
    "cudaEventElapsedTime": (_out(ctypes.c_float), _pointer, _pointer),
    "cudaEventDestroy": (_pointer,),
}


class CudaError(BackendError):
    """A call of CUDA that failed.

    Attributes:
        code: CUDA's number, `cudaError_t`.
        sticky: Whether every later call of this process will fail too.
    """

    def __init__(
        self, got: str, *, expected: str = "", cause: str = "", cure: str = "", code: int = 0
    ) -> None:
        super().__init__(got, expected=expected, cause=cause, cure=cure)
        self.code = code
        self.sticky = code in STICKY


class Cuda:
    """A libcudart; addresses, streams, graphs and events are plain integers.

    Attributes:
        path: Where it was found, as it was given to the loader.
    """

    def __init__(self, path: str) -> None:
        """Load a library.

        Raises:
            OSError: It isn't there, or isn't one for this machine.
            AttributeError: A function is missing: CUDA 11.3 or older.
        """
        self.path = path
        library = ctypes.CDLL(path)
        self._functions: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            self._functions[name] = function
        self._name, self._text = library.cudaGetErrorName, library.cudaGetErrorString
        for function in (self._name, self._text):
            function.argtypes, function.restype = (_int,), ctypes.c_char_p

    # The device

    def device_count(self) -> int:
        """Return how many GPUs this process may use; none is an error of CUDA's."""
        return int(self._get(_int, "cudaGetDeviceCount"))

    def device_name(self, device: int = 0) -> str:
        """Return a GPU's name."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, device)
        return properties.value.decode(errors="replace")

    def compute_capability(self, device: int = 0) -> str:
        """Return a GPU's compute capability without the dot, as ``87``."""
        major, minor = _int(), _int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self._call("cudaDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        return f"{major.value}{minor.value}"

    def versions(self) -> tuple[int, int]:
        """Return the versions of this library and of what the driver supports, as 12060 for 12.6.

        The driver's is 0 where there is none.
        """
        return (
            int(self._get(_int, "cudaRuntimeGetVersion")),
            int(self._get(_int, "cudaDriverGetVersion")),
        )

    def memory_info(self) -> tuple[int, int]:
        """Return free and total memory of the current device, in bytes."""
        free, total = _size(), _size()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    @contextmanager
    def on_device(self, device: int = 0) -> Iterator[None]:
        """Make a GPU this thread's current one, as it may be another one's by the application."""
        before = self._get(_int, "cudaGetDevice")
        if before == device:
            yield
            return
        self._call("cudaSetDevice", device)
        try:
            yield
        finally:
            self._call("cudaSetDevice", before)

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Let this thread allocate and free while another thread captures a graph.

        Otherwise CUDA refuses it and invalidates the other's capture, if that is in the global
        mode, which is PyTorch's: its graph has nothing to do with our memory.
        """
        mode = _int(_CAPTURE_RELAXED)
        self._call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:  # unchecked: it fails of nothing but an error that the device keeps
            self._functions["cudaThreadExchangeStreamCaptureMode"](ctypes.byref(mode))

    # Memory

    def malloc(self, size: int) -> int:
        """Return the address of `size` bytes on the device, aligned to 256."""
        with self.relaxed():
            return int(self._get(_pointer, "cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Free device memory, after the work that may use it."""
        with self.relaxed():
            self._call("cudaFree", address)

    def host_alloc(self, size: int) -> int:
        """Return the address of `size` pinned bytes on the host."""
        with self.relaxed():
            return int(self._get(_pointer, "cudaHostAlloc", max(size, 1), 0))

    def host_free(self, address: int) -> None:
        """Free pinned memory."""
        with self.relaxed():
            self._call("cudaFreeHost", address)

    def to_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy from pinned host memory."""
        self._call("cudaMemcpyAsync", target, source, size, _HOST_TO_DEVICE, stream)

    def to_host(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy to pinned host memory."""
        self._call("cudaMemcpyAsync", target, source, size, _DEVICE_TO_HOST, stream)

    def on_to_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy within the device's memory."""
        self._call("cudaMemcpyAsync", target, source, size, _DEVICE_TO_DEVICE, stream)

    # Streams and graphs

    def stream_create(self) -> int:
        """Return a stream that doesn't wait for the default stream."""
        return int(self._get(_pointer, "cudaStreamCreateWithFlags", _NON_BLOCKING_STREAM))

    def stream_synchronize(self, stream: int) -> None:
        """Wait for everything that was enqueued; errors of that work come up here."""
        self._call("cudaStreamSynchronize", stream)

    def stream_destroy(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def begin_capture(self, stream: int) -> None:
        """Record what this thread enqueues from here on, instead of running it."""
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Return the graph of what was recorded, to be destroyed by the caller."""
        return int(self._get(_pointer, "cudaStreamEndCapture", stream, last=True))

    def instantiate(self, graph: int) -> int:
        """Return a graph in a form that can be launched, to be destroyed by the caller."""
        return int(self._get(_pointer, "cudaGraphInstantiateWithFlags", graph, 0))

    def graph_destroy(self, graph: int) -> None:
        """Destroy a graph."""
        self._call("cudaGraphDestroy", graph)

    def launch(self, executable: int, stream: int) -> None:
        """Enqueue an instantiated graph."""
        self._call("cudaGraphLaunch", executable, stream)

    def executable_destroy(self, executable: int) -> None:
        """Destroy an instantiated graph."""
        self._call("cudaGraphExecDestroy", executable)

    # Events

    def event_create(self) -> int:
        """Return an event that records a time."""
        return int(self._get(_pointer, "cudaEventCreateWithFlags", 0))

    def event_record(self, event: int, stream: int) -> None:
        """Enqueue the recording of an event."""
        self._call("cudaEventRecord", event, stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        """Let a stream wait, on the device, for what came before a recorded event."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def event_synchronize(self, event: int) -> None:
        """Wait until an event was recorded."""
        self._call("cudaEventSynchronize", event)

    def event_elapsed_ms(self, first: int, last: int) -> float:
        """Return the milliseconds between two recorded events."""
        return float(self._get(ctypes.c_float, "cudaEventElapsedTime", first, last))

    def event_destroy(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    # Errors

    def take_last_error(self) -> int:
        """Return the number of the last error of this thread and forget it, unless it is sticky."""
        return int(self._functions["cudaGetLastError"]())

    def error(self, where: str, code: int) -> CudaError:
        """Return the error for a return code."""
        name, text = (ask(code) or b"?" for ask in (self._name, self._text))
        cure = _CURES.get(
            code,
            "the device can't be used by this process any more: start it again, and look at the "
            "kernel's log (dmesg) for Xid or NvMap messages"
            if code in STICKY
            else "the next call may succeed; otherwise look at nvidia-smi and dmesg",
        )
        said = f"{name.decode(errors='replace')} ({code}): {text.decode(errors='replace')}"
        return CudaError(f"{where} failed with {said}", cure=cure, code=code)

    def _call(self, name: str, *arguments: object) -> None:
        """Call a function and raise what it returns."""
        code = self._functions[name](*arguments)
        if code:
            self._functions["cudaGetLastError"]()  # else a later, innocent call reports it again
            raise self.error(name, code)

    def _get(self, kind: Any, name: str, *arguments: object, last: bool = False) -> Any:
        """Call a function that writes a result through its first, or last, argument."""
        result = kind()
        place = ctypes.byref(result)
        self._call(name, *((*arguments, place) if last else (place, *arguments)))
        return result.value or 0


def load() -> Cuda:
    """Return the first libcudart that finds a GPU.

    One that the process has loaded already is taken first, if its name is one of `SONAMES`: so is
    PyTorch's.

    Raises:
        CudaError: A library is there and no GPU can be used; the message says why.
        BackendError: There is no libcudart.
    """
    refused: CudaError | None = None
    old: str | None = None
    for path in candidates():
        try:
            cuda = Cuda(path)
            cuda.device_count()
        except OSError:
            continue
        except AttributeError:
            old = path
            continue
        except CudaError as error:  # a newer library than the driver is one; an older may do
            refused = refused or _refused(cuda, error)
            continue
        return cuda
    if refused is not None:
        raise refused
    found = f"only {old}, which is older than CUDA 11.4" if old else "none"
    raise BackendError(
        f"found {found}",
        expected=(
            "libcudart of CUDA 11.4 or newer in the library path, in this Python's packages or in "
            "/usr/local/cuda"
        ),
        cure=(
            "install the CUDA runtime (on a Jetson: apt install cuda-cudart-12-6, elsewhere: pip "
            "install nvidia-cuda-runtime), or add its folder to LD_LIBRARY_PATH"
        ),
    )


def served() -> str | None:
    """Return the newest CUDA that the driver serves, as ``12.4``; None where it can't be asked."""
    for path in candidates():
        try:
            _, driver = Cuda(path).versions()
        except (OSError, AttributeError, CudaError):
            continue
        return dotted(driver) if driver else None
    return None


def dotted(version: int) -> str:
    """Return 12060 as ``12.6``."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _refused(cuda: Cuda, error: CudaError) -> CudaError:
    """Return what is wrong with a library that finds no GPU: mostly, that the driver is older."""
    if error.code != INSUFFICIENT_DRIVER:
        return error
    library, driver = cuda.versions()
    if not 0 < driver // 1000 < library // 1000:
        return error
    major = driver // 1000
    package = f"nvidia-cuda-runtime-cu{major}"
    return CudaError(
        f"{cuda.path} is of CUDA {dotted(library)}",
        expected=f"CUDA {major}, since this driver serves CUDA up to {dotted(driver)}",
        cure=(
            f"pip install {package} (and 'vzip[tensorrt-cu{major}]' in place of a TensorRT for a "
            "newer CUDA), or update the driver"
        ),
        code=error.code,
    )


def candidates() -> Iterator[str]:
    """Yield what may be a libcudart: names for the loader, then files of packages and toolkits."""
    yield from SONAMES
    for folder in sys.path:  # nvidia/cuda_runtime/lib of CUDA 11 and 12, nvidia/cu13/lib of 13
        yield from _files(Path(folder) / "nvidia", "*/lib/libcudart.so.*")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield from _files(Path(home), "lib64/libcudart.so.*")
    for pattern in ("cuda*/lib64/libcudart.so.*", "cuda*/targets/*/lib/libcudart.so.*"):
        yield from _files(Path("/usr/local"), pattern)


def _files(folder: Path, pattern: str) -> list[str]:
    """Return files below a folder, the newest version first."""
    return [str(path) for path in sorted(folder.glob(pattern), reverse=True)]
