"""From a PyTorch checkpoint to a static ONNX graph in a bundle.

Depends on `vzip.runtime` and on the packages of the extra ``export``. The functions below are the
commands of the same names; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vzip.export.checking import check
    from vzip.export.contact.visit import firstcontact
    from vzip.export.debugging.comparing import debug
    from vzip.export.engines import build
    from vzip.export.pipeline import export

__all__ = ["EXPORT_PACKAGES", "build", "check", "debug", "export", "firstcontact"]

EXPORT_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "ml_dtypes",
    "safetensors",
    "onnxruntime",
)
"""Import names of what an export needs; a command says in one line that one is not installed."""

_HOMES = {
    "build": "vzip.export.engines",
    "check": "vzip.export.checking",
    "debug": "vzip.export.debugging.comparing",
    "export": "vzip.export.pipeline",
    "firstcontact": "vzip.export.contact.visit",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
