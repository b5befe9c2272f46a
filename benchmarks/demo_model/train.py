"""Trains the demo model from scratch: ``python -m benchmarks.demo_model.train``.

The tower in two rounds, the projector on words, the language model on questions; `stages` says
what each is asked and why.

Matrix products run in BF16 (several times the speed of FP32 on the CPUs this was made for),
with FP32 master weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.demo_model import checkpoint, stages
from benchmarks.demo_model.recipe import Recipe
from vzip.calibration.demo import accuracy, dialogue
from vzip.runtime import demo

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG = logging.getLogger(__name__)

_FASTER = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "GOMP_SPINCOUNT": "20000",
}


def train(
    size: checkpoint.Size,
    recipe: Recipe,
    folder: Path,
    *,
    test_scenes: int = 300,
    compiled: bool = True,
    work: Path | None = None,
) -> dict[str, Any]:
    """Train and save the demo model.

    Args:
        size: Sizes of its parts.
        recipe: How it is trained.
        folder: Where the checkpoint goes.
        test_scenes: How many held-out scenes its accuracy is measured on.
        compiled: Whether its layers are compiled, which needs a C++ compiler.
        work: A folder that keeps the tower after each round. What it already holds, of the same
            sizes and recipe, is not trained again.

    Returns:
        The record that is saved as ``training.json``.
    """
    clock = _Clock()
    torch.manual_seed(recipe.seed)
    tokenizer = checkpoint.build_tokenizer(size)
    processor = checkpoint.build_processor(size, tokenizer)
    model = checkpoint.build_model(size, tokenizer)
    heads = stages.Heads(size.tower_width)
    packer = dialogue.Packer(tokenizer, model.config.image_token_id, size.grid**2)
    stages.lay_out_positions(model, size)
    # Written out, attention of this size is faster on a CPU than the fused kernel.
    model.set_attn_implementation("eager")
    if compiled:
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            layer.compile()

    tower = nn.ModuleDict({"tower": model.model.vision_tower, "heads": heads})
    for name, second_round in (("tower", False), ("tower-again", True)):
        with _Stage(name, tower, work, _made_of(size, recipe, second_round), clock) as stage:
            if not stage.done:
                model.to(torch.bfloat16)
                heads.to(torch.bfloat16)
                stages.train_tower(model, heads, size, recipe, second_round=second_round)
                tower.float()

    # The second stage is the same to the last bit whether or not the tower was trained just now:
    # neither the state of the generator nor code compiled for other batch sizes is carried over.
    torch.manual_seed(recipe.seed + 1)
    torch.compiler.reset()
    model.to(torch.bfloat16)
    stages.whiten_projector(model, size, recipe)
    stages.align_words(model, size, recipe, tokenizer)
    model.to(torch.bfloat16)
    stages.train_language(model, size, recipe, packer)
    model.to(torch.float16).float()  # what will be saved is what is measured
    with torch.compiler.set_stance("force_eager"):  # FP32 would be compiled anew
        result = accuracy.evaluate(
            model, packer, accuracy.held_out(recipe.seed + 10_000, test_scenes, size.image)
        )
    wall, cpu = clock.read()
    record = {
        "command": "python -m benchmarks.demo_model.train",
        "size": dataclasses.asdict(size),
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "wall_seconds": round(wall),
        "cpu_seconds": round(cpu),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "held_out": {"scenes": test_scenes, "seed": recipe.seed + 10_000, "accuracy": result},
    }
    checkpoint.save(model, processor, folder, record)
    return record


class _Clock:
    """Wall and CPU time since it was made, of this process and its finished children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()

    def add(self, wall: float, cpu: float) -> None:
        """Count time spent before."""
        self._wall -= wall
        self._cpu -= cpu

    def read(self) -> tuple[float, float]:
        """Seconds of wall and CPU time."""
        return time.monotonic() - self._wall, _cpu_seconds() - self._cpu


class _Stage:
    """A stage whose result is kept in a folder, and taken from there another time.

    Args:
        name: Of the file.
        module: What the stage trains.
        work: The folder, or None to keep nothing.
        made_of: What the result depends on; one that was made of something else is not taken.
        clock: Is told of the time that a result taken from the folder had cost.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        work: Path | None,
        made_of: dict[str, float],
        clock: _Clock,
    ) -> None:
        self._file = None if work is None else work / f"{name}.pt"
        self._module, self._made_of, self._clock = module, made_of, clock
        self.done = False

    def __enter__(self) -> _Stage:  # noqa: PYI034 - typing.Self is new in Python 3.11
        self._before = self._clock.read()
        if self._file is not None and self._file.exists():
            kept = torch.load(self._file, weights_only=True)
            if kept["made_of"] == self._made_of:
                self._module.load_state_dict(kept["state"])
                self._clock.add(kept["wall"], kept["cpu"])
                self.done = True
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self.done or failure is not None:
            return
        wall, cpu = (
            after - before for after, before in zip(self._clock.read(), self._before, strict=True)
        )
        self._file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "made_of": self._made_of,
                "state": self._module.state_dict(),
                "wall": wall,
                "cpu": cpu,
            },
            self._file,
        )


def _made_of(size: checkpoint.Size, recipe: Recipe, second_round: bool) -> dict[str, float]:
    """What the tower depends on."""
    names = ["seed", "tower_batch", "tower_steps", "tower_rate", "decay"]
    if second_round:
        names += ["again_steps", "again_rate"]
    return {**dataclasses.asdict(size), **{name: getattr(recipe, name) for name in names}}


def _cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _fields(group: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    return {field.name: options[field.name] for field in dataclasses.fields(group)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=demo.checkpoint())
    parser.add_argument("--test-scenes", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the trained tower here, and use it")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the layers, which needs a C++ compiler",
    )
    for group in (checkpoint.Size, Recipe):
        for field in dataclasses.fields(group):
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # These are read at start-up only. glibc hands large blocks back to the kernel and faults them
    # in anew at every step; OpenMP's threads wait for each other in a busy loop, which is many
    # times slower as soon as something else wants a core; asleep at once, 1.8 times slower.
    for name, value in _FASTER.items():
        if name not in os.environ:
            _LOG.info("faster with %s=%s in the environment", name, value)
    torch.set_num_threads(options["threads"])
    size = checkpoint.Size(**_fields(checkpoint.Size, options))
    recipe = Recipe(**_fields(Recipe, options))
    record = train(
        size,
        recipe,
        options["output"],
        test_scenes=options["test_scenes"],
        compiled=options["compile"],
        work=options["work"],
    )
    _LOG.info("%s", record["held_out"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
