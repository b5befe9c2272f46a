"""CPU engines: which of a bundle's fits this machine, and what is checked before one runs.

A CPU engine is the bundle's graph, rewritten for ONNX Runtime or compiled by OpenVINO on one model
of processor. Integer products saturate on one processor and not on another, and kernels change with
the library. So an engine runs only where it was proven: on that processor, with that version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from vzip.runtime import console
from vzip.runtime.backends.packages import version_of
from vzip.runtime.bundle import graph_check, graph_limits
from vzip.runtime.bundle.engine_record import CpuTarget, EngineRecord
from vzip.runtime.bundle.reader import FASTEST, Bundle, naming, open_engine, weights
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
    VzipError,
)
from vzip.runtime.machine import sensors
from vzip.runtime.machine.record import processor

TITLES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Stack of a CPU engine, which is the name of the backend that runs it → the library's name."""

_said: set[str] = set()


def stack_to_try(bundle: Bundle) -> str | None:
    """Return the backend that runs the CPU engine which fits this machine; None if none fits.

    Of several that fit, whose names `choose` then asks for, the first one's.
    """
    if bundle.cpu_engine == "never" or bundle.quantised is not None:
        return None
    records = _records(bundle)
    fitting = (each.stack for name, each in records.items() if unfit(bundle, name) is None)
    return next(fitting, None)


def choose(bundle: Bundle, engine: str | None, stack: str) -> str | None:
    """Return the CPU engine to run; None for the bundle's graph.

    What is taken without being asked for is said once on standard error; so is what doesn't fit.

    Args:
        bundle: The bundle.
        engine: Name of the engine asked for; None leaves it to `Bundle.cpu_engine`.
        stack: Whose engines can be run, a key of `TITLES`.

    Raises:
        InvalidInputError: There is no CPU engine of that name.
        BackendError: The engine asked for doesn't fit this machine; or none does and one must.
        MissingDependencyError: Its library isn't installed.
    """
    records = _records(bundle)
    cure = f"make one here with: {build_command(bundle)}"
    if engine is not None:
        if engine not in records:
            raise InvalidInputError(
                f"{bundle.path} has no CPU engine {engine!r}",
                expected=f"one of {', '.join(sorted(records))}"
                if records
                else "a CPU engine in it",
                cure=cure,
            )
        if (fault := unfit(bundle, engine)) is not None:
            raise fault
        return engine
    if bundle.cpu_engine == "never" or bundle.quantised is not None:
        return None
    faults = {name: unfit(bundle, name) for name in records}
    fitting = [name for name, fault in faults.items() if fault is None]
    if len(fitting) > 1:
        raise BackendError(
            f"{bundle.path} has {len(fitting)} CPU engines that fit this machine",
            expected="one or a choice",
            cure=f"open it with engine=, one of {', '.join(sorted(fitting))}",
        )
    found = [fault for fault in faults.values() if fault is not None]
    if bundle.cpu_engine == "must":
        if fitting:
            return fitting[0]
        if found:
            raise found[0]
        raise BackendError(
            f"{bundle.path} has no CPU engine",
            expected=f"one for this machine, which precision='{FASTEST}' runs",
            cure=cure,
        )
    for name in fitting:
        form, own = _target(records[name]).form, bundle.manifest.precision
        if records[name].stack != stack:
            _say(
                f"{bundle.path}: the bundle's own graph runs; the backend "
                f"'{records[name].stack}' (--backend {records[name].stack}) runs the CPU engine "
                f"{name!r} (form {form})"
            )
            return None
        _say(
            f"{bundle.path}: the CPU engine {name!r} (form {form}) runs; "
            f"precision={own!r} (--precision {own}) runs the bundle's own graph"
        )
        return name
    for fault in found:
        _say(f"{fault}; until then the bundle's own graph runs")
    return None


def unfit(bundle: Bundle, name: str) -> VzipError | None:
    """Return the error for a CPU engine that can't run here; None if it can.

    Args:
        bundle: The bundle.
        name: Name of a CPU engine that its manifest records.
    """
    record = bundle.manifest.engines[name]
    target, where = _target(record), f"{bundle.path}: the CPU engine {name!r}"
    cure = f"make it anew here with: {build_command(bundle)}"
    if bundle.cpu_engine == "never" and record.quantised != bundle.quantised:
        return InvalidInputError(
            f"{where} was made from the graph in {record.precision}",
            expected=f"one from the graph in {bundle.precision}, as the precision says",
            cure="leave the precision out",
        )
    try:
        version = version_of(record.stack, where)
    except MissingDependencyError as error:
        return error
    conditions = (
        ("from a graph with SHA-256", record.model_sha256, _graph_digest(bundle, record), ""),
        (
            f"with {TITLES[record.stack]}",
            record.version,
            version,
            "it is proven for one version alone",
        ),
        ("on", target.processor, processor(), "it is proven for one processor alone"),
        (
            "with the instructions",
            " ".join(target.instructions),
            " ".join(sensors.instructions()),
            "processors of one name differ in them, and so do their products in 8 bits",
        ),
    )
    for how, made, here, cause in conditions:
        if made != here:
            return BackendError(
                f"{where} was made {how} {made}", expected=here, cause=cause, cure=cure
            )
    if record.proof is None or record.proof["passed"] is not True:
        return BackendError(f"{where} has not passed its proof", expected="one that has", cure=cure)
    return None


