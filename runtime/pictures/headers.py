"""What an encoded image says of itself, looked at before any decoder sees it.

A decoder's time and memory hang on more than the pixels that a header announces. Each of these has
a bound here, which is checked in one pass over the bytes, without decoding:

| | bound | what it keeps away |
|---|---|---|
| scans of a JPEG | `MAX_SCANS`, fewer for large pictures | each goes over all pixels once more |
| blocks ahead of the pixels; chunks of a PNG | `MAX_BLOCKS` | Pillow reads them one by one |
| bytes ahead of a JPEG's pixels | `MAX_HEADER` | EXIF segments are joined one by one |
| bytes that EXIF's entries refer to | `MAX_EXIF` | each entry may refer to all of them |
| a PNG's text or colour profile, unpacked | `MAX_CHUNK`, `MAX_PACKED` of them | zlib's bombs |
| runs of a compressed BMP | `MAX_RUNS` | Pillow unpacks them in Python |

`without_extras` gives a picture whose extras (text, colour profile, a camera's notes) are damaged
without them: it is the pixels that count.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    Walk = Callable[[bytes, str], "Shape"]

MAX_SCANS = 100
"""Most scans of a JPEG; encoders write 1 to 4, progressive ones about 10."""

MAX_SCANNED = 2**31
"""Most pixels that all scans of a JPEG go over: 32 scans of 67 million."""

MAX_BLOCKS = 2**17
"""Most chunks of a PNG, and most segments or sub-blocks ahead of a JPEG's or GIF's pixels."""

MAX_HEADER = 2**25
"""Most bytes ahead of a JPEG's pixels."""

MAX_CHUNK = 2**20
"""Most bytes of a PNG's text or colour profile, unpacked: Pillow's own limit."""

MAX_PACKED = 256
"""Most packed texts and colour profiles of a PNG."""

MAX_EXIF = 2**24
"""Most bytes that the entries of an EXIF block refer to, all together."""

MAX_RUNS = 2**23
"""Most bytes and most pixels of a run-length coded BMP: seconds of work, in Pillow's Python."""

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # any that may follow a scan's data
_GIF_DATA = 2**20  # blocks of a frame's pixels: 67 million that can't be compressed have half
_SCAN, _END = 0xDA, 0xD9
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


class Shape(NamedTuple):
    """What is known of an image from its bytes.

    Attributes:
        size: Width and height that its decoder allocates when it is opened; None where Pillow
            tells them before it allocates anything.
        scans: How often its decoder goes over all pixels.
    """

    size: tuple[int, int] | None = None
    scans: int = 1


def check_blocks(kind: str, data: bytes, name: str) -> Shape:
    """Refuse an image whose decoder would have too much to do beside its pixels.

    Args:
        kind: JPEG, PNG, WEBP, BMP or GIF.
        data: The encoded image. What is damaged in it is left for its decoder to find.
        name: The image, as it should stand in the message.

    Raises:
        InvalidInputError: One of the bounds above is passed.
        ValueError: The header of a WebP or GIF is damaged.
    """
    walk = _WALKS.get(kind)
    return Shape() if walk is None else walk(data, name)


