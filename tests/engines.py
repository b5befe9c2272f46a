"""Real LLM engines in tests: which must be there."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needed(package: str) -> None:
    """Skip the test where an engine is not installed, unless VZIP_ENGINES says that it must be.

    Args:
        package: The name that the engine is imported by; VZIP_ENGINES lists such names, divided by
            commas, and `make test-engines` sets it to those that it installs.
    """
    if importlib.util.find_spec(package) is not None:
        return
    if package in os.environ.get("VZIP_ENGINES", "").split(","):
        pytest.fail(f"VZIP_ENGINES names {package!r}, but it is not installed")
    pytest.skip(f"{package} is not installed; CONTRIBUTING.md says how its tests are run")
