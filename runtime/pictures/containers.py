"""What a video's container says of its own length, read from its boxes, whatever decodes it.

Durations and frame counts in headers are no measure: where time starts late, has holes or starts
again, they differ from what the file holds, and a file of a kilobyte may claim a thousand million
frames, for each of which a reader takes memory. Sizes in bytes are exact: a file that is cut off is
shorter than its boxes say.
"""

from __future__ import annotations

import io
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.plain import open_plain

_MOST_BOXES = 2**22  # of a file that are looked at, one after the other
_MOST_HEADER = 2**26  # bytes of a packed QuickTime header, unpacked
_MOST_EDITS = 2**12  # of a track
_MOST_CLAIMED = 16  # frames and samples for each byte of the file; QuickTime's QDesign had 7

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_MATROSKA = b"\x1a\x45\xdf\xa3"
_ASF = b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"
_FLV = re.compile(rb"FLV\x01[\0\1\4\5]\0\0\0\x09\0{4}")

_KIND = re.compile(rb"[\w \xa9-]{4}")  # of a box: letters, mostly
_HOLD_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"cmov", b"moof", b"traf")


def is_whole(path: Path) -> bool | None:
    """Return whether a file is as long as its outermost boxes say.

    Args:
        path: MP4, MOV, MKV, WebM or AVI; others don't say.

    Returns:
        None where they don't say how long they are: MPEG streams, and recordings whose writer never
        got to say it.
    """
    size = path.stat().st_size
    with open_plain(path) as file:
        head = file.read(12)
        if head.startswith(_MATROSKA):
            ends = _elements(file, size)
        elif head.startswith(b"RIFF"):
            ends = _riffs(file, size)
        elif _begins_with_box(head):
            ends = (None if box.open else box.end for box in _boxes(file, 0, size))
        else:
            return None
        whole = None
        for end in itertools.islice(ends, _MOST_BOXES):
            if end is None or end > size:
                return None if end is None else False
            whole = True
        return whole


def check_container(path: Path, name: str) -> None:
    """Refuse a file that no reader reads as it is meant, before one tries.

    Raises:
        InvalidInputError: It states more frames than it has bytes, for which a reader would take
            memory; or it is several files, one after the other, of which readers see the first.
    """
    size = path.stat().st_size
    with open_plain(path) as file:
        head = file.read(12)
        if _begins_with_box(head):
            parts = _check_movie(file, size, name)
        elif head.startswith(b"FLV\x01"):
            parts = _flvs(file)
        elif head.startswith(_ASF):
            parts = _asfs(file, size)
        else:
            return
    if parts > 1:
        raise InvalidInputError(
            f"{name} is {parts} recordings, one after the other",
            expected="one",
            cause="readers of this kind of file see the first alone",
            cure="join them with ffmpeg's 'concat', or give them one by one",
        )


# ---- MP4 and QuickTime ---------------------------------------------------------------------------


class _Box(NamedTuple):
    """A box of an MP4: its kind, where its content is, and whether it just goes on to the end."""

    kind: bytes
    start: int
    end: int
    open: bool


def _begins_with_box(head: bytes) -> bool:
    return len(head) >= 8 and head[4:8].isalnum() and int.from_bytes(head[:4], "big") < 2**31


def _boxes(file: IO[bytes], place: int, end: int) -> Iterator[_Box]:
    """Yield the boxes between two places; the last may end behind the second."""
    while place + 8 <= end:
        file.seek(place)
        head = file.read(16)
        length, start = int.from_bytes(head[:4], "big"), place + 8
        if not _KIND.fullmatch(head, 4, 8):
            return  # what follows is no box
        if length == 1:
            length, start = int.from_bytes(head[8:16], "big"), place + 16
        if length == 0:
            yield _Box(head[4:8], start, end, open=True)
            return
        if length < start - place:
            return
        place += length
        yield _Box(head[4:8], start, place, open=False)