def check_scans(scans: int, width: int, height: int, name: str) -> None:
    """Refuse a JPEG whose scans are too many for its size."""
    most = min(MAX_SCANS, MAX_SCANNED // (width * height))
    if scans > most:
        too_many(name, f"{scans} scans", f"at most {most} in a JPEG of {width}×{height} pixels")


def is_animated(kind: str | None, data: bytes) -> bool:
    """Return whether an image has more frames than its first, as far as it can be told.

    Args:
        kind: As for `check_blocks`; None for no image.
        data: The encoded image.
    """
    with contextlib.suppress(ValueError):
        if kind == "GIF":
            return _gif_is_animated(data)
        if kind == "WEBP":
            chunks = itertools.islice(_riff(data), MAX_BLOCKS)
            return sum(name == b"ANMF" for name, *_ in chunks) > 1
        if kind == "PNG":
            chunks = itertools.islice(_chunks(data), MAX_BLOCKS)
            counts = (data[start + 8 : start + 12] for name, start, _ in chunks if name == b"acTL")
            return int.from_bytes(next(counts, b""), "big") > 1
    return False


def check_exif(block: bytes, name: str) -> None:
    """Refuse an EXIF block whose entries refer to the same bytes again and again.

    Pillow copies them for each entry; version 10.1 does so without end.
    """
    block = block.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "big" if block.startswith(b"MM") else "little"

    def number(place: int, size: int) -> int:
        return int.from_bytes(block[place : place + size], order)

    large = number(2, 2) == 43  # BigTIFF
    first, wide, entry = (number(8, 8), 8, 20) if large else (number(4, 4), 4, 12)
    first += 8 if large else 2
    copied = 0
    for place in range(first, min(first + 2**16 * entry, len(block) - entry + 1), entry):
        start = number(place + 4 + wide, wide)
        size = 8 * number(place + 4, wide)  # no kind of value is larger
        copied += min(size, max(0, len(block) - start)) if size > wide else 0
        if copied > max(MAX_EXIF, 16 * len(block)):
            too_many(name, f"EXIF entries of more than {copied - 1} bytes", f"at most {MAX_EXIF}")


def without_extras(kind: str, data: bytes) -> bytes:
    """Return an image's bytes without what doesn't make its pixels, as far as it can be told.

    Orientation (EXIF), transparency (tRNS) and what says how colours are coded (JFIF, Adobe) stay.
    """
    if kind == "PNG":
        kept = [data[:8]]
        for name, start, end in _chunks(data):
            whole = end <= len(data) and zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(
                data[end - 4 : end], "big"
            )
            # A capital letter: no picture without it. Those that say nothing of pixels are left
            # out, and those that are damaged.
            if not name[0] & 0x20 or (name in (b"tRNS", b"eXIf") and whole):
                kept.append(data[start:end])
        return b"".join(kept)
    if kind == "JPEG":
        kept, last = [data[:2]], 2
        for marker, start, end in _segments(data):
            # Comments and applications' segments, but JFIF's, EXIF's and Adobe's if whole.
            if marker not in {0xFE, 0xEF, *range(0xE2, 0xEE)} and not (
                marker in (0xE0, 0xEE) and end - start < 16
            ):
                kept.append(data[start:end])
            last = end
            if marker == _SCAN:
                break
        return b"".join([*kept, data[last:]])
    if kind == "WEBP":
        kept = [b"WEBP"]
        for name, start, end in _riff(data):
            if name == b"VP8X":  # its flags announce a profile, EXIF and XMP
                kept.append(data[start : start + 8] + bytes([data[start + 8] & ~0x2C & 0xFF]))
                kept.append(data[start + 9 : end])
            elif name in (b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF"):
                kept.append(data[start:end])
        body = b"".join(kept)
        return b"RIFF" + len(body).to_bytes(4, "little") + body
    return data


def too_many(name: str, got: str, expected: str) -> NoReturn:
    """Raise the error for an image that has too much of something."""
    raise InvalidInputError(
        f"{name} has {got}",
        expected=expected,
        cause="it would keep its decoder busy for a very long time",
        cure="if it is a picture, save it again",
    )


# ---- JPEG ----------------------------------------------------------------------------------------


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of a JPEG's segments, a scan's header without its data, to EOI."""
    place = 2
    while (found := _MARKER.search(data, place)) is not None:
        marker, place = data[found.end() - 1], found.end()
        if marker not in _BARE:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
        yield marker, found.start(), place
        if marker == _END:
            return


def _jpeg(data: bytes, name: str) -> Shape:
    """Count a JPEG's segments and scans, up to its end: another picture may follow."""
    blocks, scans, end = 0, 0, 2
    exif: list[bytes] = []
    for marker, start, after in _segments(data):
        # Pillow reads fill bytes and what else stands between segments one by one.
        blocks, end = blocks + 1 + (0 if scans else start - end), after
        if blocks > MAX_BLOCKS:
            got = f"more than {MAX_BLOCKS} segments and fill bytes"
            too_many(name, got, f"at most {MAX_BLOCKS} in a JPEG")
        if end > MAX_HEADER and not scans:
            got = f"more than {MAX_HEADER} bytes ahead of its pixels"
            too_many(name, got, f"at most {MAX_HEADER} in a JPEG")
        if marker == 0xE1 and not scans and data.startswith(b"Exif\0\0", start + 4):
            exif.append(data[start + 10 : after])
        scans += marker == _SCAN
        if scans > MAX_SCANS:
            too_many(name, f"more than {MAX_SCANS} scans", f"at most {MAX_SCANS} in a JPEG")
    check_exif(b"".join(exif), name)
    return Shape(scans=max(1, scans))


# ---- PNG -----------------------------------------------------------------------------------------


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start, end) of a PNG's chunks, length and checksum included."""
    place = 8
    while place + 8 <= len(data):
        name, length = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], "big")
        yield name, place, place + 12 + length
        place += 12 + length


def _png(data: bytes, name: str) -> Shape:
    """Count a PNG's chunks up to its second frame, and see how large its packed texts become."""
    packed, animated, shown = 0, is_animated("PNG", data), False
    for place, (chunk, start, end) in enumerate(_chunks(data)):
        shown |= chunk == b"IDAT"
        if shown and animated and chunk == b"fcTL":  # of the next: nobody reads on
            break
        if place == MAX_BLOCKS:
            too_many(name, f"more than {MAX_BLOCKS} chunks", f"at most {MAX_BLOCKS} in a PNG")
        if chunk in _PACKED:
            packed += 1
            if packed > MAX_PACKED:
                what = "packed texts and colour profiles"
                too_many(name, f"more than {MAX_PACKED} {what}", f"at most {MAX_PACKED} in a PNG")
            _check_packed(chunk, data[start + 8 : end - 4], name)
    return Shape()


