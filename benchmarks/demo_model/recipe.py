"""How the demo model is trained: batches, steps and rates."""

from __future__ import annotations

import dataclasses


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
