"""Tokens of pictures that were seen before: in memory, and in a folder that outlives it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.tokens.cache import TokenCache
from vzip.runtime.tokens.file import ImageTokens
from vzip.runtime.tokens.positions import EncodedImage

if TYPE_CHECKING:
    from vzip.runtime.tokens.file import Origin

_log = logging.getLogger(__name__)


class Remembered:
    """The token cache in front of the encoder; the least recently used go first.

    Args:
        limit: Bytes of tokens that are held in memory.
        folder: A cache on disk behind it; None for none.
    """

    def __init__(self, limit: int, folder: TokenCache | None) -> None:
        self._limit, self._folder = limit, folder
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str], EncodedImage] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes of tokens in memory."""
        return self._bytes

    def get(self, digest: str, fingerprint: str) -> EncodedImage | None:
        """Return a picture's tokens; None where they aren't known."""
        key = (digest, fingerprint)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        found = None
        if self._folder is not None:
            try:
                found = self._folder.get(digest, fingerprint)
            except InvalidInputError as error:
                self._leave(error)
        if found is None:
            return None
        self._hold(key, found.encoded)
        return found.encoded

    def put(self, digest: str, origin: Origin, encoded: EncodedImage) -> None:
        """Remember a picture's tokens."""
        self._hold((digest, origin.fingerprint), encoded)
        if self._folder is not None:
            try:
                self._folder.put(origin, ImageTokens.of(digest, encoded))
            except InvalidInputError as error:
                self._leave(error)

    def _leave(self, error: InvalidInputError) -> None:
        """Go on without the folder: whoever asks has no part in what is wrong with it."""
        self._folder = None
        _log.warning("the token cache's folder is not used any more: %s", error)

    def _hold(self, key: tuple[str, str], encoded: EncodedImage) -> None:
        size = _size(encoded)
        if size > self._limit:
            return
        with self._lock:
            if key in self._held:
                self._bytes -= _size(self._held.pop(key))
            self._held[key] = encoded
            self._bytes += size
            while self._bytes > self._limit:
                _, oldest = self._held.popitem(last=False)
                self._bytes -= _size(oldest)


def _size(encoded: EncodedImage) -> int:
    indices = (encoded.kept, encoded.positions, encoded.where.places)
    return int(encoded.embeds.nbytes + sum(each.nbytes for each in indices if each is not None))
