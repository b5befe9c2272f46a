"""Whatever comes in at a door, it is taken, or refused in one line; never anything else.

python -m tests.fuzz.test_doors DOOR [SEED [COUNT]]    tries a door and prints what went wrong
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz.bounds import SECONDS, judge
from tests.fuzz.doors import DOORS, Door
from tests.fuzz.heavy import HEAVY

SEED = 20261128
QUICK, MANY = 200, 2000
PATIENCE = {"a_chat_template": 70.0, "a_text_side": 70.0}
"""Seconds of an input where vzip itself waits for a child: templates are programs."""


@pytest.fixture
def advice_that_can_be_followed() -> None:
    """Not here: texts that are tried look like options, and errors quote them."""


def tried(door: Door, folder: Path, seed: int, count: int) -> Counter[str]:
    """Return what went wrong, and how often, when a door was given so many inputs."""
    found = Counter[str]()
    rng = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw = door(folder)
        for number in range(count):
            trial = draw(random.Random(f"{seed} {number} {rng.random()}"))
            fault = judge(trial, PATIENCE.get(door.__name__, SECONDS))
            if fault is not None:
                found[fault] += 1
    return found


def _fail(found: Counter[str]) -> None:
    lines = "\n".join(f"{count} × {fault}" for fault, count in found.most_common())
    assert not found, lines.encode(errors="backslashreplace").decode()  # pytest-xdist sends UTF-8


@pytest.mark.parametrize("name", DOORS)
def test_a_door_takes_or_refuses(name: str, tmp_path: Path) -> None:
    _fail(tried(DOORS[name], tmp_path, SEED, QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_a_door_of_the_exporting_side_takes_or_refuses(name: str, tmp_path: Path) -> None:
    _fail(tried(HEAVY[name], tmp_path, SEED, QUICK))


@pytest.mark.full
@pytest.mark.parametrize("name", {**DOORS, **HEAVY})
def test_a_door_takes_or_refuses_many(name: str, tmp_path: Path) -> None:
    _fail(tried({**DOORS, **HEAVY}[name], tmp_path, SEED + 1, MANY))


def main(name: str, seed: int = SEED, count: int = QUICK) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = tried({**DOORS, **HEAVY}[name], Path(folder), seed, count)
    for fault, times in found.most_common():
        sys.stdout.write(f"{times} × {fault}\n")
    sys.stdout.write(f"{name}: {len(found)} kinds of faults in {count} inputs\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
