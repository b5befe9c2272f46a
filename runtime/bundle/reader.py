"""Bundles: folders with a graph, its weights and a manifest, read with suspicion.

`docs/bundle.md` is the specification; `vzip.runtime.bundle.writer` writes them. Reading checks
everything that can be checked without running the graph; what it can't check is who made the
bundle: whoever can write the model can write its digest too, so take bundles from people you trust.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import shlex
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import numpy as np

from vzip.runtime.bundle import graph_check, graph_limits
from vzip.runtime.bundle.engine_record import ENGINE_SUFFIX, ENGINES_FOLDER, EngineRecord
from vzip.runtime.bundle.manifest import (
    DATA_FILE,
    LLM_DATA_FILE,
    LLM_FILE,
    LLM_FILES,
    MANIFEST_FILE,
    MODEL_FILE,
    NEWLINE_FILE,
    FileEntry,
    Manifest,
)
from vzip.runtime.bundle.precision_record import (
    QUANTISED,
    QUANTISED_FILES,
    Precision,
    Quantised,
    data_file,
    files_of,
    graph_file,
)
from vzip.runtime.errors import BundleError, InvalidInputError
from vzip.runtime.files import plain
from vzip.runtime.guard import door, guarded
from vzip.runtime.models import ALIASES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.graph_parts import Read

LARGEST_MANIFEST: Final = 2**20
"""Bytes of manifest.json that are read at most; ours have three thousand."""

HELD_BYTES: Final = 2**26
"""Files of weights up to here are read; larger ones are mapped, so that memory holds them once."""

FASTEST: Final = "fastest"
"""What is asked for as a precision to run a CPU engine and nothing else."""

_LARGEST_NPY_HEADER = 10_000  # bytes; numpy believes no longer one either
# The header is a literal of Python's, and these are what reading one can end in.
_NPY_ERRORS = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, TokenError)
_CHUNK = 2**20
WAITING_SUFFIX: Final = ".waiting"
"""Of folders whose files wait for the manifest to speak of them."""
# Graph → where its weights lie.
_GRAPHS: Final = {
    MODEL_FILE: DATA_FILE,
    LLM_FILE: LLM_DATA_FILE,
    **{graph_file(each): data_file(each) for each in QUANTISED},
}
# Graph → operators that it may hold.
_OPERATORS: Final = {MODEL_FILE: graph_check.OWN, LLM_FILE: graph_check.LLM}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest and files were found to agree.

    Attributes:
        path: The folder.
        manifest: What manifest.json says.
        quantised: Which of its quantised graphs `read_model` gives, and backends run; None for the
            bundle's own graph.
        cpu_engine: Whether ONNX Runtime runs a CPU engine in the place of the graph: it ``may``
            where one fits this machine, ``must``, or ``never`` does.
    """

    path: Path
    manifest: Manifest
    quantised: Quantised | None = None
    # How a bundle is run is no part of what it is: two that differ in it are equal.
    cpu_engine: Literal["may", "must", "never"] = dataclasses.field(default="may", compare=False)

    @property
    def precision(self) -> Precision:
        """Precision of the graph that `read_model` gives."""
        return self.quantised or self.manifest.precision

    def at(self, precision: str | None) -> Bundle:
        """Return this bundle with the graph of a precision itself; None for the bundle's own.

        Raises:
            InvalidInputError: The bundle has no graph of that precision.
        """
        if precision is None or precision == self.manifest.precision:
            return dataclasses.replace(self, quantised=None, cpu_engine="never")
        for quantised in self.manifest.precisions:
            if precision == quantised:
                return dataclasses.replace(self, quantised=quantised, cpu_engine="never")
        there = ", ".join([self.manifest.precision, *self.manifest.precisions])
        cure = (
            f"make it with: vzip calibrate {self.path} --images FOLDER --precision {precision}"
            if precision in QUANTISED
            else "export the bundle with --dtype fp32 or fp16, or calibrate it to int8 or fp8"
        )
        raise InvalidInputError(
            f"got precision={precision!r}",
            expected=f"one of this bundle's: {there}",
            cure=cure,
        )

    def to_run(self, precision: str | None) -> Bundle:
        """Return this bundle as `VisionEncoder.open` runs it for a precision.

        That is what `at` gives; with ``fastest`` this bundle for a CPU engine; with None itself.

        Raises:
            InvalidInputError: As for `at`.
        """
        if precision == FASTEST:
            return dataclasses.replace(self, quantised=None, cpu_engine="must")
        return self if precision is None else self.at(precision)

    @property
    def graph_file(self) -> str:
        """Name of the graph that `read_model` gives, a key of the manifest's `files`."""
        return MODEL_FILE if self.quantised is None else graph_file(self.quantised)

    @property
    def data_path(self) -> Path | None:
        """The file of weights beside the graph; None where the graph holds them itself."""
        name = _GRAPHS[self.graph_file]
        return _place(self.path, self.manifest, name) if name in self.manifest.files else None

    @property
    def weights_folder(self) -> Path:
        """The folder in which the graph's external data lies."""
        data = self.data_path
        return self.path if data is None else data.parent

    @property
    def has_llm(self) -> bool:
        """Whether the language model is in the bundle, for ONNX Runtime."""
        return LLM_FILE in self.manifest.files

    @door(
        BundleError,
        "the graph of the bundle '{self.path}' can't be read",
        cure="copy it again, or export it again",
    )
    def read_model(self, *, verify: bool = True) -> bytes:
        """Return the graph's bytes, after checking every file against the manifest again.

        Sessions are made from these bytes, not from the path: what was checked is what runs. Of the
        language model's files the sizes alone are compared: `read_llm` is for who runs it. So are
        those of quantised graphs; of one that is read itself, its own files alone are looked at.

        Args:
            verify: Whether SHA-256 digests are compared, or sizes and locations alone.

        Raises:
            BundleError: A file is missing, no plain file, or differs from the manifest.
        """
        with naming(self.path):
            if self.quantised is None:
                leave = (*LLM_FILES, *QUANTISED_FILES)
                check_files(self.path, self.manifest, verify=verify, leave=leave)
            else:
                _check_quantised(self.path, self.manifest, self.quantised, verify=verify)
            return _read_graph(self.path, self.manifest, self.graph_file, verify=verify)

    @door(
        BundleError,
        "the LLM of the bundle '{self.path}' can't be read",
        cure="copy it again, or export it again",
    )
    def read_llm(self) -> bytes:
        """Return the bytes of the language model's graph, after checking it and its weights.

        Its other files are checked when they are opened, see `open_file`.

        Raises:
            BundleError: The bundle has no language model; or a file of it is missing, no plain
                file, or differs from the manifest.
        """
        with naming(self.path):
            if not self.has_llm:
                raise BundleError(
                    f"manifest.json: 'files' lacks {LLM_FILE}, so there is no language model "
                    "in this bundle",
                    cure="export it with --with-llm",
                )
            others = set(self.manifest.files) - {LLM_DATA_FILE}
            check_files(self.path, self.manifest, verify=True, leave=others)
            return _read_graph(self.path, self.manifest, LLM_FILE, verify=True)

    def held_weights(self, name: str | None = None) -> dict[str, bytes]:
        """Return a file of weights that is small enough to be held, after checking its digest.

        What is held isn't mapped: nobody can cut or change it behind a session.

        Args:
            name: A key of the manifest's `files`; None for that of the graph of `read_model`.

        Returns:
            Name → content; nothing for a file above `HELD_BYTES`, or where there is none.

        Raises:
            BundleError: It is missing, no plain file, or differs from the manifest.
        """
        name = _GRAPHS[self.graph_file] if name is None else name
        entry = self.manifest.files.get(name)
        if entry is None or entry.bytes > HELD_BYTES:
            return {}
        with naming(self.path), _open_listed(self.path, self.manifest, name) as file:
            data = file.read(HELD_BYTES + 1)
            _check_size(name, len(data), entry)
            _check_digest(name, hashlib.sha256(data).hexdigest(), entry)
        return {name: data}

    @contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """Open one of the listed files, at its beginning, after checking size and digest.

        Args:
            name: A key of the manifest's `files`.

        Raises:
            BundleError: It is missing, no plain file, or differs from the manifest.
        """

        def guard() -> AbstractContextManager[None]:
            got = f"'{self.path}': {name} can't be read"
            return guarded(BundleError, got, cure="copy it again, or export it again")

        with naming(self.path), guard():
            entry = self.manifest.files[name]
            file = _open_listed(self.path, self.manifest, name)
        with file:
            with naming(self.path), guard():
                found = digest_of(file, name)
                _check_size(name, found.bytes, entry)
                _check_digest(name, found.sha256, entry)
            file.seek(0)
            yield file

    @door(
        BundleError,
        "'{self.path}': image_newline.npy can't be read",
        cure="copy it again, or export it again",
    )
    def newline(self) -> NDArray[np.float32]:
        """Return the LLM's embedding that ends a row, float32 [L], after checking its digest.

        Raises:
            BundleError: The bundle has none; the file differs from the manifest, or is no finite
                float32 [L].
        """
        width = self.manifest.llm.hidden_size
        with naming(self.path):
            entry = self.manifest.files.get(NEWLINE_FILE)
            if entry is None:
                raise _no_newline("it was asked for")
            most = 4 * width + _LARGEST_NPY_HEADER
            if entry.bytes > most:
                raise BundleError(
                    f"{NEWLINE_FILE} has {entry.bytes} bytes",
                    expected=f"at most {most} for float32 [{width}]",
                    cause="it is of another model",
                    cure="export the bundle again",
                )
            with open_plain(self.path / NEWLINE_FILE) as file:
                data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
            _check_digest(NEWLINE_FILE, hashlib.sha256(data).hexdigest(), entry)
            return _parse_newline(data, width)


