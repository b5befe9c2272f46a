"""Where the tests find what they share: the repository, its documents, the golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parent
ROOT: Final = TESTS.parent
DOCS: Final = ROOT / "docs"
GOLDEN: Final = TESTS / "golden"
