"""The short form finds what became worse, bears noise, and is committed whole."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import short, small_costs
from vzip.runtime.bundle.reader import read_bundle


def test_a_ratio_is_worse_beyond_the_slack_alone() -> None:
    committed = {"a / b": 0.5, "c / d": 2.0}
    assert short.worse(committed, {"a / b": 1.0, "c / d": 4.0}) == []
    assert short.worse(committed, {"a / b": 0.1, "c / d": 0.1}) == []
    (line,) = short.worse(committed, {"a / b": 1.001, "c / d": 4.0})
    assert line.startswith(
        "a / b: 1.001, expected at most 1.000, which is 2.0 times the committed 0.500; a change "
    )


def measure(ratios: list[float]) -> tuple[short.Measure, list[float]]:
    """Return a measure that gives these ratios, one a time, and those it has still to give."""
    left = list(ratios)
    return short.Measure(("a / b",), lambda _: {"a / b": left.pop(0)}), left


@pytest.mark.parametrize(
    ("ratios", "left", "least", "is_worse"),
    [
        ([1.9, 9.0], [9.0], 1.9, False),
        ([3.0, 2.1, 1.9, 9.0], [9.0], 1.9, False),  # a neighbour that went away
        ([3.0, 2.1, 2.2, 1.0], [1.0], 2.1, True),  # what stays is a change
    ],
)
def test_what_is_worse_is_measured_again(
    ratios: list[float], left: list[float], least: float, is_worse: bool, tiny_bundle: Path
) -> None:
    taken, still = measure(ratios)
    found, lines = short.judge(taken, {"a / b": 1.0}, read_bundle(tiny_bundle))
    assert still == left
    assert found == {"a / b": least}
    assert bool(lines) is is_worse


@pytest.fixture
def one_measure(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command with one measure, which gives 2.0; returns where its result is kept."""
    monkeypatch.setattr(short, "MEASURES", [measure([2.0] * 3)[0]])
    monkeypatch.setattr(short, "RESULT", tmp_path / "short.json")
    monkeypatch.setattr(small_costs, "exported", lambda *_: contextlib.nullcontext(tiny_bundle))
    monkeypatch.setattr(short.os, "sched_setaffinity", lambda *_: None)  # of the tests' process
    return tmp_path / "short.json"


@pytest.mark.parametrize(("committed", "status"), [(1.5, 0), (0.9, 1)])
def test_the_command_says_what_is_worse(
    committed: float, status: int, one_measure: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_measure.write_text(json.dumps({"ratios": {"a / b": committed}}))
    assert short.main([]) == status
    printed = capsys.readouterr()
    assert printed.out == f"a / b: 2.000 (committed {committed:.3f})\n"
    assert printed.err.startswith("worse: a / b: 2.000, expected") if status else not printed.err


def test_the_command_writes_what_it_is_compared_with(one_measure: Path) -> None:
    assert short.main(["--write"]) == 0
    written: dict[str, Any] = json.loads(one_measure.read_text())
    assert written["ratios"] == {"a / b": 2.0}
    assert written["environment"]["processor"]


def test_every_ratio_is_committed_and_no_other() -> None:
    committed = json.loads(short.RESULT.read_text())["ratios"]
    assert list(committed) == [name for each in short.MEASURES for name in each.names]
    assert all(ratio > 0 for ratio in committed.values())
