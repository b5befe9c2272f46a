"""Compressed tokens into llama.cpp, by the low-level functions of llama-cpp-python.

A prompt is up to three kinds of calls of ``llama_decode``: text as ids, the image's tokens as
embeddings, text again. The tokenizer is the GGUF's own. Files that ``vzip convert`` wrote carry the
words around a question and the placeholders' ids; of another text GGUF of a LLaVA-1.5 the words are
known, and the placeholder may be an id beyond its vocabulary.

llama.cpp takes positions that jump only of a file whose rotary embeddings have several sections
(M-RoPE), as ``vzip convert --positions`` writes it: whether it does is tried when a file is opened.

llama.cpp's calls are as in its ``include/llama.h``.
"""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import (
    BackendError,
    CheckpointError,
    InvalidInputError,
)
from vzip.runtime.files import codec
from vzip.runtime.files.plain import open_plain
from vzip.runtime.guard import door
from vzip.runtime.llm.conversation import GreedyLLM
from vzip.runtime.llm.local.gguf_model import (
    NAME,
    GgufModel,
    GgufTokenizer,
    Key,
    listening,
    load_library,
    quietly,
    said,
)
from vzip.runtime.llm.prompts import KINDS, TURN_TOKENS, Kind, Prompts, Words, llava_15_words
from vzip.runtime.llm.shown import TokenSpec
from vzip.runtime.llm.text_side import TextSide
from vzip.runtime.machine import process
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.llm.shown import Embeds

DEFAULT_CONTEXT: Final = 8192
"""Most tokens that all conversations together may have, unless it is opened with more."""

# Families of bundles (manifest.model.family) whose LLMs were trained with LLaVA-1.5's words.
_LLAVA_15_FAMILIES: Final = ("llava", "llava-original", "video-llava")

_MAGIC: Final = b"GGUF"
_BATCH: Final = 512  # tokens per llama_decode
_CONVERSATIONS: Final = 64  # at a time; older versions of llama.cpp take no more
_F32: Final = 0  # ggml_type, and llama_ftype
_FLASH_OFF: Final = 0  # llama_flash_attn_type
_SECTIONS: Final = 4  # positions of an embedding in M-RoPE: time, height, width, and none


