"""OpenVINO on the CPU: a bundle's graph in FP32, and the CPU engines that are OpenVINO's.

An engine is one compiled model, or two that run one after the other. With BF16 as the precision of
a whole graph OpenVINO merges wrong tokens: ranks and sums are counted in BF16 too, exact up to 256,
and its own mark for nodes that are to keep FP32 (``DisablePrecisionConversion``) changes nothing
on the CPU (2026.4). So the graph is cut where the tower's tokens are chosen from: the tower runs
in the precision that is asked for, the rest (selection, merging, projector) in FP32.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.backends import cpu_engine
from vzip.runtime.backends.forks import outlive_forks
from vzip.runtime.backends.packages import import_openvino
from vzip.runtime.bundle.graph_check import external_tensors
from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, first_line
from vzip.runtime.files.names import in_utf8
from vzip.runtime.machine import process
from vzip.runtime.machine.record import processor

STACK: Final = "openvino"
EXTRA: Final = "openvino"
DEVICE: Final = "CPU"
FP32: Final = "f32"
_GRAPH: Final = "model.onnx"
_PARTS: Final = ("tower", "rest")
_WITHOUT_INTEGERS: Final = {"LP_TRANSFORMS_MODE": "NO"}
_ALIGNED: Final = 64
_LONGEST_HEAD: Final = 4096


@dataclass(frozen=True)
class CompiledPart:
    """A compiled model.

    Attributes:
        compiled: OpenVINO's CompiledModel.
        precision: What it computes in, as OpenVINO calls it: ``f32``, ``bf16`` or ``f16``.
        shared: What lives as long as it must.
    """

    compiled: Any
    precision: str
    shared: object = None


class OpenVinoCpu:
    """Models of OpenVINO that run one after the other.

    Attributes:
        name: The backend's name.
        engine: Name of the engine that it runs; None where it is the bundle's graph.
        device: The processor.
        threads: How many threads run it.
    """

    name = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        extra_outputs: tuple[str, ...] = (),
        *,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Open the bundle's graph, in FP32, or a CPU engine of OpenVINO's.

        Args:
            bundle: The bundle; its `Bundle.cpu_engine` says whether a CPU engine is taken.
            extra_outputs: Values inside the graph that `run` returns as well; an engine has
                `TOKEN_WEIGHTS` alone.
            engine: Name of a CPU engine; None leaves it to the bundle.
            threads: How many threads run it; None for `process.threads`.
        """
        openvino = import_openvino(f"the backend '{self.name}'", EXTRA)
        number = process.threads() if threads is None else process.check_threads(threads)
        self.engine = cpu_engine.choose(bundle, engine, STACK)
        outputs = (*(each.name for each in bundle.manifest.outputs), *extra_outputs)
        if self.engine is None:
            if bundle.quantised == "fp8":
                raise BackendError(
                    f"{bundle.path}: the backend '{self.name}' can't run the graph in fp8",
                    expected="a graph in fp32, fp16 or int8",
                    cause="OpenVINO rounds to FP8 otherwise than ONNX says",
                    cure="take backend='onnxruntime'",
                )
            graph, held = bundle.read_model(), bundle.held_weights()
            with read_model(openvino, graph, bundle.weights_folder, held) as model:
                parts = compiled(openvino, model, FP32, number, extra_outputs)
        else:
            where = f"{bundle.path}: the CPU engine {self.engine!r}"
            data = cpu_engine.read_compiled(bundle, self.engine)
            if unknown := [each for each in extra_outputs if each != TOKEN_WEIGHTS]:
                raise BackendError(
                    f"{where} has no value {unknown[0]!r}",
                    expected=TOKEN_WEIGHTS,
                    cause="an engine keeps of its graph's values no others",
                    cure="open the bundle's own graph with its precision",
                )
            parts = imported(openvino, data, number, where)
        self._set_up(parts, outputs, number)

    @classmethod
    def of_graph(
        cls, graph: bytes, folder: Path, precision: str, outputs: Sequence[str]
    ) -> OpenVinoCpu:
        """Compile a graph that is in no bundle yet; it can be written with `exported`.

        Args:
            graph: The serialised graph, which is believed.
            folder: Where its external data lies.
            precision: What the tower computes in: ``f32``, ``bf16`` or ``f16``.
            outputs: Names of the graph's outputs.
        """
        openvino = import_openvino("an engine for the CPU", EXTRA)
        self = cls.__new__(cls)
        self.engine = None
        number = process.threads()
        with read_model(openvino, graph, folder, {}) as model:
            parts = compiled(openvino, model, precision, number, (TOKEN_WEIGHTS,))
        self._set_up(parts, outputs, number)
        return self

    def _set_up(self, parts: Sequence[CompiledPart], outputs: Sequence[str], threads: int) -> None:
        self.device, self.threads = processor(), threads
        self._parts, self._outputs = tuple(parts), tuple(outputs)
        # One stream has all threads, so calls of several threads would wait for each other anyway.
        self._lock = threading.Lock()
        self._requests: list[Any] | None = [part.compiled.create_infer_request() for part in parts]
        outlive_forks(*(part.compiled for part in parts), *self._requests)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
        """See `Backend.run`."""
        with self._lock:
            if self._requests is None:
                raise BackendError(f"the backend '{self.name}' is closed")
            try:
                return self._run(self._requests, feeds)
            except Exception as error:  # OpenVINO's errors are RuntimeErrors
                raise BackendError(
                    f"{self.name} failed while running the graph: {first_line(error)}",
                    cause="memory was short, or the graph is damaged",
                    cure="call again, or check the bundle with vzip check",
                ) from error

    def _run(
        self, requests: Sequence[Any], feeds: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[np.generic]]:
        """Run one part after the other; what one gives the next one takes where it lies."""
        between: dict[str, Any] = {}
        for request in requests:
            given: dict[str, Any] = {}
            for entry in request.model_inputs:
                name = _name(entry, feeds) or _name(entry, between)
                if name in feeds:
                    given[name] = np.ascontiguousarray(feeds[name])
                else:
                    request.set_tensor(entry, between[name])
            request.infer(given, share_inputs=True)
            for result in request.model_outputs:
                tensor = request.get_tensor(result)
                between.update(dict.fromkeys(result.get_names(), tensor))
        # Copies: the next call writes where these lie.
        return {name: np.array(between[name].data) for name in self._outputs}

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._requests = None
            self._parts = ()

    def exported(self) -> bytes:
        """Return an engine's file: a line of JSON, and what OpenVINO exports of each part.

        The line says of each part name, precision and bytes; spaces fill it up to `_ALIGNED`.
        """
        blobs = []
        for part in self._parts:
            blob = io.BytesIO()
            part.compiled.export_model(blob)
            blob.write(bytes(-blob.tell() % _ALIGNED))
            blobs.append(blob.getbuffer())
        parts = [
            {"part": name, "precision": part.precision, "bytes": len(blob)}
            for name, part, blob in zip(_PARTS, self._parts, blobs, strict=False)
        ]
        head = json.dumps({"parts": parts}).encode()
        head += b" " * (-(len(head) + 1) % _ALIGNED) + b"\n"
        return b"".join([head, *blobs])


