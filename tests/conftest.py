"""Fixtures of all tests: copies of the golden bundles, which tests may spoil.

`tests/data/make_tiny_bundle.py` says what the bundles are and made what they must compute.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

# Tests that import onnxruntime themselves report nothing either; see `import_onnxruntime`.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Which backends the contract is held against. The default is what every development environment
# has; an environment without torch says `onnxruntime`, a machine with a GPU says all three.
# Nothing is skipped for want of a package: a backend that is listed and can't be imported fails.
BACKENDS = os.environ.get("VZIP_TEST_BACKENDS", "onnxruntime,pytorch").split(",")

DATA = Path(__file__).parent / "data"


def _copy(name: str, folder: Path) -> Path:
    # File by file, without modes: a checkout may be read-only.
    target = folder / name
    target.mkdir()
    for source in (DATA / name).iterdir():
        shutil.copyfile(source, target / source.name)
    return target


def pytest_report_header() -> str:
    return f"vzip: contract of backends {BACKENDS} (VZIP_TEST_BACKENDS)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `backend` once for each backend."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    """A bundle that takes 1 to 3 uint8 images; FP32, opset 18."""
    return _copy("tiny_bundle", tmp_path)


@pytest.fixture
def tiny_static_bundle(tmp_path: Path) -> Path:
    """A bundle that takes exactly two arrays of pixel_values; FP16, opset 17."""
    return _copy("tiny_static_bundle", tmp_path)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Five inputs (`images`, `pixel_values`) and what they become (`embeds`, `kept`, `groups`)."""
    with np.load(DATA / "tiny_golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)
