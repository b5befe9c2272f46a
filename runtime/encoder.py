"""From images to compressed tokens: everything around a backend, and every check.

Backends take what they are given. What goes in and what comes out is checked here, once, against
the bundle's manifest, whichever backend runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vzip.runtime.backends import AUTO, open_backend
from vzip.runtime.backends.protocol import Backend, DeviceBackend
from vzip.runtime.bundle.fingerprint import cuts_only_alone
from vzip.runtime.bundle.manifest import (
    EMBEDS,
    KEPT,
    POSITIONS,
    RANK,
    TOKEN_WEIGHTS,
    Manifest,
    Media,
    Tensor,
)
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.guard import door
from vzip.runtime.machine import process
from vzip.runtime.pictures.ahead import ahead
from vzip.runtime.pictures.images import (
    Channels,
    ImageSource,
    check_channels,
    check_draft,
    check_source,
    load_image,
)
from vzip.runtime.pictures.preprocess import pixel_values, tower_image
from vzip.runtime.pictures.tiles import arrange, arrange_rows, cut, newline_row
from vzip.runtime.tokens.positions import (
    EncodedImage,
    Places,
    clip_places,
    flat_ranks,
    image_places,
    several_places,
    tile_places,
    tile_ranks,
)
from vzip.runtime.tokens.ranks import check_tokens, check_within, unranked
from vzip.runtime.wording import are, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.backends.tensorrt.device_array import DeviceArray

    Array = NDArray[Any]


_log = logging.getLogger(__name__)


class CompressedTokens:
    """The tokens that the language model gets for B images.

    Attributes:
        embeds: float32 or float16 [B, K, L], in the manifest's token order: `dominant` kept tokens
            by ascending index (CLS first, where it is kept), then `contextual` merged ones.
        kept: int64 [B, dominant], ascending: which tower tokens were kept. With a CLS tower, 0 is
            CLS and patches are 1 … N; without one, patches are 0 … N − 1. Patches are in raster
            order.
        positions: int64 [B, K], the patch that each token stands for, 0 … N − 1 in raster order,
            without CLS: a kept token's own, a merged token's target, and 0 for CLS. None where the
            bundle was exported before graphs said so (schema 1).
        rank: int64 [B, K], at which step each token was chosen, 0 … K − 1: those below K′ are what
            a budget of K′ would have chosen. None where the bundle's selection isn't nested.
        on_device: `embeds` on the GPU that computed them, if that was asked for; torch.from_dlpack
            takes it without a copy. It stays as it is for as long as something refers to it.
    """

    def __init__(
        self,
        embeds: Array,
        kept: NDArray[np.int64],
        groups: Callable[[], NDArray[np.int64]],
        on_device: DeviceArray | None = None,
        *,
        positions: NDArray[np.int64] | None = None,
        rank: NDArray[np.int64] | None = None,
    ) -> None:
        self.embeds = embeds
        self.kept = kept
        self.positions = positions
        self.rank = rank
        self.on_device = on_device
        self._make_groups = groups
        self._groups: NDArray[np.int64] | None = None

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64 [B, S]: the contextual token (0 … contextual − 1) that a tower token went into.

        −1 for tokens that were kept, and for a CLS token that was dropped. Computed when first
        asked for, by a second run of the graph in a second session that the encoder keeps open;
        the encoder must still be open then.

        Raises:
            BackendError: The encoder is closed, or the graph can't tell.
        """
        if self._groups is None:
            self._groups = self._make_groups()
        return self._groups

    def first(self, tokens: int) -> CompressedTokens:
        """Return what a smaller budget would have given: the `tokens` that were chosen first.

        Args:
            tokens: Of each image, 1 … K.

        Returns:
            Tokens in the order in which they stand here, on the host.

        Raises:
            BudgetError: There are fewer, or the bundle's selection isn't nested.
        """
        if self.rank is None:
            raise unranked()
        count, most = self.rank.shape
        check_within(tokens, most)
        chosen, make_groups = self.rank < tokens, self._make_groups

        def cut(array: Array) -> Array:
            return array[chosen].reshape(count, tokens, *array.shape[2:])

        positions = None if self.positions is None else cut(self.positions)
        return CompressedTokens(
            cut(self.embeds),
            cut(self.kept),
            make_groups,
            positions=positions,
            rank=cut(self.rank),
        )

    def __repr__(self) -> str:
        return f"CompressedTokens(embeds {self.embeds.dtype} {list(self.embeds.shape)})"


