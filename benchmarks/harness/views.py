"""Views of photographs, and what a real tower says of each: cut, encoded once and stored.

A view is a square cut out of a photograph, and a second one, its query: another cut of about the
same place, mirrored by chance, with other light and colours and saved as a poor JPEG.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from benchmarks.real.towers import TOWERS, checkpoint

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

Float = NDArray[np.float32]

TEACHER = "dinov2-s14-336"
LEAST_SIDE = 160
"""Pixels that a cut has at least, where the photograph has as many."""


@dataclass(frozen=True)
class View:
    """A square of a photograph.

    Attributes:
        photograph: Its file's name.
        number: Which of the photograph's; 0 is the middle of it, as large as it goes.
    """

    photograph: str
    number: int

    @property
    def scene(self) -> str:
        """What counts as one in a standard error: the two motorcycles are one scene."""
        return "motorcycle" if self.photograph.startswith("motorcycle") else self.photograph

    @property
    def key(self) -> str:
        """Under which it is stored."""
        return f"{self.photograph}-{self.number}"

    def cuts(self, file: Path) -> tuple[Image.Image, Image.Image]:
        """Return the view and its query, RGB, of the sizes that they have in the photograph.

        Args:
            file: The photograph.
        """
        image = Image.open(file).convert("RGB")
        rng = np.random.default_rng([zlib.crc32(self.photograph.encode()), self.number])
        width, height = image.size
        short = min(width, height)
        least = min(short, max(LEAST_SIDE, 0.45 * short))
        side = rng.uniform(least, short) if self.number else float(short)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        if self.number == 0:
            left, top = (width - side) / 2, (height - side) / 2
        view = _cut(image, left, top, side)
        if self.number % 2:
            view = ImageOps.mirror(view)
        other = min(short, side * rng.uniform(0.65, 1.3))
        middle = np.array([left, top]) + side / 2 + rng.uniform(-0.2, 0.2, 2) * side
        x, y = np.clip(middle - other / 2, 0, np.array([width, height]) - other)
        query = _cut(image, x, y, other)
        if rng.random() < 0.5:
            query = ImageOps.mirror(query)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            query = change(query).enhance(rng.uniform(0.6, 1.4))
        return view, _poor(query)


def _cut(image: Image.Image, left: float, top: float, side: float) -> Image.Image:
    box = tuple(round(edge) for edge in (left, top, left + side, top + side))
    return image.crop(box)


def _poor(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class Seen:
    """What a tower says of one picture; S tokens, CLS first, N = S - 1 patches, D channels.

    Attributes:
        hidden: [S, D], `hidden_states[-2]`: what leaves the tower for a LLaVA.
        keys: [S, d], k_proj's output of that layer, summed over heads.
        attention: [layers, N], CLS's attention in every layer, summed over heads.
        norms: [layers + 1, N], of the patches' hidden states.
        last: [N, D] after the last LayerNorm, or nothing where it isn't asked for.
    """

    hidden: Float
    keys: Float
    attention: Float
    norms: Float
    last: Float


class Tower:
    """A real tower that sees pictures and stores what it saw.

    Args:
        name: Of `benchmarks.real.towers`; one with CLS.
        store: A folder; what lies there is read instead of computed.
        last: Whether the last layer's features are kept, and not those of the one before.
    """

    def __init__(self, name: str, store: Path, *, last: bool = False) -> None:
        self.name, self._last = name, last
        self._store = store / name
        self._store.mkdir(parents=True, exist_ok=True)
        tower = TOWERS[name]
        self.side = tower.image_size // tower.vision["patch_size"]
        self._pixels = tower.image_size
        self._mean, self._std = (np.array(each, np.float32) for each in tower.colours)

    def seen(self, key: str, image: Image.Image) -> Seen:
        """Return what it says of a picture, stretched to its square.

        Args:
            key: Under which it is stored.
            image: RGB.
        """
        path = self._store / f"{key}.npz"
        if not path.exists():
            staged = path.with_suffix(".part")
            with staged.open("wb") as file:
                np.savez(file, **self._forward(image))
            staged.rename(path)
        with np.load(path, allow_pickle=False) as arrays:
            return Seen(**{name: arrays[name].astype(np.float32) for name in arrays.files})

    @cached_property
    def _model(self) -> CLIPVisionModel:
        from safetensors.torch import load_file
        from transformers import CLIPVisionConfig, CLIPVisionModel

        tower = TOWERS[self.name]
        config: Any = {**tower.vision, "image_size": tower.image_size}
        model = CLIPVisionModel(CLIPVisionConfig(**config, attn_implementation="eager"))
        prefix = "vision_tower.vision_model."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_file(checkpoint(self.name) / "model.safetensors").items()
            if name.startswith(prefix)
        }
        model.load_state_dict(state)
        return model.eval()

    def _forward(self, image: Image.Image) -> dict[str, NDArray[Any]]:
        square = image.resize((self._pixels, self._pixels), Image.Resampling.BICUBIC)
        pixels = (np.asarray(square, np.float32) / 255 - self._mean) / self._std
        caught: list[torch.Tensor] = []
        layer = self._model.encoder.layers[-2].self_attn
        hook = layer.k_proj.register_forward_hook(lambda *call: caught.append(call[2]))
        with torch.no_grad():
            given = self._model(
                torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None],
                output_hidden_states=True,
                output_attentions=True,
            )
            last = self._model.post_layernorm(given.last_hidden_state[0, 1:])
        hook.remove()
        states = given.hidden_states
        keys = caught[0][0].unflatten(-1, (layer.num_heads, -1)).sum(1)
        rows = torch.stack([each[0, :, 0, 1:].sum(0) for each in given.attentions])
        norms = torch.stack([each[0, 1:].norm(dim=-1) for each in states])
        nothing = np.zeros((0, 0), np.float16)
        # Halves are enough: a channel's rounding is a thousandth of what tells tokens apart.
        return {
            "hidden": nothing if self._last else states[-2][0].numpy().astype(np.float16),
            "keys": keys.numpy(),
            "attention": rows.numpy(),
            "norms": norms.numpy(),
            "last": last.numpy().astype(np.float16) if self._last else nothing,
        }


def views(photographs: tuple[str, ...], each: int) -> Iterator[View]:
    """Yield views of photographs: the first of every one, then the second of every one."""
    for number in range(each):
        for photograph in photographs:
            yield View(photograph, number)
