"""Where a checkpoint's files are: a local folder, or a repository of the hub.

From the hub each file is fetched by itself, so an LLM's shards are never downloaded. The hub is
asked once, without retries; if that fails, its local cache is all there is, and no further time is
lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NoReturn, Protocol

from vzip.runtime.errors import CheckpointError
from vzip.runtime.files.plain import open_plain
from vzip.runtime.models import ALIASES, suggestion


class Folder(Protocol):
    """A checkpoint's files."""

    @property
    def where(self) -> str:
        """The place, for messages."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit of the hub's repository; None for a local folder."""
        ...

    def find(self, name: str) -> Path | None:
        """Return the local path of a file, after downloading it; None where there is none."""
        ...

    def missing(self, names: Iterable[str], *, purpose: str) -> CheckpointError:
        """Return the error for files that `find` did not find."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine."""

    path: Path

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def revision(self) -> str | None:
        """None."""
        return None

    def find(self, name: str) -> Path | None:
        """Return the file's path if it is there.

        Raises:
            CheckpointError: Something else is there, be it a link to nothing, for which no default
                may stand.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        try:
            open_plain(path).close()
        except OSError as error:
            raise CheckpointError(
                f"can't read {path}: {error.strerror}",
                expected="a file of the checkpoint",
                cure="put the file itself there, or remove what is there",
            ) from error
        return path

    def missing(self, names: Iterable[str], *, purpose: str) -> CheckpointError:
        """Return the error for files that are not there."""
        there = sorted(path.name for path in self.path.iterdir() if path.is_file())
        return CheckpointError(
            f"{self.where} has no {' or '.join(names)}",
            expected=f"for {purpose}",
            cause=(
                "the folder holds "
                f"{', '.join(there[:8]) or 'no file'}{(' …' if len(there) > 8 else '')}"
            ),
            cure="copy the missing file there or give another folder",
        )


@dataclass(frozen=True)
class HubFolder:
    """A repository of the hub at one commit.

    Attributes:
        repo_id: ``owner/name``.
        revision: The commit that all files are taken from.
        offline: Why the hub couldn't be asked, so that the local cache is all there is; else None.
    """

    repo_id: str
    revision: str | None
    offline: str | None

    @classmethod
    def open(cls, repo_id: str, revision: str | None) -> HubFolder:
        """Ask the hub once for a repository's ``config.json``; fall back on its local cache.

        Args:
            repo_id: ``owner/name``.
            revision: Branch, tag or commit; None is the main branch.

        Raises:
            CheckpointError: No such repository, revision or file, no access, or no hub and nothing
                in the cache.
        """
        import huggingface_hub
        from huggingface_hub import constants, errors

        name = "config.json"
        try:
            url = huggingface_hub.hf_hub_url(repo_id, name, revision=revision)
            # `hf_hub_download` would go on trying for 23 s or more before it says that there is no
            # network; this asks once.
            metadata = huggingface_hub.get_hf_file_metadata(
                url, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        except (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.EntryNotFoundError,
            errors.HFValidationError,
        ) as error:
            _refuse(repo_id, revision, name, error)
        except (_http_error(), OSError, ValueError) as error:  # ValueError: HF_ENDPOINT is no URL
            return cls._cached(repo_id, revision, _reason(error))
        return cls(repo_id, metadata.commit_hash, offline=None)

    @classmethod
    def _cached(cls, repo_id: str, revision: str | None, reason: str) -> HubFolder:
        import huggingface_hub

        path = huggingface_hub.try_to_load_from_cache(repo_id, "config.json", revision=revision)
        if not isinstance(path, str):
            folder = cls(repo_id, revision, offline=reason)
            raise folder.missing(
                ["config.json"], purpose="the model; no local folder has that name"
            )
        return cls(repo_id, Path(path).parent.name, offline=reason)  # snapshots/<commit>/<file>

    @property
    def where(self) -> str:
        """The repository and how far it was reached."""
        commit = f" at {self.revision[:12]}" if self.revision else ""
        return f"the hub's {self.repo_id}{commit}" + (" (local cache)" if self.offline else "")

    def find(self, name: str) -> Path | None:
        """Return the file's path in the local cache, after a download if need be."""
        import huggingface_hub
        from huggingface_hub import errors

        if self.offline:
            path = huggingface_hub.try_to_load_from_cache(
                self.repo_id, name, revision=self.revision
            )
            return Path(path) if isinstance(path, str) else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.repo_id, name, revision=self.revision))
        except errors.RemoteEntryNotFoundError:
            return None
        except errors.RepositoryNotFoundError as error:
            _refuse(self.repo_id, self.revision, name, error)
        except (_http_error(), OSError) as error:
            raise CheckpointError(
                f"downloading {name} of {self.repo_id} from {_endpoint()} failed: {_reason(error)}",
                cure=(
                    f"try again, or fetch it elsewhere with `hf download {self.repo_id} {name}`; "
                    f"finished files are kept in {_cache()}"
                ),
            ) from error

    def missing(self, names: Iterable[str], *, purpose: str) -> CheckpointError:
        """Return the error for files that are not there."""
        files = list(names)
        if self.offline is None:
            return CheckpointError(
                f"{self.where} has no {' or '.join(files)}",
                expected=f"for {purpose}",
                cause="it is no complete checkpoint",
                cure="choose another repository or a local folder",
            )
        # Without its configuration nothing says which shards are needed; the next try names them.
        what = "--include '*.json'" if files == ["config.json"] else " ".join(files)
        return CheckpointError(
            f"looked for {' or '.join(files)} of {self.repo_id} (for {purpose}): asking the "
            f"hub at {_endpoint()} failed ({self.offline}) and the local cache {_cache()} does "
            "not hold it",
            cure=(
                f"connect, or run `hf download {self.repo_id} {what}` elsewhere and copy the cache "
                "(HF_HOME names it, HF_ENDPOINT a mirror of the hub), or give a local folder, or "
                "use --weights random where values don't matter"
            ),
        )


