"""`python -m benchmarks.real_towers`: what is kept and written, and who is never the winner."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import readme, real_towers
from benchmarks.harness import bundles
from benchmarks.harness.bundles import Made, Recipe
from vzip.export.bench.stacks import Stack
from vzip.runtime.errors import ExportError
from vzip.runtime.machine.record import machine

STACKS = {
    "onnxruntime:fp32": ("ours", 300.0, ""),
    "onnxruntime:int8": ("ours", 90.0, "kept overlap 0.72, expected at least 0.95"),
    "onnxruntime:fastest": ("ours", 150.0, ""),
    "openvino:bf16": ("peer", 80.0, ""),
    "torch-published:fp32": ("peer", 900.0, ""),
}


def row(stack: str, kind: str, median: float, disagrees: str) -> dict[str, Any]:
    name, _, form = stack.partition(":")
    agreement = {
        "images": 8, "kept_overlap": 0.9712, "mean_cosine": 0.996, "min_cosine": 0.91,
        "first_percentile_cosine": 0.95, "group_agreement": None, "contextual_cosine": 0.992,
        "contextual_share": 0.6, "disagrees": disagrees, "passed": not disagrees,
    }  # fmt: skip
    chosen = {"chosen": "tokens"} if form == "fastest" else {}
    return {
        **Stack(kind, name, form, form, "cpu").to_json(), "bundle": "b", "tokens": 64, "batch": 1,  # type: ignore[arg-type]
        "group": 0, "stack": stack, "median_ms": median, "times_baseline": 900 / median,
        "agreement": agreement, **chosen,
    }  # fmt: skip


def result(name: str = "clip-b16-384") -> dict[str, Any]:
    """What `bench` gives of a tower."""
    return {
        "what": "w", "command": "python -m benchmarks.real_towers", "started": "now",
        "environment": machine() | {"cores": 2, "processor": "P"},
        "baseline": "torch-published:fp32",
        "bundles": [{"name": name, "weights": "checkpoint", "tokens": 64, "tower_tokens": 577}],
        "rows": [row(stack, *rest) for stack, rest in STACKS.items()],
        "states": [{"group": 0, "load": load} for load in (0.5, 2.5)],
        "empty": [],
    }  # fmt: skip


def whole(**change: Any) -> dict[str, Any]:
    about = {"about": "A tower", "real": True, "outliers": None, "key": "k"}
    return {"tokens": 64, "towers": {"clip-b16-384": {**result(), **about, **change}}}


def test_what_does_not_agree_says_so_beside_its_time_and_never_wins() -> None:
    page = real_towers.page(whole())
    lines = {line.split(" | ")[2]: line for line in page.splitlines() if line.startswith("| clip")}
    assert (
        "| 90 | 10.00 | no: kept overlap 0.72, expected at least 0.95 |"
        in (lines["`onnxruntime:int8`"])
    )
    assert lines["**`onnxruntime:fastest` (tokens)**"].endswith("| 150 | 6.00 | yes |")
    assert sum("**" in line for line in lines.values()) == 1
    assert "load before" in page
    assert "then 0.5 to 2.5" in page


def test_the_readmes_first_number_is_of_trained_weights() -> None:
    text = readme.headline(whole())
    assert text.startswith("**6.0 times as fast as VisionZip's published PyTorch form** on a CPU")
    for part in (
        "with trained weights: A tower", "64 of 576 tokens",
        "`onnxruntime:fastest` (tokens) 150 ms",
        "`torch-published:fp32` 900 ms", "2 cores, P", "8 photographs", "97.1% the same", "0.9920",
    ):  # fmt: skip
        assert part in text
    none = whole()
    for each in none["towers"]["clip-b16-384"]["rows"]:
        each["agreement"]["disagrees"] = "kept overlap 0.5, expected at least 0.95"
    assert "times as fast" not in readme.headline(none)
    assert "**" not in "".join("".join(each) for each in real_towers.rows(
        "x", none["towers"]["clip-b16-384"]
    ))  # fmt: skip
    assert readme.headline({"towers": {}}).startswith("Not measured yet")
    assert "| 10.00 | no |" in readme.real_towers(whole())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What `bench` is asked for; it measures nothing here."""
    asked: list[Any] = []

    def bench(given: dict[str, Any], wanted: Any, **_: Any) -> dict[str, Any]:
        ((name, _bundle),) = given.items()
        asked.append((name, wanted))
        found = copy.deepcopy(result(name))
        found["rows"] = [each for each in found["rows"] if each["stack"] in wanted.only]
        return found

    def made(_folder: Path, recipe: Recipe) -> Made:
        if recipe.name == "dinov2-s14-336":
            raise ExportError("it is refused")
        engines = {"fastest": SimpleNamespace(stack="onnxruntime")}
        bundle: Any = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(engines=engines))
        return Made(bundle, tmp_path / "j.npz", {"stream": 127.0, "fc2": 146.0, "entropy": 0.8,
                    "top5": 0.2, "sinks": 20.0, "share": 0.4, "norm": 9.0},
                    {"onnxruntime:int8": "it can't be calibrated"})  # fmt: skip

    monkeypatch.setattr(real_towers, "bench", bench)
    monkeypatch.setattr(bundles, "made", made)
    monkeypatch.setattr(real_towers, "pictures", lambda names: [tmp_path / each for each in names])
    monkeypatch.setattr(real_towers, "checkpoint", lambda name: tmp_path / name)
    monkeypatch.setattr(bundles, "sources", lambda: "source")
    return asked


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[int, Any]:
    output = tmp_path / "new" / "r.json"
    told = ["real_towers", "--bundles", str(tmp_path / "b"), "-o", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", told)
    status = real_towers.main()
    return status, json.loads(output.read_text())["towers"] if output.exists() else {}


def test_towers_are_measured_one_by_one_and_results_of_others_stay(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, towers = run(monkeypatch, tmp_path, "--towers", "llava-random")
    assert (status, list(towers)) == (0, ["llava-random"])
    status, towers = run(monkeypatch, tmp_path, "--towers", "real")
    assert status == 1  # DINOv2's export is refused here
    assert list(towers) == ["clip-b16-384", "clip-b16-224", "llava-random"]
    for name, wanted in measured:
        assert wanted.judge == tmp_path / "j.npz"
        assert not wanted.beside
        assert "onnxruntime:int8" not in wanted.only
        assert real_towers.BASELINE in wanted.only
        assert name in real_towers.TOWERS
    assert any("torch-published:fp16" in wanted.only for _, wanted in measured)
    text = (tmp_path / "new/r.json").read_text() + (tmp_path / "new/r.md").read_text()
    assert str(tmp_path) not in text
    assert "it can't be calibrated" in text
    assert "| clip-b16-384 | 127 | 146 |" in (tmp_path / "new/r.md").read_text()
    assert "llava-random (checkpoint weights)" in text  # as its bundle says


def test_what_was_measured_before_a_kill_stays(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = real_towers.bench

    def killed(given: Any, wanted: Any, **more: Any) -> Any:
        if "torch-published:fp16" in wanted.only:
            raise KeyboardInterrupt
        return bench(given, wanted, **more)

    monkeypatch.setattr(real_towers, "bench", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "--towers", "clip-b16-224")
    kept = json.loads((tmp_path / "new/r.json").read_text())["towers"]["clip-b16-224"]
    assert {each["stack"] for each in kept["rows"]} >= {"onnxruntime:fastest"}


@pytest.mark.parametrize("option", [("--towers", "vit-g"), ("--only", "jax")])
def test_names_that_there_are_not(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], option: tuple[str, str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, *option)
    assert option[1] in capsys.readouterr().err
    assert measured == []


def test_a_bundle_of_other_code_pictures_or_options_has_another_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = Recipe("a", "/x/model-v1", "checkpoint", 64, (tmp_path / "1",), (tmp_path / "2",))
    own = recipe.key
    assert own == recipe.key
    from dataclasses import replace

    others = [
        replace(recipe, **change)
        for change in (
            {"model": "/x/model-v2"}, {"weights": "random"}, {"tokens": 128},
            {"judged": (tmp_path / "3",)}, {"all_layers": True},
        )  # type: ignore[var-annotated]
    ]  # fmt: skip
    assert len({own, *(each.key for each in others)}) == 1 + len(others)
    assert replace(recipe, model="/elsewhere/model-v1").key == own
    monkeypatch.setattr(bundles, "sources", lambda: "other code")
    assert recipe.key != own
