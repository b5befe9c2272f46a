"""Trains the demo model from scratch: ``python -m vzip.calibration.demo.train``.

Two stages. First the tower alone, with heads that are thrown away: what is in the scene, from
CLS at the feature layer, and what each patch belongs to. The first makes CLS look at the
objects, which is what VisionZip ranks patches by; the second makes every patch of an object
tell of the whole object, so that few of them are enough. Attention itself is not supervised,
and no token is ever dropped: the model has seen nothing but all of its tokens. Then, with the
tower as it is, the projector on single words, and finally the language model on questions, the
projector as it is: trained along, it loses the sides before anything has learned to read them.

Matrix products run in BF16 (several times the speed of FP32 on the CPUs this was made for),
with FP32 master weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
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
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vzip.calibration.demo import accuracy, checkpoint, dialogue, scenes
from vzip.runtime import demo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

_NAMES = {name: index for index, name in enumerate(scenes.NAMES)}
_COLORS = {color: index for index, color in enumerate(scenes.COLORS)}
_MOST = 4  # objects in a scene
# Objects of many sizes keep the language model from counting on a share of background.
_VARIED = (0.85, 1.4)
_FASTER = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "GOMP_SPINCOUNT": "20000",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the demo model is trained.

    Attributes:
        seed: Of everything random.
        tower_batch: Pictures in a step of the first stage.
        language_batch: Pictures in a step of the second stage.
        tower_steps: Steps of the first stage.
        again_steps: Steps of the first stage's second round.
        align_steps: Steps that bring the projector near the words, before the language model.
        language_steps: Steps of the second stage.
        tower_rate: Peak learning rate of the first stage.
        again_rate: Peak learning rate of the first stage's second round.
        language_rate: Peak learning rate of the second stage.
        decay: Weight decay of matrices.
        apart: Share of pictures whose questions do not see each other.
    """

    seed: int = 1
    tower_batch: int = 32
    language_batch: int = 24
    tower_steps: int = 4500
    again_steps: int = 800
    align_steps: int = 600
    language_steps: int = 2200
    tower_rate: float = 2e-3
    again_rate: float = 1e-3
    language_rate: float = 5e-3
    decay: float = 0.05
    apart: float = 0.75


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
    packed: dialogue.Packed | None


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
        names = np.full((len(drawn), _MOST + 1), len(_NAMES))  # the last is background
        colors = np.full((len(drawn), _MOST + 1), len(_COLORS))
        places = np.full((len(drawn), _MOST + 1, 2), np.nan, np.float32)
        present = np.zeros((len(drawn), len(_NAMES), len(_COLORS)), np.float32)
        for row, scene in enumerate(drawn):
            for index, thing in enumerate(scene.things):
                names[row, index] = _NAMES[thing.name]
                colors[row, index] = _COLORS[thing.color]
                present[row, _NAMES[thing.name], _COLORS[thing.color]] = 1
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


