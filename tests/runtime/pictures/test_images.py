"""Images from outside: each either has the result that is written down, or one clear line."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.refusals import Said, refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures import headers, images
from vzip.runtime.pictures.images import MAX_ENCODED_BYTES, MAX_PIXELS, is_animated, load_image


def noise(width: int = 31, height: int = 24, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    pixels: bytes = b"",
    extra: bytes = b"",
) -> bytes:
    """Return a PNG written by hand, so that its header can say anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def rejected(source: Any, **said: Said) -> None:
    """Expect that a source is refused, by an error whose fields say this, and nothing is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with refused(InvalidInputError, **said):
            load_image(source)


EMPTY = ((0, 5), (5, 0), (0, 0))


# ---- what comes in -------------------------------------------------------------------------------


def test_path_bytes_pil_and_array_agree(tmp_path: Path) -> None:
    array = noise()
    data = encoded(Image.fromarray(array), "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (path, str(path), data, Image.fromarray(array), array):
        image = load_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), array)


def test_upright_rgb_image_is_returned_as_it_is() -> None:
    image = Image.fromarray(noise())
    assert load_image(image) is image


def test_array_is_copied_and_grey_becomes_three_equal_channels() -> None:
    for array in (noise(), noise()[..., 0].copy()):
        before = array.copy()
        image = load_image(array)
        array[:] = 0
        expected = before if before.ndim == 3 else np.repeat(before[..., None], 3, axis=2)
        assert np.array_equal(np.asarray(image), expected)


def test_array_that_is_not_contiguous() -> None:
    array = noise()[::-2, ::3]
    assert np.array_equal(np.asarray(load_image(array)), array)


@pytest.mark.parametrize(
    ("array", "cure"),
    [
        (np.zeros((4, 5, 3), np.float32), "(array * 255).round()"),
        (np.zeros((4, 5, 3), np.int64), ".astype('uint8')"),
        (np.zeros((4, 5), bool), ".astype('uint8')"),
        (np.zeros((3, 8, 9), np.uint8), "array.transpose(1, 2, 0)"),
        (np.zeros((8, 9, 4), np.uint8), "array[..., :3]"),
        (np.zeros((8, 9, 1), np.uint8), "array[..., 0]"),
        (np.zeros((8, 9, 2), np.uint8), "axes"),
        (np.zeros((2, 8, 9, 3), np.uint8), "a list of images"),
        (np.zeros(9, np.uint8), "axes"),
    ],
    ids=lambda value: str(value.shape) if isinstance(value, np.ndarray) else "",
)
def test_array_of_another_dtype_or_layout(array: np.ndarray[Any, Any], cure: str) -> None:
    rejected(
        array,
        got=(f"{array.dtype}", f"{list(array.shape)}"),
        expected=("uint8 [H, W, 3]", "[H, W]"),
        cure=cure,
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        *((np.zeros((h, w, 3), np.uint8), {"got": f"{w}×{h}"}) for w, h in EMPTY),
        *((np.zeros((h, w), np.uint8), {"got": f"{w}×{h}"}) for w, h in EMPTY),
        *((Image.new("RGB", size), {"got": "{}×{}".format(*size)}) for size in EMPTY),
        *((png(*size), {"got": "PNG"}) for size in EMPTY),
        (None, {"got": "NoneType", "expected": "uint8 numpy array"}),
        (7, {"got": "int"}),
        ([1], {"got": "list"}),
        (bytearray(b"x"), {"got": "bytearray"}),
        (io.BytesIO(), {"got": "_io.BytesIO"}),
        ("", {"got": "empty path"}),
        ("a\0b.png", {"got": "null"}),
        ("x" * 5000 + ".png", {"got": "File name too long"}),
        ("a\nb.png", {"got": r"'a\nb.png'"}),
        (Path(__file__).parent, {"got": "folder", "expected": "image file"}),
        (Path(__file__) / "picture.png", {"got": "Not a directory"}),
        (b"", {"got": "empty"}),
    ],
)  # fmt: skip
def test_what_is_no_image(source: Any, said: dict[str, Said]) -> None:
    rejected(source, **said)


# ---- paths ---------------------------------------------------------------------------------------


def test_missing_file_names_the_place_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rejected("no/such.jpg", got=("'no/such.jpg'", str(tmp_path / "no" / "such.jpg")))


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the system say so in its place

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "open", refuse)
    rejected(path, got="Permission denied", cure="permissions")


def test_named_pipe_and_device_are_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)  # opening it would wait for a writer that never comes
    for path in (pipe, Path("/dev/zero")):
        rejected(path, got="device, pipe or socket")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.jpg",
        "HTTP://example.org/a.jpg",
        "file:///tmp/a.jpg",
        "s3://bucket/a.jpg",
        "data:image/png;base64,iVBORw0KGgo=",
        Path("https://example.org/a.jpg"),
    ],
)
def test_url_is_refused_and_nothing_is_opened(
    url: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    rejected(url, got="URL", expected="local file")


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_formats_of_the_whitelist(name: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(name, {})
    image = Image.fromarray(noise())
    data = encoded(image, name, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(load_image(data)), expected)
    if name in {"PNG", "BMP", "WEBP"}:
        assert np.array_equal(expected, noise())


@pytest.mark.parametrize("name", ["TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "EPS", "PDF"])
def test_formats_that_pillow_knows_and_we_refuse(name: str) -> None:
    try:
        data = encoded(Image.fromarray(noise()), name)
    except (OSError, KeyError):  # this Pillow was built without it: then its first bytes do
        data = b"\0\0\0\x0cjP  \r\n\x87\n"
    rejected(data, got=repr(data[:12]), expected="JPEG, PNG, WEBP, BMP, GIF")


def test_wrong_extension_is_read_by_content(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    assert np.array_equal(np.asarray(load_image(path)), noise())


def test_files_without_an_image_in_them(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    for content, got in (("<html>404 not found</html>", "b'<html>404 no'"), ("", "empty")):
        path.write_text(content)
        rejected(path, got=got)


# ---- size ----------------------------------------------------------------------------------------

WIDTH, HEIGHT = 60000, 50000  # 12 GB if they were believed
WEBP_WIDTH, WEBP_HEIGHT = 16383, 12345  # WebP's header has no room for more


def bombs() -> dict[str, bytes]:
    """Return small files whose headers announce huge images."""
    jpeg = encoded(Image.fromarray(noise()), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    jpeg = jpeg[: frame + 5] + struct.pack(">HH", HEIGHT, WIDTH) + jpeg[frame + 9 :]
    bmp = encoded(Image.fromarray(noise()), "BMP")
    bmp = bmp[:18] + struct.pack("<ii", WIDTH, HEIGHT) + bmp[26:]
    gif = encoded(Image.fromarray(noise()[..., 0]), "GIF")
    screen = gif[:6] + struct.pack("<HH", WIDTH, HEIGHT) + gif[10:]
    first = gif.index(b",", 13 + 3 * 256)
    frame_of_gif = gif[: first + 5] + struct.pack("<HH", WIDTH, HEIGHT) + gif[first + 9 :]
    alpha = Image.fromarray(noise(channels=4))
    canvas = encoded(alpha, "WEBP")
    assert canvas[12:16] == b"VP8X"
    sides = [(side - 1).to_bytes(3, "little") for side in (WEBP_WIDTH, WEBP_HEIGHT)]
    canvas = canvas[:24] + b"".join(sides) + canvas[30:]
    lossless = encoded(Image.fromarray(noise()), "WEBP", lossless=True)
    assert lossless[12:16] == b"VP8L"
    bits = (WEBP_HEIGHT - 1) << 14 | (WEBP_WIDTH - 1)
    lossless = lossless[:21] + bits.to_bytes(4, "little") + lossless[25:]
    lossy = encoded(Image.fromarray(noise()), "WEBP")
    assert lossy[12:16] == b"VP8 "
    lossy = lossy[:26] + struct.pack("<HH", WEBP_WIDTH, WEBP_HEIGHT) + lossy[30:]
    return {
        "png": png(WIDTH, HEIGHT, pixels=b"\0" * 1000),
        "jpeg": jpeg,
        "bmp": bmp,
        "gif screen": screen,
        "gif frame": frame_of_gif,
        "webp canvas": canvas,
        "webp lossless": lossless,
        "webp lossy": lossy,
    }


@pytest.mark.parametrize("name", list(bombs()))
@pytest.mark.parametrize("pillow_limit", [None, 10, 89478485])
def test_bomb_is_refused_from_its_header(
    name: str, pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow's own limit is the application's: nothing here hangs on it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)

    def refuse(*args: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    width, height = (WEBP_WIDTH, WEBP_HEIGHT) if name.startswith("webp") else (WIDTH, HEIGHT)
    rejected(bombs()[name], got=f"{width}×{height} = {width * height}", expected=f"{MAX_PIXELS}")
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_bombs_stay_small_in_memory(tmp_path: Path) -> None:
    for index, data in enumerate(bombs().values()):
        (tmp_path / str(index)).write_bytes(data)
    # Each time a fresh process: the largest size that a process ever had can't be reset.
    code = f"""
