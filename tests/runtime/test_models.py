from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_an_existing_folder_comes_before_a_hub_id(elsewhere: Path) -> None:
    assert locate(HF).kind == "hub"
    (elsewhere / HF).mkdir(parents=True)
    assert locate(HF).kind == "folder"


def test_an_alias_comes_before_a_folder_of_that_name(elsewhere: Path) -> None:
    (elsewhere / "llava-1.5-7b").mkdir()
    assert locate("llava-1.5-7b").kind == "hub"
    assert locate("./llava-1.5-7b").kind == "folder"


@pytest.mark.parametrize("name", ["owner/name", "o_1/n.a-me", "a/b"])
def test_hub_ids(elsewhere: Path, name: str) -> None:
    location = locate(name)
    assert (location.kind, location.hub_id, location.model_id) == ("hub", name, name)


@pytest.mark.parametrize(
    "name",
    [
        "./nope",
        "../nope",
        "/nope/nope",
        "~/nope-nope",
        "a/b/c",
        "a\\b",
        "nope/",
        "a..b/c",
        "a--b/c",
    ],
)
def test_a_path_that_is_not_there_is_said(elsewhere: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        locate(name)
    assert f"model folder '{name}' does not exist (looked for /" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistyped_alias_gets_suggestions_and_the_list(elsewhere: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate("lava-1.5-7b")
    assert str(caught.value) == (
        "unknown model 'lava-1.5-7b', expected an alias, a local folder or a hub id (owner/name); "
        "did you mean 'llava-1.5-7b' or 'llava-1.5-13b'? "
        f"the aliases are {', '.join(ALIASES)}"
    )


def test_nothing_close_means_no_suggestion(elsewhere: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(owner/name\); the aliases are demo, llava"):
        locate("bert")


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_empty_names(elsewhere: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="expected an alias, a local folder or a hub id"):
        locate(name)


def test_a_file_is_no_model(elsewhere: Path) -> None:
    (elsewhere / "model.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"is a file, expected .* the folder with config.json"
    ):
        locate("./model.safetensors")
