"""The demo model: a tiny LLaVA trained from scratch, and pictures to ask it about.

``checkpoint/`` is an ordinary Hugging Face checkpoint made by ``benchmarks.demo_model.train``;
``pictures/`` holds held-out scenes with questions and true answers in ``questions.json``.
"""

from __future__ import annotations

import pathlib

_HERE = pathlib.Path(__file__).resolve().parent


def checkpoint() -> pathlib.Path:
    """The folder of the demo model's checkpoint."""
    return _HERE / "checkpoint"


def pictures() -> pathlib.Path:
    """The folder of the sample pictures and their ``questions.json``."""
    return _HERE / "pictures"
