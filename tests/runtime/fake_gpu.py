"""A GPU for tests without one: `fake_cudart.c`, and TensorRT's runtime classes on top of it.

The classes have the attributes that the real modules of their generation have, and no others that
matter (compared with 8.6.0 and TensorRT-RTX 1.7.1): what 8.6 lacks is missing here too. An engine
computes with ONNX Runtime when its stream gets to it, from and to the addresses it was given.
They are stricter than the real ones: a context that was captured in a graph must not be changed.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.bundles import engine_record
from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.engine_record import EngineBatch
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import add_engine

HOST, DEVICE = 1, 2
VERSIONS = {"8.6": "8.6.2", "10": "10.3.0.30", "11": "11.4.1.5", "rtx": "1.7.1.116"}
STACKS = {"8.6": "tensorrt", "10": "tensorrt", "11": "tensorrt", "rtx": "tensorrt_rtx"}
Install = Callable[[str], "FakeTensorRt"]
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_int)


def compile_cudart(folder: Path) -> Path:
    """Compile the library; a C compiler is needed, as for any development of native code."""
    path = folder / "libcudart.so.12"
    source = Path(__file__).parent / "fake_cudart.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def library(path: Path) -> Any:
    """Return the library's own functions, for tests to set and ask."""
    lib = ctypes.CDLL(str(path))
    lib.fake_calls.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    lib.fake_within.argtypes = (pointer, size, ctypes.c_int)
    lib.fake_enqueue.argtypes = (pointer, _WORK, ctypes.c_int)
    lib.fake_legacy.restype = pointer
    lib.fake_capturing.argtypes = lib.fake_break_capture.argtypes = (pointer,)
    lib.fake_fail.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    lib.fake_reset()
    return lib


def plan_of(
    bundle: Bundle, generation: str, *, batch: EngineBatch, shares_profile: bool = True
) -> bytes:
    """Return an engine: a header as the real ones have, and what the fake needs to compute."""
    magic = b"vtrt" if generation == "rtx" else b"ftrt"
    version = bytes(int(part) & 0xFF for part in f"{VERSIONS[generation]}.0".split(".")[:4])
    said = {"bundle": str(bundle.path), "max": batch.max, "shares_profile": shares_profile}
    payload = json.dumps(said).encode()
    return magic + bytes(20) + version + bytes(36) + payload


def with_engine(
    folder: Path,
    generation: str,
    *,
    name: str = "orin",
    batch: EngineBatch | None = None,
    shares_profile: bool = True,
    **other: Any,
) -> Bundle:
    """Put an engine for the fake GPU into a bundle."""
    bundle = read_bundle(folder)
    most = bundle.manifest.batch
    batch = batch or EngineBatch(1 if most.dynamic else most.max, most.max, most.max)
    plan = plan_of(bundle, generation, batch=batch, shares_profile=shares_profile)
    values = {
        "stack": STACKS[generation],
        "version": VERSIONS[generation],
        "gpu": "Fake Orin",
        "batch": batch,
        **other,
    }
    return add_engine(bundle, name, engine_record(bundle, plan, **values), plan)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8 = range(6)


class NewDataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class TensorFormat(enum.Enum):
    LINEAR, CHW2 = range(2)


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Kernels(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class IProfiler:
    def __init__(self) -> None:
        self.constructed = True


class FakeTensorRt(SimpleNamespace):
    """The module; `calls` says what was done, `lib` is the library below.

    Attributes:
        refuse: Name of a method that fails as TensorRT's do: with False or None.
        say: What is logged as an error then.
        host_code: What `engine_host_code_allowed` was set to, for each runtime.
        faults: What the real library would have crashed on.
        capturable: What is_stream_capturable says (TensorRT-RTX).
        layers: What a profiler is told by each run: names and milliseconds.
    """

    def __init__(self, lib: Any, generation: str) -> None:
        old = generation == "8.6"
        super().__init__(
            __name__=STACKS[generation],
            __version__=VERSIONS[generation],
            lib=lib,
            generation=generation,
            calls=[],
            faults=[],
            host_code=[],
            refuse="",
            say="",
            capturable=True,
            DataType=DataType if old else NewDataType,
            TensorIOMode=TensorIOMode,
            TensorLocation=TensorLocation,
            TensorFormat=TensorFormat,
            ILogger=ILogger,
            IProfiler=IProfiler,
            layers=[("conv", 0.25), ("_gemm_mha_v2", 0.5)],
            spoil={},
        )
        if not old:
            self.ExecutionContextAllocationStrategy = Strategy
        if generation == "rtx":
            self.DynamicShapesKernelSpecializationStrategy = Kernels
        self.Runtime = lambda logger: Runtime(self, logger)

    def __hash__(self) -> int:
        return id(self)

    def refuses(self, name: str, logger: Any) -> bool:
        if self.refuse == name:
            logger.log(Severity.ERROR, f"{name}: Error Code 1: {self.say}\n")
            return True
        return False


class Runtime:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        if trt.refuses("Runtime", logger):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.trt, self.logger = trt, logger
        self._host_code = False

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._host_code = value
        self.trt.host_code.append(value)

    def deserialize_cuda_engine(self, plan: bytearray) -> Engine | None:
        self.logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
        if self.trt.refuses("deserialize_cuda_engine", self.logger):
            return None
        self.trt.calls.append("deserialize")
        return Engine(self.trt, self.logger, json.loads(bytes(plan[64:])))


class Engine:
    def __init__(self, trt: FakeTensorRt, logger: Any, payload: dict[str, Any]) -> None:
        self.trt, self.logger = trt, logger
        bundle = read_bundle(payload["bundle"])
        _, self.session = open_backend("onnxruntime", bundle)
        self.manifest = bundle.manifest
        tensors = (*self.manifest.inputs, *self.manifest.outputs)
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.num_io_tensors = len(tensors)
        self.shares_profile = payload["shares_profile"]
        self.contexts: weakref.WeakSet[_Context] = weakref.WeakSet()
        if trt.generation == "8.6":
            self.device_memory_size = 1000
            self.create_execution_context_without_device_memory = lambda: self._create(None)
        else:
            self.device_memory_size_v2 = 1000
            self.create_execution_context = self._create

    def get_tensor_name(self, place: int) -> str:
        return list(self.tensors)[place]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        given = name == self.manifest.input.name
        return TensorIOMode.INPUT if given else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return self.trt.spoil.get("location", TensorLocation.DEVICE)

    def get_tensor_format(self, name: str) -> TensorFormat:
        return self.trt.spoil.get("format", TensorFormat.LINEAR)

    def get_tensor_format_desc(self, name: str) -> str:
        return "Two wide channel vectorized row major"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.tensors[name].shape
        return tuple(-1 if extent == "batch" else int(extent) for extent in shape)

    def get_tensor_dtype(self, name: str) -> Any:
        if name in self.trt.spoil:
            return self.trt.spoil[name]
        names = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8", "int64": "INT64"}
        wanted = names[self.tensors[name].dtype]
        # What TensorRT 8 does with INT64.
        return getattr(self.trt.DataType, wanted, None) or self.trt.DataType.INT32

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.trt)

    def _create(self, strategy: Strategy | RuntimeConfig | None) -> Any:
        kernels = Kernels.LAZY
        if isinstance(strategy, RuntimeConfig):
            kernels = strategy.dynamic_shapes_kernel_specialization_strategy
            strategy = strategy.strategy
        elif self.trt.generation == "rtx":
            assert strategy == Strategy.USER_MANAGED
        if self.trt.refuses("create_execution_context", self.logger):
            return None
        assert strategy in {None, Strategy.USER_MANAGED}
        made = _CONTEXTS[self.trt.generation](self)
        made.kernels = kernels
        self.contexts.add(made)
        return made


