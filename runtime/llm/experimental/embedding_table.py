"""The token embeddings of a checkpoint's LLM, read from its file without torch.

No weight is read but the rows that a prompt needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vzip.runtime.errors import CheckpointError, first_line
from vzip.runtime.files import codec
from vzip.runtime.files.plain import LONGEST_TEXT, open_plain, read_plain
from vzip.runtime.files.tensor_header import check_place, read_header
from vzip.runtime.guard import door
from vzip.runtime.llm.text_side import TextCheckpoint, fetch
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    import numpy.typing as npt

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
# In every layout of transformers, old and new, the LLM's table is the only tensor of this name.
_TABLE: Final = "embed_tokens.weight"


@dataclass(frozen=True)
class EmbeddingTable:
    """The token embeddings of an LLM, on the disk.

    Attributes:
        raw: [V, L], as stored; bfloat16 as uint16.
    """

    raw: npt.NDArray[Any]

    @classmethod
    @door(CheckpointError, "the token embeddings of '{checkpoint.files.model}' can't be mapped")
    def of(cls, checkpoint: TextCheckpoint) -> EmbeddingTable:
        """Find and map the table of a checkpoint; its rows are read as they are asked for.

        `vzip.runtime.files.tensor_header` describes the format. The package safetensors gives
        numpy no bfloat16 and reads a tensor whole.

        Raises:
            CheckpointError: It is not there, the file is damaged, or its table has another shape or
                dtype.
        """
        path = _file_of(checkpoint)
        dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
        try:
            with open_plain(path) as file:
                start, header = read_header(file)
                ((_, entry),) = (each for each in header.items() if each[0].endswith(_TABLE))
                dtype, shape = np.dtype(dtypes[entry["dtype"]]), entry["shape"]
                room = os.fstat(file.fileno()).st_size - start
                begin, _ = check_place(shape, entry["data_offsets"], dtype.itemsize, room)
                rows, width = shape
                raw = np.memmap(file, dtype, "r", start + begin, (rows, width))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(
                checkpoint,
                path,
                f"holds no readable table of token embeddings ({first_line(error)})",
            ) from error
        if width != checkpoint.hidden_size:
            raise _damaged(
                checkpoint,
                path,
                f"holds token embeddings of width {width}",
                expected=f"{checkpoint.hidden_size}",
            )
        return cls(raw)

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the embeddings of some tokens, float32 [m, L]."""
        found = np.asarray(self.raw[np.asarray(ids, np.int64)])
        if found.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float32)


def _file_of(checkpoint: TextCheckpoint) -> Path:
    """Return the file that holds the table, downloading it if it is not there yet."""
    files = checkpoint.files
    folder, file = files.folder, _SINGLE
    index = folder / _INDEX
    if index.is_file():
        try:
            listed = codec.parse(read_plain(index, LONGEST_TEXT))["weight_map"]
            found = {str(f) for name, f in listed.items() if name.endswith(_TABLE)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(checkpoint, index, "is no index of tensors") from error
        if len(found) != 1:
            raise _damaged(
                checkpoint,
                index,
                f"names {counted(len(found), 'file')} with …{_TABLE}",
                expected="1",
            )
        (file,) = found
    if not (folder / file).is_file():
        folder = fetch(files.name, files.model, files.revision, (file,))
    path = folder / file
    if Path(file).name != file or not path.is_file():
        raise _damaged(checkpoint, path, "is not there", expected="the token embeddings")
    return path


def _damaged(
    checkpoint: TextCheckpoint, path: Path, what: str, *, expected: str = ""
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.name}: '{path}' {what}",
        expected=expected,
        cure="give a whole checkpoint in the safetensors format",
    )
