"""Many images to files of tokens: found, encoded in full batches, written whole, and resumable.

Each image's tokens go, as soon as they are there, into a hidden folder beside the output, which is
a token cache without a limit; the output is put together from it and takes its name in one step.
So a run that was killed has lost two batches at most, whatever the outputs are: while one goes
through the graph, the next one's pictures are decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import atomic, locks
from vzip.runtime.files.plain import open_plain
from vzip.runtime.files.tensor_header import LARGEST_HEADER
from vzip.runtime.guard import door
from vzip.runtime.pictures.images import FORMATS, format_of
from vzip.runtime.tokens.cache import TokenCache, image_digest, read_image
from vzip.runtime.tokens.file import (
    ImageTokens,
    Origin,
    TokenFile,
    TokenRecord,
    header,
    write_indices,
    write_tokens,
)
from vzip.runtime.tokens.positions import EncodedImage, flat_ranks, image_places
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.encoder import CompressedTokens, VisionEncoder

# Images, whether they are read here or not: one in another format was meant to be encoded.
_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl",
}  # fmt: skip
_AT_ONCE: Final = (
    2  # batches: the pictures of one are decoded while the other goes through the graph
)
_HEADER_PER_IMAGE = 450  # bytes at most, beside the name, which stands there three times


@dataclass
class Found:
    """What the arguments of a command line led to.

    Attributes:
        images: Name and path of each file that may be an image, in order.
        left_out: Name of what is no image, and why.
        hidden: How many hidden files and folders were passed over.
        others: Names of a folder's files that are no images, by name and by their first bytes.
    """

    images: list[tuple[str, Path]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    hidden: int = 0
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """One file to write.

    Attributes:
        path: The file.
        images: Name and path of each image that belongs into it.
        shard: Whether it is one of several; such a one is written even if no image was good.
    """

    path: Path
    images: Sequence[tuple[str, Path]]
    shard: bool


@door(InvalidInputError, "the images can't be found", cure="check the paths")
def find_images(paths: Sequence[Path], output: Path) -> Found:
    """Return the files that the paths name: files as given, folders with all that is below them.

    A file that was given goes by its last name, one in a folder by its path in the folder. Names
    in a folder are in alphabetical order; hidden ones, links to folders, and what `output` or one
    of its shards is, are no images.

    Raises:
        InvalidInputError: A path leads nowhere, there are no files, or two have the same name.
    """
    found, seen = Found(), dict[str, Path]()
    for path in paths:
        if not os.path.lexists(path):
            raise InvalidInputError(
                f"got '{path}', which does not exist (looked for at '{path.absolute()}')",
                expected="an image file or a folder of images",
                cure="check the path",
            )
        for each in sorted(_below(path, found)) if path.is_dir() else [path]:
            if path.is_dir() and is_output(each, output):
                continue
            name = _text(each.relative_to(path).as_posix() if path.is_dir() else each.name)
            if path.is_dir() and not _may_be_image(each):
                found.others.append(name)
                continue
            other = seen.setdefault(name, each)
            if other is each:
                found.images.append((name, each))
            elif other.absolute() != each.absolute():
                raise InvalidInputError(
                    f"got '{other}' and '{each}', which would both be called {name!r}",
                    expected="images of different names",
                    cure=(
                        "name the folder above both instead, so that their names begin with the "
                        "folder's"
                    ),
                )
    if not found.images and not found.left_out:
        others = f" (but {counted(len(found.others), 'other file')})" if found.others else ""
        raise InvalidInputError(
            f"found no images in {', '.join(map(str, paths))}{others}",
            expected=f"files in {', '.join(FORMATS)}",
            cure="check the path",
        )
    return found


def is_output(path: Path, output: Path) -> bool:
    """Return whether a path is that of an output or of one of its shards."""
    shard = rf"{re.escape(output.stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(output.suffix)}"
    beside = path.absolute().parent == output.absolute().parent
    return beside and (path.name == output.name or re.fullmatch(shard, path.name) is not None)


@door(InvalidInputError, "'{output}' can't be written", cure="choose another name with -o")
def outputs_of(
    images: Sequence[tuple[str, Path]], output: Path, shard_size: int | None
) -> list[Output]:
    """Return the files to write; with `shard_size` images in each, but the last.

    Shards are called ``tokens-00001-of-00007.safetensors``. How many there are follows from the
    files that were found, before it is known whether all of them are images.

    Raises:
        InvalidInputError: So many images don't fit into one file, or there are shards from another
            number of images.
    """
    if shard_size is None:
        size = sum(3 * len(name.encode()) + _HEADER_PER_IMAGE for name, _ in images)
        if output.suffix == ".safetensors" and size > LARGEST_HEADER:
            raise InvalidInputError(
                f"got {counted(len(images), 'image')}",
                expected=f"fewer in one file, whose header may have {LARGEST_HEADER} bytes",
                cure="write shards with --shard-size",
            )
        return [Output(output, images, shard=False)]
    slices = [images[first : first + shard_size] for first in range(0, len(images), shard_size)]
    names = [
        f"{output.stem}-{number:05}-of-{len(slices):05}{output.suffix}"
        for number in range(1, len(slices) + 1)
    ]
    for path in sorted(output.parent.iterdir()):
        if is_output(path, output) and path.name not in {output.name, *names}:
            raise InvalidInputError(
                f"found '{path}', which is no shard of {counted(len(images), 'image')} in "
                f"{counted(len(slices), 'file')} as asked for now",
                cause="the images or --shard-size are not those of the run that wrote it",
                cure="remove the old shards, or choose another name with -o",
            )
    return [
        Output(output.with_name(name), part, shard=True)
        for name, part in zip(names, slices, strict=True)
    ]


@door(InvalidInputError, "the outputs that are there can't be read")
def check_origin(outputs: Sequence[Output], origin: Origin) -> None:
    """Refuse to go on with what another bundle began.

    Raises:
        InvalidInputError: A file that is to be written is there and has another fingerprint, or is
            no file of tokens.
    """
    for output in outputs:
        if output.path.suffix == ".safetensors" and os.path.lexists(output.path):
            with TokenFile.open(output.path) as file:
                _check_fingerprint(output.path, file.origin.fingerprint, origin)


@contextlib.contextmanager
def work_store(output: Path, origin: Origin) -> Iterator[TokenCache]:
    """Yield the store of a run's finished images, which nobody else uses meanwhile.

    Left by an exception it stays, for the next run to go on with; otherwise it is removed.

    Raises:
        InvalidInputError: Another process is writing the same output, or another bundle's run was
            interrupted.
    """
    import shutil  # with its compressors it takes longer to import than this package

    folder = _parts(output)
    with _lock(folder, output):
        store = TokenCache(folder, limit=None)
        for found in store.fingerprints():
            _check_fingerprint(folder, found, origin)
        try:
            yield store
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it, there is nothing to go on with
            raise
        shutil.rmtree(folder, ignore_errors=True)


class EncodeJob:
    """The encoding of the images of some outputs, once.

    Attributes:
        left_out: Name of each image that could not be encoded, and why.
        encoded: How many images went through the graph.
        written: The files that are there now, whole.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        origin: Origin,
        store: TokenCache,
        outputs: Sequence[Output],
        *,
        several: bool = False,
    ) -> None:
        """Begin; `several` as for `VisionEncoder.image_tokens`, and as the origin was made."""
        self.left_out: list[tuple[str, str]] = []
        self.encoded = 0
        self.written: list[Path] = []
        self._encoder, self._origin, self._store = encoder, origin, store
        self._several = several
        self._writings = tuple(_Writing(output, origin, store) for output in outputs)
        self._unwritten = deque(self._writings)
        self._waiting: dict[str, bytes] = {}  # the next batch: digest → encoded image
        self._begun: deque[_Begun] = deque()  # batches that are being encoded
        self._unfinished = set[str]()  # digests of all these
        self._failed: dict[str, str] = {}  # digest → why
        self._uses = Counter[str]()  # how many outputs in the making take an image

    def run(self, images: Iterable[tuple[str, Path]]) -> None:
        """Encode the images and write each output once it is complete.

        Batches are filled across outputs.

        Args:
            images: Name and path of the images of all outputs, in their order.

        Raises:
            VzipError: The graph failed, or something can't be written.
        """
        from concurrent.futures import ThreadPoolExecutor

        writings = iter(self._writings)
        writing = None
        pool = ThreadPoolExecutor(1 if self._encoder.decoders == 1 else _AT_ONCE)
        try:
            for name, path in images:
                if writing is None or writing.full:
                    writing = next(writings)
                self._take(writing, name, path)
                if len(self._waiting) == self._encoder.manifest.batch.max:
                    self._encode(pool)
                    self._finish(_AT_ONCE - 1)
                if writing.full:
                    self._write()
            self._encode(pool)
            self._finish(0)
            self._write()
        finally:
            pool.shutdown(cancel_futures=True)

    def _take(self, writing: _Writing, name: str, path: Path) -> None:
        """Note what becomes of one image; if it must be encoded, it waits for a full batch."""
        try:
            data = read_image(path)
        except InvalidInputError as error:
            writing.items.append((name, None))
            self.left_out.append((name, str(error)))
            return
        digest = image_digest(data)
        writing.items.append((name, digest))
        self._uses[digest] += 1
        known = digest in self._unfinished or digest in self._failed or digest in writing.old
        if not known and self._store.get(digest, self._origin.fingerprint) is None:
            self._waiting[digest] = data
            self._unfinished.add(digest)

    def _encode(self, pool: ThreadPoolExecutor) -> None:
        """Begin with the images that wait."""
        if self._waiting:
            images = [*self._waiting.values()]
            future = pool.submit(encode_images, self._encoder, images, several=self._several)
            self._begun.append(_Begun([*self._waiting], future))
            self._waiting.clear()

    def _finish(self, begun: int) -> None:
        """Keep what the batches gave, all but so many that began last; write what is complete."""
        while len(self._begun) > begun:
            batch = self._begun.popleft()
            for digest, result in zip(batch.digests, batch.future.result(), strict=True):
                if isinstance(result, InvalidInputError):
                    self._failed[digest] = str(result)
                else:
                    self._store.put(self._origin, ImageTokens.of(digest, result))
                    self.encoded += 1
            self._unfinished.difference_update(batch.digests)
            self._write()

    def _write(self) -> None:
        """Write the outputs that lack nothing any more, in order."""
        while self._unwritten and self._unwritten[0].complete(self._unfinished):
            writing = self._unwritten.popleft()
            digests = [(name, digest) for name, digest in writing.items if digest is not None]
            self.left_out += [(n, self._failed[d]) for n, d in digests if d in self._failed]
            good = [(name, digest) for name, digest in digests if digest not in self._failed]
            if not writing.write(good):
                continue
            self.written.append(writing.path)
            for _, digest in digests:
                self._uses[digest] -= 1
                if not self._uses[digest]:
                    self._store.remove(digest, self._origin.fingerprint)


