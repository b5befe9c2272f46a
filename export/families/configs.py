"""What families share in reading a ``config.json``: its parts, checked, with defaults filled in."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from typing import Any, cast

from vzip.export.architecture import (
    FeatureStrategy,
    ProjectorActivation,
    ProjectorConfig,
    TowerActivation,
    TowerConfig,
    TowerKind,
)
from vzip.export.families import Config, known_keys
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.config_numbers import check_numbers, shown
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.preprocess import MAX_RESIZED_PIXELS

refused = known_keys.refused

_KINDS: dict[str, TowerKind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}

# Of published files and of transformers' older versions; none changes what is computed.
_HARMLESS = frozenset(
    {
        "hidden_size",
        "image_grid_pinpoints",
        "image_seq_length",
        "image_token_id",
        "image_token_index",
        "use_image_newline_parameter",
        "video_seq_length",
        "video_token_id",
        "video_token_index",
        "vision_feature_layers",
        "vocab_size",
    }
)
# What conversions leave of the original form; transformers doesn't look at it.
_MERGE = "mm_patch_merge_type"
_LEFT: Mapping[str, tuple[object, ...]] = {
    **{key: values for key, values in known_keys.ORIGINAL_VALUES.items() if key != _MERGE},
    "image_aspect_ratio": ("pad", "square", "anyres", "anyres_max_9"),
    "mm_projector_type": ("mlp2x_gelu",),
}
MAX_PINPOINTS = 1024
"""Most resolutions that are believed, of each of which every picture's merit is computed."""

_HARMLESS_TOWER = frozenset({"logit_scale_init_value", "projection_dim", "vocab_size"})


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
    check_numbers(config)
    known_keys.check_class(config, _classes(config_class))
    known_keys.check(config, known=known(config_class), allowed=_LEFT)
    if isinstance(vision, dict):
        check_tower(vision, "vision_config")
    _check_llm(config.get("text_config"))
    return complete(config_class, config)


def _check_llm(text: object) -> None:
    """Refuse an LLM that transformers doesn't know: it would list the 500 that it does."""
    import transformers

    kind = text.get("model_type") if isinstance(text, dict) else None
    kinds = transformers.CONFIG_MAPPING
    if kind is not None and (not isinstance(kind, str) or kind not in kinds):
        close = difflib.get_close_matches(str(kind), list(kinds), n=3)
        raise CheckpointError(
            f"config.json has text_config.model_type = {shown(kind)}",
            expected=" or ".join(map(repr, close))
            or "a language model of transformers, such as 'llama', 'mistral' or 'qwen2'",
            cause=f"transformers {transformers.__version__} has no such model",
            cure="compare the file with the published one, or install a newer transformers",
        )


def known(config_class: Any) -> frozenset[str]:
    """Return the keys that a model in Hugging Face's form may have at its top."""
    return known_keys.keys_of(config_class) | _HARMLESS | known_keys.ORIGINAL | {_MERGE}


def check_tower(config: Config, part: str) -> None:
    """Refuse a tower's configuration whose keys would change what it computes.

    Args:
        config: Of a tower: its ``model_type`` is known.
        part: Its place, for the message.

    Raises:
        CheckpointError: It has such a key, or a class of its own.
    """
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    config_class = (
        SiglipVisionConfig if config.get("model_type") == _type("siglip") else CLIPVisionConfig
    )
    name = config_class.__name__.removesuffix("VisionConfig")
    classes = ("VisionModel", "Model", "VisionModelWithProjection")
    known_keys.check_class(config, [name + each for each in classes], part=part)
    keys = known_keys.keys_of(config_class) | _HARMLESS_TOWER
    known_keys.check(config, known=keys, part=part)


def _classes(config_class: Any) -> tuple[str, ...]:
    """The models that have a configuration: with an LLM, and the same without its head."""
    name = config_class.__name__.removesuffix("Config")
    return f"{name}ForConditionalGeneration", f"{name}Model"


def complete(config_class: Any, config: Config) -> Any:
    """Let transformers' class fill in what a configuration leaves out.

    Raises:
        CheckpointError: The configuration is not of that class.
    """
    from huggingface_hub.errors import StrictDataclassError

    check_numbers(config)  # the class loops over some of them
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
    if not 1 <= len(layers) <= 64 or any(type(n) is not int for n in layers):
        raise refused(
            "vision_feature_layer", value, "a layer or a list of layers: 1 to 64 integers"
        )
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


def tiling(
    full: Any,
    pinpoints: tuple[tuple[int, int], ...],
    sizes: TowerConfig,
    *,
    only_alone: bool = False,
    max_tiles: int | None = None,
) -> Tiling:
    """Return how large images are cut.

    Args:
        full: The model's configuration, whose pinpoints say how tiles are put together.
        pinpoints: Those of the image processor, which cuts, as (height, width).
        sizes: Of the tower, which takes a tile.
        only_alone: As `Tiling.only_alone`.
        max_tiles: As `Tiling.max_tiles`.

    Raises:
        CheckpointError: The two differ, or a resolution is not made of whole tiles.
    """
    own = full.image_grid_pinpoints
    if [list(pair) for pair in pinpoints] != own:
        raise refused(
            "image_grid_pinpoints", own, f"those of the image processor, {list(pinpoints)}"
        )
    side = sizes.image_size
    if len(pinpoints) > MAX_PINPOINTS:
        raise refused("image_grid_pinpoints", len(pinpoints), f"at most {MAX_PINPOINTS}")
    for pair in pinpoints:
        if math.prod(pair) > MAX_RESIZED_PIXELS:
            expected = f"at most {MAX_RESIZED_PIXELS} pixels"
            raise refused("image_grid_pinpoints", list(pair), expected)
        if any(length % side for length in pair):
            raise refused("image_grid_pinpoints", list(pair), f"multiples of image_size {side}")
    return Tiling(pinpoints, only_alone=only_alone, max_tiles=max_tiles)


def token_id(name: str, value: object) -> int:
    """Return the id of a placeholder that is an entry of the vocabulary.

    Raises:
        CheckpointError: It is no integer of 0 or above, or larger than any vocabulary.
    """
    if type(value) is not int or not 0 <= value < 2**31:
        raise refused(name, value, "an integer of 0 or above, of a vocabulary")
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


def _type(kind: TowerKind) -> str:
    return next(name for name, each in _KINDS.items() if each == kind)
