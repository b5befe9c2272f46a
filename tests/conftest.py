"""Fixtures of all tests: copies of the golden bundles, which tests may spoil.

`tests/golden/make_tiny_bundle.py` says what the bundles are and made what they must compute.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.places import GOLDEN

# Tests that import onnxruntime themselves report nothing either; see `import_onnxruntime`.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Which backends the contract is held against. The default is what every development environment
# has; an environment without torch says `onnxruntime`, a machine with a GPU says all of them.
# Nothing is skipped for want of a package: a backend that is listed and can't be imported fails.
BACKENDS = os.environ.get("VZIP_TEST_BACKENDS", "onnxruntime,openvino,pytorch").split(",")


# Tests marked `gpu` run where a GPU is. Elsewhere they are deselected, and the header says why;
# with VZIP_REQUIRE_GPU=1 they run all the same, and fail.
REQUIRE_GPU = os.environ.get("VZIP_REQUIRE_GPU", "") not in {"", "0"}


# A backend that takes bundles of `vzip export` alone; the golden ones are written by hand.
EXPORTED_ALONE = "pytorch"


def _copy(name: str, folder: Path, origin: Path) -> Path:
    # File by file, without modes: a checkout may be read-only.
    target = folder / name
    target.mkdir()
    for source in (origin / name).iterdir():
        shutil.copyfile(source, target / source.name)
    return target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and a TensorRT (VZIP_REQUIRE_GPU)")


@pytest.fixture(autouse=True)
def advice_that_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command's error speaks of an option that the command doesn't have."""
    from vzip.runtime import console
    from vzip.runtime.cli import main as cli

    load, complain = cli._load, console.complain
    running: list[str] = []

    def loading(name: str) -> Callable[..., int]:
        running[:] = [name]
        return load(name)

    def complaining(text: str, *, end: str = "\n") -> None:
        if running and ": error: " in text and not re.search("unrecognized|any more", text):
            commands = [running[0], *re.findall(r"vzip[ -]([a-z]+)", text)]
            known = set().union(*map(_options, filter(cli._names().__contains__, commands)))
            ours = re.sub(r"'(?:ffmpeg|pip) [^']*'", "", text)
            for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?!\w)", ours):
                assert option in known, f"'vzip {running[0]}' has no {option}: {text}"
        complain(text, end=end)

    monkeypatch.setattr(cli, "_load", loading)
    monkeypatch.setattr(console, "complain", complaining)


@functools.cache
def _options(command: str) -> frozenset[str]:
    from vzip.runtime.cli.main import _load

    help_, quiet = io.StringIO(), pytest.raises(SystemExit)
    with contextlib.redirect_stdout(help_), quiet:
        _load(command)(["-h"], prog=f"vzip {command}")
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?!\w)", help_.getvalue()))


@functools.cache
def _no_gpu() -> str | None:
    """Return why tests on a GPU can't run here; None if there is one."""
    from vzip.runtime.backends.tensorrt import cuda
    from vzip.runtime.errors import BackendError

    try:
        cuda.load()
    except BackendError as error:
        return str(error)
    return None


def pytest_report_header() -> list[str]:
    reason = None if REQUIRE_GPU else _no_gpu()
    gpu = "run" if reason is None else f"deselected: {reason}"
    return [
        f"vzip: contract of backends {BACKENDS} (VZIP_TEST_BACKENDS)",
        f"vzip: tests marked gpu are {gpu} (VZIP_REQUIRE_GPU)",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU where there is none, unless it is required."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not REQUIRE_GPU and _no_gpu() is not None:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `backend` once for each backend, or each that its class names."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", getattr(metafunc.cls, "BACKENDS", BACKENDS))


def _backend(request: pytest.FixtureRequest) -> str | None:
    """Return which backend a test runs, if it runs every one."""
    return request.getfixturevalue("backend") if "backend" in request.fixturenames else None


def _golden(name: str, folder: Path, request: pytest.FixtureRequest) -> Path:
    """Return a copy of a golden bundle, or its twin; with an engine if the test runs TensorRT."""
    backend = _backend(request)
    if backend == EXPORTED_ALONE:
        from tests import exported

        return _copy(name, folder, exported.bundles())
    bundle = _copy(name, folder, GOLDEN)
    if backend == "tensorrt":
        from vzip.export.engines.tensorrt.publish import build_engine
        from vzip.export.engines.tensorrt.request import BuildRequest

        build_engine(bundle, BuildRequest(name="built"), say=lambda _: None)
    return bundle


@pytest.fixture
def tiny_bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A bundle that takes 1 to 3 uint8 images; FP32, opset 18."""
    return _golden("tiny_bundle", tmp_path, request)


@pytest.fixture
def tiny_static_bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A bundle that takes exactly two arrays of pixel_values; FP16, opset 17."""
    return _golden("tiny_static_bundle", tmp_path, request)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """Five inputs (`images`, `pixel_values`) and what they become (`embeds`, `kept`, `groups`)."""
    if _backend(request) == EXPORTED_ALONE:
        from tests import exported

        return dict(exported.golden())
    with np.load(GOLDEN / "tiny_golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)
