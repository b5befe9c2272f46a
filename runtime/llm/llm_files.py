"""What lies beside the graph of a language model in a bundle: its settings and its embeddings.

`docs/bundle.md` specifies both. What runs the graph needs nothing else of the checkpoint
but the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import numpy as np

from vzip.runtime.bundle.manifest import (
    LLM_EMBEDDINGS_FILE,
    LLM_FILE,
    LLM_SETTINGS_FILE,
    LLM_TOKENIZER_FILE,
)
from vzip.runtime.bundle.reader import Bundle, naming, npy_header
from vzip.runtime.errors import BundleError
from vzip.runtime.files import codec
from vzip.runtime.files.codec import OPTIONAL, Count, Index, Must, Record, within
from vzip.runtime.guard import door
from vzip.runtime.llm.prompts import Kind, Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "vzip-llm"
VERSION: Final = 2
"""Since 2 the graph has the input `POSITIONS`; the other one is read as well."""

INPUT: Final = "inputs_embeds"
POSITIONS: Final = "positions"
LOGITS: Final = "logits"

_LARGEST_SETTINGS = 2**20  # bytes; ours have a thousand


def cache_names(layers: int) -> tuple[str, ...]:
    """Return how the parts of a KV cache are called: behind ``past_`` and ``present_``."""
    return tuple(f"{part}_{layer}" for layer in range(layers) for part in ("key", "value"))


@dataclass(frozen=True)
class Settings(Record):
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
        positions: Whether the graph takes the tokens' positions. Not in version 1, whose graph
            numbers them one after the other.
    """

    words: Words
    placeholders: Annotated[
        Mapping[Kind, Index], Must(lambda ids: "image" in ids, "an object with 'image'")
    ]
    bos: str | None
    eos: Annotated[str, Must(bool, "a text that is not empty")]
    eos_id: Index
    eos_ids: Annotated[tuple[Index, ...], Must(bool, "a list of ids")]
    context: Count | None
    hidden_size: Count
    vocabulary: Count
    layers: Annotated[int, within(1, 1000)]
    kv_heads: Count
    head_size: Count
    dtype: Literal["float32", "float16"]
    positions: bool = field(default=False, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eos_id not in self.eos_ids:
            raise self.misfit("eos_ids", f"a list with eos_id, {self.eos_id}")

    def to_bytes(self) -> bytes:
        """Return the text of the file, UTF-8 with a newline at the end."""
        version = VERSION if self.positions else 1
        data = {"format": FORMAT, "version": version, **codec.write(self)}
        return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    @door(BundleError, "llm.json can't be understood", cure="export the bundle again")
    def from_bytes(cls, data: bytes) -> Settings:
        """Read what `to_bytes` returned.

        Raises:
            BundleError: It is something else, or of another version.
        """
        try:
            value = codec.parse(data)
        except ValueError as error:
            raise _no_settings(f"is no JSON ({error})") from error
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise _no_settings(f"begins with {data[:40].decode(errors='replace')!r}")
        version = value.pop("version", None)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise BundleError(
                f"{LLM_SETTINGS_FILE}: 'version' is {version!r}",
                expected=f"1 to {VERSION}",
                cause="the language model was exported by another version of vzip",
                cure="export the bundle again, or install that version",
            )
        with codec.reading(LLM_SETTINGS_FILE):
            settings = codec.read(cls, value)
            if settings.positions != (version > 1):
                raise settings.misfit("positions", f"{version > 1} in version {version}")
            return settings

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
        with naming(bundle.path):
            return cls.from_bytes(data)


def read_tokenizer(bundle: Bundle) -> bytes:
    """Return the tokenizer's file, after checking its digest.

    Raises:
        BundleError: It is missing or damaged.
    """
    with bundle.open_file(LLM_TOKENIZER_FILE) as file:
        return file.read()


@door(BundleError, "'{bundle.path}': the LLM's embeddings can't be mapped")
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
        with naming(bundle.path):
            found, dtype = npy_header(file, LLM_EMBEDDINGS_FILE, expected)
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


def _no_settings(fault: str) -> BundleError:
    """Return the error for a file that is no description of a language model."""
    return BundleError(
        f"{LLM_SETTINGS_FILE} {fault}",
        expected=f"an object with 'format': '{FORMAT}'",
        cause="the file was edited or made by another tool",
        cure="export the bundle again",
    )