class LlamaCppLLM(GreedyLLM):
    """A LLaVA's language model as a GGUF, run by llama.cpp.

    All conversations share one context, whose KV cache is reserved when the LLM is opened; each is
    a sequence in it, which is removed when the conversation is dropped.

    Attributes:
        path: The GGUF.
    """

    name = NAME

    @door(CheckpointError, "llama.cpp: '{path}' can't be opened", cure="make it again")
    def __init__(
        self,
        path: Path,
        *,
        tokens: TokenSpec | None,
        family: str | None = None,
        context: int = DEFAULT_CONTEXT,
        threads: int | None = None,
    ) -> None:
        """Open a GGUF; see `open_for` for the form that the command line uses.

        The file is checked against the bundle before its weights are loaded.

        Args:
            path: The file.
            tokens: What the bundle says about its tokens, from `TokenSpec.of`; ``None`` to take
                any number, which needs a file of ``vzip convert``.
            family: The bundle's family, ``manifest.model.family``, for a GGUF without words.
            context: Most tokens that all conversations together may have; fewer where the LLM was
                trained with fewer. Its KV cache is reserved at once: for a 7B, 0.5 MB per token.
            threads: As for `vzip.runtime.llm.open_llm`; where there is no limit for the process
                either, OMP_NUM_THREADS is heard.

        Raises:
            MissingDependencyError: llama-cpp-python is not installed.
            CheckpointError: The file is not there, no GGUF, damaged, or without words.
            InvalidInputError: The bundle's tokens are not made for this LLM.
            BackendError: llama.cpp could not load the file or reserve the memory.
        """
        _check_file(path)
        library = load_library()
        vocabulary = GgufModel(library, path, weights=False)
        self.path = path
        width, trained = vocabulary.size("embedding_length"), vocabulary.size("context_length")
        placeholders = _placeholders(vocabulary, tokens, path)
        if tokens is not None:
            tokens.check_llm(
                NAME,
                model=str(path),
                hidden_size=width,
                placeholders=placeholders,
            )
        words = _words(vocabulary, tokens, family, path)
        del vocabulary
        model = GgufModel(library, path, weights=True)
        prompts = Prompts(NAME, GgufTokenizer(model, placeholders), words, placeholders)
        self.text = TextSide(
            name=NAME,
            prompts=prompts,
            eos_ids=frozenset({prompts.eos_id, *model.ends()}),
            hidden_size=width,
            context=min(context, trained),
            tokens=tokens,
        )
        self.largest = float(np.finfo(np.float32).max)
        self._pool = _Pool(model, min(context, trained), threads or _threads())
        self.trained = trained
        self.unable = self._pool.unable()

    def new_cache(self) -> KvCache:
        """Return an empty sequence.

        Raises:
            BackendError: There are as many conversations as llama.cpp takes.
        """
        return self._pool.new()

    def step(
        self,
        ids: list[int],
        cache: KvCache,
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> int:
        """Run the LLM over new tokens; see `GreedyLLM.step`."""
        logits = self.logits(ids, cache, rows, positions)
        token = int(logits.argmax())  # of NaN, the first; of equals, the lowest id
        if not np.isfinite(logits[token]):
            raise BackendError(
                f"{NAME}: the LLM's output is not finite with '{self.path}'",
                cure="convert it from a checkpoint in float32 or bfloat16",
            )
        return token

    def logits(
        self,
        ids: list[int],
        cache: KvCache,
        rows: Embeds | None,
        positions: NDArray[np.int64] | None = None,
    ) -> Embeds:
        """Run the LLM over new tokens; see `GreedyLLM.step`.

        Returns:
            The logits behind the last of them, float32 [V].
        """
        places = (
            frozenset(self.text.prompts.placeholders.values()) if rows is not None else frozenset()
        )
        if positions is None:
            positions = np.arange(cache.length, cache.length + len(ids))
        return self._pool.decode(ids, cache, places, rows, positions)


class KvCache:
    """A conversation's sequence in the context.

    Attributes:
        sequence: Its id.
        length: Tokens in it.
    """

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.length = 0


class _Pool:
    """A context of llama.cpp, shared by sequences; one thread at a time runs it.

    Args:
        model: The GGUF.
        length: Tokens that its KV cache holds, of all sequences together.
        threads: How many run it.

    Raises:
        BackendError: The memory could not be had.
    """

    def __init__(self, model: GgufModel, length: int, threads: int) -> None:
        library = model.library
        self._model, self._length = model, length
        self._width = int(library.llama_model_n_embd(model.handle))
        self._vocabulary = int(library.llama_vocab_n_tokens(model.vocabulary))
        self._sections = _SECTIONS if model.has_sections() else 1
        parameters = library.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_seq_max = _CONVERSATIONS
        parameters.kv_unified = True  # else each sequence has but its share
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.no_perf = True
        if model.text("general.file_type") == str(_F32):
            # Else keys and values are rounded to half precision, which nobody who keeps a file in
            # float32 wants. Older versions have flash attention off.
            parameters.type_k = parameters.type_v = _F32
            if hasattr(parameters, "flash_attn_type"):
                parameters.flash_attn_type = _FLASH_OFF
        with listening() as errors:
            self._context = library.llama_init_from_model(model.handle, parameters)
        if not self._context:
            raise BackendError(
                f"{NAME}: no context of {counted(length, 'token')} could be made for "
                f"'{model.path}' ({said(errors)})",
                cure="free memory, or open it with a smaller context",
            )
        # The model is an argument so that it outlives the context.
        weakref.finalize(self, _free, model, self._context)
        self._memory = library.llama_get_memory(self._context)
        self._lock = threading.Lock()
        self._free = list(reversed(range(_CONVERSATIONS)))
        self._lengths: dict[int, int] = {}
        # Sequences of dropped conversations. They are dropped at any time, in any thread, maybe
        # amid a call of llama.cpp: what is to be done about it waits for the next call.
        self._dropped: collections.deque[int] = collections.deque()

    def new(self) -> KvCache:
        """Return an empty sequence, which is removed when it is dropped."""
        with self._lock:
            self._sweep()
            if not self._free:
                raise BackendError(
                    f"{NAME}: {_CONVERSATIONS} conversations are open, and no more fit into "
                    "one context",
                    cure="drop those that have ended",
                )
            cache = KvCache(self._free.pop())
            self._lengths[cache.sequence] = 0
        weakref.finalize(cache, self._dropped.append, cache.sequence)
        return cache

    def unable(self) -> str | None:
        """Say why tokens can't have positions with gaps between them; None where they can.

        Two embeddings with a gap are tried in a sequence of their own.
        """
        cache = self.new()
        try:
            with self._lock:
                for position in (0, 2):
                    # Not zeros, whose norm some versions divide by: NaN would stay in the cache.
                    batch = np.ones((1, self._width), np.float32)
                    self._decode(batch, cache, np.array([position]), last=True)
        except BackendError:
            return (
                "llama.cpp takes no gaps between those of this file (make one that it does with "
                "'vzip convert --positions')"
            )
        return None

    def decode(
        self,
        ids: list[int],
        cache: KvCache,
        places: frozenset[int],
        rows: Embeds | None,
        positions: NDArray[np.int64],
    ) -> Embeds:
        """Add tokens to a sequence.

        Args:
            ids: Their ids, [m].
            cache: The sequence.
            places: Ids at which `rows` stand instead.
            rows: [n, L]; None without any.
            positions: int64 [m], that of each.

        Returns:
            The logits behind the last of them, float32 [V].

        Raises:
            BackendError: There is no room, or llama.cpp failed.
        """
        with self._lock:
            self._sweep()
            others = sum(self._lengths.values()) - cache.length
            if others + cache.length + len(ids) > self._length:
                raise BackendError(
                    f"{NAME}: there is no room for {counted(len(ids), 'new token')} in the context "
                    f"of {self._length}, of which this conversation holds {cache.length} and "
                    f"others {others}",
                    cure=(
                        "drop conversations that have ended, or open the LLM with a larger context"
                    ),
                )
            taken = 0
            for start, stop, embedded in _runs(ids, places, positions):
                count = stop - start
                batch: list[int] | Embeds = ids[start:stop]
                if embedded and rows is not None:
                    batch = np.ascontiguousarray(rows[taken : taken + count], dtype=np.float32)
                    taken += count
                self._decode(batch, cache, positions[start:stop], last=stop == len(ids))
            found = self._model.library.llama_get_logits_ith(self._context, -1)
            return np.array(np.ctypeslib.as_array(found, (self._vocabulary,)))

    def _decode(
        self,
        tokens: list[int] | Embeds,
        cache: KvCache,
        positions: NDArray[np.int64],
        *,
        last: bool,
    ) -> None:
        """Run llama.cpp once, over ids or over embeddings."""
        library, count = self._model.library, len(tokens)
        embedded = isinstance(tokens, np.ndarray)
        # Of embeddings, M-RoPE wants the positions of all sections, one after the other; the last
        # section is unused. A batch has as many as it has room for tokens.
        sections = self._sections if embedded else 1
        batch = library.llama_batch_init(sections * count, self._width if embedded else 0, 1)
        try:
            batch.n_tokens = count
            view = np.ctypeslib.as_array
            if isinstance(tokens, np.ndarray):
                view(batch.embd, tokens.shape)[:] = tokens
            else:
                view(batch.token, (count,))[:] = tokens
            pos = view(batch.pos, (sections, count))
            pos[:] = positions
            if sections > 1:
                pos[-1] = 0
            view(batch.n_seq_id, (count,))[:] = 1
            view(batch.logits, (count,))[:] = 0
            batch.logits[count - 1] = last
            for place in range(count):
                batch.seq_id[place][0] = cache.sequence
            with listening() as errors:
                status = library.llama_decode(self._context, batch)
        finally:
            library.llama_batch_free(batch)
        if status != 0:
            raise BackendError(
                f"{NAME}: llama_decode failed with {status} at {counted(cache.length, 'token')} "
                f"({said(errors)})",
                cure="begin a new conversation, or free memory and open the LLM again",
            )
        cache.length += count
        self._lengths[cache.sequence] = cache.length

    def _sweep(self) -> None:
        """Remove the sequences of dropped conversations."""
        while self._dropped:
            sequence = self._dropped.popleft()
            self._model.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            del self._lengths[sequence]
            self._free.append(sequence)


def open_for(where: str, bundle: Bundle, *, threads: int | None = None) -> LlamaCppLLM:
    """Open a GGUF for a bundle's tokens; see `vzip.runtime.llm.opening`."""
    return LlamaCppLLM(
        Path(where).expanduser(),
        tokens=TokenSpec.of(bundle.manifest),
        family=bundle.manifest.model.family,
        threads=threads,
    )


def _check_file(path: Path) -> None:
    """Refuse what is no GGUF."""
    try:
        with open_plain(path) as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise CheckpointError(
            f"{NAME}: '{path}' can't be read ({error.strerror})",
            expected="a GGUF",
            cure="check the path, or make one with "
            "'vzip convert --model MODEL --to gguf -o FILE.gguf'",
        ) from error
    if start != _MAGIC:
        raise CheckpointError(
            f"{NAME}: '{path}' begins with {start!r}",
            expected=f"a GGUF, which begins with {_MAGIC!r}",
            cure="make one with 'vzip convert --model MODEL --to gguf -o FILE.gguf'",
        )


def _placeholders(model: GgufModel, tokens: TokenSpec | None, path: Path) -> dict[Kind, int]:
    """Return the ids of the placeholders: the GGUF's, or the bundle's where it names none."""
    stored: dict[Kind, int] = {}
    for kind in KINDS:
        text = model.text(Key.TOKEN_ID.format(kind))
        if text is not None:
            stored[kind] = int(text)
    if "image" in stored:
        return stored
    if tokens is None:
        raise _wordless(path)
    given: dict[Kind, int] = {"image": tokens.image_token_id}
    if tokens.video_token_id is not None:
        given["video"] = tokens.video_token_id
    for kind, token_id in given.items():
        if not model.has_token(token_id):
            continue  # a marker, which the LLM never sees
        token = model.library.llama_vocab_get_text(model.vocabulary, token_id).decode()
        if token != f"<{kind}>":
            raise InvalidInputError(
                f"{NAME}: token {token_id} of '{path}' is {token!r}",
                expected=f"the bundle's {kind} token <{kind}> or an id beyond its vocabulary",
                cure="give the GGUF of the checkpoint that the bundle was exported from (--llm)",
            )
    return given


def _words(model: GgufModel, tokens: TokenSpec | None, family: str | None, path: Path) -> Words:
    """Return the words around questions: the GGUF's, or LLaVA-1.5's where it was trained so."""
    stored = model.text(Key.WORDS)
    if stored is not None:
        try:
            return codec.read(Words, codec.parse(stored))
        except ValueError as error:
            raise CheckpointError(
                f"{NAME}: '{path}' has unreadable words ({error})",
                cure="make it again with 'vzip convert'",
            ) from error
    llama = model.text("general.architecture") == "llama"
    if family in _LLAVA_15_FAMILIES and llama and not TURN_TOKENS & model.special_texts():
        return llava_15_words(videos=tokens is not None and tokens.video_token_id is not None)
    raise _wordless(path)


def _wordless(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{NAME}: '{path}' does not say in which words its LLM is asked",
        expected=f"the key {Key.WORDS!r}, or the GGUF of a Llama without tokens of turns for a "
        "bundle of a LLaVA-1.5",
        cure="make it with 'vzip convert --model MODEL --to gguf -o FILE.gguf'",
    )


def _runs(
    ids: list[int], places: frozenset[int], positions: NDArray[np.int64]
) -> Iterator[tuple[int, int, bool]]:
    """Yield start, end and whether they are places, of stretches that one llama_decode takes.

    Its mask goes by position: tokens of one position in one call would see each other both ways.
    """
    start = 0
    while start < len(ids):
        embedded, stop = ids[start] in places, start + 1
        while (
            stop < len(ids)
            and stop - start < _BATCH
            and (ids[stop] in places) == embedded
            and positions[stop] != positions[stop - 1]
        ):
            stop += 1
        yield start, stop, embedded
        start = stop


def _threads() -> int:
    """Return `process.threads`, unless OMP_NUM_THREADS alone says how many."""
    if process.thread_limit() is not None:
        return process.threads()
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return process.threads()


def _free(model: GgufModel, context: Any) -> None:
    quietly(model.library.llama_free, context)
