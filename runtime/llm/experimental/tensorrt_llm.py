"""Compressed tokens into TensorRT-LLM, by its three ways; not run against it.

* LLM API: `request` makes what ``LLM.generate`` takes; TensorRT-LLM expands each ``<image>`` of the
  text to as many places as its tensor has rows (_torch/models/modeling_llava_next.py,
  attach_multimodal_embeddings) and casts to the LLM's dtype (modeling_multimodal_utils.py).
* trtllm-serve: `TrtllmServer` sends ``image_embeds`` parts (serve/chat_utils.py; the tensor is read
  by ``torch.load(…, weights_only=True)``, inputs/utils.py).
* The legacy runtime: `prompt_table` makes what ``ModelRunner.generate`` and ModelRunnerCpp take
  (runtime/model_runner.py, runtime/model_runner_cpp.py).

The first two know LLaVA-NeXT alone of vzip's families. Sources: NVIDIA/TensorRT-LLM, 1.2 and newer
for the first two, 0.12 and newer for the last; what tests hold this module to stands in
`tests/golden/llm_requests.json`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vzip.runtime.errors import CheckpointError, InvalidInputError, missing
from vzip.runtime.llm.conversation import check_question
from vzip.runtime.llm.server.chat_server import ServerLLM
from vzip.runtime.llm.shown import Shown, TokenSpec
from vzip.runtime.llm.text_side import LARGEST, TextCheckpoint
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.shown import Embeds, Given

NAME: Final = "trtllm"

_FAMILY: Final = "llava-next"
_MODEL_TYPE: Final = "llava_next"


class TrtllmServer(ServerLLM):
    """A LLaVA-NeXT behind trtllm-serve; see `vzip.runtime.llm.server.chat_server.ServerLLM`."""

    name = NAME
    key_variable = "TRTLLM_API_KEY"

    def part(self, embeds: Embeds, uuid: str) -> dict[str, Any]:  # noqa: ARG002 - of others
        """Return the part of a message's content that shows one image."""
        return {"type": "image_embeds", "image_embeds": {"data": torch_base64(embeds)}}


def open_for(where: str, bundle: Bundle) -> TrtllmServer:
    """Open a server for a bundle's tokens; see `vzip.runtime.llm.opening`.

    Raises:
        InvalidInputError: The bundle is of another family than LLaVA-NeXT.
    """
    model = bundle.manifest.model
    tokens = TokenSpec.of(bundle.manifest)
    if model.family != _FAMILY:
        raise _unknown(model.id, model.family)
    _torch()  # tensors are sent as torch writes them: said before the server is asked
    return TrtllmServer(where, tokens)


def request(
    checkpoint: TextCheckpoint,
    embeds: Given | Sequence[Given],
    question: str,
    *,
    frames: int | None = None,
) -> dict[str, Any]:
    """Return one prompt for ``tensorrt_llm.LLM.generate``.

    Args:
        checkpoint: The text side of the LLM's checkpoint, opened under `NAME`.
        embeds: The tokens of an image, several, or a video, whose frames follow as images.
        question: The question, without any prompt around it.
        frames: The video's frames; ``None`` for images.

    Returns:
        ``prompt``, a text with one placeholder for each image, and ``multi_modal_embeddings``,
        ``{"image": [torch.Tensor [n, L], …]}`` of the caller's dtype.

    Raises:
        InvalidInputError: The checkpoint is no LLaVA-NeXT; or something is wrong with the tokens or
            the question.
        MissingDependencyError: torch is not installed.
    """
    files = checkpoint.files
    if files.config.model_type != _MODEL_TYPE:
        raise _unknown(files.model, files.config.model_type)
    torch = _torch()
    check_question(NAME, question)
    shown = checkpoint.shown(embeds, frames, largest=LARGEST[checkpoint.dtype], takes_videos=False)
    return {
        "prompt": _text(checkpoint, shown, question.strip()),
        "multi_modal_embeddings": {"image": [torch.from_numpy(part) for part in shown.parts]},
    }


