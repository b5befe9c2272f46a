"""Image processor settings → `Preprocessing` and tiles; what isn't computed exactly is refused.

The settings are those of transformers' processors in every form that is out there: as published in
2022 (``size: 336``), since then (``size: {shortest_edge: 336}``), as part of
``processor_config.json``, and for video in files of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from vzip.export.families import Config
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.preprocess import Preprocessing
from vzip.runtime.pictures.resize import Resample

Triple = tuple[float, float, float]
Pinpoints = tuple[tuple[int, int], ...]

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, the default of all classes below
_SUFFIXES = ("Fast", "Pil")  # the same settings, computed by torchvision or Pillow
_TYPES = ("image_processor_type", "video_processor_type", "feature_extractor_type")

# Absent keys have these values: they are the defaults of the classes below.
_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
_HALF: Triple = (0.5, 0.5, 0.5)
_RESCALE = 1 / 255
_NEXT_PINPOINTS: Pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONEVISION_PINPOINTS: Pinpoints = tuple(
    (384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)
)

# And these must have them, because nothing else is computed here.
_FIXED: Config = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "use_square_size": False,
}


@dataclass(frozen=True)
class _Kind:
    """A class of processors.

    Attributes:
        crops: Whether it crops the centre after resizing.
        edges: What ``size`` may name: the short edge, or height and width; a number is the first.
        pads: Values that ``do_pad`` may have.
        mean: Where the settings have none.
        std: Likewise.
        pinpoints: Likewise; None where it cuts no tiles.
    """

    crops: bool
    edges: tuple[tuple[str, ...], ...]
    pads: tuple[bool | None, ...] = (False, None)
    mean: Triple = _CLIP_MEAN
    std: Triple = _CLIP_STD
    pinpoints: Pinpoints | None = None


_SHORT = ("shortest_edge",)
_BOTH = ("height", "width")
_CLIP = _Kind(crops=True, edges=(_SHORT, _BOTH))
# Where tiles are cut, padding is what makes up for pictures with fewer of them in a batch.
_ANY = (True, False, None)

_KINDS: Mapping[str, _Kind] = {
    "CLIPImageProcessor": _CLIP,
    "CLIPFeatureExtractor": _CLIP,
    "LlavaImageProcessor": _Kind(crops=True, edges=(_SHORT, _BOTH), pads=(False, True)),
    "VideoLlavaImageProcessor": _CLIP,
    "VideoLlavaVideoProcessor": _CLIP,
    "SiglipImageProcessor": _Kind(crops=False, edges=(_BOTH,), mean=_HALF, std=_HALF),
    "LlavaNextImageProcessor": _Kind(
        crops=True, edges=(_SHORT, _BOTH), pads=_ANY, pinpoints=_NEXT_PINPOINTS
    ),
    "LlavaOnevisionImageProcessor": _Kind(
        crops=False, edges=(_BOTH, _SHORT), pads=_ANY, pinpoints=_ONEVISION_PINPOINTS
    ),
    "LlavaOnevisionVideoProcessor": _Kind(crops=False, edges=(_BOTH,), pads=_ANY),
}

WHOLE = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
"""Those that make one picture of the size of a CLIP tower's input."""


def preprocessing(
    settings: Config | None,
    *,
    image_size: int,
    classes: tuple[str, ...],
    pad_to_square: bool = False,
) -> Preprocessing:
    """Read the settings of an image processor.

    Args:
        settings: They, as saved; None where the checkpoint has none, which is an error.
        image_size: The tower's, which the prepared image must have.
        classes: Processors that the family has, without ``Fast`` and ``Pil``.
        pad_to_square: Whether the model pads before it calls the processor, as original LLaVA does.

    Returns:
        Mode "pad_square" where the settings or the model pad, "stretch" where both edges are
        resized to the input's (so with tiles, whose base tile it describes), else "resize_crop".
        What crops nothing, because the picture has the input's size already, is the same with and
        without a crop.

    Raises:
        CheckpointError: Another processor, or a setting that is not computed here.
    """
    kind = _kind(settings, classes)
    assert settings is not None
    for key, expected in _FIXED.items():
        got = settings.get(key, expected)
        if type(got) is not type(expected) or got != expected:
            raise _refused(key, got, f"{expected!r}")
    # What a size that is a number means; one that names its edges says it itself.
    if not isinstance(settings.get("size"), dict):
        _check_switch(settings, "default_to_square", (False,))
    # null: pictures are taken to be RGB already, which is no difference to those that are.
    _check_switch(settings, "do_convert_rgb", (True, None))
    _check_switch(settings, "do_pad", kind.pads)
    edge, parts = _side(settings, "size", kind.edges)
    pads = pad_to_square or (kind.pinpoints is None and settings.get("do_pad") is True)
    tiled = kind.pinpoints is not None
    # Before the crop the picture is a square then, or each of its tiles is.
    square = tiled or pads or parts == _BOTH
    # Tiles are cut in the crop's size even where nothing is cropped.
    named = settings.get("crop_size") is not None or kind.crops
    may_crop: tuple[bool | None, ...] = (False, None, True) if tiled else (False, None)
    _check_switch(settings, "do_center_crop", (True, False) if kind.crops else may_crop)
    crops = settings.get("do_center_crop", kind.crops) is True
    if crops or (tiled and named):
        crop, _ = _side(settings, "crop_size", (_BOTH,))
        if crop != image_size:
            raise _refused("crop_size", crop, f"{image_size}, the tower's image_size")
    elif not square:
        raise _refused("do_center_crop", settings.get("do_center_crop"), "True with a short edge")
    # A larger square is cropped, which mode "stretch" doesn't do.
    if edge < image_size or (edge != image_size and (not crops or (square and not pads))):
        wanted = f"{image_size}, the tower's image_size"
        raise _refused("size", edge, wanted if square else f"at least crop_size {image_size}")
    return Preprocessing(
        image_size=image_size,
        mode="pad_square" if pads else "stretch" if square else "resize_crop",
        shortest_edge=edge,
        resample=_resample(settings),
        mean=_triple(settings, "image_mean", kind.mean),
        std=_triple(settings, "image_std", kind.std),
        rescale_factor=_number("rescale_factor", settings.get("rescale_factor", _RESCALE)),
    )


