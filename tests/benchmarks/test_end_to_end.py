"""`python -m benchmarks.end_to_end`: what it asserts, its ratios, tables and empty cells."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import JobError, Model
from benchmarks.harness import end_to_end_worker, llm_random, results
from benchmarks.harness.end_to_end_worker import NEW_TOKENS, PATCHES
from benchmarks.harness.llm_shapes import IMAGE, LLMS
from tests.refusals import refused
from vzip.runtime.errors import BackendError
from vzip.runtime.machine import sensors
from vzip.runtime.machine.timing import Timing

SEVEN, ONE, TINY = LLMS["llama-2-7b"], LLMS["tinyllama-1.1b"], LLMS["tiny"]
LLAVA, NEXT = end_to_end.MODELS


def found(first: dict[int, float], **more: object) -> dict:
    """What a worker's `speak` returns."""
    one = {"token": 7, "kv_bytes": 1000, "peak_bytes": 2_000_000_000, **more}
    return {
        "open_s": 1.0,
        "open_peak_bytes": 1_000_000_000,
        "budgets": {
            str(tokens): {
                **one,
                "first_token": Timing.of([ms]).to_json(),
                "decode": Timing.of([50.0]).to_json(),
            }
            for tokens, ms in first.items()
        },
    }


def encoder(job: dict) -> dict:
    """What a worker's `encode` returns."""
    return {
        "ms": {str(n): Timing.of([float(n)]).to_json() for n in job["budgets"]},
        "agreement": {str(n): 0.999 for n in job["budgets"][1:]},
    }


def answering(monkeypatch, speak) -> list[dict]:
    """Let jobs be answered here; `speak` answers those that time an LLM."""
    jobs: list[dict] = []

    def work(job: dict) -> dict:
        jobs.append(job)
        do = job["do"]
        return encoder(job) if do == "encode" else speak(job) if do == "speak" else {}

    monkeypatch.setattr(end_to_end, "work", work)
    return jobs


# --- shapes and weights ----------------------------------------------------------------------


@pytest.mark.parametrize(("llm", "published"), [(SEVEN, 6_738_415_616), (ONE, 1_100_048_384)])
def test_the_llms_have_as_many_parameters_as_the_published_ones(llm, published):
    assert dataclasses.replace(llm, vocabulary=32_000).parameters == published


@pytest.mark.slow
def test_every_engine_is_given_the_same_numbers(tmp_path):
    folder = llm_random.checkpoint(TINY, tmp_path / "checkpoint")
    half = llm_random.transformers_llm(TINY, folder, torch.bfloat16).model
    full = llm_random.transformers_llm(TINY, folder, torch.float32).model
    pairs = dict(half.named_parameters())
    assert sum(each.numel() for each in pairs.values()) == TINY.parameters
    for name, wide in full.named_parameters():
        assert torch.equal(pairs[name].float(), wide), name
        canonical = name.replace("model.language_model.", "decoder.")
        assert torch.equal(llm_random.draw(canonical, tuple(wide.shape)).float(), wide), name
    layers = [
        parameter for name, parameter in pairs.items() if re.search(r"\d+\.mlp\.up_proj", name)
    ]
    assert len(layers) == 2
    assert not torch.equal(*layers)
    assert float(layers[0].detach().float().std()) == pytest.approx(0.02, rel=0.05)


# --- ratios ----------------------------------------------------------------------------------


def test_the_predicted_ratio_is_the_papers_cost_model():
    def flops(n: int, d: int = 4096, m: int = 11008) -> int:
        return 32 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)

    first = {2880: 40_000.0, 640: 8000.0, 320: 4000.0, 160: 2500.0}
    rows = end_to_end.rows(SEVEN, "transformers", [NEXT], found(first), {})
    for row in rows:
        n = row["tokens"] + 60
        assert row["prompt_tokens"] == n
        assert row["prefill_flops"] == flops(n)
        assert row["predicted_ratio"] == pytest.approx(flops(2940) / flops(n), abs=5e-4)
    assert [row["prefill_ratio"] for row in rows] == [1.0, 5.0, 10.0, 16.0]
    assert rows[-1]["predicted_ratio"] == pytest.approx(15.23, abs=0.01)


