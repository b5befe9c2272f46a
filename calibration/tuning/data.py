"""What a projector is tuned on: conversations about images, from LLaVA's JSON or the demo's scenes.

Nothing is lost in silence: what can't be used is named, with the reason, and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from vzip.calibration.demo.digits import require_digits
from vzip.runtime.errors import InvalidInputError, printable
from vzip.runtime.files.plain import read_plain, read_text
from vzip.runtime.guard import door
from vzip.runtime.pictures.images import MAX_ENCODED_BYTES
from vzip.runtime.wording import are, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.calibration.demo.scenes import Scene

DEMO: Final = "demo"
"""The data that stands for the demo's generator; a file of that name is ``./demo``."""

DEMO_SCENES: Final = 4000
"""How many scenes the demo's generator gives where no number is asked for."""

_LONGEST_DATA: Final = 1 << 33  # bytes; LLaVA's own 665,000 records have 1 GB

IMAGE_MARK: Final = "<image>"
"""What stands for the image in LLaVA's JSON, whatever the LLM's placeholder is."""


@dataclass(frozen=True)
class Turn:
    """A question and the answer that is learned, without any prompt around them."""

    question: str
    answer: str


@dataclass(frozen=True)
class TuningRecord:
    """A conversation about one image.

    Attributes:
        name: Its id and its place in the file.
        image: What `Data.read` takes.
        turns: At least one.
    """

    name: str
    image: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class SkippedRecord:
    """A record that is not used, and why."""

    name: str
    reason: str


class Data(Protocol):
    """Where records and their images come from.

    Attributes:
        source: What it was opened from, for messages and reports.
        records: Those that are well formed.
        left_out: The others.
    """

    source: str
    records: Sequence[TuningRecord]
    left_out: Sequence[SkippedRecord]

    def read(self, image: str) -> bytes | NDArray[np.uint8]:
        """Return an encoded image, or pixels uint8 [H, W, 3].

        Raises:
            InvalidInputError: It can't be read.
        """
        ...


