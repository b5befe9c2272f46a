"""The token cache: hits, misses, damage, room, several processes, and the bundle's fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import tiled, with_newline
from tests.faults import fill_disk
from tests.places import ROOT
from tests.refusals import refused
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.fingerprint import fingerprint
from vzip.runtime.bundle.manifest import FileEntry, Manifest
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.bundle.writer import update_manifest
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.tokens.cache import (
    TokenCache,
    cached_image_embeds,
    image_digest,
    origin_of,
    read_image,
)
from vzip.runtime.tokens.cached import CachedImages
from vzip.runtime.tokens.file import ImageTokens, Origin

ORIGIN = Origin("ab" * 32, "tests/tiny", "an order", 6, 7)
OTHER = dataclasses.replace(ORIGIN, fingerprint="cd" * 32)


def entry(number: int, count: int = 4) -> ImageTokens:
    tokens = np.full((count, 6), number, np.float32)
    return ImageTokens("any name", f"{number:064x}", tokens, np.arange(2, dtype=np.int64)[None])


def get(cache: TokenCache, number: int, origin: Origin = ORIGIN) -> ImageTokens | None:
    return cache.get(f"{number:064x}", origin.fingerprint)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def png(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


# The fingerprint


def changed(manifest: Manifest, record: str, **values: Any) -> Manifest:
    replaced = dataclasses.replace(getattr(manifest, record), **values)
    return dataclasses.replace(manifest, **{record: replaced})


def test_the_fingerprint_is_the_bundles_content_from_version_to_version(tiny_bundle):
    """Files that people wrote carry it: another value needs another VERSION."""
    moved = read_bundle(tiny_bundle.rename(tiny_bundle.parent / "x"))
    found = fingerprint(update_manifest(moved, parity={"passed": True}).manifest)
    assert found == "9335347d2bc0fc3e9d0594de3832b72a5d66e9c54f5220e3d880b4849b1ccf96"


SAME: list[Callable[[Manifest], Manifest]] = [
    lambda m: dataclasses.replace(m, parity={"passed": False}),
    lambda m: dataclasses.replace(m, versions={"torch": "9"}),
    lambda m: dataclasses.replace(m, media=("image",)),
    lambda m: changed(m, "model", id="elsewhere"),
    lambda m: dataclasses.replace(m, files={**m.files, "reference.npz": FileEntry("1" * 64, 5)}),
]
OTHERS: list[Callable[[Manifest], Manifest]] = [
    lambda m: changed(m, "preprocessing", mean=(0.5, 0.5, 0.4)),
    lambda m: changed(m, "selection", merge="sum"),
    *(
        lambda m, name=name: dataclasses.replace(  # type: ignore[misc]
            m, files={**m.files, name: FileEntry("1" * 64, 5)}
        )
        for name in ("model.onnx", "model.onnx.data", "image_newline.npy")
    ),
]


@pytest.mark.parametrize(
    ("change", "same"), [*((each, True) for each in SAME), *((each, False) for each in OTHERS)]
)
def test_what_changes_tokens_changes_the_fingerprint(tiny_bundle, change, same):
    manifest = read_bundle(tiny_bundle).manifest
    assert (fingerprint(change(manifest)) == fingerprint(manifest)) == same


# The folder


def test_gives_back_what_was_put(tmp_path):
    cache = TokenCache(tmp_path / "cache")
    assert get(cache, 1) is None
    cache.put(ORIGIN, entry(1))
    found = get(TokenCache(tmp_path / "cache"), 1)
    assert found is not None
    np.testing.assert_array_equal(found.tokens, entry(1).tokens)
    np.testing.assert_array_equal(found.kept, entry(1).kept)
    assert get(cache, 2) is None
    assert get(cache, 1, OTHER) is None
    cache.put(ORIGIN, dataclasses.replace(entry(2), sha256=entry(1).sha256))
    found = get(cache, 1)
    assert found is not None
    assert found.tokens[0, 0] == 2
    assert cache.fingerprints() == {ORIGIN.fingerprint}


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "image", "bundle"])
def test_a_damaged_entry_is_removed_and_counts_as_absent(tmp_path, damage):
    cache = TokenCache(tmp_path)
    cache.put(ORIGIN, entry(1))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    number, origin = 1, ORIGIN
    if damage == "bit":
        data[-5] ^= 4
    elif damage in ("cut", "empty"):
        del data[-4 if damage == "cut" else 0 :]
    path.unlink()
    if damage == "image":
        path, number = cache.path(f"{2:064x}", ORIGIN.fingerprint), 2
    elif damage == "bundle":
        path, origin = cache.path(f"{1:064x}", OTHER.fingerprint), OTHER
    path.write_bytes(data)
    assert get(cache, number, origin) is None
    assert names(tmp_path) == []


def test_the_entries_used_longest_ago_make_room(tmp_path):
    cache = TokenCache(tmp_path)
    cache.put(ORIGIN, entry(0))
    size = next(tmp_path.iterdir()).stat().st_size
    (tmp_path / "thesis.txt").write_bytes(b"x" * 10 * size)  # not ours
    cache = TokenCache(tmp_path, limit=3 * size)
    cache.put(ORIGIN, entry(1))
    cache.put(ORIGIN, entry(2))
    for age, number in enumerate((2, 1, 0)):
        path = cache.path(f"{number:064x}", ORIGIN.fingerprint)
        os.utime(path, (time.time() - 100 + age, time.time() - 100 + age))
    assert get(cache, 2) is not None  # the oldest, until now
    cache.put(ORIGIN, entry(3))
    assert [get(cache, number) is not None for number in range(4)] == [True, False, True, True]
    cache.put(ORIGIN, entry(3))  # in the place of itself
    assert [get(cache, number) is not None for number in range(4)] == [True, False, True, True]
    assert (tmp_path / "thesis.txt").exists()
    cache.put(ORIGIN, entry(4, count=1000))  # larger than the cache
    assert [get(cache, number) is not None for number in range(5)] == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_what_a_killed_writer_left_is_removed_in_time(tmp_path):
    old, new = tmp_path / ".a.1234.vzip-tmp", tmp_path / ".b.1234.vzip-tmp"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    TokenCache(tmp_path).put(ORIGIN, entry(1))
    assert (old.exists(), new.exists()) == (False, True)


def test_refuses_what_is_no_digest_or_no_folder(tmp_path):
    cache = TokenCache(tmp_path)
    with refused(InvalidInputError, got="../../etc", cure="image_digest"):
        cache.get("../../etc", ORIGIN.fingerprint)
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "a" / "b"):
        with refused(InvalidInputError, got=f"{path}: "):
            TokenCache(path)
    with refused(InvalidInputError, got="-1 bytes", expected="≥ 0"):
        TokenCache(tmp_path, limit=-1)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    fill_disk(monkeypatch)
    with refused(InvalidInputError, got="No space left", cure="free some space"):
        TokenCache(tmp_path).put(ORIGIN, entry(1))
    assert names(tmp_path) == []


STORM = """
import sys, numpy as np
from tests.runtime.tokens.test_cache import ORIGIN, entry, get
from vzip.runtime.tokens.cache import TokenCache
cache = TokenCache(sys.argv[1], limit=int(sys.argv[2]))
rng, hits = np.random.default_rng(int(sys.argv[3])), 0
print("ready", flush=True)
for step in range(int(sys.argv[4])):
    number = int(rng.integers(12))
    found = get(cache, number)
    if found is None:
        cache.put(ORIGIN, entry(number))
    else:
        hits += 1
        assert (found.tokens == number).all()
