"""Which tokens leave the graph: one file per selection, registered by decorator.

A selection sees the tower alone, never the question, so an image is encoded once for all of its
questions. Its graph must be static: no shape may depend on values. To add one: a file here with a
class, found by its being here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vzip.export.algorithm.budget import VISIONZIP
from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vzip.export.algorithm.budget import Budget
    from vzip.export.algorithm.visionzip import Plan

DEFAULT = VISIONZIP

# The selection that scores by attention is the paper's, and has the paper's name.
_NAMES = {"attention": DEFAULT}
_MODULES = {name: module for module, name in _NAMES.items()}


@dataclass(frozen=True)
class Signals:
    """What the tower offers a selection, while the graph is traced.

    Attributes:
        keys: float32 [B, H, S, d], k_proj's output of the deepest feature layer (pooled, where the
            tokens are).
        cls_token: Whether token 0 is CLS; the other N tokens are patches in raster order.
        attention_scores: Gives float32 [B, N], VisionZip's score of every patch from that layer's
            attention. Called only by who needs it: the graph then has the side branch it takes.
    """

    keys: Tensor
    cls_token: bool
    attention_scores: Callable[[], Tensor]


class SelectionRule(Protocol):
    """One way to choose.

    Attributes:
        uses_attention: Whether `plan` asks for `Signals.attention_scores`.
    """

    uses_attention: bool

    def plan(self, signals: Signals, budget: Budget) -> Plan:
        """Return which tower tokens make which output token.

        Traced into the graph: see `vzip.export.algorithm.visionzip` for what that allows.
        """
        ...

    def ranking(self, attention_scores: NDArray[np.float64], kept: int) -> NDArray[np.float64]:
        """Return the scores [n, N] by which `plan` keeps patches, highest first.

        `vzip check` and the proof of an engine judge the kept set by them.

        Args:
            attention_scores: [n, N], VisionZip's scores from the untouched tower.
            kept: How many patches are kept.
        """
        ...


_REGISTRY: dict[str, SelectionRule] = {}


def register(name: str) -> Callable[[type[SelectionRule]], type[SelectionRule]]:
    """Register a selection's class under the name that ``--selection`` takes."""

    def add(selection: type[SelectionRule]) -> type[SelectionRule]:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = selection()
        return selection

    return add


def names() -> tuple[str, ...]:
    """Return the names of all selections, the default first, without importing any."""
    found = sorted(
        _NAMES.get(module.name, module.name) for module in pkgutil.iter_modules(__path__)
    )
    return tuple(sorted(found, key=lambda name: name != DEFAULT))


def check(name: str) -> None:
    """Refuse a name that no selection has, without importing any.

    Raises:
        InvalidInputError: There is none.
    """
    if name not in names():
        raise InvalidInputError(
            f"the selection is {name!r}",
            expected=f"one of {', '.join(names())}",
            cause="it was mistyped, or the bundle was made by another version of vzip",
        )


def get(name: str) -> SelectionRule:
    """Return the selection of a name.

    Raises:
        InvalidInputError: There is none.
    """
    check(name)
    importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    registered: Mapping[str, SelectionRule] = _REGISTRY
    return registered[name]
