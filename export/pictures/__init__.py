"""Pictures that every exported graph is checked on: two photographs and the demo model's scenes.

Attribution stands in NOTICE.md beside the files.
"""

from __future__ import annotations

from pathlib import Path

from vzip.runtime import demo


def reference_images() -> tuple[Path, ...]:
    """Return the paths of the pictures, in a fixed order."""
    photographs = sorted(Path(__file__).parent.glob("*.jpg"))
    scenes = sorted(demo.pictures().glob("*.jpg"))[:2]
    return (*photographs, *scenes)
