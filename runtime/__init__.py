"""What runs a bundle: images in, compressed tokens out. Needs numpy and Pillow; see `backends`.

The names below are imported when they are first used: `import vzip.runtime` costs nothing, so a
command that only prints its help doesn't wait for numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vzip.runtime.encoder import CompressedTokens, VisionEncoder
    from vzip.runtime.errors import (
        BackendError,
        BudgetError,
        BundleError,
        CheckpointError,
        ExportError,
        InvalidInputError,
        MissingDependencyError,
        ParityError,
        VzipError,
    )
    from vzip.runtime.llm.opening import open_llm

    __version__: str

__all__ = [
    "BackendError",
    "BudgetError",
    "BundleError",
    "CheckpointError",
    "CompressedTokens",
    "ExportError",
    "InvalidInputError",
    "MissingDependencyError",
    "ParityError",
    "VisionEncoder",
    "VzipError",
    "__version__",
    "open_llm",
]

_PLACES = {
    "VisionEncoder": "encoder",
    "CompressedTokens": "encoder",
    "open_llm": "llm.opening",
}
"""The module that a name is in; the others are in ``errors``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "__version__":
        return _version()
    return getattr(importlib.import_module(f"{__name__}.{_PLACES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Return the version of the installed distribution.

    Raises:
        VzipError: vzip runs from a folder that was never installed.
    """
    from importlib import metadata

    from vzip.runtime.errors import VzipError

    try:
        return metadata.version("vzip")
    except metadata.PackageNotFoundError as error:
        raise VzipError(
            "vzip has no version here, because it runs from a folder that was never installed",
            cure="install it with: pip install -e .",
        ) from error
