"""The packages of the backends, imported as they are meant to be: none reports to its makers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

from vzip.runtime.errors import missing


def import_onnxruntime(needed_for: str, extra: str) -> Any:
    """Import onnxruntime without its telemetry and return it.

    Since 1.29 onnxruntime's Linux builds report to Microsoft from the moment they are imported, on
    threads of their own that also keep a fork of the process from ending. ORT_DISABLE_TELEMETRY=1
    is the documented opt-out and counts only before the import; a value that is set already stays.

    Raises:
        MissingDependencyError: It isn't installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise missing("onnxruntime", needed_for=needed_for, extra=extra) from error
    return onnxruntime


def import_openvino(needed_for: str, extra: str) -> Any:
    """Import openvino without its telemetry and return it.

    As it is imported it reports to its makers, from a fork of this process that may never end;
    where the package that does so can't be imported, it doesn't.

    Raises:
        MissingDependencyError: It isn't installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", needed_for=needed_for, extra=extra) from error
    return openvino


def version_of(stack: str, needed_for: str) -> str:
    """Return the version of the installed library that a CPU engine is run by.

    OpenVINO isn't imported for it, which takes long: whether an engine fits is asked wherever a
    bundle has one, whatever backend then runs.

    Args:
        stack: ``onnxruntime`` or ``openvino``.
        needed_for: As for `missing`.

    Raises:
        MissingDependencyError: It isn't installed.
    """
    if stack == "openvino":
        if importlib.util.find_spec("openvino") is None:
            raise missing("openvino", needed_for=needed_for, extra="openvino")
        return importlib.metadata.version("openvino")
    return str(import_onnxruntime(needed_for, "cpu").__version__)
