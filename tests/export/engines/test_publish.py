"""`vzip build`: with the real TensorRT-RTX what needs no GPU, with a fake TensorRT the rest."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.export import fake_tensorrt
from tests.export.fake_tensorrt import Layer, Tensor
from tests.references import Arrays, answers, with_reference
from tests.refusals import refused
from vzip.export.engines.published import BuiltEngine
from vzip.export.engines.tensorrt import build as trt_build
from vzip.export.engines.tensorrt import build_log as engine_log
from vzip.export.engines.tensorrt import layers as engine_layers
from vzip.export.engines.tensorrt import memory as build_memory
from vzip.export.engines.tensorrt import proof as engine_proof
from vzip.export.engines.tensorrt import publish as engine
from vzip.export.engines.tensorrt.api import load_bindings
from vzip.export.engines.tensorrt.memory import compare, estimate
from vzip.export.engines.tensorrt.publish import build_engine, reusable
from vzip.export.engines.tensorrt.request import BuildRequest, BuildTarget
from vzip.runtime.agreement import Proof
from vzip.runtime.backends.tensorrt import backend as tensorrt
from vzip.runtime.backends.tensorrt import engine as started
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.bundle.engine_record import EngineBatch, EngineRecord
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import Bundle, open_engine, read_bundle
from vzip.runtime.bundle.writer import _foreign_engines, bundle_writer
from vzip.runtime.cli.main import main
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    ExportError,
    ParityError,
)
from vzip.runtime.machine import sensors

AHEAD = BuildRequest(rtx="sm86,sm89")
NAME = "rtx-sm86-sm89"
RTX = ("--rtx", "sm86")


def quiet(line: str) -> None:
    """Be told what goes on and keep it to oneself."""


def files(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))


def ahead(path: Path, **change: Any) -> BuiltEngine:
    return build_engine(path, dataclasses.replace(AHEAD, **change), say=quiet)


# Ahead of time, for real


def test_builds_publishes_and_says_so(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_bundle), "--builder-optimization-level", "2", "--rtx"]
    assert main([*command, "sm89,8.6"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tiny_bundle}/engines/{NAME}.plan\n"
    bundle = read_bundle(tiny_bundle)
    record = bundle.manifest.engines[NAME]
    plan = read_engine(bundle, NAME)
    assert plan[:4] == b"vtrt"
    settings = {
        "typing": "strong", "low_memory": False, "tf32": False, "optimization_level": 2,
        "ahead_of_time": True, "user_allocation": True,
    }  # fmt: skip
    assert record == EngineRecord(
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        stack="tensorrt_rtx",
        version=load_bindings("tensorrt_rtx").version,
        gpu=None,
        sm=("86", "89"),
        jetpack=None,
        precision="fp32",
        batch=EngineBatch(1, 3, 3),
        model_sha256=bundle.manifest.files["model.onnx"].sha256,
        settings=settings,
        seconds=record.seconds,
        fused_attention=None,
        proof=None,
    )
    assert record.seconds > 0
    assert "the build needs about 450 MiB (estimate" in said.err
    assert "not proven: it was built without a GPU" in said.err
    assert files(tiny_bundle / "engines") == [".lock", f"{NAME}.plan"]
    # Again: nothing is built.
    before = (tiny_bundle / "manifest.json").read_bytes()
    assert main([*command, "sm86,sm89"]) == 0
    assert "there already, the same in every respect" in capsys.readouterr().err
    assert (tiny_bundle / "manifest.json").read_bytes() == before


def test_what_rtx_builds_can_be_captured_in_a_graph(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = load_bindings("tensorrt_rtx").module
    flags: list[set[str]] = []
    real = trt.Builder.build_serialized_network

    def build(self: Any, network: Any, config: Any) -> Any:
        every = trt.BuilderFlag.__members__.items()
        flags.append({name for name, flag in every if config.get_flag(flag)})
        return real(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build)
    ahead(tiny_bundle)
    assert flags == [{"REQUIRE_USER_ALLOCATION"}]


def test_a_static_batch_has_one_size(tiny_static_bundle: Path) -> None:
    record = ahead(tiny_static_bundle, name="two").record
    assert record.batch == EngineBatch(2, 2, 2)
    assert record.precision == "fp16"


def test_an_engine_that_differs_in_any_field_is_not_reused(tiny_bundle: Path) -> None:
    result = ahead(tiny_bundle)
    assert reusable(result.bundle, NAME, result.record) == result.record
    assert reusable(result.bundle, "another", result.record) is None
    changes: dict[str, Any] = {
        "sha256": "0" * 64, "version": "1.7.0.1", "stack": "tensorrt", "gpu": "NVIDIA RTX",
        "sm": ("86",), "precision": "fp16", "batch": EngineBatch(1, 1, 3),
        "model_sha256": "0" * 64, "settings": {},
    }  # fmt: skip
    for name, value in changes.items():
        other = dataclasses.replace(result.record, **{name: value})
        manifest = dataclasses.replace(result.bundle.manifest, engines={NAME: other})
        assert reusable(Bundle(tiny_bundle, manifest), NAME, result.record) is None, name


def test_a_damaged_engine_and_one_of_other_settings_are_built_again(tiny_bundle: Path) -> None:
    path = ahead(tiny_bundle).path
    data = path.read_bytes()
    for spoilt in (data[:-99] + b"x" + data[-98:], data[:100], None):
        path.unlink()
        if spoilt is not None:
            path.write_bytes(spoilt)
        again = ahead(tiny_bundle)
        assert not again.reused
        assert read_engine(again.bundle, NAME)
        assert ahead(tiny_bundle).reused
    result = ahead(tiny_bundle, opt_batch=1)
    assert not result.reused
    assert result.record.batch == EngineBatch(1, 1, 3)
    assert list(result.bundle.manifest.engines) == [NAME]


def test_what_cant_be_asked_for(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine with a GPU tests it too.
    monkeypatch.setattr(engine_layers.cuda, "candidates", lambda: iter(()))
    before = files(tiny_bundle)
    for expected, *arguments in (
        ("sm75", "--rtx", "sm87"),
        ("'orin'", "--rtx", "orin"),
        ("(--builder-optimization-level) is 6", *RTX, "--builder-optimization-level", "6"),
        ("(--workspace) is 0", *RTX, "--workspace", "0"),
        ("(--opt-batch) is 4", *RTX, "--opt-batch", "4"),
        ("(--name) is '../x'", *RTX, "--name", "../x"),
        ("libcudart",),  # TensorRT-RTX is there, a GPU is not
    ):
        assert main(["build", str(tiny_bundle), *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        *memory, line = said.err.splitlines()
        assert expected in line
        # What it needs is said before the GPU is asked for.
        said_before = [each.partition(" about")[0] for each in memory]
        assert said_before == ([] if arguments else ["memory: the build needs"])
        assert files(tiny_bundle) == before


def with_graph(bundle: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Return a bundle with another graph and the same manifest."""
    manifest = read_bundle(bundle).manifest
    model = onnx.load(bundle / "model.onnx")
    change(model)
    with bundle_writer(folder / "other") as writer:
        onnx.save(model, writer.folder / "model.onnx")
        writer.publish(manifest)
    return folder / "other"


