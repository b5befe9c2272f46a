"""What a long command needs is looked for before its work: the package is named, and its extra."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from vzip.calibration import calibrate, tune
from vzip.export import EXPORT_PACKAGES, check, export, pipeline
from vzip.export.pipeline import WeightSource
from vzip.runtime.cli.main import main
from vzip.runtime.errors import MissingDependencyError, require

Call = Callable[[Path, Path], object]

CALLS: dict[str, Call] = {
    "export": lambda _, out: export("demo", out / "bundle"),
    "export --with-llm": lambda _, out: export("demo", out / "bundle", with_llm=True),
    "check": lambda bundle, _: check(bundle),
    "tune": lambda _, out: tune("demo", "demo", out / "p.safetensors", tokens=43),
    "calibrate": lambda bundle, _: calibrate(bundle, "demo", precision="int8", count=4),
}
NEEDED = [
    *(("export", package) for package in EXPORT_PACKAGES),
    ("export --with-llm", "jinja2"),
    ("check", "onnx_ir"),
    ("tune", "jinja2"),
    ("tune", "sklearn.datasets"),
    ("calibrate", "onnx_ir"),
    ("calibrate", "ml_dtypes"),
    ("calibrate", "sklearn.datasets"),
]


@pytest.mark.parametrize(("command", "package"), NEEDED)
def test_a_missing_package_is_named_before_any_work(
    command: str, package: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(WeightSource, "load", never)
    monkeypatch.setattr(pipeline, "export_bundle", never)
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with refused(MissingDependencyError, got=name, cure="pip install 'vzip["):
        CALLS[command](tiny_bundle, tmp_path)


@pytest.mark.parametrize("package", ["gguf", "jinja2"])
def test_convert_looks_first(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / "x.gguf"
    assert main(["convert", "--model", "demo", "--to", "gguf", "-o", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{package}'" in line


def test_a_package_that_cant_even_be_asked_for_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "broken":
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with refused(MissingDependencyError, got="'broken'", cure="vzip[export]"):
        require("broken", needed_for="a test", extra="export")
