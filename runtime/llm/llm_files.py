"""What lies beside the graph of a language model in a bundle: its settings and its embeddings.

`docs/bundle.md` specifies both. What runs the graph needs nothing else of the checkpoint
but the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from vzip.runtime.bundle.manifest import (
    LLM_EMBEDDINGS_FILE,
    LLM_FILE,
    LLM_SETTINGS_FILE,
    LLM_TOKENIZER_FILE,
)
from vzip.runtime.bundle.reader import Bundle, npy_header
from vzip.runtime.errors import BundleError, CheckpointError
from vzip.runtime.llm.prompts import KINDS, Kind, Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "vzip-llm"
VERSION: Final = 1

INPUT: Final = "inputs_embeds"
LOGITS: Final = "logits"

_LARGEST_SETTINGS = 2**20  # bytes; ours have a thousand
_DTYPES = ("float32", "float16")


def cache_names(layers: int) -> tuple[str, ...]:
    """Return how the parts of a KV cache are called: behind ``past_`` and ``present_``."""
    return tuple(f"{part}_{layer}" for layer in range(layers) for part in ("key", "value"))


@dataclass(frozen=True)
class Settings:
    """What is needed to run a language model's graph; the file ``llm.json``.

    Attributes:
        words: What stands around questions.
        placeholders: Id of the placeholder of an image; and of a video, if the LLM has one.
        bos: The beginning-of-sequence token as text; None if there is none.
        eos: The end-of-sequence token as text.
        eos_id: Its id.
        eos_ids: Ids that end an answer, ascending; `eos_id` is one of them.
        context: Longest sequence in tokens; None when the LLM states none.
        hidden_size: L, the width of an embedding.
        vocabulary: Rows of the table of embeddings.
        layers: Layers of the LLM.
        kv_heads: Heads of keys and values in a layer.
        head_size: Width of a head.
        dtype: Of embeddings, keys and values.
    """

    words: Words
    placeholders: Mapping[Kind, int]
    bos: str | None
    eos: str
    eos_id: int
    eos_ids: tuple[int, ...]
    context: int | None
    hidden_size: int
    vocabulary: int
    layers: int
    kv_heads: int
    head_size: int
    dtype: Literal["float32", "float16"]

    def to_bytes(self) -> bytes:
        """Return the text of the file, UTF-8 with a newline at the end."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {"format": FORMAT, "version": VERSION, **fields, "words": self.words.to_json()}
        return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Settings:
        """Read what `to_bytes` returned.

        Raises:
            BundleError: It is something else, or of another version.
        """
        try:
            value: Any = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise _refuse("the file", "no JSON", "an object in UTF-8") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise _refuse("the file", data[:40].decode(errors="replace"), f"'format': '{FORMAT}'")
        version = value.get("version")
        if type(version) is not int or version != VERSION:
            raise BundleError(
                f"{LLM_SETTINGS_FILE}: 'version' is {version!r}",
                expected=f"{VERSION}",
                cause="the language model was exported by another version of vzip",
                cure="export the bundle again, or install that version",
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if set(value) != {"format", "version", *names}:
            raise _refuse("the file", sorted(value), f"exactly the keys {sorted(names)}")
        fields = {name: value[name] for name in names}
        try:
            fields["words"] = Words.from_json(value["words"])
        except CheckpointError as error:
            raise BundleError(f"{LLM_SETTINGS_FILE}: {error}") from error
        fields["eos_ids"] = _ids("eos_ids", value["eos_ids"])
        fields["placeholders"] = _placeholders(value["placeholders"])
        for name in ("hidden_size", "vocabulary", "layers", "kv_heads", "head_size"):
            _whole(name, value[name], low=1)
        _whole("eos_id", value["eos_id"], low=0)
        if value["context"] is not None:
            _whole("context", value["context"], low=1)
        if type(value["eos"]) is not str or not value["eos"]:
            raise _refuse("eos", value["eos"], "a text")
        if value["bos"] is not None and type(value["bos"]) is not str:
            raise _refuse("bos", value["bos"], "a text or null")
        if value["dtype"] not in _DTYPES:
            raise _refuse("dtype", value["dtype"], " or ".join(_DTYPES))
        if value["eos_id"] not in fields["eos_ids"]:
            raise _refuse("eos_ids", value["eos_ids"], f"one of them to be {value['eos_id']}")
        return cls(**fields)

    @classmethod
    def of(cls, bundle: Bundle) -> Settings:
        """Read those of a bundle with a language model, after checking the file's digest.

        Raises:
            BundleError: The bundle has none, or the file is damaged or of another version.
        """
        entry = bundle.manifest.files.get(LLM_SETTINGS_FILE)
        if entry is None:
            raise BundleError(
                f"{bundle.path}: manifest.json: 'files' lacks {LLM_FILE}, so there is no "
                "language model in this bundle",
                cure="export it with --with-llm, or name another LLM with --llm",
            )
        if entry.bytes > _LARGEST_SETTINGS:
            raise BundleError(
                f"{bundle.path}: {LLM_SETTINGS_FILE} has {entry.bytes} bytes",
                expected="about 1000",
                cause="it was not made by vzip",
                cure="export the bundle again",
            )
        with bundle.open_file(LLM_SETTINGS_FILE) as file:
            data = file.read()
        try:
            return cls.from_bytes(data)
        except BundleError as error:
            raise BundleError(f"{bundle.path}: {error}") from error


def read_tokenizer(bundle: Bundle) -> bytes:
    """Return the tokenizer's file, after checking its digest.

    Raises:
        BundleError: It is missing or damaged.
    """
    with bundle.open_file(LLM_TOKENIZER_FILE) as file:
        return file.read()


def map_embeddings(bundle: Bundle, settings: Settings) -> NDArray[Any]:
    """Return the table of token embeddings, `settings.dtype` [vocabulary, L], mapped from its file.

    The file is checked through the descriptor that is then mapped, so that what was checked is
    what is used.

    Raises:
        BundleError: It is missing, damaged, or of another shape or dtype than `settings` says.
    """
    shape = (settings.vocabulary, settings.hidden_size)
    expected = f"{settings.dtype} [{shape[0]}, {shape[1]}]"
    entry = bundle.manifest.files[LLM_EMBEDDINGS_FILE]
    with bundle.open_file(LLM_EMBEDDINGS_FILE) as file:
        try:
            found, dtype = npy_header(file, LLM_EMBEDDINGS_FILE, expected)
        except BundleError as error:
            raise BundleError(f"{bundle.path}: {error}") from error
        begin = file.tell()
        numbers = shape[0] * shape[1] * np.dtype(settings.dtype).itemsize
        if found != shape or dtype != np.dtype(settings.dtype) or entry.bytes != begin + numbers:
            raise BundleError(
                f"{bundle.path}: {LLM_EMBEDDINGS_FILE} holds {dtype} {list(found)} in "
                f"{entry.bytes - begin} bytes",
                expected=f"{expected} in {numbers}",
                cause="it is of another model",
                cure="export the bundle again",
            )
        return np.memmap(file, dtype=dtype, mode="r", offset=begin, shape=shape)


def _refuse(where: str, got: object, expected: str) -> BundleError:
    """Return the error for a value that has the wrong type or range."""
    return BundleError(
        f"{LLM_SETTINGS_FILE}: {where} is {str(got)[:80]!r}",
        expected=f"{expected}",
        cause="the file was edited or made by another tool",
        cure="export the bundle again",
    )


def _whole(where: str, value: object, *, low: int) -> int:
    """Return a whole number that is not smaller than `low`."""
    if type(value) is not int or not low <= value < 2**53:
        raise _refuse(where, value, f"a whole number, {low} or more")
    return value


def _ids(where: str, value: object) -> tuple[int, ...]:
    """Return a list of ids as a tuple."""
    if not isinstance(value, list) or not value:
        raise _refuse(where, value, "a list of ids")
    return tuple(_whole(where, each, low=0) for each in value)


def _placeholders(value: object) -> dict[Kind, int]:
    """Return the id of each kind's placeholder."""
    if not isinstance(value, dict) or "image" not in value or not set(value) <= set(KINDS):
        raise _refuse("placeholders", value, "an object with 'image', and perhaps 'video'")
    return {kind: _whole("placeholders", value[kind], low=0) for kind in KINDS if kind in value}
