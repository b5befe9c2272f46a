"""`vzip build`: a bundle's graph to an engine, proven on the machine that built it, published.

Runs on the target: TensorRT, numpy and nothing of PyTorch. The steps are reuse, estimate, build,
proof, publish; one builder at a time works on a bundle. An engine that fails its proof is never
published.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from vzip.export.engines.published import BuiltEngine, Say, build_lock
from vzip.export.engines.tensorrt import memory as build_memory
from vzip.export.engines.tensorrt.api import Bindings, capabilities_of, installed_bindings
from vzip.export.engines.tensorrt.build import BuildSettings, build
from vzip.export.engines.tensorrt.build_log import build_log
from vzip.export.engines.tensorrt.layers import EngineLayers, inspect_engine
from vzip.export.engines.tensorrt.proof import prove_engine
from vzip.export.engines.tensorrt.request import (
    BuildRequest,
    BuildTarget,
    first_settings,
    safer_settings,
    this_machine,
)
from vzip.runtime.bundle.engine_record import (
    ENGINES_FOLDER,
    LOG_SUFFIX,
    TIMING_CACHE,
    EngineBatch,
    EngineRecord,
    KernelCache,
)
from vzip.runtime.bundle.manifest import REFERENCE_FILE, Manifest
from vzip.runtime.bundle.precision_record import FP8_SM
from vzip.runtime.bundle.reader import Bundle, open_engine, read_bundle
from vzip.runtime.bundle.writer import add_engine, amend_engine, check_writable
from vzip.runtime.errors import BackendError, BundleError, ParityError
from vzip.runtime.files import atomic
from vzip.runtime.files.codec import Scalar
from vzip.runtime.files.plain import read_plain
from vzip.runtime.machine import sensors
from vzip.runtime.wording import counted

Keep = Callable[[Bundle, EngineRecord, memoryview], Mapping[str, Scalar] | None]

LARGEST_CACHE: Final = 2**28


def build_engine(path: str | os.PathLike[str], request: BuildRequest, *, say: Say) -> BuiltEngine:
    """Build an engine from a bundle and publish it there.

    Args:
        path: The bundle.
        request: What to build.
        say: Told, in lines, what goes on.

    Returns:
        The engine. One that exists is reused if every field of its record is what a new one's
        would be and the file has the digest of the record.

    Raises:
        VzipError: Anything that the caller can mend: no TensorRT, no GPU, a bundle that is damaged,
            an option that doesn't fit. `ParityError` if the engine fails its proof; it is then not
            published, and what was there before is untouched.
    """
    result = build_if(path, request, lambda *_: {}, say=say)
    assert result is not None
    return result


def build_if(
    path: str | os.PathLike[str], request: BuildRequest, keep: Keep, *, say: Say
) -> BuiltEngine | None:
    """Build an engine, and publish it if `keep` agrees; see `build_engine`.

    Args:
        path: The bundle.
        request: What to build.
        keep: Asked about an engine that was built and passed its proof, before it is published,
            with the bundle, its record and the engine itself. Returns numbers that are recorded
            with the proof, or None for an engine that is not to be kept. An engine that is reused
            was kept before.
        say: Told, in lines, what goes on.

    Returns:
        The engine; None if it was not kept.
    """
    bundle = read_bundle(path).at(request.precision)
    bindings = installed_bindings(ahead_of_time=request.rtx is not None)
    capabilities = () if request.rtx is None else capabilities_of(request.rtx, bindings)
    tries = [first_settings(request, bundle.manifest, capabilities)]
    outlook = _outlook(bundle, tries[0])
    say(outlook.line)  # a machine without a GPU may ask for nothing else
    machine = BuildTarget(None, capabilities, None) if capabilities else this_machine()
    _check_fp8(bundle, bindings, machine)
    _check_int8(bundle, bindings)
    if request.safer:
        tries += safer_settings(tries[0], bindings, bundle.manifest, bundle.quantised)
    name = request.name or _default_name(bindings, machine, bundle)
    with build_lock(bundle, say):
        # Whoever held the lock may have built this very engine.
        bundle = read_bundle(path).at(request.precision)
        for settings in tries:
            wanted = _record(bindings, machine, bundle, settings)
            if (found := reusable(bundle, name, wanted)) is not None:
                return BuiltEngine(bundle, name, found, reused=True)
        check_writable(bundle)
        say(f"building '{name}' with {bindings} for {_describe(machine)}")
        if outlook.cure is not None:
            if request.low_memory:
                raise BackendError(
                    f"{outlook.line}: it can't fit and was not started", cure=outlook.cure
                )
            say(f"warning: it may run out of memory: try --low-memory, {outlook.cure}")
        if not bindings.can.progress_monitor:
            say("Ctrl-C ends this build when TensorRT is done, not before: this version can't stop")
        beside = bundle.path / ENGINES_FOLDER / f"{name}{LOG_SUFFIX}"
        with build_log(bindings.module, beside, request.log, say) as told:
            failures: list[tuple[str, Mapping[str, Scalar]]] = []
            for settings in tries:
                told(f"settings: {_described_settings(settings, bindings)}")
                record, plan, kernels = _build(bindings, machine, bundle, settings, told)
                if record.proof is None or record.proof["passed"]:
                    numbers = keep(bundle, record, plan)
                    if numbers is None:
                        return None
                    if record.proof is not None:
                        record = dataclasses.replace(record, proof={**record.proof, **numbers})
                    built = add_engine(bundle, name, record, plan)
                    if kernels:
                        built, record = _keep_kernels(built, name, kernels)
                    if machine.gpu is not None:
                        built, record = _look_into(bindings, built, name, plan, told)
                    return BuiltEngine(built, name, record, reused=False)
                failures.append((_described_settings(settings, bindings), record.proof))
                del plan  # the next try needs the memory
            raise _failed(failures, request, bindings, bundle)


def reusable(bundle: Bundle, name: str, wanted: EngineRecord) -> EngineRecord | None:
    """Return the record of an engine that is as good as a new one; None if there is none.

    What only a build can tell (digest, size, time, fusion and the proof's numbers) is taken from
    the old record, and JetPack, which a container on the same machine doesn't see: TensorRT's own
    version is compared. Everything else must be equal, and the file must have the record's digest.
    An engine that could be proven now and wasn't then is built again.
    """
    found = bundle.manifest.engines.get(name)
    if found is None:
        return None
    same = dataclasses.replace(
        wanted,
        sha256=found.sha256,
        bytes=found.bytes,
        seconds=found.seconds,
        fused_attention=found.fused_attention,
        proof=found.proof,
        kernels=found.kernels,
        jetpack=found.jetpack,
    )
    provable = found.gpu is not None and REFERENCE_FILE in bundle.manifest.files
    proven = found.proof is not None and found.proof["passed"] is True
    if same != found or (provable and not proven):
        return None
    digest = hashlib.sha256()
    try:
        with open_engine(bundle, name) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except BundleError:
        return None  # missing or no plain file: building puts it right
    return found if digest.hexdigest() == found.sha256 else None


def _build(
    bindings: Bindings, machine: BuildTarget, bundle: Bundle, settings: BuildSettings, say: Say
) -> tuple[EngineRecord, memoryview, bytes]:
    """Build one engine and prove it where that can be done.

    Returns:
        Its record, the engine, and what TensorRT-RTX compiled of it for this GPU, if anything.
    """
    cache = bundle.path / ENGINES_FOLDER / TIMING_CACHE
    start = time.monotonic()
    built = build(
        bindings,
        bundle.read_model(),
        bundle.weights_folder / bundle.graph_file,
        bundle.manifest,
        settings=settings,
        timing_cache=_read_cache(cache, say) if bindings.can.timing_cache else b"",
        quantised=bundle.quantised,
    )
    seconds = round(time.monotonic() - start, 1)
    for warning in built.warnings:
        say(f"warning: {warning}")
    if built.timing_cache is not None:
        _write_cache(cache, built.timing_cache, say)
    record = dataclasses.replace(
        _record(bindings, machine, bundle, settings),
        sha256=hashlib.sha256(built.plan).hexdigest(),
        bytes=built.plan.nbytes,
        seconds=seconds,
    )
    say(f"built in {seconds} s: {record.bytes / 2**20:.1f} MiB")
    if machine.gpu is None:
        say(
            "not proven: it was built without a GPU; run 'vzip build' on the machine itself if its "
            "tokens must be compared with PyTorch's"
        )
        return record, built.plan, b""
    if REFERENCE_FILE not in bundle.manifest.files:
        say(
            f"warning: not proven: the bundle has no {REFERENCE_FILE}, since it was exported with "
            "--no-check; export it without that to have its engines compared with PyTorch"
        )
        return record, built.plan, b""
    kernels: list[bytes] = []
    proof = prove_engine(bundle, record, built.plan, kernels.append)
    say(f"proof {proof}")
    record = dataclasses.replace(record, proof=proof.to_json())
    return record, built.plan, b"".join(kernels)


def _keep_kernels(bundle: Bundle, name: str, kernels: bytes) -> tuple[Bundle, EngineRecord]:
    """Keep what TensorRT-RTX compiled for this GPU, which takes it seconds in every process."""
    cache = KernelCache(hashlib.sha256(kernels).hexdigest(), len(kernels))
    record = dataclasses.replace(bundle.manifest.engines[name], kernels=cache)
    return amend_engine(bundle, name, record, kernels), record


def _look_into(
    bindings: Bindings, bundle: Bundle, name: str, plan: memoryview, say: Say
) -> tuple[Bundle, EngineRecord]:
    """Say what an engine consists of, and record it.

    The engine is published: looking takes the memory of a second copy and a form of JSON that
    versions change, and a build of many minutes must not be lost for either.
    """
    record = bundle.manifest.engines[name]
    try:
        layers = inspect_engine(bindings, plan)
    except Exception as error:  # noqa: BLE001 - whatever TensorRT's inspector raises
        say(f"warning: the engine is published, and could not be looked into ({error})")
        return bundle, record
    say(_fusion_line(layers, bundle.manifest))
    if bundle.quantised == "int8" and layers.int8 is not None:
        say(
            f"INT8: {counted(layers.int8, 'layer')}"
            if layers.int8
            else "warning: no layer gives INT8: TensorRT computes this graph in something else; "
            "--precision auto says whether it is worth it"
        )
    if layers.fused_attention is None:
        return bundle, record
    record = dataclasses.replace(record, fused_attention=layers.fused_attention)
    return amend_engine(bundle, name, record), record


def _check_int8(bundle: Bundle, bindings: Bindings) -> None:
    """Refuse FP16 scales where the parser takes them for FP32, and reads past their end.

    So does onnx-tensorrt 8.6, which casts the pointer to a scale's numbers whatever their type;
    10.1 has a branch for each type.

    Raises:
        BackendError: They are, and it does.
    """
    if bundle.quantised != "int8" or bindings.can.strongly_typed:
        return
    if bundle.manifest.precision != "fp32":
        raise BackendError(
            f"got an INT8 graph of an {bundle.manifest.precision.upper()} bundle for {bindings}",
            expected="one of an FP32 bundle, whose scales are FP32",
            cause="the parser of this version reads every scale as FP32",
            cure="export the bundle with --dtype fp32 and calibrate that",
        )


def _check_fp8(bundle: Bundle, bindings: Bindings, machine: BuildTarget) -> None:
    """Refuse FP8 where neither the GPU nor TensorRT computes in it.

    Raises:
        BackendError: They don't.
    """
    if bundle.quantised != "fp8":
        return
    slower = [sm for sm in machine.sm if int(sm) < FP8_SM]
    if slower or not bindings.can.strongly_typed:
        found = f"SM {', '.join(slower)}" if slower else str(bindings)
        raise BackendError(
            f"got precision 'fp8' for {found}",
            expected=f"SM {FP8_SM} or newer and TensorRT 10 or newer",
            cause="nothing else computes in FP8 what the graph says",
            cure="take --precision int8",
        )


def _record(
    bindings: Bindings, machine: BuildTarget, bundle: Bundle, settings: BuildSettings
) -> EngineRecord:
    """Return the record of an engine that is still to be built: size and digest are no one's."""
    batch = bundle.manifest.batch
    low = 1 if batch.dynamic else batch.max
    return EngineRecord(
        sha256="0" * 64,
        bytes=1,
        stack=bindings.name,
        version=bindings.version,
        gpu=machine.gpu,
        sm=machine.sm,
        jetpack=machine.jetpack,
        precision=bundle.precision,
        batch=EngineBatch(low, settings.opt_batch, batch.max),
        model_sha256=bundle.manifest.files[bundle.graph_file].sha256,
        settings=settings.to_json(bindings),
        seconds=0.0,
        fused_attention=None,
        proof=None,
    )


def _outlook(bundle: Bundle, settings: BuildSettings) -> build_memory.Outlook:
    return build_memory.compare(
        build_memory.estimate(
            bundle.manifest,
            workspace_mib=settings.workspace_mib,
            low_memory=settings.low_memory,
            gpu=not settings.capabilities,
            quantised=bundle.quantised,
        ),
        sensors.memory(),
        precision=bundle.precision,
    )


def _read_cache(path: Path, say: Say) -> bytes:
    """Return the timing cache; nothing where there is none or none that can be read."""
    if not os.path.lexists(path):
        return b""
    if path.is_symlink():
        say(f"warning: {path} is no plain file (a symbolic link) and is ignored")
        return b""
    try:
        return read_plain(path, LARGEST_CACHE)
    except OSError as error:
        say(f"warning: {path} can't be read ({error.strerror}) and is ignored")
        return b""


def _write_cache(path: Path, content: bytes, say: Say) -> None:
    """Keep the timing cache for the next build, which gets by without it."""
    try:
        atomic.replace_file(path, content)
    except OSError as error:
        say(f"warning: {path} can't be written ({error.strerror}); the next build times anew")


def _default_name(bindings: Bindings, machine: BuildTarget, bundle: Bundle) -> str:
    kind = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}[bindings.name]
    quantised = [] if bundle.quantised is None else [bundle.quantised]
    return "-".join([kind, *(f"sm{each}" for each in machine.sm), *quantised])