import resource
from pathlib import Path
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.images import _plugin, load_image
_plugin("PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        load_image(path)
    except InvalidInputError:
        continue
    raise SystemExit(f"{{path}} was loaded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30_000  # KiB


def test_cap_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 31 * 24)
    for source in (noise(), Image.fromarray(noise()), encoded(Image.fromarray(noise()), "PNG")):
        assert load_image(source).size == (31, 24)
    monkeypatch.setattr(images, "MAX_PIXELS", 31 * 24 - 1)
    for source in (noise(), Image.fromarray(noise()), encoded(Image.fromarray(noise()), "PNG")):
        rejected(source, got="31×24 = 744", expected="743")


def test_pillows_limit_does_not_stop_a_small_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("PNG", "JPEG", "BMP"):
            assert load_image(encoded(Image.fromarray(noise()), name)).size == (31, 24)


@pytest.mark.parametrize("kind", [Image.DecompressionBombError, Image.DecompressionBombWarning])
def test_pillows_bomb_error_is_ours(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise kind("Image size (744 pixels)\nexceeds limit of 20 pixels")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    said: Said = ("JPEG", "Image size (744 pixels) exceeds limit")
    rejected(encoded(Image.fromarray(noise()), "JPEG"), got=said, cure="MAX_IMAGE_PIXELS")


def test_lazy_pil_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    image = Image.open(io.BytesIO(png(WIDTH, HEIGHT)))
    rejected(image, expected=f"{MAX_PIXELS}")


def test_encoded_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with path.open("wb") as file:
        file.truncate(MAX_ENCODED_BYTES + 1)  # a sparse file: it takes no room
    rejected(path, got=f"{MAX_ENCODED_BYTES + 1} bytes", expected=f"{MAX_ENCODED_BYTES}")


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_truncation_is_refused_or_changes_nothing(name: str) -> None:
    data = encoded(Image.fromarray(noise()), name)
    whole = np.asarray(load_image(data))
    # What may be lost is what comes after the pixels: a trailer, a last row's padding.
    for length in range(len(data) - 20):
        rejected(data[:length])
    rejected(data[: len(data) // 2], got=name, cause="truncated", cure="save it again")
    for length in range(len(data) - 20, len(data)):
        with contextlib.suppress(InvalidInputError):
            assert np.array_equal(np.asarray(load_image(data[:length])), whole)


def test_truncated_or_closed_pil_image(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    closed = Image.open(path)
    closed.close()
    rejected(closed, got="PIL image")
    data = path.read_bytes()
    rejected(Image.open(io.BytesIO(data[: len(data) // 2])), got="PIL image")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_damaged_bytes_never_raise_anything_else(name: str) -> None:
    rng = np.random.default_rng(7)
    whole = np.frombuffer(encoded(Image.fromarray(noise()), name, exif=exif(6)), np.uint8)
    for _ in range(300):
        data = whole.copy()
        places = rng.integers(0, rng.choice([40, 120, len(data)]), 3) % len(data)
        data[places] = rng.integers(0, 256, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about EXIF
            with contextlib.suppress(InvalidInputError):
                assert load_image(data.tobytes()).mode == "RGB"


# ---- extras: it is the pixels that count ---------------------------------------------------------


def chunk(name: bytes, data: bytes = b"", *, damaged: bool = False) -> bytes:
    checksum = zlib.crc32(name + data) ^ damaged
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def with_chunk(added: bytes, *, behind: bool = False) -> bytes:
    """Return a PNG of `noise` with one chunk more, ahead of the pixels or behind them."""
    data = encoded(Image.fromarray(noise()), "PNG")
    place = len(data) - 12 if behind else data.index(b"IDAT") - 4
    return data[:place] + added + data[place:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


UNREADABLE = (b"not a TIFF header", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40, b"")


@pytest.mark.parametrize("block", UNREADABLE)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Possibly corrupt EXIF")
def test_exif_that_no_reader_understands_turns_nothing(block: bytes) -> None:
    """As in a JPEG, so in a PNG and a WebP, and in a PIL image that the caller opened."""
    image = Image.fromarray(noise())
    jpeg = encoded(image, "JPEG")
    for source in (
        with_chunk(chunk(b"eXIf", block)),
        with_chunk(chunk(b"eXIf", b"Exif\0\0" + block), behind=True),
        encoded(image, "WEBP", lossless=True, exif=b"Exif\0\0" + block),
        Image.open(io.BytesIO(with_chunk(chunk(b"eXIf", block)))),
    ):
        assert np.array_equal(np.asarray(load_image(source)), noise())
    for rest in (jpeg[2:], jpeg[20:]):  # with and without JFIF's segment
        data = jpeg[:2] + segment(0xE1, b"Exif\0\0" + block) + rest
        assert np.array_equal(np.asarray(load_image(data)), np.asarray(load_image(jpeg)))


def test_exif_is_read_as_far_as_it_can_be() -> None:
    """An orientation that is there counts, though what follows it is damaged."""
    block = exif(6).tobytes()[6:]
    entries = int.from_bytes(block[8:10], "big")
    assert entries == 1
    block = block[:8] + b"\0\2" + block[10:22] + b"\x82\x9a\0\2\xff\xff\xff\xff\xff\xff\xff\xff"
    image = Image.fromarray(noise())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in (
            with_chunk(chunk(b"eXIf", block)),
            encoded(image, "WEBP", lossless=True, exif=b"Exif\0\0" + block),
        ):
            assert np.array_equal(np.asarray(load_image(data)), np.rot90(noise(), -1))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "added",
    [
        chunk(b"iCCP", b"junk"),
        chunk(b"iCCP", b"name\0\0junk"),
        chunk(b"iCCP", b"name\0\5junk"),
        chunk(b"zTXt", b"name\0\5junk"),
        chunk(b"iTXt", b"name\0\1\5\0\0junk"),
        chunk(b"tEXt", b"Raw profile type exif\0\n\n\nno hexadecimal number"),
        chunk(b"tEXt", b"Title\0a", damaged=True),
        chunk(b"tIME", b"x", damaged=True),
        chunk(b"bKGD", b"", damaged=True),
        *(chunk(name, b"") for name in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL")),
    ],
    ids=lambda added: added[4:].hex()[:16],
)
def test_what_is_no_pixel_of_a_png_may_be_damaged(added: bytes, behind: bool) -> None:
    assert np.array_equal(np.asarray(load_image(with_chunk(added, behind=behind))), noise())


def test_what_is_no_pixel_may_be_damaged_and_the_orientation_counts() -> None:
    block = chunk(b"eXIf", exif(6).tobytes()[6:])
    data = with_chunk(block + chunk(b"pHYs", b""))
    assert np.array_equal(np.asarray(load_image(data)), np.rot90(noise(), -1))


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\3\1junk"),
        (0xE2, b"MPF\0junk"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\xff\xff\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0junk"),
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe"),
        (0xFE, b""),
    ],
)
def test_what_is_no_pixel_of_a_jpeg_may_be_damaged(marker: int, content: bytes) -> None:
    jpeg = encoded(Image.fromarray(noise()), "JPEG")
    data = jpeg[:2] + segment(marker, content) + jpeg[2:]
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(load_image(jpeg)))


@pytest.mark.parametrize("channels", [3, 4])
def test_what_is_no_pixel_of_a_webp_may_be_damaged(channels: int) -> None:
    image = Image.fromarray(noise(channels=channels))
    data = encoded(image, "WEBP", lossless=True, exif=exif(6), icc_profile=b"no profile")
    upright = np.rot90(np.asarray(load_image(image)), -1)
    assert np.array_equal(np.asarray(load_image(data)), upright)
    start = data.index(b"EXIF")
    for damaged in (
        data[: start + 12],
        data[: start + 4] + b"\xf0\xff\xff\xff" + data[start + 8 :],
        data[: start + 4] + b"\xff\xff\xff\x7f" + data[start + 8 :],
    ):
        found = np.asarray(load_image(damaged))
        assert np.array_equal(found, np.asarray(load_image(image)))  # nothing says how it is turned
    rejected(data[: start - 30], got="WEBP", cause="truncated")


def test_damage_to_pixels_is_still_damage() -> None:
    for data in (
        with_chunk(chunk(b"tRNS", b"")),
        with_chunk(chunk(b"pHYs", b""))[:-60],
    ):
        rejected(data, got="PNG", cause="corrupt")


LARGE = zlib.compress(bytes(2**20 + 1))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("added", "what"),
    [
        (chunk(b"iCCP", b"icc\0\0" + LARGE), ("colour profile", "iCCP")),
        (chunk(b"zTXt", b"Comment\0\0" + LARGE), ("text", "zTXt 'Comment'")),
        (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + LARGE), ("text", "adobe.xmp'")),
    ],
)
def test_a_large_text_or_colour_profile_is_named(
    added: bytes, what: tuple[str, ...], behind: bool
) -> None:
    said: Said = (*what, "1048576 bytes")
    rejected(with_chunk(added, behind=behind), got=said, expected="1048576", cure="without it")


def test_a_text_of_a_mebibyte_is_read() -> None:
    for added in (
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20))),
        chunk(b"tEXt", b"Comment\0" + b"x" * (2**20 + 9)),
        chunk(b"iTXt", b"Comment\0\0\0\0\0" + b"x" * (2**20 + 9)),
    ):
        assert np.array_equal(np.asarray(load_image(with_chunk(added))), noise())


# ---- what keeps a decoder busy -------------------------------------------------------------------


def scans_of(width: int, height: int, count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated, `count` scans in all."""
    data = encoded(Image.new("RGB", (width, height), "gray"), "JPEG", progressive=True)
    first = data.count(b"\xff\xda")
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * (count - first) + data[-2:]


def never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)


@pytest.mark.parametrize("count", [101, 20_000])
def test_scans_of_a_jpeg_are_counted_before_decoding(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_image(scans_of(64, 48, 100)).size == (64, 48)
    data = scans_of(64, 48, count)
    never_decoded(monkeypatch)
    rejected(data, got="more than 100 scans", expected="at most 100")
    rejected(Image.open(io.BytesIO(data)), got="more than 100 scans")


def test_a_large_jpeg_may_have_fewer_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_SCANNED", 64 * 48 * 20)
    assert load_image(scans_of(64, 48, 20)).size == (64, 48)
    data = scans_of(64, 48, 21)
    never_decoded(monkeypatch)
    for source in (data, Image.open(io.BytesIO(data))):
        rejected(source, got="21 scans", expected=("at most 20", "64×48"))


def test_scans_end_where_the_picture_does() -> None:
    """What a phone appends (a film, another picture) is none of its scans."""
    data = encoded(Image.fromarray(noise()), "JPEG") + scans_of(64, 48, 150) * 2
    assert load_image(data).size == (31, 24)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (lambda: jpeg_ahead(segment(0xE5, b"") * 2**17), "131072 segments"),
        (lambda: jpeg_ahead(b"\xff" * 2**17), "131072 segments"),
        (lambda: jpeg_ahead(segment(0xE1, b"Exif\0\0" + bytes(65000)) * 600), "33554432 bytes"),
        (lambda: with_chunk(chunk(b"IDAT") * 2**17), "131072 chunks"),
        (lambda: with_chunk(chunk(b"teSt") * 2**17, behind=True), "131072 chunks"),
        (lambda: with_chunk(chunk(b"iCCP", b"a\0\0" + zlib.compress(b"")) * 257), "256 packed"),
        (lambda: gif_ahead(b"!\xfe" + b"\1x" * 2**17 + b"\0"), "131072 blocks"),
        (lambda: gif_ahead(b"!\xfe\0" * 2**16), "131072 blocks"),
        (lambda: gif_ahead(b"\0" * 2**17), "131072 blocks"),
    ],
    ids=[
        "segments",
        "fill",
        "exif",
        "idat",
        "behind",
        "profiles",
        "comment",
        "extensions",
        "zeros",
    ],
)
def test_blocks_are_counted_before_decoding(
    data: Callable[[], bytes], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = data()

    def refuse(*_: Any) -> None:
        raise AssertionError("Pillow got it")

    monkeypatch.setattr(ImageFile.ImageFile, "__init__", refuse)
    rejected(made, got=got, expected="at most", cause="busy")


def test_blocks_behind_the_pixels_of_a_lazy_image_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = with_chunk(chunk(b"teSt") * 2**17, behind=True)
    lazy = Image.open(io.BytesIO(data))
    large = Image.open(io.BytesIO(with_chunk(chunk(b"zTXt", b"a\0\0" + LARGE), behind=True)))
    never_decoded(monkeypatch)
    rejected(lazy, got="131072 chunks")
    rejected(large, got="zTXt 'a'")


def jpeg_ahead(added: bytes) -> bytes:
    data = encoded(Image.fromarray(noise()), "JPEG")
    return data[:2] + added + data[2:]


def gif_ahead(added: bytes) -> bytes:
    data = encoded(Image.fromarray(noise()[..., 0]), "GIF")
    place = data.index(b",", 13 + 3 * 256)
    return data[:place] + added + data[place:]


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_that_refers_to_itself_is_bounded(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a thousand entries is all of the block: older versions of Pillow copy it for each."""

    def block(entries: int, size: int) -> bytes:
        table = b"".join(
            struct.pack(order + "HHII", 1000 + tag, 7, size, 8) for tag in range(entries)
        )
        head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, entries)
        return head + table + bytes(size)

    def carriers(exif: bytes) -> dict[str, bytes]:
        jpeg = encoded(Image.fromarray(noise()), "JPEG")
        parts = [exif[place : place + 65000] for place in range(0, len(exif), 65000)]
        header = b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)
        text = b"Raw profile type exif\0\nexif\n8\n" + exif.hex().encode()
        return {
            "jpeg": jpeg[:2] + header + jpeg[2:],
            "png": with_chunk(chunk(b"eXIf", exif)),
            "text": with_chunk(chunk(b"tEXt", text)),
            "webp": encoded(Image.fromarray(noise()), "WEBP", exif=b"Exif\0\0" + exif),
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in carriers(block(20, 30000)).values():
            assert load_image(data).size == (31, 24)

    def refuse(*_: Any) -> None:
        raise AssertionError("Pillow got it")

    made = carriers(block(1000, 200_000))
    monkeypatch.setattr(Image.Image, "getexif", refuse)
    for data in made.values():
        rejected(data, got="EXIF", expected=f"{2**24}")


def test_runs_of_a_bmp_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"BM" + bytes(8) + struct.pack("<II", 54 + 8, 40)
    head += struct.pack("<iiHHIIiiII", 4, 2, 1, 8, 1, 0, 0, 0, 2, 0)
    data = head + bytes([10, 20, 30, 0, 40, 50, 60, 0]) + b"\4\1\0\0\4\0\0\1"
    expected = [[[30, 20, 10]] * 4, [[60, 50, 40]] * 4]
    assert np.asarray(load_image(data)).tolist() == expected
    monkeypatch.setattr(headers, "MAX_RUNS", len(data))
    assert np.asarray(load_image(data)).tolist() == expected
    rejected(data + b"\0", got=f"{len(data) + 1} bytes in runs", expected=f"at most {len(data)}")
    large = data[:18] + struct.pack("<ii", 5000, -5000) + data[26:]  # a file of 70 bytes
    monkeypatch.undo()
    never_decoded(monkeypatch)
    for source in (large, Image.open(io.BytesIO(large))):
        rejected(source, got="25000000 pixels in runs", expected=f"{2**23}")


def test_strips_of_a_lazy_tiff_are_bounded() -> None:
    file = io.BytesIO(encoded(Image.fromarray(noise()), "TIFF"))
    assert np.array_equal(np.asarray(load_image(Image.open(file))), noise())
    image = Image.open(file)
    assert isinstance(image, ImageFile.ImageFile)
    image.tile = image.tile * 9  # every strip again and again
    rejected(image, got="9 tiles or strips")


def test_many_frames_cost_nothing() -> None:
    frames = [Image.new("RGB", (2, 2), (10, index, 0)) for index in range(3)]
    many: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 100}
    webp = encoded(frames[0], "WEBP", lossless=True, **many)
    start = webp.index(b"ANMF")
    end = start + 8 + int.from_bytes(webp[start + 4 : start + 8], "little")
    webp = webp[:start] + webp[start : end + end % 2] * 100_000
    webp = webp[:4] + struct.pack("<I", len(webp) - 8) + webp[8:]
    png = encoded(frames[0], "PNG", **many)
    start = png.rindex(b"fcTL") - 4  # of the last frame
    png = png[:start] + png[start:-12] * 100_000 + png[-12:]
    gif = encoded(frames[0], "GIF", **many)
    start = gif.rindex(b"!\xf9")
    gif = gif[:start] + gif[start:-1] * 100_000 + gif[-1:]
    for data in (webp, png, gif):
        assert load_image(data).getpixel((0, 0)) == (10, 0, 0)


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "BMP", "JPEG", "TIFF"])
def test_one_lazy_image_serves_many_threads(name: str) -> None:
    """Pillow decodes a PIL image when it is first needed, and has no lock around that."""
    options: dict[str, Any] = {} if name in ("GIF", "BMP") else {"exif": exif(6)}
    data = encoded(Image.fromarray(noise(310, 240)), name, **options)
    expected = np.asarray(load_image(Image.open(io.BytesIO(data))))
    assert expected.shape[:2] == ((310, 240) if options else (240, 310))
    together = threading.Barrier(8)

    def load(image: Image.Image) -> bool:
        together.wait()
        return np.array_equal(np.asarray(load_image(image)), expected)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            lazy = Image.open(io.BytesIO(data))
            assert all(pool.map(load, [lazy] * 8))


def test_locks_of_images_go_with_them() -> None:
    load_image(Image.open(io.BytesIO(encoded(Image.fromarray(noise()), "PNG"))))
    assert not images._LOCKS


# ---- the order of channels -----------------------------------------------------------------------


def test_opencvs_arrays_are_blue_first(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for blue_first in (
        noise()[..., ::-1],
        noise()[..., ::-1].copy(),
        cv2.imread(str(tmp_path / "a.png")),
    ):
        image = load_image(blue_first, channels="bgr")
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), noise())
    assert np.array_equal(np.asarray(load_image(noise(), channels="rgb")), noise())


