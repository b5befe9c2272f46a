"""How often the demo model answers right, with all tokens and with some of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vzip.calibration.demo import dialogue, scenes
from vzip.export.algorithm import visionzip

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from transformers import LlavaForConditionalGeneration

    from vzip.export.algorithm.budget import Merge

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""What the demo's tower is shown pictures with: CLIP's, as its preprocessor_config.json says."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Scenes with held-out digits, their pictures and their questions.

    Attributes:
        pictures: uint8 [B, side, side, 3].
        questions: For each picture one question of each kind that can be asked.
    """

    pictures: npt.NDArray[np.uint8]
    questions: list[list[scenes.Question]]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the tower makes of B pictures at the feature layer; S tokens, CLS first.

    Attributes:
        hidden: float32 [B, S, D].
        keys: float32 [B, H, S, d], the key projection of the feature layer.
        cls_attention: float32 [B, H, S], the softmax row of CLS in the feature layer.
    """

    hidden: torch.Tensor
    keys: torch.Tensor
    cls_attention: torch.Tensor


def held_out(seed: int, count: int, side: int = 112, painted: int = 112) -> HeldOut:
    """Draw a test set.

    Args:
        seed: Of the scenes and the questions.
        count: How many scenes.
        side: Side of the tower's input in pixels.
        painted: Side at which the pictures are painted, before they are scaled to ``side``.
    """
    rng = np.random.default_rng(seed)
    drawn = [scenes.draw_scene(rng, "test") for _ in range(count)]
    pictures = np.stack([shrink(scenes.paint(scene, painted), side) for scene in drawn])
    return HeldOut(pictures, [scenes.ask(rng, scene) for scene in drawn])


def shrink(picture: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Scale a square picture as the image processor does."""
    if picture.shape[0] == side:
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def normalise(pictures: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """uint8 [B, side, side, 3] to the tower's input [B, 3, side, side]."""
    mean, std = (torch.tensor(values) * 255 for values in (MEAN, STD))
    scaled: torch.Tensor = (pictures.float() - mean) / std
    return scaled.permute(0, 3, 1, 2).to(dtype).contiguous()


def tower_features(
    model: LlavaForConditionalGeneration, pixels: torch.Tensor, unused: int = 1
) -> torch.Tensor:
    """The tower up to the feature layer, without the dead layer after it.

    Args:
        model: The model.
        pixels: [B, 3, side, side], normalised.
        unused: How many of the last layers are left out.

    Returns:
        [B, S, D], equal to ``hidden_states[-1 - unused]``.
    """
    tower = model.model.vision_tower
    hidden: torch.Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-unused]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, pictures: npt.NDArray[np.uint8]) -> Encoded:
    """Run the tower in FP32 and take what VisionZip needs.

    Args:
        model: The model, FP32.
        pictures: uint8 [B, side, side, 3].
    """
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(pictures), 64):
        pixels = normalise(torch.from_numpy(pictures[start : start + 64]), torch.float32)
        before = tower_features(model, pixels, unused=2)
        layer = model.model.vision_tower.encoder.layers[-2]
        attention, normed = layer.self_attn, layer.layer_norm1(before)
        # [B, S, D] -> [B, H, S, d]
        query, key = (
            projection(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        row = torch.softmax(query[:, :, :1] @ key.mT * attention.scale, -1)[:, :, 0]
        parts.append((layer(before, attention_mask=None), key, row))
    hidden, keys, rows = (torch.cat(column) for column in zip(*parts, strict=True))
    return Encoded(hidden, keys, rows)


def answer_logits(
    model: LlavaForConditionalGeneration, embeds: torch.Tensor, packed: dialogue.PackedTurns
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits wherever an answer is to be predicted.

    Args:
        model: The model.
        embeds: [B, K, L], the picture's tokens after the projector.
        packed: The questions, with K image tokens each.

    Returns:
        [P, vocabulary] and int64 [P]: logits and targets, by picture, then by position.
    """
    ids = torch.from_numpy(packed.ids)
    words = model.get_input_embeddings()(ids)  # [B, T, L]
    image = (ids == model.config.image_token_id).unsqueeze(-1)
    words = words.masked_scatter(image, embeds.to(words.dtype))
    segments = torch.from_numpy(packed.segments)
    apart = torch.from_numpy(packed.apart)[:, None, None]
    shared = (segments == 0)[:, None, :]  # [B, 1, T]
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
    seen = (shared | same | ~apart) & (segments >= 0)[:, None, :]
    # Padding sees itself, so that no row is empty. A mask of numbers runs faster than a boolean.
    allowed = (seen | torch.eye(ids.shape[1], dtype=torch.bool)).tril()
    mask = torch.where(allowed, 0.0, -1e4).to(words.dtype).unsqueeze(1)  # [B, 1, T, T]
    output = model.model.language_model(
        inputs_embeds=words,
        attention_mask=mask,
        position_ids=torch.from_numpy(packed.positions),
        use_cache=False,
    )
    targets = torch.from_numpy(packed.targets)
    asked = targets >= 0
    return model.lm_head(output.last_hidden_state[asked]), targets[asked]


@torch.no_grad()
def right_answers(
    model: LlavaForConditionalGeneration,
    packer: dialogue.Packer,
    features: torch.Tensor,
    questions: Sequence[Sequence[scenes.Question]],
) -> list[list[bool]]:
    """Whether greedy decoding gives exactly the right answer and stops, each question alone.

    Greedy decoding gives the right answer if and only if, with that answer as input, every
    token of it and the end are the likeliest: one pass over all answers tells.

    Args:
        model: The model, FP32.
        packer: A packer for K image tokens.
        features: float32 [B, K, D], before the projector.
        questions: For each of the B pictures.

    Returns:
        For each picture and question.
    """
    projector = model.model.multi_modal_projector
    parts = [projector(features[start : start + 32]) for start in range(0, len(features), 32)]
    return right_with(model, packer, torch.cat(parts), questions)


@torch.no_grad()
def right_with(
    model: LlavaForConditionalGeneration,
    packer: dialogue.Packer,
    embeds: torch.Tensor,
    questions: Sequence[Sequence[scenes.Question]],
    where: tuple[npt.NDArray[np.int64], int] | None = None,
) -> list[list[bool]]:
    """As :func:`right_answers`, for pictures that went through the projector already.

    Args:
        model: The model, FP32.
        packer: A packer for K image tokens.
        embeds: float32 [B, K, L], what the language model gets; by place, if it has places.
        questions: For each of the B pictures.
        where: int64 [B, K], ascending: at which of the picture's places the rows stand; and how
            many places it has. None for consecutive positions.

    Returns:
        For each picture and question.
    """
    right: list[list[bool]] = []
    for start in range(0, len(questions), 32):
        asked = questions[start : start + 32]
        packed = packer.pack(asked, [True] * len(asked))
        if where is not None:
            places, span = where[0][start : start + 32], where[1]
            packed = dialogue.placed(packed, model.config.image_token_id, places, span)
        logits, targets = answer_logits(model, embeds[start : start + 32], packed)
        hits = np.zeros(packed.targets.shape, bool)
        hits[packed.targets >= 0] = (logits.argmax(-1) == targets).numpy()
        for row, turns in enumerate(asked):
            expected = packed.targets[row] >= 0
            right.append(
                [
                    bool(hits[row][expected & (packed.segments[row] == number)].all())
                    for number in range(1, len(turns) + 1)
                ]
            )
    return right


def by_kind(
    questions: Sequence[Sequence[scenes.Question]], right: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Share of right answers in all (``"all"``) and per kind of question."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for turns, answers in zip(questions, right, strict=True):
        for question, answer in zip(turns, answers, strict=True):
            hits["all"].append(answer)
            hits[question.kind].append(answer)
    return {
        kind: round(float(np.mean(hits[kind])), 4) for kind in ("all", *scenes.KINDS) if hits[kind]
    }


def evaluate(
    model: LlavaForConditionalGeneration, packer: dialogue.Packer, test: HeldOut
) -> dict[str, float]:
    """Accuracy with all tokens; see :func:`by_kind`."""
    model.eval()
    features = encode(model, test.pictures).hidden[:, 1:]
    return by_kind(test.questions, right_answers(model, packer, features, test.questions))


def split_budget(tokens: int) -> tuple[int, int]:
    """Dominant and contextual tokens of a budget, in the paper's ratio of 27 to 5."""
    dominant = round(tokens * 27 / 32)
    return dominant, tokens - dominant


def compressed(encoded: Encoded, tokens: int, merge: Merge, *, cls_token: bool) -> torch.Tensor:
    """VisionZip's tokens.

    Args:
        encoded: What the tower made of B pictures.
        tokens: K, split by :func:`split_budget`.
        merge: How the contextual tokens are merged.
        cls_token: Whether CLS is kept, as one of the dominant tokens.

    Returns:
        float32 [B, K, D].
    """
    dominant, contextual = split_budget(tokens)
    return visionzip.compress(
        encoded.hidden,
        encoded.keys,
        encoded.cls_attention,
        dominant=dominant,
        contextual=contextual,
        merge=merge,
        cls_token=cls_token,
    )[0]


def dominant_only(encoded: Encoded, tokens: int, *, cls_token: bool) -> torch.Tensor:
    """The whole budget spent on dominant tokens, [B, K, D] in spatial order."""
    patches = tokens - int(cls_token)
    scores = encoded.cls_attention.sum(1)[:, 1:]  # [B, N]
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :patches] + 1
    kept = best.sort(dim=1).values  # [B, patches]
    if cls_token:
        kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)
    return _take(encoded.hidden, kept)


def uniform_grid(encoded: Encoded, tokens: int) -> torch.Tensor:
    """Patches spread evenly over the picture in both directions, [B, K, D] in raster order."""
    side = int((encoded.hidden.shape[1] - 1) ** 0.5)
    kept = torch.tensor(grid_places(side, tokens)) + 1
    return _take(encoded.hidden, kept.expand(len(encoded.hidden), -1))


def grid_places(side: int, count: int) -> list[int]:
    """``count`` patches of a ``side`` × ``side`` grid, evenly spread in two dimensions.

    They stand in about √count evenly spaced rows of as equal numbers as possible, evenly spaced
    within each row.

    Returns:
        Raster indices, ascending.
    """
    rows = min(side, round(count**0.5))
    places = []
    for row in range(rows):
        across = (row + 1) * count // rows - row * count // rows
        top = int((row + 0.5) * side / rows)
        places += [top * side + int((column + 0.5) * side / across) for column in range(across)]
    return places


def random_patches(encoded: Encoded, tokens: int, seed: int) -> torch.Tensor:
    """Other random patches in every picture, [B, K, D] in raster order."""
    pictures, total = encoded.hidden.shape[0], encoded.hidden.shape[1] - 1
    rng = np.random.default_rng(seed)
    kept = [np.sort(rng.choice(total, tokens, replace=False)) + 1 for _ in range(pictures)]
    return _take(encoded.hidden, torch.from_numpy(np.stack(kept)))


def _take(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[B, S, D] and int64 [B, K] to [B, K, D]."""
    return hidden.gather(1, kept.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
