"""Representative images: a deterministic, hashed stream, from which nothing is lost in silence."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.calibration.demo.digits import lacking, require_digits
from vzip.export.pictures.glance import Glance
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.errors import InvalidInputError, printable
from vzip.runtime.files.plain import LONGEST_TEXT, NotPlainError, read_plain, read_text
from vzip.runtime.guard import door
from vzip.runtime.pictures.images import MAX_ENCODED_BYTES, ImageSource, load_image
from vzip.runtime.pictures.preprocess import Preprocessing, check_size, pixel_values, tower_image
from vzip.runtime.wording import are, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEMO: Final = "demo"
"""The source that stands for the demo's generator; a folder of that name is ``./demo``."""

DEMO_SIDE = 448
"""Side in pixels at which the demo's scenes are painted: preprocessing then has work to do."""

LEAST = 2
"""Images that samples have at the least: one to calibrate on and one to judge by."""

DEMO_IMAGES = 16
"""Scenes that the demo's generator is asked for where no number is given."""

_NAMED = 3  # images that a message names

_LONGEST_PATH = 4096  # characters of a line in a list of images


@dataclass(frozen=True)
class LeftOut:
    """An image that was found and is not used.

    Attributes:
        name: Its path relative to the folder, or as the list has it.
        reason: Why.
        duplicate: Whether it has the bytes of one that is used; otherwise it can't be read.
    """

    name: str
    reason: str
    duplicate: bool


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        name: As `LeftOut.name`; ``scene-7`` for the demo's eighth.
        sha256: Of the encoded image, or of the pixels of a painted one.
        read: Gives the encoded image, or the pixels uint8 [H, W, 3].
        glance: What it looks like.
    """

    name: str
    sha256: str
    read: Callable[[], bytes | NDArray[np.uint8]]
    glance: Glance


class Samples(Sequence[Sample]):
    """Distinct images that could be read, in an order that the seed fixes.

    Attributes:
        source: What they were opened from.
        seed: Of the order, and of the demo's scenes.
        left_out: Images that came up before there were enough, and are not used.
    """

    def __init__(
        self, images: Sequence[Sample], *, source: str, seed: int, left_out: Sequence[LeftOut] = ()
    ) -> None:
        self._images = tuple(images)
        self.source = source
        self.seed = seed
        self.left_out = tuple(left_out)

    @classmethod
    @door(InvalidInputError, "the images '{source}' can't be read", cure="check the path")
    def open(
        cls,
        source: str,
        *,
        count: int | None,
        seed: int = 0,
        least: int = LEAST,
        shuffled: bool = True,
        written: Collection[Path] = (),
        prep: Preprocessing | None = None,
    ) -> Samples:
        """Find, read and hash images.

        Args:
            source: A folder, searched with its subfolders: every file that is not hidden counts
                as an image. Or a text file with one path a line, relative to its own folder; empty
                lines and those that begin with # are passed over. Or ``demo``.
            count: How many; None for all there are. The demo has no end and needs a number.
            seed: Which of them, and in which order.
            least: How few will do.
            shuffled: Whether the seed says that; otherwise they are the first, in their order: by
                name in a folder, as they stand in a list.
            written: Files that the caller will write: those of an earlier run are no images.
            prep: How images are prepared; those that can't be are left out. None: not tried.

        Returns:
            The samples; each was decoded once.

        Raises:
            InvalidInputError: The source is none of these, or gives fewer readable and distinct
                images than `count`, or than `least`.
            MissingDependencyError: The demo's digits come from scikit-learn.
        """
        if count is not None and (isinstance(count, bool) or count < least):
            raise InvalidInputError(
                f"got count={count!r}",
                expected=f"at least {least}",
                cause="some images are calibrated on and others are held apart" * (least == LEAST),
            )
        if seed < 0:
            raise InvalidInputError(
                f"got seed={seed}",
                expected="0 or above",
            )
        if source == DEMO:
            return cls._demo(count, seed)
        results = {os.path.abspath(path) for path in written}  # noqa: PTH100  links stay
        files = [each for each in _files(source) if os.path.abspath(each[1]) not in results]  # noqa: PTH100
        order = list(range(len(files)))
        if shuffled:
            order = np.random.default_rng(seed).permutation(len(files)).tolist()
        found: dict[str, Sample] = {}
        left_out = []
        for place in order:
            if count is not None and len(found) == count:
                break
            name, path = files[place]
            try:
                encoded = _read(path)
                image = load_image(encoded)
                if prep is not None:
                    check_size(image, prep)
                glance = Glance.of(image)
            except InvalidInputError as error:
                left_out.append(LeftOut(name, str(error), duplicate=False))
                continue
            sha256 = hashlib.sha256(encoded).hexdigest()
            if (same := found.get(sha256)) is not None:
                reason = f"has the same bytes as {same.name}"
                left_out.append(LeftOut(name, reason, duplicate=True))
                continue
            found[sha256] = Sample(name, sha256, _Reader(path, sha256), glance)
        samples = cls(list(found.values()), source=source, seed=seed, left_out=left_out)
        needed = least if count is None else count
        if len(samples) < needed:
            raise InvalidInputError(
                f"{source!r} gives {counted(len(samples), 'image')} of "
                f"{counted(len(files), 'file')}",
                expected=f"at least {needed}",
                cause=samples.describe_left_out(),
                cure="add images or lower --count",
            )
        return samples

    @classmethod
    def _demo(cls, count: int | None, seed: int) -> Samples:
        """Return scenes of the demo's generator, with the digits that its training saw."""
        if count is None:
            raise InvalidInputError(
                "got the demo's generator without a number of images",
                cause="the generator has no end",
                cure="give --count",
            )
        require_digits("the demo's generator")
        images = []
        for number in range(count):
            paint = _Painter(seed, number)
            painted = paint()
            sha256 = hashlib.sha256(painted.tobytes()).hexdigest()
            images.append(Sample(f"scene-{number}", sha256, paint, Glance.of(painted)))
        return cls(images, source=DEMO, seed=seed)

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all images, in their order."""
        every = "".join(image.sha256 for image in self._images)
        return hashlib.sha256(every.encode()).hexdigest()

    @property
    def duplicates(self) -> int:
        """How many of those left out have the bytes of another image."""
        return sum(each.duplicate for each in self.left_out)

    def describe_left_out(self) -> str:
        """Return one line that counts what was left out and names the first of it."""
        if not self.left_out:
            return "nothing was left out"
        first = "; ".join(
            f"{printable(each.name)}: {each.reason}" for each in self.left_out[:_NAMED]
        )
        return (
            f"left out: {len(self.left_out) - self.duplicates} that can't be read and "
            f"{counted(self.duplicates, 'duplicate')} ({first})"
        )

    def split(self) -> tuple[Samples, Samples]:
        """Return those to calibrate on and those held apart: one in five, at least one."""
        apart = max(1, len(self) // 5)
        return self[:-apart], self[-apart:]

    def batches(self, manifest: Manifest, size: int) -> Iterator[NDArray[Any]]:
        """Iterate the images once, as a bundle's graph takes them.

        Where the bundle cuts images into tiles these are the base tiles.

        Args:
            manifest: Of the bundle: its preprocessing and its input.
            size: Images of a batch; the last one may have fewer.

        Yields:
            uint8 [b, H, W, 3] or float32 [b, 3, H, W].

        Raises:
            InvalidInputError: A file changed since it was hashed.
        """
        prep = manifest.preprocessing
        for first in range(0, len(self), size):
            sources: list[ImageSource] = [each.read() for each in self[first : first + size]]
            pixels = np.stack([tower_image(load_image(each), prep) for each in sources])
            yield pixels if manifest.input.name == "image" else pixel_values(pixels, prep)

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of the samples."""
        return {
            "source": self.source,
            "seed": self.seed,
            "count": len(self),
            "digest": self.digest,
            "duplicates": self.duplicates,
            "unreadable": len(self.left_out) - self.duplicates,
            "left_out": [{"name": each.name, "reason": each.reason} for each in self.left_out],
        }

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            images = self._images[place]
            return Samples(images, source=self.source, seed=self.seed, left_out=self.left_out)
        return self._images[place]