def _describe(machine: BuildTarget) -> str:
    capabilities = ", ".join(f"SM {each[:-1]}.{each[-1]}" for each in machine.sm)
    if machine.gpu is None:
        return f"{capabilities}, without a GPU"
    jetpack = f", JetPack {machine.jetpack}" if machine.jetpack is not None else ""
    return f"{machine.gpu} ({capabilities}{jetpack})"


def _described_settings(settings: BuildSettings, bindings: Bindings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.to_json(bindings).items())


def _fusion_line(layers: EngineLayers, manifest: Manifest) -> str:
    fused = layers.fused_attention
    if layers.opaque:
        hidden = f"{layers.opaque} of {counted(len(layers.layers), 'layer')} hold many nodes each"
        return f"fused attention: this TensorRT doesn't tell: {hidden}"
    if fused is None:
        return "fused attention: this TensorRT doesn't tell its layers' names"
    if not fused:
        cause = "TensorRT fuses FP16" if manifest.precision == "fp32" else "see 'vzip inspect'"
        return f"fused attention: no layer; attention runs as separate kernels ({cause})"
    return f"fused attention: {counted(fused, 'layer')}"


def _failed(
    failures: list[tuple[str, Mapping[str, Scalar]]],
    request: BuildRequest,
    bindings: Bindings,
    bundle: Bundle,
) -> ParityError:
    """Return the error for engines that all failed their proof, each by its settings and proof.

    TensorRT is blamed where tokens are wrong on average. Where some of them are, nobody can tell
    from here whether the engine or the weights' own rounding is to blame.
    """
    cures = [] if request.safer else ["try --safer"]
    if bundle.quantised is not None:
        cures.append("build without --precision")
        cures.append("calibrate with a higher --min-agreement and --min-cosine")
    if bundle.manifest.precision == "fp16":
        cures.append("export with --dtype fp32")
    cures.append("install another version of TensorRT")
    cures.append(f"see where they differ with: vzip debug {bundle.path} -o FOLDER")
    if all(proof["on_average"] for _, proof in failures):
        cause = "on average the tokens are right, and these are moved by more than rounding is"
    else:
        cause = f"{bindings} miscompiles this graph on this GPU, as known versions do"
    shown = " | ".join(f"{settings}: {proof['short']}" for settings, proof in failures)
    return ParityError(
        f"the engine's tokens differ from PyTorch's ({shown})",
        cause=f"{cause}. The engine was not published",
        cure=", or ".join(cures),
    )
