"""The demo model's accuracy: the only one that can be had without a data set and a large LLM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from vzip.calibration.demo import accuracy, dialogue
from vzip.calibration.demo.digits import require_digits
from vzip.export.algorithm import visionzip
from vzip.export.algorithm.budget import Budget
from vzip.runtime import demo
from vzip.runtime.console import loading_quietly
from vzip.runtime.tokens.positions import Places, by_place

SEED: Final = 90210
"""Of the scenes: one that training never saw, that of `benchmarks/demo_accuracy.py`."""

SCENES: Final = 150

NEEDED_FOR: Final = "the accuracy on the demo's questions"

Array = NDArray[Any]


@dataclass(frozen=True)
class Accuracy:
    """Share of questions that get exactly the right answer.

    Attributes:
        share: From 0 to 1.
        questions: How many were asked.
    """

    share: float
    questions: int

    @property
    def error(self) -> float:
        """Standard error of the share, as if questions were independent."""
        return math.sqrt(self.share * (1 - self.share) / self.questions)


class DemoQuestions:
    """Scenes with digits that the demo model never saw, questions about them, and its LLM.

    Args:
        seed: Of the scenes and the questions.
        scenes: How many.

    Raises:
        MissingDependencyError: The digits come from scikit-learn.
    """

    def __init__(self, seed: int = SEED, scenes: int = SCENES) -> None:
        require_digits(NEEDED_FOR)
        import transformers

        folder = demo.checkpoint()
        with loading_quietly():
            self._model = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False
            ).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        self._test = accuracy.held_out(seed, scenes, self._model.config.vision_config.image_size)
        self.seed = seed

    @property
    def pictures(self) -> NDArray[np.uint8]:
        """uint8 [B, side, side, 3], at the tower's resolution."""
        return self._test.pictures

    @cached_property
    def _encoded(self) -> accuracy.Encoded:
        """What the tower makes of them: once for all budgets."""
        return accuracy.encode(self._model, self.pictures)

    def uncompressed(self) -> Accuracy:
        """Return the accuracy with all patches."""
        return self._with_features(self._encoded.hidden[:, 1:])

    def compressed(self, budget: Budget) -> Accuracy:
        """Return the accuracy with VisionZip's tokens."""
        tokens, _ = visionzip.compress(
            self._encoded.hidden,
            self._encoded.keys,
            self._encoded.cls_attention,
            dominant=budget.dominant,
            contextual=budget.contextual,
            merge=budget.merge,
            cls_token=budget.cls_token,
        )
        return self._with_features(tokens)

    def answered(self, embeds: Array, where: Sequence[Places] | None = None) -> Accuracy:
        """Return the accuracy with what an encoder made of `pictures`.

        Args:
            embeds: [B, K, L], any floating dtype, in the bundle's order.
            where: Of each picture, for original positions; None for consecutive ones.
        """
        placed = None
        if where is not None:
            orders = np.stack([by_place(each) for each in where])[..., None]  # [B, K, 1]
            places = np.stack([np.array(each.places) for each in where])
            embeds = np.take_along_axis(embeds, orders, axis=1)
            placed = np.take_along_axis(places, orders[..., 0], axis=1), where[0].span or 0
        tokens = torch.from_numpy(np.ascontiguousarray(embeds, np.float32))
        packer = self._packer(tokens.shape[1])
        asked = self._test.questions
        return self._share(accuracy.right_with(self._model, packer, tokens, asked, placed))

    def to_json(self) -> Mapping[str, int]:
        """Return what was asked."""
        count = sum(map(len, self._test.questions))
        return {"seed": self.seed, "scenes": len(self.pictures), "questions": count}

    def _with_features(self, tokens: torch.Tensor) -> Accuracy:
        packer = self._packer(tokens.shape[1])
        asked = self._test.questions
        return self._share(accuracy.right_answers(self._model, packer, tokens, asked))

    def _packer(self, count: int) -> dialogue.Packer:
        return dialogue.Packer(self._tokenizer, self._model.config.image_token_id, count)

    def _share(self, right: list[list[bool]]) -> Accuracy:
        every = [answer for answers in right for answer in answers]
        return Accuracy(float(np.mean(every)), len(every))
