"""Compressed tokens into vLLM: a running server, or `vllm.LLM` in this process.

An image's tokens are an embedding input of vLLM, which stands for one placeholder in the prompt and
which vLLM expands to as many as there are rows. vLLM must have been told to take such inputs
(``--enable-mm-embeds``; `enable_mm_embeds=True`), and needs no vision tower for them.

Images of different row counts must never meet in one batch: vLLM 0.32 checks that only after it has
put the batch together, and the exception ends the engine with all requests in it
(`TensorSchema` of ``vllm/utils/tensor_schema.py``; seen on a CPU). Here that is checked within a
conversation and a batch; `docs/llm/vllm.md` says what to do about other clients.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import BackendError, InvalidInputError
from vzip.runtime.llm import (
    DEFAULT_MAX_NEW_TOKENS,
    LLM,
    Conversation,
    ImageTokens,
    Shown,
    check_context,
    check_max_new_tokens,
    check_question,
)
from vzip.runtime.llm.server.chat_server import ServerConversation, ServerLLM
from vzip.runtime.llm.text_checkpoint import TextCheckpoint

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm import Embeds
    from vzip.runtime.llm.server.chat_server import Message

NAME: Final = "vllm"
KEY_VARIABLE: Final = "VLLM_API_KEY"
"""Environment variable of the API key; vLLM's server reads its own from the same."""


_IMAGE: Final = "<image>"  # `get_placeholder_str` of all LLaVAs in vllm/model_executor/models


class VllmServer(ServerLLM):
    """An LLM behind vLLM's OpenAI-compatible server.

    Beyond what `ServerLLM` asks, the server's tokenizer is asked whether its image token is the
    bundle's, and whether its chat template writes the beginning-of-sequence token. Where it does
    not, vLLM leaves that out of a chat, but LLaVA-1.5 was trained with it.
    """

    name = NAME
    key_variable = KEY_VARIABLE

    def __init__(self, url: str, tokens: ImageTokens, *, model: str | None = None) -> None:
        super().__init__(url, tokens, model=model)
        token = self._ids({"prompt": _IMAGE, "add_special_tokens": True})
        if not token or token[-1] != tokens.image_token_id:
            raise InvalidInputError(
                f"{NAME}: the bundle's image token id is {tokens.image_token_id}, but the LLM "
                f"{self.model!r} at {self.url} makes {token} of {_IMAGE!r}",
                cure="serve the LLM of the checkpoint that the bundle was exported from",
            )
        start = token[:-1]
        chat = self._ids(
            {"messages": [{"role": "user", "content": "?"}], "add_special_tokens": False}
        )
        self._add_special_tokens = chat[: len(start)] != start

    def _ids(self, text: dict[str, Any]) -> list[int]:
        """Return what the server's tokenizer makes of a text or a chat."""
        answer = self.client.call("/tokenize", {"model": self.model, **text})
        try:
            return [int(each) for each in answer["tokens"]]
        except (TypeError, KeyError, ValueError) as error:
            raise BackendError(
                f"{NAME}: {self.url}/tokenize answered {str(answer)[:80]!r}",
                expected="'tokens'",
                cause="it is no vLLM server, or a proxy changed the answer",
            ) from error

    def request(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, Any]:
        """Return a request's body; see `ServerLLM.request`."""
        body = super().request(messages, max_new_tokens)
        return body | {"add_special_tokens": self._add_special_tokens}

    def part(self, embeds: Embeds, uuid: str) -> dict[str, Any]:
        """Return an ``image_embeds`` part: base64 of the .npy form of [n, L], C order.

        vLLM tells it from torch.save by its first bytes (``vllm/multimodal/media/image.py``), and
        casts it to the LLM's dtype. Under `uuid` it finds the image in its caches.
        """
        return {"type": "image_embeds", "image_embeds": _base64_npy(embeds), "uuid": uuid}

    def conversation(
        self, embeds: Embeds | Sequence[Embeds], *, frames: int | None = None
    ) -> ServerConversation:
        """Begin a conversation; a video's frames are images that follow each other.

        See `LLM.conversation`; several images have as many rows.
        """
        conversation = super().conversation(embeds, frames=frames)
        _check_rows([conversation.shown])
        return conversation


def open_llm(where: str, bundle: Bundle) -> VllmServer:
    """Open a server for a bundle's tokens; see `vzip.runtime.llm.programs`."""
    return VllmServer(where, ImageTokens.of(bundle.manifest))