@door(BundleError, "the bundle '{path}' can't be read", cure="copy it again, or export it again")
def read_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
    """Read the manifest of the bundle in the folder `path` and check its files against it.

    Args:
        path: The folder.
        verify: Whether SHA-256 digests are compared; the rest (manifest, sizes, plain files,
            locations of external data) always is.

    Raises:
        BundleError: There is no bundle, or anything in it is not as `docs/bundle.md` demands.
    """
    folder = Path(path).absolute()
    with naming(folder):
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            model = os.fspath(path)
            raise BundleError(
                f"found {found}",
                expected="the folder that `vzip export -o` wrote",
                cause=f"{model!r} is a model's alias" if model in ALIASES else "",
                cure=f"export it first: vzip export --model {model}" if model in ALIASES else "",
            )
        _check_no_checkpoint(folder)
        with open_plain(folder / MANIFEST_FILE) as file:
            data = file.read(LARGEST_MANIFEST + 1)
        if len(data) > LARGEST_MANIFEST:
            raise BundleError(
                f"manifest.json has more than {LARGEST_MANIFEST} bytes",
                expected="about 3000",
                cause="it was not made by vzip",
                cure="export the bundle again",
            )
        manifest = Manifest.from_bytes(data)
        check_files(folder, manifest, verify=verify)
        check_graphs(folder, manifest, verify=verify)
    return Bundle(folder, manifest)


