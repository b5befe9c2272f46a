"""CPU engines: made, proven, published, opened by themselves, and refused where they don't fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

from tests.faults import fill_disk
from tests.places import ROOT
from tests.refusals import refused, says
from vzip.export.cli import build as build_command
from vzip.export.cli import inspect as inspect_command
from vzip.export.engines import build
from vzip.export.engines.cpu import choice, forms, making, products
from vzip.export.engines.cpu.forms import FORMS
from vzip.export.engines.cpu.patterns import array
from vzip.export.graph.reading import read_graph
from vzip.export.parity import compare
from vzip.runtime import VisionEncoder
from vzip.runtime.agreement import Gate, Limits, Proof, load_reference
from vzip.runtime.backends import cpu_engine
from vzip.runtime.bundle.fingerprint import fingerprint
from vzip.runtime.bundle.graph_check import external_tensors
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.precision_record import PrecisionRecord
from vzip.runtime.bundle.precision_writer import precision_writer
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
    ParityError,
)
from vzip.runtime.files.codec import MisfitError
from vzip.runtime.machine.record import processor
from vzip.runtime.machine.timing import Timing
from vzip.runtime.tokens.cache import TokenCache, cached_image_embeds
from vzip.runtime.tokens.cached import CachedImages

Array = np.ndarray[Any, Any]
MakeBundle = Callable[[str], Bundle]
NAME = "x"


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine, "_said", set())
    monkeypatch.setattr(choice, "SECONDS", 0.05)
    monkeypatch.setattr(choice, "SETTLE_S", 0.0)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that says which form is to be measured as the fastest; all agree."""
    monkeypatch.setattr(products, "BLOCK", 16)  # lets blocks fit into the tiny tower's rows
    for gate in ("CPU_FORM", "CPU_FORM_VARIED"):
        monkeypatch.setattr(choice, gate, Gate(overlap=0.5, kept=Limits(lowest=0.5)))

    def choose(form: str) -> None:
        def fake(calls: dict[str, Callable[[], object]], **_: float) -> dict[str, Timing]:
            for each in calls.values():
                each()
            return {name: Timing.of([1.0 if name == form else 2.0]) for name in calls}

        monkeypatch.setattr(choice, "interleaved", fake)

    choose("dynamic")
    return choose


@pytest.fixture
def bundle(exported: MakeBundle, tmp_path: Path) -> Path:
    """Return the folder of a bundle that a test may spoil."""
    return copied(exported("image"), tmp_path)


def copied(bundle: Bundle, folder: Path) -> Path:
    return Path(shutil.copytree(bundle.path, folder / "bundle"))


