"""The doors: where foreign input comes in, sound inputs of each, and how they are spoilt.

A door is a function that is given an empty folder, makes what it needs there, and returns a
function that draws one input and returns what takes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz import mutations
from tests.fuzz.mutations import TEXTS
from tests.places import GOLDEN

Trial = Callable[[], object]
Draw = Callable[[random.Random], Trial]
Door = Callable[[Path], Draw]

DOORS: dict[str, Door] = {}


def door(table: dict[str, Door]) -> Callable[[Door], Door]:
    def put(function: Door) -> Door:
        table[function.__name__] = function
        return function

    return put


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a folder the current one for as long."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def tiny(folder: Path) -> Path:
    """Return a copy of the golden bundle with all that a small bundle can hold."""
    from tests import bundles

    return bundles.with_newline(folder / "bundle", GOLDEN / "tiny_bundle")


def refresh(folder: Path, manifest: bytes | None = None) -> None:
    """Let a manifest have the sizes and digests of what is there, so that no digest is in the way.

    Args:
        folder: The bundle.
        manifest: What to write where JSON of it can't be changed.
    """
    path = folder / "manifest.json"
    value = json.loads(path.read_bytes())
    for name in value["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            value["files"][name] = entry
    path.write_bytes(manifest or json.dumps(value).encode())


class Spoilt:
    """A folder of files of which one or two at a time are spoilt.

    Args:
        folder: The folder, whole.
        names: Files that are spoilt; those that come twice are, as often.
        plain: Whether they stay plain files.
    """

    def __init__(self, folder: Path, names: list[str], *, plain: bool = False) -> None:
        self.folder, self._names, self._plain = folder, names, plain
        self._whole = {name: (folder / name).read_bytes() for name in names}
        self._last: list[str] = []

    def draw(self, rng: random.Random) -> list[str]:
        """Restore what was spoilt the last time, spoil others and return which."""
        for name in self._last:
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(self._whole[name])
        self._last = [rng.choice(self._names) for _ in range(rng.choice((1, 1, 2)))]
        for name in dict.fromkeys(self._last):
            self._spoil(rng, name)
        return self._last

    def _spoil(self, rng: random.Random, name: str) -> None:
        path, kind = self.folder / name, rng.random()
        if kind < 0.94 or self._plain:
            path.write_bytes(mutations.of_name(name)(rng, self._whole[name]))
            return
        path.unlink()
        kinds: list[Callable[[], object]] = [
            lambda: None,
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/proc/self/mem"),
            lambda: path.write_bytes(b""),
        ]
        rng.choice(kinds)()


# ── bundles ─────────────────────────────────────────────────────────────────────────────────────


@door(DOORS)
def a_manifest(folder: Path) -> Draw:
    from vzip.runtime.bundle.manifest import Manifest

    del folder
    data = (GOLDEN / "tiny_bundle/manifest.json").read_bytes()

    def draw(rng: random.Random) -> Trial:
        made = mutations.json_bytes(rng, data)
        return lambda: Manifest.from_bytes(made)

    return draw


@door(DOORS)
def a_bundle(folder: Path) -> Draw:
    from vzip.runtime import VisionEncoder
    from vzip.runtime.bundle.reader import read_bundle

    bundle = tiny(folder)
    picture = np.zeros((16, 16, 3), np.uint8)
    names = ["manifest.json", "model.onnx.data", "image_newline.npy"]
    spoilt = Spoilt(bundle, [*names, "manifest.json"])

    def draw(rng: random.Random) -> Trial:
        changed = spoilt.draw(rng)
        verify = rng.random() < 0.5
        sound = all(
            stat.S_ISREG(os.lstat(bundle / each).st_mode)
            for each in names
            if os.path.lexists(bundle / each)
        )
        sound = sound and "manifest.json" not in changed
        if sound and rng.random() < 0.7:
            refresh(bundle)
        asked = rng.choice((None, None, "fastest", "int8", *TEXTS))

        def trial() -> None:
            found = read_bundle(bundle, verify=verify)
            with VisionEncoder.open(found, "onnxruntime", precision=asked) as encoder:
                encoder.image_tokens(picture)
            found.newline()

        def then() -> None:
            try:
                trial()
            finally:
                (bundle / "manifest.json").exists()

        return then

    return draw


@door(DOORS)
def a_bundles_name(folder: Path) -> Draw:
    from vzip.runtime import VisionEncoder, open_llm
    from vzip.runtime.bundle.reader import read_bundle

    del folder

    def draw(rng: random.Random) -> Trial:
        text, other = rng.choice(TEXTS), rng.choice(TEXTS)
        good = GOLDEN / "tiny_bundle"
        return rng.choice(
            (
                lambda: read_bundle(text),
                lambda: read_bundle(Path(text), verify=False),
                lambda: VisionEncoder.open(text),
                lambda: VisionEncoder.open(good, backend=text),
                lambda: VisionEncoder.open(good, engine=text),
                lambda: VisionEncoder.open(good, precision=text),
                lambda: open_llm(text, other),
            )
        )

    return draw


@door(DOORS)
def an_engine(folder: Path) -> Draw:
    from tests.golden import make_tiny_bundle  # noqa: F401 - says what the bundle is
    from vzip.runtime.backends import cpu_engine
    from vzip.runtime.backends.tensorrt import engine_file
    from vzip.runtime.bundle.engine_record import EngineRecord
    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.files import codec

    bundle = tiny(folder)
    manifest = Manifest.from_bytes((bundle / "manifest.json").read_bytes())
    (bundle / "engines").mkdir()
    data = b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + bytes(200)
    record: dict[str, Any] = {
        "stack": "tensorrt", "version": "10.3.0.26", "sm": ["87"], "gpu": "Orin",
        "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data),
        "model_sha256": manifest.files["model.onnx"].sha256, "precision": "fp32",
    }  # fmt: skip

    def draw(rng: random.Random) -> Trial:
        made = mutations.damaged(rng, data) if rng.random() < 0.5 else data
        changed = json.loads(json.dumps(record))
        changed["sha256"], changed["bytes"] = hashlib.sha256(made).hexdigest(), len(made)
        text = mutations.json_value(rng, changed)
        path = bundle / "engines" / "built.engine"
        path.write_bytes(made)

        def trial() -> None:
            try:
                value = codec.parse(text) if len(text) < 10_000 else changed
            except ValueError:  # its callers say which file it is
                return
            with codec.reading("manifest.json"):
                read = codec.read(EngineRecord, value)
            full = Bundle(bundle, dataclasses.replace(manifest, engines={"built": read}))
            engine_file.unfit(full, "built")
            if read.cpu is None:
                engine_file.read_engine(full, "built")
            else:
                cpu_engine.read_engine(full, "built")

        return trial

    return draw


@door(DOORS)
def a_bundles_reference(folder: Path) -> Draw:
    from vzip.runtime.agreement import read_reference
    from vzip.runtime.bundle.manifest import Manifest

    del folder
    manifest = Manifest.from_bytes((GOLDEN / "tiny_bundle/manifest.json").read_bytes())
    rows, columns = manifest.tower.grid
    arrays = {
        "input": np.zeros((2, *manifest.input.shape[1:]), manifest.input.dtype),
        "kept": np.zeros((2, manifest.selection.dominant), np.int64),
        "scores": np.zeros((2, rows * columns), np.float32),
        "embeds": np.zeros((2, *manifest.embeds.shape[1:]), np.float32),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)

    def draw(rng: random.Random) -> Trial:
        made = mutations.npz(rng, file.getvalue())
        return lambda: read_reference(io.BytesIO(made), manifest)

    return draw


@door(DOORS)
def an_llms_settings(folder: Path) -> Draw:
    from vzip.runtime.llm.llm_files import Settings
    from vzip.runtime.llm.prompts import llava_15_words

    del folder
    data = Settings(
        words=llava_15_words(), placeholders={"image": 4}, bos="<s>", eos="</s>", eos_id=2,
        eos_ids=(2,), context=512, hidden_size=64, vocabulary=320, layers=2, kv_heads=1,
        head_size=32, dtype="float32",
    ).to_bytes()  # fmt: skip

    def draw(rng: random.Random) -> Trial:
        made = mutations.json_bytes(rng, data)
        return lambda: Settings.from_bytes(made)

    return draw


# ── pictures and videos ─────────────────────────────────────────────────────────────────────────


def encoded_pictures() -> dict[str, bytes]:
    """Return one picture in every form that is read, and in some odd ones."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 50
    forms: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (rgb, "PNG", {"exif": exif}),
        "grey.png": (rgb.convert("L"), "PNG", {"transparency": 3}),
        "palette.png": (rgb.convert("P"), "PNG", {"transparency": b"\0\1"}),
        "animated.png": (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "jpg": (rgb, "JPEG", {"exif": exif}),
        "progressive.jpg": (rgb, "JPEG", {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), "JPEG", {}),
        "webp": (rgb, "WEBP", {"exif": exif}),
        "animated.webp": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "lossless.webp": (rgb, "WEBP", {"lossless": True}),
        "bmp": (rgb, "BMP", {}),
        "gif": (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
    }
    made = {}
    for name, (image, form, options) in forms.items():
        file = io.BytesIO()
        image.save(file, form, **options)
        made[name] = file.getvalue()
    return made


@door(DOORS)
def an_encoded_picture(folder: Path) -> Draw:
    from vzip.runtime.pictures.images import load_image
    from vzip.runtime.tokens.cache import image_digest, read_image

    pictures = encoded_pictures()
    path = folder / "picture"

    def draw(rng: random.Random) -> Trial:
        name = rng.choice(list(pictures))
        made = mutations.of_name(name)(rng, pictures[name])
        path.write_bytes(made)
        draft = rng.choice((None, None, 8, 336))

        def lazily() -> None:
            try:
                image = Image.open(io.BytesIO(made))
            except Exception:  # noqa: BLE001 - Pillow's own door
                return
            load_image(image)

        return rng.choice(
            (
                lambda: load_image(made, draft=draft),
                lambda: load_image(path, draft=draft),
                lambda: image_digest(read_image(path)),
                lazily,
            )
        )

    return draw


def odd_array(rng: random.Random) -> Any:
    """Return an array, picture or other value that may stand in a picture's place."""
    dtypes = ("u1", "i1", "u2", "f2", "f4", "f8", "c8", "?", "O", "U3", "S2", "M8[s]", "V4", "i8")
    shapes = (
        (), (0,), (5,), (4, 4), (0, 4), (4, 0, 3), (4, 4, 3), (4, 4, 1), (4, 4, 4), (3, 4, 4),
        (1, 4, 4, 3), (0, 0, 0), (1, 1, 1, 1, 1), (2**15, 1, 3), (16, 16, 3), (1, 3, 16, 16),
        (2, 16, 16, 3), (4, 16, 16, 3),
    )  # fmt: skip
    array = np.zeros(rng.choice(shapes), rng.choice(dtypes))
    kind = rng.randrange(8)
    if kind == 0 and array.dtype.kind == "f":
        array = array + rng.choice((np.nan, np.inf, 1e30, -1))
    if kind == 1:
        array = np.asfortranarray(array)
    if kind == 2 and array.ndim > 1:
        array = array[::-1, ::2]
    if kind == 3:
        array = np.broadcast_to(np.uint8(7), rng.choice(((2**14, 2**14, 3), (2**40, 2**10, 3))))
    if kind == 4:
        array = np.ma.masked_array(array, mask=True)
    if kind == 5:
        mode = rng.choice(("1", "L", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA",
                           "La", "RGBa", "I;16", "PA", "RGBX"))  # fmt: skip
        image = Image.new(mode, rng.choice(((0, 0), (1, 1), (5, 4), (16, 16), (0, 5), (3000, 1))))
        image.info = rng.choice(({}, {"transparency": mutations.hostile(rng)}, {"exif": b"x"}))
        if rng.random() < 0.2:
            image.close()
        return image
    if kind == 6:
        return rng.choice((None, 3, 0.5, True, {}, object(), io.BytesIO(b"x"), [], [[]], b"", "",
                           bytearray(b"x"), memoryview(b"x"), np.uint8(3), *TEXTS))  # fmt: skip
    return array


@door(DOORS)
def a_picture_in_memory(folder: Path) -> Draw:
    from vzip.runtime import VisionEncoder
    from vzip.runtime.pictures.images import load_image
    from vzip.runtime.pictures.video import is_video, sample_frames
    from vzip.runtime.tokens.cache import TokenCache, cached_image_embeds, image_digest

    encoder = VisionEncoder.open(GOLDEN / "tiny_bundle", "onnxruntime")
    static = VisionEncoder.open(GOLDEN / "tiny_static_bundle", "onnxruntime")
    cache = TokenCache(folder / "cache")

    def draw(rng: random.Random) -> Trial:
        one, other = odd_array(rng), odd_array(rng)
        draft = rng.choice((None, 8, 0, -1, 2**70, 1.5))
        count = rng.choice((1, 8, 0, -1, 2**70, 10**400, 1.5, None))
        array = one if isinstance(one, np.ndarray) else np.zeros((1, 16, 16, 3), np.uint8)
        text = rng.choice(TEXTS)
        return rng.choice(
            (
                lambda: load_image(one, draft=draft),
                lambda: encoder.encode(one),
                lambda: encoder.encode([one, other]),
                lambda: encoder.image_tokens(one),
                lambda: encoder.video_embeds(one),
                lambda: encoder.video_embeds([one, other]),
                lambda: encoder.run(array),
                lambda: static.run(array),
                lambda: static.encode([one]),
                lambda: sample_frames(one, count),
                lambda: sample_frames([one, other], count),
                lambda: load_image(text),
                lambda: is_video(text),
                lambda: sample_frames(text),
                lambda: image_digest(one),
                lambda: cached_image_embeds(encoder, one, cache),
            )
        )

    return draw


@door(DOORS)
def a_video(folder: Path) -> Draw:
    import av

    from vzip.runtime.pictures import video, video_opencv, video_pyav

    seeds = []
    for ending, codec in (
        (".mp4", "mpeg4"),
        (".avi", "mjpeg"),
        (".mkv", "mpeg4"),
        (".ts", "mpeg2video"),
    ):
        path = folder / f"clip{ending}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 32, 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(6):
                pixels = np.full((32, 32, 3), number * 40, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode())
        seeds.append((ending, path.read_bytes()))

    def draw(rng: random.Random) -> Trial:
        ending, data = rng.choice(seeds)
        path = folder / f"damaged{ending}"
        path.write_bytes(mutations.damaged(rng, data))
        reader = rng.choice((video_pyav.read, video_opencv.read))

        def trial() -> None:
            before, video._reader = video._reader, lambda: reader
            try:
                video.sample_frames(path, 3)
            finally:
                video._reader = before

        return trial

    return draw


# ── tokens on disk ──────────────────────────────────────────────────────────────────────────────


def _tokens() -> tuple[Any, list[Any]]:
    from vzip.runtime.bundle.manifest import Manifest
    from vzip.runtime.tokens.cache import origin_of
    from vzip.runtime.tokens.file import ImageTokens

    manifest = Manifest.from_bytes((GOLDEN / "tiny_bundle/manifest.json").read_bytes())
    origin = origin_of(manifest)
    width = manifest.llm.hidden_size
    images = [
        ImageTokens(name, hashlib.sha256(name.encode()).hexdigest(),
                    np.ones((7, width), np.float32), np.zeros((1, 4), np.int64))
        for name in ("a.png", "b/c.png")
    ]  # fmt: skip
    return origin, images


@door(DOORS)
def a_token_file(folder: Path) -> Draw:
    from vzip.runtime.tokens.file import TokenFile, to_bytes

    origin, images = _tokens()
    (folder / "tokens.safetensors").write_bytes(to_bytes(origin, images))
    spoilt = Spoilt(folder, ["tokens.safetensors"])

    def draw(rng: random.Random) -> Trial:
        spoilt.draw(rng)
        name = rng.choice(("a.png", *TEXTS))
        path = rng.choice((folder / "tokens.safetensors",) * 9 + (rng.choice(TEXTS),))

        def trial() -> None:
            with TokenFile.open(path) as file:
                for each in file.records:
                    file.read(each)
                file.read(name)

        return trial

    return draw


@door(DOORS)
def tokens_to_write(folder: Path) -> Draw:
    from vzip.runtime.tokens.file import ImageTokens, to_bytes

    del folder
    origin, images = _tokens()

    def draw(rng: random.Random) -> Trial:
        array = odd_array(rng)
        array = array if isinstance(array, np.ndarray) else np.zeros((2, 6), np.float32)
        name = rng.choice(TEXTS)
        one = rng.choice(
            (
                ImageTokens(name, images[0].sha256, images[0].tokens, images[0].kept),
                ImageTokens("a", name, images[0].tokens, images[0].kept),
                ImageTokens("a", images[0].sha256, array, images[0].kept),
                ImageTokens("a", images[0].sha256, images[0].tokens, array),
            )
        )
        return lambda: to_bytes(origin, [one, images[1]])

    return draw


@door(DOORS)
def a_token_cache(folder: Path) -> Draw:
    from vzip.runtime.tokens.cache import TokenCache

    origin, images = _tokens()
    cache = TokenCache(folder / "cache", limit=5000)
    image = (
        dataclasses.replace(images[0], name=images[0].sha256)
        if dataclasses.is_dataclass(images[0])
        else images[0]._replace(name=images[0].sha256)
    )
    cache.put(origin, image)
    entry = cache.path(image.sha256, origin.fingerprint)
    whole = entry.read_bytes()

    def things(rng: random.Random) -> None:
        """Put something else in the entry's place, or in the folder's."""
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
        kinds: list[Callable[[], object]] = [
            lambda: entry.write_bytes(mutations.safetensors(rng, whole)),
            lambda: entry.write_bytes(mutations.safetensors(rng, whole)),
            lambda: entry.write_bytes(mutations.safetensors(rng, whole)),
            entry.mkdir,
            lambda: os.mkfifo(entry),
            lambda: entry.symlink_to(entry.name),
            lambda: entry.symlink_to("/dev/zero"),
        ]
        rng.choice(kinds)()

    def draw(rng: random.Random) -> Trial:
        things(rng)
        text = rng.choice(TEXTS)
        limit = rng.choice((None, 0, -1, 1, 2**70, 10**400))
        place = folder / text if rng.random() < 0.5 and "\0" not in text else text
        wrong = image._replace(tokens=odd_array(rng)) if hasattr(image, "_replace") else image

        def elsewhere() -> None:
            with inside(folder):
                TokenCache(place, limit=limit)

        return rng.choice(
            (
                lambda: cache.get(image.sha256, origin.fingerprint),
                lambda: cache.get(text, origin.fingerprint),
                lambda: cache.put(origin, image),
                lambda: cache.put(origin, wrong),
                lambda: cache.remove(image.sha256, text),
                lambda: cache.remove(image.sha256, origin.fingerprint),
                cache.fingerprints,
                elsewhere,
            )
        )

    return draw


# ── LLMs ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def socket_server() -> Iterator[tuple[str, list[bytes]]]:
    """Serve whatever bytes the list holds to every connection, one after the other."""
    listener = socket.create_server(("127.0.0.1", 0))
    answers: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(2)
                connection.recv(65536)
                connection.sendall(answers.pop(0) if answers else b"")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", answers
    finally:
        listener.close()


def http(body: bytes, kind: str = "application/json", status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


@door(DOORS)
def a_servers_answer(folder: Path) -> Draw:
    from vzip.runtime.llm.server.vllm import VllmServer
    from vzip.runtime.llm.shown import TokenSpec

    del folder
    spec = TokenSpec(count=7, hidden_size=6, image_token_id=4)
    rows = np.zeros((spec.count, spec.hidden_size), np.float32)
    stack = contextlib.ExitStack()
    url, answers = stack.enter_context(socket_server())
    models = {"object": "list", "data": [{"id": "demo", "object": "model"}]}
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "An é answer"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    error = {"error": {"message": "no such thing", "type": "x", "code": 400}}

    def draw(rng: random.Random) -> Trial:
        status = rng.choice(("200 OK", "200 OK", "400 \x1b[2J", "404 Not Found", "500 X", "307 Go",
                             "999 ?", "99999 x", "-1 x"))  # fmt: skip
        kind = rng.choice(("application/json", "text/event-stream", "text/html", "\xff", "", ";;"))
        page = mutations.json_value(rng, rng.choice((models, error)))
        listing, asked = http(dump(models)), True
        if rng.random() < 0.4:
            listing = http(page, kind, status)
        if rng.random() < 0.2:
            listing = mutations.damaged(rng, listing)
        lines = [b"data: " + dump(each) for each in events]
        place = rng.randrange(len(lines))
        if rng.random() < 0.7:
            lines[place] = b"data: " + mutations.json_value(rng, events[place])
        else:
            lines[place] = mutations.damaged(rng, lines[place])
        body = b"\n\n".join([*lines, b"data: [DONE]", b""])
        answer = http(body, "text/event-stream")
        if rng.random() < 0.3:
            answer = http(page, kind, status)
        if rng.random() < 0.2:
            answer = mutations.damaged(rng, answer)
        answers[:] = [listing, answer]
        question = rng.choice(("what?", *TEXTS))

        def trial() -> None:
            llm = VllmServer(url, spec)
            if asked:
                llm.ask(rows, question)

        return trial

    return draw


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


@door(DOORS)
def a_servers_address(folder: Path) -> Draw:
    from vzip.runtime.llm.opening import parse
    from vzip.runtime.llm.server.http_client import Client
    from vzip.runtime.models import locate

    del folder
    hosts = (
        "127.0.0.1:9", "[::1]:9", "localhost:9", "127.0.0.1:", "127.0.0.1:70000", "[::1", "a b",
        "xn--a", "é" * 70, "a" * 300, "..", "*.x", "127.0.0.1:-1", "127.0.0.1:٣",
    )  # fmt: skip

    def draw(rng: random.Random) -> Trial:
        text = rng.choice(TEXTS)
        url = rng.choice(("http://", "https://", "HTTP://", "ftp://", "")) + rng.choice(
            (*hosts, text)
        )
        url += rng.choice(("", "", "/v1", text))
        keys = [each for each in TEXTS if not {"\0", mutations.SURROGATE} & {*each}]
        key = rng.choice(("", "k", *keys))

        def ask() -> None:
            os.environ["VZIP_FUZZ_KEY"] = key
            client = Client("fuzz", url, "VZIP_FUZZ_KEY")
            if "9" in url and "127" in url:  # nobody listens there
                client.get("/v1/models")

        runner = rng.choice(("vllm", "sglang", "trtllm", "llama.cpp", "onnxruntime", text))
        return rng.choice((ask, ask, lambda: parse(f"{runner}:{text}"), lambda: parse(text),
                           lambda: locate(text)))  # fmt: skip

    return draw


@door(DOORS)
def a_tokenizer(folder: Path) -> Draw:
    from vzip.runtime.llm.json_tokenizer import JsonTokenizer
    from vzip.runtime.llm.prompts import Prompts, llava_15_words

    del folder
    import tokenizers

    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace("x", "y")]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(["what is the shape of it?"] * 3, trainer)
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    data = trained.to_str().encode()

    def draw(rng: random.Random) -> Trial:
        made = mutations.json_bytes(rng, data) if rng.random() < 0.9 else data
        question = rng.choice(("what is it?", "<image>", "</s>" * 50, *TEXTS))
        eos = rng.choice(("</s>", "</s>", "</s>", *TEXTS))

        def trial() -> None:
            tokenizer = JsonTokenizer(made, bos="<s>", eos=eos, needed_for="x", extra="y")
            prompts = Prompts("fuzz", tokenizer, llava_15_words(), {"image": 4})
            ids = prompts.first(question)
            prompts.later(question)
            prompts.decode(ids)
            prompts.decode([0, 2**31, 5])

        return trial

    return draw


@door(DOORS)
def a_question(folder: Path) -> Draw:
    from vzip.runtime.llm import check_max_new_tokens, check_question
    from vzip.runtime.llm.shown import TokenSpec, check_shown

    del folder
    spec = TokenSpec(count=7, hidden_size=6, image_token_id=4)

    def draw(rng: random.Random) -> Trial:
        text, one = rng.choice(TEXTS), odd_array(rng)
        number = rng.choice((0, -1, 2**70, 10**400, 1))
        frames = rng.choice((None, None, 0, 1, 3, -1, 2**70, 1.5, True))
        several = rng.choice((one, [one], [one, odd_array(rng)], [], ()))
        return rng.choice(
            (
                lambda: check_question("fuzz", text),
                lambda: check_max_new_tokens("fuzz", number),
                lambda: check_shown(
                    "fuzz", several, frames=frames, tokens=spec, hidden_size=spec.hidden_size,
                    takes_videos=False, largest=65504.0,
                ),
            )
        )  # fmt: skip

    return draw


# ── outputs and names ───────────────────────────────────────────────────────────────────────────


@door(DOORS)
def an_outputs_name(folder: Path) -> Draw:
    from vzip.runtime.files import outputs
    from vzip.runtime.tokens import job

    origin, _ = _tokens()

    def draw(rng: random.Random) -> Trial:
        text = rng.choice(TEXTS) + rng.choice(("", ".png", ".safetensors", "/x.png"))
        path = rng.choice((Path(text), folder / text, folder / "x" / text))
        size = rng.choice((None, 1, 2**70, 3))
        images = [(rng.choice(TEXTS), path)] * rng.choice((1, 3))

        def store() -> None:
            with job.work_store(path, origin):
                pass

        def there() -> None:
            with inside(folder):
                chosen()

        chosen: Trial = rng.choice(
            (
                lambda: outputs.check_file(path, ".png"),
                lambda: outputs.check_folder(path),
                lambda: outputs.write_file(path, b"x"),
                lambda: outputs.write_folder(path, {text: b"x"}) if text[:1] not in "./" else None,
                lambda: job.find_images([path], folder / "out.safetensors"),
                lambda: job.outputs_of(images, path, size),
                lambda: job.check_origin([job.Output(path, images, shard=False)], origin),
                store,
            )
        )
        # Nothing may be written outside of the folder.
        return there if not text.startswith(("/", "..", "~", "//", "C:")) else (lambda: None)

    return draw


# ── the machine ─────────────────────────────────────────────────────────────────────────────────


@door(DOORS)
def a_machines_files(folder: Path) -> Draw:
    """What /proc, /sys and /etc hold is read for reports and for threads: oddities are left out."""
    from vzip.runtime.machine import process, record, sensors

    trees = json.loads((GOLDEN / "jetson_trees.json").read_text("utf-8"))
    groups = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    all_spoilt = []
    for name in ("orin_nano", "thor"):
        files = {path.lstrip("/"): text for path, text in trees[name].items()} | groups
        for path, text in files.items():
            place = folder / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text or "", "utf-8")
        all_spoilt.append(Spoilt(folder / name, sorted(files), plain=True))

    def draw(rng: random.Random) -> Trial:
        spoilt = rng.choice(all_spoilt)
        for name in spoilt.draw(rng):
            path = spoilt.folder / name
            if rng.random() < 0.7:
                text = rng.choice(TEXTS).encode(errors="surrogatepass")
                path.write_bytes(text + rng.choice((b"", b"\n", b" 100000\n")))
        root = spoilt.folder

        def trial() -> None:
            for read in (
                sensors.jetson, sensors.memory, sensors.power, sensors.temperatures,
                sensors.gpu_clocks, sensors.cpu_clocks, sensors.processor, sensors.instructions,
                sensors.governor, sensors.distribution, process.cores, process.physical_cores,
                process.threads, process.quota, record.state,
            ):  # fmt: skip
                read(root)

        return trial

    return draw
