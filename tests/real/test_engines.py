"""Graphs of real towers quantised, compiled for this CPU and, ahead of time, for an RTX card.

What is chosen is chosen on some photographs and judged on others.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.real.pictures import HELD_APART, pictures
from tests.real.tier import Exported
from vzip.calibration import calibrate
from vzip.export import build
from vzip.runtime import VisionEncoder
from vzip.runtime.agreement import Agreement, compare
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.reader import Bundle, read_bundle

TOWERS = ("clip-b16-224", "dinov2-s14-336", "dinov2-s14-336-siglip")


def copied(bundle: Bundle, folder: Path) -> Path:
    """Copy a bundle, which others read, to put something into it."""
    return shutil.copytree(bundle.path, folder / "bundle", copy_function=shutil.copyfile)


def agreement(bundle: Path, precision: str | None) -> Agreement:
    """Return how a bundle's tokens agree with its own graph's, on photographs held apart."""
    files, found = pictures(HELD_APART), []
    for each in ("fp32", precision):
        with VisionEncoder.open(bundle, precision=each, backend="onnxruntime") as encoder:
            tokens = encoder.encode(files)
            found.append({EMBEDS: tokens.embeds, KEPT: tokens.kept})
    return compare(found[:1], found[1:], read_bundle(bundle).manifest)


@pytest.mark.parametrize("tower", TOWERS[:2])
def test_calibrated_graphs_keep_the_tokens(
    tower: str, exported: Exported, learnt_from: Path, tmp_path: Path
) -> None:
    bundle = copied(exported(tower), tmp_path)
    calibrate(bundle, str(learnt_from), precision="int8", say=lambda _: None)
    assert "int8" in read_bundle(bundle).manifest.precisions
    found = agreement(bundle, "int8")
    assert found.mean_overlap >= 0.95
    assert found.kept.mean >= 0.98


@pytest.mark.parametrize("tower", TOWERS)
def test_the_cpu_s_engine_keeps_the_tokens(tower: str, exported: Exported, tmp_path: Path) -> None:
    bundle = copied(exported(tower), tmp_path)
    built = build(bundle, cpu=True, say=lambda _: None)
    assert built.record.proof is not None
    assert built.record.proof["passed"] is True
    found = agreement(bundle, "fastest")
    assert found.mean_overlap >= 0.96
    assert found.kept.mean >= 0.995


@pytest.mark.parametrize(("tower", "dtype"), [*((tower, "fp16") for tower in TOWERS)])
def test_rtx_compiles_them_ahead_of_time(
    tower: str, dtype: str, exported: Exported, tmp_path: Path
) -> None:
    path = copied(exported(tower, dtype=dtype), tmp_path)
    built = build(path, rtx="sm89", say=lambda _: None)
    assert (built.record.stack, built.record.sm) == ("tensorrt_rtx", ("89",))
    bundle = read_bundle(path)
    assert len(read_engine(bundle, built.name)) == built.record.bytes
    assert built.record.bytes > 0.9 * bundle.manifest.files["model.onnx.data"].bytes
