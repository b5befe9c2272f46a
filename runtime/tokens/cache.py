"""A folder that remembers tokens, so that a picture that was seen before costs no vision.

An entry is a token file of one image (`vzip.runtime.tokens.file`), named after the image's SHA-256
and the bundle's fingerprint. Any number of processes may use one folder: entries appear whole and
are immutable, what one process evicts is a miss to another, and what is damaged is removed and
encoded again. The folder is trusted as a bundle is: digests find damage, they don't say who wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.bundle.fingerprint import fingerprint
from vzip.runtime.bundle.precision_record import Quantised
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import atomic
from vzip.runtime.files.plain import NotPlainError, read_plain
from vzip.runtime.guard import door
from vzip.runtime.pictures.images import (
    MAX_ENCODED_BYTES,
    Channels,
    ImageSource,
    load_image,
)
from vzip.runtime.tokens.file import ImageTokens, Origin, TokenFile, to_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.tokens.positions import EncodedImage

    Array = NDArray[Any]

DEFAULT_LIMIT: Final = 2**30
"""Bytes that a cache's entries take at most: 1 GiB, a thousand images of 64 tokens and L = 4096."""

_ENTRY = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})\.safetensors")
_ABANDONED = 3600.0  # seconds after which a temporary file's writer is taken for dead
_ELSEWHERE: Final = "choose another folder for the cache"


class TokenCache:
    """Tokens by image and bundle; the least recently used go first.

    Attributes:
        folder: Where the entries lie.
        limit: Bytes that they take at most; None for no limit.
    """

    @door(
        InvalidInputError,
        "'{folder}' can't be a token cache",
        cure=_ELSEWHERE,
    )
    def __init__(
        self, folder: str | os.PathLike[str], *, limit: int | None = DEFAULT_LIMIT
    ) -> None:
        """Open a cache, and make its folder if it isn't there; the folder's parent must be.

        Raises:
            InvalidInputError: The limit is negative, or the folder can't be made.
        """
        if limit is not None and limit < 0:
            raise InvalidInputError(
                f"got a limit of {limit} bytes for a token cache",
                expected="≥ 0",
            )
        self.folder, self.limit = Path(folder).absolute(), limit
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                f"{self.folder}: no token cache can be made there ({error.strerror})",
                expected="a folder that may be written to",
                cure="choose another",
            ) from error

    @door(
        InvalidInputError,
        "the token cache '{self.folder}' can't be read",
        cure=_ELSEWHERE,
    )
    def get(self, image_sha256: str, bundle_fingerprint: str) -> ImageTokens | None:
        """Return the tokens of an image, or None if they aren't there.

        A damaged entry is removed and counts as absent.

        Args:
            image_sha256: What the image goes by; see `image_digest`.
            bundle_fingerprint: `vzip.runtime.bundle.fingerprint.fingerprint` of the bundle.

        Raises:
            InvalidInputError: They are no digests; the folder can't be read, or what is damaged
                there can't be removed.
        """
        path = self.path(image_sha256, bundle_fingerprint)
        if not path.is_file():
            return None
        image = _entry(path, image_sha256, bundle_fingerprint)
        if image is None:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # evicted by another process, or a read-only folder
            os.utime(path)  # used just now
        return image

    @door(
        InvalidInputError,
        "the token cache '{self.folder}' can't be written",
        cure=_ELSEWHERE,
    )
    def put(self, origin: Origin, image: ImageTokens) -> None:
        """Store the tokens of an image, and make room for them.

        An image whose entry alone is beyond the limit is not stored.

        Args:
            origin: The bundle they come from; see `origin_of`.
            image: The tokens; its `name` is not stored.

        Raises:
            InvalidInputError: The entry can't be written.
        """
        path = self.path(image.sha256, origin.fingerprint)
        entry = dataclasses.replace(image, name=image.sha256)
        data = to_bytes(origin, [entry])
        if self.limit is not None and len(data) > self.limit:
            return
        try:
            if self.limit is not None:
                self._make_room(self.limit - len(data), path)
            atomic.replace_file(path, data)
        except OSError as error:
            raise InvalidInputError(
                f"{self.folder}: the token cache can't be written ({error.strerror})",
                cure="free some space, or choose a folder that you may write to",
            ) from error

    @door(
        InvalidInputError,
        "the token cache '{self.folder}' can't be written",
        cure=_ELSEWHERE,
    )
    def remove(self, image_sha256: str, bundle_fingerprint: str) -> None:
        """Forget an image; what isn't there needs no forgetting.

        Raises:
            InvalidInputError: The folder can't be written.
        """
        self.path(image_sha256, bundle_fingerprint).unlink(missing_ok=True)

    @door(
        InvalidInputError,
        "the token cache '{self.folder}' can't be read",
        cure=_ELSEWHERE,
    )
    def fingerprints(self) -> set[str]:
        """Return the fingerprints of all bundles that have an entry.

        Raises:
            InvalidInputError: The folder can't be read.
        """
        matches = (_ENTRY.fullmatch(path.name) for path in self.folder.iterdir())
        return {match[2] for match in matches if match}

    def path(self, image_sha256: str, bundle_fingerprint: str) -> Path:
        """Return where an entry lies, or would.

        Raises:
            InvalidInputError: They are no digests.
        """
        name = f"{image_sha256}.{bundle_fingerprint}.safetensors"
        if not _ENTRY.fullmatch(name):
            raise InvalidInputError(
                f"got {image_sha256!r} and {bundle_fingerprint!r}",
                expected="the SHA-256 of an image and the fingerprint of a bundle",
                cure="make them with image_digest and fingerprint",
            )
        return self.folder / name

    def _make_room(self, room: int, coming: Path) -> None:
        """Remove the entries used longest ago until the others take at most `room` bytes.

        Two processes that make room at once may together remove too much, or leave one entry too
        many until the next `put`; neither harms.
        """
        entries = []
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # evicted by another process
                continue
            if atomic.is_temporary(path):
                if time.time() - status.st_mtime > _ABANDONED:  # its writer was killed
                    path.unlink(missing_ok=True)
            elif _ENTRY.fullmatch(entry.name) and path != coming:
                entries.append((status.st_mtime_ns, entry.name, status.st_size))
        total = sum(size for _, _, size in entries)
        for _, name, size in sorted(entries):
            if total <= room:
                break
            (self.folder / name).unlink(missing_ok=True)
            total -= size


