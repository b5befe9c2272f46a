"""Engines from quantised graphs on a real GPU: proven, run, and measured against the bundle's own.

VZIP_REQUIRE_GPU=1 python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.precisions import add_precision, golden_precisions
from tests.references import with_reference
from tests.refusals import refused
from vzip.export.engines.tensorrt.auto import build_best
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest, this_machine
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.precision_record import FP8_SM, Quantised
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BackendError

pytestmark = pytest.mark.gpu


@pytest.fixture
def proven(tiny_bundle: Path, golden: Mapping[str, NDArray[Any]]) -> Path:
    """The golden bundle, with the reference that it must compute."""
    with_reference(tiny_bundle, golden)
    return tiny_bundle


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_engine_computes_what_the_graph_says(
    proven: Path, golden: Mapping[str, NDArray[Any]], precision: Quantised
) -> None:
    add_precision(proven, precision)
    request = BuildRequest(precision=precision)
    if precision == "fp8" and int(this_machine().sm[0]) < FP8_SM:
        with refused(BackendError, expected="SM 89"):
            build_engine(proven, request, say=lambda _: None)
        return
    record = build_engine(proven, request, say=lambda _: None).record
    assert record.proof is not None
    assert record.proof["passed"] is True
    with VisionEncoder.open(proven, "tensorrt", precision=precision) as encoder:
        tokens = encoder.encode(list(golden["images"]))
    assert np.array_equal(tokens.kept, golden["kept"])
    expected = golden_precisions()[precision]
    assert np.abs(tokens.embeds - expected).max() < 5e-3 * np.abs(expected).max()


def test_auto_measures_what_it_chooses_between(proven: Path) -> None:
    add_precision(proven)
    said: list[str] = []
    best, built = build_best(proven, BuildRequest(), say=said.append)
    (line,) = (line for line in said if line.startswith("int8: "))
    assert " ms (" in line
    kept = read_bundle(proven).manifest.engines
    assert {each.name for each in built} == set(kept)
    if best.record.quantised is None:
        assert [each.precision for each in kept.values()] == ["fp32"]
    else:
        assert best.record.proof is not None
        assert 0 < float(best.record.proof["ms"]) < float(best.record.proof["own_ms"])
