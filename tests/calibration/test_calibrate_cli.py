"""`vzip calibrate`: once for real on a tiny model, the rest with a quantiser that is quick."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.agreements import agreement
from tests.export.layouts import write_layout
from tests.faults import fill_disk
from tests.precisions import add_precision, fill
from tests.refusals import refused
from tests.snippets import run_snippets
from vzip.calibration.cli import calibrate as calibrate_cli
from vzip.calibration.quantization import calibrate, quantize
from vzip.calibration.quantization.quantize import LayerReport, Report
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.quantization.sensitivity import Effect
from vzip.calibration.samples import Samples
from vzip.export.algorithm.budget import Budget
from vzip.export.engines.published import build_lock
from vzip.export.graph.trace import GraphOptions
from vzip.export.graph.traced import GraphInput
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import bundle_writer, update_manifest
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BackendError, BundleError, ParityError
from vzip.runtime.files import locks

AGREEMENT = agreement(0.97, 0.998, least_overlap=0.9, least_cosine=0.95)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of which one is there twice, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(10):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((80, 60)).save(folder / f"{number}.png")
    shutil.copyfile(folder / "3.png", folder / "again.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


# For real


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_layout("llava-hf-single", folder / "checkpoint")
    graph_input: GraphInput = "image"
    export_bundle(
        WeightSource(str(folder / "checkpoint"), seed=None),
        folder / "bundle",
        budget=Budget(12, 4),
        precision="fp32",
        options=GraphOptions(graph_input, 2, False, 17),
        check_images=(),
        step=lambda _: None,
    )
    return folder / "bundle"


@pytest.mark.slow
def test_calibrates_and_says_what_it_did(
    exported: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_bundle(exported)
    arguments = ["calibrate", str(exported), "--images", str(pictures), "--precision", "int8"]
    assert main([*arguments, "--min-cosine", "none", "--min-agreement", "0.7"]) == 0
    said = capsys.readouterr()
    rows = [line.split(maxsplit=1) for line in said.out.splitlines()]
    assert [row[0] for row in rows if row[0] != "in"][:4] == [
        "graph",
        "samples",
        "recipe",
        "quantised",
    ]
    assert {"overlap", "cosine", "took"} <= {row[0] for row in rows}
    assert "left out: 1 that can't be read and 1 duplicate" in said.err
    after = read_bundle(exported)
    record = after.manifest.precisions["int8"]
    assert (record.opset, record.images) == (17, 10)
    samples = Samples.open(str(pictures), count=None)
    assert record.samples_sha256 == samples.digest
    with after.open_file("calibration.int8.json") as file:
        report = json.load(file)
    assert report["samples"]["digest"] == samples.digest
    assert report["samples"]["unreadable"] == 1
    assert report["recipe"]["keep_cosine"] is None
    assert record.recipe == {name: v for name, v in report["recipe"].items() if v is not None}
    assert record.agreement["mean_overlap"] == report["agreement"]["mean_overlap"]
    # Everything else of the bundle is what it was.
    quantised = {"model.int8.onnx", "model.int8.onnx.data", "calibration.int8.json"}
    files = {n: entry for n, entry in after.manifest.files.items() if n not in quantised}
    own = dataclasses.replace(after.manifest, precisions={}, files=files)
    assert own == before.manifest
    assert names(exported) == sorted([*after.manifest.files, "engines", "manifest.json"])
    # It runs, smaller, and gives nearly the same.
    weights = after.manifest.files
    assert weights["model.int8.onnx.data"].bytes < 0.6 * weights["model.onnx.data"].bytes
    picture = Image.open(pictures / "0.png")
    embeds = {}
    for precision in ("fp32", "int8"):
        with VisionEncoder.open(exported, "onnxruntime", precision=precision) as encoder:
            embeds[precision] = encoder.encode(picture).embeds[0]
    assert not np.array_equal(embeds["fp32"], embeds["int8"])
    one, other = (each.ravel() for each in embeds.values())
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9


@pytest.mark.slow
def test_limits_that_cant_be_kept_leave_the_bundle_as_it_was(
    exported: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(exported, bundle)
    before = names(bundle), read_bundle(bundle)
    arguments = ["calibrate", str(bundle), "--images", str(pictures), "--precision", "int8"]
    assert main([*arguments, "--count", "3", "--min-agreement", "1", "--min-cosine", "1"]) == 2
    assert "no linear layer can be quantised to int8" in capsys.readouterr().err
    assert (names(bundle), read_bundle(bundle)) == before


# With a quantiser that is quick


class Quick:
    """Stands for what `quantize` returns: a golden graph, and a report."""

    def __init__(self, recipe: Recipe, samples: Samples, layers: tuple[LayerReport, ...]) -> None:
        self.precision, self.opset = recipe.precision, 18
        self.report = Report(
            recipe=recipe,
            samples=samples.to_json(),
            calibrated=8,
            held_apart=2,
            deciding=8,
            rounds=1,
            opset=18,
            layers=layers,
            agreement=AGREEMENT,
            unrefined=agreement(0.5, 0.998),
            seconds=12.3,
            peak_bytes=3 * 2**30,
            threads=2,
        )

    def save(self, folder: Path) -> None:
        fill(folder, self.precision)
        (folder / f"calibration.{self.precision}.json").unlink()


GOOD = LayerReport(
    "layers.0.fc1", "fc1", 1.0, 2.0, 4.0, 8, 0, (90, 100), 0.01, None, quantised=True, reason=None
)
HIGH = LayerReport(
    "layers.1.fc2", "fc2", 1.0, 9.0, None, 0, 16, (0, 100), 0.1, Effect(0.6, 0.9, 0.1, 0.1),
    quantised=False, reason="it loses",
)  # fmt: skip


class Quantiser:
    """Stands for `quantize`; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Bundle, Samples, Recipe]] = []
        self.layers: tuple[LayerReport, ...] = (GOOD, HIGH)

    def __call__(self, bundle: Bundle, samples: Samples, recipe: Recipe, *, step: Any) -> Quick:
        self.asked.append((bundle, samples, recipe))
        step("quantising quickly")
        return Quick(recipe, samples, self.layers)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Quantiser]:
    quantiser = Quantiser()
    monkeypatch.setattr(quantize, "quantize", quantiser)
    return quantiser


