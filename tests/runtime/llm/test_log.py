"""A log has no progress bars, whoever draws them while an LLM is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

BARS = """
import sys
from vzip.runtime.console import progress, run_command
def work():
    from huggingface_hub.utils import tqdm as hub
    from tqdm import tqdm
    from transformers.utils.logging import tqdm as theirs
    from vzip.runtime.llm.local.transformers import TransformersLLM
    for bar in (hub, tqdm, theirs):
        for _ in bar(range(3), desc="loading"): pass
    for _ in progress(range(3), desc="ours"): pass
    TransformersLLM.open("demo", device="cpu")
    return 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sys.exit(run_command(work, prog='vzip'))", "work()"])
def test_a_log_has_no_bars(how: str) -> None:
    if how == "work()":  # a program of one's own: its bars are its own, ours and the LLM's aren't
        code = BARS.replace('        for _ in bar(range(3), desc="loading"): pass', "        pass")
    else:
        code = BARS
    result = subprocess.run(
        [sys.executable, "-c", code + how], capture_output=True, check=True, timeout=120
    )
    assert b"\r" not in result.stderr
    assert b"%|" not in result.stderr
    assert result.stdout == b""