def _check_no_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint's folder where a bundle is expected; other folders are not looked at.

    Raises:
        BundleError: There is no manifest, but a model's configuration.
    """
    if (folder / MANIFEST_FILE).exists():
        return
    for name, what, command in (
        ("config.json", "a checkpoint", f"vzip export --model {shlex.quote(str(folder))}"),
        ("adapter_config.json", "an adapter of PEFT", ""),
    ):
        if (folder / name).is_file():
            raise BundleError(
                f"found {what} ({name})",
                expected="a bundle: the folder that `vzip export -o` wrote",
                cure=f"export it first, and give what that writes: {command}"
                if command
                else "merge it into its base model, export that, and give the bundle",
            )


@contextmanager
def open_engine(bundle: Bundle, name: str) -> Iterator[BinaryIO]:
    """Open the file of an engine that the manifest records, which must be a plain file.

    Its content is not looked at: `vzip.runtime.backends.tensorrt.engine_file.read_engine` does
    that.

    Raises:
        BundleError: It is missing or no plain file.
    """
    folder = bundle.path / ENGINES_FOLDER
    waiting = waiting_engine(folder, name, bundle.manifest.engines[name])
    with naming(folder):
        if folder.is_symlink():
            raise not_plain(folder, "a symbolic link")
        try:
            file = open_plain(waiting)
        except BundleError as error:
            # Mostly it waits no more; a writer may rename it at this very moment.
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            file = open_plain(folder / f"{name}{ENGINE_SUFFIX}")
    with file:
        yield file


def waiting_engine(folder: Path, name: str, record: EngineRecord) -> Path:
    """Return where an engine waits for the manifest to speak of it."""
    return folder / f".{name}.{record.sha256[:16]}{ENGINE_SUFFIX}"


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Put the folder in front of messages about what is in it."""
    try:
        yield
    except BundleError as error:
        fields = {name: getattr(error, name) for name in ("expected", "cause", "cure")}
        raise BundleError(f"{folder}: {error.got}", **fields) from error.__cause__