class Heads(nn.Module):
    """What the tower is asked while it is trained; not part of the model.

    Args:
        width: Width of the tower.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scene_norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pair = nn.Linear(width, len(_NAMES) * len(_COLORS))
        self.name, self.color = nn.Linear(width, len(_NAMES)), nn.Linear(width, len(_COLORS))
        self.count = nn.Linear(width, _MOST + 1)
        self.patch_name = nn.Linear(width, len(_NAMES) + 1)
        self.patch_color = nn.Linear(width, len(_COLORS) + 1)
        # Asked in the second round only.
        self.patch_place = nn.Linear(width, 2)
        self.patch_count = nn.Linear(width, _MOST + 1)
        self.patch_shapes = nn.Linear(width, _MOST + 1)
        # Most labels are absent most of the time.
        for linear in (self.pair, self.name, self.color):
            nn.init.constant_(linear.bias, -3.0)

    def forward(self, features: torch.Tensor, batch: Batch, *, second_round: bool) -> torch.Tensor:
        """The sum of all losses.

        Args:
            features: [B, 1 + N, D] at the feature layer, CLS first.
            batch: What they should tell.
            second_round: Whether objects' patches are also asked where their object is and how
                many there are, and background is asked to be plain.
        """
        scene, patches = self.scene_norm(features[:, 0]), self.patch_norm(features[:, 1:])
        present = batch.present
        loss = _absent_or_present(self.pair(scene), present.flatten(1))
        loss = loss + _absent_or_present(self.name(scene), present.amax(2))
        loss = loss + _absent_or_present(self.color(scene), present.amax(1))
        loss = loss + functional.cross_entropy(self.count(scene).float(), batch.count)
        # Objects and background weigh the same, however few patches the objects have.
        ink = batch.patch_name < len(_NAMES)  # [B, N]
        weight = torch.where(ink, 0.5 / ink.sum(), 0.5 / (~ink).sum())
        for head, target in (
            (self.patch_name, batch.patch_name),
            (self.patch_color, batch.patch_color),
        ):
            each = functional.cross_entropy(
                head(patches).float().flatten(0, 1), target.flatten(), reduction="none"
            )
            loss = loss + 2 * (each * weight.flatten()).sum()
        if second_round:
            place = self.patch_place(patches[ink]).float()  # [objects' patches, 2]
            loss = loss + 10 * functional.mse_loss(place, batch.place[ink])
            for head, total in ((self.patch_count, batch.count), (self.patch_shapes, batch.shapes)):
                target = total[:, None].expand(ink.shape)[ink]
                loss = loss + functional.cross_entropy(head(patches[ink]).float(), target)
            # Background is to tell of nothing but its place: without this it comes to hold what
            # is elsewhere in the picture, and any few patches would do for an answer.
            plain = functional.layer_norm(features[:, 1:].float(), features.shape[-1:])
            empty = (~ink).float().unsqueeze(-1)  # [B, N, 1]
            usual = (plain * empty).sum(0) / empty.sum(0).clamp(min=1)  # [N, D]
            loss = loss + 50 * (plain - usual)[~ink].square().mean()
        return loss


class Masters:
    """FP32 master weights of a BF16 model, and their optimisers.

    Matrices inside the layers are trained by Muon, everything else by AdamW.

    Args:
        groups: Modules and the peak learning rate of each.
        decay: Weight decay of matrices; vectors have none.
        steps: Steps in all.
    """

    def __init__(self, groups: Sequence[tuple[nn.Module, float]], decay: float, steps: int) -> None:
        self._working: list[nn.Parameter] = []
        self._masters: list[torch.Tensor] = []
        hidden: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for module, rate in groups:
            for name, parameter in module.named_parameters():
                master = parameter.detach().float().clone()
                self._working.append(parameter)
                self._masters.append(master)
                inside = parameter.ndim == 2 and "layers." in name
                group = {"params": [master], "lr": rate, "weight_decay": 0.0}
                if parameter.ndim > 1:
                    group["weight_decay"] = decay
                (hidden if inside else others).append(group)
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True)
        ]
        if hidden:
            muon = torch.optim.Muon(
                [group["params"][0] for group in hidden], adjust_lr_fn="match_rms_adamw"
            )
            self._optimisers.append(muon)
            rates = {id(group["params"][0]): group for group in hidden}
            muon.param_groups[:] = [
                {**muon.param_groups[0], **rates[id(parameter)], "params": [parameter]}
                for parameter in muon.param_groups[0]["params"]
            ]
        warm = max(1, min(200, steps // 10))
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimiser,
                lambda step: (
                    min(1.0, (step + 1) / warm)
                    * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))))
                ),
            )
            for optimiser in self._optimisers
        ]

    def step(self) -> None:
        """One step along the gradients, whose norm is limited to 1."""
        for parameter, master in zip(self._working, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimiser, schedule in zip(self._optimisers, self._schedules, strict=True):
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self._working, self._masters, strict=True):
                parameter.copy_(master)

    def restore(self) -> None:
        """Give the modules their master weights in FP32."""
        for parameter, master in zip(self._working, self._masters, strict=True):
            parameter.data = master.detach().clone()


def train_tower(
    model: LlavaForConditionalGeneration,
    heads: Heads,
    size: checkpoint.Size,
    recipe: Recipe,
    *,
    second_round: bool,
) -> None:
    """The first stage: the tower up to the feature layer.

    Args:
        model: The model, BF16.
        heads: The tower's heads, BF16.
        size: Sizes.
        recipe: The recipe.
        second_round: The shorter round, after the first, with all questions and with objects of
            more different sizes.
    """
    steps = recipe.again_steps if second_round else recipe.tower_steps
    rate = recipe.again_rate if second_round else recipe.tower_rate
    masters = Masters([(model.model.vision_tower, rate), (heads, rate)], recipe.decay, steps)
    data = SceneBatches(
        size,
        recipe,
        recipe.tower_steps if second_round else 0,
        steps,
        recipe.tower_batch,
        scale=_VARIED if second_round else (1.0, 1.0),
    )
    for batch, report in _progress(data, "tower again" if second_round else "tower"):
        features = accuracy.tower_features(model, accuracy.normalise(batch.pixels))
        loss = heads(features, batch, second_round=second_round)
        torch.autograd.backward(loss)
        masters.step()
        report(loss)
    masters.restore()


def align_words(
    model: LlavaForConditionalGeneration,
    size: checkpoint.Size,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Bring the projector's output near the words for what a patch shows, before any sentence.

    LLaVA's own first stage does this with captions. Without it, a language model that starts
    from nothing takes very long to find out which word a patch is to be looked up by.

    "Top" and "bottom" are left out: a row is told by the place in the sequence, and the language
    model learns it there, as one that was trained on whole pictures may. Compressed tokens stand at
    other places, so rows are what compression costs this model most, and what tuning can mend.
    """
    words = (*scenes.NAMES, *scenes.COLORS, "left", "right")
    ids = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f" {word}")[0]) for word in words]
    projector, embedding = model.model.multi_modal_projector, model.get_input_embeddings()
    masters = Masters(
        [(projector, recipe.language_rate), (embedding, recipe.language_rate)],
        recipe.decay,
        recipe.align_steps,
    )
    data = SceneBatches(
        size,
        recipe,
        recipe.tower_steps + recipe.again_steps,
        recipe.align_steps,
        recipe.language_batch,
        scale=_VARIED,
    )
    for batch, report in _progress(data, "words"):
        with torch.no_grad():
            features = accuracy.tower_features(model, accuracy.normalise(batch.pixels))
        shown = functional.normalize(projector(features[:, 1:]).float(), dim=-1)  # [B, N, L]
        named = functional.normalize(embedding.weight[ids].float(), dim=-1)  # [W, L]
        logits = 2 * math.sqrt(named.shape[1]) * (shown @ named.T) - 4  # [B, N, W]
        ink = batch.patch_name < len(_NAMES)
        across = batch.place[..., 0]  # NaN in the background, which compares false
        apply = torch.cat(
            [
                functional.one_hot(batch.patch_name, len(_NAMES) + 1)[..., :-1],
                functional.one_hot(batch.patch_color, len(_COLORS) + 1)[..., :-1],
                torch.stack([across < 0, across > 0], dim=-1),
            ],
            dim=-1,
        ).float()
        each = functional.binary_cross_entropy_with_logits(logits, apply, reduction="none").sum(-1)
        loss = each[ink].mean() + each[~ink].mean()
        torch.autograd.backward(loss)
        masters.step()
        report(loss)
    masters.restore()
    with torch.no_grad():
        model.lm_head.weight.copy_(embedding.weight)