class _Begun(NamedTuple):
    """A batch that is being encoded: its images' digests, and what will be made of them."""

    digests: list[str]
    future: Future[list[EncodedImage | InvalidInputError]]


class _Writing:
    """An output in the making.

    Attributes:
        path: The file.
        items: Name and digest of the images seen so far; None for one that can't be read.
        old: Digest → name of what the file holds already.
    """

    def __init__(self, output: Output, origin: Origin, store: TokenCache) -> None:
        self.path = output.path
        self.items: list[tuple[str, str | None]] = []
        self.old: dict[str, str] = {}
        self._output, self._origin, self._store = output, origin, store
        self._there: list[tuple[str, str]] | None = None
        if output.path.suffix == ".safetensors" and output.path.exists():
            with TokenFile.open(output.path) as file:
                self._there = [(each.name, each.sha256) for each in file.records.values()]
            self.old = {digest: name for name, digest in self._there}

    @property
    def full(self) -> bool:
        """Whether all images were seen."""
        return len(self.items) == len(self._output.images)

    def complete(self, unfinished: AbstractSet[str]) -> bool:
        """Return whether all images were seen and all of them were encoded."""
        return self.full and not any(digest in unfinished for _, digest in self.items)

    def write(self, images: Sequence[tuple[str, str]]) -> bool:
        """Write the file, unless it is right already; return whether it is there now.

        Args:
            images: Name and digest of each image that was encoded.
        """
        npy = self.path.suffix == ".npy"
        if (not images and not self._output.shard) or (npy and len(images) < len(self.items)):
            return False
        if images == self._there:
            return True
        temporary = self._store.folder / "output"
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(TokenFile.open(self.path)) if self.old else None
            records = [self._record(name, digest, old) for name, digest in images]
            try:
                with temporary.open("wb") as file:
                    if npy:
                        _write_npy_header(file, records)
                    else:
                        file.write(header(self._origin, records))
                        write_indices(file, self._load(images, old))
                    write_tokens(file, self._load(images, old))
                    file.flush()
                    os.fsync(file.fileno())
                atomic.rename_file(temporary, self.path)
            except OSError as error:
                raise InvalidInputError(
                    f"{self.path}: can't be written ({error.strerror})",
                    cure=(
                        "free some space and start again, which goes on from here, or choose "
                        "another place with -o"
                    ),
                ) from error
        return True

    def _record(self, name: str, digest: str, old: TokenFile | None) -> TokenRecord:
        """Return what the header says about an image."""
        if old is not None and digest in self.old:
            return dataclasses.replace(old.records[self.old[digest]], name=name)
        with TokenFile.open(self._store.path(digest, self._origin.fingerprint)) as file:
            return dataclasses.replace(file.records[digest], name=name)

    def _load(
        self, images: Sequence[tuple[str, str]], old: TokenFile | None
    ) -> Iterator[ImageTokens]:
        """Yield the tokens of images; one at a time is in memory."""
        for _, digest in images:
            if old is not None and digest in self.old:
                yield old.read(self.old[digest])
                continue
            with TokenFile.open(self._store.path(digest, self._origin.fingerprint)) as file:
                yield file.read(digest)


