"""`vzip tune` on the demo model, from end to end: interrupted, resumed, shared."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.places import DOCS
from tests.refusals import refused
from vzip.calibration.cli import tune as tune_cli
from vzip.calibration.tuning.data import DemoData
from vzip.calibration.tuning.features import FeatureStore
from vzip.calibration.tuning.session import Session
from vzip.calibration.tuning.trainer import Tuner
from vzip.calibration.tuning.workers import Workers
from vzip.export.pipeline import WeightSource
from vzip.runtime import console
from vzip.runtime.errors import BudgetError, CheckpointError, InvalidInputError
from vzip.runtime.files import atomic
from vzip.runtime.llm.local.transformers import TransformersLLM

SCENES = 20
FEW = (
    *("--model", "demo", "--data", "demo", "--count", str(SCENES), "--tokens", "22"),
    *(
        "--per-device-train-batch-size",
        "4",
        "--num-train-epochs",
        "2",
        "--learning-rate",
        "1e-3",
        "--save-steps",
        "3",
        "--device",
        "cpu",
    ),
)
STEPS = 10


class KilledError(BaseException):
    """What no `except Exception` catches."""


@pytest.fixture(scope="module")
def llm() -> TransformersLLM:
    return TransformersLLM.open("demo", dtype="float32", device="cpu")


@pytest.fixture
def opened_once(llm: TransformersLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the LLM costs more than tuning its projector: here all runs share one."""
    monkeypatch.setattr(TransformersLLM, "open", lambda *_, **__: llm)


def tune(output: Path, *options: str) -> bytes:
    """Run the command in this process and return the projector's bytes."""
    assert tune_cli.main([*FEW, *options, "-o", str(output)], prog="vzip tune") == 0
    return output.read_bytes()


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of features that runs may share."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def whole(features: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run gives that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "projector.safetensors"
    return tune(output, "--features", str(features))


def report_of(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(output.with_name(output.name + ".json").read_text())
    return report


def killing(function: Callable[..., Any], number: int, *, after: bool) -> Callable[..., Any]:
    """Return a function that dies in its `number`-th call, before or after its work."""
    calls = 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise KilledError
        result = function(*arguments, **named)
        if calls == number:
            raise KilledError
        return result

    return dying


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "number", "after"),
    [
        (FeatureStore, "put", 7, False),
        (Tuner, "step", 1, True),  # before anything is saved
        (Session, "save", 1, False),
        (Session, "save", 1, True),
        (Tuner, "step", 8, False),  # two steps behind what is saved
        (Session, "save", 3, True),
        (Session, "finish", 1, False),
        (Session, "_write", 5, False),  # all is trained, and nothing of it is there
        (Session, "_write", 5, True),  # the projector is there, the report is not
        (Session, "_write", 6, True),  # both are there, the run is not over
    ],
)
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(
    whole: bytes,
    opened_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    owner: type,
    name: str,
    number: int,
    after: bool,
) -> None:
    output = tmp_path / "projector.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killing(getattr(owner, name), number, after=after))
        with pytest.raises(KilledError):
            tune(output)
    assert (output.with_name(output.name + ".work") / "run.json").exists()
    assert tune(output, "--resume") == whole
    assert len(report_of(output)["losses"]) == STEPS
    with refused(InvalidInputError, got=f"{output}.work", cure="--resume"):
        tune(output, "--resume")


@pytest.mark.slow
def test_resuming_does_not_repeat_steps(
    *,
    opened_once: None,
    features: Path,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "projector.safetensors"
    taken: list[int] = []
    step = Tuner.step

    def counted(self: Tuner, number: int, *rest: Any) -> float:
        taken.append(number)
        if taken.count(number) == 1 and number == 7:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    monkeypatch.setattr(Tuner, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(output, "--features", str(features))
    assert tune(output, "--features", str(features), "--resume") == whole
    assert taken == [*range(8), *range(6, STEPS)]
    assert "resumed after step 6 of 10" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_last_bit(
    whole: bytes, features: Path, tmp_path: Path, opened_once: None
) -> None:
    output = tmp_path / "projector.safetensors"
    threads = str(torch.get_num_threads())
    code = (
        "import os, signal, sys\n"
        "import torch\n"
        f"torch.set_num_threads({threads})\n"
        "from vzip.calibration.cli import tune as tune_cli\n"
        "from vzip.calibration.tuning.trainer import Tuner\n"
        "step = Tuner.step\n"
        "def dying(self, number, *rest):\n"
        "    if number == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, number, *rest)\n"
        "Tuner.step = dying\n"
        "tune_cli.main(sys.argv[1:], prog='vzip tune')\n"
    )
    shared = ("--features", str(features))
    command = [sys.executable, "-c", code, *FEW, *shared, "-o", str(output)]
    ended = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not output.exists()
    with refused(InvalidInputError, got=f"{output}.work", cure="--resume"):
        tune(output, *shared)
    assert tune(output, *shared, "--resume") == whole


@pytest.mark.slow
def test_another_seed_is_another_projector(whole: bytes, opened_once: None, tmp_path: Path) -> None:
    assert tune(tmp_path / "projector.safetensors", "--seed", "1") != whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "got"),
    [
        (("--learning-rate", "2e-3"), "recipe"),
        (("--tokens", "21"), "features"),
        (("--count", "19"), "records"),
    ],
)
def test_another_run_is_not_resumed(
    *,
    whole: bytes,
    opened_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: Path,
    changes: tuple[str, str],
    got: str,
) -> None:
    output = tmp_path / "projector.safetensors"
    shared = ("--features", str(features))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "finish", killing(Session.finish, 1, after=False))
        with pytest.raises(KilledError):
            tune(output, *shared)
    with refused(InvalidInputError, got=got):
        tune(output, *shared, "--resume", *changes)
    assert tune(output, *shared, "--resume") == whole


