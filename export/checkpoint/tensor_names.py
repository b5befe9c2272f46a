"""The names that the same tensors have in the layouts that are out there.

A tensor's canonical name is looked for under every prefix of its part. So a checkpoint that mixes
layouts reads too, and a tensor that is there twice is an error rather than a guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vzip.export.architecture import NEWLINE
from vzip.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """A part of the vision side and where it is stored.

    Attributes:
        canonical: The prefix of its canonical names.
        prefixes: What stands for it in files, published layouts first.
        renamed: Prefix → (module as in the canonical name → module as in the file), for layouts
            that number modules.
        roots: What the names of everything begin with that is stored for this part, known or not.
    """

    canonical: str
    prefixes: tuple[str, ...]
    renamed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    roots: tuple[str, ...] = ()

    def stored(self, name: str) -> tuple[str, ...]:
        """Return every name that a file may have for a canonical one."""
        key = name.removeprefix(self.canonical)
        return tuple(prefix + self._key(prefix, key) for prefix in self.prefixes)

    def _key(self, prefix: str, key: str) -> str:
        module, dot, rest = key.partition(".")
        return self.renamed.get(prefix, {}).get(module, module) + dot + rest


def tower_part(module: str) -> Part:
    """Return the tower in a model's own checkpoint.

    Args:
        module: Its name there, see `VisionConfig.tower_module`.
    """
    return Part(
        canonical="tower.",
        prefixes=(
            f"{module}.vision_model.",  # as published
            f"model.{module}.vision_model.",  # transformers from 4.52
            f"{module}.",  # transformers 5
            f"model.{module}.",  # transformers 5, its own names
            f"model.{module}.{module}.vision_model.",  # original LLaVA, a copy
            f"model.{module}.{module}.",  # the same, made by transformers 5
        ),
        roots=(f"{module}.", f"model.{module}."),
    )


STANDALONE_TOWER = Part(
    canonical="tower.",
    prefixes=(
        "vision_model.",  # CLIPModel, and CLIPVisionModel before transformers 5
        "",  # CLIPVisionModel of transformers 5
    ),
    roots=("",),
)

_NUMBERED = {"linear_1": "0", "linear_2": "2"}  # places in the original's nn.Sequential; 1 is GELU

_PROJECTORS = (
    "multi_modal_projector.",
    "model.multi_modal_projector.",
    "model.mm_projector.",  # original LLaVA
    "mm_projector.",
)
PROJECTOR = Part(
    canonical="projector.",
    prefixes=_PROJECTORS,
    renamed={"model.mm_projector.": _NUMBERED, "mm_projector.": _NUMBERED},
    roots=_PROJECTORS,
)

STANDALONE_PROJECTOR = Part(
    canonical="projector.",
    prefixes=(*PROJECTOR.prefixes, "projector.", ""),
    renamed=PROJECTOR.renamed,
    roots=(*PROJECTOR.prefixes, "projector.", "linear_", "projector_layernorm."),
)
"""A projector in a file of its own, such as ``mm_projector.bin``."""

NEWLINE_EMBEDDING = Part(canonical=NEWLINE, prefixes=(NEWLINE, f"model.{NEWLINE}"))
"""The one tensor that is called like its part."""


_WRAPPERS = (
    "base_model.model.",  # PEFT: also non_lora_trainables.bin, what original LLaVA's LoRA left out
    "module.",  # DistributedDataParallel and DeepSpeed
    "_orig_mod.",  # torch.compile
)


def unwrapped(name: str) -> str:
    """Return a stored name without what training wrapped around the model."""
    while name.startswith(_WRAPPERS):
        name = next(name.removeprefix(each) for each in _WRAPPERS if name.startswith(each))
    return name.replace("._orig_mod.", ".")


def resolve(
    part: Part, wanted: Iterable[str], available: Collection[str], *, source: str
) -> dict[str, str]:
    """Find the stored names of canonical tensors.

    Args:
        part: The part that `wanted` belongs to.
        wanted: Canonical names.
        available: Names in the files.
        source: Where they are, for the error.

    Returns:
        Canonical name → stored name of all that are there.

    Raises:
        CheckpointError: A tensor is there under two names.
    """
    found = {}
    for name in wanted:
        there = [stored for stored in part.stored(name) if stored in available]
        if len(there) > 1:
            raise twice(name, *there[:2], source=source)
        if there:
            found[name] = there[0]
    return found


def twice(name: str, first: str, second: str, *, source: str) -> CheckpointError:
    """Return the error for a tensor that is there under two names."""
    return CheckpointError(
        f"{source} holds '{name}' under two names, '{first}' and '{second}'",
        expected="one",
        cause="two layouts were merged",
        cure="remove one of them",
    )


def missing(part: Part, name: str, available: Collection[str], *, source: str) -> CheckpointError:
    """Return the error for a tensor that is not there: names looked for, and similar ones."""
    candidates = part.stored(name)
    # The closest of each candidate, in their order: a dict keeps it and drops what comes twice.
    close = dict.fromkeys(
        match
        for candidate in candidates
        for match in difflib.get_close_matches(candidate, available, n=2, cutoff=0.8)
    )
    similar = ", ".join(list(close)[:4]) or "none"
    return CheckpointError(
        f"tensor '{name}' is not in {source}",
        cause=(
            f"looked for {', '.join(candidates)}; similar names there: {similar}; the checkpoint "
            "is incomplete or has a layout that vzip doesn't know: compare it with the published "
            "one"
        ),
    )
