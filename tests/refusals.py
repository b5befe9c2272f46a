"""What a test says of an error: its kind and its fields, never the whole sentence."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import pytest

from vzip.runtime.errors import VzipError

Said = str | tuple[str, ...]


@contextlib.contextmanager
def refused(
    kind: type[VzipError],
    *,
    got: Said = (),
    expected: Said = (),
    cause: Said = (),
    cure: Said = (),
) -> Iterator[pytest.ExceptionInfo[VzipError]]:
    """Expect an error of a kind whose fields hold the values and names that matter.

    Args:
        kind: The class, exactly.
        got: What must stand in the field of that name: values, options, files, commands.
        expected: Likewise.
        cause: Likewise.
        cure: Likewise.
    """
    with pytest.raises(kind) as raised:
        yield raised
    try:
        says(raised.value, got=got, expected=expected, cause=cause, cure=cure)
    finally:
        traceback.clear_frames(raised.tb)  # an error that lives on keeps nothing else alive
        del raised


def says(
    error: BaseException,
    *,
    got: Said = (),
    expected: Said = (),
    cause: Said = (),
    cure: Said = (),
) -> None:
    """Assert that an error's fields hold what is named; see `refused`."""
    assert isinstance(error, VzipError)
    for field, wanted in (("got", got), ("expected", expected), ("cause", cause), ("cure", cure)):
        text = getattr(error, field)
        for part in (wanted,) if isinstance(wanted, str) else wanted:
            assert part in text, f"{part!r} is not in {field}: {text!r}; the error: {error}"