def encode_images(
    encoder: VisionEncoder, images: Sequence[bytes], *, several: bool = False
) -> list[EncodedImage | InvalidInputError]:
    """Return what the LLM gets for each image, or why it can't be used.

    Where the bundle cuts no tiles, all go through the graph in as few calls as its batch allows.

    Raises:
        BackendError: The graph failed.
    """
    try:
        if encoder.manifest.tiling is not None:
            return [encoder.image_tokens(image, several=several) for image in images]
        tokens = encoder.encode(list(images))
        return [_alone(encoder.manifest, tokens, row) for row in range(len(images))]
    except InvalidInputError as error:
        if len(images) == 1:
            return [error]
        middle = len(images) // 2  # the others of the batch are good, most likely
        halves = images[:middle], images[middle:]
        return [each for half in halves for each in encode_images(encoder, half, several=several)]


def _alone(manifest: Manifest, tokens: CompressedTokens, row: int) -> EncodedImage:
    """Return one image of a batch that isn't cut: its axis stays as that of the one tile."""
    one = slice(row, row + 1)
    positions = None if tokens.positions is None else tokens.positions[one]
    rank = None if tokens.rank is None else tokens.rank[one]
    embeds = tokens.embeds[row]
    where = image_places(manifest, None if positions is None else positions[0])
    return EncodedImage(embeds, tokens.kept[one], positions, where, flat_ranks(rank, len(embeds)))