def arguments_of(bundle: Path, pictures: Path, *more: str) -> list[str]:
    given = ["calibrate", str(bundle), "--images", str(pictures)]
    return [*given, *more] if "--precision" in more else [*given, "--precision", "int8", *more]


def test_prints_a_short_table(
    tiny_bundle: Path, pictures: Path, quick: Quantiser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments_of(tiny_bundle, pictures)) == 0
    said = capsys.readouterr()
    limits = "overlap of at least 0.95 and cosine of at least 0.995"
    assert said.out.splitlines() == [
        "graph        model.int8.onnx: 0.0 MiB, opset 18; in fp32 it has 0.0 MiB",
        "samples      8 images calibrated on, 2 others to judge by",
        f"recipe       int8, error, smoothing 0.5, {limits}",
        "quantised    1 of 2 linear layers",
        "8 bits       45.0% of the linear layers' multiplications",
        "all of them  would have an overlap of 0.5000 and a cosine of 0.998000",
        "in fp32      layers.1.fc2: it loses",
        "overlap      0.9700 of the kept tokens stay (at worst 0.9000)",
        "cosine       0.998000 on average (at worst 0.950000)",
        "took         12 s on 2 cores, at most 3.0 GiB of memory",
    ]
    assert "quantising quickly" in said.err
    quick.layers = (GOOD,)
    assert main(arguments_of(tiny_bundle, pictures, "--precision", "fp8")) == 0
    out = capsys.readouterr().out
    assert "quantised  1 of 1 linear layer" in out
    assert "in fp32  " not in out
    assert set(read_bundle(tiny_bundle).manifest.precisions) == {"int8", "fp8"}


