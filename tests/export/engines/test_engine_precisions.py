"""Engines from quantised graphs: with the real TensorRT-RTX ahead of time, the rest with a fake."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export import fake_tensorrt
from tests.precisions import add_precision, golden_precisions
from tests.references import answers, with_reference
from tests.refusals import refused
from vzip.export.engines.published import BuiltEngine
from vzip.export.engines.tensorrt import auto as engine_auto
from vzip.export.engines.tensorrt import layers as engine_layers
from vzip.export.engines.tensorrt import proof as engine_proof
from vzip.export.engines.tensorrt import publish as engine
from vzip.export.engines.tensorrt.auto import ROUNDS, Race, build_best, race
from vzip.export.engines.tensorrt.memory import estimate
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest, BuildTarget
from vzip.runtime.agreement import ENGINE, Proof, Reference, prove
from vzip.runtime.backends.tensorrt import backend as tensorrt
from vzip.runtime.backends.tensorrt.engine_file import read_engine
from vzip.runtime.bundle.engine_record import EngineRecord
from vzip.runtime.bundle.precision_record import Quantised
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BackendError, InvalidInputError, ParityError

ORIN, L4 = BuildTarget("Orin", ("87",), "6.2"), BuildTarget("L4", ("89",), None)
GOOD = Proof(4, 4, 0.97, 3, 0, 0.98, 0.998, 0.03, 12, 0.99)
BAD = dataclasses.replace(GOOD, min_cosine=0.14, short=("lowest cosine of kept tokens 0.14",))


def quiet(_: str) -> None:
    """Be told what goes on and keep it to oneself."""


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# Ahead of time, for real


def test_builds_from_the_int8_graph(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = add_precision(tiny_bundle)
    build = ["build", str(tiny_bundle), "--rtx", "sm86,sm89"]
    assert main([*build, "--precision", "int8"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tiny_bundle}/engines/rtx-sm86-sm89-int8.plan\n"
    assert "open the bundle with --precision int8 (precision='int8')" in said.err
    after = read_bundle(tiny_bundle).at("int8")
    record = after.manifest.engines["rtx-sm86-sm89-int8"]
    assert (record.precision, record.quantised) == ("int8", "int8")
    assert record.model_sha256 == bundle.manifest.files["model.int8.onnx"].sha256
    assert read_engine(after, "rtx-sm86-sm89-int8")[:4] == b"vtrt"
    # The bundle's own goes beside it.
    assert main(build) == 0
    assert capsys.readouterr().out == f"{tiny_bundle}/engines/rtx-sm86-sm89.plan\n"
    engines = read_bundle(tiny_bundle).manifest.engines
    assert {name: each.precision for name, each in engines.items()} == {
        "rtx-sm86-sm89-int8": "int8",
        "rtx-sm86-sm89": "fp32",
    }
    request = BuildRequest(rtx="sm86,sm89", precision="int8")
    assert build_engine(tiny_bundle, request, say=quiet).reused
    # Another calibration: built again.
    with_other_graph(tiny_bundle)
    assert not build_engine(tiny_bundle, request, say=quiet).reused


def with_other_graph(path: Path) -> None:
    """Calibrate anew: the same graph with a producer's name is another graph."""
    from tests.precisions import a_record, fill
    from vzip.runtime.bundle.precision_writer import precision_writer

    with precision_writer(read_bundle(path), "int8") as writer:
        fill(writer.folder, "int8")
        with (writer.folder / "model.int8.onnx").open("ab") as file:
            file.write(b"\x12\x01x")  # producer_name: "x"
        writer.publish(a_record("int8"))


def test_builds_from_the_fp8_graph_where_gpus_compute_in_it(tiny_bundle: Path) -> None:
    add_precision(tiny_bundle, "fp8")
    with refused(BackendError, got=("'fp8'", "SM 86"), expected="SM 89", cure="int8"):
        build_engine(tiny_bundle, BuildRequest(rtx="sm86,sm89", precision="fp8"), say=quiet)
    result = build_engine(tiny_bundle, BuildRequest(rtx="sm89", precision="fp8"), say=quiet)
    assert (result.name, result.record.precision) == ("rtx-sm89-fp8", "fp8")


