"""Bundles are written whole or not at all, and changed in one step.

`docs/bundle.md` says what a reader relies on; `vzip.runtime.bundle.precision_writer` puts a
quantised graph into a bundle that exists.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vzip.runtime.bundle.engine_record import (
    ENGINE_SUFFIX,
    ENGINES_FOLDER,
    KERNEL_CACHE_SUFFIX,
    LOCK_FILE,
    LOG_SUFFIX,
    TIMING_CACHE,
    EngineRecord,
)
from vzip.runtime.bundle.manifest import (
    DATA_FILE,
    FILES,
    FORMAT,
    LLM_FILES,
    MANIFEST_FILE,
    MODEL_FILE,
    NEWLINE_FILE,
    REFERENCE_FILE,
    FileEntry,
    Manifest,
)
from vzip.runtime.bundle.precision_record import QUANTISED, QUANTISED_FILES, graph_file
from vzip.runtime.bundle.reader import (
    LARGEST_MANIFEST,
    WAITING_SUFFIX,
    Bundle,
    check_files,
    check_graphs,
    digest_of,
    naming,
    not_plain,
    open_plain,
    read_bundle,
    waiting_engine,
)
from vzip.runtime.errors import BundleError
from vzip.runtime.files import atomic
from vzip.runtime.files.codec import Scalar
from vzip.runtime.guard import guarded

_WAITING = re.compile(rf"\.({'|'.join(QUANTISED)})\.[0-9a-f]{{16}}{re.escape(WAITING_SUFFIX)}")
_WAITING_ENGINE = re.compile(r"\.(.+)\.[0-9a-f]{16}")
_OLD_FORMS = "fastest"  # a cache that vzip 0.1 kept in a bundle; nothing reads it any more
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


class BundleWriter:
    """A bundle in the making, in a hidden folder that nobody reads; see `bundle_writer`.

    Attributes:
        folder: Where ``model.onnx`` and, if there are any, the other files that `docs/bundle.md`
            names are to be put.
    """

    def __init__(self, staged: atomic.StagedFolder, *, replace: bool) -> None:
        self._staged = staged
        self._replace = replace
        self.folder = staged.path
        self.published = False

    def stage(self, manifest: Manifest) -> Bundle:
        """Write the manifest with the files' digests and return the bundle, not yet published.

        The bundle can be opened like any other until the writer is left: that is how an export
        is checked before it replaces anything.

        Args:
            manifest: The manifest; its `files` are replaced, and it has no engines and no
                quantised graphs any more.

        Raises:
            BundleError: Files are missing, are there too many, or are not as a reader demands.
        """
        with naming(self.folder):
            (self.folder / MANIFEST_FILE).unlink(missing_ok=True)
            found = sorted(entry.name for entry in self.folder.iterdir())
            if MODEL_FILE not in found or not set(found) <= set(FILES):
                raise BundleError(
                    f"holds {found}",
                    expected=(
                        f"{MODEL_FILE} and perhaps {DATA_FILE}, {REFERENCE_FILE}, {NEWLINE_FILE} "
                        f"and {', '.join(LLM_FILES)}"
                    ),
                    cause=(
                        "the exporter left other files or wrote none: this is a defect of the "
                        "exporter"
                    ),
                )
            files = {name: file_entry(self.folder / name) for name in found}
            manifest = dataclasses.replace(manifest, files=files, engines={}, precisions={})
            atomic.replace_file(self.folder / MANIFEST_FILE, manifest.to_bytes())
            check_files(self.folder, manifest, verify=False)  # the digests were made just now
            check_graphs(self.folder, manifest, verify=False)
        return Bundle(self.folder, manifest)

    def publish(self, manifest: Manifest) -> Bundle:
        """Stage the manifest, flush everything to the disk and let it take the target's place.

        Args:
            manifest: The manifest; its `files` are replaced.

        Returns:
            The bundle at its final place.

        Raises:
            BundleError: As for `stage`; or what stands at the target is not ours to replace.
        """
        staged = self.stage(manifest)
        _check_replaceable(self._staged.target, replace=self._replace)
        with explaining(self._staged.target):
            self._staged.commit()
        self.published = True
        return Bundle(self._staged.target, staged.manifest)


@contextmanager
def bundle_writer(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[BundleWriter]:
    """Write a bundle that appears at `path` whole or not at all.

    Put the files into ``writer.folder`` and call ``writer.publish(manifest)``. When the block is
    left without that, by an exception or otherwise, nothing is left behind and a bundle that stood
    at `path` stands there unchanged.

    Args:
        path: The folder to create, or a vzip bundle to replace. Its parent must exist.
        replace: Whether a bundle with engines, quantised graphs or an LLM may be replaced too.

    Raises:
        BundleError: `path` is something else than a bundle, holds what took long to make, can't be
            written, or the disk is full.
    """
    with guarded(BundleError, f"'{path}' can't be written", cure="choose another name with -o"):
        target = Path(path).absolute()
        _check_replaceable(target, replace=replace)
        with explaining(target):
            staged = atomic.StagedFolder(target)
    try:
        with explaining(target):
            atomic.try_file(staged.path / MANIFEST_FILE)  # before minutes of work
            writer = BundleWriter(staged, replace=replace)
            yield writer
        if not writer.published:
            raise BundleError(
                f"{target}: the bundle was written but never published",
                expected="a call of publish()",
                cause="this is a defect of the exporter",
            )
    finally:
        staged.close()


def update_manifest(bundle: Bundle, *, parity: Mapping[str, Scalar] | None) -> Bundle:
    """Replace the parity numbers in a bundle's manifest, in one step.

    Args:
        bundle: The bundle; what lies on the disk must still be it.
        parity: The numbers of `vzip check` with the verdict ``passed``, or None.

    Returns:
        The bundle with its new manifest.

    Raises:
        BundleError: The bundle was replaced meanwhile, or its manifest can't be written.
    """
    manifest = dataclasses.replace(bundle.manifest, parity=parity)
    check_unchanged(bundle)
    with explaining(bundle.path):
        atomic.replace_file(bundle.path / MANIFEST_FILE, manifest.to_bytes())
    return dataclasses.replace(bundle, manifest=manifest)


def amend_engine(
    bundle: Bundle, name: str, record: EngineRecord, kernels: bytes | None = None
) -> Bundle:
    """Change what a published engine's record says; its file stays.

    Args:
        bundle: The bundle; what lies on the disk must still be it.
        name: The engine's name.
        record: What its record is to be.
        kernels: What lies beside the engine, of which the record has size and digest; None to
            leave that as it is.

    Raises:
        BundleError: The bundle was replaced meanwhile, or it can't be written.
    """
    assert bundle.manifest.engines[name].sha256 == record.sha256
    engines = {**bundle.manifest.engines, name: record}
    manifest = dataclasses.replace(bundle.manifest, engines=engines)
    with explaining(bundle.path):
        check_unchanged(bundle)
        if kernels is not None:  # a reader passes over one that isn't its record's
            file = f"{name}{KERNEL_CACHE_SUFFIX}"
            atomic.replace_file(bundle.path / ENGINES_FOLDER / file, kernels)
        atomic.replace_file(bundle.path / MANIFEST_FILE, manifest.to_bytes())
    return dataclasses.replace(bundle, manifest=manifest)


def add_engine(bundle: Bundle, name: str, record: EngineRecord, plan: bytes | memoryview) -> Bundle:
    """Put an engine into a bundle, or in the place of the one of the same name.

    The manifest is what decides: until it is replaced, in one step, the old engine is there and is
    read; from then on the new one. That holds across SIGKILL at any moment, since the new file
    waits under a name of its own until the manifest speaks of it (see `open_engine`).

    Args:
        bundle: The bundle; what lies on the disk must still be it.
        name: The engine's name; its file is ``engines/NAME.plan``.
        record: What it is; digest and size must be those of `plan`, precision and graph those of
            `bundle`.
        plan: The serialized engine.

    Returns:
        The bundle with its new manifest.

    Raises:
        BundleError: The record contradicts `plan` or the bundle's graph, the bundle was replaced
            meanwhile, or it can't be written; the old engine is as it was.
    """
    found = FileEntry(hashlib.sha256(plan).hexdigest(), len(plan))
    if found != FileEntry(record.sha256, record.bytes):
        raise BundleError(
            f"{bundle.path}: the record of the engine {name!r} says {record.bytes} "
            f"bytes {record.sha256[:12]}…, the engine has {found.bytes} {found.sha256[:12]}…",
            cause="they don't belong together: this is a defect of the builder",
        )
    graph = bundle.graph_file
    if record.model_sha256 != bundle.manifest.files[graph].sha256:
        raise BundleError(
            f"{bundle.path}: the engine {name!r} was built from a {graph} with "
            f"SHA-256 {record.model_sha256[:12]}…, the bundle's has "
            f"{bundle.manifest.files[graph].sha256[:12]}…",
            cause="another process replaced the bundle",
            cure="build the engine again",
        )
    engines = {**bundle.manifest.engines, name: record}
    manifest = dataclasses.replace(bundle.manifest, engines=engines)
    folder = bundle.path / ENGINES_FOLDER
    with explaining(bundle.path):
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            with naming(bundle.path):
                raise not_plain(folder, "a symbolic link")
        waiting = waiting_engine(folder, name, record)
        try:
            atomic.replace_file(waiting, plan)
            check_unchanged(bundle)
            atomic.replace_file(bundle.path / MANIFEST_FILE, manifest.to_bytes())
        except BaseException:
            # Flushing the folder may fail after the manifest took its place.
            if _manifest_text(bundle.path) != manifest.to_bytes().decode():
                waiting.unlink(missing_ok=True)
            raise
        atomic.rename_file(waiting, folder / f"{name}{ENGINE_SUFFIX}")
        # Left by a writer that was killed. In full: the name `x` also begins that of `x.y`.
        waits = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(ENGINE_SUFFIX)}")
        for left in folder.iterdir():
            if waits.fullmatch(left.name):
                left.unlink(missing_ok=True)
    return dataclasses.replace(bundle, manifest=manifest)


def check_writable(bundle: Bundle) -> None:
    """Refuse, before any work, a bundle in which no file can be written now.

    Raises:
        BundleError: The folder is read-only, or its disk full.
    """
    try:
        atomic.try_file(bundle.path / MANIFEST_FILE)
    except OSError as error:
        raise BundleError(
            f"{bundle.path}: can't be written ({error.strerror}), so the bundle can't be changed",
            cure="copy the bundle to a folder that you may write to, on a disk with room",
        ) from error


def check_unchanged(bundle: Bundle) -> None:
    """Refuse to change a manifest that another process has changed."""
    if read_bundle(bundle.path, verify=False).manifest != bundle.manifest:
        raise BundleError(
            f"{bundle.path}: manifest.json is another one than when the bundle was opened",
            cause="another process replaced it",
            cure="open the bundle again",
        )


@contextmanager
def explaining(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line; other errors pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            cause, cure = "the disk or quota is full", "free some space"
        elif error.errno in _NO_RIGHT and _within(error.filename, target.parent):
            cause, cure = "the folder is read-only for this user", "choose another with -o"
        elif error.errno in {errno.ENOENT, errno.ENOTDIR} and not target.parent.is_dir():
            cause, cure = f"{target.parent} is no folder", "create it, or choose another with -o"
        elif error.errno == errno.ENOENT and atomic.is_temporary(Path(error.filename or "")):
            cause, cure = "its file system takes no new folders", "choose another with -o"
        else:
            raise
        raise BundleError(
            f"{target}: can't be written ({error.strerror})",
            cause=cause,
            cure=f"{cure}. Nothing was left behind",
        ) from error


def _within(filename: object, folder: Path) -> bool:
    """Return whether an error's file lies in `folder`, so that it is about what is written."""
    return isinstance(filename, (str, os.PathLike)) and folder in Path(filename).absolute().parents