class VllmLLM(LLM):
    """A `vllm.LLM` in this process.

    A conversation sends the ids of all turns with every question, and vLLM's prefix cache spares
    it the work. vLLM gives an answer when it is whole, so that `stream` yields one piece.

    Args:
        llm: The engine: ``vllm.LLM(model, enable_mm_embeds=True, …)``.
        tokens: What the bundle says about its tokens, from `ImageTokens.of`; None to take any
            number.

    Attributes:
        llm: As given.
        text: The text side of the checkpoint that the engine runs.
        context: Longest sequence in tokens.

    Raises:
        InvalidInputError: The engine doesn't take embeddings, or the bundle's tokens are not made
            for its LLM.
        CheckpointError: It runs no LLaVA.
    """

    name = NAME

    def __init__(self, llm: Any, *, tokens: ImageTokens | None = None) -> None:
        config = llm.llm_engine.model_config
        settings = config.multimodal_config
        if settings is None or not settings.enable_mm_embeds:
            raise InvalidInputError(
                f"{NAME}: this engine takes no embeddings",
                cure="open it with vllm.LLM(…, enable_mm_embeds=True)",
            )
        self.llm = llm
        self.text = TextCheckpoint.open(NAME, config.model, tokens=tokens, revision=config.revision)
        self.context = int(config.max_model_len)
        self._dtype = str(config.dtype).removeprefix("torch.")

    def conversation(
        self, embeds: Embeds | Sequence[Embeds], *, frames: int | None = None
    ) -> VllmConversation:
        """Begin a conversation; a video's frames are images that follow each other.

        See `LLM.conversation`; several images have as many rows.
        """
        shown = self._shown(embeds, frames)
        _check_rows([shown])
        return VllmConversation(self, shown)

    def generation_input(
        self, embeds: Embeds | Sequence[Embeds], question: str, *, frames: int | None = None
    ) -> dict[str, Any]:
        """Return one prompt for `vllm.LLM.generate`: a first question and what it is about.

        Args:
            embeds: As for `conversation`.
            question: The question, without any prompt around it.
            frames: Frames of a video; ``None`` for images.

        Returns:
            ``prompt_token_ids``, with one placeholder for each image, and ``multi_modal_data``
            with torch tensors [n, L] of the embeds' dtype.

        Raises:
            InvalidInputError: Something is wrong with one of them.
        """
        shown = self._shown(embeds, frames)
        return _input(self.text.first(shown, question), shown)

    def ask_batch(
        self,
        embeds: Sequence[Embeds | Sequence[Embeds]],
        questions: Sequence[str],
        *,
        frames: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> list[str]:
        """Answer questions about as many images in one batch, greedily.

        Args:
            embeds: For each question what `conversation` takes; all images have as many rows.
            questions: As many, without any prompt around them.
            frames: Frames of each video; ``None`` for images.
            max_new_tokens: Longest answer, in tokens.

        Returns:
            The answers, without white space around them.

        Raises:
            InvalidInputError: Not as many questions as embeds, none at all, or one of them is
                wrong or does not fit into the LLM's context.
            BackendError: vLLM failed.
        """
        check_max_new_tokens(NAME, max_new_tokens)
        if len(embeds) != len(questions) or not questions:
            raise InvalidInputError(
                f"{NAME}: got {len(embeds)} images' tokens and {len(questions)} questions",
                cause="it takes as many of both, 1 or more",
            )
        shown = [self._shown(each, frames) for each in embeds]
        _check_rows(shown)
        prompts = [self.text.first(s, q) for s, q in zip(shown, questions, strict=True)]
        pairs = list(zip(prompts, shown, strict=True))
        for ids, each in pairs:
            self.check_length(ids, each, max_new_tokens)
        made = self.generate(pairs, max_new_tokens)
        return [self.text.prompts.decode(self.spoken(ids)) for ids in made]

    def generate(
        self, prompts: Sequence[tuple[list[int], Shown]], max_new_tokens: int
    ) -> list[list[int]]:
        """Return the ids that follow each prompt, the one that ends an answer included."""
        import vllm

        greedy = vllm.SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(self.text.eos_ids)
        )
        inputs = [_input(ids, shown) for ids, shown in prompts]
        try:
            results = self.llm.generate(inputs, greedy, use_tqdm=False)
        except (RuntimeError, ValueError) as error:  # EngineDeadError is a RuntimeError too
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"{NAME}: the engine failed ({words})",
                cure="see its log, and open a new engine if this one has ended",
            ) from error
        return [list(result.outputs[0].token_ids) for result in results]

    def spoken(self, ids: list[int]) -> list[int]:
        """Return an answer's ids without the one that ends it."""
        return ids[:-1] if ids and ids[-1] in self.text.eos_ids else ids

    def check_length(self, ids: list[int], shown: Shown, max_new_tokens: int) -> None:
        """Check that a prompt, its images' rows and the longest answer fit into the context."""
        rows = sum(len(part) - 1 for part in shown.parts)  # one placeholder is in the prompt
        check_context(
            NAME,
            cached=0,
            new=len(ids) + rows,
            max_new_tokens=max_new_tokens,
            context=self.context,
        )

    def _shown(self, embeds: Embeds | Sequence[Embeds], frames: int | None) -> Shown:
        if frames is not None and "video" in self.text.prompts.placeholders:
            raise InvalidInputError(
                f"{NAME}: got a video's tokens, which this LLM takes at a placeholder for "
                "videos, but vLLM's class of it takes embeddings of images only",
                cure="ask about frames as images, or use transformers for videos",
            )
        return self.text.shown(embeds, frames, dtype=self._dtype, takes_videos=False)