def prompt_table(
    checkpoint: TextCheckpoint,
    embeds: Given | Sequence[Given],
    question: str,
    *,
    vocab_size: int,
    max_multimodal_len: int,
    dtype: str,
    frames: int | None = None,
) -> dict[str, Any]:
    """Return what the legacy ``ModelRunner.generate`` takes for one question, but for its length.

    An image's places have ids beyond the vocabulary, which count through the rows of a table. The
    table is three-dimensional, one entry per task: ModelRunner takes that and [ΣK, L] alike,
    ModelRunnerCpp takes ``prompt_table[task]``, which of [ΣK, L] would be a single row.

    Args:
        checkpoint: The text side of the LLM's checkpoint, opened under `NAME`.
        embeds: The tokens of an image, several, or a video, whose frames follow as images.
        question: The question, without any prompt around it.
        vocab_size: The engine's, ``runner.vocab_size``.
        max_multimodal_len: What ``trtllm-build`` was given; ``runner``'s
            max_prompt_embedding_table_size. The engine drops all images where it is 0.
        dtype: The engine's: ``float16``, ``bfloat16`` or ``float32``.
        frames: The video's frames; ``None`` for images.

    Returns:
        ``batch_input_ids`` [int32 [m]], ``prompt_table`` [1, ΣK, L] of `dtype`, ``prompt_tasks``
        (``"0"``), ``end_id`` and ``pad_id``.

    Raises:
        InvalidInputError: The table is too small or the vocabulary another one's; or something is
            wrong with the tokens or the question.
        MissingDependencyError: torch is not installed.
    """
    if dtype not in LARGEST:
        raise InvalidInputError(
            f"{NAME}: got the dtype {dtype!r}",
            expected=f"the engine's, one of {', '.join(LARGEST)}",
        )
    torch = _torch()
    shown = checkpoint.shown(embeds, frames, largest=LARGEST[dtype], takes_videos=False)
    check_question(NAME, question)
    ids = checkpoint.first(shown, question)
    total = sum(len(part) for part in shown.parts)
    if total > max_multimodal_len:
        raise InvalidInputError(
            f"{NAME}: got {counted(total, 'token')} of {counted(len(shown.parts), 'image')}",
            expected=f"at most {max_multimodal_len}, the rows of the engine's prompt table",
            cure=f"build it with trtllm-build --max_multimodal_len {total} or more",
        )
    placeholder = checkpoint.prompts.placeholders[shown.kind]
    words = [each for each in ids if each != placeholder]
    if max(words) >= vocab_size:
        raise InvalidInputError(
            f"{NAME}: got a prompt with the id {max(words)} and a vocabulary of {vocab_size}",
            cause="ids beyond the vocabulary are places of images",
            cure="give the engine's vocabulary size (runner.vocab_size), and the checkpoint that "
            "it was built from",
        )
    places = iter(range(vocab_size, vocab_size + total))
    fake = [next(places) if each == placeholder else each for each in ids]
    rows = torch.cat([torch.from_numpy(part) for part in shown.parts])  # [ΣK, L]
    return {
        "batch_input_ids": [torch.tensor(fake, dtype=torch.int32)],
        "prompt_table": rows.to(getattr(torch, dtype))[None],  # [1, ΣK, L]
        "prompt_tasks": "0",
        "end_id": checkpoint.prompts.eos_id,
        "pad_id": checkpoint.prompts.eos_id,
    }


def torch_base64(embeds: Embeds) -> str:
    """Return a tensor as trtllm-serve reads it: ``torch.save``'s bytes in base64.

    Args:
        embeds: float32 or float16 [n, L].

    Raises:
        MissingDependencyError: torch is not installed.
    """
    torch = _torch()
    data = io.BytesIO()
    torch.save(torch.tensor(embeds), data)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _text(checkpoint: TextCheckpoint, shown: Shown, question: str) -> str:
    """Return the first turn as text, without what a tokenizer puts in front.

    Raises:
        CheckpointError: The LLM's words have no place for what is shown.
        InvalidInputError: The question contains a placeholder.
    """
    prompts, tokenizer = checkpoint.prompts, checkpoint.prompts.tokenizer
    ids = checkpoint.first(shown, question, expands=False)
    text = prompts.first_text(question, shown.kind, len(shown.parts))
    # A template may write the beginning-of-sequence token that the tokenizer writes too.
    for each in (text, text.removeprefix(tokenizer.bos or "")):
        if tokenizer.encode(each, special=True) == ids:
            return each
    raise CheckpointError(
        f"{NAME}: the tokenizer of {checkpoint.files.model!r} makes other ids of a prompt than of "
        "its parts",
        cause="the prompt can't be given as text",
        cure="use another LLM (--llm)",
    )


def _unknown(model: str, family: str) -> InvalidInputError:
    return InvalidInputError(
        f"{NAME}: {model!r} is a {family!r} model",
        expected="a LLaVA-NeXT, of vzip's families the only one that TensorRT-LLM's PyTorch "
        "backend knows",
        cure="use a bundle of one, such as llava-next-mistral-7b, TensorRT-LLM's legacy runtime "
        "(vzip.runtime.llm.experimental.tensorrt_llm.prompt_table), or another LLM (--llm)",
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise missing("torch", needed_for=f"{NAME}: making tensors", extra="export") from error
    return torch
