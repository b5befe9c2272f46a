"""Steps of first contact that build and run engines; each runs in a process of its own.

Nothing is published: an engine goes into a folder of first contact's own, and is opened there as
the runtime opens an engine of a bundle. So one whose tokens differ is looked at like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from vzip.export.contact.machine_steps import PACKAGES, need_gpu
from vzip.export.contact.notes import Notes, NotHereError
from vzip.runtime import demo
from vzip.runtime.agreement.gates import ENGINE
from vzip.runtime.agreement.proof import prove
from vzip.runtime.agreement.reference_file import Reference, load_reference
from vzip.runtime.backends.tensorrt.logger import listening
from vzip.runtime.bundle.engine_record import (
    ENGINE_SUFFIX,
    ENGINES_FOLDER,
    EngineBatch,
    EngineRecord,
)
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, Manifest
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BackendError
from vzip.runtime.files import codec
from vzip.runtime.machine import process
from vzip.runtime.machine.record import state

PLAN: Final = "first"
"""Name of an engine that first contact built, in a folder of its own."""

RECORD: Final = "record.json"
INSPECTOR: Final = "inspector.json"

AHEAD: Final = ("86",)
"""What TensorRT-RTX compiles for where there is no GPU."""

_CALLS, _LAYER_CALLS, _SLOWEST, _OPENINGS = 200, 20, 20, 50


def build(
    notes: Notes,
    *,
    bundle: str,
    folder: str,
    precision: str | None,
    level: int | None,
    graph: str | None,
) -> None:
    """Build an engine, without publishing it: for the GPU here, or ahead of time without one.

    Args:
        notes: Where findings go.
        bundle: The bundle.
        folder: Where the engine goes, for the steps that run it.
        precision: Of the graph; None for the bundle's own.
        level: Builder optimisation level; None for TensorRT's own.
        graph: Another graph of the same inputs and outputs; None for the bundle's.
    """
    from vzip.export.engines.tensorrt.api import installed_bindings
    from vzip.export.engines.tensorrt.build import build as compiled
    from vzip.export.engines.tensorrt.request import (
        BuildRequest,
        BuildTarget,
        first_settings,
        this_machine,
    )

    opened = read_bundle(bundle).at(precision)
    ahead = _ahead_of_time()
    bindings = installed_bindings(ahead_of_time=ahead)
    machine = BuildTarget(None, AHEAD, None) if ahead else this_machine()
    manifest = opened.manifest
    settings = first_settings(BuildRequest(level=level), manifest, AHEAD if ahead else ())
    notes.note(with_=str(bindings), for_=machine.sm, settings=settings.to_json(bindings))
    model, path = opened.read_model(), opened.weights_folder / opened.graph_file
    if graph is not None:
        path = Path(graph)
        model = path.read_bytes()
    start = time.monotonic()
    with _heard(bindings.name):
        built = compiled(bindings, model, path, manifest, settings=settings, timing_cache=b"",
                         quantised=opened.quantised)  # fmt: skip
    plan = built.plan
    notes.note(
        seconds=round(time.monotonic() - start, 2),
        bytes=plan.nbytes,
        header=bytes(plan[:64]).hex(),
        warnings=built.warnings,
        host_peak_mib=round(process.peak_mib(), 1),
    )
    batch = manifest.batch
    record = EngineRecord(
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=plan.nbytes,
        stack=bindings.name,
        version=bindings.version,
        gpu=machine.gpu,
        sm=machine.sm,
        jetpack=machine.jetpack,
        precision=opened.precision,
        batch=EngineBatch(1 if batch.dynamic else batch.max, settings.opt_batch, batch.max),
        model_sha256=manifest.files[opened.graph_file].sha256,
        settings=settings.to_json(bindings),
        seconds=notes.found["seconds"],
        fused_attention=None,
        proof=None,
    )
    place = Path(folder) / ENGINES_FOLDER
    place.mkdir(parents=True)
    (place / f"{PLAN}{ENGINE_SUFFIX}").write_bytes(plan)
    (Path(folder) / RECORD).write_text(json.dumps(codec.write(record)), encoding="utf-8")


def _ahead_of_time() -> bool:
    """Return whether an engine can only be compiled for another GPU than this machine's.

    Raises:
        NotHereError: Not even that.
    """
    try:
        need_gpu()
    except NotHereError as error:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            raise NotHereError(f"{error}, and no TensorRT-RTX to compile without one") from None
        return True
    if not any(importlib.util.find_spec(each) for each in PACKAGES):
        raise NotHereError("neither TensorRT nor TensorRT-RTX is installed")
    return False


@contextlib.contextmanager
def _heard(stack: str) -> Iterator[None]:
    """Write all that TensorRT says to standard output, which the parent keeps."""
    start = time.monotonic()

    def hear(severity: str, message: str) -> None:
        sys.stdout.write(f"{time.monotonic() - start:9.3f} {severity}: {message.rstrip()}\n")

    with listening(importlib.import_module(stack), hear):
        yield


def run(
    notes: Notes, bundle: str, folder: str, precision: str | None, *, long: bool = False
) -> None:
    """Run an engine that `build` made: look into it, prove it token by token, time it.

    Args:
        notes: Where findings go.
        bundle: The bundle.
        folder: Of the engine.
        precision: Of the graph that it was built from.
        long: Whether memory and clocks are watched, as for a model of true size.
    """
    need_gpu()
    opened = read_bundle(bundle).at(precision)
    place = Path(folder)
    if not (place / RECORD).is_file():
        raise NotHereError("there is no engine: its build failed")
    record = codec.read(EngineRecord, json.loads((place / RECORD).read_text(encoding="utf-8")))
    candidate = Bundle(
        place, dataclasses.replace(opened.manifest, engines={PLAN: record}), opened.quantised
    )
    notes.note(before=state(), device_memory=_device_memory())
    with _heard(record.gpu_stack):
        _look_into(notes, candidate, record, place)
        _prove_and_time(notes, candidate, record, load_reference(opened))
    notes.note(after=state(), host_peak_mib=round(process.peak_mib(), 1))
    if long:
        notes.note(device_memory_after=_device_memory())
    if not notes.found["proof"]["passed"]:
        raise BackendError(f"the engine's tokens differ from PyTorch's: {notes.found['verdict']}")


def _device_memory() -> tuple[int, int]:
    from vzip.runtime.backends.tensorrt import cuda

    return cuda.load().memory_info()


def _look_into(notes: Notes, bundle: Bundle, record: EngineRecord, place: Path) -> None:
    """Note what TensorRT's inspector says; what fails here is noted and stops nothing."""
    from vzip.export.engines.tensorrt.api import load_bindings
    from vzip.export.engines.tensorrt.layers import inspector_says, read_layers
    from vzip.runtime.backends.tensorrt.engine_file import read_engine

    try:
        bindings = load_bindings(record.gpu_stack)
        text, memory = inspector_says(bindings, read_engine(bundle, PLAN))
        (place / INSPECTOR).write_text(text, encoding="utf-8")
        layers = read_layers(text, memory)
        notes.note(
            fused_attention=layers.fused_attention,
            layers=len(layers.layers),
            kinds=layers.kinds(),
            precisions=layers.precisions(),
            scratch_bytes=layers.memory,
        )
    except Exception as error:  # noqa: BLE001 - a finding, and no reason to leave the proof out
        notes.note(inspector=f"failed: {type(error).__name__}: {error}")


