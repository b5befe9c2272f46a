"""CPU engines that are OpenVINO's: chosen where it is the fastest, opened, refused, left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.precisions import add_precision, golden_precisions
from tests.refusals import refused, says
from vzip.export.cli import inspect as inspect_command
from vzip.export.engines.cpu import choice, making
from vzip.runtime import VisionEncoder
from vzip.runtime.agreement import Gate, Limits, load_reference
from vzip.runtime.backends import cpu_engine, openvino, packages
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
    VzipError,
)
from vzip.runtime.machine.timing import Timing

MakeBundle = Callable[[str], Bundle]
NAME = "x"
OFFERED = [each.name for each in choice.openvino_forms() if not each.calibrated]
"""On this CPU; what it has no kernels for can't be tried on it."""


def fastest(patch: pytest.MonkeyPatch, form: str) -> None:
    """Let a form be measured as the fastest; all agree."""

    def fake(calls: dict[str, Callable[[], object]], **_: float) -> dict[str, Timing]:
        return {name: Timing.of([1.0 if name == form else 2.0]) for name in calls}

    patch.setattr(choice, "interleaved", fake)
    patch.setattr(choice, "FORMS", ())
    for gate in ("CPU_FORM", "CPU_FORM_VARIED"):
        patch.setattr(choice, gate, Gate(overlap=0.5, kept=Limits(lowest=0.5)))


def make(path: Path, said: list[str] | None = None, **options: Any) -> Any:
    say = (lambda _: None) if said is None else said.append
    return making.build_cpu(path, NAME, say=say, **options)


