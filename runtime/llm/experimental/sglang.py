"""Compressed tokens into SGLang's native server, ``POST /generate``; not run against the engine.

SGLang's own LLaVA ignores precomputed image embeddings: its processor passes them on as if they
were pixels (srt/multimodal/processors/llava.py). So the whole prompt goes in as embeddings: the
LLM's rows for the words, the image's tokens at its place. What that takes, of SGLang 0.5.23:

* ``input_embeds`` [m][L] of JSON numbers, alone: with ``text`` or ``input_ids`` beside it, it is
  dropped (GenerateReqInput in srt/managers/io_struct.py).
* a server without a prefix cache, which would take all such prompts for the same ids
  (``--disable-radix-cache``; srt/managers/tokenizer_manager.py refuses them otherwise).
* bfloat16: the embeddings are cast to it whatever the LLM's dtype is
  (srt/model_executor/model_runner.py), so that another dtype fails in the first layer.
* a model whose ``forward`` knows ``input_embeds``. The LLaVA classes' don't, so the LLM is served
  alone, as LlamaForCausalLM and the like; `docs/llm/sglang.md` says how.

The server keeps nothing of a conversation: every question carries the embeddings of all turns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import InvalidInputError
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
from vzip.runtime.llm.conversation import expand
from vzip.runtime.llm.server.http_client import ANSWER_SECONDS, Client, Events
from vzip.runtime.llm.text_checkpoint import EmbeddingTable, TextCheckpoint, own_checkpoint

if TYPE_CHECKING:
    import http.client

    import numpy.typing as npt

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm import Embeds

NAME: Final = "sglang"
KEY_VARIABLE: Final = "SGLANG_API_KEY"
_DTYPE: Final = "bfloat16"

# Classes of srt/models/llava.py and llavavid.py, whose forward takes no input_embeds.
_LLAVAS: Final = (
    "LlavaForConditionalGeneration",
    "LlavaLlamaForCausalLM",
    "LlavaMistralForCausalLM",
    "LlavaQwenForCausalLM",
    "LlavaVidForCausalLM",
)


def generate_request(
    prompt_embeds: npt.NDArray[np.floating[Any]],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    stream: bool = False,
) -> dict[str, Any]:
    """Return a greedy request: the body of ``POST /generate``, or GenerateReqInput's arguments.

    Args:
        prompt_embeds: float32 or float16 [m, L], of words and images; see `SglangLLM.embeddings`.
        eos_ids: Ids that end the answer.
        max_new_tokens: Longest answer, in tokens.
        stream: Whether the answer comes piece by piece.

    Raises:
        InvalidInputError: They have another shape or dtype, or are not finite.
    """
    check_max_new_tokens(NAME, max_new_tokens)
    right = prompt_embeds.ndim == 2 and prompt_embeds.dtype in (np.float32, np.float16)
    if not right or not prompt_embeds.size or not np.isfinite(prompt_embeds).all():
        raise InvalidInputError(
            f"{NAME}: got a prompt of {prompt_embeds.dtype} {list(prompt_embeds.shape)}",
            expected="finite float32 or float16 embeddings [m, L]",
            cure="give what SglangLLM.embeddings returns",
        )
    return {
        "input_embeds": prompt_embeds.tolist(),  # Python's floats: GenerateReqInput asks for them
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": sorted(eos_ids),
        },
        "stream": stream,
    }


class SglangLLM(LLM):
    """The LLM of a checkpoint, served by SGLang without its vision tower.

    Attributes:
        url: The server's address.
        checkpoint: Its text side, as on this machine.
    """

    name = NAME

    def __init__(self, url: str, checkpoint: TextCheckpoint) -> None:
        """Ask the server what it serves.

        Args:
            url: Its address, such as ``http://127.0.0.1:30000``.
            checkpoint: The text side of the checkpoint whose LLM it serves.

        Raises:
            InvalidInputError: The address is none, or the server runs in a way that can't take
                embeddings.
            CheckpointError: The checkpoint's token embeddings are not there.
            BackendError: There is no such server.
        """
        self._client = _GenerateClient(NAME, url, KEY_VARIABLE)
        self.url = self._client.url
        self.checkpoint = checkpoint
        self._table: EmbeddingTable = checkpoint.table()
        arguments = self._check_server()
        self._incremental = bool(_field(arguments, "incremental_streaming_output"))

    def conversation(
        self, embeds: Embeds | Sequence[Embeds], *, frames: int | None = None
    ) -> SglangConversation:
        """Begin a conversation; see `LLM.conversation`."""
        shown = self.checkpoint.shown(embeds, frames, dtype=_DTYPE, takes_videos=True)
        return SglangConversation(self, shown)

    def embeddings(self, ids: Sequence[int], shown: Shown) -> npt.NDArray[np.float32]:
        """Return a prompt's embeddings.

        Args:
            ids: Its ids, [m], with a placeholder for each row that is shown, before any others.
            shown: What stands at the placeholders.

        Returns:
            float32 [m, L].

        Raises:
            InvalidInputError: An id is beyond the LLM's vocabulary.
        """
        rows = np.concatenate(shown.parts)
        array = np.asarray(ids, np.int64)
        # A later placeholder is a mere word, which the LLM said.
        places = np.flatnonzero(array == self.checkpoint.prompts.placeholders[shown.kind])
        places = places[: len(rows)]
        words = array.copy()
        words[places] = 0  # a placeholder need not have a row of its own
        vocabulary = len(self._table.raw)
        if words.min() < 0 or words.max() >= vocabulary:
            raise InvalidInputError(
                f"{NAME}: got a prompt with the id {int(words.max())}, but the LLM has token "
                f"embeddings for 0 to {vocabulary - 1}",
                cause="the tokenizer is another model's",
            )
        made = self._table.rows(words.tolist())
        made[places] = rows
        return made

    def answer(self, ids: Sequence[int], shown: Shown, max_new_tokens: int) -> _Answer:
        """Ask the server for the answer to a prompt."""
        body = generate_request(
            self.embeddings(ids, shown),
            eos_ids=sorted(self.checkpoint.eos_ids),
            max_new_tokens=max_new_tokens,
            stream=True,
        )
        response = self._client.send("/generate", body)
        return _Answer(self._client, response, self.checkpoint, incremental=self._incremental)

    def _check_server(self) -> Any:
        """Refuse a server that would fail, or answer wrongly; return what it was started with."""
        architectures = _field(self._client.get("/model_info"), "architectures") or []
        arguments = self._client.get("/server_info")
        name, url = NAME, self.url
        taken = [each for each in architectures if each in _LLAVAS]
        if taken and _field(arguments, "model_impl") != "transformers":
            raise InvalidInputError(
                f"{name}: {url} serves {taken[0]}, whose forward in SGLang takes no embeddings",
                cure="serve its LLM alone, which docs/llm/sglang.md tells how to write",
            )
        if _field(arguments, "disable_radix_cache") is False:
            raise InvalidInputError(
                f"{name}: {url} keeps a prefix cache, which can't tell embeddings apart",
                cure="start it with --disable-radix-cache",
            )
        dtype = _field(arguments, "dtype")
        if dtype is not None and dtype != _DTYPE:
            raise InvalidInputError(
                f"{name}: {url} runs the LLM with --dtype {dtype}, but SGLang casts embeddings "
                f"to {_DTYPE}, and fails where the LLM has another",
                cure=f"start it with --dtype {_DTYPE}",
            )
        return arguments


class SglangConversation(Conversation):
    """Questions about images or a video; the ids of the turns are kept here.

    An answer cut short by `max_new_tokens`, or by the caller who stops reading it, is closed by an
    end-of-sequence token before the next question. A question whose answer failed is taken back.

    Made by `SglangLLM.conversation`.
    """

    def __init__(self, llm: SglangLLM, shown: Shown) -> None:
        self._llm = llm
        self._shown = shown
        self._ids: list[int] = []
        self._turn = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all turns so far, among them a placeholder for each row."""
        return tuple(self._ids)

    def stream(
        self, question: str, *, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Ask the next question.

        The checks are made by this call; the server is asked as the pieces are taken.

        Raises:
            InvalidInputError: The question is empty, contains a placeholder, or does not fit into
                the LLM's context with the turns before it; or (from the iterator) the server
                refuses the request.
            BackendError: (From the iterator.) The server is gone, failed, or broke off.
        """
        check_question(NAME, question)
        check_max_new_tokens(NAME, max_new_tokens)
        checkpoint = self._llm.checkpoint
        if not self._ids:
            new = expand(checkpoint.prompts, self._shown, question.strip())
        else:
            ended = self._ids[-1] in checkpoint.eos_ids
            new = [] if ended else [checkpoint.prompts.eos_id]
            new += checkpoint.prompts.later(question.strip())
        check_context(
            NAME,
            cached=len(self._ids),
            new=len(new),
            max_new_tokens=max_new_tokens,
            context=checkpoint.context,
        )
        self._turn += 1
        return self._pieces([*self._ids, *new], max_new_tokens, self._turn)

    def _pieces(self, ids: list[int], max_new_tokens: int, turn: int) -> Iterator[str]:
        self._check_turn(turn)
        before = self._ids
        answer = self._llm.answer(ids, self._shown, max_new_tokens)
        try:
            for piece in answer.pieces():
                self._ids = ids + answer.ids
                yield piece
                self._check_turn(turn)
            self._ids = ids + answer.ids
        except Exception:
            if turn == self._turn:
                self._ids = before
            raise
        finally:
            answer.close()

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise InvalidInputError(
                f"{NAME}: this answer was left behind by a later question of the same conversation",
                cure="read an answer to its end before asking on",
            )


class _GenerateClient(Client):
    """Requests to SGLang's native server, whose events are its own."""

    def send(self, path: str, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        """Send JSON, and return the response, whose body is not read yet."""
        data = json.dumps(body).encode()
        with self.errors():
            return self._open(path, data, ANSWER_SECONDS)


class _Answer(Events):
    """The events of one answer of ``/generate``.

    Each holds ``output_ids``: those of the whole answer so far, or, of a server started with
    ``--incremental-streaming-output``, the new ones. ``text`` is not read: the ids are needed for
    the next turn, and decode to it.

    Attributes:
        ids: Those of the answer so far, the one that ended it included.
    """

    def __init__(
        self,
        client: Client,
        response: http.client.HTTPResponse,
        checkpoint: TextCheckpoint,
        *,
        incremental: bool,
    ) -> None:
        super().__init__(client, response)
        self.ids: list[int] = []
        self._checkpoint = checkpoint
        self._incremental = incremental
        self._shown = ""

    def _read(self, data: str) -> tuple[str, str | None]:
        """Return an event's text, and why the answer ends if it does."""
        try:
            event = json.loads(data)
            failure = event.get("error")
            if failure:
                said = failure.get("message", failure) if isinstance(failure, dict) else failure
                words = self._client.clean(str(said))
                raise self._client.broken(f"failed while answering: {words}; see its log")
            ids = [int(each) for each in event["output_ids"]]
            end = event["meta_info"]["finish_reason"]
            reason = None if end is None else str(end["type"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._client.broken(
                f"sent an event that is no piece of an answer: {self._client.clean(data[:80])!r}; "
                "it is no SGLang server, or a proxy changed the answer"
            ) from error
        self.ids = [*self.ids, *ids] if self._incremental else ids
        ends = self._checkpoint.eos_ids
        place = next((i for i, token in enumerate(self.ids) if token in ends), len(self.ids))
        self.ids = self.ids[: place + 1]
        text = self._checkpoint.prompts.decode(self.ids[:place])
        # U+FFFD at the end is the beginning of a character whose other bytes follow.
        if not text.startswith(self._shown) or (text.endswith("\ufffd") and reason is None):
            return "", reason
        piece, self._shown = text[len(self._shown) :], text
        return piece, reason


def open_llm(where: str, bundle: Bundle, *, revision: str | None = None) -> SglangLLM:
    """Open a server for a bundle's tokens; see `vzip.runtime.llm.programs`.

    Tokenizer and token embeddings are those of the checkpoint that the bundle was exported from.
    """
    model = bundle.manifest.model
    tokens = ImageTokens.of(bundle.manifest)
    checkpoint = own_checkpoint(NAME, model.id, tokens, revision or model.revision)
    return SglangLLM(where, checkpoint)


def _field(answer: Any, name: str) -> Any:
    """Return a field of a server's answer, whatever else that is."""
    return answer.get(name) if isinstance(answer, dict) else None
