"""Every setting of a processor that is taken gives transformers' own pixels, bit for bit."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from tests.exported import CONFIG
from vzip.export.families.processors import pinpoints, preprocessing
from vzip.export.parity import reference
from vzip.runtime.bundle.manifest import Tiling
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.preprocess import pixel_values, tower_image
from vzip.runtime.pictures.resize import Resample
from vzip.runtime.pictures.tiles import cut

SIDE = 16
CLASSES = {
    "CLIPImageProcessor": "clip.image_processing_pil_clip",
    "LlavaImageProcessor": "llava.image_processing_pil_llava",
    "SiglipImageProcessor": "siglip.image_processing_pil_siglip",
    "LlavaNextImageProcessor": "llava_next.image_processing_pil_llava_next",
    "LlavaOnevisionImageProcessor": "llava_onevision.image_processing_pil_llava_onevision",
    "VideoLlavaImageProcessor": "video_llava.image_processing_video_llava",
}
TILED = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
POINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

# The settings that are varied; None leaves one out.
VARIED: dict[str, tuple[Any, ...]] = {
    "size": tuple(
        size
        for side in (SIDE, SIDE + 5, SIDE - 4)
        for size in ({"shortest_edge": side}, {"height": side, "width": side})
    ),
    "crop_size": (None, {"height": SIDE, "width": SIDE}, {"height": SIDE + 4, "width": SIDE + 4}),
    "do_center_crop": (None, True, False),
    "do_pad": (None, True, False),
}
SHORT, SQUARE = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
WHOLE = (
    {"size": SHORT, "crop_size": SQUARE},
    {"size": SQUARE, "crop_size": SQUARE},  # squeezed; with padding first, squared
    {"size": SQUARE, "do_center_crop": False},
    {"size": {"shortest_edge": SIDE + 5}, "crop_size": SQUARE, "do_center_crop": True},
)
CUT = tuple(
    {"size": size, "crop_size": SQUARE, "image_grid_pinpoints": POINTS, **crop, **pad}
    for size in (SHORT, SQUARE)
    for crop in ({}, {"do_center_crop": True}, {"do_center_crop": False})
    for pad in ({}, {"do_pad": True}, {"do_pad": False})
)
MUST: dict[str, tuple[dict[str, Any], ...]] = {
    "CLIPImageProcessor": WHOLE,
    "LlavaImageProcessor": (*WHOLE, *({**each, "do_pad": True} for each in WHOLE)),
    "SiglipImageProcessor": ({"size": SQUARE},),
    "LlavaNextImageProcessor": CUT,
    "LlavaOnevisionImageProcessor": (*CUT, {"size": SQUARE, "image_grid_pinpoints": POINTS}),
    "VideoLlavaImageProcessor": WHOLE,
}
"""What is out there, and what gives the same pixels as that."""

rng = np.random.default_rng(5)
PICTURES = [
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    for width, height in ((53, 37), (21, 40), (32, 32))
]


def upstream(name: str, settings: dict[str, Any]) -> list[np.ndarray] | None:
    """Return transformers' pixels of each picture, None where it makes none of the right size."""
    module = importlib.import_module(f"transformers.models.{CLASSES[name]}")
    suffix = "" if name.startswith("Video") else "Pil"
    try:
        processor = getattr(module, name + suffix)(**settings)
        outputs = [
            next(iter(processor(images=image, return_tensors="np").values()))[0]
            for image in PICTURES
        ]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    found = [np.ascontiguousarray(each, dtype=np.float32) for each in outputs]
    return found if all(each.shape[-2:] == (SIDE, SIDE) for each in found) else None


def ours(name: str, settings: dict[str, Any]) -> list[np.ndarray]:
    """Return our pixels of each picture."""
    saved = {**settings, "image_processor_type": name}
    prep = preprocessing(saved, image_size=SIDE, classes=(name,))
    if name not in TILED:
        return [pixel_values(tower_image(each, prep)[None], prep)[0] for each in PICTURES]
    tiling = Tiling(pinpoints(saved, classes=(name,)))
    return [pixel_values(cut(each, prep, tiling).images, prep) for each in PICTURES]


def same(got: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(
        a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_settings_that_are_taken_give_transformers_pixels(name: str) -> None:
    taken = 0
    for values in itertools.product(*VARIED.values()):
        settings = {k: v for k, v in zip(VARIED, values, strict=True) if v is not None}
        if name in TILED:
            settings["image_grid_pinpoints"] = POINTS
        expected = upstream(name, settings)
        try:
            got = ours(name, settings)
        except CheckpointError:
            assert settings not in MUST.get(name, ()), settings
            continue
        assert expected is not None, settings
        assert same(got, expected), settings
        taken += 1
    assert taken >= 2


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("resample", range(6))
def test_every_filter_of_pillow_is_taken_bit_for_bit(name: str, resample: int) -> None:
    square = {"height": SIDE, "width": SIDE}
    for size in ({"shortest_edge": SIDE}, square):
        if name.startswith("Siglip") and size != square:
            continue
        settings: dict[str, Any] = {"size": size, "resample": resample}
        if not name.startswith("Siglip"):
            settings["crop_size"] = square
        if name in TILED:
            settings["image_grid_pinpoints"] = POINTS
        if name.startswith("Llava") and name not in TILED:
            settings["do_pad"] = resample % 2 == 0
        expected = upstream(name, settings)
        assert expected is not None
        assert same(ours(name, settings), expected)


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("Video")])
def test_what_a_number_would_mean_changes_no_size_that_names_its_edges(name: str) -> None:
    for settings in MUST[name]:
        named = {**settings, "default_to_square": True}
        expected = upstream(name, named)
        assert expected is not None
        assert same(ours(name, named), expected)


@pytest.mark.parametrize("resample", get_args(Resample))
@pytest.mark.parametrize("case", ["resize_crop", "pad_square", "stretch", "tiles"])
def test_the_untouched_model_that_a_graph_is_checked_by_has_the_same_filter(
    case: Any, resample: Resample
) -> None:
    mode = "stretch" if case == "tiles" else case
    prep = replace(CONFIG.preprocessing, mode=mode, resample=resample)
    tiling = Tiling(((SIDE, 2 * SIDE),)) if case == "tiles" else None
    processor = reference._processor(replace(CONFIG, preprocessing=prep, tiling=tiling))
    for picture in PICTURES:
        seen = processor(images=[picture], return_tensors="np")["pixel_values"]
        base = seen[:, 0] if case == "tiles" else seen
        expected = pixel_values(tower_image(picture, prep)[None], prep)
        assert np.array_equal(base.view(np.uint32), expected.view(np.uint32))