print(hits)
"""


def storm(folder: Path, seed: int, steps: int) -> subprocess.Popen[str]:
    arguments = [str(folder), str(8 * 1000), str(seed), str(steps)]
    return subprocess.Popen(
        [sys.executable, "-c", STORM, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_several_processes_share_a_folder_and_may_be_killed(tmp_path):
    endless = storm(tmp_path, 0, 10**9)
    others = [storm(tmp_path, seed, 200) for seed in (1, 2)]
    assert endless.stdout is not None
    assert endless.stdout.readline() == "ready\n"
    for other in others:
        out, _ = other.communicate(timeout=120)
        assert other.returncode == 0
        assert int(out.split()[-1]) > 0
    endless.send_signal(signal.SIGKILL)
    endless.communicate()
    cache = TokenCache(tmp_path, limit=8000)
    for number in range(12):
        found = get(cache, number)
        assert found is None or (found.tokens == number).all()
    cache.put(ORIGIN, entry(1))
    kept = [path for path in tmp_path.iterdir() if not path.name.endswith(".vzip-tmp")]
    assert sum(path.stat().st_size for path in kept) <= 8000


# Images


class Counting:
    """An encoder that counts."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.manifest, self.bundle = encoder.manifest, encoder.bundle
        self.calls, self._encoder, self.cpu_engine = 0, encoder, encoder.cpu_engine

    def image_tokens(self, image: Any, **options: Any) -> Any:
        self.calls += 1
        return self._encoder.image_tokens(image, **options)


