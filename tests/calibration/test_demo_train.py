"""The demo model's training script: the same seed gives the same bits, in one sitting or two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

pytestmark = pytest.mark.slow

FEW = (
    *("--tower-steps", "12", "--again-steps", "6", "--align-steps", "4", "--language-steps", "12"),
    *("--test-scenes", "10", "--threads", "1"),
)


def train(output: Path, *options: str) -> bytes:
    """Run the script as a user does, and return the weights that it saved."""
    command = [sys.executable, "-m", "benchmarks.demo_model.train", "-o", str(output)]
    subprocess.run([*command, *FEW, *options], check=True, capture_output=True)
    return (output / "model.safetensors").read_bytes()


def test_a_second_sitting_gives_the_same_bits(tmp_path: Path) -> None:
    work = ("--work", str(tmp_path / "work"))
    whole = train(tmp_path / "whole", *work)
    # The tower comes from the folder now, and nothing that was compiled for it is there.
    assert train(tmp_path / "second", *work) == whole
    assert train(tmp_path / "another", "--seed", "2") != whole
    # The language model learns with the projector as the words left it.
    first, longer = load(whole), load(train(tmp_path / "longer", *work, "--language-steps", "16"))
    other = {name for name, tensor in first.items() if not torch.equal(tensor, longer[name])}
    assert any("language_model" in name for name in other)
    assert not [name for name in other if "language_model" not in name and "lm_head" not in name]
