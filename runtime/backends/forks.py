"""Objects of native libraries that a fork of the process must not destroy."""

from __future__ import annotations

import functools
import os
import weakref
from typing import Any


def outlive_forks(*natives: Any) -> None:
    """Keep a fork of this process from destroying objects that own threads or a device's memory.

    Their destructors join threads, or free memory, that exist in the parent alone: in the child,
    closing one, or merely ending with `sys.exit`, is a segmentation fault (seen with ONNX Runtime
    1.23 and 1.31, which pull request 31961 of microsoft/onnxruntime is to mend; CUDA doesn't
    survive a fork at all). So the child gives every one a reference too many; their memory is the
    parent's, copied on write.

    Args:
        natives: Objects that can be weakly referenced.
    """
    _abandon_in_forks()
    for native in natives:
        _alive.add(native)


_alive: weakref.WeakSet[Any] = weakref.WeakSet()


@functools.cache
def _abandon_in_forks() -> None:
    """Arrange, once, for children to abandon the objects they inherit."""
    import ctypes

    def abandon() -> None:
        for native in list(_alive):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))

    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(after_in_child=abandon)
