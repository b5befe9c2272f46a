"""Files of tokens: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.tokens.file import ImageTokens, Origin, TokenFile, to_bytes

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


def test_the_bytes_of_a_small_file() -> None:
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
def test_what_was_written_is_read(tmp_path: Path, dtype: type) -> None:
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
        with pytest.raises(InvalidInputError, match=r"got the image name 'b', expected one of"):
            file.read("b")


def test_arrays_in_any_memory_order_are_written_in_one(tmp_path: Path) -> None:
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
def test_refuses_other_arrays(tokens: Any, kept: Any) -> None:
    text = r"expected float32 or float16 \[n, L\] and int64 \[tiles, dominant\]; give them as"
    with pytest.raises(InvalidInputError, match=text):
        to_bytes(ORIGIN, [ImageTokens("a", "s", tokens, kept)])


def test_refuses_names_that_collide_or_are_no_text() -> None:
    with pytest.raises(InvalidInputError, match="got two images with the name 'a/b'"):
        to_bytes(ORIGIN, [image("a/b"), image("a/b", seed=1)])
    with pytest.raises(InvalidInputError, match="expected Unicode text; rename the file"):
        to_bytes(ORIGIN, [image("\udcff")])


def test_refuses_a_header_that_readers_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vzip.runtime.tokens.file.LARGEST_HEADER", 300)
    with pytest.raises(InvalidInputError, match="expected at most 300 in one file; write shards"):
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
    ("change", "text"),
    [
        (lambda data: b"", "its 0 bytes are no safetensors file"),
        (lambda data: b"\xff" * 40, "its 40 bytes are no safetensors file"),
        (lambda data: data[:-1], "bytes where its header speaks of"),
        (lambda data: data + b"x", "bytes where its header speaks of"),
        (lambda data: join(b"{'a'}   ", b""), "its header is no strict JSON"),
        (lambda data: join(b'{"a":1,"a":1}', b""), "its header is no strict JSON"),
        (lambda data: join(b"[" * 100_000, b""), "its header is no strict JSON"),
        (lambda data: join(b"[ ]", b""), "its header is no object"),
        (lambda data: join(b"{}", b""), "it doesn't say 'vzip-tokens'"),
        (metadata(format="pt"), "it doesn't say 'vzip-tokens'"),
        (metadata(version="2"), "its version is '2' and not '1'"),
        (metadata(extra="1"), "its metadata is not the texts"),
        (metadata(model=1), "its metadata is not the texts"),
        (metadata(hidden_size="six"), "its metadata can't be understood"),
        (metadata(images="7"), "its metadata can't be understood"),
        (metadata(images='[{"name":"a"}]'), "its metadata can't be understood"),
        (metadata(images='[["name","sha256","digest"]]'), "its metadata can't be understood"),
        (metadata(images='[{"name":"a","sha256":"s","digest":1}]'), "can't be understood"),
        (metadata(images="[]"), r"its list of images doesn't have '(kept|tokens)/a'"),
        (metadata(hidden_size="7"), r"it has no tokens \[n, L\] for 'a'"),
        (tensor(dtype="BF16"), "the tensor 'tokens/a' can't be understood"),
        (tensor(shape="ab"), "the tensor 'tokens/a' can't be understood"),
        (tensor(shape=[-3, -6]), "the tensor 'tokens/a' doesn't lie where"),
        (tensor(shape=[3, 7]), "the tensor 'tokens/a' doesn't lie where"),
        (tensor(shape=[18]), r"it has no tokens \[n, L\] for 'a'"),
        (kept(shape=[4]), r"it has no kept indices \[tiles, dominant\] for 'a'"),
        (without_kept, r"it has no kept indices \[tiles, dominant\] for 'a'"),
        (tensor(data_offsets=[0, 72]), "the tensor 'tokens/a' doesn't lie where"),
        (tensor(data_offsets=[32]), "the tensor 'tokens/a' can't be understood"),
    ],
)
def test_refuses_what_is_no_file_of_tokens(
    tmp_path: Path, change: Callable[[bytes], bytes], text: str
) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(change(to_bytes(ORIGIN, [image("a")])))
    with pytest.raises(InvalidInputError, match=text) as caught:
        TokenFile.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [-1, -80])
def test_refuses_tokens_and_kept_indices_that_changed(tmp_path: Path, place: int) -> None:
    data = bytearray(to_bytes(ORIGIN, [image("a")]))
    data[place] ^= 1
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with (
        TokenFile.open(path) as file,
        pytest.raises(InvalidInputError, match="the tokens of 'a' are not those that were written"),
    ):
        file.read("a")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"can't be read \(No such file"):
        TokenFile.open(tmp_path / "t.safetensors")