@pytest.mark.slow
def test_one_process_at_a_time_works_in_a_folder(
    opened_once: None, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "projector.safetensors"
    step = Tuner.step

    def nested(self: Tuner, number: int, *rest: Any) -> float:
        with refused(InvalidInputError, got=f"{output}.work"):
            tune(output, "--features", str(features), "--resume")
        return step(self, number, *rest)

    monkeypatch.setattr(Tuner, "step", nested)
    tune(output, "--features", str(features))


def test_a_projector_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "projector.safetensors"
    output.write_bytes(b"precious")
    with refused(InvalidInputError, got=str(output), cure="-o"):
        tune(output)
    assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_an_export_takes_the_projector(whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "projector.safetensors"
    output.write_bytes(whole)
    own, _ = WeightSource("demo").load()
    tuned, model = WeightSource("demo", projector=output).load()
    assert model.projector is not None
    written = load_file(output)
    for name, tensor in tuned.tensors.items():
        if name.startswith("projector."):
            stored = written[name.replace("projector.", "multi_modal_projector.")]
            assert torch.equal(tensor, stored)
            assert not torch.equal(tensor, own.tensors[name].float())
        else:
            assert torch.equal(tensor, own.tensors[name])


@pytest.mark.slow
def test_features_are_made_once(
    whole: bytes, opened_once: None, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(features.rglob("*.f16"))
    assert len(files) == SCENES

    def never(*_: object) -> None:
        raise AssertionError("the tower ran")

    with monkeypatch.context() as patch:
        patch.setattr("vzip.calibration.tuning.features.FrozenTower.encode", never)
        output = tmp_path / "projector.safetensors"
        assert tune(output, "--features", str(features)) == whole
    files[0].write_bytes(b"damaged")
    output = tmp_path / "again.safetensors"
    assert tune(output, "--features", str(features)) == whole


# LLaVA's JSON


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's scenes as LLaVA's JSON and PNG files."""
    folder = tmp_path_factory.mktemp("instructions")
    (folder / "images" / "deep").mkdir(parents=True)
    data = DemoData(SCENES, 0, 112)
    entries = []
    for record in data.records:
        name = f"deep/{record.image}.png"
        Image.fromarray(data.read(record.image)).save(folder / "images" / name)
        said = []
        for number, turn in enumerate(record.turns):
            mark = "" if number else "<image>\n"
            said += [
                {"from": "human", "value": mark + turn.question},
                {"from": "gpt", "value": turn.answer},
            ]
        entries.append({"id": record.name, "image": name, "conversations": said})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


def from_json(folder: Path, output: Path, *options: str, data: str = "data.json") -> bytes:
    options = (*options, "--data", str(folder / data), "--images", str(folder / "images"))
    few = [each for each in FEW if each not in ("--count", str(SCENES))]
    assert tune_cli.main([*few, *options, "-o", str(output)], prog="vzip tune") == 0
    return output.read_bytes()


@pytest.mark.slow
def test_the_same_pictures_and_words_give_the_same_projector(
    whole: bytes, opened_once: None, instructions: Path, tmp_path: Path
) -> None:
    assert from_json(instructions, tmp_path / "projector.safetensors") == whole


@pytest.mark.slow
def test_what_is_broken_is_named_and_counted(
    whole: bytes,
    opened_once: None,
    instructions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entries = json.loads((instructions / "data.json").read_text())
    (instructions / "images" / "cut.png").write_bytes(
        (instructions / "images" / "deep" / "0.png").read_bytes()[:200]
    )
    long = " ".join(["circle"] * 2000)
    broken = [
        {**entries[0], "id": "gone", "image": "gone.png"},
        {**entries[1], "id": "cut", "image": "cut.png"},
        {**entries[1], "id": "cut too", "image": "cut.png"},
        {**entries[2], "id": "text", "image": None},
        {
            **entries[3],
            "id": "long",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": long},
            ],
        },
        17,
    ]
    mixed = [each for pair in zip(broken, entries, strict=False) for each in pair]
    mixed += entries[len(broken) :]
    (instructions / "mixed.json").write_text(json.dumps(mixed))
    output = tmp_path / "projector.safetensors"
    # What is left is what there was without them.
    assert from_json(instructions, output, data="mixed.json") == whole
    data = report_of(output)["data"]
    assert (data["records"], data["images"]) == (SCENES, SCENES)
    reasons = {each["name"]: each["reason"] for each in data["left_out"]}
    assert len(reasons) == len(data["left_out"]) == len(broken)
    assert "gone.png can't be read" in reasons["record 0 (id gone)"]
    assert "can't be decoded" in reasons["record 2 (id cut)"]
    assert "can't be decoded" in reasons["record 4 (id cut too)"]
    assert "has no image" in reasons["record 6 (id text)"]
    assert "expected at most the LLM's context of 1024" in reasons["record 8 (id long)"]
    assert "is a JSON int" in reasons["record 10"]
    told = capsys.readouterr().err
    assert f"{SCENES} records about {SCENES} images ({SCENES} encoded now), 6 left out" in told
    assert all(f"left out: {name} " in told for name in reasons)


@pytest.mark.slow
def test_nothing_left_is_an_error(opened_once: None, instructions: Path, tmp_path: Path) -> None:
    entries = json.loads((instructions / "data.json").read_text())
    (instructions / "gone.json").write_text(
        json.dumps([{**entry, "image": "gone.png"} for entry in entries])
    )
    output = tmp_path / "projector.safetensors"
    with refused(InvalidInputError, got="20 records", cause="gone.png"):
        from_json(instructions, output, data="gone.json")
    from_json(instructions, output)  # nothing of it is in the way of the next try


# Several processes


@pytest.mark.slow
def test_two_processes_give_the_projector_of_one(
    features: Path, opened_once: None, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.safetensors"
    tune(
        alone,
        "--features",
        str(features),
        "--per-device-train-batch-size",
        "2",
        "--gradient-accumulation-steps",
        "2",
    )
    output = tmp_path / "projector.safetensors"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Their own folder of features: each process encodes its share.
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "vzip.runtime.cli.main"),
        *("tune", *FEW, "--per-device-train-batch-size", "2", "-o", str(output)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(output)]  # one of them speaks
    assert f"({SCENES} encoded now)" in done.stderr
    report = report_of(output)
    assert report["processes"] == 2
    assert report["losses"] == pytest.approx(report_of(alone)["losses"], abs=1e-4)
    one, two = load_file(alone), load_file(output)
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name


# The command line


def test_options_that_make_no_sense_are_said(opened_once: None, tmp_path: Path) -> None:
    output = tmp_path / "projector.safetensors"
    for kind, said, *options in (
        (InvalidInputError, {"got": "--images .", "cure": "leave it out"}, "--images", "."),
        (InvalidInputError, {"cure": "--images FOLDER"}, "--data", "x.json"),
        (BudgetError, {"got": "dominant 19"}, "--dominant", "19"),
        (BudgetError, {"got": "contextual 3"}, "--dominant", "19", "--contextual", "3"),
        (BudgetError, {"cure": "budget"}, "--tokens", "400"),
        (InvalidInputError, {"got": "--save-steps 0"}, "--save-steps", "0"),
        (InvalidInputError, {"got": "--count 0"}, "--count", "0"),
        (InvalidInputError, {"cure": "--num-train-epochs"}, "--count", "3"),
        (InvalidInputError, {"got": "learning_rate is -1.0"}, "--learning-rate", "-1"),
        (InvalidInputError, {"got": "--device abacus"}, "--device", "abacus"),
        (CheckpointError, {"got": "of-nobody"}, "--model", "llava-next-vicuna-7b-of-nobody"),
    ):
        with refused(kind, **said):
            tune(output, "--num-train-epochs", "1", *options)
        assert not output.exists(), options


def test_features_written_are_half_precision(features: Path, whole: bytes) -> None:
    file = next(features.rglob("*.f16"))
    assert file.stat().st_size == 4 + 22 * 128 * np.dtype(np.float16).itemsize


def test_the_commands_of_the_guide_are_understood() -> None:
    guide = (DOCS / "tuning.md").read_text(encoding="utf-8")
    commands = [
        line.partition(" tune ")[2]
        for block in guide.split("```")[1::2]
        for line in block.splitlines()
        if " tune " in line
    ]
    assert len(commands) == 3
    for command in commands:
        given = vars(tune_cli._parser("vzip tune").read(shlex.split(command)))
        assert given["tokens"] > 1
        assert (given["data"] == "demo") == (given["images"] is None)


@pytest.mark.parametrize("watched", [False, True])
def test_libraries_draw_bars_only_where_somebody_watches(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(console, "watched", lambda: watched)
    logging.enable_progress_bar()
    with console.loading_quietly():
        assert logging.is_progress_bar_enabled() is watched
    assert logging.is_progress_bar_enabled()


# What fails late, and what fails first


def test_an_id_that_is_half_a_character_costs_no_training(
    instructions: Path, opened_once: None, tmp_path: Path
) -> None:
    entries = json.loads((instructions / "data.json").read_text())[:4]
    lost = {"id": "\ud800", "image": "absent.png", "conversations": entries[0]["conversations"]}
    said = [{"from": "human", "value": "<image>\nwhat \udc80"}, {"from": "gpt", "value": "it"}]
    half = {"id": "\x1b[31m\udfff", "image": entries[0]["image"], "conversations": said}
    (instructions / "half.json").write_text(json.dumps([*entries, lost, half]))
    output = tmp_path / "projector.safetensors"
    assert from_json(instructions, output, "--num-train-epochs", "1", data="half.json")
    left_out = report_of(output)["data"]["left_out"]
    assert [each["name"] for each in left_out] == [
        "record 5 (id \\x1b[31m\\udfff)",
        "record 4 (id \\ud800)",
    ]
    assert "half a character" in left_out[0]["reason"]
    assert not (tmp_path / "projector.safetensors.work" / "run.json").exists()


def test_whatever_a_report_holds_it_is_written(tmp_path: Path) -> None:
    output = tmp_path / "projector.safetensors"
    with Session(output, {}, resume=False, workers=Workers()) as session:
        report = {"source": "caf\u00e9 \udcff \ud800"}
        session.check(report)
        session.finish({"weight": torch.zeros(1)}, report)
    assert report_of(output) == report
    assert "caf\u00e9" in output.with_name(output.name + ".json").read_text()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_ends_the_last_step_loses_no_training(
    opened_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Any
) -> None:
    output = tmp_path / "projector.safetensors"
    steps: list[int] = []
    step = Tuner.step

    def counted(self: Tuner, number: int, *rest: Any) -> float:
        steps.append(number)
        return step(self, number, *rest)

    def failing(path: Path, data: bytes) -> None:
        if path.parent == tmp_path:
            raise interrupt
        replace(path, data)

    monkeypatch.setattr(Tuner, "step", counted)
    replace = atomic.replace_file
    few = ("--num-train-epochs", "1")  # five steps, and a state after three
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "replace_file", failing)
        with pytest.raises((KeyboardInterrupt, InvalidInputError)):
            tune(output, *few)
    assert len(steps) == 5
    assert tune(output, *few, "--resume")
    assert len(steps) == 5
    assert len(report_of(output)["losses"]) == 5


@pytest.mark.parametrize(
    ("options", "got"),
    [
        (("--resume",), "no run"),
        (("--count", "999"), "4 usable records"),
        (("--features", "FILE"), "FILE"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--save-steps", "0"), "--save-steps 0"),
        (("--learning-rate", "-1"), "learning_rate"),
    ],
)
def test_what_can_fail_cheaply_fails_before_weights_are_read(
    instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, got: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(WeightSource, "load", never)
    (tmp_path / "FILE").write_text("")
    options = [str(tmp_path / "FILE") if each == "FILE" else each for each in options]
    entries = json.loads((instructions / "data.json").read_text())[:4]
    (instructions / "four.json").write_text(json.dumps(entries))
    with refused(InvalidInputError, got=got):
        from_json(instructions, tmp_path / "p.safetensors", *options, data="four.json")


@pytest.mark.parametrize("name", ["absent/p.safetensors", "p.bin", "x" * 240 + ".safetensors"])
def test_an_output_that_cant_be_written_fails_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(WeightSource, "config", lambda _: pytest.fail("the model was read"))
    with refused(InvalidInputError, got=str(tmp_path / name)[:100]):
        tune(tmp_path / name)
