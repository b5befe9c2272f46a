"""What runs a bundle's graph: one file per backend, behind one small protocol.

Backends check nothing: `VisionEncoder` checks what goes in and what comes out, once for all of them
(`tests/contract/test_backends.py` holds every one to the same contract). The registry holds names,
so that a backend's package is imported when it is asked for and not before.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Final

from vzip.runtime.backends import cpu_engine
from vzip.runtime.backends.protocol import (
    Backend,
    BackendClass,
    BackendUnavailableError,
    NoEngineError,
)
from vzip.runtime.bundle.reader import FASTEST, Bundle
from vzip.runtime.errors import (
    BackendError,
    InvalidInputError,
    MissingDependencyError,
    VzipError,
)
from vzip.runtime.machine import process

_log = logging.getLogger(__name__)

ENTRY_POINTS: Final = "vzip.backends"
"""The group of entry points (`pyproject.toml`) of backends that stand above the runtime."""

AUTO: Final = "auto"
TENSORRT: Final = "tensorrt"
ONNXRUNTIME: Final = "onnxruntime"
ONNXRUNTIME_CUDA: Final = "onnxruntime-cuda"
OPENVINO: Final = "openvino"

BACKENDS: Final[dict[str, str | None]] = {
    TENSORRT: "vzip.runtime.backends.tensorrt.backend:TensorRt",
    ONNXRUNTIME_CUDA: "vzip.runtime.backends.onnxruntime:OnnxRuntimeCuda",
    ONNXRUNTIME: "vzip.runtime.backends.onnxruntime:OnnxRuntimeCpu",
    OPENVINO: "vzip.runtime.backends.openvino:OpenVinoCpu",
    "pytorch": None,
}
"""Name → ``module:class``, in the order in which ``auto`` tries them; None: an entry point says.
The one that runs the bundle's CPU engine takes the place of ``onnxruntime``."""

CPU_ENGINES: Final = (ONNXRUNTIME, OPENVINO)
"""The backends that run CPU engines, each those of its own library."""


def open_backend(
    name: str,
    bundle: Bundle,
    *,
    extra_outputs: tuple[str, ...] = (),
    engine: str | None = None,
    threads: int | None = None,
) -> tuple[str, Backend]:
    """Open a bundle with the backend `name`, or with the first that can be used here.

    ``auto`` passes over a backend only when its package isn't installed, its device is absent, or
    the bundle has no engine for it. If an installed backend fails, that is an error. Where that
    leaves a CPU though the bundle has engines for TensorRT, a warning is logged, with the reasons.

    Args:
        name: A key of `BACKENDS`, or ``auto``.
        bundle: The bundle.
        extra_outputs: Values inside the graph that are to be returned as well.
        engine: Name of the engine to run, which decides what ``auto`` is; None for the only one
            that fits this machine.
        threads: How many threads of the CPU run the graph; None for `process.threads`. A GPU has
            none of them.

    Returns:
        The name of the backend that was opened, and the backend.

    Raises:
        InvalidInputError: There is no backend or engine of that name; the backend has no such
            engines; or the number of threads makes no sense.
        BundleError: The bundle is damaged.
        MissingDependencyError: The package of the backend asked for is not installed.
        BackendError: The backend asked for can't be used here or can't take the graph; or none can
            be used, with the reason for each.
    """
    given = {} if threads is None else {"threads": process.check_threads(threads)}
    needed = _needed(name, bundle, engine)
    if needed is not None:
        if name not in {AUTO, needed}:
            asked = f"engine={engine!r}" if engine is not None else f"precision='{FASTEST}'"
            raise InvalidInputError(
                f"got {asked} with backend={name!r}",
                expected=f"backend='{needed}', which alone runs it",
                cure="leave one of the two out",
            )
        return needed, _open_engine(needed, bundle, extra_outputs, engine, given)
    if name != AUTO:
        return name, _load(name)(bundle, extra_outputs, **given)
    reasons: dict[str, VzipError] = {}
    for candidate in _order(bundle):
        try:
            opened = _load(candidate)(bundle, extra_outputs, **given)
        except (MissingDependencyError, BackendUnavailableError) as error:  # noqa: PERF203 - five
            reasons[candidate] = error
            _log.info("passed over the backend %s: %s", candidate, error)
        else:
            _log.info("opened the backend %s for %s", candidate, bundle.path)
            _warn_of_the_cpu(candidate, bundle, opened, reasons)
            return candidate, opened
    names = ", ".join(BACKENDS)
    raise BackendError(
        "no backend can be used here",
        expected=f"one of {names}",
        cause=_said(reasons),
    )


def _order(bundle: Bundle) -> list[str]:
    """Return the order in which ``auto`` tries backends."""
    order = list(BACKENDS)
    if (stack := cpu_engine.stack_to_try(bundle)) is not None:
        order.remove(stack)
        order.insert(order.index(ONNXRUNTIME_CUDA) + 1, stack)
    return order


def _warn_of_the_cpu(
    name: str, bundle: Bundle, opened: Backend, reasons: Mapping[str, VzipError]
) -> None:
    """Say that a CPU runs where TensorRT was meant, as engines in the bundle show."""
    gpu = name == ONNXRUNTIME_CUDA or getattr(opened, "device", "") == "cuda"
    if TENSORRT in reasons and not gpu and not isinstance(reasons[TENSORRT], NoEngineError):
        _log.warning(
            "%s: the CPU runs this bundle, by the backend %s; passed over: %s",
            bundle.path,
            name,
            _said(reasons),
        )


def _said(reasons: Mapping[str, VzipError]) -> str:
    """Return why backends were passed over, as it stands in messages."""
    return " | ".join(f"{name}: {error}" for name, error in reasons.items())


def _needed(name: str, bundle: Bundle, engine: str | None) -> str | None:
    """Return the backend that alone runs the engine that is asked for; None if none is."""
    if engine is None:
        if bundle.cpu_engine != "must":
            return None
        # Where none fits, whoever has one says why.
        there = [each.stack for each in bundle.manifest.engines.values() if each.cpu is not None]
        return cpu_engine.stack_to_try(bundle) or next(iter(there), ONNXRUNTIME)
    engines = bundle.manifest.engines
    if engine not in engines:
        cpu = " --cpu" if name in CPU_ENGINES else ""
        raise InvalidInputError(
            f"{bundle.path} has no engine {engine!r}",
            expected=f"one of {', '.join(sorted(engines))}" if engines else "an engine in it",
            cure=f"build one here with: vzip build {bundle.path}{cpu}",
        )
    return TENSORRT if engines[engine].cpu is None else engines[engine].stack


def _open_engine(
    name: str,
    bundle: Bundle,
    extra_outputs: tuple[str, ...],
    engine: str | None,
    given: Mapping[str, int],
) -> Backend:
    """Open an engine with the backend that has such engines."""
    if name == ONNXRUNTIME:
        from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu

        return OnnxRuntimeCpu(bundle, extra_outputs, engine=engine, **given)
    if name == OPENVINO:
        from vzip.runtime.backends.openvino import OpenVinoCpu

        return OpenVinoCpu(bundle, extra_outputs, engine=engine, **given)
    from vzip.runtime.backends.tensorrt.backend import TensorRt

    return TensorRt(bundle, extra_outputs, engine=engine, **given)


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
