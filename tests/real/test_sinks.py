"""What the documents say of attention sinks holds: how many there are, and who keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sinks
from benchmarks.harness.views import TEACHER, Tower, View
from benchmarks.readme import RESULTS
from benchmarks.real.pictures import pictures
from tests.real.tier import PICTURES_OF_SLICE, TOWER_OF_SLICE


def test_clip_has_sinks_and_visionzip_keeps_them(tmp_path: Path) -> None:
    tower = Tower(TOWER_OF_SLICE, tmp_path)
    for path in pictures(PICTURES_OF_SLICE):
        view = View(path.name, 0)
        picture, _ = view.cuts(path)
        found = sinks.looked(tower.seen(view.key, picture), picture, 22)
        assert 3 <= found["sinks"] <= 20
        share = found["sinks among the patches that VisionZip keeps"]
        assert share * 18 >= 0.7 * min(18, found["sinks"])
        assert found["share of the sinks"] > 3 * found["sinks"] / 196


@pytest.mark.parametrize(("tower", "tokens"), sinks.COUNTED.items())
def test_the_census_is_the_published_one(tower: str, tokens: int, tmp_path: Path) -> None:
    published = json.loads((RESULTS / "sinks.json").read_text(encoding="utf-8"))["census"][tower]
    found = sinks.census(tower, tokens, tmp_path)
    assert list(found) == list(published)
    for what, values in published.items():
        # A patch at three times the median may fall on either side on another machine.
        assert found[what] == pytest.approx(values, rel=0.05, abs=1 if what == "sinks" else 0.01)
    assert (max(found["sinks"]) == 0) == (tower == TEACHER)