def open_plain(path: Path) -> BinaryIO:
    """Open a file of a bundle, which must be a plain file with one name and no link.

    Raises:
        BundleError: It is missing, can't be read, or is something else.
    """
    try:
        file = plain.open_plain(path, links=False)
    except plain.NotPlainError as error:
        link = error.errno == errno.ELOOP
        found = "a symbolic link" if link else "no plain file (folder, FIFO, device)"
        raise not_plain(path, found) from error
    except OSError as error:
        raise BundleError(
            f"{path.name} can't be read ({error.strerror})",
            expected="a plain file",
            cause="the bundle is incomplete",
            cure="copy it again with all its files, or export it again",
        ) from error
    if os.fstat(file.fileno()).st_nlink != 1:
        file.close()
        raise not_plain(path, "a hard link")
    return file


def waiting_folder(folder: Path, manifest: Manifest, precision: Quantised) -> Path:
    """Return where the files of a quantised graph wait for the manifest to speak of them.

    The folder's name has a digest over theirs, so that no other graph is ever taken for this one.
    """
    listed = [f"{name} {manifest.files[name].sha256}" for name in files_of(precision)
              if name in manifest.files]  # fmt: skip
    digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()
    return folder / f".{precision}.{digest[:16]}{WAITING_SUFFIX}"


def _place(folder: Path, manifest: Manifest, name: str) -> Path:
    """Return where a listed file lies: mostly in the folder, or where it waits for its place."""
    for precision in manifest.precisions:
        if name in files_of(precision):
            waiting = waiting_folder(folder, manifest, precision)
            if waiting.is_symlink():
                raise not_plain(waiting, "a symbolic link")
            if os.path.lexists(waiting / name):
                return waiting / name
    return folder / name


def _open_listed(folder: Path, manifest: Manifest, name: str) -> BinaryIO:
    """Open a file that the manifest lists, see `open_plain`."""
    path = _place(folder, manifest, name)
    try:
        return open_plain(path)
    except BundleError as error:
        # A writer may let a file that waits take its place at this very moment.
        if path.parent == folder or not isinstance(error.__cause__, FileNotFoundError):
            raise
        return open_plain(folder / name)


def not_plain(path: Path, found: str) -> BundleError:
    """Return the error for a name that could lead out of the bundle."""
    return BundleError(
        f"{path.name} is {found}",
        expected="a plain file with one name",
        cause="links can lead out of the bundle and change behind its digest",
        cure="copy the file itself (cp --dereference)",
    )


