"""Real LLMs in tests: which must be there."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needed(package: str) -> None:
    """Skip the test where a package is not installed, unless VZIP_LLMS says that it must be.

    Args:
        package: What runs the LLM, by the name that it is imported by; VZIP_LLMS lists such names,
            divided by commas, and `make test-llms` sets it to those that it installs.
    """
    if importlib.util.find_spec(package) is not None:
        return
    if package in os.environ.get("VZIP_LLMS", "").split(","):
        pytest.fail(f"VZIP_LLMS names {package!r}, but it is not installed")
    pytest.skip(f"{package} is not installed; CONTRIBUTING.md says how its tests are run")
