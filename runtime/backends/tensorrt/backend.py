"""TensorRT: an engine of the bundle, on the NVIDIA GPU it was built for.

What a call costs the host beyond the engine: one copy into pinned memory, one launch of a CUDA
graph (copy in, engine, indices out), one copy of the embeddings into memory that becomes the
caller's, one wait. Everything else is allocated when the bundle is opened or a batch size is first
seen.

Calls from several threads take turns; there is one stream. The GPU is number 0: choose another with
CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.backends.protocol import BackendUnavailableError, NoEngineError
from vzip.runtime.backends.tensorrt import cuda as cuda_runtime
from vzip.runtime.backends.tensorrt.bindings import TITLES, import_bindings, version_of
from vzip.runtime.backends.tensorrt.blocks import DeviceBlocks
from vzip.runtime.backends.tensorrt.cuda import Cuda, CudaError
from vzip.runtime.backends.tensorrt.device_array import DeviceArray
from vzip.runtime.backends.tensorrt.engine import Context, Engine
from vzip.runtime.backends.tensorrt.engine_file import Machine, read_engine, read_kernels, unfit
from vzip.runtime.backends.tensorrt.pinned import Lending
from vzip.runtime.bundle.manifest import EMBEDS
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import (
    BackendError,
    InvalidInputError,
    MissingDependencyError,
    VzipError,
)
from vzip.runtime.wording import counted

_log = logging.getLogger(__name__)

_PATIENCE = 3  # refusals of a capture after which they aren't the engine's warming up any more

Array = NDArray[Any]


@dataclass
class _Buffer:
    """An input or output at the engine's largest batch: on the device, and pinned on the host.

    Attributes:
        device: Address on the device.
        host: Address of the pinned memory.
        pinned: The pinned memory, [largest batch, …], of the engine's dtype.
        dtype: The dtype that callers get: the manifest's.
    """

    device: int
    host: int
    pinned: Array
    dtype: np.dtype[Any]

    def row_bytes(self) -> int:
        """Size of one image's part."""
        return self.pinned.nbytes // len(self.pinned)


@dataclass
class _Prepared:
    """What a batch size needs.

    Attributes:
        rows: The batch size.
        context: The execution context, never set to anything else.
        executable: The CUDA graph of one run; None before it was captured.
    """

    rows: int
    context: Context
    executable: int | None = None