def digest_of(image: bytes | NDArray[np.uint8]) -> str:
    """Return the SHA-256 that an image goes by: of the encoded image, or of shape and pixels."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


@door(InvalidInputError, "no {count} records can be chosen with the seed {seed}")
def choose(data: Data, count: int | None, seed: int) -> list[TuningRecord]:
    """Choose records by a seed, in the order of the data.

    Args:
        data: The data.
        count: How many; None for all.
        seed: Which.

    Raises:
        InvalidInputError: There are not as many, or none at all.
    """
    found = len(data.records)
    if found == 0 or (count is not None and not 1 <= count <= found):
        reason = f"the first left out is {_line(data.left_out[0])}" if data.left_out else ""
        wanted = "at least one" if count is None else f"{count} (--count)"
        raise InvalidInputError(
            f"{data.source} has {counted(found, 'usable record')} and {len(data.left_out)} that "
            f"{are(len(data.left_out))} not",
            expected=wanted,
            cause=reason,
        )
    if count is None:
        return list(data.records)
    chosen = np.random.default_rng(seed).choice(found, count, replace=False)
    return [data.records[place] for place in sorted(chosen.tolist())]


class InstructionData:
    """LLaVA's instruction JSON: a list of ``{id, image, conversations: [{from, value}, …]}``.

    Args:
        path: The JSON file.
        folder: The folder that its images' names are relative to.

    Raises:
        InvalidInputError: The file can't be read or is no JSON list, or there is no such folder.
    """

    @door(InvalidInputError, "the data '{path}' can't be read", cure="check --data and --images")
    def __init__(self, path: Path, folder: Path) -> None:
        self.source = str(path)
        if not folder.is_dir():
            raise InvalidInputError(
                f"the image folder {folder} does not exist",
                expected=f"the folder that the images in {path} are relative to",
                cure="check --images",
            )
        self._folder = folder
        try:
            entries = json.loads(read_text(path, _LONGEST_DATA))
        except OSError as error:
            raise InvalidInputError(
                f"can't read the data {path} ({error.strerror})",
                expected=f"LLaVA's instruction JSON or '{DEMO}'",
                cure="check --data",
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(
                f"the data {path} is no valid JSON ({error})",
                expected="LLaVA's instruction JSON",
                cause="it is damaged or of another format: JSON lines become a list with jq -s .",
            ) from error
        if not isinstance(entries, list):
            raise InvalidInputError(
                f"the data {path} holds a JSON {type(entries).__name__}",
                expected="a list of {id, image, conversations}",
                cause="it is another file",
            )
        records, left_out = [], []
        for place, entry in enumerate(entries):
            name = _name(entry, place)
            parsed = _parse(entry)
            if isinstance(parsed, str):
                left_out.append(SkippedRecord(name, parsed))
            else:
                records.append(TuningRecord(name, *parsed))
        self.records: Sequence[TuningRecord] = records
        self.left_out: Sequence[SkippedRecord] = left_out

    def read(self, image: str) -> bytes:
        """Return an encoded image; see `Data.read`."""
        path = self._folder / image
        try:
            return read_plain(path, MAX_ENCODED_BYTES)
        except OSError as error:
            raise InvalidInputError(
                f"the image {image} can't be read in {self._folder} ({error.strerror})",
                expected="a file",
                cure="check --images",
            ) from error


class DemoData:
    """Scenes of the demo's generator, each with one question of every kind as its conversation.

    The handwritten digits are those that the demo model was trained with, never the held-out ones.

    Args:
        count: How many scenes.
        seed: Of the scenes and the questions.
        side: Side in pixels at which they are painted.

    Raises:
        MissingDependencyError: The digits come from scikit-learn.
    """

    left_out: Sequence[SkippedRecord] = ()

    def __init__(self, count: int, seed: int, side: int) -> None:
        require_digits("the demo's data")
        from vzip.calibration.demo import scenes

        if count < 1:
            raise InvalidInputError(
                f"got {counted(count, 'scene')} (--count)",
                expected="at least 1",
            )
        self.source = DEMO
        self._seed, self._side = seed, side
        records = []
        for number in range(count):
            rng, scene = self._draw(number)
            turns = tuple(Turn(each.text, each.answer) for each in scenes.ask(rng, scene))
            records.append(TuningRecord(f"scene-{number}", str(number), turns))
        self.records: Sequence[TuningRecord] = records

    def read(self, image: str) -> NDArray[np.uint8]:
        """Paint a scene."""
        from vzip.calibration.demo import scenes

        _, scene = self._draw(int(image))
        return scenes.paint(scene, self._side)

    def _draw(self, number: int) -> tuple[np.random.Generator, Scene]:
        from vzip.calibration.demo import scenes

        rng = np.random.default_rng([self._seed, number])
        return rng, scenes.draw_scene(rng, "train")


def _name(entry: Any, place: int) -> str:
    known = entry.get("id") if isinstance(entry, dict) else None
    return (
        f"record {place}" if known is None else printable(f"record {place} (id {str(known)[:60]})")
    )


def _parse(entry: Any) -> tuple[str, tuple[Turn, ...]] | str:
    """Return an entry's image and turns, or why it can't be used."""
    if not isinstance(entry, dict):
        return f"is a JSON {type(entry).__name__}, expected an object"
    image, said = entry.get("image"), entry.get("conversations")
    if image is None:
        return "has no image: text alone tells the projector nothing"
    if not isinstance(image, str) or not image.strip() or "\0" in image:
        return f"has the image {str(image)[:60]!r}, expected the name of one file"
    if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
        return f"has the image {image[:60]!r}, expected a name inside the image folder"
    turns = _turns(said)
    return turns if isinstance(turns, str) else (image, turns)


def _turns(said: Any) -> tuple[Turn, ...] | str:
    """Return the turns of a conversation, or what is wrong with it."""
    if not isinstance(said, list) or not said or len(said) % 2:
        return "has no conversations of questions and answers in turn"
    texts = []
    for place, each in enumerate(said):
        speaker = ("human", "gpt")[place % 2]
        value = each.get("value") if isinstance(each, dict) else None
        if not isinstance(value, str) or each.get("from") != speaker:
            return f"has no text from {speaker!r} at place {place} of its conversations"
        if not _is_text(value):
            return f"has half a character (a lone surrogate) at place {place} of its conversations"
        texts.append(value)
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks != 1 or IMAGE_MARK not in texts[0]:
        return f"has {marks} times {IMAGE_MARK}, expected it once, in the first question"
    texts = [text.replace(IMAGE_MARK, "").strip() for text in texts]
    if not all(texts):
        return "has an empty question or answer"
    return tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))


def _is_text(value: str) -> bool:
    """Return whether a text of JSON can be written: an escape may name half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _line(left_out: SkippedRecord) -> str:
    return f"{left_out.name}, which {left_out.reason}"