def capabilities(openvino: Any) -> frozenset[str]:
    """Return what OpenVINO has kernels for on this CPU, such as ``BF16``."""
    return frozenset(openvino.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))


@contextlib.contextmanager
def read_model(
    openvino: Any, graph: bytes, folder: Path, held: Mapping[str, bytes]
) -> Iterator[Any]:
    """Yield OpenVINO's Model of a graph, to be compiled within the block: weights are read then.

    OpenVINO reads external data beside the graph alone, and follows no links there; so the graph is
    written into a folder of its own, with its weights under a second name, or else copied.

    Args:
        openvino: The package.
        graph: The serialised graph, which is believed.
        folder: Where its external data lies.
        held: Files of external data that were read and checked, by name.

    Raises:
        BackendError: OpenVINO can't read the graph.
    """
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # so that nobody can cut a file behind a model
    with tempfile.TemporaryDirectory(prefix="vzip-") as name, in_utf8(Path(name)) as place:
        try:
            for file in {each.location for each in external_tensors(graph)}:
                if file in held:
                    (Path(place) / file).write_bytes(held[file])
                else:
                    _linked(folder / file, Path(place) / file)
            (Path(place) / _GRAPH).write_bytes(graph)
            model = core.read_model(str(Path(place) / _GRAPH))
        except Exception as error:
            raise _unopened("the graph can't be opened", openvino, error) from error
        yield model


