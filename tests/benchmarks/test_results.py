"""Every committed page of results is what its command makes of the committed JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import (
    beside_torch,
    demo_accuracy,
    end_to_end,
    handoff,
    many_pictures,
    plan,
    quantization,
    serving,
    sinks,
    small_costs,
    token_errors,
    tuning,
)
from benchmarks.readme import RESULTS
from vzip.export.bench import output

PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "beside_torch": beside_torch.page,
    "demo_accuracy": demo_accuracy.table,
    "encoder": output.table,
    "end_to_end": end_to_end.table,
    "handoff": handoff.table,
    "llama-2-7b/end_to_end": end_to_end.table,
    "many_pictures": many_pictures.table,
    "plan": plan.table,
    "quantization": quantization.tables,
    "quantization_real": lambda result: quantization.real_table(result["rows"]),
    "serving": serving.page,
    "sinks": sinks.page,
    "small_costs": small_costs.table,
    "token_errors": token_errors.page,
    "tuning": tuning.table,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_result_gives(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert PAGES[name](result) == page, f"make {name}.md of {name}.json again"


def test_every_page_is_looked_at() -> None:
    there = {str(path.relative_to(RESULTS).with_suffix("")) for path in RESULTS.rglob("*.md")}
    assert there == set(PAGES)