def test_grey_has_no_order() -> None:
    grey = noise()[..., 0]
    assert load_image(grey, channels="bgr").tobytes() == load_image(grey).tobytes()


def test_blue_first_is_for_arrays_alone(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise()), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (path, str(path), data, Image.fromarray(noise())):
        with refused(InvalidInputError, got="channels='bgr'", expected="array", cure="leave"):
            load_image(source, channels="bgr")
    bgra = noise(channels=4)
    with refused(InvalidInputError, expected="BGR", cure=("[2, 1, 0, 3]", "[..., :3]")):
        load_image(bgra, channels="bgr")


@pytest.mark.parametrize("channels", ["BGR", "rgba", "", None, 3, ["bgr"]])
def test_channels_are_rgb_or_bgr(channels: Any) -> None:
    with refused(InvalidInputError, got=repr(channels), expected=("'rgb'", "'bgr'")):
        load_image(noise(), channels=channels)


# ---- modes ---------------------------------------------------------------------------------------


def test_alpha_is_composited_onto_white() -> None:
    array = np.zeros((2, 3, 4), np.uint8)
    array[0] = (200, 100, 0, 255)
    array[1, 0] = (200, 100, 0, 0)
    array[1, 1] = (200, 100, 0, 128)
    for source in (Image.fromarray(array), encoded(Image.fromarray(array), "PNG")):
        result = np.asarray(load_image(source))
        assert (result[0] == (200, 100, 0)).all()
        assert (result[1, 0] == 255).all()
        assert np.abs(result[1, 1].astype(int) - (227, 177, 127)).max() <= 1


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    data = encoded(image, "PNG", transparency=1)
    assert np.asarray(load_image(data)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    data = encoded(image, "PNG")
    assert np.asarray(load_image(data)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_rgb_with_a_transparent_colour() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    once = load_image(encoded(image, "PNG", transparency=(4, 5, 6)))
    assert np.asarray(once).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    # White is no transparent colour of the result, nor is (4, 5, 6) any more.
    assert np.array_equal(np.asarray(load_image(once)), np.asarray(once))


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    result = np.asarray(load_image(encoded(image, "JPEG", quality=95)))
    assert np.abs(result.astype(int) - (255, 0, 0)).max() <= 4


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert np.asarray(load_image(image))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_sixteen_bit_colour_png_keeps_the_high_byte() -> None:
    row = b"\0" + b"".join(struct.pack(">HHH", 256 * x + 7, 300, 65535) for x in range(4))
    result = np.asarray(load_image(png(4, 1, depth=16, pixels=row)))
    assert result.tolist() == [[[x, 1, 255] for x in range(4)]]


def test_sixteen_bit_grey_png_is_refused() -> None:
    # Pillow would clip at 255: all of this picture would be white.
    row = b"\0" + struct.pack(">4H", 1000, 2000, 30000, 65535)
    rejected(png(4, 1, depth=16, colour=0, pixels=row), got="mode I", expected="8 bits")


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "LAB"])
def test_pil_modes_without_a_known_range(mode: str) -> None:
    rejected(Image.new(mode, (4, 4)), got=f"mode {mode}", expected="8 bits")


