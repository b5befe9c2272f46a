"""Predictions beside measurements: what is compared with what, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan
from vzip.export.hardware import HERE, Device, find_device
from vzip.export.plan.model import read_model
from vzip.export.plan.predict import Estimator

CPU = Device(HERE, "a CPU", 25, {"fp32": 0.2, "bf16": 0.6}, 20)


def encoder_row(**change: Any) -> dict[str, Any]:
    row = {
        "bundle": "tokens-64", "tokens": 64, "batch": 1, "group": 0, "kind": "ours",
        "name": "onnxruntime", "stack": "onnxruntime:fp32", "precision": "fp32", "median_ms": 2000,
    }  # fmt: skip
    return {**row, **change}


def test_an_encoder_is_compared_with_the_ceiling_of_its_own_turns() -> None:
    ceiling = encoder_row(kind="ceiling", name="ceiling-cpu", flops=368_718_213_120, median_ms=1500)
    rows = [
        encoder_row(stack="slow", median_ms=3000),
        encoder_row(),
        encoder_row(stack="torch-uncompressed:fp32", name="torch-uncompressed", median_ms=10),
        encoder_row(precision="int8", median_ms=10),
        encoder_row(batch=8, median_ms=10),
        {**ceiling, "group": 1, "median_ms": 1},
        ceiling,
    ]
    (found,) = plan.encoders({"rows": rows})
    assert found["what"] == "encoder, 64 tokens, onnxruntime:fp32"
    assert found["predicted"] == pytest.approx(1500 / 0.8 + 23 * 8 * 0.005, abs=1e-3)
    assert found["measured"] == 2000
    assert found["off"] == pytest.approx(1875.92 / 2000 - 1, abs=1e-4)


def conversation(**change: Any) -> dict[str, Any]:
    row = {
        "llm": "llama-2-7b", "runner": "transformers", "model": "LLaVA-NeXT", "tokens": 160,
        "first_token": {"median_ms": 8000.0}, "decode_tokens_per_s": 1.1,
    }  # fmt: skip
    return {**row, **change}


def test_a_conversation_is_compared_budget_by_budget() -> None:
    rows = [conversation(), conversation(runner="onnxruntime")]
    prefill, answer = plan.conversations({"rows": rows, "text_tokens": 60}, CPU)
    expected = Estimator(read_model("llava-next-vicuna-7b"), CPU, "fp16", 60).predict(32)
    assert expected.llm_tokens == 220
    assert prefill["predicted"] == pytest.approx(expected.prefill_ms, abs=1e-3)
    assert answer["predicted"] == pytest.approx(expected.tokens_per_second, abs=1e-3)
    assert (prefill["measured"], answer["measured"]) == (8000, 1.1)


def test_a_smaller_llm_is_put_behind_the_same_tower() -> None:
    model = plan.spoken("LLaVA-1.5", "tinyllama-1.1b")
    assert model.vision == read_model("llava-1.5-7b").vision
    assert model.llm_parameters / 1e9 == pytest.approx(1.1, rel=0.01)


def test_what_others_measured() -> None:
    """The first is what the plan's share is from; the others are checks that it can fail."""
    full, few, answer = plan.published()
    assert abs(full["off"]) < 0.05
    paper = Estimator(read_model("llava-next-vicuna-7b"), find_device("a100"), "fp16", 60)
    assert few["predicted"] == pytest.approx(paper.predict(32).prefill_ms, abs=1e-3)
    assert few["off"] < -0.3  # PyTorch needs longer for few tokens than any arithmetic does
    assert abs(answer["off"]) < 0.2


def test_what_is_not_there_is_an_empty_cell(tmp_path: Path) -> None:
    (tmp_path / "end_to_end.json").write_text(
        json.dumps({"rows": [conversation()], "text_tokens": 60})
    )
    result = plan.compared(tmp_path, CPU)
    assert [each["cell"] for each in result["empty"]][1:] == ["encoder"]
    text = plan.table(result)
    assert "This machine: fp32 0.2, bf16 0.6 TFLOPS, 20 GB/s, measured." in text
    assert "| prefill, llama-2-7b in transformers, 160 tokens | " in text
    assert "encoder: encoder.json is not there." in text
    assert text.count("\n| ") == len(result["rows"]) + 1