def file_entry(path: Path) -> FileEntry:
    """Return digest and size of a file."""
    with open_plain(path) as file:
        return digest_of(file, path.name)


def _check_replaceable(target: Path, *, replace: bool) -> None:
    """Refuse to replace anything but nothing, an empty folder, or a bundle with only its files.

    What was put into a bundle after its export took hours, so it goes only where that was said.
    """
    if not os.path.lexists(target):
        return
    cure = "choose another folder with -o, or remove this one yourself"
    if target.is_symlink() or not target.is_dir():
        raise BundleError(
            f"{target}: is not a folder",
            expected="a vzip bundle to replace",
            cure=cure,
        )
    entries = [entry for entry in target.iterdir() if not _passing(entry)]
    ours = {*FILES, *QUANTISED_FILES, MANIFEST_FILE, ENGINES_FOLDER, _OLD_FORMS}
    foreign = sorted({entry.name for entry in entries} - ours)
    foreign += _foreign_engines(target / ENGINES_FOLDER)
    if foreign:
        raise BundleError(
            f"{target}: holds {foreign[:3]}",
            expected="nothing but a vzip bundle to replace",
            cure=cure,
        )
    if entries and f'"format": "{FORMAT}"' not in _manifest_text(target):
        raise BundleError(
            f"{target}: has no manifest of a vzip bundle",
            expected="one to replace",
            cure=cure,
        )
    added = _added_later(target)
    if added and not replace:
        raise BundleError(
            f"{target}: is a bundle with {', '.join(added)}, which would be lost",
            cure="choose another folder with -o, or say --replace (in Python replace=True)",
        )


