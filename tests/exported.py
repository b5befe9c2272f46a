"""The golden bundles' twins that `vzip export` made, for backends that take no others.

They have the golden bundles' interfaces, sizes and budgets, and a transformer for a tower. What
they must compute comes from the untouched upstream modules and the slow oracle, which share no code
with the module that is traced.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vzip.export.algorithm import oracle
from vzip.export.algorithm.budget import Budget
from vzip.export.architecture import ProjectorConfig, TowerConfig, VisionConfig
from vzip.export.checkpoint.random_weights import random_vision
from vzip.export.checkpoint.weights import VisionWeights
from vzip.export.graph.trace import GraphOptions
from vzip.export.parity.reference import projector, tower_features
from vzip.export.pipeline import export_bundle
from vzip.runtime.bundle.origin import Model
from vzip.runtime.pictures.preprocess import Preprocessing

SIDE, PATCH, WIDTH, HIDDEN, DOMINANT, CONTEXTUAL = 16, 4, 16, 6, 4, 3
POSITIONS = "tower.embeddings.position_embedding.weight"
CONFIG = VisionConfig(
    family="llava",
    tower=TowerConfig("clip", SIDE, PATCH, WIDTH, 32, 2, 2, "quick_gelu", 1e-5),
    projector=ProjectorConfig(WIDTH, HIDDEN, HIDDEN, "gelu", bias=True),
    feature_layers=(-1,),
    image_token_id=7,
    preprocessing=Preprocessing(
        image_size=SIDE,
        mode="resize_crop",
        shortest_edge=SIDE,
        resample="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        rescale_factor=1 / 255,
    ),
)


@functools.cache
def weights() -> VisionWeights:
    """Return the weights, which FP16 holds; all patches have one position, so that they can tie."""
    drawn = random_vision(CONFIG, seed=20261128, dtype=torch.float16)
    positions = drawn.tensors[POSITIONS].clone()
    positions[1:] = positions[1]
    return VisionWeights(CONFIG, {**drawn.tensors, POSITIONS: positions})


class Source:
    """What `export_bundle` asks of a `WeightSource`."""

    model, revision = "tests/exported", None

    def load(self) -> tuple[VisionWeights, Model]:
        """Return the weights, and what the manifest says of them."""
        return weights(), Model("tests/exported", None, "llava", "random", 20261128)


@functools.cache
def bundles() -> Path:
    """Return a folder with `tiny_bundle` and `tiny_static_bundle`."""
    folder = Path(tempfile.mkdtemp(prefix="vzip-exported-"))
    source: Any = Source()
    for name, precision, options in (
        ("tiny_bundle", "fp32", GraphOptions("image", 3, dynamic_batch=True)),
        ("tiny_static_bundle", "fp16", GraphOptions("pixel_values", 2, opset=17)),
    ):
        budget = Budget(DOMINANT, CONTEXTUAL)
        export_bundle(source, folder / name, budget=budget, precision=precision,
                      options=options, check_images=(), step=lambda _: None)  # fmt: skip
    return folder


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """Return five inputs and what they become, as `tiny_golden.npz` has them."""
    project, rng = projector(weights()), np.random.default_rng(1)
    images, embeds, kept, groups = [], [], [], []
    while len(images) < 5:
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        (seen,) = tower_features(weights(), [image])
        ranked = np.sort(seen.scores[0])[::-1]
        rows, chosen = oracle.compress(
            seen.hidden, seen.keys, seen.scores,
            dominant=DOMINANT, contextual=CONTEXTUAL, merge="average", cls_token=True,
        )  # fmt: skip
        rest = [token for token in range(seen.hidden.shape[1]) if token not in chosen[0]]
        members = oracle.group(seen.keys[0], rest, CONTEXTUAL)
        # An input whose selection or merge FP16 could change proves nothing.
        if ranked[DOMINANT - 2] - ranked[DOMINANT - 1] < 0.01 or any(
            _lead(seen.keys[0], token, list(members)) < 0.01 for token in rest
        ):
            continue
        group = np.full(seen.hidden.shape[1], -1)
        for place, (target, merged) in enumerate(members.items()):
            group[[target, *merged]] = place
        images.append(image)
        with torch.no_grad():
            embeds.append(project(torch.from_numpy(rows).float())[0].double().numpy())
        kept.append(chosen[0])
        groups.append(group)
    stacked = np.stack(images)
    pixels = (stacked.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    return {
        "images": stacked,
        "pixel_values": pixels,
        "embeds": np.stack(embeds),
        "kept": np.array(kept, np.int64),
        "groups": np.array(groups, np.int64),
    }


def _lead(keys: np.ndarray, token: int, targets: list[int]) -> float:
    """Return by how much a token's best target is ahead of the second best."""
    *_, second, best = sorted(oracle.cosine(keys, token, target) for target in targets)
    return best - second
