"""Importing a TensorRT: which packages there are, how each is had, what is wrong if it can't be."""

from __future__ import annotations

import importlib
import re
from typing import Any, Final

from vzip.runtime.errors import BackendError, MissingDependencyError

TITLES: Final = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL: Final = {
    "tensorrt": "install it with: pip install 'vzip[tensorrt]'. On a Jetson it comes with JetPack "
    "(apt install python3-libnvinfer, and a virtual environment made with --system-site-packages)",
    "tensorrt_rtx": "install it with: pip install 'vzip[rtx]'",
}


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
