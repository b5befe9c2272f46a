from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.refusals import Said, refused
from vzip.export.checkpoint.containers import read_index, read_tensors, tensor_names
from vzip.runtime.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


def write(path: Path, state: Any = None) -> Path:
    state = STATE if state is None else state
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["t.safetensors", "t.bin", "old.bin"])
def test_reading(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "old.bin":  # a pickle that is no zip
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    else:
        write(path)
    assert tensor_names(path) == set(STATE)
    tensors = read_tensors(path, ["b"])
    assert list(tensors) == ["b"]
    assert tensors["b"].dtype == torch.float16
    tensor = read_tensors(path, ["a.weight"])["a.weight"]
    path.unlink()  # which tensors outlive
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
    with refused(CheckpointError, got=("weights_only=True", "pathlib.Path"), expected="run code"):
        tensor_names(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with refused(CheckpointError, got="weights_only=True", expected="run code"):
        tensor_names(path)
    assert not (tmp_path / "ran").exists()


def test_what_a_pickle_names_reaches_no_terminal(tmp_path: Path) -> None:
    name = "os\n\x1b[2J\x1b]0;owned\x07" + 500 * "x"
    odd = f"\x80\x02c{name.replace(chr(10), '')}\nsystem\n(tR.".encode("latin-1")
    path = tmp_path / "t.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t/data.pkl", odd)
        archive.writestr("t/version", "3\n")
        archive.writestr("t/byteorder", "little")
    with refused(CheckpointError, got="weights_only=True") as caught:
        tensor_names(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["t.safetensors", "t.bin"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"rubbish" * 9, b"\xff" * 64, "half", "no tail"])
def test_damage_is_one_line(name: str, content: bytes | str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    whole = path.read_bytes()
    cut = {"half": whole[: len(whole) // 2], "no tail": whole[:-3]}
    path.write_bytes(content if isinstance(content, bytes) else cut[content])
    with refused(CheckpointError, got=str(path), cause="damaged"):
        read_tensors(path, ["b"])


def test_what_is_no_tensor_file(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "lfs.safetensors").write_text(pointer)
    write(tmp_path / "good.bin")
    cases: dict[str, dict[str, Said]] = {
        "t.bin": {"got": "does not exist", "cure": "path"},
        "t.gguf": {"expected": ".safetensors or .bin"},
        "list.bin": {"got": "list", "expected": "dict of tensors"},
        "lfs.safetensors": {"got": "LFS", "cure": "git lfs pull"},
        "good.bin": {"got": ("'c'", "1 such")},
    }
    for name, said in cases.items():
        with refused(CheckpointError, **said) as caught:
            read_tensors(tmp_path / name, ["b", "c"])
        assert str(tmp_path / name) in caught.value.got


BAD_FILES = ("../x.safetensors", "/etc/x.safetensors", "a/b", "a\\b", "", 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", {"got": "no valid JSON"}),
        (b"\xff\xfe", {"got": "no valid JSON"}),
        (b"[1]", {"got": "list", "expected": "an object"}),
        (b"[" * 100_000, {"got": "nested"}),
        (b"{}", {"got": "'weight_map'"}),
        (b'{"weight_map": {}}', {"got": "'weight_map'"}),
        (b'{"weight_map": ["a"]}', {"got": "'weight_map'"}),
        *(
            (
                json.dumps({"weight_map": {"good": "x.safetensors", "bad": file}}).encode(),
                {"got": ("'bad'", repr(file)), "expected": "a file name"},
            )
            for file in BAD_FILES
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else "",
)
def test_what_is_no_index(content: bytes, said: dict[str, Said], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with refused(CheckpointError, **said) as caught:
        read_index(path)
    assert str(path) in caught.value.got


@pytest.mark.parametrize("dtype", ["F6_E2M3", "I4"])
def test_numbers_that_no_package_here_reads(dtype: str, tmp_path: Path) -> None:
    size = 64 * int(dtype[1]) // 8
    header = json.dumps({"a": {"dtype": dtype, "shape": [8, 8], "data_offsets": [0, size]}})
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(size))
    with refused(CheckpointError, got=(str(path), dtype), cause="quantised"):
        read_tensors(path, ["a"])


@pytest.mark.parametrize(
    ("state", "got"),
    [
        ({"model": STATE, "epoch": 3}, "'model', 'epoch'"),
        ({0: STATE["b"]}, "0"),
    ],
)
def test_a_state_of_training(state: Any, got: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin", state)
    with refused(CheckpointError, got=(str(path), got), cure="weights alone"):
        tensor_names(path)


def test_parameters_are_tensors_without_a_gradient(tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin", {"a": torch.nn.Parameter(torch.ones(2))})
    assert not read_tensors(path, ["a"])["a"].requires_grad