def test_time_to_first_token_has_the_encoder_in_it():
    encoded = {576: {"median_ms": 400.0}, 64: {"median_ms": 300.0}}
    first = {576: 2000.0, 192: 900.0, 128: 700.0, 64: 500.0}
    rows = end_to_end.rows(ONE, "llama.cpp", [LLAVA], found(first), encoded)
    assert [row["ttft_ms"] for row in rows] == [2400.0, None, None, 800.0]
    assert [row["ttft_ratio"] for row in rows] == [1.0, None, None, 3.0]
    assert rows[0]["decode_tokens_per_s"] == 20.0


def test_the_papers_ratio_is_explained_by_its_own_numbers():
    shape = SEVEN.shape("float16")
    text = end_to_end.text_for(7.8)
    ratios = [
        shape.prefill_flops(2880 + n) / shape.prefill_flops(160 + n) for n in (text - 1, text)
    ]
    assert ratios[0] > 7.8 >= ratios[1]
    one = "\n".join(end_to_end._paper({"text_tokens": 60, "rows": []}))
    numbers = re.search(r"([\d.]+) · ([\d.]+) / ([\d.]+) = ([\d.]+)\.", one)
    predicted, few, many, ratio = map(float, numbers.groups())
    assert predicted * few / many == pytest.approx(ratio, rel=0.02)
    assert ratio == pytest.approx(218 / 27.8, abs=0.05)


# --- empty cells -----------------------------------------------------------------------------


def test_an_engine_that_fails_leaves_an_empty_cell_with_its_reason(monkeypatch, tmp_path):
    def speak(job: dict) -> dict:
        if job["runner"] == "onnxruntime":
            raise JobError("takes 28.5 GB")
        return found(dict.fromkeys(job["budgets"], 100.0))

    answering(monkeypatch, speak)
    result = end_to_end.measure(["tiny"], [LLAVA], tmp_path)
    assert {row["runner"] for row in result["rows"]} == {"transformers", "llama.cpp"}
    assert {"cell": "tiny in onnxruntime", "why": "takes 28.5 GB"} in result["empty"]
    assert "tiny in onnxruntime: takes 28.5 GB" in end_to_end.table(result)
    assert "first token is the same one in 4 of 4 cases;" in end_to_end.table(result)
    assert not list(tmp_path.iterdir())


def test_without_the_encoder_there_is_no_time_to_first_token(monkeypatch, tmp_path):
    answering(monkeypatch, lambda job: found(dict.fromkeys(job["budgets"], 100.0)))
    work = end_to_end.work

    def broken(job: dict) -> dict:
        if job["do"] == "encode":
            raise JobError("no weights")
        return work(job)

    monkeypatch.setattr(end_to_end, "work", broken)
    result = end_to_end.measure(["tiny"], [LLAVA], tmp_path)
    assert {"cell": "tiny, encoder of LLaVA-1.5", "why": "no weights"} in result["empty"]
    assert {row["ttft_ms"] for row in result["rows"]} == {None}
    line = next(
        row for row in end_to_end.table(result).splitlines() if row.startswith("| LLaVA-1.5 | 64")
    )
    assert [cell.strip() for cell in line.split("|")][3:7] == ["", "0.10 s", "", ""]


def test_engines_of_a_gpu_are_empty_cells_that_say_why(monkeypatch, tmp_path):
    answering(monkeypatch, lambda job: found(dict.fromkeys(job["budgets"], 100.0)))
    result = end_to_end.measure([], [LLAVA], tmp_path)
    why = {each["cell"]: each["why"] for each in result["empty"]}
    for runner in ("vllm", "sglang", "trtllm"):
        assert "not run on hardware" in why[runner]