def _prove_and_time(
    notes: Notes, bundle: Bundle, record: EngineRecord, reference: Reference
) -> None:
    """Prove an engine in each batch size, plainly and by its graph; then time both."""
    from vzip.runtime.backends.tensorrt.backend import TensorRt

    manifest = bundle.manifest
    start = time.monotonic()
    with contextlib.closing(TensorRt(bundle, engine=PLAN)) as backend:
        notes.note(open_s=round(time.monotonic() - start, 3), memory_open=_device_memory())
        rows: dict[str, Any] = {}
        for size in sorted({record.batch.min, record.batch.max}):
            for way in ("plain", "graph"):  # the first run is enqueued plainly, the rest captured
                got = _outputs(backend, reference, manifest, size, once=way == "plain")
                rows[f"{way}, batch {size}"] = tokens_apart(reference, got, manifest)
                notes.note(tokens=rows, captured=backend.captured)
        proof = prove(
            lambda array: backend.run({manifest.input.name: array}),
            reference,
            manifest,
            sorted({record.batch.min, record.batch.max}),
            ENGINE[record.precision],
        )
        notes.note(proof=proof.to_json(), verdict=str(proof))
        size = record.batch.max
        times = {
            "graph": backend.launch_ms(size, _CALLS),
            "plain": backend.launch_ms(size, _CALLS, plain=True),
        }
        notes.note(
            launch_ms={way: [round(each, 4) for each in taken] for way, taken in times.items()},
            median_ms={way: statistics.median(taken) for way, taken in times.items()},
        )
        notes.note(slowest=_slowest(backend.layer_ms(size, _LAYER_CALLS)))


