"""A deserialised engine: the subset of TensorRT's API that 8.6, 10, 11 and TensorRT-RTX share.

Names are looked up on the module that is there; enumerations have other numbers in every
generation. Nothing here knows about images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vzip.runtime.backends.forks import outlive_forks
from vzip.runtime.backends.tensorrt.bindings import TITLES, distribution_of, misfit
from vzip.runtime.backends.tensorrt.cuda import served
from vzip.runtime.backends.tensorrt.logger import logger
from vzip.runtime.errors import BackendError

_log = logging.getLogger(__name__)

_DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}
"""TensorRT's name of an element type → numpy's."""


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        is_input: Whether it is an input.
        dtype: numpy's name of the element type, or TensorRT's where numpy has none.
        shape: Extents; −1 where they are given at each call.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


class Context:
    """An execution context, which can be let go of whoever still holds this object.

    A caller that keeps an exception keeps the frames that it went through, and what they name. So
    none of them names TensorRT's own object, which must be gone before its scratch memory is.

    Attributes:
        handle: TensorRT's object; None when it is closed.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def can_capture(self, stream: int) -> bool:
        """Say whether a run could be captured now; TensorRT-RTX alone ever says no."""
        ask = getattr(self.handle, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def close(self) -> None:
        """Let go of it."""
        self.handle = None


class Engine:
    """An engine that TensorRT has taken.

    Attributes:
        tensors: Its inputs and outputs.
        scratch_bytes: Device memory that its contexts need while they run, and may share.
    """

    def __init__(self, trt: Any, plan: bytearray, kernels: bytes = b"") -> None:
        """Deserialise an engine.

        A GPU must be known to be there: without one, TensorRT 8.6 hands out a null pointer and the
        process dies at its first use.

        Args:
            trt: The module.
            plan: The engine, already checked (`vzip.runtime.backends.tensorrt.engine_file`).
            kernels: What `kernels` gave in another process, already checked. TensorRT-RTX ignores
                those of another GPU, driver or version.

        Raises:
            BackendError: TensorRT refuses it, or it needs what vzip doesn't give.
        """
        self._trt = trt
        self._logger = logger(trt)
        self._logger.said = ""
        runtime = self._start()
        # The default everywhere, and to stay so: an engine with host code could run anything.
        runtime.engine_host_code_allowed = False
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.error("TensorRT refuses the engine")
        outlive_forks(runtime, engine)
        self._runtime, self._engine = runtime, engine
        self._config: Any = None
        self._cache: Any = None
        self._kernels = kernels
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        self.tensors = {name: self._tensor(name) for name in names}
        for attribute in ("device_memory_size_v2", "device_memory_size"):
            if hasattr(engine, attribute):
                self.scratch_bytes = int(getattr(engine, attribute))
                break

    def context(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: int,
        stream: int,
    ) -> Context:
        """Return an execution context for one set of shapes and addresses, which it keeps.

        A CUDA graph records the state of the context it was captured from, so a context is never
        set to anything else afterwards.

        Args:
            shapes: Shape of each input.
            addresses: Address on the device of each input and output.
            scratch: Address of `scratch_bytes` on the device, which contexts that don't run at the
                same time may share.
            stream: Where the context will run.

        Raises:
            BackendError: Memory is short, or TensorRT refuses a shape or an address.
        """
        context = Context(self._bare_context())
        if context.handle is None:
            raise self.error("TensorRT can't make an execution context")
        try:
            outlive_forks(context.handle)
            self._set_up(context, shapes, addresses, scratch, stream)
        except BaseException:
            context.close()
            raise
        return context

    def _set_up(
        self,
        context: Context,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: int,
        stream: int,
    ) -> None:
        """Give a context its memory, profile, shapes and addresses."""
        if hasattr(context.handle, "set_device_memory"):
            context.handle.set_device_memory(scratch, self.scratch_bytes)
        else:  # 8 and 10.0
            context.handle.device_memory = scratch
        # On 8.6 only the first context of an engine gets the profile by itself. The builder let
        # the others share it; see `vzip.export.engines.tensorrt.build`.
        if context.handle.active_optimization_profile < 0:
            try:
                given = context.handle.set_optimization_profile_async(0, stream)
            except RuntimeError:  # how the bindings of every version say no
                given = False
            if not given:
                raise self.error("TensorRT can't give a second batch size the optimization profile")
        for name, shape in shapes.items():
            if not context.handle.set_input_shape(name, shape):
                raise self.error(f"TensorRT refuses the shape {list(shape)} for {name}")
        for name, address in addresses.items():
            if not context.handle.set_tensor_address(name, address):
                raise self.error(f"TensorRT refuses the memory for {name}")

    def kernels(self) -> bytes | None:
        """Return what TensorRT-RTX compiled for this GPU, for a later process; None elsewhere."""
        return None if self._cache is None else bytes(self._cache.serialize())

    def profile(self, context: Context) -> list[tuple[str, float]]:
        """Attach TensorRT's profiler to a context, whose runs wait for each layer from now on.

        Returns:
            A list to which every run adds its layers: name and milliseconds. It is complete when
            the stream was waited for.
        """
        taken: list[tuple[str, float]] = []
        base: Any = self._trt.IProfiler

        class Profiler(base):  # type: ignore[misc]  # a class of an untyped module
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                taken.append((layer_name, ms))

        context.handle.profiler = Profiler()
        return taken

    def enqueue(self, context: Context, stream: int) -> None:
        """Enqueue one run of a context.

        Raises:
            BackendError: TensorRT refuses.
        """
        if not context.handle.execute_async_v3(stream):
            raise self.error("TensorRT failed to enqueue the engine")

    def close(self) -> None:
        """Let go of the engine; contexts must be gone."""
        self._cache = self._config = self._engine = self._runtime = None

    def error(self, what: str) -> BackendError:
        """Return an error with the first that TensorRT logged about one, which is the cause."""
        said, self._logger.said = self._logger.said, ""
        return BackendError(
            f"{what}: {said or 'it gave no reason'}",
            cause="memory is short, or the engine isn't for this machine",
            cure=(
                "look at free memory (nvidia-smi, on a Jetson free -m), then build it again with "
                "vzip build"
            ),
        )

    def _start(self) -> Any:
        """Return TensorRT's runtime."""
        try:
            runtime = self._trt.Runtime(self._logger)
        except TypeError:  # pybind: the factory returned nullptr
            runtime = None
        if runtime is None:
            said, self._logger.said = self._logger.said, ""
            raise not_started(self._trt, said)
        return runtime

    def _bare_context(self) -> Any:
        """Return a context that waits for its scratch memory, or None."""
        strategy = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        if strategy is None:  # 8
            return self._engine.create_execution_context_without_device_memory()
        kernels = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kernels is None:
            return self._engine.create_execution_context(strategy.USER_MANAGED)
        if self._config is None:
            self._config = self._engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(strategy.USER_MANAGED)
            # TensorRT-RTX compiles kernels for a new shape during the first runs unless told to do
            # it before; a graph captured meanwhile would keep the slow ones.
            self._config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
            self._cache = self._config.create_runtime_cache()
            if self._kernels and not self._cache.deserialize(self._kernels):
                _log.info("TensorRT-RTX doesn't take the kernels kept by the build: it compiles")
            self._kernels = b""
            self._config.set_runtime_cache(self._cache)
            outlive_forks(self._config, self._cache)
        return self._engine.create_execution_context(self._config)

    def _tensor(self, name: str) -> EngineTensor:
        """Return what an input or output looks like, refusing what isn't a plain array."""
        trt, engine = self._trt, self._engine
        if (
            engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            or engine.get_tensor_format(name) != trt.TensorFormat.LINEAR
        ):
            raise BackendError(
                f"the engine has {name} as {engine.get_tensor_format_desc(name)}",
                expected="a plain array on the device",
                cause="it was built by another tool",
                cure="build it with vzip build",
            )
        found = engine.get_tensor_dtype(name)
        known = {getattr(trt.DataType, each, None): dtype for each, dtype in _DTYPES.items()}
        known.pop(None, None)
        return EngineTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            dtype=known.get(found, str(found)),
            shape=tuple(engine.get_tensor_shape(name)),
        )


def not_started(trt: Any, said: str) -> BackendError:
    """Return the error for a TensorRT that gives no runtime or builder.

    Args:
        trt: The module.
        said: What it logged; empty for nothing.
    """
    name = trt.__name__
    wrong = misfit(distribution_of(name), served())
    return BackendError(
        f"{TITLES[name]} {trt.__version__} can't be started: {said or 'it gave no reason'}",
        cause=(
            wrong.what
            if wrong is not None
            else "the NVIDIA driver is too old for it, or no GPU can be used"
        ),
        cure=(
            wrong.cure
            if wrong is not None
            else "look at nvidia-smi (on a Jetson, whether the user is in the group 'video') and "
            "at 'vzip doctor', and update the driver or install an older TensorRT"
        ),
    )
