"""Engines on disk: what is looked at before TensorRT gets to see one.

An engine is code, and TensorRT's own checks are no tamper check. So nothing is deserialised that is
not, byte for byte, what `vzip build` recorded, for this library and this GPU, from this graph.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import Final

from vzip.runtime.backends.tensorrt.bindings import TITLES
from vzip.runtime.bundle.engine_record import (
    ENGINES_FOLDER,
    KERNEL_CACHE_SUFFIX,
    LARGEST_KERNEL_CACHE,
    EngineRecord,
)
from vzip.runtime.bundle.reader import Bundle, open_engine
from vzip.runtime.errors import BackendError, BundleError
from vzip.runtime.files.plain import open_plain

_log = logging.getLogger(__name__)

HEADER_BYTES: Final = 28
MAGIC: Final = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
"""First four bytes by stack: read off real files, not documented, and so a cheap check only."""


@dataclass(frozen=True)
class Machine:
    """What is there to run an engine.

    Attributes:
        stack: The TensorRT package.
        version: Its version.
        gpu: Name of the GPU.
        sm: The GPU's compute capability without the dot, as ``87``.
    """

    stack: str
    version: str
    gpu: str
    sm: str


def unfit(bundle: Bundle, name: str, machine: Machine | None = None) -> BackendError | None:
    """Return why an engine can't be run; None if nothing is wrong.

    Args:
        bundle: The bundle.
        name: Name of an engine that its manifest records.
        machine: What is there to run it; None leaves out what depends on that.
    """
    record = bundle.manifest.engines[name]
    if record.quantised != bundle.quantised:
        return BackendError(
            f"the engine {name!r} was built from the graph in {record.precision}",
            expected=f"the graph in {bundle.precision}, with which the bundle was opened",
            cure=(
                f"open it with precision={record.precision!r} (--precision {record.precision}) to "
                "run this engine"
            ),
        )
    model, built, expected, cause = bundle.manifest.files[bundle.graph_file], "", "", ""
    if record.model_sha256 != model.sha256:
        built = f"from a graph with SHA-256 {record.model_sha256[:12]}…"
        expected = f"{model.sha256[:12]}…, which {bundle.graph_file} has"
    elif machine is None:
        return None
    elif record.stack != machine.stack or not versions_agree(record.version, machine.version):
        built = f"with {TITLES[record.stack]} {record.version}"
        expected = f"{TITLES[machine.stack]} {machine.version}, which this machine has"
        cause = "an engine runs only with the version that built it"
    elif machine.sm not in record.sm:
        built = f"for SM {', '.join(record.sm)} ({record.gpu or 'ahead of time'})"
        expected = f"SM {machine.sm}, which this machine's {machine.gpu} has"
    else:
        return None
    return BackendError(
        f"the engine {name!r} was built {built}",
        expected=expected,
        cause=cause,
        cure=f"build it again: {rebuild_command(bundle, record, machine)}",
    )


def rebuild_command(bundle: Bundle, record: EngineRecord, machine: Machine | None = None) -> str:
    """Return the command that makes an engine anew."""
    command = f"vzip build {bundle.path}"
    if record.quantised is not None:
        command += f" --precision {record.precision}"
    if record.gpu is not None or record.stack == "tensorrt":
        return command
    targets = record.sm if machine is None else (machine.sm,)
    return f"{command} --rtx {','.join(f'sm{sm}' for sm in targets)}"


def versions_agree(one: str, other: str) -> bool:
    """Return whether two versions are equal as far as both go: 8.6.2 is 8.6.2.3, not 8.6.1."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return all(int(left) == int(right) for left, right in pairs)


def read_engine(bundle: Bundle, name: str) -> bytearray:
    """Return the bytes of an engine that are, each of them, those that were recorded.

    They are deserialised from memory: what was checked is what runs.

    Args:
        bundle: The bundle.
        name: Name of an engine that its manifest records.

    Raises:
        BundleError: The file is missing, no plain file, empty, truncated, of another version or
            kind, or differs in any bit.
    """
    record = bundle.manifest.engines[name]
    where = f"{bundle.path}: the engine {name!r}"
    cure = f"build it again: {rebuild_command(bundle, record)}"
    with open_engine(bundle, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            raise BundleError(
                f"{where} has {size} bytes",
                expected=str(record.bytes),
                cause="it was truncated or replaced",
                cure=cure,
            )
        data = bytearray(size)
        view, header = memoryview(data), min(size, HEADER_BYTES)
        count = file.readinto(view[:header])  # type: ignore[attr-defined]
        fault = header_fault(bytes(view[:header]), record.stack, record.version)
        if fault is not None:
            found, expected = fault
            raise BundleError(
                f"{where} {found}",
                expected=expected,
                cause="it is something else, or not its record's",
                cure=cure,
            )
        count += file.readinto(view[header:])  # type: ignore[attr-defined]
    got = hashlib.sha256(data).hexdigest()
    if count != size or got != record.sha256:
        raise BundleError(
            f"{where} has SHA-256 {got[:12]}…",
            expected=f"{record.sha256[:12]}…",
            cause="it was damaged or replaced",
            cure=cure,
        )
    return data


def read_kernels(bundle: Bundle, name: str) -> bytes:
    """Return the compiled kernels beside an engine; nothing where there are none, or damaged ones.

    They save seconds and decide nothing, so whatever is wrong with them is logged and passed over.
    """
    record = bundle.manifest.engines[name].kernels
    if record is None:
        return b""
    path = bundle.path / ENGINES_FOLDER / f"{name}{KERNEL_CACHE_SUFFIX}"
    try:
        with open_plain(path, links=False) as file:
            data = file.read(min(record.bytes, LARGEST_KERNEL_CACHE) + 1)
    except OSError as error:
        _log.warning("%s can't be read (%s): its kernels are compiled anew", path, error)
        return b""
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        _log.warning("%s is damaged or was replaced: its kernels are compiled anew", path)
        return b""
    return data


def header_fault(header: bytes, stack: str, version: str) -> tuple[str, str] | None:
    """Return what speaks against a header's being that of an engine; see `docs/bundle.md`.

    Args:
        header: The first `HEADER_BYTES` of a file, or fewer if it has no more.
        stack: Python module that is said to have built it.
        version: Its version.

    Returns:
        What was found and what was expected; None if nothing is wrong.
    """
    magic, title = MAGIC[stack], TITLES[stack]
    if len(header) < HEADER_BYTES or header[:4] != magic:
        return f"begins with {header[:4]!r}", f"{magic!r} as {title}'s engines do"
    found = header[24:28]
    expected = [int(part) for part in version.split(".")]
    if any(part & 0xFF != byte for part, byte in zip(expected, found, strict=False)):
        return f"was made by {title} {'.'.join(map(str, found))}", version
    return None