def _linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system, or one without hard links
        shutil.copyfile(source, target)


def compiled(
    openvino: Any, model: Any, precision: str, threads: int, extra_outputs: Sequence[str] = ()
) -> list[CompiledPart]:
    """Compile a model; in another precision than FP32 its tower and the rest by themselves.

    Args:
        openvino: The package.
        model: OpenVINO's Model; it is used up.
        precision: Of the tower: ``f32``, ``bf16`` or ``f16``.
        threads: How many threads run it.
        extra_outputs: Values inside it that become outputs.

    Raises:
        BackendError: The model has no such value, or OpenVINO can't compile it.
    """
    try:
        there = {name for each in model.outputs for name in each.get_names()}
        if wanted := [name for name in extra_outputs if name not in there]:
            model.add_outputs(wanted)
        models = [model] if precision == FP32 else cut(openvino, model)
        precisions = [FP32] if precision == FP32 else [precision, FP32]
        core = openvino.Core()
        return [
            CompiledPart(
                core.compile_model(each, DEVICE, {**settings(kind, threads), **_whole_sums(each)}),
                kind,
            )
            for each, kind in zip(models, precisions, strict=True)
        ]
    except BackendError:
        raise
    except Exception as error:
        raise _unopened("the graph can't be opened", openvino, error) from error


