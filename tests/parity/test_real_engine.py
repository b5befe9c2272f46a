"""Engine files and TensorRT's classes as they really are, by TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from tests.refusals import refused
from tests.runtime import fake_gpu
from vzip.runtime import VisionEncoder
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.bindings import import_bindings, version_of
from vzip.runtime.backends.tensorrt.engine import Engine
from vzip.runtime.backends.tensorrt.engine_file import HEADER_BYTES, MAGIC, read_engine
from vzip.runtime.bundle.engine_record import EngineBatch, EngineRecord
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import add_engine
from vzip.runtime.errors import BackendError, BundleError


def compiled(folder: Path) -> bytes:
    """Compile a bundle's graph for SM 8.6."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(folder / "model.onnx"))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 16, 16, 3), (2, 16, 16, 3), (3, 16, 16, 3))
    config.add_optimization_profile(profile)
    return bytes(memoryview(builder.build_serialized_network(network, config)))


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    """A bundle with a real engine."""
    plan = compiled(tiny_bundle)
    opened = read_bundle(tiny_bundle)
    record = EngineRecord(
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        stack="tensorrt_rtx",
        version=version_of(trt),
        gpu=None,
        sm=("86",),
        jetpack=None,
        precision="fp32",
        batch=EngineBatch(1, 2, 3),
        model_sha256=opened.manifest.files["model.onnx"].sha256,
        settings={},
        seconds=0.5,
        fused_attention=None,
        proof=None,
    )
    return add_engine(opened, "ahead", record, plan)


def test_a_real_engine_has_the_header_that_is_looked_for(bundle: Bundle) -> None:
    plan = read_engine(bundle, "ahead")
    assert plan[:4] == MAGIC["tensorrt_rtx"]
    numbers = [int(part) for part in version_of(trt).split(".")]
    assert list(plan[24:HEADER_BYTES]) == numbers
    assert int.from_bytes(plan[16:24], "little") == len(plan)  # not relied on


def test_no_real_engine_that_was_damaged_gets_to_tensorrt(bundle: Bundle) -> None:
    path = bundle.path / "engines" / "ahead.plan"
    plan = path.read_bytes()
    for place in (*range(28), 64, 4096, len(plan) // 2, len(plan) - 1):
        spoilt = bytearray(plan)
        spoilt[place] ^= 0x10
        path.write_bytes(spoilt)
        with refused(BundleError, got="the engine 'ahead'"):
            read_engine(bundle, "ahead")
    for end in (0, 1, 27, 28, 1024, len(plan) - 1):
        path.write_bytes(plan[:end])
        with refused(BundleError, got=("'ahead'", f"{end} bytes")):
            read_engine(bundle, "ahead")


def test_without_a_gpu_the_backend_says_so_before_tensorrt_is_asked(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorRT 8.6 hands out a null pointer then, and the process dies at its first use.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(cuda, "candidates", lambda: iter(["libnone.so"]))
    with refused(BackendError, got=("'tensorrt'", "GPU")):
        VisionEncoder.open(bundle, backend="tensorrt")
    with VisionEncoder.open(bundle) as encoder:
        assert encoder.backend != "tensorrt"


def test_the_real_classes_take_our_logger_and_bytes_and_their_reason_is_told() -> None:
    with refused(BackendError, got=("TensorRT", "magicTag")) as raised:
        Engine(import_bindings("tensorrt_rtx"), bytearray(b"x" * 1000))
    assert "\n" not in str(raised.value)


def test_the_fake_gpu_has_no_attribute_that_the_real_module_lacks() -> None:
    def public(kind: Any) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    used = {"device_memory_size_v2", "create_execution_context", "num_io_tensors"}
    assert used <= public(trt.ICudaEngine)
    tensors = {name for name in dir(trt.ICudaEngine) if name.startswith("get_tensor_")}
    assert {n for n in public(fake_gpu.Engine) if n.startswith("get_tensor_")} <= tensors
    assert public(fake_gpu.RtxContext) - {"compute", "kernels"} <= public(trt.IExecutionContext)
    assert {"engine_host_code_allowed", "deserialize_cuda_engine"} <= public(trt.Runtime)
    names = {"DataType", "TensorIOMode", "TensorLocation", "TensorFormat", "ILogger", "Runtime"}
    assert names <= public(trt)
    for enumeration in ("NewDataType", "TensorIOMode", "TensorLocation", "TensorFormat"):
        real = getattr(trt, enumeration.removeprefix("New")).__members__
        assert set(getattr(fake_gpu, enumeration).__members__) <= set(real)
    assert set(fake_gpu.Severity.__members__) <= public(trt.ILogger)
    assert fake_gpu.Strategy.__members__.keys() == (
        trt.ExecutionContextAllocationStrategy.__members__.keys()
    )
