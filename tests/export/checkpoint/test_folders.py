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


def fault(model: str = REPO, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_vision(Checkpoint.open(model, revision=revision))
    text = str(caught.value)
    assert "\n" not in text
    return text


# Online


def test_only_the_needed_files_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_layout("llava-hf", tmp_path / "served", llm="written")
    downloads = fake_hub(monkeypatch, {REPO: (COMMIT, tmp_path / "served")})
    checkpoint = Checkpoint.open(REPO)
    assert {name for _, name, _ in downloads} == {"config.json"}
    tensors = read_vision(checkpoint).tensors
    assert {name for _, name, _ in downloads} == NEEDED
    assert {revision for *_, revision in downloads} == {COMMIT}  # one commit for all files
    assert (checkpoint.model_id, checkpoint.revision) == (REPO, COMMIT)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_an_alias_asks_for_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout("llava-hf", tmp_path / "served")
    fake_hub(monkeypatch, {"llava-hf/llava-1.5-7b-hf": (COMMIT, tmp_path / "served")})
    checkpoint = Checkpoint.open("llava-1.5-7b")
    assert checkpoint.model_id == "llava-hf/llava-1.5-7b-hf"


def test_the_revision_is_what_the_hub_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout("llava-hf", tmp_path / "served")
    fake_hub(monkeypatch, {REPO: (COMMIT, tmp_path / "served")})
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


def test_a_file_that_the_repository_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout("llava-hf", tmp_path / "served")
    (tmp_path / "served" / "model-00003-of-00004.safetensors").unlink()
    fake_hub(monkeypatch, {REPO: (COMMIT, tmp_path / "served")})
    text = fault()
    assert "the hub's owner/llava at 0123456789ab has no model-00003-of-00004.safetensors" in text
    assert "it is no complete checkpoint" in text


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), errors.LocalEntryNotFoundError("reset by peer")],
)
def test_a_download_that_fails(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, {REPO: (COMMIT, tmp_path)})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    text = fault()
    assert "downloading config.json of owner/llava from https://" in text
    assert f"failed: {error}; try again, or fetch it elsewhere with `hf download" in text


# Refusals of the hub


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.GatedRepoError, "owner/llava is gated: ask for access at https://"),
        (errors.RepositoryNotFoundError, "has no repository 'owner/llava', or it is private, and there is no local folder of that name; did you mean 'bakllava'? the aliases are demo"),  # noqa: E501 - the message
        (errors.RevisionNotFoundError, "owner/llava has no revision 'v9', expected a branch, tag"),
        (errors.RemoteEntryNotFoundError, "owner/llava has no config.json, expected in a checkp"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    kind: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout("llava-hf", tmp_path / "served")
    fill_cache(tmp_path, tmp_path / "served")  # an old copy doesn't hide a refusal
    hub_answers(monkeypatch, kind("4xx", response=RESPONSE))
    text = fault(revision="v9")
    assert expected in text


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
    text = fault()
    assert text.startswith("looked for config.json of owner/llava (for the model; no local folder")
    assert f"asking the hub at {constants.ENDPOINT} failed ({error})" in text
    assert f"local cache {constants.HF_HUB_CACHE} does not hold it" in text
    for cure in ("hf download owner/llava --include '*.json'", "HF_HOME", "HF_ENDPOINT", "--weights random", "a local folder"):  # fmt: skip  # noqa: E501 - a list of words
        assert cure in text


@pytest.mark.parametrize("reason", OFFLINE)
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_cache_serves_without_the_hub(
    reason: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_layout("llava-hf", tmp_path / "served")
    fill_cache(tmp_path, tmp_path / "served")
    hub_answers(monkeypatch, OFFLINE[reason]())
    checkpoint = Checkpoint.open(REPO, revision=revision)
    assert (checkpoint.model_id, checkpoint.revision) == (REPO, COMMIT)
    tensors = read_vision(checkpoint).tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_another_revision_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout("llava-hf", tmp_path / "served")
    fill_cache(tmp_path, tmp_path / "served")
    hub_answers(monkeypatch, OFFLINE["no route"]())
    assert "does not hold it" in fault(revision="v2")


def test_a_shard_that_the_cache_lacks_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout("llava-hf", tmp_path / "served")
    shard = "model-00002-of-00004.safetensors"
    fill_cache(tmp_path, tmp_path / "served", skip=(shard,))
    hub_answers(monkeypatch, OFFLINE["no route"]())
    text = fault()
    assert f"looked for {shard} of owner/llava (for " in text
    assert f"`hf download owner/llava {shard}`" in text


def test_a_tower_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout("original", tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "openai")
    hub_answers(monkeypatch, OFFLINE["no route"]())
    text = fault(str(tmp_path / "mine"))
    assert f"the tower '{TOWER_FOLDER}' that {tmp_path / 'mine'} names in mm_vision_tower:" in text
    assert f"looked for config.json of {TOWER_FOLDER}" in text
    assert "may also hold it in a folder of that name" in text


def test_a_repository_named_like_an_alias_gets_a_suggestion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub_answers(monkeypatch, errors.RepositoryNotFoundError("401", response=RESPONSE))
    assert "did you mean 'llava-1.5-7b' or" in fault("llava-hf/llava-1.5-7b")