def _added_later(folder: Path) -> list[str]:
    """Return what a bundle holds that took long to make, whatever its manifest says.

    What a killed writer had put in place under a waiting name is in the bundle too.
    """
    names = {entry.name for entry in folder.iterdir()}
    waiting = {found[1] for name in names if (found := _WAITING.fullmatch(name))}
    engines = {
        _WAITING_ENGINE.sub(r"\1", entry.stem)
        for entry in (folder / ENGINES_FOLDER).glob(f"*{ENGINE_SUFFIX}")
    }
    added = [f"the engine '{name}'" for name in sorted(engines)]
    added += [
        f"the {each} graph" for each in QUANTISED if graph_file(each) in names or each in waiting
    ]
    if names & set(LLM_FILES):
        added.append("the language model")
    return added


def _passing(entry: Path) -> bool:
    """Return whether an entry of a bundle's folder is a writer's, and nothing that would stay."""
    return atomic.is_temporary(entry) or bool(_WAITING.fullmatch(entry.name))


def _foreign_engines(folder: Path) -> list[str]:
    """Return what lies in a folder of engines and is none of ours, by its path in the bundle."""
    if not os.path.lexists(folder):
        return []
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name]
    return sorted(
        f"{folder.name}/{entry.name}"
        for entry in folder.iterdir()
        if entry.name not in {TIMING_CACHE, LOCK_FILE}
        and entry.suffix not in {ENGINE_SUFFIX, KERNEL_CACHE_SUFFIX, LOG_SUFFIX}
        and not atomic.is_temporary(entry)
    )


def _manifest_text(folder: Path) -> str:
    """Return the text of a manifest, which may be of any version, damaged, or absent."""
    try:
        with open_plain(folder / MANIFEST_FILE) as file:
            return file.read(LARGEST_MANIFEST).decode(errors="replace")
    except BundleError:
        return ""
