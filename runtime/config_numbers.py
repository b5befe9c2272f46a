"""Bounds of the numbers in a ``config.json``, which hold before anything is made of them.

Sizes are allocated and layers looped over, by transformers' own configuration classes too: 2 KB of
text may ask for a list of 10⁷ layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.preprocess import MAX_IMAGE_SIZE

_LAYERS, _WIDTH, _COUNT = 1000, 2**17, 2**31
_BOUNDS: Mapping[str, int] = {
    "head_dim": _WIDTH,
    "hidden_size": _WIDTH,
    "image_seq_length": _COUNT,
    "image_size": MAX_IMAGE_SIZE,
    "intermediate_size": 2**20,
    "max_position_embeddings": _COUNT,
    "max_window_layers": _LAYERS,
    "mm_hidden_size": _WIDTH,
    "num_attention_heads": 2**12,
    "num_channels": 2**12,
    "num_experts": 2**12,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 2**12,
    "num_labels": 2**16,
    "num_layers": _LAYERS,
    "num_local_experts": 2**12,
    "patch_size": MAX_IMAGE_SIZE,
    "projection_dim": _WIDTH,
    "video_seq_length": _COUNT,
    "vocab_size": 2**24,
}
"""Largest values that are believed: several times those of the largest models there are."""

_ZERO = frozenset(
    {"max_window_layers", "num_experts", "num_local_experts", "num_labels", "projection_dim"}
)  # may say: none
_DEEPEST = 20
_LONGEST = 100  # characters of a value in a message


def check_numbers(config: Mapping[str, Any], part: str = "") -> None:
    """Refuse numbers that no model has, in a configuration and its parts.

    Raises:
        CheckpointError: A size is no integer or out of its bounds, or a number isn't finite.
    """
    for key, value in _numbers(config, part):
        bound = _BOUNDS.get(key.rpartition(".")[2])
        least = 0 if key.rpartition(".")[2] in _ZERO else 1
        if bound is not None and (type(value) is not int or not least <= value <= bound):
            raise _refused(key, value, f"an integer from {least} to {bound}")
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise _refused(key, value, "a number of less than 2**63")


def shown(value: object) -> str:
    """Return a value as it stands in a message."""
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _numbers(config: Mapping[str, Any], part: str) -> Iterator[tuple[str, object]]:
    """Every number, text and truth of a configuration, with its place."""
    rest: list[tuple[str, object, int]] = [(part, config, 0)]
    while rest:
        place, value, depth = rest.pop()
        if depth > _DEEPEST:
            raise CheckpointError(
                f"config.json has more than {_DEEPEST} parts inside each other at {place[:40]}",
                cause="it is damaged",
                cure="compare it with the published one",
            )
        if isinstance(value, Mapping):
            rest += [(inside(place, str(key)), each, depth + 1) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            rest += [(f"{place}[]", each, depth + 1) for each in value]
        elif value is not None:
            yield place, value


def inside(part: str, key: str) -> str:
    """Return the place of a key in a part, which is empty for the whole."""
    return f"{part}.{key}" if part else key


def _refused(key: str, got: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"config.json has {key} = {shown(got)}",
        expected=expected,
        cause="no model has that",
        cure="compare the file with the published one",
    )
