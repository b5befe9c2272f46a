"""The fake GPU of the runtime's tests, which `vzip bench` is tested with too."""

from __future__ import annotations

from tests.runtime.conftest import cudart, install

__all__ = ["cudart", "install"]
