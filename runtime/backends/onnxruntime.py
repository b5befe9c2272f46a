"""ONNX Runtime: on the CPU, or on an NVIDIA GPU and nowhere else."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.backends import cpu_engine
from vzip.runtime.backends.forks import outlive_forks
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.backends.protocol import BackendUnavailableError
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, first_line
from vzip.runtime.files.names import in_utf8
from vzip.runtime.machine import process
from vzip.runtime.machine.record import processor

# Where external data lies when the session is made from bytes (ONNX Runtime 1.19 or newer).
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_NO_INTEGERS_KEY = "session.disable_quant_qdq"
_IN_MEMORY = "add_external_initializers_from_files_in_memory"  # not in the oldest versions
_ONNX_ALONE = ("session.load_model_format", "ONNX")  # its own format was looked at by nobody
# Its threads spin for some 35 ms after a call (1.31), on cores that another library works on then:
# python -m benchmarks.beside_torch.
_AT_REST_BETWEEN_CALLS = ("session.force_spinning_stop", "1")
# x86 without VNNI adds two products of unsigned and signed bytes in 16 bits, which saturate. With
# this ONNX Runtime makes both unsigned there; elsewhere it changes nothing (docs/fastest.md).
_WHOLE_SUMS = ("session.x64quantprecision", "1")
_FATAL_ONLY = 4  # what it logs of errors, it raises as well


def session_options(onnxruntime: Any, threads: int | None = None) -> Any:
    """Return the options of a session with a number of threads; None for `process.threads`.

    ONNX Runtime's own number is that of the machine's cores, each with a thread bound to it,
    whatever share of them a container has.

    Raises:
        InvalidInputError: The number makes no sense.
    """
    options = onnxruntime.SessionOptions()
    number = process.threads() if threads is None else process.check_threads(threads)
    options.intra_op_num_threads = number
    options.add_session_config_entry(*_ONNX_ALONE)
    options.add_session_config_entry(*_WHOLE_SUMS)
    return options


def open_session(
    onnxruntime: Any,
    graph: Callable[[], bytes],
    folder: Path,
    *,
    name: str,
    providers: tuple[str, ...],
    extra: str,
    fp8: bool = False,
    threads: int | None = None,
    held: Callable[[], Mapping[str, bytes]] = dict,
    optimised: bool = True,
) -> Any:
    """Return a session that runs on a device and nowhere else.

    Args:
        onnxruntime: The package.
        graph: Gives the bytes of the graph; called when the device is known to be there.
        folder: Where its external data lies.
        name: Who asks, for messages.
        providers: The device's execution provider first.
        extra: The extra of this distribution that brings the package.
        fp8: Whether the graph quantises to FP8.
        threads: How many threads run an operator on the CPU; None for `process.threads`.
        held: Gives files of external data that are not to be mapped, by name; called after `graph`.
        optimised: Whether ONNX Runtime may compute what the graph says in another way.

    Raises:
        InvalidInputError: The number of threads makes no sense.
        BackendUnavailableError: The device, or what runs on it, is absent.
        BackendError: ONNX Runtime can't open the graph.
    """
    wanted = providers[0]
    if wanted not in (available := onnxruntime.get_available_providers()):
        raise BackendUnavailableError(
            f"the installed onnxruntime has {available}",
            expected=wanted,
            cause="it is a build for other devices",
            cure=f"pip uninstall onnxruntime, then pip install 'vzip[{extra}]'",
        )
    options = session_options(onnxruntime, threads)
    options.add_session_config_entry(*_AT_REST_BETWEEN_CALLS)
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    )
    options.log_severity_level = _FATAL_ONLY
    if fp8:
        # ONNX Runtime 1.31 makes integer MatMuls of these too, and then can't run them.
        options.add_session_config_entry(_NO_INTEGERS_KEY, "1")
    model, files = graph(), held()
    in_memory = hasattr(options, _IN_MEMORY)
    if files and in_memory:  # read while the session is made; ONNX Runtime has a copy afterwards
        sizes = [len(each) for each in files.values()]
        getattr(options, _IN_MEMORY)([*files], [*files.values()], sizes)
    try:
        with _copied({} if in_memory else files, folder) as place, in_utf8(place) as named:
            options.add_session_config_entry(_FOLDER_KEY, named)
            session = onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        raise BackendError(
            f"{name} can't open the graph: {first_line(error)}",
            cause=(
                f"memory is short, or it holds what version {onnxruntime.__version__} doesn't know"
            ),
            cure="update onnxruntime, or make another with 'vzip export --opset 17'",
        ) from error
    session.disable_fallback()  # a session that failed is not to go on with other providers
    if (active := session.get_providers())[0] != wanted:
        # ONNX Runtime only logs it when a GPU can't be used, and goes on with the CPU.
        raise BackendUnavailableError(
            f"{name}: the session runs on {active}",
            expected=wanted,
            cause="the GPU, its driver or the CUDA and cuDNN libraries can't be used",
            cure="check nvidia-smi and LD_LIBRARY_PATH, or take backend='onnxruntime'",
        )
    outlive_forks(session)
    return session


@contextlib.contextmanager
def _copied(files: Mapping[str, bytes], folder: Path) -> Iterator[Path]:
    """Yield a folder with files that are mapped, and that nobody can cut once the block is left.

    ONNX Runtime 1.23, the last for Python 3.10, takes no files from memory: it maps them by name. A
    mapped file stays whole when its name is gone.

    Args:
        files: Name → content.
        folder: Where they are; it is yielded if there are none, or no room for a copy.
    """
    with contextlib.ExitStack() as stack:
        place = folder
        if files:
            # Without a place for temporary files an encoder is still of more use than none.
            with contextlib.suppress(OSError):
                private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vzip-")))
                for name, data in files.items():
                    (private / name).write_bytes(data)
                place = private
        yield place


class _OnnxRuntime:
    """An ONNX Runtime session; subclasses say on which device.

    Attributes:
        name: The backend's name.
        engine: Name of the engine that it runs; None where it is the bundle's graph.
        device: What it runs on.
        threads: How many threads run an operator on the CPU.
    """

    name: str
    device: str
    threads: int
    engine: str | None = None
    providers: tuple[str, ...]
    extra: str

    def __init__(
        self,
        bundle: Bundle,
        extra_outputs: tuple[str, ...] = (),
        *,
        threads: int | None = None,
    ) -> None:
        self._open(
            self._import(),
            bundle.read_model,
            bundle.weights_folder,
            extra_outputs,
            fp8=bundle.quantised == "fp8",
            threads=threads,
            held=bundle.held_weights,
        )

    def _import(self) -> Any:
        return import_onnxruntime(f"the backend '{self.name}'", self.extra)

    def _open(
        self,
        onnxruntime: Any,
        read: Callable[[], bytes],
        folder: Path,
        extra_outputs: tuple[str, ...] = (),
        *,
        fp8: bool = False,
        threads: int | None = None,
        held: Callable[[], Mapping[str, bytes]] = dict,
        optimised: bool = True,
    ) -> None:
        """Open a session on this class's device."""

        def graph() -> bytes:
            model = read()
            for output in extra_outputs:
                model = with_output(model, output)
            return model

        self._session: Any = open_session(
            onnxruntime,
            graph,
            folder,
            name=self.name,
            providers=self.providers,
            extra=self.extra,
            fp8=fp8,
            threads=threads,
            held=held,
            optimised=optimised,
        )
        self.threads = self._session.get_session_options().intra_op_num_threads

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
        """See `Backend.run`."""
        session = self._session  # another thread may close: this one then still ends its run
        if session is None:
            raise BackendError(f"the backend '{self.name}' is closed")
        try:
            results = session.run(None, dict(feeds))
        except Exception as error:  # as above
            raise BackendError(
                f"{self.name} failed while running the graph: {first_line(error)}",
                cause="memory was short, or the graph is damaged",
                cure="call again, or check the bundle with vzip check",
            ) from error
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, results, strict=True))

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