def elsewhere(reference: str) -> str:
    """Return why a tower isn't found by its path; empty where it is no other machine's."""
    absolute = reference.startswith(("/", "~")) or PureWindowsPath(reference).is_absolute()
    return "it is a path of the machine that the model was trained on" if absolute else ""


def tower_advice(reference: str, folder: Folder, otherwise: str) -> str:
    """Return what to do about a tower that isn't where the configuration says.

    Args:
        reference: What ``mm_vision_tower`` names.
        folder: The model's.
        otherwise: What the error itself advises, where the path is no other machine's.
    """
    name = PureWindowsPath(reference).name  # takes both kinds of slashes
    near = [] if not isinstance(folder, LocalFolder) else [folder.path, folder.path.parent]
    there = next((str(each / name) for each in near if (each / name / "config.json").is_file()), "")
    if not there and not elsewhere(reference):
        return otherwise
    known = name.startswith("clip-vit-")
    such = there or (f"openai/{name}" if known else "openai/clip-vit-large-patch14-336")
    return (
        f"export with --vision-tower {such}{'' if there or known else ' if it is this one'} (in "
        "Python vision_tower=), or name it in config.json's mm_vision_tower"
    )


def _refuse(repo_id: str, revision: str | None, name: str, error: Exception) -> NoReturn:
    """Raise what a refusal of the hub means; subclasses come first."""
    from huggingface_hub import errors

    meanings = {
        errors.GatedRepoError: CheckpointError(
            f"{repo_id} is gated",
            cure=(
                f"ask for access at {_endpoint()}/{repo_id}, then `hf auth login` (or set "
                "HF_TOKEN) and try again"
            ),
        ),
        errors.RepositoryNotFoundError: CheckpointError(
            f"the hub at {_endpoint()} has no repository '{repo_id}', or it is private, and there "
            "is no local folder of that name",
            cause=f"{suggestion(repo_id.rpartition('/')[2])}the aliases are {', '.join(ALIASES)}",
            cure="`hf auth login` opens private ones",
        ),
        errors.RevisionNotFoundError: CheckpointError(
            f"{repo_id} has no revision '{revision or 'main'}'",
            expected="a branch, tag or commit",
            cure=f"see {_endpoint()}/{repo_id}/commits/main",
        ),
        errors.EntryNotFoundError: CheckpointError(
            f"{repo_id} has no {name}",
            expected="in a checkpoint",
            cause="it holds something else, or a LoRA alone, which needs its base model",
            cure=(
                "choose a repository in Hugging Face's or original LLaVA's layout; merge a "
                "LoRA into its base model first"
            ),
        ),
        errors.HFValidationError: CheckpointError(
            f"'{repo_id}' is no hub id (owner/name): {_reason(error)}"
        ),
    }
    raise next(text for kind, text in meanings.items() if isinstance(error, kind)) from error


def _http_error() -> type[Exception]:
    """The base of the hub's HTTP library's errors, whichever library this version uses."""
    from huggingface_hub.errors import HfHubHTTPError

    for base in HfHubHTTPError.__bases__:
        if issubclass(base, Exception) and not issubclass(base, OSError):
            return base
    return HfHubHTTPError


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
