"""What runs a bundle: images in, compressed tokens out. Needs numpy and Pillow; see `backends`.

The names below are imported when they are first used: `import vzip.runtime` costs nothing, so a
command that only prints its help doesn't wait for numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vzip.runtime.encoder import CompressedTokens, VisionEncoder

__all__ = ["CompressedTokens", "VisionEncoder"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vzip.runtime import encoder

    return getattr(encoder, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
