"""The README's tables are what the result files give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.readme import README, TABLES, with_tables

PLACE = {"cores": 2, "processor": "P"}


def test_the_tables_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m benchmarks.readme"


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    empty = "".join(f"<!-- {name} -->\nan old table\n<!-- /{name} -->\n" for name in TABLES)
    text = with_tables(empty, tmp_path)
    assert text.count("Not measured yet") == len(TABLES)
    assert "old" not in text
    assert with_tables(text, tmp_path) == text
    assert (
        "<!-- end_to_end -->\nNot measured yet: `python -m benchmarks.end_to_end` does.\n"
        "<!-- /end_to_end -->\n"
    ) in text


def test_a_result_is_rendered_where_its_markers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "TABLES", {"a": ("b", lambda result: f"{result['x']} things")})
    (tmp_path / "b.json").write_text(json.dumps({"x": 3}))
    text = "before <!-- a -->\n<!-- /a --> after"
    assert with_tables(text, tmp_path) == "before <!-- a -->\n3 things\n<!-- /a --> after"


# ---- what the tables say -------------------------------------------------------------------------


def encoder_result() -> dict[str, Any]:
    """As `vzip.export.bench.output` describes it, as far as the README takes it."""

    def row(stack: str, kind: str, median: float, **other: Any) -> dict[str, Any]:
        same = {"bundle": "b", "tokens": 64, "batch": 1, "group": 0, "share_of_ceiling": None}
        said = {"times_baseline": 1800 / median, "agreement": None}
        return {**same, **said, "stack": stack, "kind": kind, "median_ms": median, **other}

    agreement = {
        "kept_overlap": 0.987, "mean_cosine": 0.99123, "min_cosine": 0.991,
        "contextual_cosine": 0.995,
    }  # fmt: skip
    return {
        "command": "python -m benchmarks.encoder",
        "environment": PLACE,
        "baseline": "torch-published:fp32",
        "rows": [
            row("torch-published:fp32", "peer", 1800.0, agreement={"mean_cosine": 1.0}),
            row("openvino:bf16", "peer", 300.0, agreement=agreement, share_of_ceiling=0.5),
            row("onnxruntime:fastest", "ours", 200.0, agreement=agreement, share_of_ceiling=0.4),
            row("onnxruntime:fp32", "ours", 1100.0, agreement=agreement),
            row("torch-published:fp32", "peer", 9999.0, group=1),  # with another group
            row("openvino:fp32", "peer", 1000.0, group=1, agreement=agreement),
            row("onnxruntime:fastest", "ours", 1500.0, batch=8, agreement=agreement),
            row("onnxruntime:fastest", "ours", 210.0, tokens=128, agreement=agreement),
            row("multiplications:int8", "ceiling", 100.0),
            row("preprocessing:china.jpg", "phase", 3.0),
        ],
        "empty": [{"cell": "b, tensorrt", "why": "no GPU"}],
    }


def test_random_weights_come_second_and_are_named_so() -> None:
    readme_text = README.read_text(encoding="utf-8")
    assert readme_text.index("<!-- headline -->") < readme_text.index("<!-- headline_random -->")
    assert TABLES["headline"][0] == "real_towers"
    text = readme.headline_random(encoder_result())
    assert text.startswith("With random weights")
    assert "9.0 times" in text
    assert "`onnxruntime:fastest` 200 ms, `torch-published:fp32` 1800 ms" in text
    assert "2 cores, P" in text
    assert "98.7% the same" in text
    assert "cosine 0.9912" in text
    assert "`python -m benchmarks.encoder`" in text


def test_the_encoders_table_has_a_line_a_stack_the_fastest_first() -> None:
    lines = readme.encoder(encoder_result()).splitlines()
    assert lines[2] == (
        "| stack, 64 tokens, batch 1 | ms | times as fast | of ceiling | kept overlap | cosine "
        "| of merged tokens | 64 tokens, batch 8 | 128 tokens, batch 1 |"
    )
    assert lines[4:8] == [
        "| **`onnxruntime:fastest`** | 200 | 9.00 | 40% | 0.9870 | 0.99123 | 0.995 | 1500 | 210 |",
        "| `openvino:bf16` | 300 | 6.00 | 50% | 0.9870 | 0.99123 | 0.995 | – | – |",
        "| `openvino:fp32` † | 1000 | 1.80 | – | 0.9870 | 0.99123 | 0.995 | – | – |",
        "| **`onnxruntime:fp32`** | 1100 | 1.64 | – | 0.9870 | 0.99123 | 0.995 | – | – |",
    ]
    assert lines[8:] == [
        "| `torch-published:fp32` | 1800 | 1.00 | – | – | 1.00000 | – | – | – |",
        "",
        "† In turns of their own, with `torch-published:fp32` at 9999 ms.",
        "",
        "* Aim: 8 times the published form. Met: 9.0.",
        (
            "* Aim: ahead of every peer that keeps and merges the same tokens (overlap 0.95, "
            "cosines 0.99). Met."
        ),
        "* Aim: FP32 no slower than the best peer. Missed: 1100 against 1000 ms (`openvino:fp32`).",
        "",
        "* Not run: b, tensorrt: no GPU",
    ]


def test_aims_that_were_missed_name_who_is_ahead() -> None:
    result = encoder_result()
    rows = {row["stack"]: row for row in result["rows"] if row["batch"] == 1}
    agreement = rows["openvino:bf16"]["agreement"]
    other = {**agreement, "contextual_cosine": 0.563}
    rows["openvino:bf16"] = {**rows["openvino:bf16"], "median_ms": 150.0}
    rows["openvino:int8"] = {**rows["openvino:bf16"], "median_ms": 140.0, "agreement": other}
    rows["onnxruntime:fastest"] = {
        **rows["onnxruntime:fastest"], "median_ms": 230.0, "times_baseline": 7.83
    }  # fmt: skip
    rows["onnxruntime:fp32"] = {**rows["onnxruntime:fp32"], "median_ms": 1000.0}
    eight, ahead, plain = readme._aims(rows)
    assert eight.endswith("Missed: 7.8.")
    assert ahead.endswith(
        "Missed: `openvino:bf16` (150 ms) against 230 ms. Faster, with other tokens: "
        "`openvino:int8` (140 ms, cosine of merged tokens 0.56)."
    )
    assert plain.endswith("Met: 1000 against 1000 ms (`openvino:fp32`).")


def test_end_to_end_has_a_line_of_all_tokens_and_the_fewest() -> None:
    def row(tokens: int, ttft: float | None, **other: Any) -> dict[str, Any]:
        same = {"llm": "llama-2-7b", "runner": "llama.cpp", "model": "LLaVA-1.5"}
        return {
            **same,
            "tokens": tokens,
            "ttft_ms": ttft,
            "ttft_ratio": None if ttft is None else 8000 / ttft,
            "prefill_ratio": 6.0,
            "predicted_ratio": 5.5,
            "decode_tokens_per_s": 2.0,
            "kv_bytes": tokens * 524288,
            "peak_bytes": 14.5e9,
            **other,
        }

    rows = [row(576, 8000.0), row(192, 3000.0), row(64, 2000.0)]
    rows += [row(576, None, runner="transformers"), row(64, None, runner="transformers")]
    text = readme.end_to_end({"environment": PLACE, "text_tokens": 60, "rows": rows, "empty": []})
    rest = "6.0× | 5.5× | 2.00 → 2.00 | 302 → 34 MB | 14.5 → 14.5 GB |"
    assert text.splitlines()[4:] == [
        f"| llama-2-7b, llama.cpp | LLaVA-1.5 | 576 → 64 | 8.00 → 2.00 s | 4.0× | {rest}",
        f"| llama-2-7b, transformers | LLaVA-1.5 | 576 → 64 | – | – | {rest}",
    ]


def test_small_costs_are_said_with_their_aim() -> None:
    def ms(**times: float) -> dict[str, Any]:
        return {name.replace("_", " "): {"median_ms": value} for name, value in times.items()}

    ways = ("exact", "transformers", "draft", "coefficients")
    result = {
        "environment": PLACE,
        "aim_ms": 5.0,
        "preprocessing": [
            {"ms": ms(**dict.fromkeys(ways, 20.0))},
            {"ms": ms(**{way: 30.0 + place for place, way in enumerate(ways)})},
        ],
        "draft_agreement": {"mean_overlap": 0.986},
        "open": [
            {"megabytes": 4, "ms": ms()},
            {"megabytes": 620, "ms": {"VisionEncoder.open": {"median_ms": 1500},
                                      "ONNX Runtime alone": {"median_ms": 900}}},
        ],
        "import": {**ms(python=10), **ms(VisionEncoder=150), "numpy and Pillow": {"median_ms": 99}},
        "host": {"ms": ms(run=0.0175)},
    }  # fmt: skip
    text = readme.small_costs(result)
    assert "20 to 30 ms, bit for bit transformers' (20 to 31 ms); 20 to 32 ms with a draft" in text
    assert "98.6% the same. The aim was 5 ms; reading" in text
    assert "takes 20 to 33 ms." in text
    assert "150 ms, of which numpy and Pillow 99 (Python itself 10)" in text
    assert "Opening 620 MB with every check: 1.50 s, ONNX Runtime alone 0.90 s" in text
    assert "checks on the host: 18 µs" in text


def test_a_build_is_said_where_it_was_measured() -> None:
    cost = {"wall_s": 35.0, "peak_gb": 3.0}
    result: dict[str, Any] = {
        "command": "vzip-export X",
        "build_command": "vzip build BUNDLE --rtx sm86",
        "environment": PLACE,
        "median": {"with parity check": cost, "without": cost},
        "runs": {"without": [cost]},
    }
    assert "vzip build" not in readme.export_cost(result)
    result["median"]["build"] = {"wall_s": 61.0, "peak_gb": 2.5}
    assert "`vzip build BUNDLE --rtx sm86`, ahead of time and without a GPU: 61 s, 2.5 GB." in (
        readme.export_cost(result)
    )
