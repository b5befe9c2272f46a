"""Files of tokens, held against the real safetensors package and numpy."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, load_file, save_file

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.tensor_header import LARGEST_HEADER
from vzip.runtime.tokens.file import (
    ImageTokens,
    Origin,
    TokenFile,
    header,
    record_of,
    to_bytes,
    write_tokens,
)
from vzip.runtime.tokens.job import _write_npy_header

ORIGIN = Origin("ab" * 32, "models/ü", "an order", 5, 32000)


def images(dtype: type) -> list[ImageTokens]:
    rng = np.random.default_rng(1)
    return [
        ImageTokens(name, "s" * 64, rng.normal(size=(n, 5)).astype(dtype), kept)
        for name, n, kept in (
            ("a.jpg", 3, np.array([[0, 4, 9]], np.int64)),
            ('sub/"quoted" \\ ü 字.png', 7, np.arange(6, dtype=np.int64).reshape(2, 3)),
            ("none", 0, np.zeros((1, 0), np.int64)),
        )
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_package_reads_what_we_write(tmp_path, dtype):
    path = tmp_path / "t.safetensors"
    path.write_bytes(to_bytes(ORIGIN, images(dtype)))
    found = load_file(path)
    assert len(found) == 6
    for each in images(dtype):
        assert found[f"tokens/{each.name}"].dtype == dtype
        np.testing.assert_array_equal(found[f"tokens/{each.name}"], each.tokens)
        np.testing.assert_array_equal(found[f"kept/{each.name}"], each.kept)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["fingerprint"] == ORIGIN.fingerprint
    assert [each["name"] for each in json.loads(metadata["images"])] == [
        each.name for each in images(dtype)
    ]


def test_the_package_reads_a_file_without_images():
    assert load(to_bytes(ORIGIN, [])) == {}


def test_we_read_what_the_package_writes(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    ours.write_bytes(to_bytes(ORIGIN, images(np.float32)))
    with safe_open(ours, framework="numpy") as file:
        save_file(load_file(ours), theirs, metadata=file.metadata())
    with TokenFile.open(theirs) as file:
        for each in images(np.float32):
            np.testing.assert_array_equal(file.read(each.name).tokens, each.tokens)


@pytest.mark.parametrize("cut", [1, 40])
def test_the_package_refuses_what_we_refuse(tmp_path, cut):
    data = to_bytes(ORIGIN, images(np.float32))[:-cut]
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidInputError):
        TokenFile.open(path)
    with pytest.raises(Exception, match=r"(?i)incomplete|header|buffer"):
        load(data)


def test_the_largest_header_is_the_packages():
    for size, refused in ((LARGEST_HEADER, False), (LARGEST_HEADER + 1, True)):
        data = size.to_bytes(8, "little") + b"{}" + b" " * (size - 2)
        if refused:
            with pytest.raises(Exception, match=r"(?i)too ?large"):
                load(data)
        else:
            assert load(data) == {}


def test_numpy_reads_an_array():
    tokens, kept = np.full((2, 5), 3, np.float16), np.zeros((1, 2), np.int64)
    both = [ImageTokens(name, "s", tokens, kept) for name in "ab"]
    file = io.BytesIO()
    _write_npy_header(file, [record_of(each) for each in both])
    write_tokens(file, both)
    file.seek(0)
    found = np.load(file, allow_pickle=False)
    assert (found.dtype, found.shape) == (np.float16, (2, 2, 5))
    np.testing.assert_array_equal(found, np.stack([each.tokens for each in both]))


def test_headers_of_many_images_stay_within_what_is_reckoned():
    """`outputs_of` refuses by a bound: it must not be below what a header really takes."""
    from vzip.runtime.tokens.job import _HEADER_PER_IMAGE

    record = record_of(
        ImageTokens("x", "s" * 64, np.zeros((9999, 5), np.float32), np.zeros((99, 999), np.int64))
    )
    names = [f"{number:05}" + "n" * 200 for number in range(500)]
    text = header(ORIGIN, [type(record)(**{**vars(record), "name": name}) for name in names])
    assert len(text) <= sum(3 * len(name) + _HEADER_PER_IMAGE for name in names)
