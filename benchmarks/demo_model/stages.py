"""What the demo model is trained on, one stage after the other.

First the tower alone, with heads that are thrown away: what is in the scene, from
CLS at the feature layer, and what each patch belongs to. The first makes CLS look at the
objects, which is what VisionZip ranks patches by; the second makes every patch of an object
tell of the whole object, so that few of them are enough. Attention itself is not supervised,
and no token is ever dropped: the model has seen nothing but all of its tokens. Then, with the
tower as it is, the projector on single words, and finally the language model on questions, the
projector as it is: trained along, it loses the sides before anything has learned to read them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from benchmarks.demo_model import checkpoint
from benchmarks.demo_model.masters import Masters
from benchmarks.demo_model.scene_batches import (
    COLORS,
    MOST,
    NAMES,
    VARIED,
    Batch,
    SceneBatches,
    progress,
)
from vzip.calibration.demo import accuracy, dialogue, scenes

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

    from benchmarks.demo_model.recipe import Recipe


class Heads(nn.Module):
    """What the tower is asked while it is trained; not part of the model.

    Args:
        width: Width of the tower.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scene_norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pair = nn.Linear(width, len(NAMES) * len(COLORS))
        self.name, self.color = nn.Linear(width, len(NAMES)), nn.Linear(width, len(COLORS))
        self.count = nn.Linear(width, MOST + 1)
        self.patch_name = nn.Linear(width, len(NAMES) + 1)
        self.patch_color = nn.Linear(width, len(COLORS) + 1)
        # Asked in the second round only.
        self.patch_place = nn.Linear(width, 2)
        self.patch_count = nn.Linear(width, MOST + 1)
        self.patch_shapes = nn.Linear(width, MOST + 1)
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
        ink = batch.patch_name < len(NAMES)  # [B, N]
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
        scale=VARIED if second_round else (1.0, 1.0),
    )
    for batch, report in progress(data, "tower again" if second_round else "tower"):
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
        scale=VARIED,
    )
    for batch, report in progress(data, "words"):
        with torch.no_grad():
            features = accuracy.tower_features(model, accuracy.normalise(batch.pixels))
        shown = functional.normalize(projector(features[:, 1:]).float(), dim=-1)  # [B, N, L]
        named = functional.normalize(embedding.weight[ids].float(), dim=-1)  # [W, L]
        logits = 2 * math.sqrt(named.shape[1]) * (shown @ named.T) - 4  # [B, N, W]
        ink = batch.patch_name < len(NAMES)
        across = batch.place[..., 0]  # NaN in the background, which compares false
        apply = torch.cat(
            [
                functional.one_hot(batch.patch_name, len(NAMES) + 1)[..., :-1],
                functional.one_hot(batch.patch_color, len(COLORS) + 1)[..., :-1],
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
        scale=VARIED,
        packer=packer,
    )
    for batch, report in progress(data, "questions"):
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
