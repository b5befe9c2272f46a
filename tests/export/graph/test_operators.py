"""No operator of a graph becomes a loop in TensorRT, of which no CUDA graph can be captured."""

from __future__ import annotations

from typing import Any

import pytest

from tests.operators import CASES, DOCUMENT, OPSETS, Opset, configuration, document, importers
from tests.operators import operators as operators_of
from vzip.runtime.bundle import graph_check

IMPORTERS = importers()


@pytest.mark.parametrize("version", IMPORTERS)
def test_the_parser_s_loops_are_known(version: str) -> None:
    """The list is read from source by a pattern; these are loops whatever the pattern finds."""
    assert {"CumSum", "Loop", "Scan", "LSTM", "GRU", "RNN", "If"} <= set(IMPORTERS[version]["loop"])


@pytest.mark.parametrize("version", IMPORTERS)
def test_nothing_that_an_export_may_write_is_a_loop(version: str) -> None:
    """Every export's last pass refuses all operators but these."""
    assert set(IMPORTERS[version]["plain"]) >= graph_check.EXPORTED


@pytest.mark.parametrize("version", IMPORTERS)
def test_nothing_that_calibration_adds_is_a_loop(version: str) -> None:
    added = graph_check.QUANTISED - graph_check.OWN
    assert {"QuantizeLinear", "DequantizeLinear"} <= added
    assert added <= set(IMPORTERS[version]["plain"])


@pytest.mark.slow
def test_the_document_is_what_the_graphs_are() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run 'python -m tests.operators'"


@pytest.mark.full
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_no_graph_of_any_form_has_a_loop(case: tuple[str, str], opset: Opset) -> None:
    config = configuration(*case)
    merges: tuple[Any, ...] = ("average", "sum")
    for merge in merges:
        for cls_token in {config.tower.cls_token, False}:
            found = operators_of(config, opset, cls_token=cls_token, merge=merge)
            for version in IMPORTERS.values():
                assert found.keys() <= set(version["plain"])
