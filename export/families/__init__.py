"""One file per checkpoint family; what in a ``config.json`` decides between them.

A family is a class with three functions, registered by decorator. To add one: a file here with the
class, and its import in `_known`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vzip.export.architecture import VisionConfig
from vzip.runtime.errors import CheckpointError

Config = Mapping[str, Any]


class Family(Protocol):
    """What one family knows of its configurations.

    Attributes:
        claimed_by: What in a configuration makes it this family's, as it stands in error messages.
        published: Hub id → that repository's ``config.json`` and ``preprocessor_config.json`` as
            published, for `--weights random` without a hub.
    """

    claimed_by: str
    published: Mapping[str, tuple[Config, Config]]

    def claims(self, config: Config) -> bool:
        """Say whether a configuration is this family's, from its keys alone."""
        ...

    def tower_reference(self, config: Config) -> str | None:
        """Return the folder or hub id that the tower is taken from, None where it is inside."""
        ...

    def describe(
        self, config: Config, preprocessor: Config | None, tower: Config | None
    ) -> VisionConfig:
        """Read the numbers; see `describe`."""
        ...


_REGISTRY: dict[str, Family] = {}


def register(name: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family's class under the name that `VisionConfig.family` has."""

    def add(family: type[Family]) -> type[Family]:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = family()
        return family

    return add


def names() -> tuple[str, ...]:
    """Return the names of all families."""
    return tuple(_known())


def describe(
    config: Config, preprocessor: Config | None, *, tower: Config | None = None
) -> VisionConfig:
    """Read a vision side's numbers from the files of a checkpoint.

    Args:
        config: Its ``config.json``.
        preprocessor: The image processor's settings (``preprocessor_config.json``, or the part
            ``image_processor`` of ``processor_config.json``), None where the checkpoint has none.
        tower: ``config.json`` of the tower's checkpoint, where `tower_reference` names one.

    Returns:
        The architecture, feature layer and preprocessing.

    Raises:
        CheckpointError: No family knows the configuration, or it holds something that vzip can't
            compute exactly.
    """
    return _of(config).describe(config, preprocessor, tower)


def tower_reference(config: Config) -> str | None:
    """Return the folder or hub id of the checkpoint that a model's tower comes from, or None."""
    return _of(config).tower_reference(config)


def published(hub_id: str) -> VisionConfig | None:
    """Return the architecture that a hub repository is known to hold, without asking the hub."""
    for family in _known().values():
        if hub_id in family.published:
            config, preprocessor = family.published[hub_id]
            return family.describe(config, preprocessor, None)
    return None


def _of(config: Config) -> Family:
    for family in _known().values():
        if family.claims(config):
            return family
    got = {key: config.get(key) for key in ("model_type", "architectures") if key in config}
    keys = sorted(key for key in config if key.startswith("mm_") or key == "vision_config")
    known = "; ".join(f"{name} ({family.claimed_by})" for name, family in _known().items())
    raise CheckpointError(
        f"config.json has {got} and the vision keys {keys}, which no family of vzip knows; "
        f"expected one of: {known}"
    )


def _known() -> Mapping[str, Family]:
    from vzip.export.families import llava  # noqa: F401 - imported for its registrations

    return _REGISTRY
