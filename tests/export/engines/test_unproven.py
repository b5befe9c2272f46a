"""A bundle whose graph failed its parity check: an engine of it is built only if one says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from vzip.export import engines
from vzip.export.engines import build
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.bundle.writer import update_manifest
from vzip.runtime.cli.main import main
from vzip.runtime.errors import ParityError


@pytest.mark.parametrize("option", [{"cpu": True}, {}, {"rtx": "sm89"}, {"precision": "auto"}])
def test_a_bundle_that_failed_its_check_is_built_only_if_one_says_so(
    tiny_bundle: Path, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_bundle
    numbers = {"min_cosine": 0.25, "max_error": 0.5, "passed": False}
    update_manifest(read_bundle(path), parity=numbers)
    cure = "unproven (--unproven)"
    with refused(ParityError, got=(str(path), "min cosine 0.25", "max error 0.5"), cure=cure):
        build(path, **option)
    asked = []
    for place in ("_build_cpu", "_build_for_gpu"):
        monkeypatch.setattr(engines, place, lambda *args, **_: asked.append(args[0]))
    said: list[str] = []
    build(path, **option, unproven=True, say=said.append)
    assert asked == [path]
    assert "min cosine 0.25" in said[0]
    # Passed, or never checked: built as ever.
    for parity in ({**numbers, "passed": True}, None):
        update_manifest(read_bundle(path), parity=parity)
        build(path, **option, say=said.append)
    assert len(asked) == 3
    assert len(said) == 1


def test_build_says_on_the_command_line_that_parity_failed(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_bundle
    update_manifest(read_bundle(path), parity={"min_cosine": 0.25, "passed": False})
    for options in ([], ["--cpu"], ["--rtx", "sm89"]):
        assert main(["build", str(path), *options]) == 2
        assert "--unproven" in capsys.readouterr().err