def test_passes_on_what_was_asked(tiny_bundle: Path, pictures: Path, quick: Quantiser) -> None:
    assert main(arguments_of(tiny_bundle, pictures)) == 0
    options = ["--method", "mse", "--count", "4", "--smooth", "0.25", "--min-agreement", "0.9"]
    options += ["--min-cosine", "none", "--precision", "fp8"]
    assert main(arguments_of(tiny_bundle, pictures, *options)) == 0
    (first, all_of_them, default), (second, four, chosen) = quick.asked
    assert (len(all_of_them), len(four)) == (10, 4)
    assert default == Recipe("int8")
    assert chosen == Recipe("fp8", "mse", 0.25, 0.9, None)
    assert first.quantised is second.quantised is None  # the bundle's own graph, both times
    assert main(arguments_of(tiny_bundle, pictures, "--smooth", "none")) == 0
    assert quick.asked[-1][2].smoothing is None


def test_what_cant_be_asked_for(
    tiny_bundle: Path, pictures: Path, quick: Quantiser, capsys: Any
) -> None:
    for options, value in (
        (["--smooth", "much"], "'much'"),
        (["--smooth", "1.5"], "smoothing=1.5"),
        (["--min-agreement", "0"], "keep_agreement=0.0"),
        (["--precision", "int4"], "'int4'"),
        (["--method", "median"], "'median'"),
        (["--precision", "fp8", "--method", "entropy"], "method='entropy'"),
        (["--count", "99"], "at least 99"),
    ):
        assert main(arguments_of(tiny_bundle, pictures, *options)) == 2
        assert value in capsys.readouterr().err
        assert not quick.asked
        assert not read_bundle(tiny_bundle).manifest.precisions


