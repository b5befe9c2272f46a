"""Where a bundle's weights came from; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vzip.runtime.files.codec import OPTIONAL, Index, Record, Sha256, Text

Weights = Literal["checkpoint", "random", "random-outliers"]


@dataclass(frozen=True)
class Model(Record):
    """Where the weights came from.

    Attributes:
        id: ``demo``, a hub id, or the absolute path of a local folder.
        revision: Commit hash on the hub; None for a local folder or random weights.
        family: Name of the checkpoint family that read it, such as ``llava``.
        weights: ``checkpoint``; ``random`` for an architecture without its weights, or
            ``random-outliers``, the same with outliers and attention sinks planted.
        seed: Seed of random weights; None for those of a checkpoint.
        projector: SHA-256 of the file with a tuned projector; None for the model's own.
        dequantised: The scheme that weights of tower or projector were quantised by in the
            checkpoint, and were made whole from; None where all were whole.
        vision_tower: Hub id or absolute path of the tower's checkpoint, where the export was given
            one; None where the model's own configuration says it.
    """

    id: Text
    revision: Text | None
    family: Text
    weights: Weights
    seed: Index | None
    projector: Sha256 | None = None
    dequantised: Text | None = field(default=None, metadata=OPTIONAL)
    vision_tower: Text | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        random = self.weights != "checkpoint"
        if random != (self.seed is not None):
            raise self.misfit(
                "seed", "an integer at least 0" if random else "null, since weights aren't random"
            )