class OnnxRuntimeCpu(_OnnxRuntime):
    """ONNX Runtime on the CPU. FP16 graphs run too, converted where the CPU has no FP16 kernel."""

    name = "onnxruntime"
    providers = ("CPUExecutionProvider",)
    extra = "cpu"

    def __init__(
        self,
        bundle: Bundle,
        extra_outputs: tuple[str, ...] = (),
        *,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Open the bundle's graph, or a CPU engine.

        Args:
            bundle: The bundle; its `Bundle.cpu_engine` says whether a CPU engine is taken.
            extra_outputs: Values inside the graph that `run` returns as well.
            engine: Name of a CPU engine; None leaves it to the bundle.
            threads: As for `open_session`.
        """
        self.device = processor()
        onnxruntime = self._import()
        self.engine = cpu_engine.choose(bundle, engine, self.name)
        if self.engine is None:
            super().__init__(bundle, extra_outputs, threads=threads)
        else:
            name, folder = self.engine, cpu_engine.weights_folder(bundle, self.engine)
            self._open(
                onnxruntime,
                lambda: cpu_engine.read_engine(bundle, name),
                folder,
                extra_outputs,
                threads=threads,
                held=lambda: cpu_engine.held_weights(bundle, name),
            )

    @classmethod
    def of_model(
        cls,
        model: bytes,
        folder: Path,
        extra_outputs: tuple[str, ...] = (),
        *,
        optimised: bool = True,
    ) -> OnnxRuntimeCpu:
        """Open a graph that is in no bundle yet.

        Args:
            model: The serialised model, which is believed.
            folder: Where its external data lies.
            extra_outputs: As for the class.
            optimised: As for `open_session`.
        """
        self = cls.__new__(cls)
        self.device = processor()
        self._open(self._import(), lambda: model, folder, extra_outputs, optimised=optimised)
        return self


class OnnxRuntimeCuda(_OnnxRuntime):
    """ONNX Runtime on an NVIDIA GPU. Operators that CUDA has no kernel for may run on the CPU."""

    name = "onnxruntime-cuda"
    device = "GPU 0"
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    extra = "gpu"


def with_output(model: bytes, name: str) -> bytes:
    """Return a serialised ModelProto with the graph's value `name` as an additional output.

    Protobuf merges a message that stands twice, and repeated fields are then concatenated: the
    bytes of a model that holds only this output are simply appended.
    """
    data = name.encode()
    assert len(data) < 120, "longer fields have a length of several bytes"
    # ValueInfoProto.name, GraphProto.output, ModelProto.graph
    for number in (1, 12, 7):
        data = bytes([number << 3 | 2, len(data)]) + data
    return model + data
