"""`vzip inspect`: what it says of a graph and of an engine."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.export import fake_tensorrt
from tests.export.layouts import write_layout
from tests.refusals import refused
from vzip.export.algorithm.budget import Budget
from vzip.export.engines.tensorrt.api import load_bindings
from vzip.export.engines.tensorrt.layers import inspect_engine
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest
from vzip.export.graph.trace import GraphOptions
from vzip.export.inspect.describe import _takes
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BackendError

# Of the tiny checkpoint: 64 patches of 4 x 4, width 32, MLP 64, 3 of 4 layers, 16 tokens, LLM 48.
S, D, M, LAYERS, K, L = 65, 32, 64, 3, 16, 48


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("inspect")
    write_layout("llava-hf-single", folder / "tiny")
    return export_bundle(
        WeightSource(str(folder / "tiny")),
        folder / "bundle",
        budget=Budget(12, 4),
        precision="fp16",
        options=GraphOptions(batch=2),
        check_images=(),
        step=lambda _: None,
    )


def inspected(bundle: Bundle, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["inspect", str(bundle.path), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def line(lines: list[str], start: str) -> str:
    (found,) = (each for each in lines if each.startswith(start))
    return found


@pytest.mark.slow
def test_a_graph(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspected(bundle, capsys)
    assert line(lines, "tokens").startswith(f"tokens: {S} → {K} = 12 dominant + 4 contextual")
    assert f"{2 * LAYERS + 1} LayerNormalization" in line(lines, "operators")
    assert line(lines, "attention").startswith(f"attention: {LAYERS} times")
    assert "FP16" in line(lines, "values")
    islands = line(lines, "FP32 islands")
    assert "2 TopK" in islands
    assert "LayerNormalization" not in islands
    assert line(lines, "engines: none")
    # The work of the tower and the projector, counted by hand, is in FP16; the plan's in FP32.
    patches = 2 * (S - 1) * D * 3 * 4 * 4
    layer = 4 * 2 * S * D * D + 2 * 2 * S * D * M + 2 * 2 * S * S * D
    rest = 2 * K * (D * L + L * L)
    match = re.search(r"([\d.e-]+) GFLOP in FP16", line(lines, "work per image"))
    assert match is not None
    assert float(match[1]) * 1e9 == pytest.approx(patches + LAYERS * layer + rest, rel=0.01)
    weights = line(lines, "weights")
    size = bundle.manifest.files["model.onnx.data"].bytes / 2**20
    match = re.match(r"weights: ([\d.]+) MiB", weights)
    assert match is not None
    assert float(match[1]) == pytest.approx(size, abs=0.1)


@pytest.mark.slow
def test_what_it_selects_by_and_takes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspected(bundle, capsys)
    assert line(lines, "tokens").endswith("(average), selected by visionzip")
    assert line(lines, "takes") == "takes: image, video"
    manifest = bundle.manifest
    tiles = Tiling(((32, 64), (64, 32)), "newline")
    tiled = dataclasses.replace(manifest, media=("image",), tiling=tiles)
    assert list(_takes(tiled)) == ["image", "tiles: newline, 2 resolutions"]
    tower = SimpleNamespace(pool=2)
    pooled = SimpleNamespace(media=("video",), tiling=None, tower=tower)
    assert list(_takes(pooled)) == ["video", "pooled 2x2"]  # type: ignore[arg-type]


def test_a_damaged_graph(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert main(["inspect", str(tiny_bundle)]) == 2
    assert "model.onnx has SHA-256" in capsys.readouterr().err


def test_without_onnx(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["inspect", str(tiny_bundle)]) == 2
    assert "'vzip inspect' of a graph needs the package 'onnx'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_that_was_made_ahead_of_time(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engine(bundle.path, BuildRequest(rtx="sm89", name="ada"), say=lambda _: None)
    monkeypatch.setattr(cuda, "candidates", lambda: iter(()))  # a machine with a GPU tests it too
    lines = inspected(bundle, capsys, "--engine", "ada")
    assert line(lines, "engine: ada").endswith("whole")
    assert line(lines, "built on") == "built on: no GPU, ahead of time; for SM 89"
    assert line(lines, "proof") == "proof: not proven"
    assert "batch 2 to 2" in line(lines, "precision")
    assert "can't be listed here: found none, expected libcudart" in line(lines, "layers")
    assert "SM 89, not proven" in line(inspected(bundle, capsys), "engine ada")

    assert main(["inspect", str(bundle.path), "--engine", "other"]) == 2
    assert "has no engine 'other', expected one of ada" in capsys.readouterr().err
    plan = bundle.path / "engines" / "ada.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert main(["inspect", str(bundle.path), "--engine", "ada"]) == 2
    assert "it was truncated or replaced" in capsys.readouterr().err


def test_layers_and_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch, fake_tensorrt.make("10.3"))
    monkeypatch.setattr(cuda, "load", lambda: None)
    layers = inspect_engine(load_bindings("tensorrt"), memoryview(b"ftrt and so on"))
    assert layers.fused_attention == 2
    assert layers.kinds() == {"kgen": 4}
    assert layers.precisions() == {"Half": 4}
    assert layers.layers[0] == ("conv", "kgen", "Half")
    assert layers.memory == 2**20


def test_a_tensorrt_that_cant_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch, fake_tensorrt.make("10.3", gpu=False))
    monkeypatch.setattr(cuda, "load", lambda: None)
    with refused(BackendError, got="10.3.0.30", cause="driver"):
        inspect_engine(load_bindings("tensorrt"), memoryview(b"ftrt and so on"))


def test_an_engine_is_inspected_without_the_packages_of_the_export(tiny_bundle: Path) -> None:
    """As on a Jetson: numpy, Pillow and TensorRT are all there is."""
    build_engine(tiny_bundle, BuildRequest(rtx="sm89", name="ada"), say=lambda _: None)
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnxscript', 'onnxruntime', 'torch', 'transformers', 'tqdm'):\n"
        "    sys.modules[name] = None\n"
        "from vzip.runtime.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "inspect", str(tiny_bundle)]
    done = subprocess.run(
        [*command, "--engine", "ada"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "proof: not proven" in done.stdout
    graph = subprocess.run(command, capture_output=True, text=True, check=False)
    assert graph.returncode == 2
    assert "needs the package 'onnx'" in graph.stderr
