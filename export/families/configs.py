"""What families share in reading a ``config.json``: its parts, checked, with defaults filled in."""

from __future__ import annotations

import copy
from typing import Any, cast

from vzip.export.architecture import (
    FeatureStrategy,
    ProjectorActivation,
    ProjectorConfig,
    TowerActivation,
    TowerConfig,
    TowerKind,
)
from vzip.export.families import Config
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.errors import CheckpointError

_KINDS: dict[str, TowerKind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}


def read(config_class: Any, config: Config, *, kinds: tuple[TowerKind, ...]) -> Any:
    """Return transformers' configuration of a model, what is left out filled in with its defaults.

    Args:
        config_class: Such as ``LlavaConfig``.
        config: The ``config.json``.
        kinds: Towers that the family has; the first is meant where none is named.

    Raises:
        CheckpointError: The tower is another, or the configuration is not of that class.
    """
    # Before transformers looks at it: its own refusal is long or absent.
    vision = config.get("vision_config")
    kind = vision.get("model_type", _type(kinds[0])) if isinstance(vision, dict) else vision
    if kind not in tuple(map(_type, kinds)):  # a list in the file is no key
        expected = " or ".join(repr(_type(each)) for each in kinds)
        raise refused("vision_config.model_type", kind, expected)
    return complete(config_class, config)


def complete(config_class: Any, config: Config) -> Any:
    """Let transformers' class fill in what a configuration leaves out.

    Raises:
        CheckpointError: The configuration is not of that class.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(copy.deepcopy(dict(config)))  # it takes parts out
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"config.json is no {config_class.__name__}: {reason[:200]}",
            cure="compare it with the published one",
        ) from error


def tower(config: Any) -> TowerConfig:
    """Return the sizes in a ``CLIPVisionConfig`` or ``SiglipVisionConfig``."""
    if config.num_channels != 3:
        raise refused("num_channels", config.num_channels, "3")
    return TowerConfig(
        kind=_KINDS[config.model_type],
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        activation=cast("TowerActivation", config.hidden_act),
        layer_norm_eps=config.layer_norm_eps,
    )


def projector(
    full: Any,
    sizes: TowerConfig,
    layers: tuple[int, ...],
    *,
    bias: bool,
    norm_eps: float | None = None,
) -> ProjectorConfig:
    """Return the two-layer projector of a model's configuration."""
    width = full.text_config.hidden_size
    return ProjectorConfig(
        in_features=sizes.hidden_size * len(layers),
        hidden_features=width,
        out_features=width,
        activation=cast("ProjectorActivation", full.projector_hidden_act),
        bias=bias,
        norm_eps=norm_eps,
    )


def feature_layers(config: Config, default: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return ``vision_feature_layer``: one integer or a list of them.

    Args:
        config: The ``config.json``.
        default: Of transformers' class.

    Raises:
        CheckpointError: It is neither.
    """
    value = config.get("vision_feature_layer", default)
    layers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not layers or any(type(layer) is not int for layer in layers):
        raise refused("vision_feature_layer", value, "a layer or a list of layers: integers")
    return layers


def strategy(full: Any, sizes: TowerConfig) -> FeatureStrategy:
    """Return ``vision_feature_select_strategy``.

    Raises:
        CheckpointError: It drops the first token where that is no CLS token but a patch.
    """
    value = cast("FeatureStrategy", full.vision_feature_select_strategy)
    if value == "default" and not sizes.cls_token:
        raise refused(
            "vision_feature_select_strategy", value, "'full', since a SigLIP tower has no CLS token"
        )
    return value


def tiling(full: Any, pinpoints: tuple[tuple[int, int], ...], sizes: TowerConfig) -> Tiling:
    """Return how large images are cut.

    Args:
        full: The model's configuration, whose pinpoints say how tiles are put together.
        pinpoints: Those of the image processor, which cuts, as (height, width).
        sizes: Of the tower, which takes a tile.

    Raises:
        CheckpointError: The two differ, or a resolution is not made of whole tiles.
    """
    own = full.image_grid_pinpoints
    if [list(pair) for pair in pinpoints] != own:
        raise refused(
            "image_grid_pinpoints", own, f"those of the image processor, {list(pinpoints)}"
        )
    side = sizes.image_size
    for pair in pinpoints:
        if any(length % side for length in pair):
            raise refused("image_grid_pinpoints", list(pair), f"multiples of image_size {side}")
    return Tiling(pinpoints)


def token_id(name: str, value: object) -> int:
    """Return the id of a placeholder that is an entry of the vocabulary.

    Raises:
        CheckpointError: It is no integer of 0 or above.
    """
    if type(value) is not int or value < 0:
        raise refused(name, value, "an integer of 0 or above")
    return value


def integer(config: Config, key: str) -> int:
    """Return an integer of a ``config.json``.

    Raises:
        CheckpointError: It is missing or something else.
    """
    value = config.get(key)
    if type(value) is not int:
        raise refused(key, value, "an integer")
    return value


def refused(key: str, got: object, expected: str) -> CheckpointError:
    """Return the error for a value that a family can't have."""
    return CheckpointError(
        f"config.json has {key} = {got!r}",
        expected=f"{expected}",
        cause="vzip doesn't know this variant of the model",
        cure="compare the file with the published one",
    )


def _type(kind: TowerKind) -> str:
    return next(name for name, each in _KINDS.items() if each == kind)
