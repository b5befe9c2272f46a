"""Files of compressed tokens, in the safetensors format, read and written without its package.

`vzip.runtime.files.tensor_header` says how the format begins, and `docs/tokens.md` what vzip puts
into it. `tests/parity/test_token_file_parity.py` holds this module to the package.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import numpy as np

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import codec
from vzip.runtime.files.plain import open_plain
from vzip.runtime.files.tensor_header import LARGEST_HEADER, METADATA, check_place, read_header
from vzip.runtime.guard import door
from vzip.runtime.tokens.positions import UNKNOWN, EncodedImage, Places, check_places
from vzip.runtime.tokens.ranks import Ranks
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FORMAT: Final = "vzip-tokens"
VERSION: Final = "2"
"""Since 2 there may be `positions`, `where` and `ranks` of an image; a file without says 1."""
Dtype = Literal["F32", "F16", "I64"]
_DTYPES: Final[dict[Dtype, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST: Final = 2**31  # bytes of an image's tokens; tiles of the largest LLMs have 0.3 GB
_WITHOUT: Final = "1"
_TOKENS, _KEPT = "tokens/", "kept/"
_POSITIONS, _PLACES = "token_positions/", "places/"
_RANK, _ROW_RANK = "rank/", "row_rank/"
# What a tensor of integers is called → its axes; those but the first may be absent. In this order
# they stand in a file, and are digested.
_INDICES: Final = {_KEPT: 2, _POSITIONS: 2, _PLACES: 1, _RANK: 2, _ROW_RANK: 1}


@dataclass(frozen=True)
class Origin(codec.Record):
    """What all tokens of a file have in common.

    Attributes:
        fingerprint: Of the bundle; see `vzip.runtime.bundle.fingerprint`.
        model: The manifest's `model.id`.
        token_order: The manifest's `token_order`.
        hidden_size: L, width of a token.
        image_token_id: Id of the placeholder that the tokens replace in the prompt.
    """

    fingerprint: str
    model: str
    token_order: str
    hidden_size: codec.Count
    image_token_id: int


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The tokens of one image.

    Attributes:
        name: The image's name, unique in its file.
        sha256: SHA-256 of the image: of the encoded file, as it lay on the disk.
        tokens: float32 or float16 [n, L], all that the language model gets for the image.
        kept: int64 [tiles, dominant], which tower tokens were kept; the base tile is first. One
            tile where the bundle cuts none.
        positions: int64 [tiles, K], which patch each token of a tile stands for; None where the
            bundle doesn't say.
        where: Where the tokens stand in the uncompressed sequence.
        ranks: At which step each was chosen; None where the bundle's selection isn't nested.
    """

    name: str
    sha256: str
    tokens: Array
    kept: NDArray[np.int64]
    positions: NDArray[np.int64] | None = None
    where: Places = UNKNOWN
    ranks: Ranks | None = None

    @classmethod
    def of(cls, digest: str, encoded: EncodedImage) -> ImageTokens:
        """Return what was encoded, named after its image's SHA-256."""
        tokens, kept = encoded.embeds, encoded.kept
        return cls(digest, digest, tokens, kept, encoded.positions, encoded.where, encoded.ranks)

    @property
    def encoded(self) -> EncodedImage:
        """As `VisionEncoder.image_tokens` gave it."""
        return EncodedImage(self.tokens, self.kept, self.positions, self.where, self.ranks)

    @property
    def indices(self) -> dict[str, NDArray[np.int64]]:
        """What there is of `kept`, `positions`, the places and the ranks, by its name in a file."""
        ranks = (None, None) if self.ranks is None else self.ranks
        found = (self.kept, self.positions, self.where.places, *ranks)
        return {kind: each for kind, each in zip(_INDICES, found, strict=True) if each is not None}

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes of the tokens and then of `indices`."""
        digest = hashlib.sha256(_raw(self.tokens))
        for each in self.indices.values():
            digest.update(_raw(each))
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenRecord:
    """What a file's header says about one image.

    Attributes:
        name: Its name.
        sha256: SHA-256 of the image.
        digest: `ImageTokens.digest`.
        dtype: ``F32`` or ``F16``, of the tokens.
        shape: n and L.
        span: Places of the image in the uncompressed sequence; None where that isn't known.
        indices: Shape of each of `ImageTokens.indices`.
    """

    name: str
    sha256: str
    digest: str
    dtype: Dtype
    shape: tuple[int, ...]
    span: int | None
    indices: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Image(codec.Record):
    """An image in the metadata's list."""

    name: str
    sha256: str
    digest: str
    span: codec.Count | None = field(default=None, metadata=codec.OPTIONAL)


