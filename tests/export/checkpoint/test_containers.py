from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vzip.export.checkpoint.containers import read_index, read_json, read_tensors, tensor_names
from vzip.runtime.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def write(path: Path, state: Any = None) -> Path:
    state = STATE if state is None else state
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["t.safetensors", "t.bin"])
def test_reading(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    assert tensor_names(path) == set(STATE)
    tensors = read_tensors(path, ["b"])
    assert list(tensors) == ["b"]
    assert tensors["b"].dtype == torch.float16
    assert torch.equal(read_tensors(path, ["a.weight"])["a.weight"], STATE["a.weight"])


def test_old_pickles_that_are_no_zip_read_too(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(path, ["a.weight"])["a.weight"], STATE["a.weight"])


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors")
    tensor = read_tensors(path, ["a.weight"])["a.weight"]
    path.unlink()
    assert torch.equal(tensor, STATE["a.weight"])


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.bin"
    torch.save({"a": torch.ones(1), "b": Evil()}, path)
    with pytest.raises(
        CheckpointError, match=r"can't be loaded with weights_only=True .* run code"
    ):
        tensor_names(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match=r"can't be loaded with weights_only=True"):
        tensor_names(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["t.safetensors", "t.bin"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"rubbish" * 9, b"\xff" * 64, "half", "no tail"])
def test_damage_is_one_line(name: str, content: bytes | str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    whole = path.read_bytes()
    cut = {"half": whole[: len(whole) // 2], "no tail": whole[:-3]}
    path.write_bytes(content if isinstance(content, bytes) else cut[content])
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path, ["b"])
    text = str(caught.value)
    assert str(path) in text
    assert "damaged" in text
    assert "\n" not in text


def test_an_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, .* git lfs pull"):
        tensor_names(path)


def test_what_is_no_tensor_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"t\.bin does not exist"):
        tensor_names(tmp_path / "t.bin")
    with pytest.raises(CheckpointError, match=r"expected \.safetensors or \.bin"):
        tensor_names(tmp_path / "t.gguf")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="holds a list, expected a dict of tensors"):
        tensor_names(tmp_path / "list.bin")


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'c' that its index places there"):
        read_tensors(path, ["b", "c"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is no valid JSON"),
        (b"\xff\xfe", "is no valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_json_faults(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/b", "a\\b", "", 3])
def test_an_index_that_leaves_its_folder(file: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"good": "x.safetensors", "bad": file}}))
    with pytest.raises(
        CheckpointError, match=r"places the tensor 'bad' in .*, expected a file name"
    ):
        read_index(path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_what_is_no_index(content: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="has no 'weight_map'"):
        read_index(path)