def digest_of(file: BinaryIO, name: str) -> FileEntry:
    """Return digest and size of an open file.

    Raises:
        BundleError: It is empty.
    """
    digest, size, buffer = hashlib.sha256(), 0, bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(view[:count])
        size += count
    if not size:
        raise BundleError(
            f"{name} is empty",
            expected="content",
            cure="export the bundle again",
        )
    return FileEntry(digest.hexdigest(), size)


def check_files(
    folder: Path, manifest: Manifest, *, verify: bool, leave: Collection[str] = ()
) -> None:
    """Check which files there are, their sizes and, but for graphs, their digests.

    Args:
        folder: The bundle.
        manifest: What its manifest.json says.
        verify: Whether digests are compared.
        leave: Files whose digests are not compared in any case.

    Raises:
        BundleError: One is missing, too much, or another one.
    """
    if MODEL_FILE not in manifest.files:
        raise BundleError(
            f"manifest.json: 'files' lacks {MODEL_FILE}",
            cause="the file was edited or made by another tool",
            cure="export the bundle again",
        )
    _check_newline(manifest)
    _check_llm(manifest)
    for name in manifest.files:
        deep = verify and name not in _GRAPHS and name not in leave
        _check_file(folder, manifest, name, verify=deep)


def _check_quantised(
    folder: Path, manifest: Manifest, precision: Quantised, *, verify: bool
) -> None:
    """Check the files of a quantised graph, and nothing else; its digest is left to the reader."""
    for name in files_of(precision):
        if name in manifest.files:
            _check_file(folder, manifest, name, verify=verify and name not in _GRAPHS)


def _check_file(folder: Path, manifest: Manifest, name: str, *, verify: bool) -> None:
    """Check the size of a listed file and, where asked for, its digest."""
    entry = manifest.files[name]
    with _open_listed(folder, manifest, name) as file:
        _check_size(name, os.fstat(file.fileno()).st_size, entry)
        if verify:
            _check_digest(name, digest_of(file, name).sha256, entry)


