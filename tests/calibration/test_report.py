"""`vzip report`: what is in the page, and that nothing can get out of it or into it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.agreements import agreement
from tests.export.layouts import write_layout
from tests.faults import fill_disk
from tests.pages import HOSTILE, assert_shut
from tests.precisions import add_precision
from tests.refusals import refused
from vzip.calibration import report as write_report
from vzip.calibration.quantization.quantize import LayerReport, Report
from vzip.calibration.quantization.recipe import Recipe
from vzip.calibration.quantization.sensitivity import Effect
from vzip.calibration.reporting import content as report
from vzip.calibration.reporting.content import MOST_IMAGES, Savings, gather, parse_calibration
from vzip.calibration.reporting.page import page
from vzip.export.pictures import reference_images
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.encoder import CompressedTokens
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
)
from vzip.runtime.machine import timing


def calibration(**change: Any) -> dict[str, Any]:
    """What `vzip calibrate` writes, as its own classes do."""
    found = agreement(0.9731, 0.99873, least_overlap=0.8642, least_cosine=0.95124)
    small, large = Effect(0.9911, 0.99912, 0.001, 0.0517), Effect(0.8123, 0.9534, 0.05, 0.9091)
    why = "alone it leaves an overlap of 0.8123"
    layers = (
        LayerReport(
            "layers.0.qkv",
            "qkv",
            1.0,
            2.0,
            3.0,
            8,
            0,
            (9, 10),
            0.1,
            small,
            quantised=True,
            reason=None,
        ),
        LayerReport(
            "layers.3.fc2",
            "fc2",
            1.0,
            2.0,
            None,
            0,
            16,
            (0, 10),
            0.2,
            large,
            quantised=False,
            reason=why,
        ),
    )
    made = Report(
        recipe=Recipe(), samples={"count": 64, "digest": "a" * 64}, calibrated=52, held_apart=12,
        deciding=8, rounds=1, opset=18, layers=layers, agreement=found, unrefined=None,
        seconds=3.0, peak_bytes=1, threads=2,
    )  # fmt: skip
    return json.loads(json.dumps(made.to_json())) | change


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)


@pytest.fixture
def images() -> list[tuple[str, Any]]:
    return [(path.name, lambda path=path: path) for path in reference_images()[:2]]


@pytest.mark.slow
def test_a_page_has_the_numbers_of_bundle_calibration_and_measurements(
    tiny_bundle: Path, images: list[tuple[str, Any]]
) -> None:
    add_precision(tiny_bundle, "int8", json.dumps(calibration()))
    content = gather(read_bundle(tiny_bundle), images, source="two", step=lambda _: None)
    own, int8 = content.graphs
    assert (own.precision, int8.precision) == ("fp32", "int8")
    assert int8.agreement is not None
    assert own.timing is not None
    assert int8.timing is not None
    read = assert_shut(page(content))
    for word in (
        "tests/tiny, 7 tokens", "4 dominant + 3 contextual (average), CLS among the dominant",
        "0.9731", "0.8642", "0.998730", "0.951240", "52 images to calibrate on, 12 to judge by",
        "layers.0.qkv qkv int8 0.9911 0.999120 0.0517",
        "layers.3.fc2 fc2 fp32 0.8123 0.953400 0.9091",
        "In fp32: layer why layers.3.fc2 alone it leaves an overlap of 0.8123",
        "1 of 2 linear layers are quantised", f"{int8.agreement.every.mean:.6f}",
        f"{own.timing.median_ms:.2f}", f"{int8.timing.p90_ms:.2f}",
        f"int8: {100 * content.images[1].overlays['int8'][1]:.1f} % of fp32's kept tokens",
        *(name for name, _ in images), *(entry.sha256 for entry in content.manifest.files.values()),
    ):  # fmt: skip
        assert word in read.words, word


@pytest.mark.slow
def test_what_is_shown_side_by_side_is_what_each_precision_keeps(
    tiny_bundle: Path, images: list[tuple[str, Any]]
) -> None:
    bundle = add_precision(tiny_bundle, "int8", json.dumps(calibration()))
    content = gather(read_bundle(tiny_bundle), images, source="two", step=lambda _: None)
    paths = [read() for _, read in images]
    with VisionEncoder.open(tiny_bundle, "onnxruntime") as encoder:
        own = encoder.encode(paths)
    with VisionEncoder.open(bundle, "onnxruntime") as encoder:
        other = encoder.encode(paths)
    for place, shown in enumerate(content.images):
        share = len(set(own.kept[place]) & set(other.kept[place])) / own.kept.shape[1]
        assert shown.overlays["int8"][1] == pytest.approx(share)
        assert shown.overlays["fp32"][1] == 1
    sources = [a["src"] or "" for tag, a in assert_shut(page(content)).tags if tag == "img"]
    assert len(sources) == 2 * 3  # what the tower sees, FP32, INT8
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
            assert picture.width == 420
            assert len(source) < 150_000


def encoded(manifest: Manifest, kept: list[int]) -> CompressedTokens:
    """Tokens of one image of the golden bundle; all that isn't kept goes into the first group."""
    groups = np.where(np.isin(np.arange(17), kept), -1, 0)
    rest = np.flatnonzero(groups == 0)
    groups[rest[:: len(rest) // 3][:3]] = range(3)
    embeds = np.zeros((1, 7, manifest.llm.hidden_size), np.float32)
    return CompressedTokens(embeds, np.array([kept]), lambda: groups[None])


def test_a_precision_that_keeps_others_is_drawn_with_its_own(tiny_bundle: Path) -> None:
    manifest = read_bundle(tiny_bundle).manifest
    image = Image.new("RGB", (16, 16), "white")
    tokens = {
        "fp32": [encoded(manifest, [0, 1, 2, 3])],
        "int8": [encoded(manifest, [0, 1, 2, 16])],
        "fp8": [encoded(manifest, [0, 1, 2, 3])],
    }
    (shown,) = report._shown([("white", image)], tokens, manifest)
    assert {name: share for name, (_, share) in shown.overlays.items()} == {
        "fp32": 1.0, "int8": 0.75, "fp8": 1.0,
    }  # fmt: skip
    pictures = {name: picture for name, (picture, _) in shown.overlays.items()}
    assert pictures["fp32"] == pictures["fp8"] != pictures["int8"]
    with Image.open(io.BytesIO(pictures["int8"])) as picture:  # the last patch is clear
        assert min(picture.getpixel((400, 400))) > 200 > max(picture.getpixel((280, 20)))


@pytest.mark.slow
def test_whatever_a_bundle_or_a_file_is_called_stays_text(
    tiny_bundle: Path, images: list[tuple[str, Any]]
) -> None:
    hostile = calibration()
    hostile["layers"][0]["name"] = hostile["layers"][1]["reason"] = "</table>" + HOSTILE
    hostile["recipe"][HOSTILE] = HOSTILE
    add_precision(tiny_bundle, "int8", json.dumps(hostile))
    bundle = read_bundle(tiny_bundle)
    manifest = dataclasses.replace(
        bundle.manifest,
        model=dataclasses.replace(bundle.manifest.model, id=HOSTILE, revision=HOSTILE),
        versions={HOSTILE: HOSTILE},
    )
    changed = Bundle(bundle.path, manifest)
    content = gather(changed, [(HOSTILE, images[0][1])], source=HOSTILE, step=lambda _: None)
    text = page(dataclasses.replace(content, bundle=HOSTILE))
    read = assert_shut(text)
    assert "<script" not in text
    assert read.words.count(HOSTILE) >= 10


@pytest.mark.slow
def test_what_is_not_there_says_how_to_get_it(
    tiny_bundle: Path, images: list[tuple[str, Any]]
) -> None:
    bundle = read_bundle(tiny_bundle)
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, parity=None))
    words = assert_shut(page(gather(bundle, images, source="two", step=lambda _: None))).words
    assert "Not measured. vzip check BUNDLE compares the two." in words
    assert "vzip calibrate BUNDLE --images FOLDER --precision int8" in words
    assert "only the demo model, with its own weights, comes with questions" in words
    assert "The language model's sizes can't be read here:" in words
    assert "none; vzip build makes one" in words