@door(InvalidInputError, "the images '{source}' can't be read", cure="check the path")
def images_of(
    source: str | None,
    *,
    model: str,
    count: int | None,
    say: Callable[[str], None],
    shuffled: bool = True,
    written: Collection[Path] = (),
    prep: Preprocessing | None = None,
) -> tuple[str, list[tuple[str, Callable[[], ImageSource]]]]:
    """Return images for a command that need not be given any.

    Args:
        source: As `Samples.open` takes it; None for the demo's generator where the model is the
            demo, else for vzip's own photographs.
        model: The model's id.
        count: How many; None for all, and for `DEMO_IMAGES` of the demo's generator, which has no
            end.
        say: Told what is left out.
        shuffled: As `Samples.open` takes it.
        written: As `Samples.open` takes it.
        prep: As `Samples.open` takes it.

    Returns:
        What the images are, without the folders that they lie in; and each one's name and reader.

    Raises:
        InvalidInputError: As `Samples.open`.
    """
    if source is None and model == DEMO:
        error = lacking("the demo's generator")
        if error is not None:
            from vzip.runtime import demo

            say(f"warning: the demo's own pictures are taken, since {error}")
            pictures = sorted(demo.pictures().glob("*.jpg"))
            return "the demo's pictures", [(p.name, _opened(p)) for p in pictures[:count]]
        source = DEMO
    if source is None:
        from vzip.export.pictures import reference_images

        return "vzip's own photographs", [(p.name, _opened(p)) for p in reference_images()]
    samples = Samples.open(
        source,
        count=DEMO_IMAGES if source == DEMO and count is None else count,
        least=1,
        shuffled=shuffled,
        written=written,
        prep=prep,
    )
    if samples.left_out:
        say(samples.describe_left_out())
    if flat := [each for each in samples if each.glance.flat]:
        say(
            f"warning: {len(flat)} of {counted(len(samples), 'image')} {are(len(flat))} flat, one "
            f"colour all over, such as {flat[0].name}: what is measured on them says nothing of "
            "others"
        )
    # The page may go to others, whom the names of the user's folders are nothing to.
    name = Path(os.path.abspath(source)).name  # noqa: PTH100
    return f"{name}, SHA-256 {samples.digest[:16]}", [(each.name, each.read) for each in samples]


