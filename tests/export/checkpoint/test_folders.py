from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from tests.export.layouts import TOWER_FOLDER, write_layout
from tests.refusals import Said, refused
from vzip.export.checkpoint.reader import Checkpoint, read_vision
from vzip.runtime.errors import CheckpointError

REPO = "owner/llava"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOWER_COMMIT = "f" * 40
RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)
NEEDED = {
    "config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "model-00002-of-00004.safetensors",
    "model-00003-of-00004.safetensors",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches for a network or the user's cache, whatever it forgets to replace."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def raising(error: Exception) -> Callable[..., Any]:
    def replacement(*_: Any, **__: Any) -> Any:
        raise error

    return replacement


def hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The hub refuses; downloads must not even be tried."""
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", raising(error))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(AssertionError("downloaded")))


def transport_error(text: str) -> Exception:
    """What the hub's HTTP library raises when there is no route, whichever library it is."""
    library = __import__(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    error: Exception = library.ConnectError(text)
    assert not isinstance(error, OSError)
    return error


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, repositories: dict[str, tuple[str, Path]]
) -> list[tuple[str, str, str | None]]:
    """A hub that serves folders; returns the list of what was downloaded, as it grows."""
    downloads: list[tuple[str, str, str | None]] = []

    def metadata(url: str, **_: Any) -> Any:
        repo = next(repo for repo in repositories if f"/{repo}/resolve/" in url)
        return SimpleNamespace(commit_hash=repositories[repo][0])

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        path = repositories[repo_id][1] / filename
        if not path.is_file():
            raise errors.RemoteEntryNotFoundError("404", response=RESPONSE)
        downloads.append((repo_id, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return downloads


def fill_cache(folder: Path, files: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Lay out the hub's local cache as huggingface_hub does."""
    repository = folder / "cache" / f"models--{REPO.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(files, snapshot)
    for name in skip:
        (snapshot / name).unlink()


def fault(model: str = REPO, revision: str | None = None, **said: Said) -> None:
    with refused(CheckpointError, **said):
        read_vision(Checkpoint.open(model, revision=revision))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a checkpoint on the hub holds; its folder is `served`."""
    return write_layout("llava-hf", tmp_path / "served", llm="written")


@pytest.fixture
def downloads(
    served: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str, str | None]]:
    """A hub that serves it, under its own name and that of an alias."""
    entry = (COMMIT, tmp_path / "served")
    return fake_hub(monkeypatch, {REPO: entry, "llava-hf/llava-1.5-7b-hf": entry})


# Online


def test_only_the_needed_files_are_downloaded(
    served: dict[str, Any], downloads: list[tuple[str, str, str | None]]
) -> None:
    checkpoint = Checkpoint.open(REPO)
    assert {name for _, name, _ in downloads} == {"config.json"}
    tensors = read_vision(checkpoint).tensors
    assert {name for _, name, _ in downloads} == NEEDED
    assert {revision for *_, revision in downloads} == {COMMIT}  # one commit for all files
    assert (checkpoint.model_id, checkpoint.revision) == (REPO, COMMIT)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in served.items())


def test_an_alias_asks_for_its_repository(downloads: object) -> None:
    assert Checkpoint.open("llava-1.5-7b").model_id == "llava-hf/llava-1.5-7b-hf"


def test_the_revision_is_what_the_hub_is_asked_for(
    downloads: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, asked = huggingface_hub.get_hf_file_metadata, []

    def metadata(url: str, **options: Any) -> Any:
        asked.append((url, options))
        return answer(url, **options)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    Checkpoint.open(REPO, revision="v1")
    [(url, options)] = asked
    assert url.endswith("/owner/llava/resolve/v1/config.json")
    assert options == {"timeout": constants.HF_HUB_ETAG_TIMEOUT}


def test_the_tower_of_original_llava_comes_from_its_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    expected = write_layout("original", served)
    tower = tmp_path / "tower"
    shutil.move(served / TOWER_FOLDER, tower)
    downloads = fake_hub(monkeypatch, {REPO: (COMMIT, served), TOWER_FOLDER: (TOWER_COMMIT, tower)})
    tensors = read_vision(Checkpoint.open(REPO)).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert {name for repo, name, _ in downloads if repo == REPO} == {
        "config.json",
        "pytorch_model.bin.index.json",
        "pytorch_model-00003-of-00004.bin",
    }
    assert {name for repo, name, _ in downloads if repo == TOWER_FOLDER} == {
        "config.json",
        "preprocessor_config.json",
        "pytorch_model.bin",
    }


def test_a_file_that_the_repository_lacks(downloads: object, tmp_path: Path) -> None:
    shard = "model-00003-of-00004.safetensors"
    (tmp_path / "served" / shard).unlink()
    fault(got=(REPO, COMMIT[:12], shard), cause="complete checkpoint")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), errors.LocalEntryNotFoundError("reset by peer")],
)
def test_a_download_that_fails(
    error: Exception, downloads: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    fault(got=("config.json", REPO, "https://", f"{error}"), cure="hf download")


# Refusals of the hub


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, {"got": (REPO, "gated"), "cure": ("https://", "HF_TOKEN")}),
        (
            errors.RepositoryNotFoundError,
            {"got": (repr(REPO), "private"), "cause": ("'bakllava'", "are demo")},
        ),
        (errors.RevisionNotFoundError, {"got": (REPO, "'v9'"), "expected": "branch, tag"}),
        (errors.RemoteEntryNotFoundError, {"got": (REPO, "config.json"), "cure": "LoRA"}),
    ],
)
def test_refusals_say_what_to_do(
    kind: Any,
    said: dict[str, Said],
    served: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_cache(tmp_path, tmp_path / "served")  # an old copy doesn't hide a refusal
    hub_answers(monkeypatch, kind("4xx", response=RESPONSE))
    fault(revision="v9", **said)


# Offline


OFFLINE = {
    "no route": lambda: transport_error("[Errno -2] Name or service not known"),
    "switched off": lambda: errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"),
    "server error": lambda: errors.HfHubHTTPError("503 Service Unavailable", response=RESPONSE),
    "no url": lambda: ValueError("Invalid IPv6 URL"),
}


@pytest.mark.parametrize("reason", OFFLINE)
def test_without_hub_and_cache(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OFFLINE[reason]()
    hub_answers(monkeypatch, error)
    fault(
        got=("config.json", REPO, constants.ENDPOINT, f"({error})", constants.HF_HUB_CACHE),
        cure=(
            *("hf download owner/llava --include '*.json'", "HF_HOME", "HF_ENDPOINT"),
            *("--weights random", "a local folder"),
        ),
    )


@pytest.mark.parametrize("reason", OFFLINE)
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_cache_serves_without_the_hub(
    reason: str,
    revision: str | None,
    served: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_cache(tmp_path, tmp_path / "served")
    hub_answers(monkeypatch, OFFLINE[reason]())
    checkpoint = Checkpoint.open(REPO, revision=revision)
    assert (checkpoint.model_id, checkpoint.revision) == (REPO, COMMIT)
    tensors = read_vision(checkpoint).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in served.items())


def test_what_the_cache_lacks_is_named_with_its_command(
    served: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = "model-00002-of-00004.safetensors"
    fill_cache(tmp_path, tmp_path / "served", skip=(shard,))
    hub_answers(monkeypatch, OFFLINE["no route"]())
    fault(got=(shard, REPO), cure=f"`hf download {REPO} {shard}`")
    fault(revision="v2", got=("config.json", "does not hold it"))


def test_a_tower_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout("original", tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "openai")
    hub_answers(monkeypatch, OFFLINE["no route"]())
    mine = str(tmp_path / "mine")
    fault(mine, got=(TOWER_FOLDER, mine, "mm_vision_tower", "config.json"), cause="folder")


def test_a_repository_named_like_an_alias_gets_a_suggestion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub_answers(monkeypatch, errors.RepositoryNotFoundError("401", response=RESPONSE))
    fault("llava-hf/llava-1.5-7b", cause="'llava-1.5-7b' or")
