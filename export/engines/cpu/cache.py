"""Keeps the form that was chosen, in the bundle or in the user's cache, whatever kills the writer.

A form lies in a folder of its own, ``fastest/KEY`` in the bundle: record.json, and graph and
weights if it has weights of its own. KEY is a digest of everything that the choice depends on, so
that another machine, another ONNX Runtime or another export measures again. In a bundle that can't
be written to, it lies in ``$XDG_CACHE_HOME/vzip/fastest`` (``~/.cache/vzip/fastest``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vzip.export.engines.cpu.choice import Candidate, Open, choose, with_bundles_weights
from vzip.export.engines.cpu.forms import FORMS
from vzip.runtime.bundle.graph_check import external_tensors
from vzip.runtime.bundle.manifest import REFERENCE_FILE
from vzip.runtime.bundle.precision_record import files_of
from vzip.runtime.bundle.reader import FASTEST, Bundle
from vzip.runtime.errors import BackendError, BundleError
from vzip.runtime.files import locks
from vzip.runtime.files.atomic import StagedFolder
from vzip.runtime.machine.process import cores
from vzip.runtime.machine.record import processor
from vzip.runtime.machine.sensors import instructions

VERSION: Final = 2
"""Goes up when forms, or how they are chosen, change."""

RECORD: Final = "record.json"

_CHUNK = 2**20
_log = logging.getLogger(__name__)


def fastest(bundle: Bundle, opened: Open, version: str) -> Candidate:
    """Return the fastest form of a bundle's graph: the one that was kept, or measured now.

    Two processes that come at once don't both measure: one waits for the other.

    Args:
        bundle: The bundle.
        opened: As `choose` takes it.
        version: Of ONNX Runtime.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: The bundle's own graph can't be run; or nothing can be kept anywhere.
    """
    depends = _depends_on(bundle, version)
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    folders = [bundle.path / FASTEST, _users_cache()]
    for folder in folders:
        found = _read(folder / digest[:16], bundle, depends)
        if found is not None:
            return found
    folder = _writable(folders)
    target = folder / digest[:16]
    with _alone(folder):
        found = _read(target, bundle, depends)
        return _measure(target, bundle, opened, depends) if found is None else found


def _measure(target: Path, bundle: Bundle, opened: Open, depends: Mapping[str, Any]) -> Candidate:
    """Choose a form, keep it, and return it as it was kept."""
    _log.warning(
        "%s: measuring what is fastest here, once; this takes a minute or two", bundle.path
    )
    staged = None
    try:
        staged = StagedFolder(target)
        chosen, measured = choose(bundle, opened, staged.path)
        files = {path.name: _digest(path) for path in sorted(staged.path.iterdir())}
        record = {
            "depends_on": dict(depends),
            "form": chosen.name,
            "files": files,
            "measured": [each.to_json() for each in measured],
        }
        (staged.path / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        staged.commit()
    except OSError as error:
        raise BackendError(
            f"{target}: the fastest form can't be kept ({error.strerror})",
            cure="free some space, or open the bundle in its own precision",
        ) from error
    finally:
        if staged is not None:
            staged.close()
    kept = _read(target, bundle, depends)
    if kept is None:
        raise BackendError(
            f"{target}: what was just written there can't be read",
            cause="the disk is failing, or another process writes there",
            cure="look at the folder, or remove it",
        )
    return kept


def read_record(bundle: Bundle, version: str) -> dict[str, Any] | None:
    """Return the record of a bundle's fastest form on this machine; None if none was kept.

    Args:
        bundle: The bundle.
        version: Of ONNX Runtime.

    Returns:
        Keys ``depends_on``, ``form``, ``files`` and ``measured``: a `Measured` of each form.
    """
    depends = _depends_on(bundle, version)
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    for folder in (bundle.path / FASTEST, _users_cache()):
        record = _record(folder / digest[:16], depends)
        if record is not None:
            return record
    return None


def _depends_on(bundle: Bundle, version: str) -> dict[str, Any]:
    """Return everything that the choice depends on."""
    names = {bundle.graph_file, f"{bundle.graph_file}.data", REFERENCE_FILE}
    names |= {name for each in bundle.manifest.precisions for name in files_of(each)}
    files = bundle.manifest.files
    return {
        "version": VERSION,
        "files": {name: files[name].sha256 for name in sorted(names) if name in files},
        "processor": processor(),
        # Integer products saturate without VNNI, and virtual machines of both kinds share a name.
        "instructions": instructions(),
        "threads": cores(),
        "onnxruntime": version,
    }  # fmt: skip


def _read(folder: Path, bundle: Bundle, depends: Mapping[str, Any]) -> Candidate | None:
    """Return the form that a folder holds; None if it holds none, or a damaged one."""
    record = _record(folder, depends)
    if record is None:
        return None
    name, files = record["form"], record["files"]
    if not files:
        remade = with_bundles_weights(name, bundle)
        if remade is not None:
            return remade
    graph, weights = f"{name}.onnx", f"{name}.onnx.data"
    model = None
    if set(files) == {graph, weights} and name in {form.name for form in FORMS}:
        model = _intact(folder, files, graph, weights)
    if model is None:
        _log.warning("%s is damaged; the fastest form is measured again", folder)
        return None
    return Candidate(name, model, folder)


def _intact(folder: Path, files: Mapping[str, Any], graph: str, weights: str) -> bytes | None:
    """Return a kept graph whose digests are right and whose tensors lie in its file of weights."""
    try:
        if not all(_plain(folder / name) for name in (graph, weights)):
            return None
        model, size = (folder / graph).read_bytes(), (folder / weights).stat().st_size
        digests = {graph: hashlib.sha256(model).hexdigest(), weights: _digest(folder / weights)}
        inside = all(
            each.location == weights and each.offset + each.length <= size
            for each in external_tensors(model, file=graph)
        )
    except (OSError, BundleError):
        return None
    return model if digests == dict(files) and inside else None


def _record(folder: Path, depends: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a folder's record if it is one and of this machine."""
    try:
        path = folder / RECORD
        record = json.loads(path.read_text(encoding="utf-8") if _plain(path) else "")
        matches = record["depends_on"] == dict(depends)
        whole = isinstance(record["form"], str) and isinstance(record["files"], dict)
        whole = whole and isinstance(record["measured"], list)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        matches = whole = False
    if not (matches and whole):
        _log.warning("%s is damaged; the fastest form is measured again", folder)
        return None
    found: dict[str, Any] = record
    return found


def _plain(path: Path) -> bool:
    """Return whether a file is a plain one with one name, in a folder that is no link either.

    Raises:
        OSError: It isn't there, or can't be looked at.
    """
    status = path.lstat()
    linked = path.parent.is_symlink() or path.parent.parent.is_symlink()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and not linked


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _users_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vzip" / "fastest"


def _writable(folders: list[Path]) -> Path:
    """Return the first folder that exists or can be made, and written to."""
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=folder != folders[0], exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
            reasons.append(f"{folder}: no right to write")
        except OSError as error:  # noqa: PERF203 - two
            reasons.append(f"{folder}: {error.strerror}")
    raise BackendError(
        f"the fastest form can be kept nowhere ({'; '.join(reasons)})",
        expected="the bundle's folder or the user's cache to be writable",
        cure="set XDG_CACHE_HOME, or open the bundle in its own precision",
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process measures for this folder; the kernel ends it with the process."""
    try:
        lock = locks.on_file(folder / ".lock", lambda: None)
    except OSError as error:
        raise BackendError(
            f"{folder / '.lock'} can't be opened ({error.strerror})",
            cause="another user made it",
            cure="remove it, or open the bundle in its own precision",
        ) from error
    with lock:  # where there are none, both measure
        yield