def test_an_animation_gives_its_first_frame_and_an_open_one_its_current() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
        image = Image.open(io.BytesIO(data))
        assert getattr(image, "n_frames", 1) == 3
        assert (np.asarray(load_image(data)) == (255, 0, 0)).all(), name
        image.seek(2)
        assert (np.asarray(load_image(image)) == (0, 0, 255)).all(), name


@pytest.mark.parametrize(
    ("name", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_whether_an_image_is_animated(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    frames = [Image.fromarray(noise() // (1 + index)) for index in range(3)]
    path = tmp_path / "picture"
    for count in (1, 2, 3):
        more = {"save_all": True, "append_images": frames[1:count]} if count > 1 else {}
        path.write_bytes(encoded(frames[0], name, **options, **more))
        assert is_animated(path) is (count > 1)
        data = path.read_bytes()
        for length in range(0, len(data), 101):
            path.write_bytes(data[:length])
            assert is_animated(path) in (True, False)
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])
    assert not is_animated(path)
    assert not is_animated(tmp_path / "absent")
    assert not is_animated(tmp_path)


def test_blocks_behind_the_first_frame_are_bounded_too(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), colour) for colour in (1, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    second = data.rindex(b"!\xf9")
    (tmp_path / "a.gif").write_bytes(data[:second] + b"!\xfe\1x\0" * 100 + data[second:])
    assert is_animated(tmp_path / "a.gif")
    (tmp_path / "a.gif").write_bytes(data[:second] + b"!\xfe\1x\0" * 2**16 + data[second:])
    assert not is_animated(tmp_path / "a.gif")  # nobody looks that far


def test_multi_picture_jpeg_gives_its_first() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(load_image(data)).astype(int) - (255, 0, 0)).max() <= 4


# ---- orientation ---------------------------------------------------------------------------------

# What each EXIF value asks for, written with numpy and so independent of Pillow's names.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # not defined: left alone
}


@pytest.mark.parametrize("orientation", list(UPRIGHT))
@pytest.mark.parametrize("name", ["PNG", "WEBP"])
def test_exif_orientation(orientation: int, name: str) -> None:
    options = {"lossless": True} if name == "WEBP" else {}
    data = encoded(Image.fromarray(noise()), name, exif=exif(orientation), **options)
    expected = UPRIGHT[orientation](noise())
    for source in (data, Image.open(io.BytesIO(data))):
        once = load_image(source)
        assert np.array_equal(np.asarray(once), expected)
        # Used up: loading the result again must not turn it once more.
        assert np.array_equal(np.asarray(load_image(once)), expected)


def test_exif_orientation_of_jpeg() -> None:
    data = encoded(Image.fromarray(noise()), "JPEG", exif=exif(6))
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(load_image(data)), np.rot90(stored, -1))


