"""What runs a bundle's graph: one file per backend, behind one small protocol.

Backends check nothing: `VisionEncoder` checks what goes in and what comes out, once for all of them
(`tests/contract/test_backends.py` holds every one to the same contract). The registry holds names,
so that a backend's package is imported when it is asked for and not before.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from vzip.runtime.errors import BackendError, InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """A graph that is ready to run."""

    def run(self, feeds: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return the graph's outputs, by name, for its inputs, by name.

        Called from several threads at once. May be called once more by a thread that was about to
        when another one called `close`.

        Raises:
            BackendError: The graph failed, or the backend is closed.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; closing twice does nothing."""
        ...


class BackendClass(Protocol):
    """How a backend is made."""

    def __call__(self, model: bytes, folder: Path, extra_outputs: tuple[str, ...]) -> Backend:
        """Open a graph.

        Args:
            model: Serialised ModelProto, already checked.
            folder: Where its external data lies.
            extra_outputs: Values inside the graph that `run` returns as well.

        Raises:
            MissingDependencyError: A package is not installed.
            BackendUnavailableError: The packages are there, the device is not.
            BackendError: The backend can't take this graph.
        """
        ...


class BackendUnavailableError(BackendError):
    """The backend's packages are installed, but the device it is for can't be used."""


BACKENDS: Final[dict[str, str]] = {
    "onnxruntime-cuda": "vzip.runtime.backends.onnxruntime:OnnxRuntimeCuda",
    "onnxruntime": "vzip.runtime.backends.onnxruntime:OnnxRuntimeCpu",
    "pytorch": "vzip.runtime.backends.pytorch:PyTorch",
}
"""Name → ``module:class``, in the order in which ``auto`` tries them."""

AUTO: Final = "auto"


def open_backend(
    name: str, model: bytes, folder: Path, *, extra_outputs: tuple[str, ...] = ()
) -> tuple[str, Backend]:
    """Open a graph with the backend `name`, or with the first that can be used here.

    ``auto`` passes over a backend only when its package isn't installed or its device is absent; a
    backend that is there and fails is an error, not a reason to try the next.

    Args:
        name: A key of `BACKENDS`, or ``auto``.
        model: Serialised ModelProto, already checked.
        folder: Where its external data lies.
        extra_outputs: Values inside the graph that are to be returned as well.

    Returns:
        The name of the backend that was opened, and the backend.

    Raises:
        InvalidInputError: There is no backend of that name.
        MissingDependencyError: The package of the backend asked for is not installed.
        BackendError: The backend asked for can't be used here or can't take the graph; or none can
            be used, with the reason for each.
    """
    if name != AUTO:
        return name, _load(name)(model, folder, extra_outputs)
    reasons = []
    for candidate in BACKENDS:
        try:
            return candidate, _load(candidate)(model, folder, extra_outputs)
        except (MissingDependencyError, BackendUnavailableError) as error:  # noqa: PERF203 - three
            reasons.append(f"{candidate}: {error}")
            _log.info("passed over the backend %s: %s", candidate, error)
    names = ", ".join(BACKENDS)
    raise BackendError(
        f"no backend can be used here, expected one of {names}; {' | '.join(reasons)}"
    )


def _load(name: str) -> BackendClass:
    """Import the class of a backend."""
    if name not in BACKENDS:
        raise InvalidInputError(
            f"got backend={name!r}, expected 'auto' or one of {', '.join(BACKENDS)}"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: BackendClass = getattr(importlib.import_module(module), attribute)
    return backend
