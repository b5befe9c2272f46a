"""What holds for every command: a mistake is one line, and standard output has results alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path

import pytest

import vzip.calibration
import vzip.export
from tests.places import GOLDEN
from vzip.runtime.cli.main import COMMANDS, ENTRY_POINTS, main

NAMES = [name for group in COMMANDS.values() for name in group]

# {x} is the model, bundle or list that the command is to read. No other option is wrong.
READS = {
    "export": "--model {x} -o out",
    "build": "{x}",
    "calibrate": "{x} --images . --precision int8",
    "tune": "--model {x} --data demo --tokens 22 -o out.safetensors",
    "convert": "--model {x} --to gguf -o out.gguf",
    "ask": "{x} image.png what?",
    "chat": "{x} image.png",
    "show": "{x} image.png -o out.png",
    "encode": "{x} image.png -o out.safetensors",
    "serve": "{x}",
    "triton": "{x} -o out",
    "plan": "--model {x} --target l4",
    "sweep": "--model {x} --tokens 6 -o out",
    "check": "{x}",
    "inspect": "{x}",
    "report": "{x} -o out.html",
    "bench": "{x}",
    "debug": "{x} -o out",
    "firstcontact": "--bundle {x} -o out.zip",
}
# -o of each that has one, without a folder that it could go to, or with a file in the way.
WRITES = {
    "export": ("--model demo --tokens 43 --no-check -o", "nowhere/out"),
    "tune": ("--model demo --data demo --tokens 22 -o", "nowhere/out.safetensors"),
    "convert": ("--model demo --to gguf -o", "nowhere/out.gguf"),
    "triton": ("bundle -o", "image.png"),
    "show": ("bundle image.png -o", "nowhere/out.png"),
    "encode": ("bundle image.png -o", "nowhere/out.npy"),
    "sweep": ("--model demo --tokens 6 -o", "image.png"),
    "report": ("bundle -o", "nowhere/out.html"),
    "bench": ("bundle -o", "image.png"),
    "debug": ("bundle -o", "image.png"),
    "firstcontact": ("-o", "nowhere/out.zip"),
}
TABLES = ("models", "targets", "plan", "doctor", "inspect", "check", "bench", "sweep", "calibrate",
          "debug", "firstcontact")  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a picture, and a bundle that is whole."""
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save("image.png")
    Path("bundle").symlink_to(GOLDEN / "tiny_bundle")
    return tmp_path


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must say in one line what is wrong, leave nothing, and print nothing."""
    before = sorted(Path().rglob("*"))
    assert main(argv) == 2, argv
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "", argv
    assert lines, argv
    assert lines[-1].startswith("vzip: error: "), argv
    assert not [line for line in lines[:-1] if not line.endswith("…") and "budget" not in line]
    assert sorted(Path().rglob("*")) == before, argv
    return lines[-1]


def test_the_cases_are_those_of_the_commands() -> None:
    assert {*READS, "models", "targets", "doctor"} == set(NAMES)
    has_output = {name for name in NAMES if "-o" in READS.get(name, "")} | {"bench"}
    assert set(WRITES) == has_output


@pytest.mark.parametrize("name", READS)
def test_what_is_not_there_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused([name, *READS[name].format(x="./nowhere").split()], capsys)


@pytest.mark.parametrize("name", READS)
def test_what_is_broken_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path("broken")
    broken.mkdir()
    for file in ("manifest.json", "config.json"):
        (broken / file).write_text("{")
    assert "broken" in refused([name, *READS[name].format(x="./broken").split()], capsys)
    assert "image.png" in refused([name, *READS[name].format(x="./image.png").split()], capsys)


@pytest.mark.parametrize("name", WRITES)
def test_an_output_that_can_t_be_is_one_line_before_any_work(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, output = WRITES[name]
    assert output in refused([name, *options.split(), output], capsys)


def test_a_mistyped_option_is_answered_with_the_close_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in NAMES:
        line = refused([name, "--verbos"], capsys)
        assert "--verbos;" in line
        assert "'--verbose'" in line, name
        assert "--nothing-like-it" in refused([name, "--nothing-like-it"], capsys)
        assert f"'vzip {name} -h'" in refused([name, "--nothing-like-it"], capsys)


def test_what_is_no_misspelling_is_not_answered_with_another_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv, cure in (
        (["build", "x", "--target", "t4"], "'vzip build -h'"),
        (["check", "x", "--precision", "int8"], "'vzip check -h'"),
        (["export", "-model", "demo"], "'--model'"),
        (["export", "--out", "x"], "'--output'"),
    ):
        assert cure in refused(argv, capsys)


def test_an_old_name_of_an_option_is_answered_with_the_new_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed = {each.name: each.value for each in metadata.entry_points(group=ENTRY_POINTS)}
    found = 0
    for name in NAMES:
        module = import_module(installed[name].split(":")[0])
        for old, new in getattr(module, "RENAMED", {}).items():
            found += 1
            for argv in ([old, "1"], [f"{old}=1"]):
                assert new in refused([name, *argv], capsys)
            main([name, "-h"])
            told = capsys.readouterr().out
            assert new.split()[0] in told
            assert f" {old} " not in told, "an old name is in the help"
    assert found >= 18


@pytest.mark.slow
def test_with_standard_error_closed_nothing_goes_to_standard_output(tmp_path: Path) -> None:
    """In processes as a shell starts them; one for every command, and `vzip` itself."""
    mistakes = [[], ["nonsense"], *([name, "--nonsense"] for name in NAMES)]
    mistakes += [[name, *READS[name].format(x="./nowhere").split()] for name in ("ask", "plan")]
    mistakes += [["convert", "--to", "gguf"], ["ask"]]
    running = [
        subprocess.Popen(
            ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "vzip.runtime", *argv],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        for argv in mistakes
    ]
    for argv, process in zip(mistakes, running, strict=True):
        out, _ = process.communicate(timeout=120)
        assert (out, process.returncode) == (b"", 2), argv


def test_with_standard_error_closed_results_still_go_to_standard_output() -> None:
    code = (
        "import os, sys, warnings\n"
        "from vzip.runtime.console import emit, progress, run_command, say\n"
        "def command():\n"
        "    say('reading …'); warnings.warn('old'); print('lost', file=sys.stderr)\n"
        "    os.write(2, b'a C library')\n"
        "    with open('opened', 'w') as file: file.write('mine')\n"
        "    os.system('echo a program >&2')\n"
        "    list(progress([1], desc='x')); emit('result'); return 1\n"
        "sys.exit(run_command(command, prog='vzip'))"
    )
    command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert (done.stdout, done.returncode) == (b"result\n", 1)
    assert Path("opened").read_text() == "mine"


@pytest.mark.slow
def test_quiet_says_nothing_but_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    export = ["export", "--model", "demo", "--tokens", "43", "--no-check", "-o", "made"]
    assert main([*export, "-q"]) == 0
    assert capsys.readouterr() == ("made\n", "")
    assert main(["inspect", "./nowhere", "--quiet"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main([*export, "-q", "-v"]) == 2
    assert main(export) == 0  # and it holds for one command alone
    assert "tracing …" in capsys.readouterr().err


def test_verbose_says_what_is_logged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("vzip.export.hardware")

    def table() -> str:
        log.info("about the table")
        log.debug("in detail")
        return "table"

    monkeypatch.setattr("vzip.export.cli.targets.table", table)
    for options, said in (((), 0), (("-v",), 2), (("-vv",), 3), (("-v", "--verbose"), 3)):
        assert main(["targets", *options]) == 0
        out, err = capsys.readouterr()
        assert out == "table\n"
        assert len(err.splitlines()) == said
    assert not logging.getLogger("vzip").handlers


def test_a_table_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        main([name, "-h"])
        assert ("--json" in capsys.readouterr().out) == (name in TABLES), name
    plan = ["plan", "--model", "demo", "--target", "l4", "--tokens", "22", "--max-ttft-ms", "9999"]
    found = {}
    for argv in (["models"], ["targets"], ["inspect", "bundle"], plan):
        assert main([*argv, "--json"]) == 0
        found[argv[0]] = json.loads(capsys.readouterr().out)
        assert main(argv) == 0
        text = capsys.readouterr().out
        names = {"models": "llava-1.5-7b", "targets": "orin-nano", "inspect": "operators"}
        assert names.get(argv[0], "recommended") in text
    assert "llava-1.5-7b" in [row["alias"] for row in found["models"]]
    assert {"name", "opset", "largest_batch"} <= found["targets"][0].keys()
    assert {"operators", "weights", "engines"} <= found["inspect"].keys()
    assert found["plan"]["advice"]["met"] is True
    assert 22 in [row["tokens"] for row in found["plan"]["rows"]]


def test_commands_are_functions_whatever_was_imported_before() -> None:
    code = (
        "import sys, vzip.calibration, vzip.export\n"
        "assert not {'torch', 'onnx', 'numpy'} & set(sys.modules)\n"
        "import vzip.calibration.sweeping.sweep, vzip.calibration.reporting.report\n"
        "import vzip.calibration.tuning.tune, vzip.calibration.quantization.calibrate\n"
        "from vzip.calibration import calibrate, report, sweep, tune\n"
        "from vzip.export import build, check\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "found = (calibrate, report, sweep, tune, build, check)\n"
        "print(*(each.__name__ for each in found if callable(each)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "calibrate report sweep tune build check\n"
    for package in (vzip.calibration, vzip.export):
        with pytest.raises(AttributeError, match="sweeep"):
            package.sweeep  # noqa: B018
        assert {*package.__all__} <= set(dir(package))
    assert vzip.calibration.__all__ == ["calibrate", "report", "sweep", "tune"]


def test_the_runtime_is_run_as_a_module() -> None:
    command = [sys.executable, "-m", "vzip.runtime", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == f"vzip {metadata.version('vzip')}\n"
