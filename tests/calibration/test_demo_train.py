"""The demo model's training script: the same seed gives the same bits, in one sitting or two."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from vzip.runtime import demo

# SHA-256 of the published demo model's files: what was measured with it holds for these bits alone.
DEMO_FILES = {
    "chat_template.jinja": "d6135db0968fa282388ec2ee1bacbd87d2a7fee6c1f91f05794b702ace607568",
    "config.json": "191eacf7ce2e64b8eb299147d4341f9dbcfa6fedf1c47e589652fbcbe3be8141",
    "generation_config.json": "351d7720a9ae23d17fe7d36474fa69aec5362032d92d2e2c0a0da6e5a0a6a703",
    "model.safetensors": "1e5f22ca8212c2dfb922ae2b0078d793e09e45449567dd77d539fbecb842c031",
    "preprocessor_config.json": "4c8bd08a5d1edc76e4fb73b44ef6ad3918db8d804fe644d4eb1d5ff5843738a1",
    "processor_config.json": "765a2bda761f03d1c2058956350a3cc933f553b90db80711f00a6c79565dbbf4",
    "tokenizer.json": "b8a3750464f7124b901dc71294b16b2891e5cc45353e9e586942d2d25cfe4b2e",
    "tokenizer_config.json": "86cd2bba42bc04fa1e08b98535c5baa0dbf227e814cb65bb3d9a90faf531259a",
    "training.json": "f92988498f26515167e5be3952879cd496b5b3d07b21d52c9970428864902fe5",
}

FEW = (
    *("--tower-steps", "12", "--again-steps", "6", "--align-steps", "4", "--language-steps", "12"),
    *("--test-scenes", "10", "--threads", "1"),
)


def train(output: Path, *options: str) -> bytes:
    """Run the script as a user does, and return the weights that it saved."""
    command = [sys.executable, "-m", "benchmarks.demo_model.train", "-o", str(output)]
    subprocess.run([*command, *FEW, *options], check=True, capture_output=True)
    return (output / "model.safetensors").read_bytes()


def test_the_demo_s_checkpoint_is_the_same_to_the_bit() -> None:
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in demo.checkpoint().iterdir()
    }
    assert found == DEMO_FILES


@pytest.mark.full
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