@dataclass(frozen=True)
class _Tensor(codec.Record):
    """A tensor in the header; `data_offsets` count from the header's end."""

    dtype: Dtype
    shape: tuple[codec.Index, ...]
    data_offsets: tuple[codec.Index, codec.Index]


@door(InvalidInputError, "the tokens of an image can't be written")
def record_of(image: ImageTokens) -> TokenRecord:
    """Return what a header will say about an image.

    Raises:
        InvalidInputError: The arrays are not what `ImageTokens` says, or the name is no text.
    """
    tokens, kept, indices = image.tokens, image.kept, image.indices
    right = tokens.ndim == 2 and tokens.dtype in (np.float32, np.float16)
    for kind, each in indices.items():
        # Places have a check of their own, which says more.
        right &= kind == _PLACES or (each.ndim == _INDICES[kind] and each.dtype == np.int64)
    if right and image.ranks is not None:
        right = image.ranks.tiles.shape == kept.shape and len(image.ranks.rows) == len(tokens)
    if not right:
        raise InvalidInputError(
            f"got tokens {tokens.dtype} {list(tokens.shape)} and kept {kept.dtype} "
            f"{list(kept.shape)}",
            expected="float32 or float16 [n, L] and int64 [tiles, dominant]",
            cure="give them as VisionEncoder.image_tokens returned them",
        )
    try:
        image.name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"got the image name {image.name!r}",
            expected="Unicode text",
            cure="rename the file",
        ) from error
    check_places(image.name, image.where, len(tokens))
    return TokenRecord(
        image.name,
        image.sha256,
        image.digest,
        _NAMES[tokens.dtype.newbyteorder("<")],
        tokens.shape,
        image.where.span,
        {kind: each.shape for kind, each in indices.items()},
    )


def to_bytes(origin: Origin, images: Sequence[ImageTokens]) -> bytes:
    """Return the content of a file with these images, in this order.

    Raises:
        InvalidInputError: Two have one name, an array is not what it should be, or the header would
            be longer than `LARGEST_HEADER`.
    """
    parts: list[bytes | memoryview] = [header(origin, [record_of(image) for image in images])]
    parts += [_raw(each) for image in images for each in image.indices.values()]
    parts += [_raw(image.tokens) for image in images]
    return b"".join(parts)


@door(InvalidInputError, "a header of these images can't be written", cure="rename the images")
def header(origin: Origin, records: Sequence[TokenRecord]) -> bytes:
    """Return what a file begins with: the indices of all images follow, then all tokens.

    Integers come first, so that every tensor lies at a multiple of its element's size.

    Raises:
        InvalidInputError: Two images have one name, or it is longer than `LARGEST_HEADER`.
    """
    entries = [_Image(each.name, each.sha256, each.digest, each.span) for each in records]
    new = any(each.span is not None or len(each.indices) > 1 for each in records)
    metadata = {
        "format": FORMAT,
        "version": VERSION if new else _WITHOUT,
        **{key: str(value) for key, value in codec.write(origin).items()},
        "images": _compact(entries),
    }
    tensors: list[tuple[str, Dtype, tuple[int, ...]]]
    tensors = []
    for each in records:
        tensors += [(kind + each.name, "I64", shape) for kind, shape in each.indices.items()]
    tensors += [(_TOKENS + each.name, each.dtype, each.shape) for each in records]
    value: dict[str, object] = {METADATA: metadata}
    place = 0
    for name, dtype, shape in tensors:
        if name in value:
            raise InvalidInputError(
                f"got two images with the name {name.partition('/')[2]!r}",
                expected="one of each name in a file",
                cure="rename one",
            )
        end = place + math.prod(shape) * _DTYPES[dtype].itemsize
        value[name] = _Tensor(dtype, shape, (place, end))
        place = end
    text = _compact(value).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise InvalidInputError(
            f"got {counted(len(records), 'image')}, whose header would have {len(text)} bytes",
            expected=f"at most {LARGEST_HEADER} in one file",
            cure="write shards with --shard-size",
        )
    return len(text).to_bytes(8, "little") + text