def test_a_precision_that_is_not_there(tiny_bundle: Path) -> None:
    with refused(InvalidInputError, got="'int8'", expected="fp32"):
        build_engine(tiny_bundle, BuildRequest(rtx="sm86", precision="int8"), say=quiet)


def test_the_estimate_is_of_the_graph_that_is_built(tiny_bundle: Path) -> None:
    manifest = add_precision(tiny_bundle).manifest
    weights = dataclasses.replace(manifest.files["model.onnx.data"], bytes=2**30)
    files = {**manifest.files, "model.onnx.data": weights}
    large = dataclasses.replace(manifest, files=files)
    own = estimate(large, workspace_mib=None, low_memory=False, gpu=True)
    int8 = estimate(large, workspace_mib=None, low_memory=False, gpu=True, quantised="int8")
    assert own.on_gpu > 1000 > int8.on_gpu


# The proof


def test_a_quantised_engine_has_a_gate_of_its_own(tiny_bundle: Path, golden: Any) -> None:
    manifest = add_precision(tiny_bundle).manifest
    scores = np.ones((5, 16), np.float32)
    for row, kept in zip(scores, golden["kept"], strict=True):
        row[kept[1:] - 1] = 9.0
    reference = Reference(golden["images"], golden["kept"], scores, golden["embeds"])

    def proof(embeds: np.ndarray, quantised: Quantised | None) -> Proof:
        def run(array: np.ndarray) -> Mapping[str, np.ndarray]:
            return {"image_embeds": embeds, "kept_indices": golden["kept"]}

        gate = ENGINE[quantised or manifest.precision]
        return prove(run, reference, manifest, [5], gate)

    assert proof(golden["embeds"], None).passed
    rounded = golden_precisions()["int8"]
    assert not proof(rounded, None).passed
    assert proof(rounded, "int8").passed
    # What a miscompile gives is none of rounding.
    rng = np.random.default_rng(0)
    wrong = rounded + rng.normal(size=rounded.shape) * rounded.std()
    assert not proof(wrong, "int8").passed
    assert not proof(np.full_like(rounded, np.nan), "int8").passed
    lowest = ENGINE["int8"].kept.lowest
    assert lowest is not None
    assert lowest > 0.65  # engines known to be wrong reached that


# On a GPU, with a fake TensorRT