def _opened(path: Path) -> Callable[[], ImageSource]:
    return lambda: path


class _Reader:
    """Reads a file again and makes sure that it is still the one that was hashed."""

    def __init__(self, path: Path, sha256: str) -> None:
        self.path, self.sha256 = path, sha256

    def __call__(self) -> bytes:
        encoded = _read(self.path)
        if hashlib.sha256(encoded).hexdigest() != self.sha256:
            raise InvalidInputError(
                f"{self.path} changed while it was being used",
                expected="the bytes that were hashed at first",
                cure="leave the images alone until calibration ends",
            )
        return encoded


class _Painter:
    """Paints one of the demo's scenes; each has a generator of its own."""

    def __init__(self, seed: int, number: int) -> None:
        self.seed, self.number = seed, number

    def __call__(self) -> NDArray[np.uint8]:
        from vzip.calibration.demo import scenes

        rng = np.random.default_rng([self.seed, self.number])
        return scenes.paint(scenes.draw_scene(rng, "train"), DEMO_SIDE)


def _files(source: str) -> list[tuple[str, Path]]:
    """Return name and path of every candidate, in an order that the file system has no part in."""
    path = Path(source)
    if path.is_dir():
        found = [
            (each.relative_to(path).as_posix(), each)
            for each in path.rglob("*")
            if each.is_file() and not any(x.startswith(".") for x in each.relative_to(path).parts)
        ]
        return sorted(found)
    if not path.is_file():
        raise InvalidInputError(
            f"the images {source!r} don't exist",
            expected=f"a folder, a text file with one path a line, or '{DEMO}'",
            cure="check the path",
        )
    try:
        text = read_text(path, LONGEST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        large = isinstance(error, OSError) and error.errno == errno.EFBIG
        raise _no_list(
            source, "is too large for one" if large else "is no readable text"
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    longest = max(map(len, lines), default=0)
    if longest > _LONGEST_PATH:
        raise _no_list(source, f"has a line of {longest} characters")
    return [(line, path.parent / line) for line in lines if line and not line.startswith("#")]


def _no_list(source: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"{source!r} {why}",
        expected="a text file with one path a line, or a folder of images",
        cause="a single image is no set of samples",
    )


def _read(path: Path) -> bytes:
    """Return a file's bytes; `load_image` then judges them."""
    try:
        return read_plain(path, MAX_ENCODED_BYTES)
    except (NotPlainError, FileNotFoundError) as error:
        raise InvalidInputError("is no file") from error
    except OSError as error:
        raise InvalidInputError(f"can't be read: {error.strerror}") from error