@pytest.fixture(scope="session")
def _built(exported: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copied(exported("image"), tmp_path_factory.mktemp("built"))
    with pytest.MonkeyPatch.context() as patch:

        def dynamic(calls: dict[str, object], **_: float) -> dict[str, Timing]:
            return {name: Timing.of([1.0 if name == "dynamic" else 2.0]) for name in calls}

        patch.setattr(choice, "interleaved", dynamic)
        assert make(path).record.cpu.form == "dynamic"  # type: ignore[union-attr]
    return path


@pytest.fixture
def built(_built: Path, tmp_path: Path) -> Path:
    """Return the folder of a bundle with an engine of the form ``dynamic``."""
    return Path(shutil.copytree(_built, tmp_path / "built"))


def make(path: Path, said: list[str] | None = None) -> Any:
    return making.build_cpu(path, NAME, say=(lambda _: None) if said is None else said.append)


def pictures(path: Path) -> Array:
    bundle = read_bundle(path)
    return load_reference(bundle).input[: bundle.manifest.batch.max]


def record(path: Path) -> Any:
    return read_bundle(path, verify=False).manifest.engines[NAME]


def change(path: Path, **values: Any) -> None:
    """Change values of the engine's record in manifest.json; ``a__b`` is b of a."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for name, value in values.items():
        place = manifest["engines"][NAME]
        *outer, last = name.split("__")
        for each in outer:
            place = place[each]
        place[last] = value
    file.write_text(json.dumps(manifest))


def opens(path: Path, **options: Any) -> str | None:
    """Return the name of the engine that runs."""
    with VisionEncoder.open(path, **options) as encoder:
        tokens = encoder.run(pictures(path))
        assert tokens.embeds.shape[1] == encoder.manifest.selection.tokens
        return encoder.engine


# Made


@pytest.mark.slow
@pytest.mark.parametrize("form", ["own", "int8", *(form.name for form in FORMS)])
def test_the_fastest_that_agrees_becomes_the_engine(
    bundle: Path, fastest: Callable[[str], None], form: str
) -> None:
    if form == "int8":
        add_int8(bundle)
    fastest(form)
    made = make(bundle)
    written = read_bundle(bundle).manifest.engines[NAME]
    assert (made.reused, written) == (False, made.record)
    assert opens_bundle(made.bundle) == NAME
    engine = made.path.read_bytes()
    assert (written.sha256, written.bytes) == (hashlib.sha256(engine).hexdigest(), len(engine))
    assert written.stack == "onnxruntime"
    assert written.proof["passed"] is True
    assert (written.precision, written.cpu.form) == ("int8" if form == "int8" else "fp32", form)
    others = ["int8"] if form == "int8" else []
    others += [
        each.name for each in choice.openvino_forms() if form == "int8" or not each.calibrated
    ]
    assert list(written.cpu.measured) == ["own", *(each.name for each in FORMS), *others]
    assert all("refused" not in each for each in written.cpu.measured.values())
    # Weights that are the bundle's own lie in its file; a form in 8 bits has all of its own.
    outside = {each.location for each in external_tensors(engine)}
    assert outside == ({"model.onnx.data"} if form in {"own", "fused"} else set())
    with (
        VisionEncoder.open(bundle) as encoder,
        VisionEncoder.open(bundle, precision="fp32") as own,
    ):
        assert (encoder.engine, own.engine) == (NAME, None)
        got, expected = encoder.run(pictures(bundle)), own.run(pictures(bundle))
        cosine = np.sum(got.embeds * expected.embeds) / (
            np.linalg.norm(got.embeds) * np.linalg.norm(expected.embeds)
        )
        assert cosine > 0.99
        assert got.groups.shape == (4, encoder.manifest.tower.tokens)


def add_int8(path: Path) -> None:
    """Put a graph in the place of one that vzip calibrate makes."""
    bundle = read_bundle(path)
    model = ir.external_data.load_to_model(read_graph(bundle, "a test"))
    with precision_writer(bundle, "int8") as writer:
        ir.save(model, writer.folder / "model.int8.onnx")
        (writer.folder / "calibration.int8.json").write_text("{}")
        writer.publish(PrecisionRecord(18, "0" * 64, 1, {}, {}))


@pytest.mark.slow
def test_what_was_measured_is_said_and_recorded(bundle: Path) -> None:
    said: list[str] = []
    made = make(bundle, said)
    measured = made.record.cpu.measured
    assert measured["own"].keys() == {"kept_overlap", "min_cosine", "contextual_cosine"}
    for form in FORMS:
        found = measured[form.name]
        assert "refused" in found or found["ms"] > 0 < found["against_ms"]
        assert any(form.name in line for line in said)
    best = made.record.cpu.form
    many = f"_{min(choice.MANY, made.bundle.manifest.batch.max)}"
    ratios = [
        measured[best][f"ms{size}"] / measured[best][f"against_ms{size}"]
        for size in ("", many)
        if best != "own"
    ]
    assert np.prod(ratios) <= 1
    target = made.record.cpu
    assert (target.processor, target.threads) == (making.processor(), making.cores())


@pytest.mark.slow
def test_an_fp16_graph_has_no_other_form(exported: MakeBundle, tmp_path: Path) -> None:
    path = copied(exported("fp16"), tmp_path)
    made = make(path)
    assert made.record.precision == "fp16"
    refused = [name for name, each in made.record.cpu.measured.items() if "refused" in each]
    assert refused == [form.name for form in FORMS]
    assert made.record.cpu.form in {"own", *(each.name for each in choice.openvino_forms())}
    assert opens(path) == NAME
    assert opens(path, precision="fp16") is None


@pytest.mark.slow
def test_a_form_that_keeps_other_tokens_or_cannot_run_is_not_chosen(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, opened = choice.rewrite, choice.Candidate.open

    def wrong(model: ir.Model, form: forms.Form, learnt: Any) -> bool:
        done = right(model, form, learnt)
        for name, value in model.graph.initializers.items():
            if name.endswith(".scale"):
                value.const_value = ir.tensor(np.full_like(array(value), 0.01), name=name)
        return done

    def refuse(candidate: choice.Candidate) -> Any:
        if candidate.form == "fused":
            raise BackendError("no such operator")
        return opened(candidate)

    monkeypatch.setattr(choice, "rewrite", wrong)
    monkeypatch.setattr(choice.Candidate, "open", refuse)
    found = make(bundle).record.cpu
    assert "0.95" in found.measured["dynamic"]["refused"]
    assert found.measured["dynamic"]["min_cosine"] < 0.99
    assert "no such operator" in found.measured["fused"]["refused"]
    assert found.form not in {"dynamic", "mixed", "fused"}


@pytest.mark.slow
def test_where_nothing_agrees_nothing_is_published(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = choice.prove

    def spoiled(run: Any, *given: Any) -> Proof:
        def other(images: Array) -> Any:
            return {**(found := run(images)), EMBEDS: -found[EMBEDS], KEPT: found[KEPT]}

        return right(other, *given)

    monkeypatch.setattr(choice, "prove", spoiled)
    before = (bundle / "manifest.json").read_bytes()
    with refused(ParityError, got=str(bundle), cure="vzip check"):
        make(bundle)
    assert (bundle / "manifest.json").read_bytes() == before
    assert {each.name for each in (bundle / "engines").iterdir()} <= {".lock"}


def test_it_cannot_be_made_without_a_reference_or_of_no_release(
    tiny_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(InvalidInputError, got="reference.npz", cause="--no-check"):
        make(tiny_bundle)
    with refused(InvalidInputError, got="--name"):
        making.build_cpu(bundle, "a/b", say=print)
    monkeypatch.setattr("onnxruntime.__version__", "1.31.0.dev1")
    with refused(BackendError, got="1.31.0.dev1"):
        make(bundle)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused(MissingDependencyError, got="onnxruntime", cure="vzip[cpu-build]"):
        make(bundle)


def test_on_a_full_disk_nothing_is_measured_and_what_is_there_is_reused(
    bundle: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "choose", lambda *_, **__: pytest.fail("forms were measured"))
    fill_disk(monkeypatch)
    with refused(BundleError, got=(str(bundle), "No space left"), cure="copy the bundle"):
        make(bundle)
    assert make(built).reused


@pytest.mark.slow
def test_outliers_are_smoothed_away(
    exported: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, found = exported("outliers"), []
    for _ in range(2):
        found.append(choice.choose(bundle, say=lambda _: None).measured["dynamic"]["min_cosine"])
        monkeypatch.setattr(choice, "learn", lambda *_: products.Learnt())
    smoothed, plain = found
    assert 1 - smoothed < 0.2 * (1 - plain)


@pytest.mark.slow
def test_it_is_made_and_run_without_torch(bundle: Path) -> None:
    code = (
        "import sys; from vzip.runtime.cli.main import main;"
        "status = main(['build', sys.argv[1], '--cpu', '--name', 'x']);"
        "from vzip.runtime import VisionEncoder;"
        "encoder = VisionEncoder.open(sys.argv[1]);"
        "assert encoder.engine == 'x', encoder.describe();"
        "heavy = {'torch', 'transformers', 'onnxscript'} & set(sys.modules);"
        "sys.exit(status or bool(heavy) and repr(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(bundle / "engines" / "x.plan")


# Reused, or made anew


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", [None, "threads", "forms", "int8", "damaged", "processor", "version"]
)
def test_it_is_reused_until_something_that_matters_changes(
    built: Path, monkeypatch: pytest.MonkeyPatch, what: str | None
) -> None:
    if what == "threads":
        monkeypatch.setattr(making, "cores", lambda: 7)
    elif what == "forms":
        monkeypatch.setattr(making, "VERSION", 99)
    elif what == "int8":
        add_int8(built)
    elif what == "damaged":
        (built / "engines" / "x.plan").write_bytes(b"x")
    elif what == "processor":
        monkeypatch.setattr(making, "processor", lambda: "another")
        monkeypatch.setattr(cpu_engine, "processor", lambda: "another")
    elif what == "version":
        change(built, version="1.0.0")
    assert make(built).reused is (what is None)
    assert make(built).reused is True


def test_making_it_changes_nothing_else(built: Path, exported: MakeBundle) -> None:
    for name in exported("image").manifest.files:
        assert (built / name).read_bytes() == (exported("image").path / name).read_bytes()
    now, before = read_bundle(built).manifest, exported("image").manifest
    assert dataclasses.replace(now, engines={}) == before


# Opened


def test_it_is_opened_by_itself_and_that_is_said_once(
    built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with VisionEncoder.open(built) as encoder:
        what = encoder.describe()
        assert what == {
            "backend": "onnxruntime",
            "engine": NAME,
            "form": "dynamic",
            "precision": "fp32",
            "device": making.processor(),
        }
        assert encoder.cpu_engine
        tokens = encoder.run(pictures(built))
        assert (tokens.groups >= 0).sum(axis=1).tolist() == [encoder.manifest.tower.tokens - 12] * 4
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert repr(NAME) in said.err
    assert "--precision fp32" in said.err
    assert opens(built, backend="onnxruntime") == NAME
    for options in ({"precision": "fastest"}, {"engine": NAME}, {"precision": "fp32"}):
        assert opens(built, **options) == (None if options == {"precision": "fp32"} else NAME)
    for backend in ("auto", "onnxruntime"):
        assert opens(built, backend=backend, precision="fastest") == NAME
    assert opens(built, precision="fp32", engine=NAME) == NAME
    assert capsys.readouterr().err == ""


def test_graphs_are_judged_and_run_as_they_are_where_that_is_meant(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(built)
    assert opens_bundle(bundle.at(None)) is None
    assert opens_bundle(bundle) == NAME
    assert opens_bundle(bundle.to_run(None)) == NAME
    asked: list[Bundle] = []
    right = compare.open_backend

    def listening(*given: Any, **more: Any) -> Any:
        asked.append(given[1])
        return right(*given, **more)

    monkeypatch.setattr(compare, "open_backend", listening)
    compare._run(bundle, pictures(built)[:1], bundle.manifest.preprocessing)
    assert asked[0].cpu_engine == "never"


def opens_bundle(bundle: Bundle) -> str | None:
    with VisionEncoder.open(bundle) as encoder:
        return encoder.engine


def test_where_there_is_none_the_command_is_named(bundle: Path) -> None:
    command = f"vzip build {bundle} --cpu"
    with refused(BackendError, got=str(bundle), expected="fastest", cure=command):
        VisionEncoder.open(bundle, precision="fastest")
    with refused(InvalidInputError, got=repr(NAME), cure=command):
        VisionEncoder.open(bundle, "onnxruntime", engine=NAME)
    assert opens(bundle) is None


@pytest.mark.parametrize("options", [{"engine": NAME}, {"precision": "fastest"}])
@pytest.mark.parametrize("other", ["pytorch", "tensorrt", "onnxruntime-cuda"])
def test_other_backends_have_no_cpu_engines(
    built: Path, other: str, options: dict[str, str]
) -> None:
    with refused(InvalidInputError, got=repr(other), expected="'onnxruntime'"):
        VisionEncoder.open(built, other, **options)


def test_a_gpu_takes_none(built: Path) -> None:
    with refused(BackendError, got=str(built), cure=f"vzip build {built}"):
        VisionEncoder.open(built, "tensorrt")


@pytest.mark.parametrize("asked", ["auto", "onnxruntime", "tensorrt"])
def test_a_name_that_no_engine_has_is_answered_with_those_there_are(
    built: Path, asked: str
) -> None:
    with refused(InvalidInputError, got="'y'", expected="x", cure=f"vzip build {built}"):
        VisionEncoder.open(built, asked, engine="y")


@pytest.mark.slow
def test_two_that_fit_are_an_error_that_names_them(built: Path) -> None:
    making.build_cpu(built, "y", say=lambda _: None)
    with refused(BackendError, got=" 2 ", cure="x, y"):
        VisionEncoder.open(built)
    assert opens(built, engine="y") == "y"
    assert opens(built, precision="fp32") is None


@pytest.mark.parametrize(
    ("values", "got", "expected"),
    [
        ({"cpu__processor": "Elbrus-8S"}, "Elbrus-8S", None),
        ({"cpu__instructions": ["avx2", "sse9"]}, "avx2 sse9", None),
        ({"version": "1.2.3"}, "1.2.3", None),
        ({"model_sha256": "1" * 64}, "1" * 64, None),
        ({"precision": "int8"}, "SHA-256", "int8"),
        ({"proof__passed": False}, "proof", ""),
        ({"proof": None}, "proof", ""),
    ],
)
def test_elsewhere_it_is_refused(
    built: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    got: str,
    expected: str | None,
) -> None:
    """By name it is an error; by itself the bundle's own graph runs, and that is said once."""
    here = record(built)
    place = next(iter(values)).split("__")[-1]
    if expected is None:
        found = getattr(here if hasattr(here, place) else here.cpu, place)
        expected = found if isinstance(found, str) else " ".join(found)
    change(built, **values)
    for options in ({"engine": NAME}, {"precision": "fastest"}):
        with refused(
            BackendError, got=(repr(NAME), got), expected=expected, cure=f"vzip build {built} --cpu"
        ):
            VisionEncoder.open(built, **options)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    assert opens(built) is None
    assert opens(built) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert got in line
    assert "--cpu" in line


def test_an_engine_of_another_precision_than_asked_for_is_refused(
    bundle: Path, fastest: Callable[[str], None]
) -> None:
    add_int8(bundle)
    make(bundle)
    with refused(InvalidInputError, got="fp32", expected="int8"):
        VisionEncoder.open(bundle, engine=NAME, precision="int8")
    assert opens(bundle, precision="int8") is None


# Damaged

DAMAGES = [
    *("flipped", "cut", "gone", "link", "fifo", "elsewhere", "beyond", "no graph", "operator"),
]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_refused_until_it_is_made_anew(built: Path, damage: str) -> None:
    file = built / "engines" / "x.plan"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "no graph":
        rewritten(built, b"nothing of the kind")
    elif damage == "operator":
        model = onnx.load_model_from_string(bytes(data))
        model.graph.node[0].domain = "somebodys.library"
        rewritten(built, model.SerializeToString())
    elif damage in {"elsewhere", "beyond"}:  # by whoever wrote the digest too
        model = onnx.load_model_from_string(bytes(data))
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        place = "model.onnx.data" if damage == "beyond" else "../secret"
        for key, value in (("location", place), ("offset", str(2**20)), ("length", "64")):
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        rewritten(built, model.SerializeToString())
    else:
        file.unlink()
        if damage == "link":  # to the same bytes, which can change behind their digest
            (built / "elsewhere").write_bytes(data)
            file.symlink_to(built / "elsewhere")
        elif damage == "fifo":
            os.mkfifo(file)
    for options in ({}, {"engine": NAME}, {"precision": "fastest"}):
        with pytest.raises(BundleError) as raised:
            VisionEncoder.open(built, **options)  # type: ignore[arg-type]
        says(raised.value, got=str(built))
    assert opens(built, precision="fp32") is None
    if damage == "fifo":
        file.unlink()
    assert not make(built).reused
    assert opens(built) == NAME


def rewritten(path: Path, data: bytes) -> None:
    """Put other bytes in an engine's place, and their digest in its record."""
    (path / "engines" / "x.plan").write_bytes(data)
    change(path, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def test_weights_that_it_shares_are_checked(bundle: Path, fastest: Callable[[str], None]) -> None:
    fastest("fused")
    make(bundle)
    data = bundle / "model.onnx.data"
    spoiled = bytearray(data.read_bytes())
    spoiled[100] ^= 1
    data.write_bytes(spoiled)
    with refused(BundleError, got="model.onnx.data"):
        VisionEncoder.open(bundle, engine=NAME)


@pytest.mark.parametrize(
    ("field", "change_"),
    [
        ("sm", {"sm": ("87",)}),
        ("stack", {"stack": "tensorrt"}),
        ("stack", {"cpu": None}),
        ("cpu.form", {"form": "mine"}),
        ("cpu.threads", {"threads": 0}),
    ],
)
def test_a_record_is_of_a_gpu_or_a_cpu(built: Path, field: str, change_: dict[str, Any]) -> None:
    found = record(built)
    if field.startswith("cpu."):
        change_ = {"cpu": {**vars(found.cpu), **change_}}
    with pytest.raises(MisfitError) as raised:
        dataclasses.replace(found, **change_)
    assert raised.value.place == field


# What depends on it


def test_its_tokens_are_told_from_the_bundles_own(built: Path, tmp_path: Path) -> None:
    manifest, cache = read_bundle(built).manifest, TokenCache(tmp_path / "cache")
    assert fingerprint(manifest, cpu_engine=True) != fingerprint(manifest)
    image = pictures(built)[0]
    with VisionEncoder.open(built) as fast, VisionEncoder.open(built, precision="fp32") as own:
        first = cached_image_embeds(fast, image, cache)
        assert not np.array_equal(cached_image_embeds(own, image, cache), first)
        assert np.array_equal(cached_image_embeds(fast, image, cache), first)


def test_a_cache_gives_what_may_run_and_nothing_else(built: Path, tmp_path: Path) -> None:
    image, folder = tmp_path / "image.png", tmp_path / "cache"
    Image.fromarray(pictures(built)[0]).save(image)
    bundle = read_bundle(built)

    def missing(precision: str | None) -> bool:
        return bool(CachedImages([image], bundle.to_run(precision), folder).missing)

    for precision, others in (("fastest", "fp32"), ("fp32", "fastest")):
        with VisionEncoder.open(built, precision=precision) as encoder:
            CachedImages([image], bundle.to_run(precision), folder).encoded(encoder)
        assert not missing(precision)
        assert not missing(None)
        assert missing(others) is (others == "fp32")  # the other one was put there before


def test_an_export_replaces_a_bundle_with_engines_and_forms_of_before(built: Path) -> None:
    from vzip.runtime.bundle.writer import bundle_writer

    (built / "fastest" / "0123456789abcdef").mkdir(parents=True)
    manifest = read_bundle(built).manifest
    kept = refused(BundleError, got=[f"'{name}'" for name in manifest.engines], cure="--replace")
    with kept, bundle_writer(built):
        pytest.fail("an engine was about to go")
    with bundle_writer(built, replace=True) as writer:
        for name in manifest.files:
            (writer.folder / name).write_bytes((built / name).read_bytes())
        writer.publish(manifest)
    assert {each.name for each in built.iterdir()} == {*manifest.files, "manifest.json"}


@pytest.mark.slow
def test_the_command_prints_the_engine_and_refuses_what_is_tensorrts(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_command.main([str(bundle), "--cpu"], prog="vzip build") == 0
    (path,) = (bundle / "engines").glob("cpu-*.plan")
    said = capsys.readouterr()
    assert said.out.strip() == str(path)
    assert build_command.main([str(bundle), "--cpu"], prog="vzip build") == 0
    assert "not made again" in capsys.readouterr().err
    others = ("builder_optimization_level", "--builder-optimization-level", "safer", "--safer")
    with refused(InvalidInputError, got=("--cpu", *others), expected="--name", cause="TensorRT"):
        build(bundle, cpu=True, builder_optimization_level=0, safer=True)
    assert inspect_command.main([str(bundle)], prog="vzip inspect") == 0
    (line,) = re.findall(rf"^engine {path.stem}: (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert processor() in line
    assert "SM" not in line
    assert inspect_command.main([str(bundle), "--engine", path.stem], prog="vzip inspect") == 0
    text = capsys.readouterr().out
    assert "measured dynamic" in text
    assert "proven" in text


# In processes of their own

SLOW = """
import sys, time
from pathlib import Path
from vzip.export.engines.cpu import choice, making

path, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
choice.SECONDS = 0.05
choice.SETTLE_S = 0.0
right = choice.choose

def choose(*given, **more):
    with log.open("a") as file:
        file.write("choosing\\n")
    done = right(*given, **more)
    time.sleep(seconds)
    return done

choice.choose = choose
making.build_cpu(path, "x", say=print)
"""


def start(path: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SLOW, str(path), str(log), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for(log: Path) -> None:
    end = time.monotonic() + 120
    while not log.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_of_two_builders_one_waits_and_takes_what_the_other_made(
    bundle: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    both = [start(bundle, log, 1) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    assert log.read_text().splitlines() == ["choosing"]
    assert opens(bundle) == NAME


@pytest.mark.slow
def test_a_builder_that_is_killed_leaves_the_bundle_as_it_was(bundle: Path, tmp_path: Path) -> None:
    before, log = (bundle / "manifest.json").read_bytes(), tmp_path / "log"
    process = start(bundle, log, 600)
    wait_for(log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (bundle / "manifest.json").read_bytes() == before
    assert opens(bundle) is None
    assert not make(bundle).reused
    assert {each.name for each in (bundle / "engines").iterdir()} == {".lock", "x.plan"}
    assert opens(bundle) == NAME
