"""`vzip sweep`: what can fail cheaply fails first, and what was measured is not lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.calibration.test_sweep import a_sweep
from tests.faults import fill_disk
from tests.refusals import refused
from vzip.calibration import sweep
from vzip.calibration.sweeping import measure, output
from vzip.calibration.sweeping.sweep import FILES, Swept
from vzip.runtime.errors import InvalidInputError, MissingDependencyError, VzipError

Asked = list[dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Stand for `measure`, which takes most of the time; return what it was asked."""
    calls: Asked = []

    def quick(model: str, budgets: Any, images: Any, **options: Any) -> Any:
        calls.append({"images": [name for name, _ in images], **options})
        options["step"]("measuring")
        return a_sweep()

    monkeypatch.setattr(measure, "measure", quick)
    return calls


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        small = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("package", ["sklearn", "sklearn.datasets"])
def test_the_demo_is_swept_without_accuracy_where_scikit_learn_is_missing(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said: list[str] = []
    sweep("demo", [43], say=said.append)
    assert asked[0]["asked"] is False
    assert "scene-1.jpg" in asked[0]["images"]
    work = said.index("measuring …")
    (warning,) = [line for line in said[:work] if "no accuracy" in line]
    assert "pip install 'vzip[demo]'" in warning
    # Where the accuracy is what was asked for, that is all there is to say.
    with refused(MissingDependencyError, cure="vzip[demo]"):
        sweep("demo", [43], min_accuracy=0.5, say=said.append)
    with refused(MissingDependencyError, cure="vzip[demo]"):
        sweep("demo", [43], images="demo", say=said.append)
    assert len(asked) == 1


def test_with_it_the_demo_is_asked(asked: Asked) -> None:
    sweep("demo", [43], count=2, say=lambda _: None)
    assert asked[0]["asked"] is True


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError("a font is missing")])
def test_a_plot_that_fails_costs_no_table(
    asked: Asked, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Any
) -> None:
    def failing(*_: object) -> bytes:
        raise interrupt

    monkeypatch.setattr(output, "plot", failing)
    with pytest.raises((KeyboardInterrupt, VzipError)):
        sweep("demo", [43], images=str(pictures), output=tmp_path / "out", say=lambda _: None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES[:2])


def test_a_disk_that_fills_meanwhile_leaves_the_table_to_be_read(
    asked: Asked, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, after=1)  # the trial succeeds
    said: list[str] = []
    with refused(InvalidInputError, got=(str(tmp_path / "out"), "No space left")):
        sweep("demo", [43], images=str(pictures), output=tmp_path / "out", say=said.append)
    assert "# Budgets of" in said[-1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path, _: path.write_text("a file"),
        lambda path, patch: fill_disk(patch),
        lambda path, _: path.parent.joinpath("x").symlink_to("x"),
    ],
)
def test_an_output_that_cant_be_written_is_known_first(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any]
) -> None:
    path = tmp_path / "out"
    spoil(path, monkeypatch)
    place = path / "x" if (tmp_path / "x").is_symlink() is False else tmp_path / "x" / "y"
    with refused(InvalidInputError, got=str(tmp_path)):
        sweep("demo", [43], output=place, say=lambda _: None)
    assert asked == []


@pytest.mark.parametrize("place", [".", "results"])
def test_results_of_an_earlier_sweep_are_no_images(
    asked: Asked, pictures: Path, place: str
) -> None:
    for _ in range(2):
        found = sweep("demo", [43], images=str(pictures), output=pictures / place, say=print)
        assert isinstance(found, Swept)
        assert sorted(found.files) == sorted(pictures / place / name for name in FILES)
    for each in asked:
        assert sorted(each["images"]) == ["0.png", "1.png", "2.png"]
