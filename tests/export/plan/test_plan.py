"""`vzip plan`: what is counted and predicted, against numbers by hand; what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.places import DOCS
from tests.refusals import refused
from vzip.export.cli import plan as plan_cli
from vzip.export.hardware import DEVICES, HERE, TARGETS, Device, find_device
from vzip.export.plan import here as plan_here
from vzip.export.plan.model import PlanModel, read_model
from vzip.export.plan.predict import BITS, ON_CPU, ON_GPU, Estimator, Pace, PlanLimits, advise
from vzip.runtime import demo
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BudgetError, CheckpointError, InvalidInputError
from vzip.runtime.machine import sensors
from vzip.runtime.models import ALIASES

MODEL = "llava-1.5-7b"


@pytest.fixture(scope="module")
def llava() -> PlanModel:
    return read_model(MODEL)


def plan_of(model: PlanModel, device: str = "l4", weights: str = "fp16") -> Estimator:
    return Estimator(model, find_device(device), weights, 64)  # type: ignore[arg-type]


# What is counted: LLaVA-1.5-7B, CLIP ViT-L/14-336 and Llama-2-7B, by hand


def test_the_vision_side_by_hand(llava: PlanModel) -> None:
    layer = 4 * 577 * 1024**2 + 2 * 577 * 1024 * 4096
    patches, projector = 576 * (3 * 14 * 14) * 1024, 64 * (1024 * 4096 + 4096 * 4096)
    linear, attention = llava.vision_flops(64)
    assert linear == 2 * (patches + 23 * layer + projector)  # 23 of 24 layers: the last is dead
    assert attention == 2 * 23 * 2 * 577**2 * 1024
    assert linear + attention == 368_718_213_120
    assert llava.vision_parameters == 311_888_896
    assert (llava.unit, llava.units, llava.patches) == ("image", 1, 576)


def test_the_language_model_by_hand(llava: PlanModel) -> None:
    assert llava.linear_parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008) == 6_476_005_376
    assert llava.output_parameters == 32064 * 4096
    # Llama-2-7B's published 6,738,415,616 and 64 rows more in embedding and output layer.
    assert llava.llm_parameters == 6_738_415_616 + 2 * 64 * 4096
    assert llava.prefill_flops(128) == 1_662_415_011_840
    assert llava.llm_tokens(64, 64) == 128


@pytest.mark.parametrize(
    ("alias", "billions"),
    [
        ("llava-1.5-13b", 13.02), ("llava-next-mistral-7b", 7.24), ("llava-onevision-0.5b", 0.494),
        ("llava-onevision-7b", 7.62), ("llava-interleave-0.5b", 0.464),
        ("llava-interleave-7b", 7.72),
    ],
)  # fmt: skip
def test_the_language_models_are_as_large_as_published(alias: str, billions: float) -> None:
    assert read_model(alias).llm_parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("alias", "unit", "units", "patches", "budgets"),
    [
        (MODEL, "image", 1, 576, (64, 128, 192)),
        ("llava-next-vicuna-7b", "tile", 5, 576, (32, 64, 128)),
        ("video-llava-7b", "frame", 8, 256, (17, 34, 68)),
        ("llava-onevision-7b", "tile", 10, 729, (40, 81, 162)),
    ],
)
def test_budgets_are_the_papers_or_as_large_a_share(
    alias: str, unit: str, units: int, patches: int, budgets: tuple[int, ...]
) -> None:
    model = read_model(alias)
    assert (model.unit, model.units, model.patches) == (unit, units, patches)
    assert model.budgets == budgets


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias != "demo"])
def test_every_alias_is_known_without_the_hub(alias: str) -> None:
    row = plan_of(read_model(alias)).predict(2)
    assert 0 < row.encoder_ms < row.ttft_ms
    assert 0 < row.cost_share < 1


# What is predicted


def test_a_prediction_by_hand(llava: PlanModel) -> None:
    """An L4: 121 TFLOPS in FP16, 300 GB/s; half, 0.6 and 0.8 of that; 8 · 3 µs a layer."""
    assert Pace(0.5, 0.6, 0.8, 3) == ON_GPU
    plan = plan_of(llava)
    few, everything = plan.predict(64), plan.predict(576)
    assert few.budget == "54 + 10"
    assert everything.budget is None
    encoder = 368_718_213_120 / 121e12 / 0.5 * 1e3 + 23 * 8 * 0.003
    assert few.encoder_ms == pytest.approx(encoder) == pytest.approx(6.647, abs=1e-3)
    # 128 tokens are 22.9 ms of arithmetic: reading 13.2 GB of weights takes longer.
    reading = (6_476_005_376 + 32064 * 4096) * 2 / 300e9 / 0.8 * 1e3
    assert few.prefill_ms == pytest.approx(reading + 32 * 8 * 0.003)
    assert few.prefill_ms == pytest.approx(55.83, abs=0.01)
    # 640 tokens are not.
    flops = 2 * 640 * 6_476_005_376 + 32 * 2 * 640**2 * 4096 + 2 * 32064 * 4096
    assert everything.prefill_ms == pytest.approx(flops / 121e12 / 0.6 * 1e3 + 0.768)
    assert everything.prefill_ms == pytest.approx(116.43, abs=0.01)
    kv = 128 * 2 * 32 * 4096 * 2
    assert few.kv_bytes == kv
    assert few.tokens_per_second == pytest.approx(1e3 / (reading + kv / 300e9 / 0.8 * 1e3 + 0.768))
    assert few.memory_bytes == 6_738_939_904 * 2 + 311_888_896 * 2 + kv
    n, d, m = 128, 4096, 11008
    paper = [4 * k * d * d + 2 * k * k * d + 2 * k * d * m for k in (n, 640)]
    assert few.cost_share == pytest.approx(paper[0] / paper[1])
    assert few.ttft_ms == few.encoder_ms + few.prefill_ms


def test_smaller_weights_are_read_faster_and_computed_with_as_slowly(llava: PlanModel) -> None:
    sizes = {name: plan_of(llava, weights=name).weight_bytes for name in BITS}
    assert sizes["int8"] / sizes["fp16"] == 8.5 / 16
    assert sizes["int4"] / sizes["fp16"] == 4.5 / 16
    whole, small = (plan_of(llava, weights=each).predict(576) for each in ("fp16", "int4"))
    assert small.prefill_ms == whole.prefill_ms
    assert small.tokens_per_second > 3 * whole.tokens_per_second


def test_int8_is_for_linear_layers(llava: PlanModel) -> None:
    plan = plan_of(llava)
    linear, attention = llava.vision_flops(64)
    starts = 23 * 8 * 0.003
    expected = (linear / 242.5e12 + attention / 121e12) / 0.5 * 1e3 + starts
    assert plan.encoder_ms(64, "int8") == pytest.approx(expected)


def test_more_tokens_never_cost_less(llava: PlanModel) -> None:
    rows = [plan_of(llava).predict(tokens) for tokens in range(2, 577, 41)]
    for name in ("encoder_ms", "prefill_ms", "ttft_ms", "memory_bytes", "kv_bytes", "cost_share"):
        values = [getattr(row, name) for row in rows]
        assert values == sorted(values), name


# Limits


@pytest.mark.parametrize("device", ["l4", "orin-nano", "h100", "a100"])
@pytest.mark.parametrize("limit", ["ttft_ms", "latency_ms", "memory_gb"])
def test_the_largest_budget_that_meets_a_limit(llava: PlanModel, device: str, limit: str) -> None:
    plan = plan_of(llava, device, "int4")

    def value(tokens: int) -> float:
        row = plan.predict(tokens)
        return row.memory_bytes / 1e9 if limit == "memory_gb" else getattr(row, limit.replace(
            "latency_ms", "encoder_ms"))  # fmt: skip

    bound = value(300) * (1 + 1e-9)
    found = advise(plan, PlanLimits(**{limit: bound}))
    assert found.met
    assert value(found.row.tokens) <= bound
    assert value(found.row.tokens + 1) > bound
    assert "tokens (" in found.text


def test_all_tokens_are_recommended_where_they_meet_it(llava: PlanModel) -> None:
    found = advise(plan_of(llava), PlanLimits(ttft_ms=1000))
    assert found.met
    assert found.text == "576 tokens, all of them, have a first token after at most 1000 ms"


def test_several_limits_are_all_met(llava: PlanModel) -> None:
    plan = plan_of(llava)
    limits = PlanLimits(ttft_ms=plan.predict(400).ttft_ms, memory_gb=14.2)
    assert advise(plan, limits).row.tokens == 123  # 14.2 GB is the narrower of the two
    assert advise(plan, dataclasses.replace(limits, memory_gb=20)).row.tokens == 400


def test_a_budget_below_the_papers_is_marked(llava: PlanModel) -> None:
    plan = plan_of(llava, "orin-nano", "int4")
    text = advise(plan, PlanLimits(ttft_ms=190)).text
    assert re.match(r"4\d tokens \(\d+ \+ \d+\), the most that have a first token after at", text)
    assert text.endswith("; the paper tried none so small: see what it keeps with 'vzip sweep'")
    assert "paper" not in advise(plan, PlanLimits(ttft_ms=300)).text


def test_a_limit_that_nothing_meets_says_what_is_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--model", MODEL, "--target", "l4", "--max-ttft-ms", "30"]) == 1
    out, err = capsys.readouterr()
    assert "recommended" not in out
    assert err.count("\n") == 1
    for value in ("30 ms", "2 tokens", "62.4 ms", "encoder 6.6", "prefill 55.8", "13.5 GB in fp16"):
        assert value in err, value
    assert "--llm-weights int4" in err
    assert any(line.split()[:2] == ["2", "1"] for line in out.splitlines())  # the nearest's row


def test_without_a_cure_none_is_named(llava: PlanModel) -> None:
    text = advise(plan_of(llava, "h100"), PlanLimits(latency_ms=0.1)).text
    assert text.endswith("; take a faster or larger device, or a smaller model")


def test_a_7b_in_fp16_does_not_fit_an_orin_nano(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", MODEL, "--target", "orin-nano"]) == 1
    out, err = capsys.readouterr()
    assert out.count("14.2 (!)") == 3
    assert err.count("\n") == 1
    for value in (MODEL, "orin-nano", "6.0 of its 8 GB", "14.1 GB, 13.5", "--llm-weights int4"):
        assert value in err, value


def test_in_four_bits_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", MODEL, "--target", "orin-nano", "--llm-weights", "int4"]
    assert main(["plan", *arguments, "--max-ttft-ms", "300"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "(!)" not in out.partition("\n\n")[2].partition("\n\n")[0]
    assert re.search(r"^recommended \(predicted\): 131 tokens \(111 \+ 20\), the most", out, re.M)


def test_a_13b_fits_no_orin_nano(llava: PlanModel) -> None:
    found = advise(plan_of(read_model("llava-1.5-13b"), "orin-nano-4gb"), PlanLimits())
    assert not found.met
    assert found.text.endswith("; take a faster or larger device, or a smaller model")


# Devices


def test_devices_are_those_of_the_targets() -> None:
    for device in DEVICES.values():
        assert device.target in TARGETS
        target = TARGETS[device.target]
        assert device.name.startswith((target.name, "rtx"))
        assert device.memory_gb in target.memory_gb
        assert device.shared == target.shared
        assert set(device.tflops) == {"fp32", "fp16", "int8"}
        assert device.tflops["fp32"] < device.tflops["fp16"] < device.tflops["int8"]
        assert 0 < device.usable_gb < device.memory_gb
    assert {device.target for device in DEVICES.values()} == set(TARGETS) - {"rtx"}


@pytest.mark.parametrize(
    ("name", "sparse"),
    [("orin-nano", 67), ("orin-nano-4gb", 33), ("agx-orin", 170), ("agx-orin-32gb", 107)],
)
def test_what_follows_from_cores_and_clock_is_half_of_the_sparse_figure(
    name: str, sparse: int
) -> None:
    assert 2 * DEVICES[name].tflops["int8"] == pytest.approx(sparse, abs=0.7)


@pytest.mark.parametrize(
    ("name", "fp16", "bandwidth"),
    [("l4", 121, 300), ("a100", 312, 2039), ("h100", 989.5, 3350), ("t4", 65, 320)],
)
def test_figures_are_dense(name: str, fp16: float, bandwidth: float) -> None:
    assert (DEVICES[name].tflops["fp16"], DEVICES[name].bandwidth_gb) == (fp16, bandwidth)


def test_a_wrong_device_is_answered_with_those_it_may_have_meant() -> None:
    for name, meant in (
        ("rtx40", "rtx4090?"),
        ("rtx", "rtx3090 or rtx4090 or rtx5090?"),
        ("orin-nanoo", "orin-nano?"),
        ("L4", "l4?"),
        ("mi300x-nothing-like-it", ""),
    ):
        with refused(InvalidInputError, got=f"{name!r}", expected="orin-", cure=HERE) as error:
            find_device(name)
        assert error.value.cause.removeprefix("did you mean ") == meant


@pytest.mark.slow
def test_here_is_measured(llava: PlanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.02, 0.005, 0.01])
    monkeypatch.setattr(plan_here, "_seconds", lambda _: next(taken))
    device = plan_here.measure(llava)
    work = 2 * 577 * 1024 * 4096
    assert device.tflops == {"fp32": work / 0.02 / 1e12, "bf16": work / 0.005 / 1e12}
    assert device.bandwidth_gb == pytest.approx(2**28 / 0.01 / 1e9)
    memory = sensors.memory()
    assert memory is not None
    assert device.memory_gb == pytest.approx(memory.total * 2**20 / 1e9)
    plan = Estimator(llava, device, "fp16", 64)
    assert plan.pace == ON_CPU
    expected = sum(llava.vision_flops(64)) / device.tflops["fp32"] / 1e9 / 0.8 + 23 * 8 * 0.005
    assert plan.predict(64).encoder_ms == pytest.approx(expected)
    prefill = llava.prefill_flops(640) / device.tflops["bf16"] / 1e9 / 0.8 + 32 * 8 * 0.005
    assert plan.predict(576).prefill_ms == pytest.approx(prefill)


def test_the_fastest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_here, "_SECONDS", 0.1)
    waits = iter([0.05, 0.004, *[0.02] * 100])
    assert 0.004 <= plan_here._seconds(lambda: time.sleep(next(waits))) < 0.02


def test_here_from_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = MappingProxyType({"fp32": 0.2, "bf16": 0.6})
    cpu = Device(HERE, "a CPU, 2 threads", 25, speeds, 20, "measured")
    monkeypatch.setattr(plan_here, "measure", lambda _: cpu)
    assert main(["plan", "--model", MODEL, "--target", HERE]) == 0
    out = capsys.readouterr().out
    assert "fp32 0.2, bf16 0.6 TFLOPS, 20 GB/s, 25 GB (measured)" in out
    assert "encoder (fp32)" in out


# The command line


@pytest.mark.parametrize("model", ["llava-1.5-7b", "llava-next-vicuna-13b", "video-llava-7b"])
@pytest.mark.parametrize("device", ["orin-nano-4gb", "b200", "rtx5090"])
def test_it_fits_a_terminal_and_says_that_it_is_predicted(
    model: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--model", model, "--target", device])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1] == "Times and memory are predicted; nothing of this was run."


def test_the_table_has_the_budgets_and_all_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", MODEL, "--target", "l4", "--tokens", "192,64"]) == 0
    rows = capsys.readouterr().out.partition("---\n")[2].splitlines()[:3]
    assert [row.split()[0] for row in rows] == ["64", "192", "all"]
    few = ["64", "54", "+", "10", "128", "6.65", "55.8", "62.5", "17.8", "67", "14.2", "19.5%"]
    assert rows[0].split() == few


def test_the_documents_example_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", MODEL, "--target", "l4"]) == 0
    shown = capsys.readouterr().out.partition("\n\nTTFT")[0]
    document = DOCS / "plan.md"
    assert f"\n```\n{shown}\n```\n" in document.read_text(encoding="utf-8")


def test_what_is_refused() -> None:
    for error, said, *arguments in (
        (
            InvalidInputError,
            {"got": "--max-ttft-ms 0", "expected": "above 0"},
            "--max-ttft-ms",
            "0",
        ),
        (InvalidInputError, {"got": "--max-ttft-ms nan"}, "--max-ttft-ms", "nan"),
        (InvalidInputError, {"got": "--text-tokens -1"}, "--text-tokens", "-1"),
        (BudgetError, {"cure": "576"}, "--tokens", "600"),
        (CheckpointError, {"got": "llava-1.6-7b"}, "--model", "llava-1.6-7b"),
    ):
        with refused(error, **said):
            plan_cli.main(["--model", MODEL, "--target", "l4", *arguments], prog="vzip plan")


def test_a_wrong_device_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cli, "require", lambda *_, **__: pytest.fail("too late"))
    with refused(InvalidInputError, got="'l40'"):
        plan_cli.main(["--model", MODEL, "--target", "l40"], prog="vzip plan")


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "'silu'"),
        ({"vocab_size": 0}, "vocab_size = 0", "from 1"),
    ],
)
def test_a_language_model_that_is_not_known(
    tmp_path: Path, change: dict[str, object], got: str, expected: str
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(demo.checkpoint() / name, tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(CheckpointError, got=got, expected=expected):
        read_model(tmp_path)