def pinpoints(settings: Config | None, *, classes: tuple[str, ...]) -> Pinpoints:
    """Return the resolutions that tiles may make up, as (height, width), in the settings' order.

    Args:
        settings: Of a processor that cuts tiles.
        classes: As for `preprocessing`.

    Raises:
        CheckpointError: Another processor, or no list of pairs of integers.
    """
    default = _kind(settings, classes).pinpoints
    assert settings is not None
    assert default is not None, classes
    value = settings.get("image_grid_pinpoints", default)
    pairs = list(value) if isinstance(value, (list, tuple)) else []
    if not pairs or not all(map(_is_resolution, pairs)):
        raise _refused("image_grid_pinpoints", value, "a list of [height, width] in pixels")
    return tuple((height, width) for height, width in pairs)


def _is_resolution(value: object) -> bool:
    """Whether a value is a pair of positive integers."""
    pair = value if isinstance(value, (list, tuple)) else ()
    return len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)


def _kind(settings: Config | None, classes: tuple[str, ...]) -> _Kind:
    if settings is None:
        raise CheckpointError(
            "the checkpoint has no settings of an image processor",
            expected="preprocessor_config.json",
            cure="take it from the published model",
        )
    key = next((key for key in _TYPES if key in settings), _TYPES[0])
    saved = settings.get(key)
    name = saved
    if isinstance(name, str):
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
    if name not in classes:
        raise _refused(key, saved, "one of " + ", ".join(classes))
    return _KINDS[str(name)]


def _check_switch(settings: Config, key: str, allowed: tuple[bool | None, ...]) -> None:
    got = settings.get(key, allowed[0])
    if not any(got is value for value in allowed):
        kind = next(settings[name] for name in _TYPES if name in settings)
        raise _refused(key, got, f"{allowed[0]} with {kind}")


def _resample(settings: Config) -> Resample:
    names: tuple[Resample, ...] = get_args(Resample)
    value = settings.get("resample", _BICUBIC)
    if type(value) is not int or not 0 <= value < len(names):
        raise _refused("resample", value, "a number of Pillow's: 0 to 5")
    return names[value]


def _side(
    settings: Config, key: str, choices: tuple[tuple[str, ...], ...]
) -> tuple[int, tuple[str, ...]]:
    """Return the number of pixels, and which of the choices it is of."""
    value: Any = settings.get(key)
    named = value if isinstance(value, dict) else dict.fromkeys(choices[0], value)
    sides = list(named.values())
    known = any(set(named) == set(parts) for parts in choices)
    if not known or any(type(side) is not int or side != sides[0] for side in sides):
        parts = " or ".join(" and ".join(parts) for parts in choices)
        raise _refused(key, value, f"one number of pixels, or {parts} alike")
    return int(sides[0]), next(parts for parts in choices if set(named) == set(parts))


def _triple(settings: Config, key: str, default: Triple) -> Triple:
    value = settings.get(key, default)
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise _refused(key, value, "three numbers (red, green, blue)")
    red, green, blue = (_number(key, channel) for channel in value)
    return red, green, blue


def _number(key: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _refused(key, value, "a number")
    return float(value)


def _refused(key: str, got: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the image processor's settings have {key} = {got!r}",
        expected=f"{expected}",
        cause="vzip would prepare images otherwise than the model was trained with",
        cure="check preprocessor_config.json (or processor_config.json) against the published one",
    )