def test_orientation_and_alpha_together() -> None:
    array = noise(channels=4)
    data = encoded(Image.fromarray(array), "PNG", exif=exif(8))
    plain = np.asarray(load_image(Image.fromarray(array)))
    assert np.array_equal(np.asarray(load_image(data)), np.rot90(plain, 1))


def test_the_callers_image_is_left_alone() -> None:
    image = Image.open(io.BytesIO(encoded(Image.fromarray(noise()), "PNG", exif=exif(6))))
    load_image(image)
    assert image.getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(image), noise())


# ---- draft decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        (None, (1003, 701)),
        (701, (1003, 701)),
        (351, (1003, 701)),  # a half would have 351 rows, but of whole ones only 350
        (350, (502, 351)),
        (176, (502, 351)),
        (175, (251, 176)),
        (87, (126, 88)),
        (1, (126, 88)),  # an eighth is the smallest
    ],
)
def test_a_draft_is_no_smaller_than_was_asked_for(
    draft: int | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    picture = Image.fromarray(noise(1003, 701)).resize((1003, 701), box=(0, 0, 6, 4))
    data = encoded(picture, "JPEG", quality=95)
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    image = load_image(path, draft=draft)
    assert image.mode == "RGB"
    assert image.size == expected
    assert np.array_equal(np.asarray(load_image(data, draft=draft)), np.asarray(image))
    full = np.asarray(load_image(path).resize(expected), np.int16)
    assert np.abs(full - np.asarray(image)).mean() < 2  # the same picture


def test_a_draft_is_upright() -> None:
    image = Image.new("RGB", (320, 160), "red")
    image.paste("blue", (0, 0, 160, 160))
    data = encoded(image, "JPEG", exif=exif(6).tobytes())  # a quarter turn clockwise
    draft = load_image(data, draft=40)
    assert draft.size == (40, 80)
    assert [draft.getpixel((20, y))[2] > 200 for y in (5, 75)] == [True, False]


def test_a_drafts_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph of 108 megapixels is read with a draft, as it is in small here."""
    data = encoded(Image.new("RGB", (1200, 900), "teal"), "JPEG")
    monkeypatch.setattr(images, "MAX_PIXELS", 1200 * 900 * 64 // 108)
    monkeypatch.setattr(images, "MAX_DRAFTED", 1200 * 900)
    assert load_image(data, draft=112).size == (150, 113)
    assert load_image(data, draft=450).size == (600, 450)
    rejected(data, got="1200×900 = 1080000", cure="draft=")
    with refused(InvalidInputError, got="1200×900 = 1080000"):
        load_image(data, draft=451)  # leaves all pixels
    progressive = encoded(Image.new("RGB", (1200, 900), "teal"), "JPEG", progressive=True)
    with refused(InvalidInputError, got="1200×900", expected=f"{1200 * 900 // 2}"):
        load_image(progressive, draft=112)  # its decoder would hold all of it
    monkeypatch.setattr(images, "MAX_DRAFTED", 1200 * 900 - 1)
    with refused(InvalidInputError, got="1200×900", expected=f"{1200 * 900 - 1}"):
        load_image(data, draft=112)


def test_a_draft_of_108_megapixels() -> None:
    data = encoded(Image.new("RGB", (12000, 9000), "teal"), "JPEG")
    assert load_image(data, draft=672).size == (1500, 1125)


def test_a_bomb_is_one_with_a_draft_too() -> None:
    with refused(InvalidInputError, got="60000×50000"):
        load_image(bombs()["jpeg"], draft=336)


def test_other_formats_have_no_draft() -> None:
    array = noise(160, 160)
    for source in (encoded(Image.fromarray(array), "PNG"), Image.fromarray(array), array):
        assert np.array_equal(np.asarray(load_image(source, draft=20)), array)


@pytest.mark.parametrize("draft", [0, -1, True, 336.0, "336"])
def test_a_draft_is_a_number_of_pixels(draft: Any) -> None:
    with refused(InvalidInputError, got=f"draft = {draft!r}", expected="positive"):
        load_image(noise(), draft=draft)
