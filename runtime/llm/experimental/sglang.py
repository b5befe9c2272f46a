"""Compressed tokens into SGLang's native server, ``POST /generate``; not run against it.

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

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.llm.contract import DEFAULT_MAX_NEW_TOKENS, LLM
from vzip.runtime.llm.conversation import TokenConversation, check_max_new_tokens
from vzip.runtime.llm.experimental.embedding_table import EmbeddingTable
from vzip.runtime.llm.server.http_client import Client, Events, checked_ids
from vzip.runtime.llm.shown import Shown, TokenSpec
from vzip.runtime.llm.text_side import LARGEST, TextCheckpoint
from vzip.runtime.models import locate
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    import numpy.typing as npt

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.shown import Given
    from vzip.runtime.tokens.positions import Positions

NAME: Final = "sglang"
KEY_VARIABLE: Final = "SGLANG_API_KEY"
_DRAFTED: Final = 256  # ids at most by which an answer of drafted tokens may be too long
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
        client: Requests to the server.
        url: The server's address.
        checkpoint: Its text side, as on this machine.
        incremental: Whether each event of an answer holds the new ids alone.
    """

    name = NAME

    def __init__(
        self, url: str, checkpoint: TextCheckpoint, *, seconds: float | None = None
    ) -> None:
        """Ask the server what it serves.

        Args:
            url: Its address, such as ``http://127.0.0.1:30000``.
            checkpoint: The text side of the checkpoint whose LLM it serves.
            seconds: Longest time for an answer as a whole; see `http_client.Client`.

        Raises:
            InvalidInputError: The address is none, or the server runs in a way that can't take
                embeddings.
            CheckpointError: The checkpoint's token embeddings are not there.
            BackendError: There is no such server.
        """
        self.client = Client(NAME, url, KEY_VARIABLE, seconds)
        self.url = self.client.url
        self.checkpoint = checkpoint
        self._table = EmbeddingTable.of(checkpoint)
        arguments = self._check_server()
        self.incremental = bool(_field(arguments, "incremental_streaming_output"))

    def conversation(
        self,
        embeds: Given | Sequence[Given],
        *,
        frames: int | None = None,
        positions: Positions | None = None,
    ) -> SglangConversation:
        """Begin a conversation; see `LLM.conversation`."""
        shown = self.checkpoint.shown(embeds, frames, largest=LARGEST[_DTYPE], positions=positions)
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
                f"{NAME}: got a prompt with the id {int(words.max())}",
                expected=f"0 to {vocabulary - 1}, of which the LLM has token embeddings",
                cause="the tokenizer is another model's",
            )
        made = self._table.rows(words.tolist())
        made[places] = rows
        return made

    def answer(self, ids: Sequence[int], shown: Shown, max_new_tokens: int) -> Events:
        """Ask the server for the answer to a prompt."""
        body = generate_request(
            self.embeddings(ids, shown),
            eos_ids=sorted(self.checkpoint.eos_ids),
            max_new_tokens=max_new_tokens,
            stream=True,
        )
        return self.client.post("/generate", body, _Answer)

    def _check_server(self) -> Any:
        """Refuse a server that would fail, or answer wrongly; return what it was started with."""
        architectures = _field(self.client.get("/model_info"), "architectures") or []
        arguments = self.client.get("/server_info")
        name, url = NAME, self.url
        taken = [each for each in architectures if each in _LLAVAS]
        if taken and _field(arguments, "model_impl") != "transformers":
            raise InvalidInputError(
                f"{name}: {url} serves {taken[0]}",
                cause="its forward in SGLang takes no embeddings",
                cure="serve its LLM alone, which docs/llm/sglang.md tells how to write",
            )
        if _field(arguments, "disable_radix_cache") is False:
            raise InvalidInputError(
                f"{name}: {url} keeps a prefix cache",
                cause="the cache can't tell embeddings apart",
                cure="start it with --disable-radix-cache",
            )
        dtype = _field(arguments, "dtype")
        if dtype is not None and dtype != _DTYPE:
            raise InvalidInputError(
                f"{name}: {url} runs the LLM with --dtype {dtype}",
                cause=f"SGLang casts embeddings to {_DTYPE}, and fails where the LLM has another",
                cure=f"start it with --dtype {_DTYPE}",
            )
        return arguments


class SglangConversation(TokenConversation):
    """Questions about images or a video; the ids of the turns are kept here.

    Made by `SglangLLM.conversation`.
    """

    def __init__(self, llm: SglangLLM, shown: Shown) -> None:
        super().__init__(llm.checkpoint, shown)
        self._llm = llm

    def _generate(self, ids: list[int], max_new_tokens: int) -> Generator[list[int], None, None]:
        with contextlib.closing(self._llm.answer(ids, self.shown, max_new_tokens)) as events:
            made: list[int] = []
            for piece in events.pieces():
                made = [*made, *piece] if self._llm.incremental else piece
                if len(made) > max_new_tokens + _DRAFTED:
                    raise self._llm.client.broken(
                        f"sent an answer of {counted(len(made), 'token')}",
                        cause=f"it was asked for {max_new_tokens} at most, and took no notice",
                        cure="check the address",
                    )
                yield made


class _Answer(Events):
    """The events of one answer of ``/generate``.

    Each holds ``output_ids``: those of the whole answer so far, or, of a server started with
    ``--incremental-streaming-output``, the new ones. ``text`` is not read: the ids are needed for
    the next turn, and decode to it.
    """

    cause = "it is no SGLang server, or a proxy changed the answer"

    def piece(self, event: Any) -> tuple[list[int], str | None]:
        """Return an event's ids, and why the answer ends if it does."""
        end = event["meta_info"]["finish_reason"]
        ids = checked_ids(event["output_ids"])
        return ids, None if end is None else str(end["type"])


def open_for(where: str, bundle: Bundle, *, revision: str | None = None) -> SglangLLM:
    """Open a server for a bundle's tokens; see `vzip.runtime.llm.opening`.

    Tokenizer and token embeddings are those of the checkpoint that the bundle was exported from.
    """
    model = bundle.manifest.model
    tokens = TokenSpec.of(bundle.manifest)
    try:
        locate(model.id)
    except CheckpointError as error:
        raise CheckpointError(
            f"{NAME}: {model.id!r}, which the bundle was exported from, is not here any more "
            f"({error.got})",
            expected="its tokenizer and token embeddings",
            cure="put it there again, or export the bundle from where it is now",
        ) from error
    opened = TextCheckpoint.open(NAME, model.id, tokens=tokens, revision=revision or model.revision)
    return SglangLLM(where, opened)


def _field(answer: Any, name: str) -> Any:
    """Return a field of a server's answer, whatever else that is."""
    return answer.get(name) if isinstance(answer, dict) else None