def test_the_parsers_own_words_in_one_line(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_integers(model: onnx.ModelProto) -> None:
        integer = helper.make_tensor("whole", onnx.TensorProto.INT64, [1], [1])
        model.graph.initializer.append(integer)
        model.graph.node[-1].input[1] = "whole"

    path = with_graph(tiny_bundle, tmp_path, of_integers)
    assert main(["build", str(path), "--rtx", "sm86"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vzip: error: the parser of TensorRT-RTX 1.7")
    assert "Add 'image_embeds'" in line
    assert not read_bundle(path).manifest.engines
    assert files(path / "engines") == [".lock", "rtx-sm86.log"]
    assert "image_embeds" in (path / "engines" / "rtx-sm86.log").read_text()


def test_a_network_that_isnt_the_manifests(tiny_bundle: Path, tmp_path: Path) -> None:
    def narrower(model: onnx.ModelProto) -> None:
        (first,) = (node for node in model.graph.node if node.output[0] == "image_embeds")
        first.output[0] = "all"
        axes = [("start", [0]), ("end", [2]), ("axis", [2])]
        for name, value in axes:
            model.graph.initializer.append(
                onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], value)
            )
        model.graph.node.append(
            helper.make_node("Slice", ["all", "start", "end", "axis"], ["image_embeds"])
        )
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 2

    path = with_graph(tiny_bundle, tmp_path, narrower)
    with refused(ExportError, got="image_embeds FLOAT [-1, 7, 2]", expected="image_embeds"):
        ahead(path)


def build_bytes(model: bytes, path: Path, manifest: Manifest) -> trt_build.Built:
    settings = trt_build.BuildSettings(
        workspace_mib=None,
        level=None,
        low_memory=False,
        opt_batch=1,
        islands="graph",
        capabilities=("86",),
    )
    bindings = load_bindings("tensorrt_rtx")
    return trt_build.build(bindings, model, path, manifest, settings=settings, timing_cache=b"")


def test_bytes_that_are_no_graph_and_data_that_is_missing(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    path, manifest, model = tiny_bundle / "model.onnx", bundle.manifest, bundle.read_model()
    for content in (b"", b"hello\n", b"\x00" * 99, b"onnx" * 99):
        with refused(ExportError, got="TensorRT-RTX"):
            build_bytes(content, path, manifest)
    (tiny_bundle / "model.onnx.data").unlink()
    with refused(BundleError, got="model.onnx.data"):
        ahead(tiny_bundle)
    with refused(ExportError, got="model.onnx.data"):
        build_bytes(model, path, manifest)


def test_ctrl_c_cancels_the_build(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, phase: str, parent: str | None, steps: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trt_build.Progress, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead(tiny_bundle)
    assert files(tiny_bundle / "engines") == [".lock", f"{NAME}.log"]
    monkeypatch.undo()
    assert not ahead(tiny_bundle).reused  # and the lock is free
    assert files(tiny_bundle / "engines") == [".lock", f"{NAME}.plan"]


def test_ctrl_c_that_comes_up_in_the_logger_cancels_the_build(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's bindings print what a logger raises, and go on."""
    heard: list[str] = []
    real = trt_build._Messages.hear

    def interrupted(self: Any, severity: str, message: str) -> None:
        heard.append(message)
        if len(heard) == 20:
            raise KeyboardInterrupt
        real(self, severity, message)

    monkeypatch.setattr(trt_build._Messages, "hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead(tiny_bundle)
    cancelled = len(heard)
    assert not read_bundle(tiny_bundle).manifest.engines
    heard[:] = ["from here on nothing raises"] * 20
    assert not ahead(tiny_bundle).reused
    assert len(heard) - 20 > cancelled  # it was cut short


# In processes of their own

RUN = "import sys; from vzip.runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"


def start(path: Path, *arguments: str, before: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", before + RUN, "build", str(path), "--rtx", "sm86", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_builders_at_once(tiny_bundle: Path) -> None:
    slowly = (
        "import time; from vzip.export.engines.tensorrt import publish; build = publish.build\n"
        "def slow(*a, **k): time.sleep(3); return build(*a, **k)\n"
        "publish.build = slow\n"
    )
    one = start(tiny_bundle, before=slowly)
    while not (tiny_bundle / "engines" / ".lock").exists():
        time.sleep(0.05)
        assert one.poll() is None
    time.sleep(0.2)
    two = start(tiny_bundle)
    said = [each.communicate(timeout=120) for each in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), said
    assert "waiting for it to end" in said[1][1]
    assert "there already, the same in every respect" in said[1][1]
    assert "built in" in said[0][1]
    bundle = read_bundle(tiny_bundle)
    assert read_engine(bundle, "rtx-sm86")
    assert files(tiny_bundle / "engines") == [".lock", "rtx-sm86.plan"]


def test_killed_while_writing(tiny_bundle: Path) -> None:
    ahead(tiny_bundle, rtx="sm86")
    before = read_bundle(tiny_bundle)
    plan = read_engine(before, "rtx-sm86")
    # At the first flush: the engine's bytes are under a hidden name.
    killing = "import os; os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
    process = start(tiny_bundle, "--builder-optimization-level", "1", before=killing)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert read_bundle(tiny_bundle) == before
    assert read_engine(before, "rtx-sm86") == plan
    assert ahead(tiny_bundle, rtx="sm86").reused
    assert not ahead(tiny_bundle, rtx="sm86", level=1).reused


def test_no_room_on_the_disk(tiny_bundle: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "import sys; sys.dont_write_bytecode = True\n"
    )
    process = start(tiny_bundle, before=limited)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "the disk or quota is full" in said.splitlines()[-1]
    assert not read_bundle(tiny_bundle).manifest.engines
    assert files(tiny_bundle / "engines") == [".lock", "rtx-sm86.log"]


@pytest.mark.parametrize("what", ["engines", ".lock"])
def test_a_folder_that_cant_be_written(tiny_bundle: Path, what: str) -> None:
    if what == "engines":
        (tiny_bundle / "engines").write_text("in the way")
    else:  # a link to what may be anywhere
        (tiny_bundle / "engines").mkdir()
        (tiny_bundle / "engines" / ".lock").symlink_to(tiny_bundle / "elsewhere")
    with refused(BundleError, got="written", cure="copy the bundle" if what == "engines" else ()):
        ahead(tiny_bundle)
    assert not (tiny_bundle / "elsewhere").exists()


# On a GPU, with a fake TensorRT

ORIN = BuildTarget("Orin", ("87",), "6.2")
GOOD = Proof(4, 8, 1.0, 0, 0, 0.9999, 0.99999, 1e-3, 40, 0.9999)
BAD = dataclasses.replace(
    GOOD, min_cosine=0.14, on_average=False, short=("mean cosine of kept tokens 0.14",)
)
FEW = dataclasses.replace(
    GOOD, min_cosine=0.9, short=("3 of 216 kept tokens differ: picture 0 token 7 by 0.3",)
)


class Jetson:
    """A machine with a fake TensorRT, whose proofs give what is in `proofs`, one after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.proofs: list[Proof] = []
        self.said: list[str] = []
        self.available, self.swap = 6000, 0
        monkeypatch.setattr(engine, "this_machine", lambda: ORIN)
        monkeypatch.setattr(engine_layers.cuda, "load", lambda: None)
        monkeypatch.setattr(engine, "prove_engine", lambda *_: self.proofs.pop(0))
        monkeypatch.setattr(
            sensors,
            "memory",
            lambda: sensors.Memory(
                7600, self.available, self.swap, self.swap, 0, None, None, self.swap
            ),
        )

    def install(self, version: Any, bundle: Path, **options: Any) -> Any:
        return fake_tensorrt.install_for(bundle, self.monkeypatch, version, **options)

    def build(self, path: Path, **request: Any) -> BuiltEngine:
        self.said.clear()
        return build_engine(path, BuildRequest(**request), say=self.said.append)

    def told(self, part: str) -> bool:
        return any(part in line for line in self.said)


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> Jetson:
    return Jetson(monkeypatch)


@pytest.fixture
def proven(tiny_bundle: Path, golden: Arrays) -> Path:
    """A bundle that engines can be held to; what comes of that is said by `Jetson.proofs`."""
    return with_reference(tiny_bundle, golden).path


@pytest.mark.parametrize("version", ["8.6", "10.3", "10.13", "11.4"])
def test_every_version_builds_proves_and_publishes(
    version: Any, proven: Path, jetson: Jetson
) -> None:
    trt = jetson.install(version, proven)
    jetson.proofs = [GOOD]
    result = jetson.build(proven, workspace_mib=512, level=4)
    record = result.record
    assert result.name == "trt-sm87"
    assert (record.gpu, record.sm, record.jetpack) == ("Orin", ("87",), "6.2")
    assert record.proof == GOOD.to_json()
    assert record.fused_attention == 2
    assert (record.version, record.stack) == (trt.__version__, "tensorrt")
    (network,), (config,) = trt.made.networks, trt.made.configs
    creation = trt.NetworkDefinitionCreationFlag
    wanted = 0
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):
        if hasattr(creation, name):
            wanted |= 1 << int(getattr(creation, name))
    assert network.created_with == wanted
    assert trt.BuilderFlag.TF32 not in config.flags
    assert config.pools == {trt.MemoryPoolType.WORKSPACE: 512 << 20}
    assert config.builder_optimization_level == 4
    (profile,) = config.profiles
    assert profile.shapes == ("image", (1, 16, 16, 3), (3, 16, 16, 3), (3, 16, 16, 3))
    assert (proven / "engines" / "timing.cache").read_bytes() == b"the GPU's timings"
    editable = getattr(trt.BuilderFlag, "EDITABLE_TIMING_CACHE", None)
    assert editable is None or editable in config.flags
    assert jetson.told("fused attention: 2 layers")
    # The same again is reused; its proof stands.
    assert jetson.build(proven, workspace_mib=512, level=4).reused
    # A container on the same machine, which doesn't see JetPack, reuses it too.
    jetson.monkeypatch.setattr(engine, "this_machine", lambda: BuildTarget("Orin", ("87",), None))
    assert jetson.build(proven, workspace_mib=512, level=4).reused
    # Another version of TensorRT: built again.
    trt.__version__ = f"{version}.9.9"
    jetson.proofs = [GOOD]
    assert not jetson.build(proven, workspace_mib=512, level=4).reused


def parsed(trt: Any) -> list[Layer]:
    """What a parser could make of an FP16 graph with FP32 scores."""
    single, half, whole = trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.INT32
    kinds = trt.LayerType

    def layer(name: str, kind: Any, ins: list[Any], outs: list[Any]) -> Layer:
        given = [Tensor(f"into {name} {n}", each, ()) for n, each in enumerate(ins)]
        made = [Tensor(f"{name}{n}", each, ()) for n, each in enumerate(outs)]
        return Layer(name, kind, given, made)

    return [
        layer("weights", kinds.CONSTANT, [], [single]),
        layer("linear", kinds.MATRIX_MULTIPLY, [half, half], [half]),
        layer("norm", kinds.NORMALIZATION, [half, half, half], [half]),
        layer("attention", kinds.SOFTMAX, [half], [half]),
        Layer("softmax of the product", kinds.SHUFFLE, [Tensor("linear0", half, ())], []),
        layer("to single", kinds.CAST, [half], [single]),
        layer("scores", kinds.SOFTMAX, [single], [single]),
        layer("top", kinds.TOPK, [single], [single, whole]),
        layer("equal", kinds.ELEMENTWISE, [whole, whole], [trt.DataType.BOOL]),
    ]


def test_8_6_holds_what_is_fp32_in_the_graph_to_fp32(
    tiny_static_bundle: Path, jetson: Jetson
) -> None:
    trt = jetson.install("8.6", tiny_static_bundle, layers=parsed)
    record = jetson.build(tiny_static_bundle).record
    assert record.settings["typing"] == "weak"
    assert record.settings["fp32_layers"] == "graph"
    (config,), (network,) = trt.made.configs, trt.made.networks
    assert config.previews == {trt.PreviewFeature.PROFILE_SHARING_0806: True}
    assert record.settings["profile_sharing"] is True
    assert {trt.BuilderFlag.FP16, trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS} <= config.flags
    assert config.profiles == []  # the batch is static
    held = {each.name: each.output_types for each in network.layers if each.precision is not None}
    single = trt.DataType.FLOAT
    assert held == {"scores": {0: single}, "top": {0: single}}
    assert {each.precision for each in network.layers} == {None, single}


def test_fp32_on_8_6_has_no_fp16_flag(tiny_bundle: Path, jetson: Jetson) -> None:
    trt = jetson.install("8.6", tiny_bundle, layers=parsed)
    jetson.build(tiny_bundle)
    assert trt.made.configs[0].flags == set()


def test_without_a_reference_nothing_is_proven_and_that_is_said(
    tiny_bundle: Path, jetson: Jetson
) -> None:
    jetson.install("10.3", tiny_bundle)
    assert jetson.build(tiny_bundle).record.proof is None
    assert jetson.told("not proven: the bundle has no reference.npz")
    assert jetson.build(tiny_bundle).reused


def test_an_engine_that_fails_is_not_published(proven: Path, jetson: Jetson) -> None:
    jetson.install("10.3", proven)
    jetson.proofs = [GOOD]
    before = jetson.build(proven).bundle
    plan = read_engine_file(before)
    jetson.proofs = [BAD]
    with refused(ParityError, got="0.14", cause="miscompiles", cure="--safer"):
        jetson.build(proven, level=5)
    assert read_bundle(proven) == before
    assert read_engine_file(before) == plan
    assert files(proven / "engines") == [
        ".lock", "timing.cache", "trt-sm87.log", "trt-sm87.plan"
    ]  # fmt: skip


def test_tensorrt_is_not_blamed_for_few_tokens(proven: Path, jetson: Jetson) -> None:
    jetson.install("10.3", proven)
    jetson.proofs = [FEW]
    with refused(ParityError, got="picture 0 token 7 by 0.3", cause="on average") as caught:
        jetson.build(proven)
    assert "miscompiles" not in str(caught.value)


def read_engine_file(bundle: Bundle) -> bytes:
    return (bundle.path / "engines" / "trt-sm87.plan").read_bytes()


def test_the_next_safer_way_is_tried_when_asked(proven: Path, jetson: Jetson) -> None:
    jetson.install("10.3", proven)
    jetson.proofs = [BAD, GOOD]
    record = jetson.build(proven, safer=True).record
    assert record.settings["optimization_level"] == 0
    assert "fp32_accumulators" not in record.settings
    assert jetson.build(proven, safer=True).reused  # what came out of it counts
    jetson.proofs = [BAD, BAD]
    with pytest.raises(ParityError) as caught:
        jetson.build(proven, safer=True, opt_batch=1)
    assert str(caught.value).count("0.14") == 2
    assert "--safer" not in str(caught.value)


def test_safer_on_8_6_is_more_fp32(
    tiny_static_bundle: Path, golden: Arrays, jetson: Jetson
) -> None:
    trt = jetson.install("8.6", with_reference(tiny_static_bundle, golden).path, layers=parsed)
    jetson.proofs = [BAD, BAD, GOOD]
    record = jetson.build(tiny_static_bundle, safer=True).record
    assert record.settings["fp32_layers"] == "all"
    graph, norms, everything = trt.made.networks
    held = [
        {each.name for each in n.layers if each.precision is not None} for n in trt.made.networks
    ]
    assert held == [{"scores", "top"}, {"scores", "top", "norm", "attention"}, set()]
    assert trt.BuilderFlag.FP16 not in trt.made.configs[2].flags
    assert everything.layers
    assert graph.layers[2].output_types == norms.layers[2].output_types == {}


def test_the_last_safer_way_of_a_strongly_typed_network_is_fp32_sums(
    tiny_static_bundle: Path, golden: Arrays, jetson: Jetson
) -> None:
    """A level changes no arithmetic; casts round an FP16 product do."""
    path = with_reference(tiny_static_bundle, golden).path
    trt = jetson.install("10.3", path, layers=parsed)
    jetson.proofs = [BAD, BAD, GOOD]
    record = jetson.build(path, safer=True).record
    assert record.settings["fp32_accumulators"] is True
    plain, lower, last = (network.layers for network in trt.made.networks)
    assert len(plain) == len(lower) == len(last) - 3
    kinds, types = trt.LayerType, trt.DataType
    (product,) = (each for each in last if each.type == kinds.MATRIX_MULTIPLY)
    assert [each.dtype for each in product.inputs] == [types.FLOAT, types.FLOAT]
    assert [each.outputs[0].dtype for each in last[-3:]] == [types.FLOAT, types.FLOAT, types.HALF]
    assert last[-1].inputs == product.outputs
    # Whoever read the product reads what was cast back.
    reader = next(each for each in last if each.name == "softmax of the product")
    assert reader.inputs == last[-1].outputs


def test_fp32_sums_with_the_real_rtx(
    tiny_static_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, bindings = read_bundle(tiny_static_bundle), load_bindings("tensorrt_rtx")
    counts: list[int] = []
    real = trt_build.sum_in_fp32
    monkeypatch.setattr(
        trt_build, "sum_in_fp32", lambda *given: counts.append(real(*given)) or counts[-1]
    )
    settings = trt_build.BuildSettings(None, None, False, 2, "graph", ("89",), fp32_sums=True)
    built = trt_build.build(
        bindings, bundle.read_model(), bundle.path / "model.onnx", bundle.manifest,
        settings=settings, timing_cache=b"",
    )  # fmt: skip
    assert counts[0] > 0
    assert bytes(built.plan)[:4] == b"vtrt"


SAID = [("VERBOSE", "tactic 7"), ("INFO", "sizes"), ("WARNING", "LayerNorm may\noverflow"),
        ("WARNING", "another"), ("ERROR", "the end")]  # fmt: skip


def test_the_whole_log_of_a_build_that_fails_is_kept(tiny_bundle: Path, jetson: Jetson) -> None:
    jetson.install("10.3", tiny_bundle, talk=SAID, build=lambda *_: "no tactic")
    kept = tiny_bundle / "engines" / "trt-sm87.log"
    kept.parent.mkdir()
    elsewhere = tiny_bundle / "elsewhere"
    elsewhere.write_text("mine")
    kept.symlink_to(elsewhere)  # a bundle is foreign: nothing is written through its links
    with refused(BackendError, got="the end"):
        jetson.build(tiny_bundle)
    assert elsewhere.read_text() == "mine"
    text = kept.read_text()
    for severity, message in [*SAID, ("ERROR", "no tactic"), ("vzip", "settings: ")]:
        assert f" {severity}: {message}" in text
    assert "BackendError" in text
    assert jetson.told(str(kept))
    # The next one that succeeds takes it away, and says how often TensorRT warned.
    jetson.install("10.3", tiny_bundle, talk=SAID[:4])
    jetson.build(tiny_bundle)
    assert not kept.exists()
    assert jetson.told("warning: TensorRT gave 2 warnings, first: LayerNorm may overflow")


def test_the_log_is_where_it_is_asked_for(
    tiny_bundle: Path, tmp_path: Path, jetson: Jetson
) -> None:
    jetson.install("10.3", tiny_bundle, talk=SAID[:1])
    asked = tmp_path / "build.log"
    jetson.build(tiny_bundle, log=asked)
    assert " VERBOSE: tactic 7\n" in asked.read_text()
    assert files(tiny_bundle / "engines") == [".lock", "timing.cache", "trt-sm87.plan"]
    assert main(["build", str(tiny_bundle), "--log", str(tmp_path / "no" / "x.log")]) == 2
    assert main(["build", str(tiny_bundle), "--log", str(tmp_path / "x.plan")]) == 2
    assert main(["build", str(tiny_bundle), "--cpu", "--log", str(asked)]) == 2


def test_a_log_is_bounded_and_ends_with_what_matters(
    tiny_bundle: Path, jetson: Jetson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_log, "MOST_DETAILS", 4000)
    monkeypatch.setattr(engine_log, "MOST", 5000)
    talk = [*[("VERBOSE", "x" * 90)] * 100, ("ERROR", "the cause")]
    jetson.install("10.3", tiny_bundle, talk=talk, build=lambda *_: "so it fails")
    with pytest.raises(BackendError):
        jetson.build(tiny_bundle)
    text = (tiny_bundle / "engines" / "trt-sm87.log").read_text()
    assert len(text) < 5100
    assert "ERROR: the cause" in text
    assert "messages left out" in text


def test_one_logger_for_builder_parser_and_inspector(proven: Path, jetson: Jetson) -> None:
    """TensorRT keeps the first that it sees, and warns of every other."""
    trt = jetson.install("10.3", proven)
    jetson.proofs = [GOOD]
    jetson.build(proven)
    assert len(trt.made.loggers) == 2
    assert len(set(trt.made.loggers)) == 1


def test_an_inspector_that_fails_costs_no_engine(proven: Path, jetson: Jetson) -> None:
    for answer in ("no JSON", '["a list"]', None):
        trt = jetson.install("10.3", proven)

        def inspect(*_: object, answer: str | None = answer) -> str:
            if answer is None:
                raise RuntimeError("out of memory")
            return answer

        jetson.monkeypatch.setattr(trt.EngineInspector, "get_engine_information", inspect)
        jetson.proofs = [GOOD]
        result = jetson.build(proven, level=len(str(answer)) % 5)
        assert result.record.fused_attention is None
        assert jetson.told("warning: the engine is published, and could not be looked into")
        assert read_bundle(proven).manifest.engines[result.name] == result.record


@pytest.mark.parametrize(
    ("name", "kind"),
    [("{ForeignNode[node_conv...node_add]}", "Myelin"), ("all of it", "Myelin"),
     ("{ForeignNode[a...b]}", "")],
)  # fmt: skip
def test_8_6_does_not_tell_what_it_fused(
    proven: Path, jetson: Jetson, name: str, kind: str
) -> None:
    trt = jetson.install("8.6", proven)
    said = json.dumps({"Layers": [{"Name": name, "LayerType": kind}, {"Name": "cast"}]})
    jetson.monkeypatch.setattr(trt.EngineInspector, "get_engine_information", lambda *_: said)
    jetson.proofs = [GOOD]
    assert jetson.build(proven).record.fused_attention is None
    assert jetson.told("doesn't tell: 1 of 2 layers hold many nodes each")
    assert not jetson.told("separate kernels")


def test_8_6_says_at_the_start_that_ctrl_c_waits(proven: Path, jetson: Jetson) -> None:
    for version, waits in (("8.6", True), ("10.3", False)):
        jetson.install(version, proven)
        jetson.proofs = [GOOD]
        jetson.build(proven)
        assert jetson.told("Ctrl-C ends this build when TensorRT is done") == waits


@pytest.mark.parametrize("content", [b"damaged", b"none at all", b"of another GPU", None])
def test_a_timing_cache_that_cant_be_used(
    tiny_bundle: Path, jetson: Jetson, content: bytes | None
) -> None:
    trt = jetson.install("10.3", tiny_bundle)
    cache = tiny_bundle / "engines" / "timing.cache"
    cache.parent.mkdir()
    if content is None:
        cache.symlink_to("/dev/zero")
    else:
        cache.write_bytes(content)
    jetson.build(tiny_bundle)
    wanted = (
        "is no plain file" if content is None else "the timing cache is damaged, or from another"
    )
    assert jetson.told(wanted)
    assert trt.made.caches == ([b""] if content is None else [content, b""])
    assert cache.read_bytes() == b"the GPU's timings"
    # What was written is good: the next build uses it and says nothing.
    jetson.build(tiny_bundle, level=1)
    assert not jetson.told("timing cache")
    assert trt.made.caches[-1] == b"the GPU's timings"


def test_the_builders_own_words(tiny_bundle: Path, jetson: Jetson) -> None:
    jetson.install("10.3", tiny_bundle, build=lambda *_: "Could not find any\nimplementation")
    with refused(BackendError, got="Could not find any implementation", cure="--low-memory") as e:
        jetson.build(tiny_bundle)
    assert "cma=" not in str(e.value)  # on a workstation that is no cure
    orin = sensors.Jetson("Orin Nano", "36.4.3", "6.2")
    jetson.monkeypatch.setattr(sensors, "jetson", lambda: orin)
    with refused(BackendError, cure=("NvMap error 12", "cma=512M")):
        jetson.build(tiny_bundle)


def test_a_header_that_the_runtime_would_refuse(tiny_bundle: Path, jetson: Jetson) -> None:
    for header, found, expected in (
        (lambda made: b"trt2" + made[4:], "b'trt2'", "b'ftrt'"),
        (lambda made: made[:24] + bytes([11, 0, 0, 0]), "TensorRT 11.0.0.0", "10.3"),
    ):
        jetson.install("10.3", tiny_bundle, header=header)
        with refused(BackendError, got=found, expected=expected):
            jetson.build(tiny_bundle)
        assert not read_bundle(tiny_bundle).manifest.engines


def test_no_gpu_and_a_parser_that_refuses(tiny_bundle: Path, jetson: Jetson) -> None:
    jetson.install("10.3", tiny_bundle, gpu=False)
    with refused(BackendError, got="CUDA initialization", cause="GPU"):
        jetson.build(tiny_bundle)
    jetson.install("8.6", tiny_bundle, parse=lambda *_: ["No importer\nfor Foo", "echo"])
    with refused(ExportError, got=("TensorRT 8.6.2", "No importer for Foo")):
        jetson.build(tiny_bundle)


def test_a_tensorrt_for_a_newer_cuda_than_the_driver_serves(
    tiny_bundle: Path, jetson: Jetson
) -> None:
    """What the package `tensorrt` brings onto a machine whose nvidia-smi looks healthy."""
    jetson.install("11.4", tiny_bundle, gpu=False)
    jetson.monkeypatch.setattr(started, "distribution_of", lambda _: "tensorrt-cu13")
    jetson.monkeypatch.setattr(started, "served", lambda: "12.4")
    with refused(
        BackendError, got="CUDA initialization", cause=("tensorrt-cu13", "12.4"),
        cure=("pip uninstall -y tensorrt tensorrt-cu13", "pip install 'vzip[tensorrt-cu12]'"),
    ):  # fmt: skip
        jetson.build(tiny_bundle)


def test_low_memory(tiny_bundle: Path, jetson: Jetson) -> None:
    trt = jetson.install("10.3", tiny_bundle)
    record = jetson.build(tiny_bundle, low_memory=True).record
    assert record.settings["workspace_mib"] == 256
    assert record.settings["optimization_level"] == 2
    assert record.settings["low_memory"] is True
    (config,) = trt.made.configs
    on = [each.name for each in trt.TacticSource if config.sources >> int(each) & 1]
    assert on == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    assert jetson.told("memory: the build needs about 906 MiB (estimate")


def test_low_memory_refuses_what_cant_fit(tiny_bundle: Path, jetson: Jetson) -> None:
    trt = jetson.install("10.3", tiny_bundle)
    jetson.available = 800
    with refused(BackendError, got=("906 MiB", "800 MiB")):
        jetson.build(tiny_bundle, low_memory=True)
    assert trt.made.networks == []
    # Without the mode it is said, and tried.
    jetson.build(tiny_bundle)
    assert jetson.told("it may run out of memory: try --low-memory")


def large(path: Path) -> Manifest:
    """A manifest of 624 MiB of weights: an FP16 ViT-L's."""
    manifest = read_bundle(path).manifest
    entry = dataclasses.replace(manifest.files["model.onnx.data"], bytes=624 * 2**20)
    return dataclasses.replace(manifest, files={**manifest.files, "model.onnx.data": entry})


def test_swap_on_a_disk_counts_for_the_hosts_part_alone(tiny_bundle: Path) -> None:
    needed = estimate(large(tiny_bundle), workspace_mib=256, low_memory=True, gpu=True)
    assert (needed.on_host, needed.on_gpu) == (1997, 624)
    short = needed.total - 1997

    def outlook(available: int, swap: int, zram: int = 0) -> build_memory.Outlook:
        memory = sensors.Memory(
            7600, available, swap + zram, swap + zram, zram, None, None, disk_swap_free=swap
        )
        return compare(needed, memory, precision="fp16")

    assert outlook(needed.total, 0).cure is None
    assert outlook(short, 1997).cure is None
    assert outlook(short + 997, 1000).cure is None
    assert "1000 MiB of swap, which serve the host's copies of the weights (1997) alone" in (
        outlook(short + 997, 1000).line
    )
    assert "swap" not in outlook(short, 0).line
    assert "add swap on a disk" in str(outlook(short, 1996).cure)
    assert "add swap on a disk" in str(outlook(short, 0, zram=8000).cure)
    # What the GPU holds can't be swapped, however much there is.
    assert "add swap" not in str(outlook(short - 1, 8000).cure)
    assert "stop the desktop" in str(outlook(short - 1, 8000).cure)


def test_low_memory_counts_swap(tiny_bundle: Path, jetson: Jetson) -> None:
    jetson.install("10.3", tiny_bundle)
    whole = large(tiny_bundle)
    jetson.monkeypatch.setattr(
        engine.build_memory,
        "estimate",
        lambda manifest, **options: estimate(whole, **options),
    )
    jetson.available, jetson.swap = 2000, 0
    with refused(BackendError, got="MiB", cure="swap"):
        jetson.build(tiny_bundle, low_memory=True)
    jetson.swap = 4000
    jetson.build(tiny_bundle, low_memory=True)


def test_memory_is_said_and_the_bundle_read_before_the_gpu_is_asked_for(
    tiny_bundle: Path, jetson: Jetson, monkeypatch: pytest.MonkeyPatch
) -> None:
    jetson.install("10.3", tiny_bundle)

    def none() -> BuildTarget:
        raise BackendError("there is no GPU")

    monkeypatch.setattr(engine, "this_machine", none)
    jetson.available = 800
    for low_memory in (False, True):
        with refused(BackendError, got="GPU"):
            jetson.build(tiny_bundle, low_memory=low_memory)
        (line,) = jetson.said
        assert line.startswith("memory: the build needs about")
    with refused(BundleError, got="nothing"):
        jetson.build(tiny_bundle.parent / "nothere")
    assert jetson.said == []
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with refused(BundleError, got="nothing"):
        jetson.build(tiny_bundle.parent / "nothere")


def test_the_estimate_grows_with_weights_and_workspace(tiny_bundle: Path) -> None:
    manifest = large(tiny_bundle)

    def total(workspace: int | None, *, low_memory: bool, gpu: bool = True) -> int:
        needed = estimate(manifest, workspace_mib=workspace, low_memory=low_memory, gpu=gpu)
        return needed.total

    assert total(256, low_memory=True) == total(512, low_memory=True) - 256
    assert total(256, low_memory=True) < total(None, low_memory=False)
    assert 3 * 624 < total(None, low_memory=False, gpu=False) < total(256, low_memory=True) < 3700
    needed = estimate(manifest, workspace_mib=256, low_memory=True, gpu=True)
    unknown = compare(needed, None, precision="fp16")
    assert "doesn't say" in unknown.line
    assert unknown.cure is None
    little = sensors.Memory(4000, 2000, 0, 0, 0, None, None, 0)
    assert "export with --dtype fp16" in str(compare(needed, little, precision="fp32").cure)


def test_an_unproven_engine_is_where_nobody_looks(tiny_bundle: Path) -> None:
    result = ahead(tiny_bundle)
    plan = memoryview(result.path.read_bytes())
    left = tiny_bundle / "engines" / ".old.vzip-tmp"
    left.mkdir()
    (left / "part").write_bytes(b"of a killed builder")
    with engine_proof.staged(result.bundle, result.record, plan) as candidate:
        (name,) = candidate.manifest.engines
        assert read_engine(candidate, name) == bytes(plan)
        assert read_bundle(tiny_bundle) == result.bundle
        assert not left.exists()
    assert files(tiny_bundle / "engines") == [".lock", f"{NAME}.plan"]


def test_no_room_for_the_engine_that_is_to_be_proven(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = ahead(tiny_bundle)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with (
        refused(BundleError, got="No space left", cure="MiB"),
        engine_proof.staged(result.bundle, result.record, memoryview(b"")),
    ):
        pass
    assert files(tiny_bundle / "engines") == [".lock", f"{NAME}.plan"]


def test_the_proof_runs_the_staged_engine_in_both_batches(
    tiny_bundle: Path, golden: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that knows the answers, in place of the one that needs a GPU."""
    result = ahead(tiny_bundle)
    bundle = with_reference(tiny_bundle, golden)
    (tiny_bundle / "engines").mkdir()
    ran: list[int] = []
    plan = memoryview(b"a plan" * 9)
    record = dataclasses.replace(
        result.record, sha256=hashlib.sha256(plan).hexdigest(), bytes=len(plan), gpu="Orin"
    )

    class Knowing:
        def __init__(self, candidate: Bundle, *, engine: str) -> None:
            with open_engine(candidate, engine) as file:
                assert file.read() == bytes(plan)
            assert candidate.manifest.engines[engine] == record

        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            (array,) = feeds.values()
            ran.append(len(array))
            return answers(golden, feeds)

        def kernels(self) -> None:
            """None were compiled."""

        def close(self) -> None:
            ran.append(0)

    monkeypatch.setattr(tensorrt, "TensorRt", Knowing)
    assert engine_proof.prove_engine(bundle, record, plan).passed
    # Each size again: from its second run on it is a captured graph that computes.
    assert ran == [1, 1, 1, 1, 1, 3, 3] * 2 + [0]
    assert files(tiny_bundle / "engines") == []


def test_what_rtx_compiled_for_the_proof_is_kept(proven: Path, jetson: Jetson) -> None:
    jetson.install("10.3", proven)
    compiled = b"for this GPU alone"

    def prove(bundle: Bundle, record: EngineRecord, plan: memoryview, kernels: Any) -> Proof:
        kernels(compiled)
        return GOOD

    jetson.monkeypatch.setattr(engine, "prove_engine", prove)
    result = jetson.build(proven)
    record = result.record
    assert record.kernels is not None
    assert record.kernels.sha256 == hashlib.sha256(compiled).hexdigest()
    assert record.fused_attention == 2
    assert read_bundle(proven).manifest.engines[result.name] == record
    assert result.path.with_suffix(".rtxcache").read_bytes() == compiled
    assert jetson.build(proven).reused
    # What a build leaves beside an engine is the bundle's own, when it is replaced.
    assert _foreign_engines(proven / "engines") == []
    result.path.with_suffix(".log").write_text("said")
    assert _foreign_engines(proven / "engines") == []


class Terminal(io.StringIO):
    """A standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    ahead(tiny_bundle)
    assert "Building engine:" in terminal.getvalue()
    # Without tqdm, as on most Jetsons, in a line that is written over.
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    ahead(tiny_bundle, level=2)
    said = terminal.getvalue()
    assert re.search(r"\rBuilding engine\S* 1/\d+\x1b\[K", said), said
    assert said.endswith("\r\x1b[K")  # and taken away
    assert "\n" not in said
    monkeypatch.undo()
    assert not ahead(tiny_bundle, level=1).reused
    assert capsys.readouterr().err == ""  # and a file doesn't
