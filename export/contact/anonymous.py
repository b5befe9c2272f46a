"""What goes to others: no folder of this machine, no name of its user or of itself."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vzip.export.pages.rendering import mailable

GENERIC: Final = frozenset(
    {"admin", "cuda", "jetson", "localhost", "nvidia", "orin", "root", "thor", "ubuntu", "user"}
)
"""Names that tell nobody apart, and that stand in many a line for something else."""

# A path behind a colon, as in PATH; two slashes are an address of the web.
_LISTED: Final = re.compile(r"(?<=:)/(?:[^\s/'\"<>:;,()]+/)*([^\s/'\"<>:;,()]+)/?")
# What is left of somebody's folder, in an address or behind a tilde.
_HOME: Final = re.compile(r"(/(?:home|Users|media)|~)/[^/\s'\":;,]+")


class Anonymous:
    """Cuts paths and names out of texts and records.

    Args:
        users: Names of users, whole words of which become ``USER``; None for those of this process.
        hosts: Names of machines, which become ``HOST``; None for this one's.
        folders: Folders that become their last part, blanks and all.
    """

    def __init__(
        self,
        *,
        users: Iterable[str] | None = None,
        hosts: Iterable[str] | None = None,
        folders: Iterable[Path] = (),
    ) -> None:
        self._folders = [str(folder) for folder in folders]
        self._words = [
            *((_word(name), "USER") for name in _telling(_users() if users is None else users)),
            *((_word(name), "HOST") for name in _telling(_hosts() if hosts is None else hosts)),
        ]

    def text(self, text: str) -> str:
        """Return a text without them."""
        text = _LISTED.sub(r"\1", mailable(text, *self._folders))
        text = _HOME.sub(r"\1", text)
        for pattern, instead in self._words:
            text = pattern.sub(instead, text)
        return text

    def record(self, value: Any) -> Any:
        """Return a record, as JSON has it, without them; in its keys neither."""
        if isinstance(value, dict):
            return {self.text(str(key)): self.record(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.record(each) for each in value]
        return self.text(value) if isinstance(value, str) else value


def _word(name: str) -> re.Pattern[str]:
    # Not \b alone: an underscore joins a name to another word and hides nothing.
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)


def _telling(names: Iterable[str]) -> list[str]:
    found = {name for name in names if len(name) > 1 and name.lower() not in GENERIC}
    return sorted(found, key=len, reverse=True)


def _users() -> set[str]:
    """Return what the user of this process is called."""
    found = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER", "USERNAME")}
    with contextlib.suppress(OSError, KeyError, ImportError):  # an id without a name
        found.add(getpass.getuser())
    with contextlib.suppress(RuntimeError):  # no home folder
        found.add(Path.home().name)
    return found


def _hosts() -> set[str]:
    node = platform.node()
    return {node, node.partition(".")[0]}
