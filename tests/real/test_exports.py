"""Real towers become graphs that are the untouched model's on photographs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.tier import PICTURES_OF_SLICE, TOWER_OF_SLICE, Exported
from vzip.runtime import VisionEncoder


@pytest.mark.real_slice
def test_a_tower_is_exported_and_encodes_photographs(
    exported: Exported, photographs: list[Path]
) -> None:
    bundle = exported(TOWER_OF_SLICE)
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity["passed"] is True
    with VisionEncoder.open(bundle) as encoder:
        tokens = encoder.encode(photographs[: len(PICTURES_OF_SLICE)])
    assert tokens.embeds.shape == (4, 64, 1024)
