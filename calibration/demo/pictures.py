"""Paints the sample pictures of the demo: ``python -m vzip.calibration.demo.pictures``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vzip.calibration.demo import scenes
from vzip.runtime import demo

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 31337
SIDE = 448
COUNT = 4


def paint_samples(folder: Path, seed: int = SEED, count: int = COUNT, side: int = SIDE) -> None:
    """Paint scenes with held-out digits, and write down questions with the true answers.

    Args:
        folder: Where ``scene-1.jpg`` … and ``questions.json`` go.
        seed: Of the scenes and the questions.
        count: How many pictures.
        side: Their side in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    asked = {}
    for number in range(1, count + 1):
        scene = scenes.draw_scene(rng, "test")
        name = f"scene-{number}.jpg"
        Image.fromarray(scenes.paint(scene, side)).save(folder / name, quality=92)
        asked[name] = [
            {"kind": question.kind, "question": question.text, "answer": question.answer}
            for question in scenes.ask(rng, scene)
        ]
    (folder / "questions.json").write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=demo.pictures())
    paint_samples(parser.parse_args(arguments).output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
