"""CLIP's image processor settings → `Preprocessing`; what isn't computed exactly is refused.

The settings are those of transformers' ``CLIPImageProcessor`` and ``LlavaImageProcessor`` in every
form that is out there: as published in 2022 (``size: 336``), since then (``size: {shortest_edge:
336}``), and as part of ``processor_config.json``.
"""

from __future__ import annotations

from typing import Any

from vzip.export.families import Config
from vzip.runtime.errors import CheckpointError
from vzip.runtime.preprocess import Preprocessing

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
_PADDING = "LlavaImageProcessor"
_CLASSES = ("CLIPImageProcessor", "CLIPFeatureExtractor", _PADDING)
_SUFFIXES = ("Fast", "Pil")  # the same settings, computed by torchvision or Pillow

# Absent keys have these values: they are the defaults of the classes above.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_RESCALE = 1 / 255
# And these must have them, because nothing else is computed here.
_FIXED = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": _BICUBIC,
    "default_to_square": False,
    "use_square_size": False,
}


def preprocessing(
    settings: Config, *, image_size: int, pad_to_square: bool = False
) -> Preprocessing:
    """Read the settings of an image processor.

    Args:
        settings: They, as saved.
        image_size: The tower's, which the crop must have.
        pad_to_square: Whether the model pads before it calls the processor, as original LLaVA does.

    Returns:
        Mode "pad_square" where the settings or the model pad, else "resize_crop".

    Raises:
        CheckpointError: Another processor, or a setting that is not computed here.
    """
    saved = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    kind = _base_class(saved)
    if kind not in _CLASSES:
        raise _refused("image_processor_type", saved, "one of " + ", ".join(_CLASSES))
    for key, expected in _FIXED.items():
        got = settings.get(key, expected)
        if type(got) is not type(expected) or got != expected:
            raise _refused(key, got, f"{expected!r}")
    do_pad = settings.get("do_pad", False)
    if do_pad not in ((False, True) if kind == _PADDING else (False, None)):
        raise _refused("do_pad", do_pad, f"false with {kind}")
    crop = _side(settings, "crop_size", ("height", "width"))
    edge = _side(settings, "size", ("shortest_edge",))
    if crop != image_size:
        raise _refused("crop_size", crop, f"{image_size}, the tower's image_size")
    if edge < crop:
        raise _refused("size", edge, f"at least crop_size {crop}")
    return Preprocessing(
        image_size=image_size,
        mode="pad_square" if do_pad or pad_to_square else "resize_crop",
        shortest_edge=edge,
        resample="bicubic",
        mean=_triple(settings, "image_mean", _MEAN),
        std=_triple(settings, "image_std", _STD),
        rescale_factor=_number("rescale_factor", settings.get("rescale_factor", _RESCALE)),
    )


def _base_class(saved: object) -> object:
    if not isinstance(saved, str):
        return saved
    for suffix in _SUFFIXES:
        saved = saved.removesuffix(suffix)
    return saved


def _side(settings: Config, key: str, parts: tuple[str, ...]) -> int:
    value: Any = settings.get(key)
    named = value if isinstance(value, dict) else dict.fromkeys(parts, value)
    sides = list(named.values())
    if set(named) != set(parts) or any(type(s) is not int or s != sides[0] for s in sides):
        raise _refused(key, value, f"one number of pixels, or {' and '.join(parts)} alike")
    return int(sides[0])


def _triple(
    settings: Config, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
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
        f"the image processor's settings have {key} = {got!r}, expected {expected}; vzip would "
        "prepare images otherwise than the model was trained with: check preprocessor_config.json "
        "(or processor_config.json) against the published one"
    )
