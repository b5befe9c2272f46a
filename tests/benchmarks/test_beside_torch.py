"""`benchmarks.beside_torch`: a turn that others disturb is taken again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import beside_torch


@pytest.mark.parametrize(
    ("taken", "turns", "least"),
    [([0.1], 1, 0.1), ([1.5, 0.0], 2, 0.0), ([1.5, 0.9, 1.1], 3, 0.9)],
    ids=["idle", "idle then", "never idle"],
)
def test_of_turns_that_others_disturb_the_least_disturbed_counts(
    monkeypatch: pytest.MonkeyPatch, taken: list[float], turns: int, least: float
) -> None:
    found, calls = iter(taken), iter(range(9))
    moment = SimpleNamespace(others_since=lambda _before: next(found))
    monkeypatch.setattr(beside_torch, "Moment", SimpleNamespace(now=lambda _pid: moment))
    monkeypatch.setattr(beside_torch, "cores", lambda: 2)
    monkeypatch.setattr(beside_torch, "wait_until_idle", lambda *_, **__: None)
    turn = beside_torch._undisturbed(lambda: {"encoder": [float(next(calls))]})
    assert turn == {"encoder": [float(taken.index(least))], "others_cores": [least]}
    assert next(calls) == turns
