"""The fake GPU of the runtime's tests."""

from tests.runtime.conftest import cudart, install

__all__ = ["cudart", "install"]