@pytest.mark.parametrize("only_alone", [False, True])
def test_an_image_of_several_is_another_where_it_is_not_cut(tmp_path, tiny_bundle, only_alone):
    folder = with_newline(tmp_path / "b", tiny_bundle, tiled("reference", only_alone=only_alone))
    cache, data = TokenCache(tmp_path / "cache"), png()
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with VisionEncoder.open(folder, "onnxruntime") as opened:
        encoder: Any = Counting(opened)
        for several in (False, True, False, True):
            expected = opened.image_embeds(data, several=several)
            found = cached_image_embeds(encoder, data, cache, several=several)
            np.testing.assert_array_equal(found, expected)
        assert encoder.calls == 1 + only_alone
        alone = opened.image_embeds(data)
        assert (len(expected) < len(alone)) == only_alone
        for count, rows in ((1, len(alone)), (2, len(expected))):
            images = CachedImages([path] * count, opened.bundle, tmp_path / "cache")
            assert not images.missing
            assert [len(each.embeds) for each in images.encoded(None)] == [rows] * count
            images = CachedImages([path] * count, opened.bundle, None)
            assert [len(each.embeds) for each in images.encoded(opened)] == [rows] * count


def test_an_image_is_encoded_once(tmp_path, tiny_bundle):
    data = png()
    path = tmp_path / "a.png"
    path.write_bytes(data)
    cache = TokenCache(tmp_path / "cache")
    with VisionEncoder.open(tiny_bundle, "onnxruntime") as opened:
        encoder: Any = Counting(opened)
        expected = opened.image_embeds(path)
        for source in (data, path, str(path)):
            np.testing.assert_array_equal(cached_image_embeds(encoder, source, cache), expected)
        assert encoder.calls == 1
        stored = cache.get(image_digest(data), fingerprint(opened.manifest))
        assert stored is not None
        np.testing.assert_array_equal(stored.kept, opened.image_tokens(path).kept)
        decoded = Image.open(io.BytesIO(data))
        for pixels in (decoded, np.asarray(decoded)):
            np.testing.assert_array_equal(cached_image_embeds(encoder, pixels, cache), expected)
        assert encoder.calls == 2  # the pixels go by another name than the file
        cached_image_embeds(encoder, png(1), cache)
        assert encoder.calls == 3
        path.write_bytes(png(2))  # another picture under the same path
        found = cached_image_embeds(encoder, path, cache)
        np.testing.assert_array_equal(found, opened.image_embeds(png(2)))
        assert encoder.calls == 4
        with refused(InvalidInputError, got="none.png"):
            cached_image_embeds(encoder, tmp_path / "none.png", cache)
        with refused(InvalidInputError, got="https://a/b.png"):
            cached_image_embeds(encoder, "https://a/b.png", cache)


def test_an_image_goes_by_its_content():
    data = png()
    assert image_digest(data) == hashlib.sha256(data).hexdigest()
    tall, wide = np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)
    assert image_digest(tall) != image_digest(wide)
    assert image_digest(tall) == image_digest(Image.fromarray(tall))


def test_files_that_are_no_images_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refused(InvalidInputError, got="pipe'"):
        read_image(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**9)
    with refused(InvalidInputError, got=("large'", "1000000000 bytes")):
        read_image(tmp_path / "large")


def test_origin_is_the_manifests(tiny_bundle):
    manifest = read_bundle(tiny_bundle).manifest
    assert origin_of(manifest) == Origin(
        fingerprint(manifest), "tests/tiny", manifest.token_order, 6, 7
    )


def test_the_order_of_channels_is_part_of_what_an_array_goes_by(tmp_path, tiny_bundle):
    red_first = np.asarray(Image.open(io.BytesIO(png())).convert("RGB"))
    blue_first = red_first[..., ::-1]
    assert image_digest(blue_first, channels="bgr") == image_digest(red_first)
    assert image_digest(blue_first) != image_digest(red_first)
    cache = TokenCache(tmp_path / "cache")
    with VisionEncoder.open(tiny_bundle, "onnxruntime") as encoder:
        expected = encoder.image_embeds(red_first)
        wrong = cached_image_embeds(encoder, blue_first, cache)
        assert not np.array_equal(wrong, expected)
        found = cached_image_embeds(encoder, blue_first, cache, channels="bgr")
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(cached_image_embeds(encoder, red_first, cache), expected)
        for source in (png(), tmp_path / "none.png"):
            with refused(InvalidInputError, got="channels='bgr'"):
                cached_image_embeds(encoder, source, cache, channels="bgr")
        with refused(InvalidInputError, got="'gbr'"):
            image_digest(png(), channels="gbr")  # type: ignore[arg-type]
