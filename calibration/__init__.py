"""What learns from representative data: quantisation, projector, budgets, and the demo model.

The functions below are the commands of the same names. They are imported when they are first used,
and what is heavy when they are called.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vzip.calibration.quantization.calibrate import calibrate
    from vzip.calibration.reporting.report import report
    from vzip.calibration.sweeping.sweep import sweep
    from vzip.calibration.tuning.tune import tune

__all__ = ["calibrate", "report", "sweep", "tune"]

_PLACES: Final = MappingProxyType(
    {
        "calibrate": "quantization.calibrate",
        "report": "reporting.report",
        "sweep": "sweeping.sweep",
        "tune": "tuning.tune",
    }
)


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
