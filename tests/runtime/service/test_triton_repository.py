"""`vzip triton`: read by Triton's own protobuf, its models computed here. No server ran."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient
from google.protobuf import text_format

from tests.bundles import engine_record
from tests.places import GOLDEN
from tests.refusals import refused
from tests.runtime.service.serving import SCENES
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.service.adapters.triton_repository import write_repository

TINY = GOLDEN / "tiny_bundle"


def load(path: Path, name: str) -> Any:
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def protobuf() -> Any:
    """Triton's protobuf of a model's configuration; its package wants grpc, this module doesn't."""
    return load(Path(tritonclient.__file__).parent / "grpc" / "model_config_pb2.py", "model_config")


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["triton", str(TINY), "-o", str(tmp_path / "r"), "--name", "demo"]) == 0
    assert capsys.readouterr().out.split() == ["demo", "demo-encoder", "demo-prepare"]
    return tmp_path / "r"


def config(protobuf: Any, repository: Path, model: str) -> Any:
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, protobuf.ModelConfig())


def test_triton_s_protobuf_reads_what_the_manifest_says(protobuf: Any, written: Path) -> None:
    manifest = read_bundle(TINY).manifest
    encoder = config(protobuf, written, "demo-encoder")
    assert (encoder.name, encoder.platform) == ("demo-encoder", "onnxruntime_onnx")
    assert encoder.max_batch_size == manifest.batch.max == 3
    for tensors, wanted in ((encoder.input, manifest.inputs), (encoder.output, manifest.outputs)):
        assert [each.name for each in tensors] == [each.name for each in wanted]
        assert [list(each.dims) for each in tensors] == [list(each.shape[1:]) for each in wanted]
    types_ = [protobuf.DataType.Name(each.data_type) for each in (*encoder.input, *encoder.output)]
    assert types_[:3] == ["TYPE_UINT8", "TYPE_FP32", "TYPE_INT64"]
    assert list(encoder.dynamic_batching.preferred_batch_size) == [3]
    assert encoder.dynamic_batching.max_queue_delay_microseconds == 2000
    assert encoder.response_cache.enable
    warm = encoder.model_warmup[0].inputs["image"]
    assert (list(warm.dims), warm.zero_data) == ([16, 16, 3], True)
    prepare = config(protobuf, written, "demo-prepare")
    assert (prepare.backend, prepare.max_batch_size) == ("python", 3)
    assert [each.name for each in prepare.output] == ["image"]


def test_the_ensemble_joins_both(protobuf: Any, written: Path) -> None:
    ensemble = config(protobuf, written, "demo")
    assert ensemble.platform == "ensemble"
    prepare, encoder = ensemble.ensemble_scheduling.step
    assert (prepare.model_name, dict(prepare.input_map)) == ("demo-prepare", {"picture": "picture"})
    assert dict(prepare.output_map) == dict(encoder.input_map) == {"image": "image"}
    assert sorted(encoder.output_map) == sorted(each.name for each in ensemble.output)
    for step in (prepare, encoder):
        assert config(protobuf, written, step.model_name).name == step.model_name
    for model in ("demo", "demo-encoder", "demo-prepare"):
        assert list((written / model / "1").iterdir())
    assert not [each for each in written.iterdir() if each.name.startswith(".")]


def test_the_models_compute_what_the_encoder_does(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = types.ModuleType("triton_python_backend_utils")

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> np.ndarray:
            return self.array

    class Response:
        def __init__(self, tensors: Any = (), error: Any = None) -> None:
            self.tensors, self.error = tensors, error

    class Error:
        INVALID_ARG = 3

        def __init__(self, message: str, code: int) -> None:
            self.message, self.code = message, code

    triton.Tensor, triton.InferenceResponse, triton.TritonError = Tensor, Response, Error
    triton.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    model = load(written / "demo-prepare" / "1" / "model.py", "model").TritonPythonModel()
    model.initialize({})
    files = [each.read_bytes() for each in SCENES]

    def given(*data: bytes) -> dict[str, Tensor]:
        return {"picture": Tensor("picture", np.array([[each] for each in data], object))}

    whole, broken = model.execute([given(*files[:2]), given(b"no picture")])
    assert broken.error.code == Error.INVALID_ARG
    assert "format" in broken.error.message
    (tensor,) = whole.tensors
    session = onnxruntime.InferenceSession(str(written / "demo-encoder" / "1" / "model.onnx"))
    outputs = session.run(None, {tensor.name: tensor.as_numpy()})
    with VisionEncoder.open(TINY) as encoder:
        wanted = encoder.encode(files[:2])
    assert np.array_equal(outputs[0], wanted.embeds)
    assert np.array_equal(outputs[1], wanted.kept)


def test_an_engine_takes_the_graph_s_place(protobuf: Any, tmp_path: Path) -> None:
    import dataclasses
    import hashlib

    from vzip.runtime.bundle.engine_record import EngineBatch

    folder = shutil.copytree(TINY, tmp_path / "bundle")
    plan = b"a plan"
    bundle = read_bundle(folder)
    record = dataclasses.replace(
        engine_record(bundle),
        sha256=hashlib.sha256(plan).hexdigest(), bytes=len(plan), batch=EngineBatch(1, 2, 3),
    )  # fmt: skip
    (folder / "engines").mkdir()
    (folder / "engines" / "own.plan").write_bytes(plan)
    manifest = dataclasses.replace(bundle.manifest, engines={"own": record})
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    write_repository(folder, tmp_path / "r", name="demo", engine="own")
    encoder = config(protobuf, tmp_path / "r", "demo-encoder")
    assert encoder.platform == "tensorrt_plan"
    assert list(encoder.dynamic_batching.preferred_batch_size) == [2, 3]
    assert (tmp_path / "r" / "demo-encoder" / "1" / "model.plan").read_bytes() == plan
    with refused(InvalidInputError, got="other", expected="own"):
        write_repository(folder, tmp_path / "s", engine="other")


def test_what_triton_can_t_have_is_refused(written: Path, tmp_path: Path) -> None:
    with refused(InvalidInputError, got="static batch of 2", cure="--max-batch"):
        write_repository(GOLDEN / "tiny_static_bundle", tmp_path / "s")
    with refused(InvalidInputError, got="demo-prepare", cure="--name"):
        write_repository(TINY, written, name="demo")
    with refused(InvalidInputError, got="a/b", cure="--name"):
        write_repository(TINY, tmp_path / "s", name="a/b")
    with refused(InvalidInputError, got="engine 'x'", cure="--engine"):
        write_repository(TINY, tmp_path / "s", engine="x")
    write_repository(TINY, written, name="other")
    assert (written / "other" / "config.pbtxt").exists()