def read_engine(bundle: Bundle, name: str) -> bytes:
    """Return the bytes of a CPU engine of ONNX Runtime's that are those that were recorded.

    A session is made from them: what was checked is what runs. Weights that lie in the bundle's
    file are checked too, and what the graph holds.

    Args:
        bundle: The bundle.
        name: Name of a CPU engine that fits.

    Raises:
        BundleError: The file, or that of the weights, is missing, no plain file, or damaged; or the
            graph reads another file.
    """
    record = bundle.manifest.engines[name]
    with _opened(bundle, name) as file:
        model = file.read()
    _check_digest(bundle, name, model)
    source, file_name = bundle.at(record.precision), f"engines/{name}.plan"
    data_file = f"{source.graph_file}.data"
    listed = bundle.manifest.files.get(data_file)
    operators = graph_check.CPU_ENGINE | (graph_check.QUANTISED if source.quantised else set())
    with naming(bundle.path):
        graph_check.check_graph(
            model,
            file=file_name,
            data_file=data_file,
            data_bytes=None if listed is None else listed.bytes,
            operators=operators,
        )
        with weights(bundle.path, bundle.manifest, data_file) as read:
            batch = bundle.manifest.batch.max
            graph_limits.check_encoder(model, read, file=file_name, batch=batch)
        shared = bool(graph_check.external_tensors(model, file=file_name))
    if shared:
        with bundle.open_file(data_file):  # which compares its digest
            pass
    return model


def read_compiled(bundle: Bundle, name: str) -> bytearray:
    """Return the bytes of a CPU engine of OpenVINO's that are those that were recorded.

    They hold all that it needs, in a form that is OpenVINO's alone; it is believed, as engines of
    TensorRT's are.

    Args:
        bundle: The bundle.
        name: Name of a CPU engine that fits.

    Raises:
        BundleError: The file is missing, no plain file, or damaged.
    """
    with _opened(bundle, name) as file:
        data = bytearray(bundle.manifest.engines[name].bytes)
        file.readinto(data)  # type: ignore[attr-defined]
    _check_digest(bundle, name, data)
    return data


def check_engine(bundle: Bundle, name: str) -> None:
    """Refuse the file of a CPU engine that isn't what was recorded, as it is when it is opened.

    Raises:
        BundleError: As for `read_engine` and `read_compiled`.
    """
    if bundle.manifest.engines[name].stack == "openvino":
        read_compiled(bundle, name)
    else:
        read_engine(bundle, name)


@contextlib.contextmanager
def _opened(bundle: Bundle, name: str) -> Iterator[BinaryIO]:
    """Open a CPU engine's file, whose size is the recorded one."""
    record = bundle.manifest.engines[name]
    with open_engine(bundle, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            raise BundleError(
                f"{bundle.path}: the CPU engine {name!r} has {size} bytes",
                expected=str(record.bytes),
                cause="it was truncated or replaced",
                cure=f"make it anew with: {build_command(bundle)}",
            )
        yield file


def _check_digest(bundle: Bundle, name: str, data: bytes | bytearray) -> None:
    record = bundle.manifest.engines[name]
    if (got := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise BundleError(
            f"{bundle.path}: the CPU engine {name!r} has SHA-256 {got[:12]}…",
            expected=f"{record.sha256[:12]}…",
            cause="it was damaged or replaced",
            cure=f"make it anew with: {build_command(bundle)}",
        )


def weights_folder(bundle: Bundle, name: str) -> Path:
    """Return the folder in which the external data of a CPU engine lies."""
    return bundle.at(bundle.manifest.engines[name].precision).weights_folder


def held_weights(bundle: Bundle, name: str) -> dict[str, bytes]:
    """Return the weights of a CPU engine that are small enough, see `Bundle.held_weights`."""
    return bundle.at(bundle.manifest.engines[name].precision).held_weights()


def build_command(bundle: Bundle) -> str:
    """Return the command that makes a CPU engine."""
    return f"vzip build {bundle.path} --cpu"


def _records(bundle: Bundle) -> dict[str, EngineRecord]:
    return {name: each for name, each in bundle.manifest.engines.items() if each.cpu is not None}


def _target(record: EngineRecord) -> CpuTarget:
    assert record.cpu is not None  # callers ask about CPU engines alone
    return record.cpu


def _graph_digest(bundle: Bundle, record: EngineRecord) -> str:
    """Return the SHA-256 of the bundle's graph that an engine would have to be made from."""
    manifest = bundle.manifest
    if record.precision not in (manifest.precision, *manifest.precisions):
        return f"a graph in {record.precision}, of which the bundle has none"
    return manifest.files[bundle.at(record.precision).graph_file].sha256


def _say(text: str) -> None:
    """Say something once in a process."""
    if text not in _said:
        _said.add(text)
        console.say(f"vzip: {text}")
