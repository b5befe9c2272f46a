"""A GGUF that llama.cpp has opened: its metadata, its tokenizer; and what llama.cpp logs.

llama.cpp's calls are as in its ``include/llama.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import unicodedata
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from vzip.runtime.errors import BackendError, CheckpointError, MissingDependencyError
from vzip.runtime.llm.prompts import Kind

NAME: Final = "llama.cpp"

SpacePrefix = Literal["each", "missing", "first", "none"]
"""SentencePiece puts a space in front of each text between special tokens, of each that has none,
of the first one if it has none, or of none. llama.cpp itself knows the first and the last.
"""


class Key:
    """Keys that ``vzip convert`` adds to a GGUF."""

    WORDS: Final = "vzip.words"  # JSON of `Words.to_json`
    TOKEN_ID: Final = "vzip.{}_token_id"  # noqa: S105 - of a `Kind`'s placeholder; int32
    EOS_IDS: Final = "vzip.eos_token_ids"  # JSON: the ids that end an answer
    SPACE_PREFIX: Final = "vzip.space_prefix"  # a `SpacePrefix`
    NORMALIZER: Final = "vzip.normalizer"  # "NFC"


_MARK: Final = "\u2581"  # SentencePiece's sign for a space
_MROPE: Final = 8  # llama_rope_type
_ALL_LAYERS: Final = 2**31 - 1  # on the GPU, where llama.cpp was built with one

# llama.h's and ggml.h's enumerations. llama-cpp-python's table of log levels is another.
_LOG_ERROR: Final = 4
_UNKNOWN, _UNUSED, _CONTROL, _USER_DEFINED = 1, 2, 8, 16  # llama_token_attr


class GgufTokenizer:
    """The tokenizer of a GGUF, as `vzip.runtime.llm.prompts.Tokenizer`.

    Text is divided at special tokens here and not in llama.cpp, which would know neither markers
    nor all ways to put a space in front.

    Args:
        model: The GGUF.
        placeholders: Ids of placeholders; those that its vocabulary lacks are markers only.

    Raises:
        CheckpointError: The GGUF has no end-of-sequence token.
    """

    def __init__(self, model: GgufModel, placeholders: Mapping[Kind, int]) -> None:
        library, vocabulary = model.library, model.vocabulary
        self._model = model
        self._size = int(library.llama_vocab_n_tokens(vocabulary))
        self._special: dict[str, int] = {}
        for token_id in range(self._size):
            if library.llama_vocab_get_attr(vocabulary, token_id) & (
                _CONTROL | _USER_DEFINED | _UNKNOWN
            ):
                self._special[self._text(token_id)] = token_id
        self._markers = {
            token_id: f"<{kind}>"
            for kind, token_id in placeholders.items()
            if not model.has_token(token_id)
        }
        self._special |= {text: token_id for token_id, text in self._markers.items()}
        longest_first = sorted(filter(None, self._special), key=len, reverse=True)
        self._divider = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._space_prefix = model.text(Key.SPACE_PREFIX)
        self._space = next((i for i in range(self._size) if self._text(i) == _MARK), -1)
        self._nfc = model.text(Key.NORMALIZER) == "NFC"
        bos = int(library.llama_vocab_bos(vocabulary))
        self._start = [bos] if bos >= 0 and library.llama_vocab_get_add_bos(vocabulary) else []
        self.bos = self._text(bos) if bos >= 0 else None
        self.eos_id = int(library.llama_vocab_eos(vocabulary))
        if self.eos_id < 0:
            raise CheckpointError(
                f"{NAME}: the GGUF has no end-of-sequence token, which a LLaVA has",
                cure="make it again with 'vzip convert'",
            )
        self.eos = self._text(self.eos_id)

    def token(self, token_id: int) -> str | None:
        """Return a token as text; None for an id beyond the vocabulary that is no marker."""
        if token_id in self._markers:
            return self._markers[token_id]
        return self._text(token_id) if 0 <= token_id < self._size else None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return a text's ids."""
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        ids = list(self._start) if special else []
        for number, part in enumerate(self._divider.split(text)):
            if number % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._piece(part, first=number == 0)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def _piece(self, text: str, *, first: bool) -> list[int]:
        """Return the ids of a text between special tokens."""
        if self._space_prefix == "missing" and text.startswith(" "):
            # llama.cpp puts one in front of every text but an empty one.
            return self._tokenize(text[1:]) if text != " " else [self._space]
        if self._space_prefix == "first" and first and not text.startswith(" "):
            text = f" {text}"
        return self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        size = len(data) + 16
        while True:
            ids = (ctypes.c_int32 * size)()
            count = self._model.library.llama_tokenize(
                self._model.vocabulary, data, len(data), ids, size, False, False
            )
            if count >= 0:
                return list(ids[:count])
            size = -count

    def _bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; none of a special one."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._model.library.llama_token_to_piece(
                self._model.vocabulary, token_id, buffer, size, 0, False
            )
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _text(self, token_id: int) -> str:
        text: bytes = self._model.library.llama_vocab_get_text(self._model.vocabulary, token_id)
        return text.decode(errors="replace")