def _entry(path: Path, image_sha256: str, bundle_fingerprint: str) -> ImageTokens | None:
    """Return what an entry holds; None if it is damaged, or another's under this name."""
    try:
        with TokenFile.open(path) as file:
            image = file.read(image_sha256)
            mine = file.origin.fingerprint == bundle_fingerprint and image.sha256 == image_sha256
    except InvalidInputError:
        return None
    return image if mine else None


def origin_of(
    manifest: Manifest,
    quantised: Quantised | None = None,
    *,
    cpu_engine: bool = False,
    several: bool = False,
) -> Origin:
    """Return what tokens of a bundle have in common; the rest as `fingerprint` takes it."""
    return Origin(
        fingerprint=fingerprint(manifest, quantised, cpu_engine=cpu_engine, several=several),
        model=manifest.model.id,
        token_order=manifest.token_order,
        hidden_size=manifest.llm.hidden_size,
        image_token_id=manifest.llm.image_token_id,
    )


def encoder_origin(encoder: VisionEncoder, *, several: bool = False) -> Origin:
    """Return what the tokens of an open encoder have in common."""
    bundle, cpu_engine = encoder.bundle, encoder.cpu_engine
    return origin_of(bundle.manifest, bundle.quantised, cpu_engine=cpu_engine, several=several)


@door(InvalidInputError, "the image can't be hashed")
def image_digest(image: ImageSource, *, channels: Channels = "rgb") -> str:
    """Return the SHA-256 that an image goes by.

    Of bytes, that of the bytes. Of a PIL image or array, that of its pixels, upright and in RGB,
    and of its size; the same picture in a file has another.

    Args:
        image: Encoded bytes, a PIL image or an array; read a file first, so that what is hashed is
            what is encoded.
        channels: As for `load_image`.

    Raises:
        InvalidInputError: The image can't be used.
    """
    if isinstance(image, bytes) and channels == "rgb":
        return hashlib.sha256(image).hexdigest()
    loaded = load_image(image, channels=channels)
    digest = hashlib.sha256(f"RGB {loaded.width} {loaded.height}\n".encode())
    digest.update(loaded.tobytes())
    return digest.hexdigest()


@door(InvalidInputError, "the image '{path}' can't be read", cure="check the path")
def read_image(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file, undecoded.

    Raises:
        InvalidInputError: It is no plain file, can't be read, or is too large to be an image.
    """
    path = Path(path)
    try:
        return read_plain(path, MAX_ENCODED_BYTES)
    except (NotPlainError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno == errno.EFBIG:
            load_image(path)
        raise InvalidInputError(
            f"the image '{path}' can't be read: {error.strerror}",
            expected="a readable image file",
            cure="check its permissions",
        ) from error
    load_image(path)  # says what is wrong
    raise InvalidInputError(
        f"the image '{path}' changed while it was read",
        cure="try again",
    )


@door(InvalidInputError, "the image '{image}' can't be encoded")
def cached_image_embeds(
    encoder: VisionEncoder,
    image: ImageSource,
    cache: TokenCache,
    *,
    channels: Channels = "rgb",
    several: bool = False,
) -> Array:
    """Return the embeddings of `cached_image_tokens` alone, float32 or float16 [n, L].

    Raises:
        VzipError: As for `cached_image_tokens`.
    """
    encoded = cached_image_tokens(encoder, image, cache, channels=channels, several=several)
    return encoded.embeds


@door(InvalidInputError, "the image '{image}' can't be encoded")
def cached_image_tokens(
    encoder: VisionEncoder,
    image: ImageSource,
    cache: TokenCache,
    *,
    channels: Channels = "rgb",
    several: bool = False,
) -> EncodedImage:
    """Return `encoder.image_tokens(image)`, from the cache if it has been computed before.

    Args:
        encoder: The encoder; its bundle's fingerprint is part of the key, its backend isn't.
        image: As for `VisionEncoder.encode`. A path is read once: what is hashed is encoded.
        cache: Where to look, and where to put what isn't there.
        channels: As for `VisionEncoder.encode`.
        several: As for `VisionEncoder.image_tokens`.

    Returns:
        As `VisionEncoder.image_tokens` gives it.

    Raises:
        VzipError: As for `VisionEncoder.image_tokens`, or the cache can't be written.
    """
    if channels != "rgb":
        image = load_image(image, channels=channels)
    elif isinstance(image, (str, Path)):
        # A text may be a URL or empty, which load_image explains.
        image = read_image(image) if Path(image).is_file() else load_image(image)
    origin = encoder_origin(encoder, several=several)
    digest = image_digest(image)
    found = cache.get(digest, origin.fingerprint)
    if found is not None:
        return found.encoded
    encoded = encoder.image_tokens(image, several=several)
    cache.put(origin, ImageTokens.of(digest, encoded))
    return encoded