def settings(precision: str, threads: int) -> dict[str, Any]:
    """Return how a model is compiled: for one call at a time, which has all threads.

    Threads aren't bound to cores: a process beside this one would then wait for the same core while
    another is idle. They stay within those that this process may use.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }


def _whole_sums(model: Any) -> dict[str, str]:
    """Return with which settings a quantised model computes what it says on this CPU.

    Where sums of bytes saturate, it is computed in floats: slower than with integers, and right.
    The setting is one of OpenVINO's CPU plugin that its documentation doesn't name (2026.4 takes
    it); a compiled model that is exported keeps it.
    """
    quantised = any(each.get_type_name() == "FakeQuantize" for each in model.get_ops())
    return _WITHOUT_INTEGERS if quantised and saturates() else {}


@functools.cache
def saturates() -> bool:
    """Return whether OpenVINO's sums of products of bytes saturate on this CPU.

    x86 without VNNI adds two products in 16 bits: a sum of 64 that is 1,032,256 becomes 8,160.
    """
    import openvino.opset13 as ops
    from openvino import Core, Model

    x = ops.parameter([8, 64], np.float32)
    low, high = np.float32(-128), np.float32(127)
    small = ops.fake_quantize(x, low, high, low, high, 256)
    weights = ops.convert(ops.constant(np.full((64, 32), 127, np.int8)), "f32")
    product = ops.matmul(small, ops.multiply(weights, np.float32(1)), False, False)
    ran = Core().compile_model(Model([product], [x]), DEVICE, settings(FP32, 1))
    return bool((ran(np.full((8, 64), high))[0] != 127.0 * 127 * 64).any())


def imported(openvino: Any, data: bytearray, threads: int, where: str) -> list[CompiledPart]:
    """Return the parts of an engine's file, of `OpenVinoCpu.exported`.

    Args:
        openvino: The package.
        data: The file, which is read as long as a part lives; nothing is copied of it.
        threads: How many threads run it.
        where: The engine, for messages.

    Raises:
        BackendError: It is none, or OpenVINO can't open it.
    """
    try:
        core, parts = openvino.Core(), []
        start = data.index(b"\n", 0, _LONGEST_HEAD) + 1
        for entry in json.loads(bytes(data[:start]))["parts"]:
            precision, size = str(entry["precision"]), int(entry["bytes"])
            blob = np.frombuffer(data, np.uint8, size, start)
            # OpenVINO holds no reference of its own to what it shares.
            tensor = openvino.Tensor(blob, shared_memory=True)
            model = core.import_model(tensor, DEVICE, settings(precision, threads))
            parts.append(CompiledPart(model, precision, (blob, tensor)))
            start += size
        if not parts or start != len(data):
            raise ValueError("its parts aren't as long as it is")  # noqa: TRY301
    except Exception as error:
        raise _unopened(f"{where} can't be opened", openvino, error) from error
    return parts


def cut(openvino: Any, model: Any) -> list[Any]:
    """Cut a model where its tokens are chosen: return its tower and the rest, used up.

    The tower is what leads to the tokens that `TOKEN_WEIGHTS` is multiplied with. What the rest
    reads of it, such as the queries and keys of the selected layer, becomes its outputs.

    Raises:
        BackendError: The graph has no such product.
    """
    weights = next(
        (
            value
            for node in model.get_ops()
            for value in node.outputs()
            if TOKEN_WEIGHTS in value.get_names() and node.get_type_name() != "Result"
        ),
        None,
    )
    merged = [] if weights is None else _beside(weights)
    if not merged:
        raise BackendError(
            f"the graph has no product of {TOKEN_WEIGHTS} with the tower's tokens",
            cause="it was written by something else than vzip export",
        )
    tower = _leading_to(merged)
    parameters: list[Any] = []
    crossing: list[Any] = []
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in tower or node.get_type_name() == "Constant":
            continue
        for value in node.outputs():
            readers = [
                each
                for each in value.get_target_inputs()
                if each.get_node().get_friendly_name() not in tower
            ]
            if not readers:
                continue
            name = f"tower.{len(crossing)}"
            value.get_tensor().add_names({name})
            taken = openvino.opset13.parameter(value.get_partial_shape(), value.get_element_type())
            taken.output(0).get_tensor().set_names({name})
            for each in readers:
                each.replace_source_output(taken.output(0))
            parameters.append(taken)
            crossing.append(value)
    given = list(model.get_parameters())
    return [
        openvino.Model(crossing, given, "tower"),
        openvino.Model(list(model.get_results()), parameters, "rest"),
    ]


def _beside(weights: Any) -> list[Any]:
    """Return what a value is multiplied with, as nodes; in FP16 graphs it is converted before."""
    found = []
    for reader in weights.get_target_inputs():
        node = reader.get_node()
        if node.get_type_name() == "Convert":
            found += _beside(node.output(0))
        elif node.get_type_name() == "MatMul":
            sources = (each.get_source_output() for each in node.inputs())
            found += [each.get_node() for each in sources if each != weights]
    return found


def _leading_to(ends: Sequence[Any]) -> set[str]:
    """Return the names of nodes, and of all that lead to them."""
    seen: set[str] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        waiting += [each.get_source_output().get_node() for each in node.inputs()]
    return seen


def _name(entry: Any, known: Mapping[str, Any]) -> str:
    """Return by which of its names a model's input is known; empty if by none."""
    return next((name for name in entry.get_names() if name in known), "")


def _unopened(what: str, openvino: Any, error: Exception) -> BackendError:
    version = str(openvino.__version__).split("-", 1)[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Its first lines say where in its source, the last one what.
    said = lines[-1] if lines else type(error).__name__
    return BackendError(
        f"{what} by OpenVINO {version}: {said}",
        cause="memory is short, the file is damaged, or it holds what this version doesn't know",
        cure="make the engine anew with vzip build --cpu, or take backend='onnxruntime'",
    )
