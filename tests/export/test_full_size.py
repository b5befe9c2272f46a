"""CLIP ViT-L/14-336 at its true size, random weights: the graph is the untouched model.

No language model is built. The exporter runs in a process of its own: its memory ends with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vzip.runtime.bundle.reader import Bundle, read_bundle


def export(folder: Path, precision: str) -> Bundle:
    """Export llava-1.5-7b with the check on vzip's own images: two photographs and two scenes."""
    arguments = [
        *("--model", "llava-1.5-7b", "--weights", "random", "--tokens", "64"),
        *("--dtype", precision, "-o", str(folder)),
    ]
    code = "import sys; from vzip.export.cli.export import vzip_export; sys.exit(vzip_export())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return read_bundle(folder)


@pytest.mark.slow
def test_fp32_is_the_untouched_tower_the_oracle_and_the_projector(tmp_path: Path) -> None:
    bundle = export(tmp_path / "fp32", "fp32")
    manifest = bundle.manifest
    assert manifest.tower.tokens == 577
    assert manifest.selection.dominant == 54
    assert manifest.selection.contextual == 10
    assert manifest.outputs[0].shape == (1, 64, 4096)
    assert manifest.model.weights == "random"
    parity = manifest.parity
    assert parity is not None
    assert parity["passed"] is True
    assert parity["images"] == 4
    # Kept indices equal; not even a swap within the margin.
    assert (parity["kept_swaps"], parity["kept_disagreements"]) == (0, 0)
    assert parity["kept_overlap"] == 1.0
    assert parity["group_disagreements"] == 0
    assert parity["max_error"] <= 1e-4
    assert parity["min_cosine"] >= 0.99999
    # 23 of 24 layers, patch embedding and projector, in FP32: nothing of the dead layer, no copy.
    size = manifest.files["model.onnx.data"].bytes
    layers, projector = 23 * 12_596_224, 1024 * 4096 + 4096 * 4096 + 2 * 4096
    needed = layers + projector + 577 * 1024 + 588 * 1024 + 3 * 1024
    assert needed * 4 <= size <= needed * 4 * 1.001
    assert json.loads((bundle.path / "manifest.json").read_text())["parity"] == dict(parity)


@pytest.mark.full
def test_fp16_passes_its_gate(tmp_path: Path) -> None:
    manifest = export(tmp_path / "fp16", "fp16").manifest
    assert manifest.outputs[0].dtype == "float16"
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    assert manifest.parity["max_error"] <= 2e-2
    assert manifest.parity["min_cosine"] >= 0.999
    size = manifest.files["model.onnx.data"].bytes
    assert 620e6 < size < 640e6  # half of FP32's
