"""`vzip build --cpu`: the fastest form of a bundle's graph on this CPU, published as an engine.

It needs onnx, onnx_ir and ONNX Runtime, and nothing of PyTorch. The steps are those of every
engine: reuse, choice with proof, publication; one builder at a time works on a bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Final

from vzip.export.engines.published import BuiltEngine, build_lock
from vzip.export.engines.tensorrt.request import BuildRequest
from vzip.runtime.backends import cpu_engine
from vzip.runtime.backends.packages import import_onnxruntime, version_of
from vzip.runtime.bundle.engine_record import CpuTarget, EngineBatch, EngineRecord
from vzip.runtime.bundle.manifest import REFERENCE_FILE
from vzip.runtime.bundle.precision_record import files_of
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import add_engine, check_writable
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
    require,
)
from vzip.runtime.files.codec import Scalar
from vzip.runtime.machine import sensors
from vzip.runtime.machine.process import cores, thread_limit
from vzip.runtime.machine.record import processor
from vzip.runtime.wording import counted

Say = Callable[[str], None]

_RELEASE: Final = r"[0-9]+(\.[0-9]+){1,3}"
VERSION: Final = 5
"""Goes up when forms, or how they are chosen, change: engines of before are then made anew."""


def build_cpu(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    batch: int | None = None,
    say: Say,
) -> BuiltEngine:
    """Make the CPU engine of a bundle for this machine and publish it there.

    Args:
        path: The bundle.
        name: The engine's name; None for one after the processor.
        batch: The only batch that forms are timed in; None for one picture and several.
        say: Told, in lines, what goes on.

    Returns:
        The engine. One that exists is reused if a new one would be chosen from the same forms on
        the same processor, and its file has the digest of its record.

    Raises:
        InvalidInputError: The bundle was exported without pictures to compare on, or takes no such
            batch.
        MissingDependencyError: A package of the extra ``cpu-build`` is not installed.
        BundleError: The bundle is damaged, or can't be written to.
        BackendError: The bundle's own graph can't be run.
        ParityError: No form agrees. Nothing is published then.
    """
    require("onnx", "onnx_ir", needed_for="an engine for the CPU", extra="cpu-build")
    version = str(import_onnxruntime("an engine for the CPU", "cpu-build").__version__)
    if not re.fullmatch(_RELEASE, version):
        raise BackendError(
            f"onnxruntime is {version}",
            expected="a release, by whose number the engine is told",
            cure="install one with: pip install onnxruntime",
        )
    openvino = _openvino(say)
    bundle = read_bundle(path).at(None)
    if REFERENCE_FILE not in bundle.manifest.files:
        raise InvalidInputError(
            f"{bundle.path} has no {REFERENCE_FILE}",
            expected="PyTorch's tokens to tell which forms keep the same",
            cause="the bundle was exported with --no-check",
            cure="export the bundle without it",
        )
    name = BuildRequest(name=name).name or _default_name()
    takes = bundle.manifest.batch
    if batch is not None and not (1 if takes.dynamic else takes.max) <= batch <= takes.max:
        raise InvalidInputError(
            f"got opt_batch={batch} (--opt-batch)",
            expected=f"1 to {takes.max}" if takes.dynamic else str(takes.max),
            cause="the graph takes no others",
        )
    asked: dict[str, Scalar] = {
        "forms": VERSION,
        "onnxruntime": version,
        "openvino": openvino,
        "batch": batch or 0,
    }
    with build_lock(bundle, say):
        bundle = read_bundle(path).at(None)  # whoever held the lock may have made it
        if (found := _reused(bundle, name, asked)) is not None:
            return BuiltEngine(_may(bundle), name, found, reused=True)
        check_writable(bundle)
        say(
            f"making '{name}' with ONNX Runtime {version}"
            f"{f' or OpenVINO {openvino}' if openvino else ''} for {processor()}, "
            f"{counted(_threads(), 'core')}"
        )
        start = time.monotonic()
        from vzip.export.engines.cpu.choice import choose

        choice = choose(bundle, say=say, batch=batch)
        chosen = choice.candidate
        data = chosen.engine()
        source = bundle.at(chosen.precision)
        say(f"the fastest that agrees is the form {chosen.form}: proof {choice.proof}")
        record = EngineRecord(
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            stack=chosen.stack,
            version=version if chosen.stack == "onnxruntime" else openvino,
            gpu=None,
            sm=(),
            jetpack=None,
            precision=chosen.precision,
            batch=(
                EngineBatch(1, batch or 1, takes.max)
                if takes.dynamic
                else EngineBatch(takes.max, takes.max, takes.max)
            ),
            model_sha256=bundle.manifest.files[source.graph_file].sha256,
            settings=_settings(bundle, asked),
            seconds=round(time.monotonic() - start, 1),
            fused_attention=None,
            proof=choice.proof.to_json(),
            cpu=CpuTarget(
                processor(), tuple(sensors.instructions()), _threads(), chosen.form, choice.measured
            ),
        )
        made = _may(add_engine(source, name, record, data))
        return BuiltEngine(made, name, record, reused=False)


def _openvino(say: Say) -> str:
    """Return the version of OpenVINO, empty where it isn't installed or is no release; say why."""
    try:
        version = version_of("openvino", "its forms of an engine for the CPU")
    except MissingDependencyError as error:
        say(f"OpenVINO's forms aren't measured: {error}")
        return ""
    if not re.fullmatch(_RELEASE, version):
        say(f"OpenVINO's forms aren't measured: openvino is {version}, which is no release")
        return ""
    return version


def _reused(bundle: Bundle, name: str, asked: Mapping[str, Scalar]) -> EngineRecord | None:
    """Return the record of an engine that is as good as a new one; None if there is none."""
    found = bundle.manifest.engines.get(name)
    if found is None or found.cpu is None or cpu_engine.unfit(_may(bundle), name):
        return None
    if found.cpu.threads != _threads() or found.settings != _settings(bundle, asked):
        return None
    try:
        cpu_engine.check_engine(bundle, name)
    except BundleError:
        return None  # missing or damaged: making it anew puts it right
    return found


def _may(bundle: Bundle) -> Bundle:
    """Return the bundle as `read_bundle` gives it: the engine may run."""
    return dataclasses.replace(bundle, quantised=None, cpu_engine="may")


def _settings(bundle: Bundle, asked: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return what the choice depends on beside the machine: what is asked for, and the graphs."""
    files = bundle.manifest.files
    data = bundle.data_path
    names = {bundle.graph_file, REFERENCE_FILE, *([] if data is None else [data.name])}
    names |= {name for each in bundle.manifest.precisions for name in files_of(each)}
    digests = {name: files[name].sha256 for name in sorted(names) if name in files}
    text = json.dumps(digests, sort_keys=True)
    return {**asked, "chosen_from": hashlib.sha256(text.encode()).hexdigest()}


def _default_name() -> str:
    """Return a name after the processor: a bundle may have engines for several."""
    return "cpu-" + (re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-") or "unknown")[:90]


def _threads() -> int:
    """Return how many cores the forms are timed on."""
    return thread_limit() or cores()
