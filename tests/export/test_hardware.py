"""The table of targets, what an export takes from it, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from tests.refusals import refused
from vzip.export import hardware
from vzip.export.cli import export as cli
from vzip.export.hardware import TARGETS, Software, TargetChoice, find, resolve, table
from vzip.runtime.cli.main import main
from vzip.runtime.errors import InvalidInputError


def test_the_table_names_what_the_issue_names():
    assert {
        "orin-nano", "orin-nx", "agx-orin", "thor", "t4", "l4", "a10", "a100", "h100", "h200",
        "b200", "rtx", "rtx30", "rtx40", "rtx50",
    } == set(TARGETS)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sm", "memory_gb"),
    [
        ("orin-nano", (87,), (4, 8)),
        ("orin-nx", (87,), (8, 16)),
        ("agx-orin", (87,), (32, 64)),
        ("thor", (110,), (64, 128)),
        ("t4", (75,), (16,)),
        ("l4", (89,), (24,)),
        ("a10", (86,), (24,)),
        ("a100", (80,), (40, 80)),
        ("h100", (90,), (80, 94)),
        ("b200", (100,), (180,)),
        ("rtx50", (120,), (8, 12, 16, 24, 32)),
    ],
)
def test_facts(name, sm, memory_gb):
    assert (TARGETS[name].sm, TARGETS[name].memory_gb) == (sm, memory_gb)


def test_opset_17_wherever_tensorrt_8_may_be():
    for target in TARGETS.values():
        legacy = any(each.version.startswith("8.6") for each in target.software)
        assert target.opset == (17 if legacy else 18), target.name
    assert TARGETS["thor"].opset == 18
    assert TARGETS["orin-nano"].opset == 17
    assert Software("1.7", "RTX").newest_opset == 18


def test_fp8_from_ada_on():
    able = {name for name, target in TARGETS.items() if "fp8" in target.hardware_precisions}
    assert able == {"thor", "l4", "h100", "h200", "b200", "rtx40", "rtx50"}
    assert "bf16" not in TARGETS["t4"].hardware_precisions


def test_a_target_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TARGETS["t4"].sm = (80,)  # type: ignore[misc]
    with pytest.raises(TypeError):
        TARGETS["t4"] = TARGETS["l4"]  # type: ignore[index]


# --- resolving -------------------------------------------------------------------------------


def test_without_a_target_nothing_changes():
    assert resolve(None, opset=None, precision=None, batch=1) == TargetChoice(18, "fp32")
    assert resolve(None, opset=17, precision="fp16", batch=9999) == TargetChoice(17, "fp16")


def test_a_target_fills_in_what_was_not_said():
    assert resolve("orin-nano", opset=None, precision=None, batch=1) == TargetChoice(
        17, "fp16", ("target orin-nano: opset 17, fp16",)
    )
    assert resolve("thor", opset=None, precision="fp32", batch=1) == TargetChoice(
        18, "fp32", ("target thor: opset 18, fp32",)
    )


def test_what_was_said_stays_and_is_commented():
    choice = resolve("orin-nano", opset=18, precision="fp16", batch=1)
    assert choice.opset == 18
    assert choice.notes[1] == ("opset 18 is too new for TensorRT 8.6.2 (JetPack 6.0); 17 suits all")


def test_a_batch_that_only_the_bigger_module_holds_is_noted():
    notes = resolve("orin-nano", opset=None, precision=None, batch=64).notes
    assert notes[-1] == "a batch of 64 will hardly fit the one with 4 GB (estimate)"
    notes = resolve("l4", opset=None, precision=None, batch=64).notes
    assert notes[-1] == "a batch above 16 hardly raises its throughput (estimate)"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("orin-nano", {"precision": "fp8"}, {"got": ("fp8", "orin-nano"), "cause": ("8.7", "8.9")}),
        ("rtx", {"precision": "fp8"}, {"cause": ("8.6", "8.9"), "cure": "fp32 or fp16"}),
        ("l4", {"precision": "fp8"}, {"got": "'fp8'", "expected": "fp32 or fp16"}),
        (None, {"precision": "FP16"}, {"got": "'FP16'", "expected": "fp32 or fp16"}),
        ("orin-nano", {"batch": 81}, {"got": ("81", "orin-nano"), "cure": ("80", "--target")}),
        ("t4", {"batch": 1000}, {"got": ("1000", "t4"), "cure": ("328", "--target")}),
    ],
)
def test_contradictions_name_both_sides(name, options, said):
    with refused(InvalidInputError, **said):
        resolve(name, **{"opset": None, "precision": None, "batch": 1, **options})


def test_an_unknown_target_lists_the_known_ones():
    with refused(InvalidInputError, got="'jetson'", expected=tuple(TARGETS), cure="vzip targets"):
        find("jetson")


# --- the command lines -----------------------------------------------------------------------


def exported(monkeypatch, tmp_path, *arguments):
    """What `vzip export` passes on: the graph's opset and batch, and the precision."""
    from vzip.export import pipeline

    seen = {}

    def export_bundle(source, output, **options):
        seen.update(options, output=output)
        raise InvalidInputError("enough")

    monkeypatch.setattr(pipeline, "export_bundle", export_bundle)
    with pytest.raises(InvalidInputError, match="enough"):
        cli.main(["--model", "demo", "--no-check", *arguments], prog="vzip export")
    return seen


def test_export_takes_opset_and_precision_from_the_target(monkeypatch, tmp_path, capsys):
    seen = exported(monkeypatch, tmp_path, "--target", "orin-nano")
    assert (seen["options"].opset, seen["precision"]) == (17, "fp16")
    assert seen["output"].name == "demo-64-fp16"
    assert "target orin-nano: opset 17, fp16\n" in capsys.readouterr().err


def test_export_keeps_what_the_user_said(monkeypatch, tmp_path):
    seen = exported(
        monkeypatch, tmp_path, "--target", "orin-nano", "--dtype", "fp32", "--opset", "18"
    )
    assert (seen["options"].opset, seen["precision"]) == (18, "fp32")


def test_export_without_a_target_is_as_before(monkeypatch, tmp_path):
    seen = exported(monkeypatch, tmp_path)
    assert (seen["options"].opset, seen["precision"]) == (18, "fp32")
    assert seen["output"].name == "demo-64-fp32"


def test_export_refuses_before_weights_are_read():
    with refused(InvalidInputError, got=("500", "--target orin-nano")):
        cli.main(
            ["--model", "demo", "--target", "orin-nano", "--max-batch", "500"],
            prog="vzip export",
        )


def test_the_table_is_readable_at_100_columns():
    lines = table().splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)
    for name, target in TARGETS.items():
        row = next(line for line in lines if line.split()[:1] == [name])
        assert hardware.dotted(target.sm[0]) in row
    assert "estimates" in lines[-2]


def test_vzip_targets_prints_it(capsys):
    assert main(["targets"]) == 0
    assert capsys.readouterr().out == table() + "\n"