def train_language(
    model: LlavaForConditionalGeneration,
    size: checkpoint.Size,
    recipe: Recipe,
    packer: dialogue.Packer,
) -> None:
    """The language model on questions, tower and projector as they are."""
    parts = model.model
    masters = Masters(
        [(module, recipe.language_rate) for module in (parts.language_model, model.lm_head)],
        recipe.decay,
        recipe.language_steps,
    )
    data = SceneBatches(
        size,
        recipe,
        recipe.tower_steps + recipe.again_steps + recipe.align_steps,
        recipe.language_steps,
        recipe.language_batch,
        scale=_VARIED,
        packer=packer,
    )
    for batch, report in _progress(data, "questions"):
        assert batch.packed is not None  # the packer makes it
        with torch.no_grad():
            features = accuracy.tower_features(model, accuracy.normalise(batch.pixels))
            embeds = parts.multi_modal_projector(features[:, 1:])
        logits, targets = accuracy.answer_logits(model, embeds, batch.packed)
        loss = functional.cross_entropy(logits.float(), targets)
        torch.autograd.backward(loss)
        masters.step()
        report(loss)
    masters.restore()


@torch.no_grad()
def lay_out_positions(model: LlavaForConditionalGeneration, size: checkpoint.Size) -> None:
    """Start the tower's position embeddings at two-dimensional sines and cosines.

    With random ones a tower first has to find out which patches are neighbours.
    """
    quarter = size.tower_width // 4
    rates = 1.0 / 30 ** (torch.arange(quarter) / quarter)  # radians per patch, 1 to 1/30
    angles = torch.arange(size.grid)[:, None] * rates  # [grid, quarter]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    down = axis[:, None].expand(-1, size.grid, -1)
    across = axis[None].expand(size.grid, -1, -1)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    table[1:] = 0.5 * torch.cat([down, across], dim=-1).flatten(0, 1)  # [N, width]


