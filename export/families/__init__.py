"""One file per checkpoint family; what in a ``config.json`` decides between them.

A family is a class registered by decorator. To add one: a file here with the class; `_known` finds
it. An alias (`ALIASES` in `vzip.runtime.models`) and ``vzip ask`` (`CLASSES` in
`vzip.runtime.llm.local.transformers`) are one line each elsewhere. What families share is in
`HuggingFaceForm`, `configs` and `processors`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vzip.export.architecture import Media, VisionConfig
from vzip.runtime.errors import CheckpointError, InvalidInputError

Config = Mapping[str, Any]
Unit = Literal["image", "tile", "frame"]


@dataclass(frozen=True)
class View:
    """How a family's LLM sees images, or videos.

    Attributes:
        unit: What a budget counts the tokens of.
        pool: As `VisionConfig.pool`.
    """

    unit: Unit
    pool: Literal[1, 2] = 1


@dataclass(frozen=True)
class PublishedModel:
    """What a hub repository is known to hold.

    Attributes:
        config: Its ``config.json``, as far as the vision side goes.
        preprocessor: Its ``preprocessor_config.json``, likewise.
        budgets: Those that the paper gives for it, dominant + contextual of a unit, as they stand
            in ``vzip models``; empty where it gives none.
    """

    config: Config
    preprocessor: Config
    budgets: str = ""


class Family(Protocol):
    """What one family knows of its configurations.

    Attributes:
        media: What a graph can be made for; the family's own choice comes first.
        published: Hub id → what that repository holds, for `--weights random` without a hub.
    """

    media: Mapping[Media, View]
    published: Mapping[str, PublishedModel]

    @property
    def claimed_by(self) -> str:
        """What in a configuration makes it this family's, as it stands in error messages."""
        ...

    def claims(self, config: Config) -> bool:
        """Say whether a configuration is this family's, from its keys alone."""
        ...

    def tower_reference(self, config: Config) -> str | None:
        """Return the folder or hub id that the tower is taken from, None where it is inside."""
        ...

    def own_tower(self, config: Config) -> bool:
        """Say whether the checkpoint's own tower counts, rather than the one that it names."""
        ...

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None, media: Media
    ) -> VisionConfig:
        """Read the numbers; see `describe`. `media` is one of this family's."""
        ...


class HuggingFaceForm:
    """What families in Hugging Face's form have in common: one checkpoint holds all parts.

    Attributes:
        model_type: What ``model_type`` says in their configurations.
    """

    model_type: str

    @property
    def claimed_by(self) -> str:
        """See `Family`."""
        return f"model_type '{self.model_type}'"

    def claims(self, config: Config) -> bool:
        """Say whether the configuration names this family."""
        return config.get("model_type") == self.model_type

    def tower_reference(self, config: Config) -> str | None:  # noqa: ARG002 - the Protocol's
        """Return None: the towers are in the checkpoint."""
        return None

    def own_tower(self, config: Config) -> bool:  # noqa: ARG002 - the Protocol's
        """Return True: there is no other."""
        return True


_REGISTRY: dict[str, Family] = {}


def register(name: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family's class under the name that `VisionConfig.family` has."""

    def add(family: type[Family]) -> type[Family]:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = family()
        return family

    return add


def families() -> Mapping[str, Family]:
    """Return name → family of all there are."""
    return _known()


def family_of(config: Config) -> tuple[str, Family]:
    """Return the family of a configuration and its name.

    Raises:
        CheckpointError: There is none; the message says which there are, and what decided.
    """
    for name, family in _known().items():
        if family.claims(config):
            return name, family
    got = {key: config.get(key) for key in ("model_type", "architectures") if key in config}
    keys = sorted(key for key in config if key.startswith("mm_") or key == "vision_config")
    known = "; ".join(f"{name} ({family.claimed_by})" for name, family in _known().items())
    raise CheckpointError(
        f"config.json has {got} and the vision keys {keys}, which no family of vzip knows",
        expected=f"one of: {known}",
    )


def describe(
    config: Config,
    preprocessor: Config | None,
    *,
    tower: Config | None = None,
    media: Media | None = None,
) -> VisionConfig:
    """Read a vision side's numbers from the files of a checkpoint.

    Args:
        config: Its ``config.json``.
        preprocessor: The settings of its image processor, or for video those of its video processor
            where it has one: ``preprocessor_config.json`` and the like. None where there are none.
        tower: ``config.json`` of the tower's checkpoint, where `tower_reference` names one.
        media: What the graph is made for; None for the family's own choice.

    Returns:
        The architecture, feature layers and preprocessing.

    Raises:
        CheckpointError: No family knows the configuration, or it holds something that vzip can't
            compute exactly.
        InvalidInputError: The family has no graph for `media`.
    """
    family = family_of(config)[1]
    return family.describe(config, preprocessor, tower, chosen_media(config, media))


def tower_reference(config: Config) -> str | None:
    """Return the folder or hub id of the checkpoint that a model's tower comes from, or None."""
    return family_of(config)[1].tower_reference(config)


def own_tower(config: Config) -> bool:
    """Say whether a model's tower is the one in its checkpoint, rather than the one it names."""
    return family_of(config)[1].own_tower(config)


def chosen_media(config: Config, media: Media | None) -> Media:
    """Return what a graph is made for: `media`, or without one the family's own choice.

    Raises:
        CheckpointError: No family knows the configuration.
        InvalidInputError: The family has no graph for `media`.
    """
    name, family = family_of(config)
    return _chosen(name, family, media)


def published(hub_id: str, media: Media | None = None) -> VisionConfig | None:
    """Return the architecture that a hub repository is known to hold, without asking the hub.

    Raises:
        InvalidInputError: Its family has no graph for `media`.
    """
    for name, family in _known().items():
        if hub_id in family.published:
            known = family.published[hub_id]
            chosen = _chosen(name, family, media)
            return family.describe(known.config, known.preprocessor, None, chosen)
    return None


def _chosen(name: str, family: Family, media: Media | None) -> Media:
    if media is None:
        return next(iter(family.media))
    if media not in family.media:
        raise InvalidInputError(
            f"media is '{media}', and the family '{name}' has a graph for "
            f"{' and '.join(family.media)} alone",
            expected=f"{' or '.join(repr(each) for each in family.media)}",
            cause="its towers see the frames of a clip as images",
            cure="leave media out",
        )
    return media


@functools.cache
def _known() -> Mapping[str, Family]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _REGISTRY