class TokenFile:
    """A file of tokens, open for reading; made by `TokenFile.open`, a context manager.

    Attributes:
        path: The file.
        origin: What all its tokens have in common.
        records: What it holds, by the images' names, in its order.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._length = os.fstat(file.fileno()).st_size
        parsed = self._header()
        self.origin, entries = self._metadata(parsed.pop(METADATA, None))
        self._places = self._tensors(parsed)
        self.records = self._records(entries)

    @classmethod
    @door(
        InvalidInputError,
        "the token file '{path}' can't be read",
        cure="remove it and encode the images again",
    )
    def open(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Open a file and read its header.

        Raises:
            InvalidInputError: There is none, or it isn't one that `vzip encode` wrote, whole.
        """
        path = Path(path)
        try:
            file = open_plain(path)
        except OSError as error:
            raise InvalidInputError(
                f"{path}: can't be read ({error.strerror})",
                expected="a file that 'vzip encode' wrote",
                cure="check the path and its permissions",
            ) from error
        try:
            return cls(path, file)
        except BaseException:
            file.close()
            raise

    @door(
        InvalidInputError,
        "the tokens of '{name}' can't be read",
        cure="remove it and encode the images again",
    )
    def read(self, name: str) -> ImageTokens:
        """Return one image's tokens, after comparing their digest.

        Raises:
            InvalidInputError: There is no image of that name, or its tokens are damaged.
        """
        record = self.records.get(name)
        if record is None:
            raise InvalidInputError(
                f"{self.path}: got the image name {name!r}",
                expected=(
                    f"one of the {len(self.records)} in the file, such as {list(self.records)[:3]}"
                ),
            )
        tokens = self._array(_TOKENS + name)
        found = {kind: self._array(kind + name) for kind in record.indices}
        where = Places(found.get(_PLACES), record.span)
        check_places(f"{self.path}: {name!r}", where, len(tokens))
        ranks = Ranks(found[_RANK], found[_ROW_RANK]) if _RANK in found else None
        image = ImageTokens(
            name, record.sha256, tokens, found[_KEPT], found.get(_POSITIONS), where, ranks
        )
        if image.digest != record.digest:
            raise self._malformed(f"the tokens of {name!r} are not those that were written")
        return image

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> TokenFile:  # noqa: PYI034 - typing.Self is newer than 3.10
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _malformed(self, what: str) -> InvalidInputError:
        """Return the error for a file that isn't ours or isn't whole."""
        return InvalidInputError(
            f"{self.path}: {what}",
            expected="a file that 'vzip encode' wrote",
            cause="it was damaged or made by another tool",
            cure="remove it and encode the images again",
        )

    def _header(self) -> dict[str, Any]:
        """Return the header's JSON; the file's position is then that of the first tensor."""
        try:
            self._start, value = read_header(self._file)
        except ValueError as error:
            raise self._malformed(str(error)) from error
        return value

    def _metadata(self, found: object) -> tuple[Origin, tuple[_Image, ...]]:
        """Return origin and list of images."""
        metadata: dict[str, Any] = dict(found) if isinstance(found, dict) else {}
        for key, expected in (("format", (FORMAT,)), ("version", (_WITHOUT, VERSION))):
            got = metadata.pop(key, None)
            if got not in expected:
                raise self._malformed(f"its {key} is {got!r} and not {' or '.join(expected)!r}")
        try:
            codec.read(Mapping[str, str], metadata)  # type: ignore[type-abstract]
            images = codec.read(tuple[_Image, ...], codec.parse(metadata.pop("images")))
            for key in ("hidden_size", "image_token_id"):  # all metadata is text
                metadata[key] = int(metadata[key])
            return codec.read(Origin, metadata), images
        except (ValueError, KeyError) as error:
            raise self._malformed(f"its metadata can't be understood ({error})") from error

    def _tensors(self, parsed: Mapping[str, Any]) -> dict[str, _Tensor]:
        """Return each tensor's entry; together they fill the file."""
        found, expected = {}, 0
        for name, value in parsed.items():
            try:
                entry = codec.read(_Tensor, value)
            except codec.MisfitError as error:
                raise self._malformed(f"the tensor {name!r} can't be understood") from error
            width = _DTYPES[entry.dtype].itemsize
            try:
                begin, end = check_place(
                    entry.shape, entry.data_offsets, width, self._length - self._start
                )
            except ValueError as error:
                raise self._malformed(f"of the tensor {name!r}, {error}") from error
            if end - begin > _LARGEST:
                raise self._malformed(f"the tensor {name!r} has {end - begin} bytes")
            if begin != expected:
                raise self._malformed(f"the tensor {name!r} doesn't lie where the one before ends")
            found[name], expected = entry, end
        if self._start + expected != self._length:
            raise self._malformed(
                f"it has {self._length} bytes where its header speaks of {self._start + expected}"
            )
        return found

    def _records(self, entries: Sequence[_Image]) -> dict[str, TokenRecord]:
        """Return what the file holds; tensors and list of images must be about the same."""
        records = {}
        left = dict(self._places)
        for image in entries:
            name, width = image.name, self.origin.hidden_size
            tokens = left.pop(_TOKENS + name, None)
            found = {kind: left.pop(kind + name) for kind in _INDICES if kind + name in left}
            kept, places, tiles, rows = map(found.get, (_KEPT, _PLACES, _RANK, _ROW_RANK))
            if tokens is None or tokens.dtype == "I64" or tokens.shape[1:] != (width,):
                raise self._malformed(f"it has no tokens [n, L] for {name!r}")
            if kept is None or kept.dtype != "I64" or len(kept.shape) != 2:
                raise self._malformed(f"it has no kept indices [tiles, dominant] for {name!r}")
            for kind, each in found.items():
                if each.dtype != "I64" or len(each.shape) != _INDICES[kind]:
                    axes = "[tiles, K]" if _INDICES[kind] > 1 else "[n]"
                    raise self._malformed(f"its '{kind}{name}' are no integers {axes}")
            if places is not None and (image.span is None or places.shape != tokens.shape[:1]):
                raise self._malformed(f"it has no place for each token of {name!r}, or no span")
            shapes = [None if each is None else each.shape for each in (tiles, rows)]
            if shapes not in ([None, None], [kept.shape, tokens.shape[:1]]):
                raise self._malformed(f"it has no rank for each token of {name!r}")
            records[name] = TokenRecord(
                **vars(image),
                dtype=tokens.dtype,
                shape=tokens.shape,
                indices={kind: each.shape for kind, each in found.items()},
            )
        if left:
            raise self._malformed(f"its list of images doesn't have {sorted(left)[0]!r}")
        return records

    def _array(self, tensor: str) -> Array:
        """Return one tensor."""
        entry = self._places[tensor]
        array = np.empty(entry.shape, _DTYPES[entry.dtype])
        self._file.seek(self._start + entry.data_offsets[0])
        if self._file.readinto(_view(array)) != array.nbytes:  # type: ignore[attr-defined]
            raise self._malformed("it became shorter while it was read")
        return array


def write_tokens(file: BinaryIO, images: Iterable[ImageTokens]) -> None:
    """Write the tokens of images where a file has its header and indices already."""
    for image in images:
        file.write(_raw(image.tokens))


def write_indices(file: BinaryIO, images: Iterable[ImageTokens]) -> None:
    """Write the indices of images behind a file's header."""
    for image in images:
        for each in image.indices.values():
            file.write(_raw(each))


def _compact(value: object) -> str:
    return json.dumps(codec.write(value), ensure_ascii=False, separators=(",", ":"))


def _view(array: Array) -> memoryview:
    """Return the memory of a contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8).data


def _raw(array: Array) -> memoryview:
    """Return the bytes of an array as they stand in a file: C order, little endian."""
    return _view(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
