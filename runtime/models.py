"""What ``--model`` takes: an alias, a local folder or a hub id. No network is touched here."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from vzip.runtime.errors import CheckpointError
from vzip.runtime.guard import door

DEMO = "demo"

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        DEMO: "vzip.runtime.demo",  # the package that carries the demo model
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
)
"""Alias → hub id; that of the demo model → the package that holds its folder."""

# Hub ids are `owner/name` of these characters, with neither `--` nor `..` in them.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII
)


@dataclass(frozen=True)
class Location:
    """Where a model is.

    Attributes:
        model: What was asked for.
        kind: "demo", "folder" or "hub".
        folder: The local folder of "demo" and "folder", absolute; None for "hub".
        hub_id: The repository of "hub", such as ``llava-hf/llava-1.5-7b-hf``; else None.
    """

    model: str
    kind: Literal["demo", "folder", "hub"]
    folder: Path | None
    hub_id: str | None

    @property
    def model_id(self) -> str:
        """What finds the model again: ``demo``, the absolute folder, or the hub id."""
        if self.kind == "demo":
            return DEMO
        return self.hub_id if self.hub_id is not None else str(self.folder)


@door(CheckpointError, "the model '{model}' can't be looked for", cure="check the name")
def locate(model: str | os.PathLike[str]) -> Location:
    """Say where a model is.

    An alias comes first (a folder of that name is reached as ``./demo``), then a folder that
    exists, then a hub id. Whether the hub has that repository is not asked here.

    Args:
        model: An alias of `ALIASES`, a local folder, or a hub id ``owner/name``.

    Returns:
        The location.

    Raises:
        CheckpointError: No such alias or folder, or a file where a folder is expected.
    """
    name = os.fspath(model)
    if name == DEMO:
        from vzip.runtime import demo

        return Location(name, "demo", demo.checkpoint().resolve(), None)
    if name in ALIASES:
        return Location(name, "hub", None, ALIASES[name])
    if not name.strip() or "\0" in name:
        raise CheckpointError(
            f"model is {name!r}",
            expected=f"{_EXPECTED}",
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_text(folder.resolve())
        return Location(name, "folder", folder.resolve(), None)
    if folder.exists():
        raise CheckpointError(
            f"model '{name}' is a file",
            expected=f"{_EXPECTED}",
            cure="give the folder with config.json",
        )
    if _HUB_ID.fullmatch(name):
        return Location(name, "hub", None, name)
    if _looks_like_path(name):
        raise CheckpointError(
            f"model folder '{name}' does not exist (looked for {folder.absolute()})",
            expected=f"{_EXPECTED}",
            cure="check the path",
        )
    raise CheckpointError(
        f"unknown model '{name}'",
        expected=f"{_EXPECTED}",
        cause=f"{suggestion(name)}the aliases are {', '.join(ALIASES)}",
    )


def _check_text(folder: Path) -> None:
    """Refuse a folder whose name is no text, which no library below opens and no record holds."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        utf8 = sys.getfilesystemencoding() == "utf-8"
        raise CheckpointError(
            f"model folder '{folder}' has a name that is not "
            f"{'UTF-8' if utf8 else 'of this locale'}",
            cure="rename the folder" if utf8 else "set LC_ALL=C.UTF-8, or rename the folder",
        ) from error


def suggestion(name: str) -> str:
    """Return ``did you mean 'llava-1.5-7b'? `` for a mistyped alias, else an empty text."""
    close = difflib.get_close_matches(name.lower(), ALIASES, n=2)
    quoted = " or ".join(f"'{alias}'" for alias in close)
    return f"did you mean {quoted}? " if close else ""


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~")) or any(mark in name for mark in ("/", "\\", os.sep))


_EXPECTED = "an alias, a local folder or a hub id (owner/name)"