def check_graphs(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """Check where the tensors of graphs lie; of those that are verified, what they compute too.

    Raises:
        BundleError: A digest is another one, a tensor lies outside the bundle, or an operator can't
            be run or takes too much: see `vzip.runtime.bundle.graph_limits`.
    """
    for graph in _GRAPHS:
        if graph in manifest.files:
            _read_graph(folder, manifest, graph, verify=verify)


def _read_graph(folder: Path, manifest: Manifest, graph: str, *, verify: bool) -> bytes:
    """Return the bytes of a graph, after checking them."""
    with _open_listed(folder, manifest, graph) as file:
        model = file.read()
    if verify:
        _check_digest(graph, hashlib.sha256(model).hexdigest(), manifest.files[graph])
    data_file = _GRAPHS[graph]
    data = manifest.files.get(data_file)
    graph_check.check_graph(
        model,
        file=graph,
        data_file=data_file,
        data_bytes=None if data is None else data.bytes,
        operators=_OPERATORS.get(graph, graph_check.QUANTISED),
    )
    if not verify:  # constants may lie in a file that nobody has compared with its digest
        return model
    with weights(folder, manifest, data_file) as read:
        if graph == LLM_FILE:
            graph_limits.check_decoder(model, read, file=graph)
        else:
            graph_limits.check_encoder(model, read, file=graph, batch=manifest.batch.max)
    return model


@contextmanager
def weights(folder: Path, manifest: Manifest, name: str) -> Iterator[Read]:
    """Give what reads parts of a listed file of weights, which is opened when one is asked for."""
    with contextlib.ExitStack() as stack:
        opened: list[BinaryIO] = []

        def read(tensor: graph_check.ExternalTensor) -> bytes:
            if not opened:
                opened.append(stack.enter_context(_open_listed(folder, manifest, name)))
            opened[0].seek(tensor.offset)
            return opened[0].read(tensor.length)

        yield read


def _check_size(name: str, size: int, entry: FileEntry) -> None:
    """Refuse a file of another size than at export."""
    if size != entry.bytes:
        raise BundleError(
            f"{name} has {size} bytes",
            expected=f"{entry.bytes}",
            cause="it was truncated or replaced",
            cure="copy it again, or export the bundle again",
        )


def _check_llm(manifest: Manifest) -> None:
    """Refuse a language model of which only a part is listed."""
    listed = [name for name in LLM_FILES if name in manifest.files]
    lost = [name for name in LLM_FILES if name not in listed and name != LLM_DATA_FILE]
    if listed and lost:
        raise BundleError(
            f"manifest.json: 'files' has {', '.join(listed)} but lacks {', '.join(lost)}",
            expected="the whole language model or nothing of it",
            cause="the file was edited",
            cure="export the bundle again",
        )


def _check_newline(manifest: Manifest) -> None:
    """Refuse a bundle whose tokens take a newline embedding that it doesn't have."""
    if NEWLINE_FILE in manifest.files:
        return
    if manifest.tiling is not None and manifest.tiling.order == "newline":
        raise _no_newline("'tiling.order' is 'newline'")
    if manifest.tower.pool == 2:
        raise _no_newline("'tower.pool' is 2, and one ends a clip")


def _no_newline(why: str) -> BundleError:
    """Return the error for a newline embedding that isn't there."""
    return BundleError(
        f"manifest.json: 'files' lacks {NEWLINE_FILE}",
        expected=f"it, since {why}",
        cause="the model has no newline embedding, or the file was edited",
        cure="export the bundle again",
    )


def npy_header(file: BinaryIO, name: str, expected: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of the array in a file of NumPy's format; its numbers follow.

    What the header says can be compared before memory is taken for it.

    Args:
        file: The file, at its beginning.
        name: Its name, for messages.
        expected: What it should hold, for messages.

    Raises:
        BundleError: It is no such file, or its array is in Fortran's order.
    """
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran and len(shape) > 1:
            raise ValueError("another order")
        # In hexadecimal an extent may have more digits than Python prints.
        if any(type(extent) is not int or not 0 <= extent < 2**53 for extent in shape):
            raise ValueError("no extents")
    except _NPY_ERRORS as error:
        raise BundleError(
            f"{name} is no file in NumPy's format 1.0",
            expected=f"{expected}",
            cause="it was made by another tool",
            cure="export the bundle again",
        ) from error
    return shape, dtype


def _parse_newline(data: bytes, width: int) -> NDArray[np.float32]:
    """Return the array in a file of NumPy's format, float32 [width]."""
    file = io.BytesIO(data)
    shape, dtype = npy_header(file, NEWLINE_FILE, f"float32 [{width}]")
    left = len(data) - file.tell()
    if (shape, dtype, left) != ((width,), np.dtype("<f4"), 4 * width):
        raise BundleError(
            f"{NEWLINE_FILE} holds {dtype} {list(shape)} in {left} bytes",
            expected=f"float32 [{width}] in {4 * width}",
            cause="it is of another model",
            cure="export the bundle again",
        )
    newline = np.frombuffer(data, dtype, offset=file.tell()).astype(np.float32)
    if not np.isfinite(newline).all():
        raise BundleError(
            f"{NEWLINE_FILE} has numbers that are NaN or infinite",
            expected="finite ones",
            cause="the checkpoint is damaged",
            cure="export the bundle from a sound one",
        )
    return newline


def _check_digest(name: str, got: str, entry: FileEntry) -> None:
    """Refuse a file that is not the one that was hashed at export."""
    if got != entry.sha256:
        raise BundleError(
            f"{name} has SHA-256 {got[:12]}…",
            expected=f"{entry.sha256[:12]}…",
            cause="it was damaged or replaced",
            cure="copy it again, or export the bundle again",
        )
