"""docs/jetson.md and containers/ name what exists: commands, options, folders."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import tomllib

from vzip.runtime.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
CONTAINERS = sorted((ROOT / "containers").glob("Dockerfile.*"))


def lines_of_code() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def help_of(command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([command, "-h"])
    return out.getvalue()


def test_the_first_thing_it_says_is_what_was_not_run():
    assert "Nothing on this page was run on a Jetson" in GUIDE.splitlines()[2]


@pytest.mark.parametrize(
    "line", [line for line in lines_of_code() if line.startswith("vzip ")], ids=str
)
def test_every_command_and_option_exists(line):
    _, command, *rest = line.split("#")[0].split()
    assert any(command in group for group in COMMANDS.values())
    known = help_of(command)
    for option in (word for word in rest if word.startswith("-")):
        assert re.search(rf"(^|[\s\[,]){re.escape(option)}\b", known), f"{command} has no {option}"


@pytest.mark.parametrize("option", re.findall(r"`vzip build (--[a-z-]+)`", GUIDE))
def test_every_option_in_the_text_exists(option):
    assert option in help_of("build")


def test_every_target_step_is_there():
    for word in ("vzip doctor", "vzip build", "vzip inspect", "vzip ask", "nvpmodel", "cma=",
                 "trtexec", "--system-site-packages", "numpy>=1.26,<2"):  # fmt: skip
        assert word in GUIDE


def test_an_engine_is_inspected_as_it_can_be_on_a_jetson():
    """Without `--engine` the command needs onnx, which no step of the guide installs there."""
    inspects = [line for line in lines_of_code() if line.startswith("vzip inspect")]
    assert inspects
    assert all("--engine" in line for line in inspects)


def test_trtexec_computes_as_vzip_does():
    (command,) = re.findall(r"^/usr/src/tensorrt/bin/trtexec (?:.*\\\n)*.*", GUIDE, re.MULTILINE)
    for flag in ("--noTF32", "--stronglyTyped", "--noDataTransfers"):
        assert flag in command


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_containers_copy_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    assert "Not built here" in text
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), f"{path.name} copies {source}"
    # What isn't there is found out when the image is built, not on the first call.
    assert re.search(r"python3 -c 'import tensorrt", text)
    if "ngc" in text or "nvcr.io/nvidia/pytorch" in text or "nvcr.io/nvidia/tensorrt" in text:
        assert "PIP_CONSTRAINT= python3 -m pip install" in text
    if "jetson" in path.name:
        assert "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro" in text
    # What the package is built from, no more and no less.
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ]
    assert set(folders.values()) == set(re.findall(r"^COPY (\w+) ", text, re.MULTILINE))
