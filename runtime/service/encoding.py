"""The core: one bundle, open for all; pictures in, tokens out, batched and bounded."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from vzip.runtime.backends import open_backend
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.encoder import CompressedTokens, VisionEncoder
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.machine import process
from vzip.runtime.pictures.frames import DEFAULT_FRAMES
from vzip.runtime.pictures.headers import check_blocks
from vzip.runtime.pictures.images import format_of
from vzip.runtime.pictures.video import sample_frames
from vzip.runtime.service.admission import Admission, Ticket
from vzip.runtime.service.batcher import SHARED_SCALES, Batcher
from vzip.runtime.service.figures import Figures
from vzip.runtime.service.remembered import Remembered
from vzip.runtime.service.settings import ServiceSettings
from vzip.runtime.tokens.cache import TokenCache, encoder_origin
from vzip.runtime.tokens.positions import EncodedImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.tokens.file import Origin

T = TypeVar("T")

_LARGE = 2**22  # pixels of a picture of which only few are decoded at once
_MOST_WORKERS = 64


class SeenPicture(NamedTuple):
    """A picture's tokens, and what they cost.

    Attributes:
        digest: SHA-256 of the picture's file.
        encoded: Its tokens.
        seconds: From the file to the tokens.
        remembered: Whether they were known already.
    """

    digest: str
    encoded: EncodedImage
    seconds: float
    remembered: bool


class SeenClip(NamedTuple):
    """A clip's tokens, and what they cost.

    Attributes:
        digest: SHA-256 of the clip's file.
        encoded: As `VisionEncoder.video_tokens` gives them.
        frames: How many frames they are of.
        seconds: From the file to the tokens.
    """

    digest: str
    encoded: EncodedImage
    frames: int
    seconds: float


class EncodingService:
    """A bundle that is served; a context manager.

    Methods return at once, with a future; `admission` says who may call them.

    Args:
        bundle: The bundle or its folder.
        settings: How it is served.
        figures: Where it counts; None for nowhere.

    Attributes:
        bundle: The bundle.
        manifest: Its manifest.
        settings: As given.
        admission: The door.
        figures: As given.
        most: Most pictures of a call of the graph.

    Raises:
        VzipError: As for `VisionEncoder.open`; the batch is larger than the graph's, or another
            where it is static; there can be no token cache.
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str],
        settings: ServiceSettings | None = None,
        figures: Figures | None = None,
    ) -> None:
        self.settings = settings = settings or ServiceSettings()
        self.figures = figures or Figures()
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(bundle, verify=False)  # backends verify what they run
        self.bundle = bundle.to_run(settings.precision)
        self.manifest: Manifest = self.bundle.manifest
        batch = self.manifest.batch
        self.most = _most(settings.batch, batch.max, dynamic=batch.dynamic)
        self.admission = Admission(
            requests=settings.queue,
            per_client=settings.per_client,
            memory=settings.memory,
            seconds=settings.seconds,
        )
        folder = None if settings.cache is None else TokenCache(settings.cache)
        self.remembered = Remembered(settings.cache_bytes, folder)
        name, opened = open_backend(
            settings.backend, self.bundle, engine=settings.engine, threads=settings.threads
        )
        # It runs nothing itself, and knows what does.
        self._plain = VisionEncoder(self.bundle, name, opened)
        self._batcher = Batcher(
            opened,
            most=self.most,
            fixed=None if batch.dynamic else batch.max,
            delay=settings.delay,
            alone=self._plain.describe()["form"] in SHARED_SCALES,
            figures=self.figures,
        )
        open_ended = dataclasses.replace(
            self.bundle, manifest=_open_ended(self.manifest, self.most)
        )
        self._encoder = VisionEncoder(open_ended, name, self._batcher)
        workers = settings.workers or min(_MOST_WORKERS, max(4, 2 * self.most))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vzip-picture")
        self._large = threading.BoundedSemaphore(max(2, process.cores()))
        self._origins = {each: encoder_origin(self._plain, several=each) for each in (False, True)}

    def describe(self) -> dict[str, str | None]:
        """Say what runs; see `VisionEncoder.describe`."""
        return self._plain.describe()

    def origin(self, *, several: bool = False) -> Origin:
        """Return what the tokens have in common; `several` as for `VisionEncoder.image_tokens`."""
        return self._origins[several]

    def warm_up(self) -> None:
        """Run the graph once, so that what it lacks is known before anybody asks.

        Raises:
            BackendError: It fails.
        """
        spec = self.manifest.input
        self._encoder.run(np.zeros((1, *map(int, spec.shape[1:])), spec.dtype))

    def picture(self, ticket: Ticket, data: bytes, *, several: bool = False) -> Future[SeenPicture]:
        """Encode a picture.

        Args:
            ticket: The request.
            data: The picture's file.
            several: As for `VisionEncoder.image_tokens`.

        Returns:
            Its tokens; or of the errors of `VisionEncoder.image_tokens` one, or RefusedError.
        """
        return self._later(ticket, lambda: self._picture(data, several))

    def clip(self, ticket: Ticket, data: bytes, frames: int | None = None) -> Future[SeenClip]:
        """Encode a clip.

        Args:
            ticket: The request.
            data: The clip's file.
            frames: Most frames of it; None for `DEFAULT_FRAMES`.
        """
        return self._later(ticket, lambda: self._clip(data, frames or DEFAULT_FRAMES))

    def array(self, ticket: Ticket, array: NDArray[Any]) -> Future[CompressedTokens]:
        """Encode what the graph takes, of 1 to `most` pictures; see `VisionEncoder.run`."""
        return self._later(ticket, lambda: self._encoder.run(array))

    def later(self, ticket: Ticket, work: Callable[[], T]) -> Future[T]:
        """Do other work of a request beside the pictures', such as reading a large body."""
        return self._pool.submit(_checked, ticket, work)

    def close(self) -> None:
        """Close the bundle; whoever still waits gets an error."""
        self.admission.refuse_all()
        self._batcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> EncodingService:  # noqa: PYI034 - typing.Self is newer than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _later(self, ticket: Ticket, work: Callable[[], T]) -> Future[T]:
        def run() -> T:
            ticket.check()
            with ticket.current():
                self._batcher.coming(1)
                try:
                    return work()
                finally:
                    self._batcher.coming(-1)

        return self._pool.submit(run)

    def _picture(self, data: bytes, several: bool) -> SeenPicture:
        begun = time.monotonic()
        digest = hashlib.sha256(data).hexdigest()
        origin = self._origins[several]
        found = self.remembered.get(digest, origin.fingerprint)
        self.figures.recalled(found is not None)
        if found is not None:
            return SeenPicture(digest, found, time.monotonic() - begun, True)
        with self._decoding(data):
            encoded = self._encoder.image_tokens(data, several=several)
        self.remembered.put(digest, origin, encoded)
        seconds = time.monotonic() - begun
        self.figures.prepared(seconds)
        return SeenPicture(digest, encoded, seconds, False)

    @contextmanager
    def _decoding(self, data: bytes) -> Iterator[None]:
        """Hold a picture's place: of large ones only few are in memory at once."""
        pixels = _pixels(data)
        if pixels > self.settings.pixels:
            raise InvalidInputError(
                f"got a picture of {pixels} pixels",
                expected=f"at most {self.settings.pixels}",
                cure="shrink it first",
            )
        if pixels <= _LARGE:
            yield
            return
        with self._large:
            yield

    def _clip(self, data: bytes, frames: int) -> SeenClip:
        begun = time.monotonic()
        digest = hashlib.sha256(data).hexdigest()
        with self._large, tempfile.TemporaryDirectory(prefix="vzip-") as folder:
            path = Path(folder) / "clip"
            path.write_bytes(data)
            try:
                shown = sample_frames(path, frames)
            except InvalidInputError as error:
                raise _without(str(path), error) from error
            encoded = self._encoder.video_tokens(shown)
        return SeenClip(digest, encoded, len(shown), time.monotonic() - begun)