@torch.no_grad()
def whiten_projector(
    model: LlavaForConditionalGeneration, size: checkpoint.Size, recipe: Recipe
) -> None:
    """Start the projector at the whitened patch features, which a fresh LLM learns from faster.

    A tower's features have a few directions that dwarf the rest. The projector's first matrix
    becomes a random one times the inverse root of their covariance, its bias takes the mean out.
    """
    batch = SceneBatches(size, recipe, 10**6, 1, 256)[0]
    features = accuracy.tower_features(model, accuracy.normalise(batch.pixels))[:, 1:]
    flat = features.flatten(0, 1).double()  # [B * N, D]
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    scale = (values + 1e-2 * values.mean()).rsqrt()
    whitening = vectors * scale @ vectors.T  # [D, D]
    linear = model.model.multi_modal_projector.linear_1
    mixing = torch.randn(linear.out_features, linear.in_features, dtype=torch.float64)
    weight = mixing @ whitening / math.sqrt(linear.in_features)
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ mean)


def _absent_or_present(logits: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, summed over labels and averaged over scenes."""
    loss = functional.binary_cross_entropy_with_logits(logits.float(), present, reduction="sum")
    return loss / (4 * len(logits))


def _varied(rng: np.random.Generator, scene: scenes.Scene, side: int) -> np.ndarray:
    """A picture at the tower's resolution: painted there, or larger and scaled down."""
    if rng.random() < 0.75:
        return scenes.paint(scene, side)
    picture = scenes.paint(scene, 2 * side)
    return accuracy.shrink(picture, side)


def _progress(data: SceneBatches, title: str) -> Iterator[tuple[Batch, Any]]:
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


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


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
    heads = Heads(size.tower_width)
    packer = dialogue.Packer(tokenizer, model.config.image_token_id, size.grid**2)
    lay_out_positions(model, size)
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
                train_tower(model, heads, size, recipe, second_round=second_round)
                tower.float()

    # The second stage is the same to the last bit whether or not the tower was trained just now:
    # neither the state of the generator nor code compiled for other batch sizes is carried over.
    torch.manual_seed(recipe.seed + 1)
    torch.compiler.reset()
    model.to(torch.bfloat16)
    whiten_projector(model, size, recipe)
    align_words(model, size, recipe, tokenizer)
    model.to(torch.bfloat16)
    train_language(model, size, recipe, packer)
    model.to(torch.float16).float()  # what will be saved is what is measured
    with torch.compiler.set_stance("force_eager"):  # FP32 would be compiled anew
        result = accuracy.evaluate(
            model, packer, accuracy.held_out(recipe.seed + 10_000, test_scenes, size.image)
        )
    wall, cpu = clock.read()
    record = {
        "command": "python -m vzip.calibration.demo.train",
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