class VllmConversation(Conversation):
    """Questions to a `vllm.LLM` about images.

    Each prompt is the ids of all turns, answers as the LLM gave them, closed by an end-of-sequence
    token where `max_new_tokens` cut them short. A turn whose answer failed or was never read does
    not count.

    Made by `VllmLLM.conversation`.
    """

    def __init__(self, llm: VllmLLM, shown: Shown) -> None:
        self._llm, self._shown = llm, shown
        self._ids: list[int] = []

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all turns so far, with one placeholder for each image."""
        return tuple(self._ids)

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Ask the next question; the LLM runs when its answer is taken, which is one piece.

        Args:
            question: The question, without any prompt around it.
            max_new_tokens: Longest answer, in tokens.

        Raises:
            InvalidInputError: The question is empty, contains a placeholder, or does not fit into
                the LLM's context with the turns before it.
            BackendError: (From the iterator.) vLLM failed.
        """
        check_question(NAME, question)
        check_max_new_tokens(NAME, max_new_tokens)
        text, before = self._llm.text, self._ids
        if before:
            ids = [*before, *text.prompts.later(question.strip())]
        else:
            ids = text.first(self._shown, question)
        self._llm.check_length(ids, self._shown, max_new_tokens)
        return self._answer(before, ids, max_new_tokens)

    def _answer(self, before: list[int], ids: list[int], max_new_tokens: int) -> Iterator[str]:
        if self._ids is not before:
            raise InvalidInputError(
                f"{NAME}: this answer was left behind by a later question of the same conversation",
                cure="read an answer to its end before asking on",
            )
        ((*made,),) = self._llm.generate([(ids, self._shown)], max_new_tokens)
        spoken = self._llm.spoken(made)
        end = made[len(spoken) :] or [self._llm.text.prompts.eos_id]
        self._ids = [*ids, *spoken, *end]
        answer = self._llm.text.prompts.decode(spoken)
        if answer:
            yield answer


def _input(ids: list[int], shown: Shown) -> dict[str, Any]:
    """Return one prompt for `vllm.LLM.generate`."""
    import torch

    # A list of [n, L]: vLLM takes no bare 2-D tensor for an embedding.
    images = [torch.from_numpy(np.ascontiguousarray(part)) for part in shown.parts]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


def _check_rows(shown: Sequence[Shown]) -> None:
    """Refuse images of different row counts, which would end the engine.

    Raises:
        InvalidInputError: They have.
    """
    rows = sorted({len(part) for each in shown for part in each.parts})
    if len(rows) > 1:
        raise InvalidInputError(
            f"{NAME}: got images of {', '.join(map(str, rows))} tokens at once, but vLLM takes "
            "as many of each in a batch, and ends when they differ",
            cure="ask about one image at a time, or about images of one size",
        )


def _base64_npy(embeds: Embeds) -> str:
    """Return the .npy form of an array, C order, as base64."""
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(embeds), allow_pickle=False)
    return base64.b64encode(data.getvalue()).decode("ascii")