def _check_movie(file: IO[bytes], size: int, name: str) -> int:
    """Refuse a movie that states too many frames; return how many movies the file holds."""
    kinds: Counter[bytes] = Counter()
    samples: Counter[object] = Counter()  # of each track; of all fragments
    edits: Counter[object] = Counter()
    todo: list[tuple[IO[bytes], int, int, object]] = [(file, 0, size, None)]
    while todo:
        source, place, end, track = todo.pop()
        for box in _boxes(source, place, min(end, size) if source is file else end):
            kinds[box.kind] += 1
            if kinds.total() > _MOST_BOXES:
                raise _claims(name, f"more than {_MOST_BOXES} boxes", size)
            source.seek(box.start)
            if box.kind in _HOLD_BOXES:
                inner = (source, box.start) if box.kind == b"trak" else track
                todo.append((source, box.start, box.end, inner))
            elif box.kind in (b"stsz", b"stz2"):  # version, size of each, how many
                samples[track] += int.from_bytes(source.read(12)[8:12], "big")
            elif box.kind == b"trun":  # version, how many
                samples[None] += int.from_bytes(source.read(8)[4:8], "big")
            elif box.kind == b"elst":
                edits[track] += int.from_bytes(source.read(8)[4:8], "big")
                if edits[track] > _MOST_EDITS:
                    raise _claims(name, f"{edits[track]} edits of a track", size)
            elif box.kind == b"cmvd":  # a header that is packed: its length, and itself
                packed = zlib.decompressobj()
                with_limit = source.read(min(box.end, size) - box.start)[4:]
                header = _unpacked(packed, with_limit)
                if packed.unconsumed_tail:
                    raise _claims(name, f"a header of more than {_MOST_HEADER} bytes", size)
                todo.append((io.BytesIO(header), 0, len(header), None))
    claimed = sum(samples[track] * max(1, edits[track]) for track in samples)
    if claimed > _MOST_CLAIMED * size:
        raise _claims(name, f"{claimed} frames and samples", size)
    return 1 if kinds[b"moof"] else min(kinds[b"ftyp"], kinds[b"moov"])


def _unpacked(packed: zlib._Decompress, data: bytes) -> bytes:
    """Return what is packed, up to a limit; nothing where it is damaged, as a reader will say."""
    try:
        return packed.decompress(data, _MOST_HEADER)
    except zlib.error:
        return b""


def _claims(name: str, what: str, size: int) -> InvalidInputError:
    """Return the error for a file that states more than it can hold."""
    return InvalidInputError(
        f"{name} states {what} in {size} bytes",
        expected=f"at most {_MOST_CLAIMED} samples for each byte, and {_MOST_EDITS} edits",
        cause="it is cut off, or its header is damaged",
        cure="copy or record it again",
    )


# ---- AVI, Matroska, FLV, ASF ---------------------------------------------------------------------


def joined_avis(path: Path) -> int:
    """Return how many AVIs follow one another in a file; the parts of a large one count as one."""
    size, count = path.stat().st_size, 0
    with open_plain(path) as file:
        for end in itertools.chain([0], itertools.islice(_riffs(file, size), _MOST_BOXES)):
            if end is None:
                break
            file.seek(end + end % 2)
            head = file.read(12)
            count += head.startswith(b"RIFF") and head.endswith(b"AVI ")
    return count


def _riffs(file: IO[bytes], size: int) -> Iterator[int | None]:
    """Yield where each outermost chunk of an AVI ends; None where its writer never said it."""
    place = 0
    while place + 12 <= size:
        file.seek(place)
        head = file.read(8)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF":
            return
        if length < 4 or length >= 2**32 - 16:
            yield None
            return
        place += 8 + length
        yield place
        place += length % 2


def _elements(file: IO[bytes], size: int) -> Iterator[int | None]:
    """Yield where each outermost element of a Matroska file ends; None for an unknown size."""
    place = 0
    while place + 2 <= size:
        file.seek(place)
        head = file.read(12)
        name, after = _number(head, 0)
        length, after = _number(head, after)
        if name not in (_EBML, _SEGMENT) or after == 0:
            return  # what follows is no recording
        length &= (1 << 7 * (after - 4)) - 1  # without the bit that says how long the number is
        if length == (1 << 7 * (after - 4)) - 1:
            yield None
            return
        place += after + length
        yield place


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Return one of EBML's numbers, its length's mark included, and where it ends; 0 for none."""
    first = data[place] if place < len(data) else 0
    end = place + 9 - first.bit_length()
    return (int.from_bytes(data[place:end], "big"), end) if first and end <= len(data) else (0, 0)


def _flvs(file: IO[bytes]) -> int:
    """Return how many FLVs a file holds, by what each begins with."""
    file.seek(0)
    count, rest = 0, b""
    while block := file.read(2**22):
        found = [*_FLV.finditer(rest + block)]
        count += len(found)
        rest = (rest + block)[-12:]  # shorter than what is looked for
    return count


def _asfs(file: IO[bytes], size: int) -> int:
    """Return how many ASF files a file holds."""
    place = count = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        head = file.read(24)
        length = int.from_bytes(head[16:24], "little")
        if length < 24 or place >= size:
            break
        count += head.startswith(_ASF)
        place += length
    return count
