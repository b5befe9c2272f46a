"""Images whose tokens are wanted: those that a cache has are not encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.video import CONTAINERS
from vzip.runtime.tokens.cache import (
    TokenCache,
    encoder_origin,
    image_digest,
    origin_of,
    read_image,
)
from vzip.runtime.tokens.file import ImageTokens
from vzip.runtime.tokens.ranks import check_tokens

if TYPE_CHECKING:
    from PIL import Image

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.encoder import VisionEncoder
    from vzip.runtime.tokens.positions import EncodedImage


class CachedImages:
    """Images to be encoded, and what a cache holds of them already.

    Attributes:
        missing: SHA-256 → image, of those that must be encoded.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        bundle: Bundle,
        folder: Path | None,
        *,
        tokens: int | None = None,
    ) -> None:
        """Look the images up, and decode those that are in no cache.

        Args:
            paths: The image files of a prompt; each is read once, so that the bytes that are
                hashed are those that are encoded.
            bundle: The bundle whose tokens are wanted.
            folder: That of the cache; None for none. It holds the bundle's whole budget.
            tokens: As for `VisionEncoder.encode`.

        Raises:
            BudgetError: The bundle has no such budget.
            InvalidInputError: An image can't be read, or no cache can be made in the folder.
        """
        check_tokens(bundle.manifest, tokens)
        self._wanted = tokens
        files = [(path, read_image(path)) for path in paths]
        self.missing: dict[str, Image.Image] = {}
        # Tokens of the graph and of a CPU engine are told apart. Where either may run, either will
        # do, and those of the graph come first.
        engines = {"may": (False, True), "must": (True,), "never": (False,)}[bundle.cpu_engine]
        self._several = len(paths) > 1
        origins = [
            origin_of(bundle.manifest, bundle.quantised, cpu_engine=each, several=self._several)
            for each in engines
        ]
        self._cache = None if folder is None else TokenCache(folder)
        self._digests = [image_digest(data) for _, data in files]
        self._tokens: dict[str, EncodedImage] = {}
        for digest, (path, data) in zip(self._digests, files, strict=True):
            found = None
            if self._cache is not None:
                kept = (self._cache.get(digest, each.fingerprint) for each in origins)
                found = next((each for each in kept if each is not None), None)
            if found is not None:
                self._tokens[digest] = found.encoded
            elif digest not in self.missing:
                self.missing[digest] = _decoded(path, data)

    def encoded(self, encoder: VisionEncoder | None) -> list[EncodedImage]:
        """Return the tokens of all images in order, and put those that were missing into the cache.

        Args:
            encoder: Of the bundle; None will do if none is missing.

        Returns:
            Of each image, as `VisionEncoder.image_tokens` gives it.
        """
        for digest, image in self.missing.items():
            assert encoder is not None
            encoded = encoder.image_tokens(image, several=self._several)
            self._tokens[digest] = encoded
            if self._cache is not None:
                origin = encoder_origin(encoder, several=self._several)
                self._cache.put(origin, ImageTokens.of(digest, encoded))
        whole = [self._tokens[digest] for digest in self._digests]
        if self._wanted is None:
            return whole
        return [each.first(self._wanted) if each.ranks else each for each in whole]


def _decoded(path: Path, data: bytes) -> Image.Image:
    """Return the image of a file's bytes; where a video would have done as well, say so."""
    try:
        try:
            return load_image(data)
        except InvalidInputError:
            load_image(path)  # says what is wrong, and of which file
            raise
    except InvalidInputError as error:
        if "is not in a format read here" not in str(error):
            raise
        raise InvalidInputError(
            f"{error}, or, for a video, one of {', '.join(CONTAINERS)}"
        ) from error
