"""`vzip build` on a real GPU: build, look into the engine, prove it, refuse one that is wrong.

VZIP_REQUIRE_GPU=1 python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.references import with_reference
from tests.refusals import refused
from vzip.export.engines.published import BuiltEngine
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.errors import ParityError

pytestmark = pytest.mark.gpu

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(params=["tiny_bundle", "tiny_static_bundle"])
def proven(request: pytest.FixtureRequest, golden: Arrays) -> Callable[..., Path]:
    """Return a way to give a golden bundle the reference that it must compute."""
    path: Path = request.getfixturevalue(request.param)

    def give(offset: float = 0.0) -> Path:
        embeds = (golden["embeds"] + offset).astype(np.float32)
        return with_reference(path, golden, embeds=embeds).path

    return give


def build(path: Path, said: list[str], **request: Any) -> BuiltEngine:
    return build_engine(path, BuildRequest(name="here", **request), say=said.append)


def test_builds_proves_and_reuses(
    proven: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, said = proven(), list[str]()
    record = build(path, said).record
    assert record.proof is not None, said
    assert record.proof["passed"] is True, said
    assert record.gpu
    assert len(record.sm) == 1
    assert record.fused_attention == 0  # the golden graphs have no attention
    assert build(path, said).reused
    assert main(["inspect", str(path), "--engine", "here"]) == 0
    out = capsys.readouterr().out
    assert "proof: proven" in out
    assert "can't be listed" not in out


@pytest.mark.parametrize("request_", [{"low_memory": True}, {"level": 0}, {"workspace_mib": 64}])
def test_other_settings_compute_the_same(
    proven: Callable[..., Path], request_: dict[str, Any]
) -> None:
    record = build(proven(), [], **request_).record
    assert record.proof is not None
    assert record.proof["passed"] is True


def test_a_damaged_timing_cache_is_ignored(proven: Callable[..., Path]) -> None:
    path, said = proven(), list[str]()
    stack = build(path, said).record.stack
    cache = path / "engines" / "timing.cache"
    assert cache.exists() == (stack == "tensorrt")  # TensorRT-RTX has one that does nothing
    if stack == "tensorrt_rtx":
        return
    cache.write_bytes(b"damaged" * 100)
    build(path, said, level=1)
    assert any("the timing cache is damaged" in line for line in said)


def test_an_engine_that_is_not_what_pytorch_says_is_not_published(
    proven: Callable[..., Path],
) -> None:
    path = proven(offset=1.0)
    with refused(ParityError, cause="not published"):
        build(path, [], safer=True)
    assert not read_bundle(path).manifest.engines
    assert not list((path / "engines").glob("*.plan"))