class TensorRt:
    """An engine that is ready to run; see `Backend`.

    Attributes:
        name: The backend's name.
        engine: Name of the engine.
        machine: What runs it.
        device: The GPU.
    """

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        extra_outputs: tuple[str, ...] = (),
        *,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Open an engine of a bundle.

        Args:
            bundle: The bundle.
            extra_outputs: Must be empty: an engine has no outputs but those of the graph.
            engine: Name of the engine; None takes the only one that fits this machine.
            threads: Of no effect: no thread of the CPU runs an engine.

        Raises:
            InvalidInputError: The bundle has no engine of that name.
            MissingDependencyError: The TensorRT that the engine needs is not installed.
            BackendUnavailableError: There is no engine, GPU or libcudart that could be used.
            BundleError: The engine's file is damaged.
            BackendError: The engine asked for doesn't fit this machine; several do; or TensorRT
                refuses it.
        """
        del threads
        if extra_outputs:
            raise BackendError(
                f"an engine can't give {', '.join(extra_outputs)}",
                cause="it is inside the graph and no output of it",
                cure=(
                    "open the bundle with backend='onnxruntime' (--backend onnxruntime) to see "
                    "where tokens went"
                ),
            )
        cuda = _load_cuda(bundle)
        self.engine, self.machine, trt = choose(bundle, engine, cuda)
        self.device = self.machine.gpu
        self._manifest = bundle.manifest
        self._batch = bundle.manifest.engines[self.engine].batch
        self._cuda = cuda
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._dead: str | None = None
        self._closed = False
        self._graphs = True
        self._refusals = 0
        self._prepared: dict[int, _Prepared] = {}
        # What a captured graph copies out: all but the embeddings, whose target changes.
        self._small = [each.name for each in bundle.manifest.outputs if each.name != EMBEDS]
        self._buffers: dict[str, _Buffer] = {}
        self._resources = ExitStack()
        plan = read_engine(bundle, self.engine)
        try:
            with cuda.on_device(), cuda.relaxed():
                self._engine = Engine(trt, plan, read_kernels(bundle, self.engine))
                del plan
                self._check_tensors()
                self._stream = self._own(cuda.stream_create(), cuda.stream_destroy)
                self._scratch = self._own(cuda.malloc(self._engine.scratch_bytes), cuda.free)
                for tensor in self._engine.tensors.values():
                    self._buffers[tensor.name] = self._buffer(tensor.name)
            embeds = self._buffers[EMBEDS]
            self._results = Lending(cuda, embeds.pinned.shape, embeds.dtype)
            self._resources.callback(self._results.close)
            self._blocks = DeviceBlocks(cuda)
            self._resources.callback(self._blocks.close)
        except BaseException:
            self._release()
            raise

    def run(self, feeds: Mapping[str, Array]) -> dict[str, NDArray[np.generic]]:
        """See `Backend.run`."""
        return self._run(feeds, on_device=False)[0]

    def run_on_device(
        self, feeds: Mapping[str, Array]
    ) -> tuple[dict[str, NDArray[np.generic]], DeviceArray]:
        """Run the engine and leave ``image_embeds`` on the device too; see `DeviceBackend`."""
        outputs, left = self._run(feeds, on_device=True)
        assert left is not None
        return outputs, left

    @property
    def captured(self) -> dict[int, bool]:
        """Each batch size that was run → whether a CUDA graph of it was captured."""
        return {rows: each.executable is not None for rows, each in self._prepared.items()}

    def launch_ms(self, rows: int, calls: int, *, plain: bool = False) -> list[float]:
        """Return how long the GPU took for what a call launches, by CUDA's own events.

        That is the copy in, the engine, and the copy of the indices. For measurements: the images
        are those of the last call.

        Args:
            rows: A batch size that was run before.
            calls: How many to time.
            plain: Whether it is enqueued plainly where a CUDA graph was captured.

        Returns:
            Milliseconds of each.
        """
        launch = self._enqueue if plain else self._launch
        cuda, stream = self._cuda, self._stream
        with self._lock, cuda.on_device(), ExitStack() as events:
            self._usable()
            first, last = cuda.event_create(), cuda.event_create()
            for event in (first, last):
                events.callback(cuda.event_destroy, event)
            taken = []
            for _ in range(calls):
                cuda.event_record(first, stream)
                launch(self._prepared[rows])
                cuda.event_record(last, stream)
                cuda.event_synchronize(last)
                taken.append(cuda.event_elapsed_ms(first, last))
            return taken

    def layer_ms(self, rows: int, calls: int) -> list[list[tuple[str, float]]]:
        """Return how long each layer of the engine took, by TensorRT's own profiler.

        For measurements, and apart from them: in a context of its own and without a CUDA graph, a
        run takes longer than by `launch_ms`. The images are those of the last call.

        Args:
            rows: A batch size that was run before.
            calls: How many runs to time.

        Returns:
            For each run, name and milliseconds of each layer, in the engine's order.
        """
        runs = []
        with self._lock, self._cuda.on_device():
            self._usable()
            context = self._context(rows)
            try:
                taken = self._engine.profile(context)
                for _ in range(calls):
                    self._engine.enqueue(context, self._stream)
                    self._cuda.stream_synchronize(self._stream)
                    runs.append(taken[:])
                    taken.clear()
            finally:
                context.close()
        return runs

    def kernels(self) -> bytes | None:
        """Return what TensorRT-RTX compiled for this GPU so far; None with TensorRT."""
        with self._lock, self._cuda.on_device():
            self._usable()
            return self._engine.kernels()

    def close(self) -> None:
        """See `Backend.close`; waits for a run that is under way."""
        if os.getpid() != self._process:
            return  # everything is the parent's
        with self._lock:
            if not self._closed:
                self._closed = True
                self._release()

    def __del__(self) -> None:
        if hasattr(self, "_resources"):  # else `__init__` failed before there was anything to free
            self.close()

    def _run(
        self, feeds: Mapping[str, Array], *, on_device: bool
    ) -> tuple[dict[str, Array], DeviceArray | None]:
        """Run any number of images; leave the embeddings on the device too if asked."""
        self._check_process()
        (array,) = feeds.values()
        count, most, left = len(array), self._batch.max, None
        with self._lock:
            self._usable()
            self._check_count(count)
            try:
                with self._cuda.on_device():
                    if on_device:
                        left = self._room(count)
                    parts = [
                        self._chunk(array[first : first + most], first, left)
                        for first in range(0, count, most)
                    ]
            except BaseException as error:  # Ctrl-C too: nothing may be freed under a running GPU
                self._after(error)
                raise
        if len(parts) == 1:
            return parts[0], left
        return {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}, left

    def _room(self, count: int) -> DeviceArray:
        """Return device memory for the embeddings of so many images."""
        buffer = self._buffers[EMBEDS]
        address = self._blocks.take(buffer.row_bytes() * count)
        shape = (count, *buffer.pinned.shape[1:])
        return DeviceArray(self._blocks, address, shape, buffer.dtype.name)

    def _chunk(self, array: Array, first: int, left: DeviceArray | None) -> dict[str, Array]:
        """Run at most the engine's largest batch, whose rows in `left` begin at `first`."""
        rows, cuda, embeds = len(array), self._cuda, self._buffers[EMBEDS]
        prepared = self._prepared.get(rows) or self._prepare(rows)
        lent = self._results.address()
        self._buffers[self._manifest.input.name].pinned[:rows] = array
        self._launch(prepared)
        size = embeds.row_bytes()
        cuda.to_host(lent or embeds.host, embeds.device, rows * size, self._stream)
        if left is not None:
            self._blocks.order(self._stream)
            cuda.on_to_device(left.address + first * size, embeds.device, rows * size, self._stream)
        cuda.stream_synchronize(self._stream)
        given = {
            name: self._buffers[name].pinned[:rows].astype(self._buffers[name].dtype)
            for name in self._small
        }
        given[EMBEDS] = self._results.lend()[:rows] if lent else embeds.pinned[:rows].copy()
        if prepared.executable is None and self._graphs:
            self._capture(prepared)
        return given

    def _prepare(self, rows: int) -> _Prepared:
        """Remember a context for a batch size."""
        prepared = self._prepared[rows] = _Prepared(rows, self._context(rows))
        return prepared

    def _context(self, rows: int) -> Context:
        """Return a new context for a batch size."""
        with self._cuda.relaxed():  # TensorRT allocates
            return self._engine.context(
                {
                    name: (rows, *self._buffers[name].pinned.shape[1:])
                    for name, tensor in self._engine.tensors.items()
                    if tensor.is_input
                },
                {name: buffer.device for name, buffer in self._buffers.items()},
                self._scratch,
                self._stream,
            )

    def _launch(self, prepared: _Prepared) -> None:
        """Have a batch size computed: by its graph where there is one."""
        if prepared.executable is None:
            self._enqueue(prepared)
        else:
            self._cuda.launch(prepared.executable, self._stream)

    def _enqueue(self, prepared: _Prepared) -> None:
        """Enqueue copy in, engine and small copies out; what a graph records, or runs without."""
        cuda, stream, given = self._cuda, self._stream, self._manifest.input.name
        buffer = self._buffers[given]
        cuda.to_device(buffer.device, buffer.host, prepared.rows * buffer.row_bytes(), stream)
        self._engine.enqueue(prepared.context, stream)
        for name in self._small:
            buffer = self._buffers[name]
            cuda.to_host(buffer.host, buffer.device, prepared.rows * buffer.row_bytes(), stream)

    def _capture(self, prepared: _Prepared) -> None:
        """Capture the CUDA graph of a batch size that has run once; go without it if that fails."""
        if not prepared.context.can_capture(self._stream):  # TensorRT-RTX: not yet
            self._refusals += 1
            if self._refusals == _PATIENCE:
                _log.warning(
                    "TensorRT-RTX says after %d calls that the engine %r can't be captured in a "
                    "CUDA graph; it is enqueued plainly, which costs the host more at each call: "
                    "build it again with this version of vzip build",
                    _PATIENCE,
                    self.engine,
                )
            return
        cuda, failure, graph = self._cuda, "", 0
        try:
            cuda.begin_capture(self._stream)
            try:
                self._enqueue(prepared)
            finally:
                graph = cuda.end_capture(self._stream)
            prepared.executable = cuda.instantiate(graph)
        except BackendError as error:
            if isinstance(error, CudaError) and error.sticky:
                raise
            failure = str(error)  # the error itself would keep the result that was just lent
        finally:
            if graph:
                cuda.graph_destroy(graph)
        if failure:
            cuda.take_last_error()
            self._graphs = False
            _log.warning(
                "no CUDA graph could be captured (%s); the engine %r is enqueued plainly, which "
                "costs the host more at each call",
                failure,
                self.engine,
            )

    def _after(self, error: BaseException) -> None:
        """Leave a clean stream after a failure, or learn that there is no device any more."""
        # What was enqueued before the failure must end before its context is gone. This also tells
        # whether the device still works, which TensorRT doesn't.
        self._cuda.take_last_error()
        try:
            self._cuda.stream_synchronize(self._stream)
        except CudaError as found:
            error = found
        if isinstance(error, CudaError) and error.sticky:
            self._dead = str(error)
        self._drop_contexts()

    def _usable(self) -> None:
        """Refuse use after close, and of a device that is gone."""
        if self._closed:
            raise BackendError(f"the backend '{self.name}' is closed")
        if self._dead is not None:
            raise BackendError(
                f"the engine {self.engine!r} can't be used any more",
                cause=(
                    f"an earlier call destroyed this process's access to the GPU ({self._dead})"
                ),
            )

    def _check_count(self, count: int) -> None:
        """Refuse a number of images that ends in fewer than the engine takes."""
        rows = count % self._batch.max or min(count, self._batch.max)
        if rows < self._batch.min:
            raise BackendError(
                f"got {counted(count, 'image')}",
                expected=(
                    f"{self._batch.min} to {self._batch.max} a run, which the engine "
                    f"{self.engine!r} takes"
                ),
                cure="build an engine for this batch with vzip build",
            )

    def _check_process(self) -> None:
        """Refuse use in a fork, before the lock, which another thread may hold for ever there."""
        if os.getpid() != self._process:
            raise BackendError(
                f"the engine is used in process {os.getpid()}",
                expected=f"process {self._process}, which opened it and of which this is a fork",
                cause="CUDA doesn't survive a fork",
                cure="open the bundle in this process",
            )

    def _check_tensors(self) -> None:
        """Refuse an engine whose inputs and outputs aren't the graph's."""
        manifest = self._manifest
        expected = {
            tensor.name: (
                tensor is manifest.input,
                # TensorRT 8 has no INT64 tensors and gives indices as INT32.
                {tensor.dtype, "int32"} if tensor.dtype == "int64" else {tensor.dtype},
                tensor.shape[1:],
            )
            for tensor in (*manifest.inputs, *manifest.outputs)
        }
        found = self._engine.tensors
        if set(found) != set(expected) or any(
            tensor.is_input != is_input or tensor.dtype not in dtypes or tensor.shape[1:] != shape
            for tensor, (is_input, dtypes, shape) in (
                (tensor, expected[tensor.name]) for tensor in found.values()
            )
        ):
            raise BackendError(
                f"the engine {self.engine!r} has {', '.join(map(str, found.values()))}",
                expected=f"{', '.join(map(str, (*manifest.inputs, *manifest.outputs)))}",
                cause="it was built by another tool",
                cure="build it again with vzip build",
            )

    def _buffer(self, name: str) -> _Buffer:
        """Allocate what an input or output needs."""
        (promised,) = (
            tensor
            for tensor in (*self._manifest.inputs, *self._manifest.outputs)
            if tensor.name == name
        )
        found = self._engine.tensors[name]
        shape, dtype = (self._batch.max, *found.shape[1:]), np.dtype(found.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        device = self._own(self._cuda.malloc(size), self._cuda.free)
        host = self._own(self._cuda.host_alloc(size), self._cuda.host_free)
        memory = memoryview((ctypes.c_char * size).from_address(host))
        pinned: Array = np.frombuffer(memory, dtype).reshape(shape)
        return _Buffer(device, host, pinned, np.dtype(promised.dtype))

    def _own(self, handle: int, free: Callable[[int], None]) -> int:
        """Free a handle when the backend is closed."""
        self._resources.callback(self._quietly, free, handle)
        return handle

    def _release(self) -> None:
        """Free everything, contexts before the memory they use, when nothing runs any more."""
        if hasattr(self, "_stream"):
            self._quietly(self._cuda.stream_synchronize, self._stream)
        with ExitStack() as stack:
            stack.callback(self._resources.close)
            if hasattr(self, "_engine"):
                stack.callback(self._engine.close)
            self._drop_contexts()

    def _drop_contexts(self) -> None:
        """Let go of graphs and contexts, whoever still holds frames of a call that failed."""
        for prepared in self._prepared.values():
            if prepared.executable is not None:
                self._quietly(self._cuda.executable_destroy, prepared.executable)
            prepared.context.close()
        self._prepared.clear()

    def _quietly(self, free: Callable[[int], None], handle: int) -> None:
        """Free a handle; a device that is gone has freed it already."""
        try:
            with self._cuda.on_device():
                free(handle)
        except CudaError as error:
            _log.debug("could not be freed: %s", error)


def _load_cuda(bundle: Bundle) -> Cuda:
    """Return CUDA with a GPU, if the bundle has an engine at all."""
    if not any(record.cpu is None for record in bundle.manifest.engines.values()):
        raise NoEngineError(
            f"{bundle.path} has no engine for a GPU",
            expected="one for this machine",
            cure=f"build it here with: {_build_command(bundle)}",
        )
    try:
        return cuda_runtime.load()
    except BackendError as error:
        raise BackendUnavailableError(f"the backend 'tensorrt' needs a GPU: {error}") from error


def _build_command(bundle: Bundle) -> str:
    """Return the command that builds an engine from the graph that the bundle was opened with."""
    precision = "" if bundle.quantised is None else f" --precision {bundle.quantised}"
    return f"vzip build {bundle.path}{precision}"


def choose(bundle: Bundle, engine: str | None, cuda: Cuda) -> tuple[str, Machine, Any]:
    """Return the engine to run, what runs it, and the TensorRT module.

    Args:
        bundle: A bundle with engines.
        engine: Name of the engine; None takes the only one that fits this machine, of those that
            were built from the graph that the bundle was opened with.
        cuda: CUDA with a GPU.

    Raises:
        InvalidInputError, MissingDependencyError, BackendUnavailableError, BackendError: See
            `TensorRt`.
    """
    records = {name: each for name, each in bundle.manifest.engines.items() if each.cpu is None}
    if engine is not None and engine not in records:
        raise InvalidInputError(
            f"{bundle.path} has no engine {engine!r}",
            expected=f"one of {', '.join(sorted(records))}" if records else "an engine in it",
            cure=f"build it with: {_build_command(bundle)}",
        )
    names = [engine] if engine is not None else [
        name for name, record in records.items() if record.quantised == bundle.quantised
    ]  # fmt: skip
    if not names:
        raise BackendUnavailableError(
            f"{bundle.path} has no engine in {bundle.precision}",
            expected=f"one for this machine beside {', '.join(sorted(records))}",
            cure=f"build it here with: {_build_command(bundle)}",
        )
    gpu, sm = cuda.device_name(), cuda.compute_capability()
    fitting: dict[str, tuple[Machine, Any]] = {}
    faults: list[VzipError] = []
    absent: MissingDependencyError | None = None
    for name in names:
        fault = unfit(bundle, name)
        if fault is None:
            stack = records[name].stack
            try:
                trt = import_bindings(stack)
            except MissingDependencyError as error:
                absent = absent or error
                fault = BackendError(f"the engine {name!r} needs {TITLES[stack]}: {error}")
            else:
                machine = Machine(stack, version_of(trt), gpu, sm)
                fault = unfit(bundle, name, machine)
        if fault is None:
            fitting[name] = (machine, trt)
        else:
            faults.append(fault)
    if len(fitting) == 1:
        ((name, (machine, trt)),) = fitting.items()
        if records[name].gpu not in {None, gpu}:
            _log.warning(
                "the engine %r was tuned for and proven on %s, this is %s of the same SM: TensorRT "
                "may run it slower, and nobody compared its tokens here; build it again: %s",
                *(name, records[name].gpu, gpu, _build_command(bundle)),
            )
        return name, machine, trt
    if fitting:
        raise BackendError(
            f"{bundle.path} has {len(fitting)} engines that fit this machine",
            expected="one or a choice",
            cure=f"open it with engine=, one of {', '.join(sorted(fitting))}",
        )
    if absent is not None and len(faults) == 1:
        raise absent
    kind = BackendUnavailableError if engine is None else BackendError
    raise _none_fits(bundle, faults, kind)


def _none_fits(bundle: Bundle, faults: list[VzipError], kind: type[BackendError]) -> BackendError:
    """Return the error for engines of which none fits this machine."""
    if len(faults) > 1:
        return kind(
            f"{bundle.path} has no engine that fits this machine",
            cause=" | ".join(str(fault) for fault in faults),
        )
    (one,) = faults
    return kind(f"{bundle.path}: {one.got}", expected=one.expected, cause=one.cause, cure=one.cure)