_PACKED = {b"iCCP": "colour profile (ICC)", b"zTXt": "text", b"iTXt": "text"}


def _check_packed(chunk: bytes, content: bytes, name: str) -> None:
    """Refuse a packed text or colour profile of more than `MAX_CHUNK` bytes."""
    keyword, _, rest = content.partition(b"\0")
    method, rest = rest[:1], rest[1:]
    if chunk == b"iTXt":
        if method == b"\0":  # not packed
            return
        rest = rest[1:].split(b"\0", 2)[-1]  # behind the method, language and translated keyword
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(rest, MAX_CHUNK)
    except zlib.error:
        return  # damaged: Pillow takes none, or says so
    if unpacker.unconsumed_tail:
        said = keyword[:79].decode("latin-1")
        raise InvalidInputError(
            f"{name} has a {_PACKED[chunk]} of more than {MAX_CHUNK} bytes, unpacked: the chunk "
            f"{chunk.decode()} {said!r}",
            expected=f"at most {MAX_CHUNK}: a larger one is most likely a decompression bomb",
            cure="save the picture again without it, as 'magick IN -strip OUT' does",
        )


# ---- GIF, WebP, BMP ------------------------------------------------------------------------------


def _gif(data: bytes, name: str) -> Shape:
    """Return the size that Pillow gives a GIF: the screen, or a first frame beyond it."""
    place = _gif_frame(data, 13 + _palette(data, 10))
    if place is None:
        most = f"at most {MAX_BLOCKS}"
        too_many(name, f"more than {MAX_BLOCKS} blocks ahead of its pixels", most)
    width, height = _number(data, 6, 2), _number(data, 8, 2)
    left, top, w, h = (_number(data, place + at, 2) for at in (1, 3, 5, 7))
    return Shape((max(width, left + w), max(height, top + h)))


def _gif_frame(data: bytes, place: int) -> int | None:
    """Return where a GIF's next frame begins; None where it is behind `MAX_BLOCKS` blocks.

    Raises:
        ValueError: There is none.
    """
    extension = False
    for _ in range(MAX_BLOCKS):
        block = _number(data, place)
        if extension:  # its blocks, up to an empty one
            place, extension = place + 1 + block, block > 0
        elif block == 0x2C:
            return place
        elif block == 0x21:  # an extension, and its label
            place, extension = place + 2, True
        elif block == 0:  # Pillow skips stray zeros, so do we
            place += 1
        else:
            raise ValueError("its next frame is missing")
    return None


def _palette(data: bytes, place: int) -> int:
    """Return how many bytes a GIF's palette has, by the flags that announce it."""
    flags = _number(data, place)
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _number(data: bytes, place: int, size: int = 1) -> int:
    """Return a number of a GIF; raises ValueError behind its end."""
    if place + size > len(data):
        raise ValueError("its next frame is missing")
    return int.from_bytes(data[place : place + size], "little")


def _gif_is_animated(data: bytes) -> bool:
    """Return whether a GIF has a second frame."""
    first = _gif_frame(data, 13 + _palette(data, 10))
    if first is None:
        return False
    place = first + 10 + _palette(data, first + 9) + 1  # behind the size of LZW's codes
    for _ in range(_GIF_DATA):
        block = _number(data, place)
        place += 1 + block
        if block == 0:
            return _gif_frame(data, place) is not None
    return False


def _riff(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start, end) of a WebP's chunks, their heads included."""
    place = 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + length + length % 2
        yield data[place : place + 4], place, end
        place = end


def _webp(data: bytes, _: str) -> Shape:
    """Return the size of a WebP's canvas from its header (RFC 9649)."""
    chunk, data = data[12:16], data[20:30]
    if len(data) == 10 and chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (4, 7))
        return Shape((width, height))
    if len(data) == 10 and chunk == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return Shape((width, height))
    if len(data) >= 5 and chunk == b"VP8L" and data[:1] == b"\x2f":
        bits = int.from_bytes(data[1:5], "little")
        return Shape((1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)))
    raise ValueError("its header is damaged")


def _bmp(data: bytes, name: str) -> Shape:
    """Refuse a run-length coded BMP that is too long or too large."""
    if int.from_bytes(data[30:34], "little") not in (1, 2):
        return Shape()
    width, height = (
        abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22)
    )
    for count, what in ((len(data), "bytes"), (width * height, "pixels")):
        if count > MAX_RUNS:
            too_many(name, f"{count} {what} in runs", f"at most {MAX_RUNS} in a compressed BMP")
    return Shape()


_WALKS: dict[str, Walk] = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "WEBP": _webp, "BMP": _bmp}