class GgufModel:
    """A GGUF that llama.cpp has opened.

    Attributes:
        library: The package llama_cpp.
        path: The file.
        handle: ``llama_model *``; given back when this is dropped.
        vocabulary: ``llama_vocab *``, which belongs to it.
    """

    def __init__(self, library: Any, path: Path, *, weights: bool) -> None:
        self.library, self.path = library, path
        parameters = library.llama_model_default_params()
        parameters.vocab_only = not weights
        parameters.n_gpu_layers = _ALL_LAYERS
        with listening() as errors:
            self.handle = library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.handle:
            raise CheckpointError(
                f"{NAME}: '{path}' can't be loaded ({said(errors)})",
                cause=(
                    "the file is truncated or damaged, of an architecture that this llama.cpp "
                    "doesn't know, or larger than the memory"
                ),
                cure="make it again with 'vzip convert', or update llama-cpp-python",
            )
        weakref.finalize(self, quietly, library.llama_model_free, self.handle)
        self.vocabulary = library.llama_model_get_vocab(self.handle)

    def text(self, key: str) -> str | None:
        """Return a value of the metadata as text; None where there is none."""
        read = self.library.llama_model_meta_val_str
        size = read(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        read(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def size(self, key: str) -> int:
        """Return a number of the architecture.

        Raises:
            CheckpointError: It isn't there.
        """
        architecture = self.text("general.architecture")
        text = self.text(f"{architecture}.{key}")
        if text is None or not text.isdecimal():
            raise CheckpointError(
                f"{NAME}: '{self.path}' has no {architecture}.{key}",
                expected="the GGUF of a language model",
                cure="make it with 'vzip convert'",
            )
        return int(text)

    def has_sections(self) -> bool:
        """Return whether its rotary embeddings have several sections (M-RoPE)."""
        return int(self.library.llama_model_rope_type(self.handle)) == _MROPE

    def has_token(self, token_id: int) -> bool:
        """Return whether an id has a token, and not just a row."""
        if not 0 <= token_id < self.library.llama_vocab_n_tokens(self.vocabulary):
            return False
        return not self.library.llama_vocab_get_attr(self.vocabulary, token_id) & _UNUSED

    def special_texts(self) -> frozenset[str]:
        """Return the texts of the special tokens."""
        library, vocabulary = self.library, self.vocabulary
        return frozenset(
            library.llama_vocab_get_text(vocabulary, token_id).decode(errors="replace")
            for token_id in range(library.llama_vocab_n_tokens(vocabulary))
            if library.llama_vocab_get_attr(vocabulary, token_id) & (_CONTROL | _USER_DEFINED)
        )

    def ends(self) -> list[int]:
        """Return the ids that end an answer."""
        stored = self.text(Key.EOS_IDS)
        if stored is not None:
            return [int(each) for each in json.loads(stored)]
        ends = self.library.llama_vocab_is_eog
        size = self.library.llama_vocab_n_tokens(self.vocabulary)
        return [token_id for token_id in range(size) if ends(self.vocabulary, token_id)]


@functools.cache
def load_library() -> Any:
    """Import llama_cpp and listen to what it says.

    Raises:
        MissingDependencyError: It is not installed.
        BackendError: Its shared library can't be loaded.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(
            f"{NAME} needs the package 'llama_cpp', which can't be imported here",
            cure=(
                "install it with: pip install 'vzip[llama-cpp]' (it is compiled as it is "
                "installed, which takes cmake and a C++ compiler)"
            ),
        ) from error
    except (OSError, RuntimeError) as error:
        raise BackendError(
            f"{NAME}: llama-cpp-python's library can't be loaded ({str(error).splitlines()[0]})",
            cure="install it again on this machine: pip install --force-reinstall llama-cpp-python",
        ) from error
    _LOG.attach(llama_cpp)
    with listening():
        llama_cpp.llama_backend_init()
    return llama_cpp


class _Log:
    """llama.cpp's log, of which the process has one: silent while vzip calls, else as before."""

    def __init__(self) -> None:
        self.errors: list[list[str]] = []  # one list for each call under way
        self._callback: Any = None

    def attach(self, library: Any) -> None:
        """Take the log's place, once and for all: other threads may be logging at any time."""
        if self._callback is not None:
            return
        before: Any = library.llama_log_callback()
        if hasattr(library, "llama_log_get"):
            library.llama_log_get(ctypes.byref(before), ctypes.byref(ctypes.c_void_p()))
        else:  # older versions, such as 0.3.16
            from llama_cpp import _logger

            before = _logger.llama_log_callback

        def callback(level: int, text: bytes, data: Any) -> None:
            if not self.errors:
                before(level, text, data)
            elif level == _LOG_ERROR:
                for errors in self.errors:
                    errors.append(text.decode(errors="replace").strip())

        self._callback = library.llama_log_callback(callback)
        library.llama_log_set(self._callback, None)


_LOG: Final = _Log()


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect the errors that llama.cpp logs meanwhile."""
    errors: list[str] = []
    _LOG.errors.append(errors)
    try:
        yield errors
    finally:
        # By identity: lists of two threads may be equal.
        _LOG.errors[:] = [each for each in _LOG.errors if each is not errors]


def quietly(function: Callable[[Any], None], handle: Any) -> None:
    """Give something back to llama.cpp, which logs that it does."""
    with listening():
        function(handle)


def said(errors: list[str]) -> str:
    """Return the first error that says something."""
    return next(filter(None, errors), "llama.cpp gives no reason")[:300]
