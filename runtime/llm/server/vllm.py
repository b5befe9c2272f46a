"""Compressed tokens into vLLM: a running server, or `vllm.LLM` in this process.

An image's tokens are an embedding input of vLLM, which stands for one placeholder in the prompt and
which vLLM expands to as many as there are rows. vLLM must have been told to take such inputs
(``--enable-mm-embeds``; `enable_mm_embeds=True`), and needs no vision tower for them.

Images of different row counts must never meet in one batch: vLLM 0.32 checks that only after it has
put the batch together, and the exception ends vLLM with all requests in it
(`TensorSchema` of ``vllm/utils/tensor_schema.py``; seen on a CPU). Here that is checked within a
conversation and a batch; `docs/llm/vllm.md` says what to do about other clients.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import BackendError, InvalidInputError, first_line
from vzip.runtime.llm.contract import DEFAULT_MAX_NEW_TOKENS, LLM
from vzip.runtime.llm.conversation import (
    TokenConversation,
    check_context,
    check_max_new_tokens,
    check_question,
)
from vzip.runtime.llm.server.chat_server import ServerConversation, ServerLLM
from vzip.runtime.llm.server.http_client import checked_ids
from vzip.runtime.llm.shown import Shown, TokenSpec, check_batch
from vzip.runtime.llm.text_side import LARGEST, TextCheckpoint

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.server.chat_server import Message
    from vzip.runtime.llm.shown import Embeds, Given
    from vzip.runtime.tokens.positions import Positions

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

    def __init__(
        self,
        url: str,
        tokens: TokenSpec,
        *,
        model: str | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(url, tokens, model=model, seconds=seconds)
        token = self._ids({"prompt": _IMAGE, "add_special_tokens": True})
        if not token or token[-1] != tokens.image_token_id:
            raise InvalidInputError(
                f"{NAME}: the LLM {self.model!r} at {self.url} makes {token} of {_IMAGE!r}",
                expected=f"{tokens.image_token_id}, the bundle's image token id, at the end",
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
            return checked_ids(answer["tokens"])
        except (TypeError, KeyError, ValueError) as error:
            raise BackendError(
                f"{NAME}: {self.url}/tokenize answered {json.dumps(answer)[:80]!r}",
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
        self,
        embeds: Given | Sequence[Given],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
    ) -> ServerConversation:
        """Begin a conversation; a video's frames are images that follow each other.

        See `LLM.conversation`; several images have as many rows.
        """
        conversation = super().conversation(embeds, frames=frames, positions=positions)
        _check_rows([conversation.shown])
        return conversation


def open_for(where: str, bundle: Bundle) -> VllmServer:
    """Open a server for a bundle's tokens; see `vzip.runtime.llm.opening`."""
    return VllmServer(where, TokenSpec.of(bundle.manifest))


