"""What a long command writes to is tried before its work, and is in place before it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults import fill_disk
from tests.refusals import refused
from vzip.export import check, export
from vzip.export.cli import check as check_cli
from vzip.export.llm import gguf
from vzip.export.pipeline import WeightSource
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.cli import encode as encode_cli
from vzip.runtime.cli.main import main
from vzip.runtime.errors import BundleError, VzipError

Run = Callable[[Path], int]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "picture.png"
    Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def commands(tiny_bundle: Path, picture: Path) -> dict[str, Run]:
    """Each command with an output, as it is run with one."""
    encode = ["encode", str(tiny_bundle), str(picture), "--backend", "onnxruntime"]
    convert = ["convert", "--model", "demo", "--to", "gguf"]
    tune = ["tune", "--model", "demo", "--data", "demo", "--tokens", "43"]
    return {
        "encode": lambda out: main([*encode, "-o", str(out / "t.safetensors")]),
        "export": lambda out: main(["export", "--model", "demo", "-o", str(out / "b")]),
        "convert": lambda out: main([*convert, "-o", str(out / "x.gguf")]),
        "report": lambda out: main(["report", str(tiny_bundle), "-o", str(out / "r.html")]),
        "sweep": lambda out: main(["sweep", "--model", "demo", "--tokens", "43", "-o", str(out)]),
        "bench": lambda out: main(["bench", str(tiny_bundle), "-o", str(out)]),
        "tune": lambda out: main([*tune, "-o", str(out / "p.safetensors")]),
    }


COMMANDS = ("encode", "export", "convert", "report", "sweep", "bench", "tune")


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(VisionEncoder, "open", never)
    monkeypatch.setattr(WeightSource, "load", never)
    monkeypatch.setattr(gguf, "convert", never)
    monkeypatch.setattr("vzip.export.bench.measure.bench", never)
    monkeypatch.setattr("vzip.calibration.sweeping.measure.measure", never)


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cant_be_written_ends_the_command_before_its_work(
    command: str,
    commands: dict[str, Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill_disk(monkeypatch)
    assert commands[command](out) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("vzip: error")]
    assert str(out) in line
    assert "No space left" in line
    assert list(out.iterdir()) == []


def broken(*_: object, **__: object) -> None:
    raise BrokenPipeError


def test_tokens_are_in_place_before_they_are_told(
    commands: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_cli, "emit", broken)
    assert commands["encode"](tmp_path) == 141
    assert (tmp_path / "t.safetensors").exists()


def test_a_verdict_is_in_the_manifest_before_it_is_told(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(bundle: Any, *_: Any, **__: Any) -> Any:
        from vzip.runtime.bundle.writer import update_manifest

        return update_manifest(read_bundle(bundle), parity={"passed": True})

    monkeypatch.setattr("vzip.export.check", checked, raising=False)
    monkeypatch.setattr(check_cli, "emit", broken)
    assert main(["check", str(tiny_bundle)]) == 141
    assert read_bundle(tiny_bundle).manifest.parity == {"passed": True}


def test_an_export_onto_a_full_disk_is_one_error_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightSource, "load", lambda _: pytest.fail("weights were read"))
    fill_disk(monkeypatch)
    with refused(VzipError, got=str(tmp_path)):
        export("demo", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_cant_write_its_verdict_doesnt_begin(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightSource, "load", lambda _: pytest.fail("weights were read"))
    fill_disk(monkeypatch)
    with refused(BundleError, got=(str(tiny_bundle), "No space left"), cure="copy the bundle"):
        check(tiny_bundle)