class VisionEncoder:
    """A bundle, opened and ready to encode; made by `VisionEncoder.open`, a context manager.

    One encoder serves any number of threads. It doesn't survive a fork: open another in the child.

    Attributes:
        bundle: The bundle.
        manifest: The bundle's manifest.
        backend: Name of the backend that runs it.
        engine: Name of the engine that runs; None where it is the bundle's graph.
        precision: Precision of the graph that runs, or that the engine was made from.
        threads: How many threads of the CPU ONNX Runtime runs an operator with; None where it
            doesn't run.
    """

    def __init__(self, bundle: Bundle, backend: str, opened: Backend) -> None:
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.backend = backend
        self.engine = opened.engine
        record = None if self.engine is None else self.manifest.engines[self.engine]
        self.precision: str = bundle.precision if record is None else record.precision
        self._cpu = None if record is None else record.cpu
        self._device = opened.device
        self.threads: int | None = getattr(opened, "threads", None)
        self._asked: dict[str, int] = {}  # for a second session
        self._opened: Backend | None = opened
        self._for_groups: Backend | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    @classmethod
    @door(BackendError, "the bundle '{bundle}' can't be opened")
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        backend: str = AUTO,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
    ) -> VisionEncoder:
        """Check a bundle against its digests and open it.

        Args:
            bundle: The bundle or its folder.
            backend: A name in `vzip.runtime.backends.BACKENDS`, or ``auto``: the first of them
                that can be used here, which `backend` then names. ``tensorrt`` is the first, and
                can be used where the bundle has an engine that fits this machine.
            engine: Name of the engine to run, TensorRT's or a CPU's; None for the only one that
                fits.
            precision: ``int8`` or ``fp8`` for the graph that `vzip calibrate` put into the bundle,
                and engines built from it; the bundle's own (``fp32`` or ``fp16``) for its graph
                itself, without a CPU engine; ``fastest`` for a CPU engine and nothing else. None
                for the bundle's own graph, or a CPU engine in its place where ``onnxruntime`` runs
                and one fits that passed its proof (`docs/fastest.md`), which is said once on
                standard error. A `Bundle.at` some precision stays there.
            threads: How many threads run the graph on a CPU; None for as many as this process may
                use cores, of which the quota of a container's control groups counts as well. With
                ``pytorch`` the number is the whole process's.

        Raises:
            BundleError: The bundle is damaged, or is none.
            InvalidInputError: There is no backend, engine or precision of that name; the engine is
                of another precision; the number of threads is no integer from 1 to 4096.
            MissingDependencyError: A package that the backend asked for needs is not installed.
            BackendError: The backend can't be used here or can't take the graph; the engine
                doesn't fit this machine, or several do.
        """
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(bundle, verify=False)  # backends verify what they run
        if precision is not None:
            bundle = bundle.to_run(precision)
        name, opened = open_backend(backend, bundle, engine=engine, threads=threads)
        encoder = cls(bundle, name, opened)
        if threads is not None:
            encoder._asked = {"threads": threads}
        return encoder

    @property
    def cpu_engine(self) -> bool:
        """Whether a CPU engine runs, whose tokens have a fingerprint of their own."""
        return self._cpu is not None

    def describe(self) -> dict[str, str | None]:
        """Say what runs.

        Returns:
            ``backend``; ``engine``, its name, or None where the bundle's graph runs; ``form``, that
            of a CPU engine (`docs/fastest.md`), else None; ``precision``, that of the graph, or of
            the one that the engine was made from; ``device``, the GPU or processor.
        """
        return {
            "backend": self.backend,
            "engine": self.engine,
            "form": None if self._cpu is None else self._cpu.form,
            "precision": self.precision,
            "device": self._device,
        }

    @door(InvalidInputError, "the images can't be encoded", reads=False)
    def encode(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        on_device: bool = False,
        channels: Channels = "rgb",
        draft: int | None = None,
        tokens: int | None = None,
    ) -> CompressedTokens:
        """Return the compressed tokens of one or more images.

        Where the bundle cuts images into tiles they are those of the base tile alone:
        `image_tokens` gives all.

        More images than the graph takes are run in several calls. A graph with a static batch of B
        always runs B images: if fewer are left, the last one stands in for the missing ones and
        its copies' results are dropped.

        Several images are decoded and resized in as many threads as cores, or as `open` was given
        as `threads`: those of the next two calls while one runs.

        Args:
            images: One image (path, encoded bytes, PIL image, uint8 array [H, W, 3]), or a list or
                tuple of them.
            on_device: Whether to leave the tokens on the GPU as well, as
                `CompressedTokens.on_device`; no more images than one call takes.
            channels: The order of an array's last axis: ``rgb``, or ``bgr`` for what OpenCV reads.
                Images that are no arrays are refused with ``bgr``: they say it themselves.
            draft: As for `load_image`: large JPEGs decoded to fewer pixels, which is faster and
                gives nearly the same tokens (docs/runtime.md, "Large pictures"). None for all.
            tokens: A budget below the bundle's, where its selection is nested (docs/selections.md);
                None for the bundle's.

        Returns:
            The tokens, B = the number of images, in their order.

        Raises:
            InvalidInputError: An image can't be used, there is none, or there are too many to be
                left on the device. What is damaged inside is found when it is decoded: the graph
                may have run with the images before it.
            BudgetError: `tokens` is beyond the bundle's, or its selection isn't nested.
            BackendError: The encoder is closed or was opened before a fork; the graph failed, or
                gave what the manifest doesn't promise; the backend leaves nothing on a device. The
                next call is not affected, unless the device itself is lost, which each then says.
        """
        self._usable()  # before any image is decoded
        check_channels(channels)
        check_draft(draft)
        self._check_tokens(tokens, on_device=on_device)
        sources: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
        if not sources:
            raise InvalidInputError(
                "got an empty list of images",
                expected="at least one image",
            )
        for each in sources if len(sources) > 1 else ():
            check_source(each, channels=channels)  # before the first call, and before any waits
        preprocessing, most = self.manifest.preprocessing, self.manifest.batch.max

        def prepared(source: Any) -> NDArray[np.uint8]:
            return tower_image(load_image(source, draft=draft, channels=channels), preprocessing)

        pictures = ahead(prepared, sources, threads=self.decoders, most=2 * most)
        with contextlib.closing(pictures):
            batches = iter(lambda: list(islice(pictures, most)), [])
            whole = self._encode_batches(map(np.stack, batches), len(sources), on_device)
        return whole if tokens is None or whole.rank is None else whole.first(tokens)

    def image_embeds(
        self,
        image: ImageSource,
        *,
        channels: Channels = "rgb",
        several: bool = False,
        tokens: int | None = None,
    ) -> Array:
        """Return the embeddings of `image_tokens` alone, float32 or float16 [n, L]."""
        encoded = self.image_tokens(image, channels=channels, several=several, tokens=tokens)
        return encoded.embeds

    @door(InvalidInputError, "the image '{image}' can't be encoded", reads=False)
    def image_tokens(
        self,
        image: ImageSource,
        *,
        channels: Channels = "rgb",
        several: bool = False,
        tokens: int | None = None,
    ) -> EncodedImage:
        """Return all that the language model gets for one image.

        Where the bundle cuts images into tiles (`Manifest.tiling`), all tiles go through the graph
        in as few calls as its batch allows. Their tokens are those of the base tile as they are,
        then those of the others in the order that the manifest names: see
        `vzip.runtime.pictures.tiles`. Where it cuts them only if they are alone
        (`Tiling.only_alone`, LLaVA-OneVision), an image of several is one tile, padded to a square
        instead of squeezed into it, and a newline embedding if the order has those.

        Args:
            image: As for `encode`.
            channels: As for `encode`.
            several: Whether the prompt holds other images too.
            tokens: As for `encode`; of each tile.

        Returns:
            Embeddings [n, L], n = K without tiles; the kept indices of each tile; and where the
            embeddings stand in the uncompressed sequence.

        Raises:
            InvalidInputError: The bundle takes no images, or the image can't be used.
            BundleError: The newline embedding that the order takes is damaged.
            BudgetError: As for `encode`.
            BackendError: As for `encode`.
        """
        self._usable()
        self._check_media("image")
        self._check_tokens(tokens)
        whole = self._image(image, channels, several=several)
        return whole if tokens is None or whole.ranks is None else whole.first(tokens)

    def _image(self, image: ImageSource, channels: Channels, *, several: bool) -> EncodedImage:
        """Return the tokens of `image_tokens`, all of them."""
        tiling, tower = self.manifest.tiling, self.manifest.tower
        if tiling is None:
            tokens = self.encode([image], channels=channels)
            embeds = tokens.embeds.reshape(tokens.embeds.shape[1:])  # [1, K, L] → [K, L]
            where = image_places(self.manifest, _first(tokens.positions))
            ranks = flat_ranks(tokens.rank, len(embeds))
            return EncodedImage(embeds, tokens.kept, tokens.positions, where, ranks)
        newline = self.bundle.newline() if tiling.order == "newline" else None
        if several and cuts_only_alone(self.manifest):
            padded = dataclasses.replace(self.manifest.preprocessing, mode="pad_square")
            pixels = tower_image(load_image(image, channels=channels), padded)
            tokens = self._encode_pixels(pixels[None], on_device=False)
            ends = [] if newline is None else [newline_row(newline, tokens.embeds)]
            where = several_places(self.manifest, _first(tokens.positions), newline=bool(ends))
            embeds = np.concatenate([tokens.embeds[0], *ends])
            ranks = flat_ranks(tokens.rank, len(embeds))
            return EncodedImage(embeds, tokens.kept, tokens.positions, where, ranks)
        tiles = cut(load_image(image, channels=channels), self.manifest.preprocessing, tiling)
        tokens = self._encode_pixels(tiles.images, on_device=False)
        grid, embeds, kept = tiles.grid, tokens.embeds[1:], tokens.kept[1:]
        cells, cls_token = tower.grid, tower.cls_token
        others = (
            arrange(embeds, kept, grid, patches=cells, cls_token=cls_token)
            if newline is None
            else arrange_rows(
                embeds,
                kept,
                grid,
                newline,
                tiles.size,
                patches=cells,
                cls_token=cls_token,
                max_tiles=tiling.max_tiles,
            )
        )
        where = tile_places(self.manifest, tokens.positions, tokens.kept, grid, tiles.size)
        ranks = tile_ranks(self.manifest, tokens.rank, tokens.kept, grid, tiles.size)
        embeds = np.concatenate([tokens.embeds[0], others])
        return EncodedImage(embeds, tokens.kept, tokens.positions, where, ranks)

    def video_embeds(
        self,
        frames: Sequence[ImageSource],
        *,
        channels: Channels = "rgb",
        tokens: int | None = None,
    ) -> Array:
        """Return the embeddings of `video_tokens` alone, float32 or float16 [n, L]."""
        return self.video_tokens(frames, channels=channels, tokens=tokens).embeds

    @door(InvalidInputError, "the video's frames can't be encoded", reads=False)
    def video_tokens(
        self,
        frames: Sequence[ImageSource],
        *,
        channels: Channels = "rgb",
        tokens: int | None = None,
    ) -> EncodedImage:
        """Return all that the language model gets for a clip.

        Args:
            frames: A list or tuple of frames in time order, each an image as `encode` takes it:
                what `vzip.runtime.pictures.video.sample_frames` returns.
            channels: As for `encode`: ``bgr`` for frames from OpenCV's VideoCapture.
            tokens: As for `encode`; of each frame.

        Returns:
            float32 or float16 [n, L]: the K tokens of frame 0, then those of frame 1, …; where the
            manifest's `tower.pool` is 2 (LLaVA-OneVision), the newline embedding ends the clip.

        Raises:
            InvalidInputError: The bundle takes no videos; not a list of frames, or an empty one; a
                frame can't be used.
            BundleError: The newline embedding is damaged.
            BudgetError: As for `encode`.
            BackendError: As for `encode`.
        """
        self._usable()
        self._check_media("video")
        self._check_tokens(tokens)
        if not isinstance(frames, (list, tuple)):
            raise InvalidInputError(
                f"got {type(frames).__name__}",
                expected="a list of frames in time order",
                cure="take them from a file with vzip.runtime.pictures.video's sample_frames",
            )
        if cuts_only_alone(self.manifest):
            _log.warning(
                "the model pools the frames of a video, and a bundle for images doesn't: its LLM "
                "gets tokens of another kind than in its training; export one with --media video"
            )
        newline = self.bundle.newline() if self.manifest.tower.pool == 2 else None
        each = self.encode(frames, channels=channels, tokens=tokens)
        embeds = each.embeds.reshape(-1, each.embeds.shape[-1])  # [frames·K, L]
        where = clip_places(self.manifest, each.positions, closing=newline is not None)
        if cuts_only_alone(self.manifest):
            where = Places(None, where.span)  # the uncompressed model's tokens are pooled patches
        if newline is not None:
            embeds = np.concatenate([embeds, newline_row(newline, embeds)])
        ranks = flat_ranks(each.rank, len(embeds))
        return EncodedImage(embeds, each.kept, each.positions, where, ranks)

    @door(InvalidInputError, "the array can't be encoded", reads=False)
    def run(self, array: Array, *, on_device: bool = False) -> CompressedTokens:
        """Return the compressed tokens of an array that is exactly what the graph takes.

        Args:
            array: dtype and shape of `manifest.input`: ``image`` uint8 [B, H, W, 3] RGB at tower
                resolution, or ``pixel_values`` float32 [B, 3, H, W] normalised. B is exactly the
                static batch, or 1 … `manifest.batch.max` where it is dynamic.
            on_device: As for `encode`.

        Returns:
            The tokens.

        Raises:
            InvalidInputError: Another dtype, shape, layout or batch, or a number that isn't finite.
            BackendError: As for `encode`.
        """
        return self._tokens([_checked_input(self.manifest, array)], array.shape[0], on_device)

    def close(self) -> None:
        """Free what the backend holds; calls of `encode` then fail. Closing twice does nothing."""
        if os.getpid() != self._process:  # sessions and lock are the parent's, see `_usable`
            self._opened = self._for_groups = None
            return
        with self._lock:
            opened, self._opened = self._opened, None
            for_groups, self._for_groups = self._for_groups, None
        for each in (opened, for_groups):
            if each is not None:
                each.close()

    def __enter__(self) -> VisionEncoder:  # noqa: PYI034 - typing.Self is newer than 3.10
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_media(self, media: Media) -> None:
        """Refuse what the bundle wasn't made for."""
        if media not in self.manifest.media:
            raise InvalidInputError(
                f"got {('an image' if media == 'image' else 'a video')}",
                expected=f"{' and '.join(self.manifest.media)}, which alone this bundle takes",
                cure=f"export another with --media {media}",
            )

    def _check_tokens(self, tokens: int | None, *, on_device: bool = False) -> None:
        """Refuse a budget that the bundle can't give, before anything is decoded."""
        check_tokens(self.manifest, tokens)
        if tokens not in (None, self.manifest.selection.tokens) and on_device:
            raise InvalidInputError(
                f"got tokens {tokens} and on_device",
                expected="either of them",
                cause="rows are taken out on the host",
                cure="take them out on the device, by `rank`",
            )

    @property
    def decoders(self) -> int:
        """How many threads decode several pictures: those asked for as `threads`, or the cores."""
        return self._asked.get("threads") or process.thread_limit() or process.cores()

    def _encode_pixels(self, pixels: NDArray[np.uint8], on_device: bool) -> CompressedTokens:
        """Run any number of images of the tower's resolution, uint8 [n, H, W, 3]."""
        most, count = self.manifest.batch.max, len(pixels)
        batches = (pixels[first : first + most] for first in range(0, count, most))
        return self._encode_batches(batches, count, on_device)

    def _encode_batches(
        self, batches: Iterable[NDArray[np.uint8]], count: int, on_device: bool
    ) -> CompressedTokens:
        """Run batches of images as the graph takes them, uint8 [B, H, W, 3], `count` images in all.

        Each but the last is full. One is asked for when the one before it has been run.
        """
        return self._tokens(map(self._chunk, batches), count, on_device)

    def _chunk(self, pixels: NDArray[np.uint8]) -> Array:
        """Return one batch of images as exactly what the graph takes."""
        batch, array = self.manifest.batch, cast("Array", pixels)
        if self.manifest.input.name != "image":
            array = pixel_values(pixels, self.manifest.preprocessing)
        if not batch.dynamic and (absent := batch.max - len(array)):
            array = np.concatenate([array, np.repeat(array[-1:], absent, axis=0)])
        return _checked_input(self.manifest, array)

    def _tokens(self, given: Iterable[Array], count: int, on_device: bool) -> CompressedTokens:
        """Run checked chunks; of all their rows, the first `count` are images."""
        opened, left = self._usable(), None
        chunks: list[Array] = []
        results: list[dict[str, Array]] = []
        if on_device:
            chunks += given
            result, left = self._run_on_device(opened, chunks)
            left.keep_rows(count)
            results.append(result)
        else:
            for chunk in given:
                results.append(self._run(opened, chunk))
                chunks.append(chunk)
        embeds = _joined([result[EMBEDS] for result in results])[:count]
        kept = _joined([result[KEPT] for result in results])[:count]
        positions = None
        if self.manifest.has_positions:
            positions = _joined([result[POSITIONS] for result in results])[:count]
        rank = None
        if self.manifest.has_rank:
            rank = _joined([result[RANK] for result in results])[:count]

        def groups() -> NDArray[np.int64]:
            return self._groups(chunks, kept)

        return CompressedTokens(embeds, kept, groups, left, positions=positions, rank=rank)

    def _run_on_device(
        self, opened: Backend, chunks: list[Array]
    ) -> tuple[dict[str, Array], DeviceArray]:
        """Run the only chunk, leave its embeddings on the device too, and check them."""
        if not isinstance(opened, DeviceBackend):
            raise BackendError(
                f"the backend '{self.backend}' leaves no tokens on a device",
                expected="'tensorrt'",
                cure="take them on the host, or build an engine with vzip build",
            )
        if len(chunks) != 1:
            raise InvalidInputError(
                f"got images for {len(chunks)} calls of the graph",
                expected=(
                    f"at most {counted(self.manifest.batch.max, 'image')}, of one call, to be left "
                    "on the device"
                ),
                cure="encode them in parts",
            )
        (chunk,) = chunks
        outputs, left = opened.run_on_device({self.manifest.input.name: chunk})
        check_outputs(self.manifest, self.backend, outputs, len(chunk))
        return outputs, left

    def _run(self, opened: Backend, array: Array) -> dict[str, Array]:
        """Run one chunk and check what comes out."""
        outputs = opened.run({self.manifest.input.name: array})
        check_outputs(self.manifest, self.backend, outputs, len(array))
        return outputs

    def _groups(self, chunks: list[Array], kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `CompressedTokens.groups` for chunks that were run before."""
        self._usable()
        with self._lock:
            # Closed meanwhile: don't open a session that nobody would close.
            if self._opened is not None and self._for_groups is None:
                # The engine that runs, or none: what fits may have changed meanwhile.
                bundle = self.bundle if self.engine else self.bundle.at(self.bundle.precision)
                _, self._for_groups = open_backend(
                    self.backend,
                    bundle,
                    extra_outputs=(TOKEN_WEIGHTS,),
                    engine=self.engine,
                    **self._asked,
                )
            opened = self._for_groups
        if opened is None:
            raise _closed()
        results = [self._run(opened, chunk) for chunk in chunks]
        again = np.concatenate([result[KEPT] for result in results])[: len(kept)]
        weights = np.concatenate([result[TOKEN_WEIGHTS] for result in results])[: len(kept)]
        if not np.array_equal(again, kept):
            raise BackendError(
                f"{self.backend} kept other tokens in a second run of the same images",
                expected="the same",
                cause="the device is not deterministic or the input array was changed meanwhile",
                cure="don't change it, and check the bundle with vzip check",
            )
        return _groups_of(weights, self.manifest, self.backend)

    def _usable(self) -> Backend:
        """Return the open backend, or say why there is none."""
        if os.getpid() != self._process:
            # Threads and device contexts stay behind in the parent; a call could wait forever.
            raise BackendError(
                f"the encoder was opened in process {self._process}, this is its fork "
                f"{os.getpid()}",
                cause="sessions don't survive a fork",
                cure="open the bundle in this process",
            )
        opened = self._opened
        if opened is None:
            raise _closed()
        return opened


def _first(positions: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """Return the positions of a batch's first image."""
    return None if positions is None else positions[0]


def _joined(parts: list[Array]) -> Array:
    """Return arrays one after the other; one alone as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _closed() -> BackendError:
    """Return the error for use after close."""
    return BackendError(
        "the encoder is closed",
        expected="an open one",
        cause="it was used after close() or after its 'with' block",
        cure="open the bundle again",
    )


def _checked_input(manifest: Manifest, array: object) -> Array:
    """Return an array that is exactly what the graph takes, contiguous."""
    expected = manifest.input
    if not isinstance(array, np.ndarray):
        raise InvalidInputError(
            f"got {type(array).__name__}",
            expected=f"a numpy array: {expected}",
        )
    if array.dtype != np.dtype(expected.dtype):
        raise InvalidInputError(
            f"got {array.dtype} {list(array.shape)}",
            expected=f"{expected}",
            cure=(
                "give the bundle's input as it is, unscaled"
                if expected.dtype == "uint8"
                else "normalise and convert it with vzip.runtime.pictures.preprocess.pixel_values"
            ),
        )
    if array.shape[1:] != expected.shape[1:]:
        layout = "[B, H, W, 3]" if expected.name == "image" else "[B, 3, H, W]"
        raise InvalidInputError(
            f"got {array.dtype} {list(array.shape)}",
            expected=f"{expected}",
            cause=f"the axes are {layout}, at the tower's resolution",
            cure="transpose or resize it, or use encode(), which does",
        )
    count, most = len(array), manifest.batch.max
    if count != most and not (manifest.batch.dynamic and 1 <= count <= most):
        wanted = f"1 to {most}" if manifest.batch.dynamic else f"exactly {most}"
        raise InvalidInputError(
            f"got a batch of {count}",
            expected=wanted,
            cure="split or fill the batch, or use encode(), which does",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = int((~np.isfinite(array)).sum())
        raise InvalidInputError(
            f"got {counted(wrong, 'number')} in {expected.name} that {are(wrong)} NaN or infinite",
            expected="finite ones",
            cause="preprocessing went wrong",
            cure="look at where they came from",
        )
    return np.ascontiguousarray(array)


def check_outputs(manifest: Manifest, backend: str, outputs: dict[str, Array], count: int) -> None:
    """Refuse outputs that the manifest doesn't promise."""
    for expected in manifest.outputs:
        _check_output(backend, outputs, expected, count)
    embeds, kept = outputs[EMBEDS], outputs[KEPT]
    if not _finite(embeds):
        cause, cure = (
            ("FP16 overflowed", "export with --dtype fp32")
            if manifest.precision == "fp16"
            else ("the weights or the device are damaged", "check the bundle with vzip check")
        )
        wrong = int((~np.isfinite(embeds)).sum())
        raise BackendError(
            f"{backend} gave {counted(wrong, 'number')} in {EMBEDS} that {are(wrong)} NaN or "
            "infinite",
            expected="finite ones",
            cause=cause,
            cure=cure,
        )
    first = int(manifest.tower.cls_token and not manifest.selection.cls_token)
    # Of ascending tokens the first and the last say how far they reach.
    ascending = bool((kept[:, 1:] > kept[:, :-1]).all())
    lowest, highest = kept[:, 0], kept[:, -1]
    in_range = ascending and bool((lowest >= first).all()) and highest.max() < manifest.tower.tokens
    if not in_range or (manifest.selection.cls_token and lowest.any()):
        raise BackendError(
            f"{backend} gave {KEPT} {kept[0].tolist()}",
            expected=(
                f"{manifest.selection.dominant} ascending tokens of {first} … "
                f"{manifest.tower.tokens - 1} without "
                f"duplicates{(', CLS (0) among them' if manifest.selection.cls_token else '')}"
            ),
            cause="the backend computes wrongly here",
            cure="check the bundle with vzip check, or take another backend",
        )
    if manifest.has_positions:
        _check_positions(manifest, backend, outputs[POSITIONS], kept)
    if manifest.has_rank:
        _check_rank(backend, outputs[RANK])


def _check_positions(manifest: Manifest, backend: str, positions: Array, kept: Array) -> None:
    """Refuse positions that no patch has, or that aren't those of the kept tokens."""
    has_cls, dominant = int(manifest.tower.cls_token), manifest.selection.dominant
    patches = manifest.tower.tokens - has_cls
    own = np.maximum(kept - has_cls, 0)
    # As unsigned numbers those below 0 are the largest.
    right = positions.view(np.uint64).max() < patches and (positions[:, :dominant] == own).all()
    if not right:
        raise BackendError(
            f"{backend} gave {POSITIONS} {positions[0].tolist()}",
            expected=f"patches 0 … {patches - 1}, of kept tokens their own: {own[0].tolist()} …",
            cause="the backend computes wrongly here",
            cure="check the bundle with vzip check, or take another backend",
        )


def _check_rank(backend: str, rank: Array) -> None:
    """Refuse ranks that aren't the steps of a selection, one each."""
    steps = np.arange(rank.shape[1])
    if (np.sort(rank, axis=1) != steps).any():
        wrong = rank[int((np.sort(rank, axis=1) != steps).any(axis=1).argmax())]
        raise BackendError(
            f"{backend} gave {RANK} {wrong.tolist()}",
            expected=f"each of 0 … {rank.shape[1] - 1} once",
            cause="the backend computes wrongly here",
            cure="check the bundle with vzip check, or take another backend",
        )


def _finite(array: Array) -> bool:
    """Return whether all numbers of an array [B, K, L] are finite."""
    if array.dtype == np.float16:  # isfinite converts halves one by one: 18 times slower
        # Infinity and NaN begin at 0x7C00 with a plus sign, at 0xFC00 with a minus.
        plus, both = array.view(np.int16), array.view(np.uint16)
        return all(
            bool(p.max() < 0x7C00 and b.max() < 0xFC00) for p, b in zip(plus, both, strict=True)
        )
    return all(bool(np.isfinite(row).all()) for row in array)  # row by row stays in the cache


def _check_output(backend: str, outputs: dict[str, Array], expected: Tensor, count: int) -> None:
    """Refuse an output of another dtype or shape."""
    got = outputs.get(expected.name)
    shape = (count, *expected.shape[1:])
    if got is None or got.dtype != np.dtype(expected.dtype) or got.shape != shape:
        found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
        raise BackendError(
            f"{backend} gave {found} for {expected.name}",
            expected=f"{expected.dtype} {list(shape)}",
            cause="graph and manifest disagree",
            cure="export the bundle again",
        )


def _groups_of(weights: Array, manifest: Manifest, backend: str) -> NDArray[np.int64]:
    """Return the groups int64 [B, S] that a plan's weights [B, K, S] describe."""
    members = weights[:, manifest.selection.dominant :] != 0  # [B, contextual, S]
    dropped = int(manifest.tower.cls_token and not manifest.selection.cls_token)
    merged = members.sum(axis=1)  # [B, S]
    rest = manifest.tower.tokens - manifest.selection.dominant - dropped
    if not manifest.selection.contextual:  # what isn't kept goes nowhere
        rest = 0
    if merged.max() > 1 or bool((merged.sum(axis=1) != rest).any()):
        raise BackendError(
            f"{backend} gave {TOKEN_WEIGHTS} in which {merged.sum(axis=1).tolist()} tokens are "
            "merged",
            expected=f"each of the {rest} that were not kept once",
            cause="the backend computes wrongly here",
            cure="check the bundle with vzip check",
        )
    if not rest:
        return np.full(merged.shape, -1, np.int64)
    return np.where(merged == 1, members.argmax(axis=1), -1).astype(np.int64)
