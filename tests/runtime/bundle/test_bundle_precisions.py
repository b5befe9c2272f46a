"""Quantised graphs in bundles: read with suspicion, added whole, and run as what they are."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bundles import OWN, copy_files, engine_record, names
from tests.conftest import BACKENDS, EXPORTED_ALONE
from tests.faults import fill_disk, killed
from tests.precisions import a_record, add_precision, fill, golden_precisions
from tests.refusals import refused, says
from vzip.runtime import VisionEncoder
from vzip.runtime.backends.tensorrt.engine_file import Machine, rebuild_command, unfit
from vzip.runtime.bundle.fingerprint import fingerprint
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.precision_writer import precision_writer
from vzip.runtime.bundle.reader import Bundle, read_bundle, waiting_folder
from vzip.runtime.bundle.writer import add_engine, bundle_writer
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BackendError, BundleError, InvalidInputError
from vzip.runtime.tokens.cache import TokenCache, cached_image_embeds
from vzip.runtime.tokens.file import TokenFile

Golden = dict[str, np.ndarray]

INT8 = ["calibration.int8.json", "model.int8.onnx", "model.int8.onnx.data"]


def report(path: Path) -> str:
    """Return what the report of the INT8 graph says, as a reader finds it."""
    with read_bundle(path).open_file("calibration.int8.json") as file:
        return file.read().decode()


# Running one


class TestGoldenGraphs:
    """Quantised by hand, as the golden bundle is: tests/parity has those of `vzip calibrate`."""

    BACKENDS = tuple(name for name in BACKENDS if name != EXPORTED_ALONE)

    @pytest.mark.parametrize("precision", ["int8", "fp8"])
    def test_runs_the_graph_of_a_precision(self, tiny_bundle, golden, backend, precision):
        add_precision(tiny_bundle, precision)
        if backend == "tensorrt":
            from vzip.export.engines.tensorrt.publish import build_engine
            from vzip.export.engines.tensorrt.request import BuildRequest

            build_engine(tiny_bundle, BuildRequest(precision=precision), say=lambda _: None)
        if (backend, precision) == ("openvino", "fp8"):  # .7 % off: it rounds otherwise
            with refused(BackendError, got="fp8", cure="onnxruntime"):
                VisionEncoder.open(tiny_bundle, backend=backend, precision=precision)
            return
        with VisionEncoder.open(tiny_bundle, backend=backend, precision=precision) as encoder:
            assert encoder.precision == precision
            tokens = encoder.encode(list(golden["images"]))
            if backend != "tensorrt":
                assert np.array_equal(tokens.groups, golden["groups"])
        assert np.array_equal(tokens.kept, golden["kept"])
        expected = golden_precisions()[precision]
        tolerance = (5e-3 if backend == "tensorrt" else 1e-6) * np.abs(expected).max()
        np.testing.assert_allclose(tokens.embeds, expected, rtol=0, atol=tolerance)
        assert np.abs(tokens.embeds - golden["embeds"]).max() > 10 * tolerance


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_the_bundles_own_graph_is_what_it_was(tiny_bundle, golden, precision):
    add_precision(tiny_bundle)
    with VisionEncoder.open(tiny_bundle, "onnxruntime", precision=precision) as encoder:
        assert encoder.precision == "fp32"
        embeds = encoder.encode(list(golden["images"])).embeds
    np.testing.assert_allclose(embeds, golden["embeds"], rtol=0, atol=1e-5)


def test_a_precision_that_is_not_there(tiny_bundle):
    for precision, there, cure in [
        ("int8", "fp32", f"vzip calibrate {tiny_bundle} --images FOLDER --precision int8"),
        ("fp8", "fp32, int8", f"vzip calibrate {tiny_bundle} --images FOLDER --precision fp8"),
        ("fp16", "fp32, int8", "export the bundle"),
    ]:
        with refused(InvalidInputError, got=repr(precision), expected=there, cure=cure):
            VisionEncoder.open(tiny_bundle, precision=precision)
        add_precision(tiny_bundle)


# The manifest


def test_a_bundle_as_exported_has_no_such_key(tiny_bundle):
    before = (tiny_bundle / "manifest.json").read_bytes()
    assert b"precisions" not in before
    manifest = read_bundle(tiny_bundle).manifest
    assert manifest.precisions == {}
    assert manifest.to_bytes() == before


def test_the_manifest_says_what_was_added(tiny_bundle):
    added = add_precision(tiny_bundle)
    read = read_bundle(tiny_bundle)
    assert (added.path, added.manifest, added.quantised) == (tiny_bundle, read.manifest, "int8")
    assert read.manifest.precisions == {"int8": a_record("int8")}
    assert Manifest.from_bytes(read.manifest.to_bytes()) == read.manifest
    assert names(tiny_bundle) == sorted([*OWN, *INT8])
    assert sorted(read.manifest.files) == sorted([*OWN[1:], *INT8])
    assert (added.precision, added.graph_file) == ("int8", "model.int8.onnx")
    assert (read.precision, read.graph_file) == ("fp32", "model.onnx")
    assert added.at(None) == read
    both = add_precision(tiny_bundle, "fp8").manifest
    assert set(both.precisions) == {"int8", "fp8"}
    assert len(both.files) == 8


def test_the_weights_may_be_in_the_graph(tiny_bundle):
    add_precision(tiny_bundle)
    value = read_bundle(tiny_bundle).manifest.to_json()
    del value["files"]["model.int8.onnx.data"]
    manifest = Manifest.from_json(value)
    assert Bundle(tiny_bundle, manifest, "int8").data_path is None
    with refused(BundleError, got="model.int8.onnx.data"):
        Bundle(tiny_bundle, manifest, "int8").read_model()


def publish(
    bundle: Bundle, write: Callable[[Path], None], *, forget: bool = False, **change: Any
) -> None:
    """Publish an INT8 graph, or forget to."""
    with precision_writer(bundle, "int8") as writer:
        write(writer.folder)
        if not forget:
            writer.publish(a_record("int8", **change))


# Damage


@pytest.mark.parametrize("name", [*INT8, "model.onnx.data"])
def test_a_damaged_file_spoils_its_precision_alone(tiny_bundle, name):
    add_precision(tiny_bundle)
    data = bytearray((tiny_bundle / name).read_bytes())
    data[-1] ^= 1
    (tiny_bundle / name).write_bytes(data)
    damaged = f"{tiny_bundle}: {name} has SHA-256"
    with refused(BundleError, got=damaged):
        read_bundle(tiny_bundle)
    spoilt, whole = ("int8", None) if name in INT8 else (None, "int8")
    with refused(BundleError, got=damaged):
        VisionEncoder.open(tiny_bundle, "onnxruntime", precision=spoilt)
    VisionEncoder.open(tiny_bundle, "onnxruntime", precision=whole).close()
    (tiny_bundle / name).write_bytes(data[:-1])
    with refused(BundleError, got=(name, f"{len(data) - 1} bytes"), expected=str(len(data))):
        VisionEncoder.open(tiny_bundle, "onnxruntime", precision=whole)


@pytest.mark.parametrize("where", ["file", "waiting folder"])
def test_opens_no_link(tiny_bundle, where):
    bundle = add_precision(tiny_bundle)
    path = tiny_bundle / "model.int8.onnx.data"
    aside = tiny_bundle.parent / "aside"
    if where == "file":
        path.rename(aside)
        path.symlink_to(aside)
    else:
        aside.mkdir()
        shutil.copyfile(path, aside / path.name)
        waiting_folder(tiny_bundle, bundle.manifest, "int8").symlink_to(aside)
    with refused(BundleError, got="a symbolic link", expected="a plain file"):
        read_bundle(tiny_bundle)


def test_a_graph_that_reads_the_other_graphs_weights(tiny_bundle):
    bundle = read_bundle(tiny_bundle)

    def write(folder: Path) -> None:
        fill(folder, "int8")
        shutil.copyfile(tiny_bundle / "model.onnx", folder / "model.int8.onnx")

    with refused(BundleError, got="'model.onnx.data'", expected="'model.int8.onnx.data'"):
        publish(bundle, write)
    assert names(tiny_bundle) == OWN


# Adding one


@pytest.mark.parametrize("fault", ["none", "half", "foreign", "unpublished", "failed"])
def test_what_is_not_published_leaves_nothing(tiny_bundle, fault):
    before = read_bundle(tiny_bundle)
    fields = {
        "none": {"got": "[]", "expected": "['calibration.int8.json', 'model.int8.onnx']"},
        "half": {"got": "['model.int8.onnx', 'model.int8.onnx.data']", "cause": "a defect"},
        "foreign": {"got": "'thesis.txt'", "cause": "a defect"},
        "unpublished": {"expected": "publish()", "cause": "a defect"},
        "failed": {"got": "no memory"},
    }[fault]

    def write(folder: Path) -> None:
        if fault != "none":
            fill(folder, "int8")
        if fault == "half":
            (folder / "calibration.int8.json").unlink()
        if fault == "foreign":
            (folder / "thesis.txt").write_text("thesis")
        if fault == "failed":
            raise BundleError("no memory")

    with refused(BundleError, **fields):
        publish(before, write, forget=fault == "unpublished")
    assert read_bundle(tiny_bundle) == before
    assert names(tiny_bundle) == OWN


def test_a_staged_graph_runs_before_anybody_sees_it(tiny_bundle, golden):
    before = read_bundle(tiny_bundle)
    with precision_writer(before, "int8") as writer:
        fill(writer.folder, "int8")
        staged = writer.stage(a_record("int8"))
        with VisionEncoder.open(staged, "onnxruntime") as encoder:
            embeds = encoder.run(golden["images"][:2]).embeds
        np.testing.assert_allclose(embeds, golden_precisions()["int8"][:2], rtol=0, atol=1e-5)
        assert read_bundle(tiny_bundle) == before
        writer.publish(a_record("int8"))
    assert names(tiny_bundle) == sorted([*OWN, *INT8])


def test_a_new_graph_takes_the_place_of_the_old(tiny_bundle):
    add_precision(tiny_bundle, report="old")
    add_precision(tiny_bundle, "fp8")
    bundle = add_precision(tiny_bundle, report="new")
    assert (report(tiny_bundle), bundle.read_model() != b"") == ("new", True)
    assert len(names(tiny_bundle)) == 9
    # The same once more, with another record: nothing is moved.
    publish(read_bundle(tiny_bundle), lambda folder: fill(folder, "int8", "new"), images=99)
    after = read_bundle(tiny_bundle).manifest
    assert after.precisions["int8"].images == 99
    assert after.files == bundle.manifest.files
    assert len(names(tiny_bundle)) == 9


def test_weights_that_are_no_longer_beside_the_graph_are_removed(tiny_bundle):
    add_precision(tiny_bundle)

    def write(folder: Path) -> None:
        (folder / "model.int8.onnx").write_bytes(b":\0")  # an empty graph
        (folder / "calibration.int8.json").write_text("{}")

    publish(read_bundle(tiny_bundle), write)
    assert names(tiny_bundle) == sorted([*OWN, *INT8[:2]])


def test_refuses_a_bundle_that_was_changed_meanwhile(tiny_bundle):
    first = read_bundle(tiny_bundle)
    add_precision(tiny_bundle, report="theirs")
    with refused(BundleError, cure="open the bundle again"):
        publish(first, lambda folder: fill(folder, "int8", "mine"))
    assert report(tiny_bundle) == "theirs"
    assert names(tiny_bundle) == sorted([*OWN, *INT8])


@pytest.mark.parametrize("when", range(12))
def test_a_full_disk_leaves_the_old_graph_or_the_new(tiny_bundle, monkeypatch, when):
    add_precision(tiny_bundle, report="old")
    calls = fill_disk(monkeypatch, after=when)
    failed = False
    try:
        add_precision(tiny_bundle, report="new")
    except BundleError as error:
        failed = True
        says(error, got="No space", cure="free some space")
    monkeypatch.undo()
    # From the rename of the manifest on (its seventh flush), the new one is there.
    assert report(tiny_bundle) == ("old" if when < 6 else "new")
    assert failed == (calls[0] > when)
    if when < 6:
        assert names(tiny_bundle) == sorted([*OWN, *INT8])
    VisionEncoder.open(tiny_bundle, "onnxruntime", precision="int8").close()
    add_precision(tiny_bundle, report="third")
    assert names(tiny_bundle) == sorted([*OWN, *INT8])


@pytest.mark.slow
def test_sigkill_at_any_step_leaves_the_old_graph_or_the_new(tiny_bundle, golden):
    start, found = tiny_bundle.parent / "start", []
    add_precision(tiny_bundle, report="old")
    shutil.copytree(tiny_bundle, start)
    own = read_bundle(start).read_model()
    for steps in range(200):
        shutil.rmtree(tiny_bundle)
        shutil.copytree(start, tiny_bundle)
        was_killed = killed(lambda: add_precision(tiny_bundle, report="new"), steps)
        bundle = read_bundle(tiny_bundle)  # with all digests
        found.append(report(tiny_bundle))
        assert bundle.read_model() == own
        with VisionEncoder.open(tiny_bundle, "onnxruntime", precision="int8") as encoder:
            assert encoder.run(golden["images"][:1]).kept.tolist() == golden["kept"][:1].tolist()
        # The next writer gets through, whatever it writes, and nothing is left behind.
        last = ("new", "old", "third")[steps % 3]
        add_precision(tiny_bundle, report=last)
        assert report(tiny_bundle) == last
        there = names(tiny_bundle)
        hidden = [name for name in there if name.startswith(".manifest.json.")]  # goes on export
        assert sorted(set(there) - set(hidden)) == sorted([*OWN, *INT8])
        if not was_killed:
            break
    assert found == ["old"] * found.count("old") + ["new"] * found.count("new")
    assert found.count("old") > 5
    assert found.count("new") > 3


def waits(path: Path, report: str) -> Bundle:
    """Leave a bundle as a writer does that is killed after the manifest and before any rename."""
    bundle = add_precision(path, report=report)
    waiting = waiting_folder(path, bundle.manifest, "int8")
    waiting.mkdir()
    for name in INT8:
        (path / name).rename(waiting / name)
        (path / name).write_bytes(b"of an older graph")
    return bundle


@pytest.mark.parametrize("moved", range(4))
def test_files_that_wait_are_run_from_where_they_wait(tiny_bundle, golden, moved):
    bundle = waits(tiny_bundle, "waits")
    waiting = waiting_folder(tiny_bundle, bundle.manifest, "int8")
    for name in INT8[:moved]:
        (waiting / name).replace(tiny_bundle / name)
    assert report(tiny_bundle) == "waits"
    with VisionEncoder.open(tiny_bundle, "onnxruntime", precision="int8") as encoder:
        embeds = encoder.run(golden["images"][:3]).embeds
    np.testing.assert_allclose(embeds, golden_precisions()["int8"][:3], rtol=0, atol=1e-5)


def test_a_file_that_takes_its_place_while_it_is_opened(tiny_bundle, monkeypatch):
    bundle = waits(tiny_bundle, "waits")
    waiting = waiting_folder(tiny_bundle, bundle.manifest, "int8")
    opened = os.open

    def raced(path: str | Path, *arguments: int, **place: int) -> int:
        path = Path(path)
        if path.parent == waiting and path.exists():
            path.replace(tiny_bundle / path.name)
        return opened(path, *arguments, **place)

    monkeypatch.setattr(os, "open", raced)
    assert report(tiny_bundle) == "waits"
    assert bundle.read_model()


def test_an_export_drops_quantised_graphs(tiny_bundle, tiny_static_bundle):
    other = add_precision(tiny_static_bundle).manifest
    add_precision(tiny_bundle, "fp8")
    waits(tiny_bundle, "waits")
    (tiny_bundle / ".fp8.0123.vzip-tmp").mkdir()
    with refused(BundleError, got="the fp8 graph", cure="--replace"), bundle_writer(tiny_bundle):
        pytest.fail("hours of work were about to go")
    with bundle_writer(tiny_bundle, replace=True) as writer:
        copy_files(tiny_static_bundle, writer.folder)
        writer.publish(other)
    assert names(tiny_bundle) == OWN
    assert read_bundle(tiny_bundle).manifest.precisions == {}


def test_an_export_writes_no_quantised_graph(tiny_bundle, tmp_path):
    manifest = add_precision(tiny_bundle).manifest

    def export() -> None:
        with bundle_writer(tmp_path / "new") as writer:
            copy_files(tiny_bundle, writer.folder, manifest.files)
            writer.publish(manifest)

    with refused(BundleError, got="model.int8.onnx", expected="model.onnx and"):
        export()


# Engines


def with_engines(path: Path) -> Bundle:
    """Return a bundle with an engine from its own graph and one from its INT8 graph."""
    quantised = add_precision(path)
    own = quantised.at(None)
    manifest = dataclasses.replace(
        own.manifest,
        engines={
            "own": engine_record(own),
            "small": engine_record(quantised),
        },
    )
    return dataclasses.replace(own, manifest=manifest)


def test_an_engine_fits_the_graph_it_was_built_from(tiny_bundle):
    own = with_engines(tiny_bundle)
    int8, machine = own.at("int8"), Machine("tensorrt", "10.3.0.30", "Orin", "87")
    assert unfit(own, "own", machine) is None
    assert unfit(int8, "small", machine) is None
    for bundle, name, other, opened in (
        (own, "small", "int8", "fp32"),
        (int8, "own", "fp32", "int8"),
    ):
        fault = unfit(bundle, name, machine)
        assert fault is not None
        says(fault, got=(f"'{name}'", other), expected=opened, cure=f"--precision {other}")


def test_an_engine_of_an_older_calibration_is_refused(tiny_bundle):
    bundle = with_engines(tiny_bundle).at("int8")
    record = dataclasses.replace(bundle.manifest.engines["small"], model_sha256="d" * 64)
    manifest = dataclasses.replace(bundle.manifest, engines={"small": record})
    said = unfit(dataclasses.replace(bundle, manifest=manifest), "small")
    assert said is not None
    says(
        said,
        got="SHA-256 dddddddddddd…",
        expected="model.int8.onnx",
        cure=f"vzip build {tiny_bundle} --precision int8",
    )
    ahead = dataclasses.replace(record, gpu=None, stack="tensorrt_rtx", sm=("86", "89"))
    assert rebuild_command(bundle, ahead) == (
        f"vzip build {tiny_bundle} --precision int8 --rtx sm86,sm89"
    )


def test_an_engine_is_added_to_the_graph_it_was_built_from(tiny_bundle):
    bundle, plan = add_precision(tiny_bundle), b"a plan"
    record = engine_record(bundle, plan)
    with refused(BundleError, got="SHA-256", cure="build the engine again"):
        add_engine(bundle.at(None), "small", record, plan)
    after = add_engine(bundle, "small", record, plan)
    assert after == read_bundle(tiny_bundle).at("int8")
    assert after.manifest.engines["small"].quantised == "int8"


# What tokens are compared by


def test_the_fingerprint_differs_by_precision(tiny_bundle):
    before = fingerprint(read_bundle(tiny_bundle).manifest)
    manifest = add_precision(tiny_bundle, "fp8").manifest
    manifest = add_precision(tiny_bundle).manifest
    found = {fingerprint(manifest), fingerprint(manifest, "int8"), fingerprint(manifest, "fp8")}
    assert len(found) == 3
    assert before in found
    # How it was judged is no part of it, what it computes is.
    other = add_precision(tiny_bundle, report="another").manifest
    assert fingerprint(other, "int8") == fingerprint(manifest, "int8")
    files = dict(other.files)
    files["model.int8.onnx.data"] = dataclasses.replace(
        files["model.int8.onnx.data"], sha256="0" * 64
    )
    changed = dataclasses.replace(other, files=files)
    assert fingerprint(changed, "int8") != fingerprint(manifest, "int8")
    assert fingerprint(changed) == before


def test_a_cache_keeps_precisions_apart(tiny_bundle, golden, tmp_path):
    add_precision(tiny_bundle)
    cache, image = TokenCache(tmp_path / "cache"), golden["images"][0]
    embeds = {}
    for precision in (None, "int8", None, "int8"):
        with VisionEncoder.open(tiny_bundle, "onnxruntime", precision=precision) as encoder:
            got = cached_image_embeds(encoder, image, cache)
            assert np.array_equal(got, embeds.setdefault(precision, got))
    assert not np.array_equal(embeds[None], embeds["int8"])


def test_the_command_line_takes_a_precision(tiny_bundle, golden, tmp_path, capsys):
    from PIL import Image

    add_precision(tiny_bundle)
    picture, output = tmp_path / "a.png", tmp_path / "tokens.safetensors"
    Image.fromarray(golden["images"][0]).save(picture)
    arguments = ["encode", str(tiny_bundle), str(picture), "-o", str(output)]
    arguments += ["--backend", "onnxruntime"]
    assert main([*arguments, "--precision", "int8"]) == 0
    with TokenFile.open(output) as file:
        assert file.origin.fingerprint == fingerprint(read_bundle(tiny_bundle).manifest, "int8")
        tokens = file.read("a.png").tokens
    np.testing.assert_allclose(tokens, golden_precisions()["int8"][0], rtol=0, atol=1e-5)
    assert main(arguments) == 2  # tokens of two graphs don't belong together
    assert "was made by a bundle with the fingerprint" in capsys.readouterr().err
    shown = ["show", str(tiny_bundle), str(picture), "--backend", "onnxruntime"]
    assert main([*shown, "-o", str(tmp_path / "o.png"), "--precision", "int8"]) == 0
    assert main([*shown, "-o", str(tmp_path / "o.png"), "--precision", "fp8"]) == 2
    assert "make it with: vzip calibrate" in capsys.readouterr().err
