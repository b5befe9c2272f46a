from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.refusals import Said, refused
from vzip.runtime.errors import CheckpointError
from vzip.runtime.models import ALIASES, locate

HF = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_aliases_name_their_repositories(elsewhere: Path) -> None:
    assert {alias: locate(alias).hub_id for alias in ALIASES if alias != "demo"} == {
        "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
        "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        "bakllava": "llava-hf/bakLlava-v1-hf",
        "vip-llava-7b": "llava-hf/vip-llava-7b-hf",
        "vip-llava-13b": "llava-hf/vip-llava-13b-hf",
        "llava-next-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-next-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
        "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
        "video-llava-7b": "LanguageBind/Video-LLaVA-7B-hf",
        "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-interleave-0.5b": "llava-hf/llava-interleave-qwen-0.5b-hf",
        "llava-interleave-7b": "llava-hf/llava-interleave-qwen-7b-hf",
    }
    location = locate("llava-1.5-7b")
    assert (location.kind, location.folder, location.model_id) == ("hub", None, HF)


def test_demo_is_the_packaged_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vzip.runtime

    demo = SimpleNamespace(checkpoint=lambda: elsewhere / "packaged")
    monkeypatch.setitem(sys.modules, "vzip.runtime.demo", demo)
    monkeypatch.setattr(vzip.runtime, "demo", demo, raising=False)
    location = locate("demo")
    assert (location.kind, location.hub_id, location.model_id) == ("demo", None, "demo")
    assert location.folder == (elsewhere / "packaged").resolve()


def test_a_folder_is_absolute_and_found_again(elsewhere: Path) -> None:
    (elsewhere / "mine").mkdir()
    for given in ("mine", "./mine", Path("mine"), elsewhere / "mine"):
        location = locate(given)
        assert (location.kind, location.folder) == ("folder", (elsewhere / "mine").resolve())
        assert locate(location.model_id).folder == location.folder


def test_an_existing_folder_comes_before_a_hub_id_and_behind_an_alias(elsewhere: Path) -> None:
    assert locate(HF).kind == "hub"
    for name in (HF, "llava-1.5-7b"):
        (elsewhere / name).mkdir(parents=True)
    assert locate(HF).kind == "folder"
    assert locate("llava-1.5-7b").kind == "hub"
    assert locate("./llava-1.5-7b").kind == "folder"


@pytest.mark.parametrize("name", ["owner/name", "o_1/n.a-me", "a/b"])
def test_hub_ids(elsewhere: Path, name: str) -> None:
    location = locate(name)
    assert (location.kind, location.hub_id, location.model_id) == ("hub", name, name)


PATHS = (
    *("./nope", "../nope", "/nope/nope", "~/nope-nope", "nope/"),
    *("a/b/c", "a\\b", "a..b/c", "a--b/c"),
)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((path, {"got": (f"'{path}'", "looked for /"), "cure": "path"}) for path in PATHS),
        ("lava-1.5-7b", {"got": "lava-1.5-7b", "cause": ("'llava-1.5-7b'", "'llava-1.5-13b'")}),
        ("lava-1.5-7b", {"cause": ", ".join(ALIASES)}),
        *((name, {"got": repr(name)}) for name in ("", "  ", "a\0b")),
        ("./a.safetensors", {"got": "is a file", "cure": "config.json"}),
    ],
)
def test_what_is_no_model(elsewhere: Path, name: str, said: dict[str, Said]) -> None:
    (elsewhere / "a.safetensors").touch()
    with refused(CheckpointError, **{"expected": ("alias", "folder", "owner/name"), **said}):
        locate(name)


def test_nothing_close_means_no_suggestion(elsewhere: Path) -> None:
    with refused(CheckpointError, got="'bert'", cause="demo, llava") as caught:
        locate("bert")
    assert "mean" not in caught.value.cause