def test_a_worker_that_is_killed_or_says_nothing_is_an_error_of_one_line(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(fake))
    for script, said in (
        ("kill -9 $$", {"got": "signal 9", "cause": "memory"}),
        ("echo at line 3 >&2; echo Boom >&2; exit 3", {"got": ("status 3", "Boom")}),
        ("""echo '{"error": "too small"}'""", {"got": "too small"}),
    ):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        with refused(JobError, **said):
            end_to_end.work({"do": "speak"})


def test_an_llm_that_memory_cant_hold_is_refused_before_it_is_made(monkeypatch, tmp_path):
    little = sensors.Memory(
        total=24_000, available=12_000, swap_total=0, swap_free=0, zram=0, cma_total=None,
        cma_free=None, disk_swap_free=0,
    )  # fmt: skip
    monkeypatch.setattr(sensors, "memory", lambda: little)
    end_to_end_worker.check_fits(ONE, "onnxruntime", tokens=3000)
    with refused(BackendError, got=("28.0 GB", "32 bits"), expected="12."):
        end_to_end_worker.check_fits(SEVEN, "onnxruntime", tokens=0)
    with refused(BackendError, got="16 bits"):
        end_to_end_worker.prepare(
            llm=SEVEN.name, runner="llama.cpp", checkpoint=str(tmp_path / "c"), file="none"
        )
    assert not list(tmp_path.iterdir())


# --- what is timed is asserted ----------------------------------------------------------------


class Fake:
    """A runner whose LLM says one word after another."""

    openings = 1

    def __init__(self, words=(5,), extra: int = 0) -> None:
        self.words, self.extra, self.steps = words, extra, []

    def at(self, context: int):
        return self

    def new_cache(self) -> list[int]:
        return []

    def step(self, ids, cache, rows, positions=None) -> int:
        assert rows is None or ids.count(IMAGE) == len(rows)
        self.steps.append(len(ids))
        cache += ids
        return self.words[len(self.steps) % len(self.words)]

    def kv_bytes(self, cache) -> int:
        return TINY.shape("bfloat16").kv_bytes(len(cache)) + self.extra


def speak(monkeypatch, fake: Fake, budgets=(20, 6)) -> dict:
    monkeypatch.setitem(end_to_end_worker.RUNNERS, "transformers", lambda *_: fake)
    job = {"llm": "tiny", "runner": "transformers", "checkpoint": "", "file": ""}
    return end_to_end_worker.speak(**job, budgets=list(budgets), text=9, seconds=0)


@pytest.mark.slow
def test_a_round_goes_up_and_the_next_one_down(monkeypatch):
    fake = Fake()
    result = speak(monkeypatch, fake)
    prefills = [count for count in fake.steps if count > 1]
    assert prefills == [10, 15, 29, 29, 15]  # the first is not counted
    assert fake.steps.count(1) == 5 * NEW_TOKENS
    assert result["budgets"]["6"]["first_token"]["calls"] == 2
    assert result["budgets"]["6"]["decode"]["calls"] == 2 * NEW_TOKENS
    kv = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, width, bytes
    assert result["budgets"]["20"]["kv_bytes"] == 29 * kv
    peaks = [result["budgets"][tokens]["peak_bytes"] for tokens in ("6", "20")]
    assert 0 < result["open_peak_bytes"] <= peaks[0] <= peaks[1]


def test_a_cache_of_another_size_is_no_measurement(monkeypatch):
    for extra in (-1, 100_000):
        with refused(BackendError, got=("cache", "20 tokens"), expected="0"):
            speak(monkeypatch, Fake(extra=extra))


def test_another_first_token_in_another_round_is_no_measurement(monkeypatch):
    with refused(BackendError, got="20 tokens", expected="round before"):
        speak(monkeypatch, Fake(words=tuple(range(7, 7 + 11))))


