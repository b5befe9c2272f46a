"""What tests of real towers share: which towers and photographs, and what their fixtures give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.real.pictures import HELD_APART
from benchmarks.real.towers import TOWERS
from tests.real.untouched import Seen
from vzip.runtime.bundle.reader import Bundle

HERE: Final = Path(__file__).parent
TOWER_OF_SLICE: Final = "clip-b16-224"
PICTURES_OF_SLICE: Final = HELD_APART[:4]
ALL_TOWERS: Final = tuple(TOWERS)

Exported = Callable[..., Bundle]
"""`exported(TOWER, **options)`, with the options of `vzip.export.export`."""

Saw = Callable[[str, int], list[Seen]]
"""`saw(TOWER, N)`: what the untouched tower says of the first N photographs."""
