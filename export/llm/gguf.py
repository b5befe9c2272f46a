"""The language model of a LLaVA as a GGUF, which llama.cpp runs (docs/llm/llama-cpp.md).

Only the LLM's tensors are read, from only the shards that hold them, one at a time; the file takes
its name when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from vzip.export import families
from vzip.export.checkpoint.reader import Checkpoint
from vzip.export.llm.gguf_tensors import SECTIONED, Sizes, Stored, gguf_names, gguf_tensor
from vzip.export.llm.gguf_vocab import Vocabulary, read_vocabulary
from vzip.runtime.console import progress
from vzip.runtime.errors import CheckpointError, InvalidInputError, missing
from vzip.runtime.files import atomic, codec
from vzip.runtime.guard import door
from vzip.runtime.llm.chat_template import warn_of_date
from vzip.runtime.llm.local.gguf_model import Key
from vzip.runtime.llm.text_side import TextCheckpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter

NAME: Final = "convert"

_FILE_TYPES: Final = {
    torch.float32: "ALL_F32",
    torch.float16: "MOSTLY_F16",
    torch.bfloat16: "MOSTLY_BF16",
}
"""dtype of the matrices → gguf's name of the file's type."""


@door(CheckpointError, "the LLM of '{model}' can't be converted")
def convert(
    model: str | Path,
    path: Path,
    *,
    revision: str | None = None,
    positions: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the LLM of a LLaVA as a GGUF; one that is there is replaced.

    Matrices keep the checkpoint's dtype (float16, float32 or bfloat16), vectors become float32.

    Args:
        model: An alias, a local folder or a hub id; see `vzip.runtime.models.locate`.
        path: The file, in a folder that exists.
        revision: Branch, tag or commit of a hub repository.
        positions: Whether the file is to take positions with gaps, so that compressed tokens keep
            their own: it is written as a ``qwen2vl``.
        step: Called with what is done next.

    Raises:
        MissingDependencyError: gguf or transformers is not installed.
        CheckpointError: The checkpoint is missing, damaged or incomplete, in original LLaVA's
            layout, or has an LLM or a tokenizer that llama.cpp doesn't run in the same way.
        InvalidInputError: The file can't be written; what was there is as it was.
    """
    try:
        import gguf  # noqa: F401 - before anything is read
    except ImportError as error:
        raise missing(error.name or "gguf", needed_for="'vzip convert'", extra="export") from error
    checkpoint = Checkpoint.open(model, revision=revision)
    _check_family(checkpoint)
    step("reading the configuration and the tokenizer")
    text = TextCheckpoint.open(NAME, model, revision=checkpoint.revision)
    warn_of_date(path.name, text.files.template)
    sizes = Sizes.of(text.files.config, positions=positions)
    vocabulary = read_vocabulary(text.files.tokenizer, sizes.rows)
    stored = Stored.find(checkpoint.folder, sizes)
    step(f"writing {path.name}")
    write(path, text, vocabulary, stored, name=Path(checkpoint.model_id).name)


def write(
    path: Path, text: TextCheckpoint, vocabulary: Vocabulary, stored: Stored, *, name: str
) -> None:
    """Write a GGUF of tensors that were found.

    Args:
        path: As for `convert`.
        text: The checkpoint's text side.
        vocabulary: That of its tokenizer.
        stored: The tensors.
        name: The model's name.

    Raises:
        CheckpointError: A tensor is missing or damaged, or of a dtype that no GGUF holds.
        InvalidInputError: The file can't be written; what was there is as it was.
    """
    import gguf

    dtypes = _dtypes(stored)
    writer = gguf.GGUFWriter(None, stored.sizes.arch)
    _add_sizes(writer, stored.sizes, max(dtypes.values(), key=list(dtypes.values()).count))
    _add_vocabulary(writer, vocabulary)
    _add_prompts(writer, text)
    writer.add_name(name)
    _write(writer, stored, dtypes, path)


def _check_family(checkpoint: Checkpoint) -> None:
    """Refuse what transformers doesn't run, so that there would be nothing to compare with."""
    name, _ = families.family_of(checkpoint.config)
    if name == "llava-original":
        raise CheckpointError(
            f"{NAME}: {checkpoint.folder.where} is in original LLaVA's layout",
            expected="transformers'",
            cure=(
                "convert its llava-hf twin, such as llava-1.5-7b, or make a GGUF with llama.cpp's "
                "own tools, which 'vzip ask' takes too"
            ),
        )