def _slowest(runs: list[list[tuple[str, float]]]) -> list[tuple[str, float]]:
    """Return the slowest layers and the median of what each took."""
    taken: dict[str, list[float]] = {}
    for one in runs[3:]:
        for name, ms in one:
            taken.setdefault(name, []).append(ms)
    medians = {name: round(statistics.median(each), 4) for name, each in taken.items()}
    return sorted(medians.items(), key=lambda item: -item[1])[:_SLOWEST]


def _outputs(
    backend: Any, reference: Reference, manifest: Manifest, size: int, *, once: bool = False
) -> dict[str, Any]:
    """Return what a backend gives for the reference pictures; only those of one batch if `once`."""
    count = len(reference.input)
    parts = []
    for start in range(0, size if once else count, size):
        rows = [number % count for number in range(start, start + size)]
        answer = backend.run({manifest.input.name: np.ascontiguousarray(reference.input[rows])})
        parts.append({name: each[: min(size, count - start)] for name, each in answer.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in (KEPT, EMBEDS)}


def tokens_apart(
    reference: Reference, got: dict[str, Any], manifest: Manifest
) -> list[dict[str, Any]]:
    """Return, picture by picture, how far each token that both keep is from PyTorch's.

    Args:
        reference: The pictures, and what PyTorch says of them.
        got: ``kept_indices`` and ``image_embeds`` of the first of these pictures.
        manifest: Of the bundle.

    Returns:
        Of each picture ``foreign`` (tokens that the reference doesn't keep), ``token``, ``error``
        (relative to the picture's largest magnitude) and ``cosine``; ``merged_cosine`` of each
        merged token, where the same tokens are kept. −1 stands for what isn't finite.
    """
    found = []
    dominant = manifest.selection.dominant
    for right_kept, right_rows, kept, rows in zip(
        reference.kept, reference.embeds, got[KEPT], got[EMBEDS], strict=False
    ):
        expected, here = right_rows.astype(np.float64), rows.astype(np.float64)
        both, there, mine = np.intersect1d(right_kept, kept, return_indices=True)
        scale = max(float(np.abs(expected).max()), 1e-300)
        error = np.abs(expected[there] - here[mine]).max(axis=1, initial=0.0) / scale
        same = np.array_equal(np.sort(right_kept), np.sort(kept))
        found.append({
            "foreign": np.setdiff1d(kept, right_kept),
            "token": both,
            "error": _rounded(error),
            "cosine": _rounded(_cosines(expected[there], here[mine])),
            "merged_cosine": _rounded(_cosines(expected[dominant:], here[dominant:]))
            if same
            else None,
        })  # fmt: skip
    return found


def _cosines(a: Any, b: Any) -> Any:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / np.maximum(lengths, 1e-300)


def _rounded(values: Any) -> list[float]:
    return [round(float(each), 7) if np.isfinite(each) else -1.0 for each in values]


def cpu(notes: Notes, bundle: str, precision: str | None) -> None:
    """Prove a bundle's graph on this CPU, token by token: what is wrong here is not the GPU's."""
    from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu

    if importlib.util.find_spec("onnxruntime") is None:
        raise NotHereError("ONNX Runtime is not installed")
    opened = read_bundle(bundle).at(precision)
    reference, manifest = load_reference(opened), opened.manifest
    start = time.monotonic()
    with contextlib.closing(OnnxRuntimeCpu(opened)) as backend:
        notes.note(open_s=round(time.monotonic() - start, 3))
        got = _outputs(backend, reference, manifest, manifest.batch.max)
        notes.note(tokens=tokens_apart(reference, got, manifest))
        proof = prove(
            lambda array: backend.run({manifest.input.name: array}), reference, manifest,
            [manifest.batch.max], ENGINE[opened.precision],
        )  # fmt: skip
    notes.note(proof=proof.to_json(), verdict=str(proof))
    if not proof.passed:
        raise BackendError(f"ONNX Runtime's tokens differ from PyTorch's: {proof}")


# As a user does it


def command(notes: Notes, bundle: str, folder: str) -> None:
    """Run `vzip build` on a copy of a bundle, and `vzip encode` with what it built."""
    copy = Path(folder) / "bundle"
    shutil.copytree(bundle, copy)
    options = ["--rtx", f"sm{AHEAD[0]}"] if _ahead_of_time() else []
    done = _vzip("build", str(copy), *options)
    notes.note(status_of_build=done.returncode, output=done.stdout + done.stderr)
    if done.returncode:
        raise BackendError(f"vzip build ended with status {done.returncode}")
    engines = read_bundle(copy).manifest.engines
    notes.note(engines={name: codec.write(record) for name, record in engines.items()})
    if options and importlib.util.find_spec("onnxruntime") is None:
        return  # nothing here runs what was built
    backend = "onnxruntime" if options else "tensorrt"
    picture = demo.pictures() / "scene-1.jpg"
    written = str(Path(folder) / "tokens.npy")
    done = _vzip("encode", str(copy), str(picture), "-o", written, "--backend", backend)
    notes.note(status_of_encode=done.returncode, output_of_encode=done.stdout + done.stderr)
    if done.returncode:
        raise BackendError(f"vzip encode ended with status {done.returncode}")


def killed(notes: Notes, bundle: str, folder: str) -> None:
    """Kill a build in its midst; the bundle must be as it was, and the next build whole."""
    copy = Path(folder) / "bundle"
    shutil.copytree(bundle, copy)
    options = ["--rtx", f"sm{AHEAD[0]}"] if _ahead_of_time() else []
    before = (copy / "manifest.json").read_bytes()
    child = subprocess.Popen(  # noqa: S603  our own command
        _command("build", str(copy), *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=_environment(),
    )  # fmt: skip
    assert child.stdout is not None
    with child.stdout as said:
        begun = any(b"settings:" in line for line in said)
        running = child.poll() is None
        child.send_signal(signal.SIGKILL)
    child.wait()
    notes.note(begun=begun, killed_while_running=running)
    # A small network may be built and recorded before the signal comes; then that is whole.
    untouched = (copy / "manifest.json").read_bytes() == before
    notes.note(manifest_untouched=untouched)
    read_bundle(copy)
    start = time.monotonic()
    done = _vzip("build", str(copy), *options)
    notes.note(status_of_build=done.returncode, output=done.stdout + done.stderr,
               seconds=round(time.monotonic() - start, 2))  # fmt: skip
    left = [path.name for path in copy.rglob("*") if path.name.startswith(".")]
    notes.note(left=left)
    if done.returncode or not begun:
        raise BackendError("a build that was killed left a bundle that can't be built")


def reopened(notes: Notes, bundle: str, folder: str, precision: str | None) -> None:
    """Open and close a bundle many times, with memory read; and again in a second process."""
    from vzip.runtime import VisionEncoder

    opened = read_bundle(bundle).at(precision)
    place = Path(folder)
    engine = (place / RECORD).is_file() and not _ahead_of_time()
    batch = opened.manifest.batch
    pictures = load_reference(opened).input
    picture = pictures[[k % len(pictures) for k in range(1 if batch.dynamic else batch.max)]]
    if engine:
        record = codec.read(EngineRecord, json.loads((place / RECORD).read_text(encoding="utf-8")))
        manifest = dataclasses.replace(opened.manifest, engines={PLAN: record})
        subject = Bundle(place, manifest, opened.quantised)
    elif importlib.util.find_spec("onnxruntime") is None:
        raise NotHereError("neither an engine nor ONNX Runtime is here to be opened")
    else:
        subject = opened
    notes.note(backend="tensorrt" if engine else "onnxruntime")
    memory, digests = [], set()
    for _ in range(_OPENINGS):
        with VisionEncoder.open(subject, backend="tensorrt" if engine else "onnxruntime") as one:
            tokens = one.run(picture)
            digests.add(hashlib.sha256(np.ascontiguousarray(tokens.embeds).tobytes()).hexdigest())
        memory.append((_resident_mib(), _device_memory()[0] if engine else None))
    notes.note(memory=memory, different_results=len(digests))
    grown = memory[-1][0] - memory[len(memory) // 5][0]
    notes.note(grown_mib=round(grown, 1))
    if len(digests) != 1:
        raise BackendError(f"one picture became {len(digests)} different results")


def _resident_mib() -> float:
    """Return the memory that this process has now, in MiB; 0 where the kernel doesn't say."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0.0
    return round(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vzip.runtime", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _vzip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of vzip's commands as a user does."""
    return subprocess.run(  # noqa: S603  our own command
        _command(*arguments), capture_output=True, text=True, errors="replace", check=False,
        stdin=subprocess.DEVNULL, env=_environment(),
    )  # fmt: skip
