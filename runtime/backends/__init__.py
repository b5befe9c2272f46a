"""What runs a bundle's graph: one file per backend, behind one small protocol.

Backends check nothing: `VisionEncoder` checks what goes in and what comes out, once for all of them
(`tests/contract/test_backends.py` holds every one to the same contract). The registry holds names,
so that a backend's package is imported when it is asked for and not before.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from vzip.runtime.bundle.reader import FASTEST, Bundle
from vzip.runtime.errors import BackendError, InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vzip.runtime.backends.tensorrt.device_array import DeviceArray

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


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend that can leave tokens where it computed them."""

    def run_on_device(self, feeds: Arrays) -> tuple[dict[str, NDArray[np.generic]], DeviceArray]:
        """Return what `run` does, and ``image_embeds`` on the device as well."""
        ...


class BackendClass(Protocol):
    """How a backend is made."""

    def __call__(self, bundle: Bundle, extra_outputs: tuple[str, ...]) -> Backend:
        """Open a bundle.

        What the backend reads of it, it reads with the bundle's own checks: `Bundle.read_model`,
        `vzip.runtime.backends.tensorrt.engine_file.read_engine`.

        Args:
            bundle: The bundle.
            extra_outputs: Values inside the graph that `run` returns as well.

        Raises:
            BundleError: A file that the backend needs is missing or damaged.
            MissingDependencyError: A package is not installed.
            BackendUnavailableError: The packages are there, the device is not; or the bundle has
                nothing for this backend.
            BackendError: The backend can't take this graph.
        """
        ...


class BackendUnavailableError(BackendError):
    """The backend's packages are installed, but its device, or what runs on it, is absent."""


ENTRY_POINTS: Final = "vzip.backends"
"""The group of entry points (`pyproject.toml`) of backends that stand above the runtime."""

BACKENDS: Final[dict[str, str | None]] = {
    "tensorrt": "vzip.runtime.backends.tensorrt.backend:TensorRt",
    "onnxruntime-cuda": "vzip.runtime.backends.onnxruntime:OnnxRuntimeCuda",
    "onnxruntime": "vzip.runtime.backends.onnxruntime:OnnxRuntimeCpu",
    "pytorch": None,
}
"""Name → ``module:class``, in the order in which ``auto`` tries them; None: an entry point says."""

AUTO: Final = "auto"
TENSORRT: Final = "tensorrt"
ONNXRUNTIME: Final = "onnxruntime"


def open_backend(
    name: str, bundle: Bundle, *, extra_outputs: tuple[str, ...] = (), engine: str | None = None
) -> tuple[str, Backend]:
    """Open a bundle with the backend `name`, or with the first that can be used here.

    ``auto`` passes over a backend only when its package isn't installed, its device is absent, or
    the bundle has no engine for it; a backend that is there and fails is an error, not a reason to
    try the next.

    Args:
        name: A key of `BACKENDS`, or ``auto``.
        bundle: The bundle.
        extra_outputs: Values inside the graph that are to be returned as well.
        engine: Name of the engine to run, which makes ``auto`` TensorRT; None for the only one
            that fits this machine.

    Returns:
        The name of the backend that was opened, and the backend.

    Raises:
        InvalidInputError: There is no backend or engine of that name; or the bundle asks for its
            fastest form and the backend has none.
        BundleError: The bundle is damaged.
        MissingDependencyError: The package of the backend asked for is not installed.
        BackendError: The backend asked for can't be used here or can't take the graph; or none can
            be used, with the reason for each.
    """
    if bundle.fastest and (name != ONNXRUNTIME or engine is not None):
        asked = f"backend={name!r}" if engine is None else f"engine={engine!r}"
        raise InvalidInputError(
            f"got precision='{FASTEST}' with {asked}",
            expected=(
                f"backend='{ONNXRUNTIME}', the only one that has several forms of a graph to "
                "choose from"
            ),
            cure="leave the precision out, or take that backend",
        )
    if engine is not None:
        if name not in {AUTO, TENSORRT}:
            raise InvalidInputError(
                f"got engine={engine!r} with backend={name!r}",
                expected="backend='tensorrt', which alone runs engines",
                cure="leave one of the two out",
            )
        from vzip.runtime.backends.tensorrt.backend import TensorRt

        return TENSORRT, TensorRt(bundle, extra_outputs, engine=engine)
    if name != AUTO:
        return name, _load(name)(bundle, extra_outputs)
    reasons = []
    for candidate in BACKENDS:
        try:
            return candidate, _load(candidate)(bundle, extra_outputs)
        except (MissingDependencyError, BackendUnavailableError) as error:  # noqa: PERF203 - four
            reasons.append(f"{candidate}: {error}")
            _log.info("passed over the backend %s: %s", candidate, error)
    names = ", ".join(BACKENDS)
    raise BackendError(
        "no backend can be used here",
        expected=f"one of {names}",
        cause=f"{' | '.join(reasons)}",
    )


def _load(name: str) -> BackendClass:
    """Import the class of a backend."""
    if name not in BACKENDS:
        raise InvalidInputError(
            f"got backend={name!r}",
            expected=f"'auto' or one of {', '.join(BACKENDS)}",
        )
    place = BACKENDS[name]
    if place is None:
        from importlib import metadata

        found = metadata.entry_points(group=ENTRY_POINTS, name=name)
        if not found:
            raise MissingDependencyError(
                f"the backend {name!r} is not installed",
                expected=f"an entry point of the group '{ENTRY_POINTS}'",
                cause="vzip runs from a folder that was never installed",
                cure="install it with: pip install -e .",
            )
        above: BackendClass = next(iter(found)).load()
        return above
    module, _, attribute = place.partition(":")
    backend: BackendClass = getattr(importlib.import_module(module), attribute)
    return backend
