"""The demo's bundle with its language model, exported once for all tests that only read it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from vzip.runtime.cli.main import main


@functools.cache
def demo_with_llm() -> Path:
    """Return the bundle: 43 tokens an image, FP32."""
    folder = Path(tempfile.mkdtemp(prefix="vzip-demo-llm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["--tokens", "43", "--no-check", "--with-llm"]
    assert main(["export", "--model", "demo", *options, "-o", str(folder / "bundle")]) == 0
    return folder / "bundle"
