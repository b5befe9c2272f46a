"""Importing a TensorRT: which packages there are, how each is had, what is wrong if it can't be."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from vzip.runtime.errors import BackendError, MissingDependencyError

TITLES: Final = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL: Final = {
    "tensorrt": "install it with: pip install 'vzip[tensorrt-cu12]', or 'vzip[tensorrt-cu13]' "
    "where 'vzip doctor' says that the driver serves CUDA 13. On a Jetson it comes with JetPack "
    "(apt install python3-libnvinfer, and a virtual environment made with --system-site-packages)",
    "tensorrt_rtx": "install it with: pip install 'vzip[rtx]'",
}

_CUDAS: Final = (14, 13, 12, 11)  # that PyPI has, or may come to have, a distribution for


@dataclass(frozen=True)
class Misfit:
    """A TensorRT for a newer CUDA than the driver serves.

    Attributes:
        what: The two, as part of a sentence.
        cure: What mends it.
    """

    what: str
    cure: str


def distribution_of(name: str) -> str | None:
    """Return the distribution of a TensorRT's bindings, such as ``tensorrt-cu13``.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``.

    Returns:
        None where none names its CUDA, as on a Jetson. Where several are installed, one has
        overwritten the other's files: the newest is named.
    """
    for cuda in _CUDAS:
        distribution = f"{name.replace('_', '-')}-cu{cuda}"
        for each in (distribution, f"{distribution}-bindings"):
            try:
                metadata.version(each)
            except metadata.PackageNotFoundError:
                continue
            return distribution
    return None


def misfit(distribution: str | None, served: str | None) -> Misfit | None:
    """Compare the CUDA of a distribution with the driver's; None where nothing is wrong.

    ``pip install tensorrt`` brings the newest CUDA's libraries, whatever the driver.

    Args:
        distribution: From `distribution_of`.
        served: The newest CUDA that the driver serves, such as ``12.4``.
    """
    made = re.search(r"-cu(\d+)$", distribution or "")
    if made is None or not served or int(made[1]) <= int(served.partition(".")[0]):
        return None
    assert distribution is not None
    older = served.partition(".")[0]
    base = distribution.rpartition("-")[0]
    wanted = f"{base}-cu{older}" if base == "tensorrt-rtx" else f"'vzip[{base}-cu{older}]'"
    parts = " ".join((base, *(distribution + part for part in ("", "-bindings", "-libs"))))
    return Misfit(
        f"{distribution} is made for CUDA {made[1]} and this driver serves CUDA up to {served}",
        f"pip uninstall -y {parts} && pip install {wanted}, or update the driver",
    )


def import_bindings(name: str) -> Any:
    """Import the package ``tensorrt`` or ``tensorrt_rtx`` and return it.

    Raises:
        MissingDependencyError: It isn't installed, or a library that it needs can't be loaded; the
            message names that library.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise _broken(name, error) from error
        raise MissingDependencyError(
            f"{TITLES[name]} (the package '{name}') is not installed in this environment",
            cure=INSTALL[name],
        ) from error
    # The loaders of NVIDIA's wheels raise all of these for a library that is absent.
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken(name, error) from error


def version_of(module: Any) -> str:
    """Return a TensorRT's version without what follows the numbers (``8.6.2.post1``).

    Raises:
        BackendError: It has none.
    """
    found = getattr(module, "__version__", None)
    match = re.match(r"\d{1,4}(\.\d{1,5}){1,3}", found if isinstance(found, str) else "")
    if match is None:
        raise BackendError(
            f"the module {module.__name__} has the version {found!r}",
            expected="numbers such as 10.3.0.30",
            cause="something else of that name is found first",
            cure=f"look at {getattr(module, '__file__', None) or 'a folder of that name'}",
        )
    return match[0]


def _broken(name: str, error: Exception) -> MissingDependencyError:
    """Return the error for a TensorRT that is there and can't be imported."""
    said = " ".join(str(error).split())
    library = re.search(r"lib[\w+-]+\.so[.\d]*", said)
    what = f"the library {library[0]} is missing or unfit" if library else "a part of it is missing"
    return MissingDependencyError(
        f"{TITLES[name]} is installed and can't be imported, {what} ({said})",
        cure=(
            "install that library in the version that this TensorRT was made for, or add its "
            "folder to LD_LIBRARY_PATH"
        ),
    )
