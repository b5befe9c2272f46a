"""Files of tokens: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.tokens import file as token_file
from vzip.runtime.tokens.file import ImageTokens, Origin, TokenFile, to_bytes
from vzip.runtime.tokens.positions import UNKNOWN, Places

ORIGIN = Origin("ab" * 32, "tests/tiny", "an order", 6, -200)


def image(name: str, count: int = 3, dtype: type = np.float32, seed: int = 0) -> ImageTokens:
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(count, 6)).astype(dtype)
    return ImageTokens(name, f"{seed:064x}", tokens, np.arange(4, dtype=np.int64)[None] + seed)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def placed(name: str, places: Any, span: int | None, rows: int = 3) -> ImageTokens:
    """An image of one tile with its positions, and two merged tokens of three."""
    tokens = np.arange(rows * 6, dtype=np.float32).reshape(rows, 6)
    kept, positions = np.array([[4]], np.int64), np.array([[3, 0, 9]], np.int64)
    return ImageTokens(name, "5" * 64, tokens, kept, positions, Places(places, span))


def test_places_go_with_the_tokens_and_files_without_are_read(tmp_path):
    path = tmp_path / "t.safetensors"
    images = [
        placed("a", np.array([3, 0, 9], np.int64), 16),
        placed("shrunk", None, 16),
        ImageTokens("old", "6" * 64, np.ones((2, 6), np.float32), np.zeros((1, 1), np.int64)),
    ]
    path.write_bytes(to_bytes(ORIGIN, images))
    with TokenFile.open(path) as file:
        for image in images:
            read = file.read(image.name)
            assert read.digest == image.digest
            assert read.where.span == image.where.span
            for mine, theirs in zip(read.indices, image.indices, strict=True):
                np.testing.assert_array_equal(mine, theirs)
            assert read.encoded.where == read.where
    header, _ = split(path.read_bytes())
    assert header["__metadata__"]["version"] == "2"
    path.write_bytes(to_bytes(ORIGIN, images[2:]))  # what older versions write, and read
    assert split(path.read_bytes())[0]["__metadata__"]["version"] == "1"
    with TokenFile.open(path) as file:
        assert file.read("old").where == UNKNOWN
        assert file.read("old").positions is None


@pytest.mark.parametrize("places", [[3, 0, 16], [3, -1, 9], [3, 0]])
def test_places_out_of_the_span_are_neither_written_nor_read(tmp_path, places, monkeypatch):
    wrong = placed("a", np.array(places, np.int64), 16)
    with refused(InvalidInputError, expected="0 … 15"):
        to_bytes(ORIGIN, [wrong])
    monkeypatch.setattr(token_file, "check_places", lambda *_: None)
    path = tmp_path / "t.safetensors"
    path.write_bytes(to_bytes(ORIGIN, [wrong]))
    monkeypatch.undo()
    with refused(InvalidInputError), TokenFile.open(path) as file:
        file.read("a")


def test_the_bytes_of_a_small_file():
    tokens = np.array([[1, 2]], np.float32)
    data = to_bytes(
        Origin("f", "m", "o", 2, 7), [ImageTokens("a", "s", tokens, np.array([[5]], np.int64))]
    )
    header, body = split(data)
    assert body == bytes([5, 0, 0, 0, 0, 0, 0, 0]) + bytes([0, 0, 128, 63, 0, 0, 0, 64])
    metadata = header.pop("__metadata__")
    assert header == {
        "kept/a": {"dtype": "I64", "shape": [1, 1], "data_offsets": [0, 8]},
        "tokens/a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]},
    }
    (entry,) = json.loads(metadata.pop("images"))
    assert (entry["name"], entry["sha256"], len(entry["digest"])) == ("a", "s", 64)
    assert metadata == {
        "format": "vzip-tokens",
        "version": "1",
        "fingerprint": "f",
        "model": "m",
        "token_order": "o",
        "hidden_size": "2",
        "image_token_id": "7",
    }
    assert data[8:9] == b"{"
    assert (len(data) - len(body)) % 8 == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_was_written_is_read(tmp_path, dtype):
    tiles = ImageTokens("ü/b c.jpg", "2" * 64, np.ones((5, 6), dtype), np.zeros((3, 4), np.int64))
    bare = ImageTokens("none", "3" * 64, np.zeros((0, 6), dtype), np.zeros((1, 0), np.int64))
    images = [image("a", 2, dtype), tiles, bare]
    path = tmp_path / "t.safetensors"
    path.write_bytes(to_bytes(ORIGIN, images))
    with TokenFile.open(path) as file:
        assert file.origin == ORIGIN
        assert list(file.records) == ["a", "ü/b c.jpg", "none"]
        for each in reversed(images):
            found = file.read(each.name)
            assert (found.name, found.sha256) == (each.name, each.sha256)
            assert found.tokens.dtype == each.tokens.dtype
            np.testing.assert_array_equal(found.tokens, each.tokens)
            assert found.kept.dtype == np.int64
            np.testing.assert_array_equal(found.kept, each.kept)
        with refused(InvalidInputError, got=(str(path), "'b'"), expected="'a'"):
            file.read("b")


def test_arrays_in_any_memory_order_are_written_in_one(tmp_path):
    tokens = np.arange(12, dtype=np.float32).reshape(6, 2).T
    kept = np.arange(12, dtype=np.int64).reshape(4, 3).T
    data = to_bytes(ORIGIN, [ImageTokens("a", "s", tokens, kept)])
    assert split(data)[1] == kept.tobytes("C") + tokens.tobytes("C")


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (np.zeros((1, 2, 6), np.float32), np.zeros((1, 3), np.int64)),
        (np.zeros((2, 6), np.float64), np.zeros((1, 3), np.int64)),
        (np.zeros((2, 6), ">f4"), np.zeros((1, 3), np.int64)),
        (np.zeros((2, 6), np.float32), np.zeros((1, 3), np.int32)),
        (np.zeros((2, 6), np.float32), np.zeros(3, np.int64)),
        (np.zeros((2, 6), np.float32), np.zeros((1, 1, 3), np.int64)),
    ],
)
def test_refuses_other_arrays(tokens, kept):
    with refused(InvalidInputError, got=(str(tokens.dtype), str(kept.dtype)), expected="[n, L]"):
        to_bytes(ORIGIN, [ImageTokens("a", "s", tokens, kept)])


def test_refuses_names_that_collide_or_are_no_text():
    with refused(InvalidInputError, got="'a/b'"):
        to_bytes(ORIGIN, [image("a/b"), image("a/b", seed=1)])
    with refused(InvalidInputError, got=repr("\udcff"), expected="Unicode"):
        to_bytes(ORIGIN, [image("\udcff")])


def test_refuses_a_header_that_readers_would(monkeypatch):
    monkeypatch.setattr("vzip.runtime.tokens.file.LARGEST_HEADER", 300)
    with refused(InvalidInputError, got="1 image", expected="300", cure="--shard-size"):
        to_bytes(ORIGIN, [image("a")])


# Reading what isn't right


def spoil(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def spoiled(data: bytes) -> bytes:
        header, body = split(data)
        change(header)
        return join(header, body)

    return spoiled


def metadata(**values: object) -> Callable[[bytes], bytes]:
    return spoil(lambda header: header["__metadata__"].update(values))


def tensor(**values: object) -> Callable[[bytes], bytes]:
    return spoil(lambda header: header["tokens/a"].update(values))


def kept(**values: object) -> Callable[[bytes], bytes]:
    return spoil(lambda header: header["kept/a"].update(values))


def without_kept(data: bytes) -> bytes:
    header, body = split(data)
    begin, end = header.pop("kept/a")["data_offsets"]
    header["tokens/a"]["data_offsets"] = [begin, len(body) - end]
    return join(header, body[end:])


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: b"\xff" * 40, "40 bytes"),
        (lambda data: data[:-1], "'tokens/a', its shape or place is beyond the file"),
        (lambda data: data + b"x", "bytes where its header speaks of"),
        (lambda data: join(b"{'a'}   ", b""), "JSON"),
        (lambda data: join(b'{"a":1,"a":1}', b""), "JSON"),
        (lambda data: join(b"[" * 100_000, b""), "JSON"),
        (lambda data: join(b"[ ]", b""), "no object"),
        (lambda data: join(b"{}", b""), "'vzip-tokens'"),
        (metadata(format="pt"), "'pt'"),
        (metadata(version="3"), "'3'"),
        (metadata(extra="1"), "['extra']"),
        (metadata(model=1), "'model' is 1"),
        (metadata(hidden_size=6), "'hidden_size' is 6"),
        (metadata(hidden_size="six"), "'six'"),
        (spoil(lambda header: header["__metadata__"].pop("images")), "images"),
        (spoil(lambda header: header["__metadata__"].pop("model")), "['model']"),
        (metadata(images="7"), "metadata"),
        (metadata(images="{"), "metadata"),
        (metadata(images='[{"name":"a"}]'), "'[0]' lacks ['digest', 'sha256']"),
        (metadata(images='[["name","sha256","digest"]]'), "'[0]' is ["),
        (metadata(images='[{"name":"a","sha256":"s","digest":1}]'), "'[0].digest' is 1"),
        (metadata(images="[]"), "list of images"),
        (metadata(hidden_size="7"), "[n, L] for 'a'"),
        (tensor(dtype="BF16"), "'tokens/a' can't"),
        (tensor(shape="ab"), "'tokens/a' can't"),
        (tensor(shape=[-3, -6]), "'tokens/a' can't"),
        (tensor(shape=[3, True]), "'tokens/a' can't"),
        (tensor(shape=[3, 7]), "'tokens/a', its shape and place"),
        (tensor(shape=[2**53, 2**53]), "'tokens/a', its shape or place is beyond the file"),
        (tensor(shape=[2] * 100_000), "'tokens/a', its shape or place has too many numbers"),
        (tensor(shape=[1] * 9), "'tokens/a', its shape or place has too many numbers"),
        (tensor(shape=[10**1000, 1]), "'tokens/a' can't"),
        (tensor(shape=[2**50, 0], data_offsets=[32, 32]), "'tokens/a', its shape or place"),
        (tensor(data_offsets=[32, 10**1000]), "'tokens/a' can't"),
        (tensor(data_offsets=[104, 32]), "'tokens/a', its shape and place"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "no safetensors file"),
        (lambda data: (len(data) - 7).to_bytes(8, "little") + data[8:], "no safetensors file"),
        (metadata(hidden_size="0"), "'hidden_size' is 0"),
        (metadata(hidden_size="9" * 5000), "metadata"),
        (metadata(images="[" * 100_000), "metadata"),
        (tensor(shape=[18]), "[n, L] for 'a'"),
        (kept(shape=[4]), "[tiles, dominant] for 'a'"),
        (without_kept, "[tiles, dominant] for 'a'"),
        (tensor(data_offsets=[0, 72]), "'tokens/a' doesn't lie"),
        (tensor(data_offsets=[32]), "'tokens/a' can't"),
    ],
)
def test_refuses_what_is_no_file_of_tokens(tmp_path, change, got):
    path = tmp_path / "t.safetensors"
    path.write_bytes(change(to_bytes(ORIGIN, [image("a")])))
    with refused(InvalidInputError, got=(f"{path}: ", got), cure="encode") as raised:
        TokenFile.open(path)
    assert "\n" not in str(raised.value)


def test_a_file_of_nothing_takes_no_memory(tmp_path):
    """Its header and its size agree, and nothing of it lies on the disk."""
    header, _ = split(to_bytes(ORIGIN, [image("a")]))
    begin = header["tokens/a"]["data_offsets"][0]
    header["tokens/a"] |= {"shape": [2**30, 6], "data_offsets": [begin, begin + 24 * 2**30]}
    path = tmp_path / "t.safetensors"
    path.write_bytes(join(header, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + begin + 24 * 2**30)
    with refused(InvalidInputError, got=("'tokens/a'", f"{24 * 2**30} bytes"), cure="encode"):
        TokenFile.open(path)


@pytest.mark.parametrize("place", [-1, -80])
def test_refuses_tokens_and_kept_indices_that_changed(tmp_path, place):
    data = bytearray(to_bytes(ORIGIN, [image("a")]))
    data[place] ^= 1
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with (
        TokenFile.open(path) as file,
        refused(InvalidInputError, got=(str(path), "'a'"), cure="encode"),
    ):
        file.read("a")


def test_no_file(tmp_path):
    with refused(InvalidInputError, got="No such file"):
        TokenFile.open(tmp_path / "t.safetensors")