def _checked(ticket: Ticket, work: Callable[[], T]) -> T:
    ticket.check()
    return work()


def _most(asked: int | None, most: int, *, dynamic: bool) -> int:
    """Return how many pictures a call may have."""
    if asked is None:
        return most
    if asked > most or (not dynamic and asked != most):
        raise InvalidInputError(
            f"got a batch of {asked}",
            expected=f"at most {most}"
            if dynamic
            else f"{most}, which the graph takes and no other",
            cure="export another bundle with 'vzip export --max-batch'",
        )
    return asked


def _open_ended(manifest: Manifest, most: int) -> Manifest:
    """Return a manifest of the same graph behind a `Batcher`, which fills static batches."""

    def opened(tensor: Any) -> Any:
        return dataclasses.replace(tensor, shape=("batch", *tensor.shape[1:]))

    return dataclasses.replace(
        manifest,
        batch=dataclasses.replace(manifest.batch, max=most, dynamic=True),
        inputs=tuple(map(opened, manifest.inputs)),
        outputs=tuple(map(opened, manifest.outputs)),
    )


def _pixels(data: bytes) -> int:
    """Return how many pixels a picture says that it has; 0 where `load_image` is to say why not."""
    from PIL import Image

    kind = format_of(data)
    if kind is None:
        return 0
    try:
        size = check_blocks(kind, data, "the picture").size
        if size is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                size = Image.open(io.BytesIO(data), formats=[kind]).size  # its header alone
    except InvalidInputError:
        raise
    except Exception:  # noqa: BLE001 - on hostile bytes it may raise anything
        return 0
    return size[0] * size[1]


def _without(path: str, error: InvalidInputError) -> InvalidInputError:
    """Return an error about a clip that doesn't speak of the server's files."""
    fields = (getattr(error, name) for name in ("got", "expected", "cause", "cure"))
    got, expected, cause, cure = (
        each.replace(f"'{path}'", "").replace(path, "clip") for each in fields
    )
    return InvalidInputError(got, expected=expected, cause=cause, cure=cure)