class _Context:
    active_optimization_profile = 0
    kernels = Kernels.LAZY
    profiler: Any = None

    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0
        self.captured = False
        self.key = next(_keys)
        _contexts[self.key] = self  # weakly: it goes when its holder lets go of it

    def __del__(self) -> None:
        if self.memory and not self.trt.lib.fake_within(self.memory, 1000, DEVICE):
            self.trt.faults.append("the scratch memory was freed before the context")

    def _take_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert self.trt.lib.fake_within(address, size, DEVICE)
        self.memory = address

    def _change(self) -> None:
        if self.captured:
            self.trt.faults.append("a context was changed after its capture")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change()
        if self.trt.refuses("set_input_shape", self.engine.logger):
            return False
        if self.active_optimization_profile < 0:
            self.engine.logger.log(Severity.ERROR, "no optimization profile is selected")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._change()
        if self.trt.refuses("set_tensor_address", self.engine.logger):
            return False
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.trt.refuses("execute_async_v3", self.engine.logger):
            return False
        assert self.memory
        assert set(self.addresses) == set(self.engine.tensors)
        if capturing := bool(self.trt.lib.fake_capturing(stream)):
            self.captured = True
            if self.profiler is not None:
                self.trt.faults.append("a graph was captured while a profiler was attached")
            if self.trt.generation == "rtx" and self.kernels == Kernels.LAZY:
                self.trt.faults.append("a graph was captured while kernels were being compiled")
        self.trt.calls.append("capture" if capturing else "enqueue")
        return self.trt.lib.fake_enqueue(stream, _work, self.key) == 0

    def compute(self) -> None:
        """Read the input's address and write the outputs' ones."""
        self.trt.calls.append("compute")
        if self.profiler is not None:
            assert self.profiler.constructed  # pybind refuses one whose base was never called
            for name, ms in self.trt.layers:
                self.profiler.report_layer_time(name, ms)
        manifest, engine = self.engine.manifest, self.engine
        shape = self.shapes[manifest.input.name]
        images = self._array(manifest.input.name, shape, manifest.input.dtype)
        for name, value in engine.session.run({manifest.input.name: images.copy()}).items():
            narrow = engine.get_tensor_dtype(name) == self.trt.DataType.INT32
            result = value.astype(np.int32) if narrow else value
            self._array(name, result.shape, result.dtype)[:] = result

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert self.trt.lib.fake_within(self.addresses[name], size, DEVICE)
        memory = memoryview((ctypes.c_char * size).from_address(self.addresses[name]))
        return np.frombuffer(memory, dtype).reshape(shape)


_keys = itertools.count()
_contexts: weakref.WeakValueDictionary[int, _Context] = weakref.WeakValueDictionary()


@_WORK
def _work(key: int) -> None:
    """What a stream calls when it gets to an engine."""
    _contexts[key].compute()


class OldContext(_Context):
    """TensorRT 8.6 has the property alone, and one context for each profile unless it is shared."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        if any(each.active_optimization_profile == 0 for each in engine.contexts):
            self.active_optimization_profile = -1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._change()
        assert stream
        taken = any(each.active_optimization_profile == profile for each in self.engine.contexts)
        if taken and not self.engine.shares_profile:
            self.engine.logger.log(
                Severity.ERROR, f"Profile {profile} has been chosen by another IExecutionContext"
            )
            raise RuntimeError("Error in set optimization profile async.")  # never False
        self.active_optimization_profile = profile
        return True

    device_memory = property(None, lambda self, address: self._take_memory(address, 1000))


class Context(_Context):
    def set_device_memory(self, address: int, size: int) -> None:
        self._take_memory(address, size)


class RuntimeCache:
    """What TensorRT-RTX compiled; a text here. That of another GPU is refused."""

    content = b""

    def __init__(self, trt: FakeTensorRt) -> None:
        self.trt = trt

    def deserialize(self, blob: bytes) -> bool:
        taken = bytes(blob) == b"kernels of the Fake Orin"
        self.trt.calls.append("kernels taken" if taken else "kernels refused")
        return taken

    def serialize(self) -> memoryview:
        return memoryview(b"kernels of the Fake Orin")


class RuntimeConfig:
    strategy = Strategy.STATIC
    cache: RuntimeCache | None = None

    def __init__(self, trt: FakeTensorRt) -> None:
        self.trt = trt

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    dynamic_shapes_kernel_specialization_strategy = Kernels.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self.trt.capturable)


_CONTEXTS = {"8.6": OldContext, "10": Context, "11": Context, "rtx": RtxContext}