def test_a_folder_that_cant_be_written_is_refused_before_the_work(
    tiny_bundle: Path,
    pictures: Path,
    quick: Quantiser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(calibrate.os, "access", lambda *_: False)
    assert main(arguments_of(tiny_bundle, pictures)) == 2
    assert f"{tiny_bundle}: the folder is read-only for this user" in capsys.readouterr().err
    assert not quick.asked


def test_a_bundle_that_failed_its_check_is_warned_of_first(
    tiny_bundle: Path, pictures: Path, quick: Quantiser, capsys: Any
) -> None:
    update_manifest(read_bundle(tiny_bundle), parity={"min_cosine": 0.25, "passed": False})
    assert main(arguments_of(tiny_bundle, pictures)) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "min cosine 0.25, expected at least 0.99999" in first


def test_a_full_disk_and_one_without_locks_are_known_before_the_work(
    tiny_bundle: Path,
    pictures: Path,
    quick: Quantiser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    before = names(tiny_bundle)
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert main(arguments_of(tiny_bundle, pictures)) == 2
    assert "No space left" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_take", lambda *_: None)
        assert main(arguments_of(tiny_bundle, pictures)) == 2
    assert "its file system has no locks" in capsys.readouterr().err
    assert not quick.asked
    assert names(tiny_bundle) == before
    assert main(arguments_of(tiny_bundle, pictures)) == 0


def test_a_disk_that_fills_or_an_interruption_meanwhile_leaves_the_bundle(
    tiny_bundle: Path,
    pictures: Path,
    quick: Quantiser,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    before = read_bundle(tiny_bundle)
    with monkeypatch.context() as patch:
        fill_disk(patch, after=1)  # the trial succeeds
        assert main(arguments_of(tiny_bundle, pictures)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "No space left" in line
    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "run", interrupted)
        assert main(arguments_of(tiny_bundle, pictures)) == 130
    assert read_bundle(tiny_bundle) == before
    assert [name for name in names(tiny_bundle) if "int8" in name or name.startswith(".")] == []


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_was_made_is_in_the_bundle_before_it_is_told(
    tiny_bundle: Path, pictures: Path, quick: Quantiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(calibrate_cli, "emit", broken)
    assert main(arguments_of(tiny_bundle, pictures)) == 141
    assert "int8" in read_bundle(tiny_bundle).manifest.precisions


@pytest.mark.parametrize("package", ["onnx", "ml_dtypes"])
def test_a_missing_package_is_named(
    tiny_bundle: Path, pictures: Path, package: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments_of(tiny_bundle, pictures)) == 2
    said = capsys.readouterr().err
    assert f"'vzip calibrate' needs the package '{package}'" in said
    assert "vzip[export]" in said


def test_an_engine_that_was_built_meanwhile_stays(
    tiny_bundle: Path, pictures: Path, quick: Quantiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(bundle: Bundle, *rest: Any, **options: Any) -> Quick:
        update_manifest(read_bundle(bundle.path), parity={"passed": True})
        return quick(bundle, *rest, **options)

    monkeypatch.setattr(quantize, "quantize", meanwhile)
    assert main(arguments_of(tiny_bundle, pictures)) == 0
    manifest = read_bundle(tiny_bundle).manifest
    assert manifest.parity == {"passed": True}
    assert "int8" in manifest.precisions


def made_for(path: Path, pictures: Path) -> tuple[Bundle, Any, Samples]:
    samples = Samples.open(str(pictures), count=None)
    return read_bundle(path), Quick(Recipe("int8"), samples, (GOOD,)), samples


def test_a_bundle_that_was_exported_anew_is_left_alone(
    tiny_bundle: Path, tiny_static_bundle: Path, pictures: Path
) -> None:
    bundle, made, samples = made_for(tiny_bundle, pictures)
    with bundle_writer(tiny_bundle) as writer:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(tiny_static_bundle / name, writer.folder / name)
        after = writer.publish(read_bundle(tiny_static_bundle).manifest)
    with refused(BundleError, got=str(tiny_bundle)):
        calibrate.publish(bundle, made, samples)
    assert read_bundle(tiny_bundle) == after


@pytest.mark.parametrize(
    ("kind", "fault"), [(BundleError, "'nowhere'"), (BackendError, "NaN or infinite")]
)
def test_a_graph_that_does_not_run_is_not_published(
    tiny_bundle: Path, pictures: Path, kind: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = add_precision(tiny_bundle, report="the old one").manifest
    bundle, made, samples = made_for(tiny_bundle, pictures)

    def spoilt(folder: Path) -> None:
        Quick.save(made, folder)
        graph = folder / "model.int8.onnx"
        model = graph.read_bytes()
        loaded = onnx.load_model_from_string(model)
        tensors = loaded.graph.initializer
        (bias,) = (each.raw_data for each in tensors if each.name == "project_bias")
        nan = model.replace(bias, b"\xff" * len(bias))
        loaded.graph.node[-1].input[1] = "nowhere"
        unusable = loaded.SerializeToString()
        graph.write_bytes(unusable if kind is BundleError else nan)

    monkeypatch.setattr(made, "save", spoilt)
    with refused(kind, got=fault):
        calibrate.publish(bundle, made, samples)
    assert read_bundle(tiny_bundle).manifest == before
    assert names(tiny_bundle) == sorted([*before.files, "engines", "manifest.json"])


def test_a_static_batch_is_filled(tiny_bundle: Path, pictures: Path) -> None:
    bundle, made, _ = made_for(tiny_bundle, pictures)
    one = Samples.open(str(pictures), count=2)[:1]
    assert calibrate.publish(bundle, made, one).quantised == "int8"


def test_one_process_at_a_time_changes_a_bundle(
    tiny_bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, made, samples = made_for(tiny_bundle, pictures)
    published = threading.Event()

    def publish() -> None:
        calibrate.publish(bundle, made, samples)
        published.set()

    other = threading.Thread(target=publish)
    with build_lock(bundle, lambda _: None):
        other.start()
        assert not published.wait(0.5)
        assert not read_bundle(tiny_bundle).manifest.precisions
    other.join(60)
    assert published.is_set()
    assert "another process works on" in capsys.readouterr().err
    assert read_bundle(tiny_bundle).manifest.precisions


def test_what_goes_wrong_in_the_quantiser_leaves_nothing(
    tiny_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ParityError("the limits can't be kept")

    before = names(tiny_bundle)
    monkeypatch.setattr(quantize, "quantize", fails)
    assert main(arguments_of(tiny_bundle, pictures)) == 2
    assert "vzip: error: the limits can't be kept" in capsys.readouterr().err
    assert names(tiny_bundle) == before


def test_the_snippets_of_the_documentation_run(tiny_bundle: Path, pictures: Path) -> None:
    add_precision(tiny_bundle)
    left = run_snippets(
        "calibration.md", {"my_bundle": str(tiny_bundle), "cat.jpg": str(pictures / "0.png")}
    )
    assert left["tokens"].embeds.shape == (1, 7, 6)
