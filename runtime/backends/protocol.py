"""What a backend is: the protocol that `VisionEncoder` runs a bundle's graph by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vzip.runtime.errors import BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vzip.runtime.backends.tensorrt.device_array import DeviceArray
    from vzip.runtime.bundle.reader import Bundle

    Arrays = Mapping[str, NDArray[Any]]


class Backend(Protocol):
    """A graph that is ready to run."""

    @property
    def engine(self) -> str | None:
        """Name of the engine that runs; None where it is the bundle's graph."""
        ...

    @property
    def device(self) -> str:
        """What it runs on, such as the name of a GPU."""
        ...

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

    def __call__(
        self, bundle: Bundle, extra_outputs: tuple[str, ...], *, threads: int | None = None
    ) -> Backend:
        """Open a bundle.

        What the backend reads of it, it reads with the bundle's own checks: `Bundle.read_model`,
        `vzip.runtime.backends.tensorrt.engine_file.read_engine`.

        Args:
            bundle: The bundle.
            extra_outputs: Values inside the graph that `run` returns as well.
            threads: How many threads of the CPU run the graph, where one does; None for
                `process.threads`.

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


class NoEngineError(BackendUnavailableError):
    """The bundle holds nothing that was made for this backend, so nobody can have meant it."""