def _write_npy_header(file: BinaryIO, records: Sequence[TokenRecord]) -> None:
    """Write what a .npy file with the tokens of images begins with: [images, n, L]."""
    lengths = {record.shape[0]: record.name for record in records}
    if len(lengths) > 1:
        (one, first), (other, second) = list(lengths.items())[:2]
        raise InvalidInputError(
            f"got {counted(one, 'token')} for {first!r} and {other} for {second!r}",
            expected="equal numbers in a .npy file",
            cause="tiles depend on the picture",
            cure="write a .safetensors of the same name, which goes on from here",
        )
    dtype = "<f4" if records[0].dtype == "F32" else "<f2"
    shape = (len(records), *records[0].shape)
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )


def _below(folder: Path, found: Found) -> Iterator[Path]:
    """Yield the files below a folder; note what is passed over."""

    def refused(error: OSError) -> None:
        found.left_out.append((_text(str(error.filename)), f"can't be listed ({error.strerror})"))

    for place, folders, files in os.walk(folder, onerror=refused):
        found.hidden += sum(name.startswith(".") for name in (*folders, *files))
        for name in folders:
            path = Path(place, name)
            if not name.startswith(".") and path.is_symlink():
                shown = _text(path.relative_to(folder).as_posix())
                found.left_out.append((shown, "is a link to a folder; name that folder itself"))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _may_be_image(path: Path) -> bool:
    """Return whether a folder's file is meant as an image, so that it is missed if it is none."""
    if path.suffix.lower() in _SUFFIXES or not path.is_file():
        return True
    try:
        with open_plain(path) as file:
            return format_of(file.read(12)) is not None
    except OSError:
        return True  # reading it says what is wrong


def _text(name: str) -> str:
    """Return a file's name as text; bytes of it that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _check_fingerprint(path: Path, found: str, origin: Origin) -> None:
    """Refuse what another bundle made."""
    if found != origin.fingerprint:
        raise InvalidInputError(
            f"{path}: was made by a bundle with the fingerprint {found[:12]}…, this one has "
            f"{origin.fingerprint[:12]}…",
            cause="tokens of two bundles don't belong together",
            cure="take that bundle, remove what it made, or choose another name with -o",
        )


@door(InvalidInputError, "'{output}' can't be written", cure="choose another name with -o")
def _parts(output: Path) -> Path:
    """Return where the finished images of a run lie meanwhile."""
    return output.with_name(f".{output.stem}.vzip-parts")


@door(InvalidInputError, "'{output}' can't be written", cure="choose another name with -o")
def _lock(folder: Path, output: Path) -> locks.Lock:
    """Make the folder of a run and hold its lock; where there are no locks, go on without."""
    try:
        lock = locks.on_folder(folder)
    except OSError as error:
        raise InvalidInputError(
            f"{folder.parent}: can't be written ({error.strerror})",
            cure="choose another place for the output with -o",
        ) from error
    if lock.taken is False:
        lock.close()
        raise InvalidInputError(
            f"{output}: another process is writing it",
            cure="wait for it, or choose another name with -o",
        )
    return lock
