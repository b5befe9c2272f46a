"""The user's cache, where what was fetched and made of it lies; it may be deleted at any time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files import locks
from vzip.runtime.guard import guarded


def entry(name: str) -> Path:
    """Return where something of a name lies, or will lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vzip" / "real" / name


def made(name: str, make: Callable[[Path], None]) -> Path:
    """Return a file or folder of the cache, after making it where it isn't there.

    What has the name is whole: it is made under another one, by one process, for which others
    wait. What a killed process left is removed by the next. Nothing is written where it is there.

    Args:
        name: Of the entry.
        make: Makes it at the path that it is given, where nothing is.

    Raises:
        InvalidInputError: It can't be written there.
    """
    path = entry(name)
    if path.exists():
        return path
    cure = f"make room in '{path.parent}', or name another cache in XDG_CACHE_HOME"
    with guarded(InvalidInputError, f"'{path}' can't be made", cure=cure, reads=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.on_file(path.with_name(f"{name}.lock"), lambda: None):
            if not path.exists():
                staged = path.with_name(f"{name}.part")
                _remove(staged)
                make(staged)
                staged.replace(path)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