@pytest.mark.slow
def test_a_precision_that_can_not_run_here_is_said_and_the_rest_goes_on(
    tiny_bundle: Path, images: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_precision(tiny_bundle, "fp8", json.dumps(calibration()))
    really = VisionEncoder.open

    def opened(bundle: Any, backend: str, precision: str | None = None) -> VisionEncoder:
        if precision == "fp8":
            raise BackendError("no kernel for <E4M3> here")
        return really(bundle, backend, precision=precision)

    monkeypatch.setattr(VisionEncoder, "open", opened)
    content = gather(read_bundle(tiny_bundle), images, source="two", step=lambda _: None)
    assert (content.graphs[1].unusable, content.graphs[1].timing) == (
        "no kernel for <E4M3> here", None,
    )  # fmt: skip
    read = assert_shut(page(content))
    assert "fp8 was not run here: no kernel for <E4M3> here" in read.words
    assert "0.9731" in read.words  # what its calibration found is there all the same


@pytest.mark.slow
def test_savings_are_those_of_the_checkpoints_language_model(
    tiny_bundle: Path, images: list[tuple[str, Any]], tmp_path: Path
) -> None:
    write_layout("llava-hf-single", tmp_path / "model")
    bundle = read_bundle(tiny_bundle)
    model = dataclasses.replace(bundle.manifest.model, id=str(tmp_path / "model"))
    changed = Bundle(bundle.path, dataclasses.replace(bundle.manifest, model=model))
    content = gather(changed, images, source="two", step=lambda _: None)
    assert isinstance(content.savings, Savings)
    assert (content.savings.all_tokens, content.savings.tokens) == (64 + 16, 64 + 7)
    words = assert_shut(page(content)).words
    a_token = 2 * 2 * 4 * 12 * 2
    assert f"this bundle 71 {content.savings.llm.prefill_flops(71) / 1e9:.4g} GFLOP" in words
    assert f"{71 * a_token / 1024:.1f} KiB 89 %" in words
    assert "−11 % KV cache, predicted" in words


@pytest.mark.slow
def test_accuracy_is_shown_with_all_tokens_beside_it(
    tiny_bundle: Path, images: list[tuple[str, Any]]
) -> None:
    content = gather(read_bundle(tiny_bundle), images, source="two", step=lambda _: None)
    graph = dataclasses.replace(content.graphs[0], accuracy=(0.8123, 0.0123))
    asked = ({"seed": 90210, "scenes": 150, "questions": 1044}, (0.8765, 0.0101))
    shown = dataclasses.replace(content, graphs=(graph,), questions=asked)
    words = assert_shut(page(shown)).words
    assert "1044 questions about 150 held-out scenes (seed 90210)" in words
    assert "all tokens, untouched model 87.6 ± 1.0 %" in words
    assert "7 tokens, fp32 81.2 ± 1.2 %" in words
    both = dataclasses.replace(graph, renumbered=(0.7012, 0.0144))
    words = assert_shut(page(dataclasses.replace(shown, graphs=(both,)))).words
    assert "7 tokens, fp32, original positions 81.2 ± 1.2 %" in words
    assert "7 tokens, fp32, consecutive positions 70.1 ± 1.4 %" in words


def test_only_the_demo_with_its_own_weights_is_asked(tiny_bundle: Path) -> None:
    manifest = read_bundle(tiny_bundle).manifest
    random = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, id="demo"))
    assert report._accuracies({}, random, lambda _: None) == ({}, None)


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": None}, "'layers' is no list"),
    ({"layers": [{}]}, "KeyError: 'effect'"),
    ({"layers": [{}] * 3000}, "'layers' is no list of at most 2000"),
    ({"agreement": {"mean_overlap": 1}}, "'agreement' has no min_overlap"),
    ({"calibrated": "many"}, "ValueError: invalid literal"),
])  # fmt: skip
def test_a_calibration_report_of_another_form_is_refused(
    tiny_bundle: Path, images: list[tuple[str, Any]], change: dict[str, Any], message: str
) -> None:
    add_precision(tiny_bundle, "int8", json.dumps(calibration(**change)))
    with refused(BundleError, got=("calibration.int8.json", message), cure="calibrate"):
        gather(read_bundle(tiny_bundle), images, source="two", step=lambda _: None)


