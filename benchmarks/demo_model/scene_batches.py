"""Batches of scenes that the demo model is trained on, drawn ahead by a process of their own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.demo_model import checkpoint
from vzip.calibration.demo import accuracy, dialogue, scenes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benchmarks.demo_model.recipe import Recipe

NAMES = {name: index for index, name in enumerate(scenes.NAMES)}
COLORS = {color: index for index, color in enumerate(scenes.COLORS)}
MOST = 4  # objects in a scene
# Objects of many sizes keep the language model from counting on a share of background.
VARIED = (0.85, 1.4)


@dataclasses.dataclass(frozen=True)
class Batch:
    """B pictures with N patches each, what is in them and what is asked.

    Attributes:
        pixels: uint8 [B, side, side, 3].
        patch_name: int64 [B, N], index in ``scenes.NAMES``, ``len(scenes.NAMES)`` without.
        patch_color: int64 [B, N], index in ``scenes.COLORS``, ``len(scenes.COLORS)`` without.
        present: float32 [B, names, colors], 1 for each object of the scene.
        count: int64 [B], number of objects.
        shapes: int64 [B], number of objects that are shapes.
        place: float32 [B, N, 2], the centre of the object that a patch shows, from the left and
            from the top, -1 to 1; NaN without.
        packed: The questions, None in the first stage.
    """

    pixels: torch.Tensor
    patch_name: torch.Tensor
    patch_color: torch.Tensor
    present: torch.Tensor
    count: torch.Tensor
    shapes: torch.Tensor
    place: torch.Tensor
    packed: dialogue.PackedTurns | None


class SceneBatches(Dataset[Batch]):
    """Batches by number; the same number and seed always give the same batch."""

    def __init__(
        self,
        size: checkpoint.Size,
        recipe: Recipe,
        first: int,
        steps: int,
        batch: int,
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        packer: dialogue.Packer | None = None,
    ) -> None:
        self._size, self._recipe, self._packer = size, recipe, packer
        self._scale = scale
        self._first, self._steps, self._batch = first, steps, batch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self._recipe.seed, self._first + step])
        drawn = [scenes.draw_scene(rng, "train", self._scale) for _ in range(self._batch)]
        pixels = np.stack([_varied(rng, scene, self._size.image) for scene in drawn])
        grid = self._size.grid
        patches = np.stack([scenes.patch_labels(scene, grid) for scene in drawn])  # [B, N]
        names = np.full((len(drawn), MOST + 1), len(NAMES))  # the last is background
        colors = np.full((len(drawn), MOST + 1), len(COLORS))
        places = np.full((len(drawn), MOST + 1, 2), np.nan, np.float32)
        present = np.zeros((len(drawn), len(NAMES), len(COLORS)), np.float32)
        for row, scene in enumerate(drawn):
            for index, thing in enumerate(scene.things):
                names[row, index] = NAMES[thing.name]
                colors[row, index] = COLORS[thing.color]
                present[row, NAMES[thing.name], COLORS[thing.color]] = 1
                places[row, index] = 2 * thing.x - 1, 2 * thing.y - 1
        packed = None
        if self._packer is not None:
            asked = [scenes.ask(rng, scene) for scene in drawn]
            apart = rng.random(len(drawn)) < self._recipe.apart
            packed = self._packer.pack(asked, apart.tolist())
        return Batch(
            torch.from_numpy(pixels),
            torch.from_numpy(np.take_along_axis(names, patches, axis=1)),
            torch.from_numpy(np.take_along_axis(colors, patches, axis=1)),
            torch.from_numpy(present),
            torch.tensor([len(scene.things) for scene in drawn]),
            torch.tensor([sum(not thing.is_digit for thing in scene.things) for scene in drawn]),
            torch.from_numpy(np.take_along_axis(places, patches[..., None], axis=1)),
            packed,
        )


def progress(data: SceneBatches, title: str) -> Iterator[tuple[Batch, Any]]:
    """Yield each batch, with what its loss is reported to: the bar shows means of a hundred."""
    # One process draws scenes ahead while this one computes.
    loader: Iterable[Batch] = DataLoader(
        data, batch_size=None, num_workers=1, prefetch_factor=4, worker_init_fn=_one_thread
    )
    mean: list[float] = []
    with tqdm(loader, total=len(data), desc=title, mininterval=2) as bar:
        for batch in bar:

            def report(loss: torch.Tensor) -> None:
                mean.append(float(loss.detach()))
                if len(mean) == 100:
                    bar.set_postfix(loss=f"{np.mean(mean):.3f}")
                    mean.clear()

            yield batch, report


def _varied(rng: np.random.Generator, scene: scenes.Scene, side: int) -> np.ndarray:
    """A picture at the tower's resolution: painted there, or larger and scaled down."""
    if rng.random() < 0.75:
        return scenes.paint(scene, side)
    picture = scenes.paint(scene, 2 * side)
    return accuracy.shrink(picture, side)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