@pytest.mark.full
def test_the_engines_of_this_process_say_the_same_first_token(tmp_path):
    pytest.importorskip("llama_cpp")
    model = Model("small", 1, (PATCHES, 64))
    result = end_to_end.measure(["tiny"], [model], tmp_path, seconds=0, with_encoder=False)
    assert len(result["empty"]) == len(end_to_end.ABSENT), result["empty"]
    first = {}
    for row in result["rows"]:
        first.setdefault(row["tokens"], {})[row["runner"]] = row["first_token_id"]
    for tokens in (PATCHES, 64):
        assert set(first[tokens]) == set(end_to_end.WEIGHTS)
        assert len(set(first[tokens].values())) == 1, first
    kv = {row["runner"]: row["kv_bytes"] for row in result["rows"] if row["tokens"] == 64}
    assert kv == {"transformers": 31_744, "llama.cpp": 31_744, "onnxruntime": 63_488}
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_encoder_keeps_what_the_uncompressed_one_gives():
    job = {"llm": "tiny", "tiles": 1, "budgets": [PATCHES, 64], "seconds": 0}
    result = end_to_end_worker.encode(**job)
    assert 0.99 <= result["agreement"][64] <= 1.0001
    assert set(result["ms"]) == {"576", "64"}


# --- tables -----------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_row_and_the_numbers_of_the_result(monkeypatch, tmp_path):
    def speak(job: dict) -> dict:
        return found({tokens: 10.0 * tokens for tokens in job["budgets"]})

    jobs = answering(monkeypatch, speak)
    result = end_to_end.measure(["llama-2-7b"], end_to_end.MODELS, tmp_path)
    text = end_to_end.table(json.loads(json.dumps(result)))
    lines = [line for line in text.splitlines() if line.startswith("| LLaVA")]
    assert len(lines) == 3 * 8
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == [
        "LLaVA-NeXT", "160", "0.16 s", "1.60 s", "1.76 s", "18.00×", "18.00×", "15.23×", "+18%",
        "20.00", "0.0 MB", "2.00 GB",
    ]  # fmt: skip
    header = next(line for line in text.splitlines() if line.startswith("| |"))
    assert header.count("|") == lines[0].count("|")
    assert "Here, llama.cpp: 18.0×, time to first token 18.0×." in text
    assert [job["do"] for job in jobs] == ["encode"] * 2 + ["prepare", "speak"] * 3
    pytest.importorskip("matplotlib")
    plot = end_to_end.plot(result)
    results.write(tmp_path / "out", "end_to_end", result, end_to_end.table, svg=plot)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "end_to_end.json", "end_to_end.md", "end_to_end.svg"
    }  # fmt: skip
    assert (tmp_path / "out/end_to_end.md").read_text(encoding="utf-8") == text
    drawn = (tmp_path / "out/end_to_end.svg").read_bytes()
    assert drawn == plot == end_to_end.plot(json.loads(json.dumps(result)))
    result["encoder"] = []  # it failed: bars of prefill alone
    assert end_to_end.plot(result) != drawn


def test_a_folder_that_cant_be_written_to_is_said_before_anything_is_measured(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(end_to_end, "measure", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as ended:
        end_to_end.main(["--llm", "tiny", "-o", str(tmp_path / "link")])
    assert ended.value.code == 2
    assert str(tmp_path / "link") in capsys.readouterr().err


def test_the_committed_tables_are_those_of_the_committed_result():
    path = results.RESULTS / "end_to_end.json"
    if not path.exists():
        pytest.skip("not measured yet")
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text(encoding="utf-8") == end_to_end.table(result)
    for row in result["rows"]:
        shape = LLMS[row["llm"]].shape(end_to_end.CACHES[row["runner"]])
        assert row["kv_bytes"] == shape.kv_bytes(row["prompt_tokens"])
        assert row["prefill_flops"] == shape.prefill_flops(row["prompt_tokens"])
        assert row["first_token"]["calls"] >= 2
    assert Path(result["command"].split()[2]).name == "benchmarks.end_to_end"
