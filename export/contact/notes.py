"""What a step of first contact found, kept where a crash leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vzip.runtime.errors import VzipError


class NotHereError(VzipError):
    """A step that this machine can't take, through no fault of anything."""


class Notes:
    """What a step has found so far.

    Args:
        path: The file of the result, written anew at each note. Its ``status`` is ``running`` until
            the step ends; then ``ok``, ``failed`` or ``not here``.

    Attributes:
        found: All that was noted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {"status": "running"}
        self._write()

    def note(self, **found: Any) -> None:
        """Keep what was found."""
        self.found.update(found)
        self._write()

    def _write(self) -> None:
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, default=_plain), encoding="utf-8")
        beside.replace(self._path)


def _plain(value: Any) -> Any:
    """Return what JSON has no word for as something that it has."""
    tolist = getattr(value, "tolist", None)  # numpy's numbers and arrays
    return tolist() if tolist is not None else str(value)
