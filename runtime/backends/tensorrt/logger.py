"""The one logger of a TensorRT in this process, and who hears what it says.

TensorRT keeps the first logger that it is given and ignores every other one, with a warning
through the first. So builder, parser, runtime and inspector all get this one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

_log = logging.getLogger("vzip.tensorrt")

Hear = Callable[[str, str], None]
"""Called with a severity's name, as ``WARNING``, and a message; from TensorRT's threads too."""


@functools.cache
def logger(trt: Any) -> Any:
    """Return the logger of a TensorRT, which it keeps for good.

    Its `said` is the first error since someone emptied it, and its `raised` what was raised while
    it was called, such as Ctrl-C: TensorRT's bindings print that and go on.

    Args:
        trt: The module.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: ("INTERNAL_ERROR", logging.ERROR),
        severity.ERROR: ("ERROR", logging.ERROR),
        severity.WARNING: ("WARNING", logging.WARNING),
        severity.INFO: ("INFO", logging.DEBUG),  # sizes and times, at every engine
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # a class of an untyped module
        """TensorRT's messages as Python's, unless somebody listens."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said = ""
            self.raised: BaseException | None = None
            self.listeners: list[Hear] = []

        def log(self, level: Any, message: str) -> None:
            """Called by TensorRT, from its own threads too."""
            try:
                self.tell(level, message)
            except BaseException as error:  # noqa: BLE001 - raised by whoever called TensorRT
                self.raised = self.raised or error

        def tell(self, level: Any, message: str) -> None:
            """Tell a message to whom it concerns."""
            name, priority = levels.get(level, ("VERBOSE", logging.NOTSET))
            if priority == logging.ERROR and not self.said:
                self.said = " ".join(message.split())
            listeners = tuple(self.listeners)
            for hear in listeners:
                hear(name, message)
            if not listeners and priority:
                # Errors come up as exceptions, once.
                _log.log(min(priority, logging.WARNING), "%s", message)

    return Logger()


@contextlib.contextmanager
def listening(trt: Any, hear: Hear) -> Iterator[Any]:
    """Have everything that a TensorRT says told to `hear`, and not to Python's logging; yields it.

    Args:
        trt: The module.
        hear: Told.

    Raises:
        BaseException: What was raised meanwhile in a call of TensorRT's, Ctrl-C say.
    """
    one = logger(trt)
    one.raised = None
    one.listeners.append(hear)
    try:
        yield one
    finally:
        one.listeners.remove(hear)
        raised, one.raised = one.raised, None
        if raised is not None:
            raise raised