def _dtypes(stored: Stored) -> dict[str, torch.dtype]:
    """Return canonical name → dtype of the matrices; no value is read.

    Raises:
        CheckpointError: One has another than a GGUF holds as it is.
    """
    dtypes = {name: tensor.dtype for name, tensor in stored.read() if tensor.ndim > 1}
    for name, dtype in dtypes.items():
        if dtype not in _FILE_TYPES:
            raise CheckpointError(
                f"{NAME}: tensor '{stored.names[name]}' in {stored.source} is "
                f"{str(dtype).removeprefix('torch.')}",
                expected="float16, float32 or bfloat16",
                cause="the checkpoint is quantised",
                cure="convert the original one, and quantise the GGUF with llama-quantize",
            )
    return dtypes


def _add_sizes(writer: GGUFWriter, sizes: Sizes, dtype: torch.dtype) -> None:
    from gguf import LlamaFileType

    writer.add_type("model")
    writer.add_file_type(LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_vocab_size(sizes.rows)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(sizes.rms_eps)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.rope_theta)
    if sizes.arch == SECTIONED:
        writer.add_rope_dimension_sections([sizes.head_dim // 2, 0, 0, 0])


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "llama":
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix in ("each", "missing"))
        writer.add_string(Key.SPACE_PREFIX, vocabulary.space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)
    if vocabulary.nfc:
        writer.add_string(Key.NORMALIZER, "NFC")


def _add_prompts(writer: GGUFWriter, text: TextCheckpoint) -> None:
    """Add what `vzip ask` needs beyond llama.cpp, so that it needs no checkpoint."""
    writer.add_string(Key.WORDS, json.dumps(codec.write(text.prompts.words), ensure_ascii=False))
    writer.add_string(Key.EOS_IDS, json.dumps(sorted(text.eos_ids)))
    for kind, token_id in text.prompts.placeholders.items():
        writer.add_int32(Key.TOKEN_ID.format(kind), token_id)


def _write(writer: GGUFWriter, stored: Stored, dtypes: dict[str, torch.dtype], path: Path) -> None:
    """Write the file beside its target, tensor by tensor, and let it take the name.

    Raises:
        CheckpointError: As `Stored.read`.
        InvalidInputError: The file can't be written.
    """
    from gguf import GGMLQuantizationType

    shapes, names = stored.sizes.shapes(), gguf_names(stored.sizes)
    for name in stored.names:
        dtype = dtypes.get(name, torch.float32)
        raw = GGMLQuantizationType.BF16 if dtype == torch.bfloat16 else None
        array = torch.empty(0, dtype=torch.uint16 if raw else dtype).numpy()
        count = int(torch.Size(shapes[name]).numel())
        nbytes = array.itemsize * count
        writer.add_tensor_info(names[name], shapes[name], array.dtype, nbytes, raw)
    for name, shape in stored.sizes.zeros().items():
        zero = np.zeros(shape, np.float32)
        writer.add_tensor_info(names[name], shape, zero.dtype, zero.nbytes)
    staged: atomic.StagedFolder | None = None
    try:
        staged = atomic.StagedFolder(path)
        file = staged.path / path.name
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _with_progress(stored):
            writer.write_tensor_data(gguf_tensor(name, tensor, stored.sizes))
        for shape in stored.sizes.zeros().values():
            writer.write_tensor_data(np.zeros(shape, np.float32))
        _sync(writer)
        writer.close()
        atomic.rename_file(file, path)
    except OSError as error:
        raise InvalidInputError(
            f"{NAME}: '{path}' can't be written ({error.strerror or error})",
            cure="give a file in a folder that you may write to, on a disk with room",
        ) from error
    finally:
        writer.close()
        if staged is not None:
            staged.close()


def _with_progress(stored: Stored) -> Any:
    return progress(stored.read(), desc="tensors", total=len(stored.names), unit="tensor")


def _sync(writer: GGUFWriter) -> None:
    """Flush the file to the disk."""
    writer.flush()
    assert writer.fout is not None
    for file in writer.fout:
        os.fsync(file.fileno())