class VllmLLM(LLM):
    """A `vllm.LLM` in this process.

    A conversation sends the ids of all turns with every question, and vLLM's prefix cache spares
    it the work. vLLM gives an answer when it is whole, so that `stream` yields one piece.

    Args:
        llm: vLLM's own: ``vllm.LLM(model, enable_mm_embeds=True, …)``.
        tokens: What the bundle says about its tokens, from `TokenSpec.of`; None to take any
            number.

    Attributes:
        llm: As given.
        text: The text side of the checkpoint that it runs.
        context: Longest sequence in tokens.

    Raises:
        InvalidInputError: It doesn't take embeddings, or the bundle's tokens are not made for its
            LLM.
        CheckpointError: It runs no LLaVA.
    """

    name = NAME

    def __init__(self, llm: Any, *, tokens: TokenSpec | None = None) -> None:
        config = llm.llm_engine.model_config
        settings = config.multimodal_config
        if settings is None or not settings.enable_mm_embeds:
            raise InvalidInputError(
                f"{NAME}: this vllm.LLM takes no embeddings",
                cure="open it with vllm.LLM(…, enable_mm_embeds=True)",
            )
        self.llm = llm
        self.text = TextCheckpoint.open(NAME, config.model, tokens=tokens, revision=config.revision)
        self.context = int(config.max_model_len)
        self._largest = LARGEST[str(config.dtype).removeprefix("torch.")]

    def conversation(
        self,
        embeds: Given | Sequence[Given],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
    ) -> VllmConversation:
        """Begin a conversation; a video's frames are images that follow each other.

        See `LLM.conversation`; several images have as many rows.
        """
        shown = self._shown(embeds, frames, positions)
        _check_rows([shown])
        return VllmConversation(self, shown)

    def generation_input(
        self, embeds: Given | Sequence[Given], question: str, *, frames: int | None = None
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
        check_question(NAME, question)
        shown = self._shown(embeds, frames)
        return _input(self.text.first(shown, question, expands=False), shown)

    def ask_batch(
        self,
        embeds: Sequence[Given | Sequence[Given]],
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
        check_batch(NAME, embeds, questions)
        shown = [self._shown(each, frames) for each in embeds]
        _check_rows(shown)
        pairs = []
        for each, question in zip(shown, questions, strict=True):
            check_question(NAME, question)
            ids = self.text.first(each, question, expands=False)
            check_context(
                NAME,
                earlier=0,
                new=len(ids) + self.text.unseen_rows(each),
                max_new_tokens=max_new_tokens,
                context=self.context,
            )
            pairs.append((ids, each))
        made = self.generate(pairs, max_new_tokens)
        return [self.text.prompts.decode(self.text.spoken(ids)) for ids in made]

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
            raise BackendError(
                f"{NAME}: vllm.LLM failed ({first_line(error)})",
                cure="see its log, and open a new one if this one has ended",
            ) from error
        return [list(result.outputs[0].token_ids) for result in results]

    def _shown(
        self,
        embeds: Given | Sequence[Given],
        frames: int | None,
        positions: Positions | None = None,
    ) -> Shown:
        if frames is not None and "video" in self.text.prompts.placeholders:
            raise InvalidInputError(
                f"{NAME}: got a video's tokens",
                expected="tokens of images, which are all that vLLM's class of this LLM takes",
                cause="this LLM has a placeholder of its own for videos",
                cure="ask about frames as images, or use transformers for videos",
            )
        return self.text.shown(
            embeds, frames, largest=self._largest, takes_videos=False, positions=positions
        )


class VllmConversation(TokenConversation):
    """Questions to a `vllm.LLM` about images; each prompt is the ids of all turns.

    Made by `VllmLLM.conversation`.
    """

    def __init__(self, llm: VllmLLM, shown: Shown) -> None:
        super().__init__(llm.text, shown, context=llm.context, expands=False)
        self._llm = llm

    def _generate(self, ids: list[int], max_new_tokens: int) -> Generator[list[int], None, None]:
        yield from self._llm.generate([(ids, self.shown)], max_new_tokens)


def _input(ids: list[int], shown: Shown) -> dict[str, Any]:
    """Return one prompt for `vllm.LLM.generate`."""
    import torch

    # A list of [n, L]: vLLM takes no bare 2-D tensor for an embedding.
    images = [torch.from_numpy(np.ascontiguousarray(part)) for part in shown.parts]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


def _check_rows(shown: Sequence[Shown]) -> None:
    """Refuse images of different row counts, which would end vLLM.

    Raises:
        InvalidInputError: They have.
    """
    rows = sorted({len(part) for each in shown for part in each.parts})
    if len(rows) > 1:
        raise InvalidInputError(
            f"{NAME}: got images of {', '.join(map(str, rows))} tokens at once",
            expected="as many of each",
            cause="vLLM ends when they differ in a batch",
            cure="ask about one image at a time, or about images of one size",
        )


def _base64_npy(embeds: Embeds) -> str:
    """Return the .npy form of an array, C order, as base64."""
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(embeds), allow_pickle=False)
    return base64.b64encode(data.getvalue()).decode("ascii")