class Board:
    """A machine with a fake TensorRT, on which engines take the time that `ms` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.monkeypatch, self.path = monkeypatch, path
        self.ms: dict[str, float] = {"fp32": 5.0, "int8": 4.0, "fp8": 3.0}
        self.proofs: dict[str, Proof] = {}
        self.said: list[str] = []
        self.ran: list[tuple[str, int]] = []
        self.on(ORIN)
        monkeypatch.setattr(engine_layers.cuda, "load", lambda: None)

        def proved(bundle: Bundle, record: EngineRecord, *_: object) -> Proof:
            assert bundle.precision == record.precision
            return self.proofs.get(record.precision, GOOD)

        monkeypatch.setattr(engine, "prove_engine", proved)
        board = self

        class Timed:
            """Stands for the backend; a turn of a call takes as long as the board says."""

            def __init__(self, bundle: Bundle, *, engine: str) -> None:
                self.precision = bundle.manifest.engines[engine].precision
                assert bundle.precision == self.precision

            def run(self, feeds: Mapping[str, np.ndarray]) -> None:
                (images,) = feeds.values()
                board.ran.append((self.precision, len(images)))

            def launch_ms(self, rows: int, calls: int) -> list[float]:
                board.ran.append((self.precision, rows))
                return [board.ms[self.precision]] * calls

            def close(self) -> None:
                board.ran.append((self.precision, 0))

        @contextlib.contextmanager
        def opened(bundle: Bundle, record: EngineRecord, plan: memoryview) -> Iterator[Timed]:
            with engine_proof.staged(bundle, record, plan) as candidate:
                (name,) = candidate.manifest.engines
                yield Timed(candidate, engine=name)

        monkeypatch.setattr(engine_auto, "open_staged", opened)
        monkeypatch.setattr(engine_auto, "TensorRt", Timed)

    def on(self, machine: BuildTarget) -> None:
        self.monkeypatch.setattr(engine, "this_machine", lambda: machine)
        self.monkeypatch.setattr(engine_auto, "this_machine", lambda: machine)

    def install(self, version: Any, **options: Any) -> Any:
        return fake_tensorrt.install_for(self.path, self.monkeypatch, version, **options)

    def build(self, **request: Any) -> BuiltEngine:
        return build_engine(self.path, BuildRequest(**request), say=self.said.append)

    def best(self, **request: Any) -> tuple[BuiltEngine, list[BuiltEngine]]:
        self.said.clear()
        self.ran.clear()
        return build_best(self.path, BuildRequest(**request), say=self.said.append)

    def told(self, part: str) -> bool:
        return any(part in line for line in self.said)

    @property
    def engines(self) -> dict[str, str]:
        """Name → precision of what the bundle has."""
        engines = read_bundle(self.path).manifest.engines
        return {name: each.precision for name, each in engines.items()}


@pytest.fixture
def board(tiny_bundle: Path, golden: Any, monkeypatch: pytest.MonkeyPatch) -> Board:
    with_reference(tiny_bundle, golden)
    return Board(monkeypatch, tiny_bundle)


@pytest.mark.parametrize("version", ["8.6", "10.3", "10.13", "11.4"])
def test_every_version_builds_from_the_int8_graph(board: Board, version: Any) -> None:
    add_precision(board.path)
    parsed = []

    def parse(_: Any, model: bytes, path: str) -> list[str]:
        parsed.append((model, Path(path)))
        return []

    trt = board.install(version, parse=parse)
    result = board.build(precision="int8")
    assert (result.name, result.record.precision) == ("trt-sm87-int8", "int8")
    assert result.record.proof == GOOD.to_json()
    assert result.record.settings["typing"] == ("weak" if version == "8.6" else "strong")
    (config,) = trt.made.configs
    # Weakly typed networks take Q and DQ with this flag alone; it is gone where they are typed.
    assert ("INT8" in {flag.name for flag in config.flags}) == (version == "8.6")
    ((model, path),) = parsed
    assert model == (board.path / "model.int8.onnx").read_bytes()
    assert (path.parent / "model.int8.onnx.data").exists()
    board.said.clear()
    board.build()
    assert "INT8" not in {flag.name for flag in trt.made.configs[-1].flags}


def test_8_6_gets_no_fp16_scales(board: Board) -> None:
    """Its parser reads every scale as FP32, past the end of an FP16 one: nothing is parsed."""
    add_precision(board.path)
    real = engine.read_bundle

    def half(path: Any) -> Bundle:
        bundle = real(path)
        return dataclasses.replace(
            bundle, manifest=dataclasses.replace(bundle.manifest, precision="fp16")
        )

    board.monkeypatch.setattr(engine, "read_bundle", half)
    parsed: list[bytes] = []
    board.install("8.6", parse=lambda _, model, path: parsed.append(model) or [])
    with refused(BackendError, got=("INT8", "FP16", "8.6.2"), cure="--dtype fp32"):
        board.build(precision="int8")
    assert not parsed


@pytest.mark.parametrize(
    ("dtype", "line"), [("Int8", "INT8: 1 layer"), ("Half", "warning: no layer gives INT8")]
)
def test_whether_tensorrt_computes_in_int8_is_said(board: Board, dtype: str, line: str) -> None:
    add_precision(board.path)
    trt = board.install("10.3")
    outputs = [{"Name": "x", "Format/Datatype": f"Row major linear {dtype} format"}]
    said = json.dumps({"Layers": [{"Name": "gemm", "LayerType": "gemm", "Outputs": outputs}]})
    board.monkeypatch.setattr(trt.EngineInspector, "get_engine_information", lambda *_: said)
    board.build(precision="int8")
    assert any(each.startswith(line) for each in board.said)


def test_fp8_needs_a_tensorrt_that_knows_it(board: Board) -> None:
    add_precision(board.path, "fp8")
    board.on(L4)
    board.install("8.6")
    with refused(BackendError, got=("'fp8'", "TensorRT 8.6.2"), expected="SM 89"):
        board.build(precision="fp8")
    board.install("10.13")
    assert board.build(precision="fp8").name == "trt-sm89-fp8"
    board.on(ORIN)
    with refused(BackendError, got=("'fp8'", "SM 87")):
        board.build(precision="fp8")


def test_an_int8_engine_that_fails_says_what_helps(board: Board) -> None:
    add_precision(board.path)
    board.install("10.3")
    board.proofs["int8"] = BAD
    with refused(ParityError, cure="--precision"):
        board.build(precision="int8")
    assert board.engines == {}


def test_the_proof_runs_the_engine_at_its_precision(
    board: Board, golden: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_precision(board.path)
    request = BuildRequest(rtx="sm89", precision="int8")
    result = build_engine(board.path, request, say=quiet)
    plan = memoryview(result.path.read_bytes())

    class Rounding:
        """Gives what the INT8 graph gives."""

        def __init__(self, candidate: Bundle, *, engine: str) -> None:
            assert candidate.quantised == "int8"
            assert read_engine(candidate, engine) == bytes(plan)

        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return answers(golden, feeds, golden_precisions()["int8"])

        def kernels(self) -> None:
            """None were compiled."""

        def close(self) -> None:
            pass

    monkeypatch.setattr(tensorrt, "TensorRt", Rounding)
    assert engine_proof.prove_engine(result.bundle, result.record, plan).passed
    own = dataclasses.replace(result.record, precision="fp32")
    monkeypatch.setattr(Rounding, "__init__", lambda *_, **__: None)
    assert not engine_proof.prove_engine(result.bundle, own, plan).passed


# Worth it or not


def test_auto_keeps_int8_where_it_is_faster(board: Board) -> None:
    add_precision(board.path)
    board.install("10.3")
    best, built = board.best()
    assert best.name == "trt-sm87-int8"
    assert board.engines == {"trt-sm87": "fp32", "trt-sm87-int8": "int8"}
    assert [each.name for each in built] == ["trt-sm87", "trt-sm87-int8"]
    assert best.record.proof == {**GOOD.to_json(), "ms": 4.0, "own_ms": 5.0}
    assert board.told("int8: 4.000 ms (4.000 to 4.000) against 5.000 ms (5.000 to 5.000) of the")
    # In the batch that it is tuned for, in turns, and with nothing left open or lying about.
    assert {rows for _, rows in board.ran} == {0, 3}
    turns = [precision for precision, rows in board.ran if rows][-2 * ROUNDS :]
    pairs = [set(turns[place : place + 2]) for place in range(0, len(turns), 2)]
    assert pairs == [{"fp32", "int8"}] * ROUNDS
    firsts = turns[::2]
    assert set(firsts) == {"fp32", "int8"}
    assert board.ran.count(("fp32", 0)) == 1
    assert files(board.path / "engines") == [
        ".lock",
        "timing.cache",
        "trt-sm87-int8.plan",
        "trt-sm87.plan",
    ]
    # Once more: both are reused, and raced again.
    best, built = board.best()
    assert best.name == "trt-sm87-int8"
    assert [each.reused for each in built] == [True, True]


@pytest.mark.parametrize("ms", [5.0, 6.0])
def test_auto_does_not_keep_int8_where_it_is_not_faster(board: Board, ms: float) -> None:
    add_precision(board.path)
    board.install("10.3")
    board.ms["int8"] = ms
    best, built = board.best()
    assert (best.name, len(built)) == ("trt-sm87", 1)
    assert board.engines == {"trt-sm87": "fp32"}
    assert board.told("int8 is not kept: it is not faster here")
    assert files(board.path / "engines") == [".lock", "timing.cache", "trt-sm87.plan"]


def test_auto_does_not_keep_int8_that_does_not_agree(board: Board) -> None:
    add_precision(board.path)
    board.install("10.3")
    board.proofs["int8"] = BAD
    best, _ = board.best()
    assert best.name == "trt-sm87"
    assert board.engines == {"trt-sm87": "fp32"}
    assert board.told("int8 is not kept: the engine's tokens differ from PyTorch's")
    assert not any(precision == "int8" for precision, _ in board.ran)


def test_auto_passes_over_what_the_builder_refuses(board: Board) -> None:
    add_precision(board.path)

    def parse(_: Any, model: bytes, path: str) -> list[str]:
        return ["no importer for DequantizeLinear"] if b"DequantizeLinear" in model else []

    board.install("10.3", parse=parse)
    assert board.best()[0].name == "trt-sm87"
    assert board.told("int8 is not kept: the parser of TensorRT")


def test_auto_takes_the_fastest_of_all(board: Board) -> None:
    add_precision(board.path)
    add_precision(board.path, "fp8")
    board.install("10.13")
    assert board.best()[0].name == "trt-sm87-int8"
    assert board.told("fp8 is passed over: this GPU doesn't compute in it, SM 89 and newer do")
    board.on(L4)
    best, built = board.best(name="mine")
    assert best.name == "mine-fp8"
    assert [each.name for each in built] == ["mine", "mine-int8", "mine-fp8"]
    board.ms["fp8"] = 4.5  # it was kept before, and beats the bundle's own, but INT8 more so
    assert board.best(name="mine")[0].name == "mine-int8"


def test_auto_leaves_an_engine_that_was_built_on_purpose(board: Board) -> None:
    add_precision(board.path)
    board.install("10.3")
    board.build(precision="int8")
    board.ms["int8"] = 9.0
    assert board.best()[0].name == "trt-sm87"
    assert board.told("not faster; it was there before and is left there")
    assert board.engines == {"trt-sm87": "fp32", "trt-sm87-int8": "int8"}


def test_auto_fails_where_the_bundles_own_engine_does(board: Board) -> None:
    add_precision(board.path)
    board.install("10.3")
    board.proofs["fp32"] = BAD
    with pytest.raises(ParityError):
        board.best()
    assert board.engines == {}


def test_what_auto_cant_be_asked_for(board: Board, tiny_static_bundle: Path) -> None:
    with refused(InvalidInputError, expected="int8", cure="vzip calibrate"):
        board.best()
    add_precision(board.path)
    with refused(InvalidInputError, got="--rtx", expected="GPU"):
        board.best(rtx="sm89")
    add_precision(tiny_static_bundle)  # has no reference
    with refused(InvalidInputError, got="reference.npz", expected="PyTorch"):
        build_best(tiny_static_bundle, BuildRequest(), say=quiet)


def test_the_command_says_how_to_open_what_it_chose(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    add_precision(board.path)
    board.install("10.3")
    assert main(["build", str(board.path), "--precision", "auto"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{board.path}/engines/trt-sm87-int8.plan\n"
    assert "the fastest that agrees is 'trt-sm87-int8'" in said.err
    assert "open the bundle with --precision int8" in said.err


# The race


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def turn(name: str, times: list[float]) -> Any:
        def take() -> float:
            order.append(name)
            return times.pop(0)

        return take

    taken = race(turn("own", [99.0, 5, 6, 7, 8]), turn("other", [99.0, 1, 2, 3, 4]), rounds=5)
    assert order == ["other", "own", "own", "other", "other", "own", "own", "other", "other", "own"]
    assert taken.own == (5.75, 6.5, 7.25)
    assert taken.other == (1.75, 2.5, 3.25)
    assert taken.to_json() == {"ms": 2.5, "own_ms": 6.5}


@pytest.mark.parametrize(
    ("own", "other", "won"),
    [
        ((5.0, 5.1, 5.2), (4.0, 4.1, 4.2), True),
        ((5.0, 5.1, 5.2), (4.9, 5.0, 5.05), False),  # within the spread
        ((5.0, 5.0, 5.0), (5.0, 5.0, 5.0), False),
        ((4.0, 4.1, 4.2), (5.0, 5.1, 5.2), False),
    ],
)
def test_winning_is_beyond_the_spread(own: Any, other: Any, won: bool) -> None:
    assert Race(own, other).won == won