def test_a_calibration_without_limits_measured_no_layer_alone() -> None:
    written = calibration()
    for layer in written["layers"]:
        layer["effect"] = None
    assert [layer.overlap for layer in parse_calibration(written).layers] == [None, None]


# The command


@pytest.fixture
def pictures_of(tmp_path: Path) -> Any:
    def make(count: int) -> Path:
        folder = tmp_path / "shown"
        folder.mkdir()
        for number in range(count):
            small = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(small).resize((40, 40)).save(folder / f"{number}.png")
        return folder

    return make


@pytest.mark.slow
def test_the_command_writes_one_page(
    tiny_static_bundle: Path, pictures_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    arguments = [str(tiny_static_bundle), "--images", str(pictures_of(3)), "--count", "3"]
    assert main(["report", *arguments, "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    text = output.read_text(encoding="utf-8")
    read = assert_shut(text)
    assert sum(tag == "img" for tag, _ in read.tags) == 3 * 2
    assert "Encoder, 2 images a call" in read.words
    assert len(text) < 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_report_that_fails_leaves_the_old_one(
    tiny_bundle: Path, pictures_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    output.write_text("the old one")
    count = str(MOST_IMAGES + 1)
    arguments = [str(tiny_bundle), "--images", str(pictures_of(13)), "--count", count]
    assert main(["report", *arguments, "-o", str(output)]) == 2
    assert "13 images" in capsys.readouterr().err
    assert output.read_text() == "the old one"


@pytest.mark.slow
def test_a_page_for_others_names_no_folder_and_shows_pictures_in_their_order(
    tiny_bundle: Path, pictures_of: Any, tmp_path: Path
) -> None:
    folder = pictures_of(4)
    Path(folder / "3.png").rename(folder / os.fsdecode(b"3\xff.png"))
    there = tmp_path / "models of mine"
    write_layout("llava-hf-single", there / "my-llava")
    manifest = read_bundle(tiny_bundle).manifest
    rewritten = json.loads((tiny_bundle / "manifest.json").read_text())
    parity = {"images": 2, "min_cosine": 0.25, "max_error": 1e-6, "passed": False}
    for model in (there / "my-llava", there / "gone"):
        rewritten["model"]["id"], rewritten["parity"] = str(model), parity
        (tiny_bundle / "manifest.json").write_text(json.dumps(rewritten))
        output = tmp_path / "shown" / "page.html"  # among the images, which it is none of
        given = ["--images", str(folder), "--count", "4"]
        assert main(["report", str(tiny_bundle), *given, "-o", str(output)]) == 0
        text = output.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert "models of mine" not in text
        assert model.name in text
        read = assert_shut(text)
        places = [read.words.index(f" {name} what the tower") for name in
                  ("0.png", "1.png", "2.png", "3\\udcff.png")]  # fmt: skip
        assert places == sorted(places)
        # As the drawing has it.
        assert f"{manifest.selection.tokens} of {manifest.tower.tokens} tokens" in read.words
        # A gate that is missed is said, by what, and is red.
        assert text.count('class="miss"') == 3
        assert "0.25: missed, expected at least 0.99999" in read.words
        assert "The gate of fp32 was missed." in read.words
        assert "1e-06 " in read.words


@pytest.mark.slow
def test_limits_that_a_quantised_graph_misses_here_are_said(
    tiny_bundle: Path, images: list[tuple[str, Any]]
) -> None:
    add_precision(tiny_bundle, "int8", json.dumps(calibration()))
    content = gather(read_bundle(tiny_bundle), images, source="two", step=lambda _: None)
    own, int8 = content.graphs
    for overlap, said in ((0.5, True), (1.0, False)):
        changed = dataclasses.replace(int8, agreement=agreement(overlap, 0.999))
        text = page(dataclasses.replace(content, graphs=(own, changed)))
        assert ("mean overlap 0.5000 on the images below, expected at least 0.95" in text) is said
        assert ('class="miss"' in text) is said


@pytest.mark.slow
@pytest.mark.parametrize("package", ["sklearn", "sklearn.datasets"])
def test_the_demo_is_shown_without_accuracy_where_scikit_learn_is_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    bundle = tmp_path / "demo-bundle"
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "--model", "demo", "--no-check", "-o", str(bundle)]) == 0
    capsys.readouterr()
    output = tmp_path / "page.html"
    assert main(["report", str(bundle), "-o", str(output)]) == 0
    said = capsys.readouterr().err
    first = said.splitlines()[0]
    assert "no accuracy" in first
    assert "pip install 'vzip[demo]'" in first
    words = assert_shut(output.read_text()).words
    assert "scene-1.jpg" in words
    assert "pip install 'vzip[demo]'" in words


def test_what_a_report_needs_is_looked_for_before_its_work(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionEncoder, "open", lambda *_, **__: pytest.fail("work was begun"))
    output = tmp_path / "page.html"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        with refused(MissingDependencyError, got="jinja2", cure="vzip[report]"):
            write_report(tiny_bundle, output)
    with refused(InvalidInputError, got="--count", expected="1 to 12"):
        write_report(tiny_bundle, output, count=0)
    for wrong in (tmp_path / "absent" / "page.html", tmp_path / "page.txt", tmp_path):
        with refused(InvalidInputError, got=str(wrong)):
            write_report(tiny_bundle, wrong)
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with refused(InvalidInputError, got=(str(output), "No space left")):
            write_report(tiny_bundle, output)
    assert not output.exists()
