"""The header of a file in the safetensors format, checked before memory is taken for anything.

The format: eight bytes with the length of a header, the header (JSON: for each tensor its dtype,
shape and place, and one flat object of texts, ``__metadata__``), then the tensors without a gap.
Source: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import math
import os
from typing import Any, BinaryIO, Final

from vzip.runtime.files import codec

LARGEST_HEADER: Final = 100_000_000
"""Bytes of the header; safetensors itself reads no longer one."""

METADATA: Final = "__metadata__"

_MOST_AXES: Final = 8


def read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Return where the tensors begin, and the header's JSON.

    Args:
        file: The file, open at its beginning.

    Raises:
        ValueError: It has no such header; the text says why.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise ValueError(f"its {size} bytes are no safetensors file")
    try:
        value = codec.parse(file.read(length))
    except ValueError as error:
        raise ValueError("its header is no strict JSON") from error
    if not isinstance(value, dict):
        raise ValueError("its header is no object")  # noqa: TRY004 - of the file, not of a caller
    return 8 + length, value


def check_place(shape: Any, place: Any, width: int, room: int) -> tuple[int, int]:
    """Return where a tensor begins and ends, behind the header.

    Args:
        shape: What the header says of its shape.
        place: Of its ``data_offsets``.
        width: Bytes of one element.
        room: Bytes behind the header.

    Raises:
        ValueError: They are no shape and no place, or don't belong together or into the file.
    """
    for numbers in (shape, place):
        whole = isinstance(numbers, (list, tuple)) and all(type(each) is int for each in numbers)
        if not whole or not all(0 <= each <= room for each in numbers):
            raise ValueError("its shape or place is beyond the file")
    # A product of very many numbers would take long.
    if len(place) != 2 or len(shape) > _MOST_AXES:
        raise ValueError("its shape or place has too many numbers")
    begin, end = place
    if end - begin != math.prod(shape) * width:
        raise ValueError("its shape and place don't belong together")
    return begin, end
