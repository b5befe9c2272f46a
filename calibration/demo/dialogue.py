"""Questions as token ids: LLaVA-1.5's prompt, several questions to one picture in one sequence."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from vzip.calibration.demo.scenes import Question

    Ints = npt.NDArray[np.int64]

BEFORE_IMAGE = "USER: "
FIRST_TURN = "\n{question} ASSISTANT:"
LATER_TURN = "USER: {question} ASSISTANT:"


@dataclasses.dataclass(frozen=True)
class PackedTurns:
    """Questions to B pictures as one batch of sequences of T tokens.

    Attributes:
        ids: int64 [B, T]; the image token where the picture's tokens go.
        positions: int64 [B, T], rotary positions.
        segments: int64 [B, T]; 0 is what all questions share (the beginning and the picture),
            1, 2, … the questions with their answers, -1 padding.
        targets: int64 [B, T]; the id to be predicted *after* this token inside an answer and
            at its end, -100 elsewhere.
        apart: bool [B]; True where every question sees only segment 0 and itself, exactly as
            if it were asked alone; False where it sees all turns before it.
    """

    ids: Ints
    positions: Ints
    segments: Ints
    targets: Ints
    apart: npt.NDArray[np.bool_]


class Packer:
    """Turns questions into token ids.

    Args:
        tokenizer: The demo model's tokenizer.
        image_token_id: Id that stands for one token of the picture.
        image_tokens: How many tokens the picture has.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, image_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self._eos = int(tokenizer.eos_token_id)
        self._pad = int(tokenizer.pad_token_id)
        bos = [int(tokenizer.bos_token_id)]
        self._prefix = bos + self._encode(BEFORE_IMAGE) + [image_token_id] * image_tokens

    def pack(self, dialogues: Sequence[Sequence[Question]], apart: Sequence[bool]) -> PackedTurns:
        """Pack the questions to each picture into one sequence.

        Args:
            dialogues: For each of B pictures its questions, in the order they are asked.
            apart: For each picture whether its questions are independent of each other.
        """
        rows = [
            self._row(questions, alone) for questions, alone in zip(dialogues, apart, strict=True)
        ]
        # A multiple of 16 keeps the number of different shapes small.
        length = -(-max(len(row[0]) for row in rows) // 16) * 16
        fills = (self._pad, 0, -1, -100)
        columns = [
            np.stack([np.array(row[part] + [fill] * (length - len(row[part]))) for row in rows])
            for part, fill in enumerate(fills)
        ]
        ids, positions, segments, targets = columns
        return PackedTurns(ids, positions, segments, targets, np.array(apart, bool))

    def _row(
        self, questions: Sequence[Question], apart: bool
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        shared = len(self._prefix)
        ids, positions = list(self._prefix), list(range(shared))
        segments, targets = [0] * shared, [-100] * shared
        for number, question in enumerate(questions, start=1):
            wording = FIRST_TURN if apart or number == 1 else LATER_TURN
            asked = self._encode(wording.format(question=question.text))
            answered = [*self._encode(" " + question.answer), self._eos]
            start = shared if apart else len(ids)
            turn = asked + answered
            ids += turn
            positions += range(start, start + len(turn))
            segments += [number] * len(turn)
            targets += [-100] * (len(asked) - 1) + answered + [-100]
        return ids, positions, segments, targets

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]


def placed(
    packed: PackedTurns, image_token_id: int, places: npt.NDArray[np.int64], span: int
) -> PackedTurns:
    """Give a picture's tokens their own places, and what follows the positions behind its span.

    Args:
        packed: The questions, with K image tokens each, all at the same columns.
        image_token_id: Id that stands for one token of the picture.
        places: int64 [B, K].
        span: How many places a picture has.
    """
    image = packed.ids == image_token_id
    start, count = int(image[0].argmax()), places.shape[1]
    behind = np.arange(packed.ids.shape[1]) >= start + count
    positions = packed.positions + behind * (span - count)
    positions[:, start : start + count] = start + places
    return dataclasses.replace(packed, positions=positions)