@pytest.fixture(scope="session")
def _built(exported: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "bundle"
    shutil.copytree(exported("image").path, path)
    with pytest.MonkeyPatch.context() as patch:
        fastest(patch, OFFERED[-1])
        assert make(path).record.cpu.form == OFFERED[-1]
    return path


@pytest.fixture
def built(_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a bundle with an engine of OpenVINO's that a test may spoil."""
    monkeypatch.setattr(cpu_engine, "_said", set())
    return Path(shutil.copytree(_built, tmp_path / "built"))


def pictures(path: Path) -> np.ndarray[Any, Any]:
    bundle = read_bundle(path)
    return load_reference(bundle).input[: bundle.manifest.batch.max]


def change(path: Path, **values: Any) -> None:
    """Change values of the engine's record; ``cpu__b`` is b of cpu."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        place = manifest["engines"][NAME]
        for each in outer:
            place = place[each]
        place[last] = value
    file.write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("form", OFFERED)
def test_the_fastest_form_becomes_the_engine_and_is_opened(
    exported: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    path = Path(shutil.copytree(exported("image").path, tmp_path / "bundle"))
    fastest(monkeypatch, form)
    record = make(path).record
    assert (record.stack, record.cpu.form, record.proof["passed"]) == ("openvino", form, True)
    assert record.version == packages.version_of("openvino", "a test")
    assert packages.import_openvino("a test", "openvino").__version__.startswith(record.version)
    assert list(record.cpu.measured) == ["own", *OFFERED]
    # The larger batch as well, since the graph's is open.
    many = min(choice.MANY, read_bundle(path).manifest.batch.max)
    assert {"ms", "against_ms", f"ms_{many}", f"against_ms_{many}"} <= set(
        record.cpu.measured[form]
    )
    with (
        VisionEncoder.open(path, threads=1) as encoder,
        VisionEncoder.open(path, precision="fp32") as own,
    ):
        assert encoder.describe()["backend"] == "openvino"
        assert (encoder.engine, encoder.cpu_engine, own.backend) == (NAME, True, "onnxruntime")
        images = pictures(path)
        for count in (1, len(images)):
            got, expected = encoder.run(images[:count]), own.run(images[:count])
            cosine = np.sum(got.embeds * expected.embeds) / (
                np.linalg.norm(got.embeds) * np.linalg.norm(expected.embeds)
            )
            assert cosine > 0.99
        assert ((got.groups >= 0).sum(axis=1) == encoder.manifest.tower.tokens - 12).all()


def test_its_own_backend_alone_runs_it(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({"backend": "openvino"}, {"engine": NAME}, {"precision": "fastest"}):
        with VisionEncoder.open(built, **options) as encoder:  # type: ignore[arg-type]
            assert (encoder.backend, encoder.engine) == ("openvino", NAME)
    capsys.readouterr()
    with VisionEncoder.open(built, backend="onnxruntime") as encoder:
        assert encoder.engine is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "--backend openvino" in line
    for options in ({"engine": NAME}, {"precision": "fastest"}):
        with refused(InvalidInputError, got="'onnxruntime'", expected="'openvino'"):
            VisionEncoder.open(built, "onnxruntime", **options)  # type: ignore[arg-type]
    with VisionEncoder.open(built, backend="openvino", precision="fp32") as encoder:
        assert encoder.engine is None


def test_without_openvino_the_bundles_own_graph_runs(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for options in ({"engine": NAME}, {"precision": "fastest"}):
        with refused(MissingDependencyError, got="openvino", cure="vzip[openvino]"):
            VisionEncoder.open(built, **options)  # type: ignore[arg-type]
    for _ in range(2):
        with VisionEncoder.open(built) as encoder:
            assert (encoder.backend, encoder.engine) == ("onnxruntime", None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "vzip[openvino]" in line


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"version": "2024.0.1"}, "OpenVINO 2024.0.1"),
        ({"cpu__processor": "Elbrus-8S"}, "Elbrus-8S"),
        ({"model_sha256": "1" * 64}, "1" * 64),
    ],
)
def test_elsewhere_it_is_refused(built: Path, values: dict[str, Any], got: str) -> None:
    change(built, **values)
    with refused(BackendError, got=(repr(NAME), got), cure=f"vzip build {built} --cpu"):
        VisionEncoder.open(built, engine=NAME)
    with VisionEncoder.open(built) as encoder:
        assert encoder.engine is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "text", "head", "shorter", "model"])
def test_a_damaged_file_is_refused_by_name(built: Path, damage: str) -> None:
    """The last four are by somebody who wrote the digest too."""
    file = built / "engines" / f"{NAME}.plan"
    data = bytearray(file.read_bytes())
    head = data.index(b"\n") + 1
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        del data[-1]
    elif damage == "text":
        data[:] = b"nothing of the kind"
    elif damage == "head":
        data[:head] = b'{"parts": [{"part": "tower"}]}\n'
    elif damage == "shorter":
        del data[-64:]
    elif damage == "model":
        data[head:] = bytes(len(data) - head)
    file.unlink()
    if damage != "gone":
        file.write_bytes(data)
    written = damage in {"text", "head", "shorter", "model"}
    if written:
        change(built, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    for options in ({}, {"engine": NAME}):
        with pytest.raises(VzipError) as raised:
            VisionEncoder.open(built, **options)  # type: ignore[arg-type]
        assert type(raised.value) is (BackendError if written else BundleError)
        says(raised.value, got=str(built))
        assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_it_is_reused_until_the_libraries_that_there_are_change(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(monkeypatch, OFFERED[-1])
    assert make(built).reused
    monkeypatch.setitem(sys.modules, "openvino", None)
    said: list[str] = []
    made = make(built, said)
    assert (made.reused, made.record.stack) == (False, "onnxruntime")
    assert sum("vzip[openvino]" in line for line in said) == 1
    assert make(built).reused


def test_forms_are_those_that_the_cpu_has_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, names in (
        ({"FP32", "INT8"}, ["openvino", "openvino-int8"]),
        ({"FP32", "INT8", "BF16", "BIN"},
         ["openvino", "openvino-bf16", "openvino-int8", "openvino-int8-bf16"]),
        ({"FP32", "FP16", "INT8"},  # as ARM's have
         ["openvino", "openvino-fp16", "openvino-int8", "openvino-int8-fp16"]),
    ):  # fmt: skip
        monkeypatch.setattr(choice, "capabilities", lambda _, has=has: frozenset(has))
        assert [each.name for each in choice.openvino_forms()] == names


@pytest.mark.slow
def test_a_batch_to_tune_for_is_timed_alone(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(monkeypatch, "openvino")
    record = make(built, batch=2).record
    assert (record.batch.opt, record.cpu.form) == (2, "openvino")
    assert not [key for key in record.cpu.measured["openvino"] if key.startswith("ms_")]
    with refused(InvalidInputError, got="--opt-batch", expected="1 to 4"):
        make(built, batch=5)


def test_a_form_must_be_faster_over_the_batches(exported: MakeBundle) -> None:
    """One picture and several count alike: twice as long and a third of the time is a gain."""
    found: dict[str, Any] = {}
    bundle = exported("image")
    takes = {"a": {1: 1.0, 4: 3.0}, "b": {1: 2.0, 4: 1.0}}

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, feeds: dict[str, Any]) -> float:
            (images,) = feeds.values()
            return takes[self.name][len(images)]

    def fake(calls: dict[str, Callable[[], Any]], **_: float) -> dict[str, Timing]:
        return {name: Timing.of([call()]) for name, call in calls.items()}

    backends: Any = {name: Fake(name) for name in takes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "interleaved", fake)
        share = choice._timed(bundle, load_reference(bundle), backends, [1, 4], found)
    assert share == pytest.approx((2 / 3) ** 0.5)
    assert found == {"ms": 2.0, "against": "a", "against_ms": 1.0, "ms_4": 1.0, "against_ms_4": 3.0}


@pytest.mark.parametrize("kind", ["image", "fp16"])
def test_what_follows_the_tower_is_in_fp32_whatever_the_tower_is_in(
    exported: MakeBundle, kind: str
) -> None:
    bundle = exported(kind)
    names = ("image_embeds", "kept_indices", "token_weights")
    opened = openvino.OpenVinoCpu.of_graph(
        bundle.read_model(), bundle.weights_folder, "bf16", names
    )
    tower, rest = opened._parts
    assert [part.precision for part in opened._parts] == ["bf16", "f32"]
    types = {
        node.get_friendly_name(): node.get_type_name()
        for part in (tower, rest)
        for node in [*part.compiled.get_runtime_model().get_ops()]
    }
    assert types  # both were compiled
    hints = [part.compiled.get_property("INFERENCE_PRECISION_HINT") for part in (tower, rest)]
    assert hints[1].to_string() == "f32"
    # What is chosen and merged leaves the second one; nothing of it the first.
    first = {name for each in tower.compiled.outputs for name in each.get_names()}
    second = {name for each in rest.compiled.outputs for name in each.get_names()}
    assert set(names) <= second
    assert not set(names) & first
    tokens = opened.run({bundle.manifest.input.name: load_reference(bundle).input[:1]})
    weights = tokens["token_weights"]
    assert np.allclose(weights.sum(axis=-1), 1, atol=1e-6)  # a BF16 sum would be 4e-3 off
    opened.close()


@pytest.mark.parametrize("tower", ["f32", "bf16"])
def test_a_graph_of_vzip_calibrate_runs(
    tiny_bundle: Path, golden: dict[str, np.ndarray[Any, Any]], tower: str
) -> None:
    """In 8 bits OpenVINO rounds in other places; the tokens are the graph's all the same."""
    at = add_precision(tiny_bundle, "int8")
    opened = openvino.OpenVinoCpu.of_graph(
        at.read_model(), at.weights_folder, tower, ("image_embeds", "kept_indices")
    )
    found = opened.run({at.manifest.input.name: golden["images"][:3]})
    expected = golden_precisions()["int8"][:3]
    assert np.array_equal(found["kept_indices"], golden["kept"][:3])
    error = np.abs(found["image_embeds"] - expected).max() / np.abs(expected).max()
    assert error <= (2e-2 if tower == "bf16" else 1e-2)
    opened.close()


def test_the_command_lists_it(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command.main([str(built), "--engine", NAME], prog="vzip inspect") == 0
    text = capsys.readouterr().out
    assert "OpenVINO" in text
    assert f"measured {OFFERED[-1]}" in text


def test_a_record_of_it_is_of_a_cpu(built: Path) -> None:
    record = read_bundle(built).manifest.engines[NAME]
    with pytest.raises(Exception, match="stack"):
        dataclasses.replace(record, cpu=None)
