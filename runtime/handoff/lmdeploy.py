"""Compressed tokens into LMDeploy's TurboMind, at its lowest level; not run against the engine.

TurboMind writes embeddings over ranges of a prompt's ids (lmdeploy/turbomind/turbomind.py,
TurboMindInstance.prepare_inputs, of 0.18.0). LMDeploy's own LLaVA runs on its PyTorch engine alone,
and TurboMind knows no LLaVA (turbomind/supported_models.py): what it runs is the LLM alone, as
LlamaForCausalLM or Qwen2ForCausalLM; `docs/engines/lmdeploy.md` says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.errors import InvalidInputError, missing

if TYPE_CHECKING:
    from vzip.runtime.handoff import Embeds
    from vzip.runtime.handoff.text_checkpoint import TextCheckpoint

NAME: Final = "lmdeploy"

# Of TurboMindInstance.prepare_embeddings, which casts to the engine's.
_DTYPES: Final = ("float16", "bfloat16")

# Looked up before it is overwritten, so it must be a row of the LLM's table: LLaVA-NeXT's own
# placeholder need not be one.
_DUMMY: Final = 0


def stream_infer_inputs(
    checkpoint: TextCheckpoint,
    embeds: Embeds | Sequence[Embeds],
    question: str,
    *,
    dtype: str,
    frames: int | None = None,
) -> dict[str, Any]:
    """Return the prompt's arguments of ``TurboMindInstance.async_stream_infer``.

    Args:
        checkpoint: The text side of the LLM's checkpoint, opened for the engine `NAME`.
        embeds: The tokens of an image, several, or a video.
        question: The question, without any prompt around it.
        dtype: The engine's: ``float16`` or ``bfloat16``.
        frames: The video's frames; ``None`` for images.

    Returns:
        ``input_ids``, a list with a dummy id for each row; ``input_embeddings``, a list of tensors
        [K, L] of the caller's dtype, which TurboMind casts; ``input_embedding_ranges``, a list of
        their places ``[begin, end]``, the end excluded.

    Raises:
        InvalidInputError: The dtype is none of TurboMind's; or something is wrong with the tokens
            or the question.
        CheckpointError: The LLM's words have no place for what is shown.
        MissingDependencyError: torch is not installed.
    """
    if dtype not in _DTYPES:
        raise InvalidInputError(
            f"{NAME}: got the dtype {dtype!r}, expected that of TurboMind's engine, one of "
            f"{', '.join(_DTYPES)}"
        )
    try:
        import torch
    except ImportError as error:
        raise missing("torch", needed_for=f"{NAME}: making tensors", extra="export") from error
    shown = checkpoint.shown(embeds, frames, dtype=dtype, takes_videos=True)
    placeholder = checkpoint.prompts.placeholders[shown.kind]
    ids: list[int] = []
    ranges: list[list[int]] = []
    parts = iter(shown.parts)
    for token in checkpoint.first(shown, question):
        if token == placeholder:
            begin = len(ids)
            ids += [_DUMMY] * len(next(parts))
            ranges.append([begin, len(ids)])
        else:
            ids.append(token)
    return {
        "input_ids": ids,
        "input_embeddings": [torch.from_numpy(part) for part in shown.parts],
        "input_embedding_ranges": ranges,
    }
