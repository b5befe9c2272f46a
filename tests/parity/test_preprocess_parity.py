"""Preprocessing against transformers' own Pillow processors: every byte, on images of odd sizes."""

from __future__ import annotations

import io
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import Mode, Preprocessing, pixel_values, tower_image
from vzip.runtime.pictures.resize import Resample, pillows

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CROPPING: tuple[Mode, ...] = ("resize_crop", "pad_square")
MODES: tuple[Mode, ...] = (*CROPPING, "stretch")

# (width, height)
ODD_SIZES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 97),
    (97, 1),
    (3, 500),
    (500, 3),
    (223, 224),
    (224, 224),
    (224, 225),
    (336, 336),
    (335, 337),
    (337, 335),
    (336, 900),
    (900, 336),
    (111, 113),
    (640, 480),
    (479, 641),
    (1023, 767),
    (1024, 33),
    (17, 1500),
    (2049, 1537),
    (1201, 1999),
]


def preprocessing(mode: Mode, image_size: int, **changes: Any) -> Preprocessing:
    fields: dict[str, Any] = {
        "image_size": image_size,
        "mode": mode,
        "shortest_edge": image_size,
        "resample": "bicubic",
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "rescale_factor": 1 / 255,
    }
    return Preprocessing(**(fields | changes))


def processor(
    prep: Preprocessing, **changes: Any
) -> CLIPImageProcessorPil | LlavaImageProcessorPil | SiglipImageProcessorPil:
    square = {"height": prep.image_size, "width": prep.image_size}
    common: dict[str, Any] = {
        "resample": pillows(prep.resample),
        "image_mean": list(prep.mean),
        "image_std": list(prep.std),
        "rescale_factor": prep.rescale_factor,
        **changes,
    }
    if prep.mode == "stretch":
        return SiglipImageProcessorPil(size=square, **common)
    common |= {"size": {"shortest_edge": prep.shortest_edge}, "crop_size": square}
    if prep.mode == "pad_square":
        return LlavaImageProcessorPil(do_pad=True, **common)
    return CLIPImageProcessorPil(**common)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def photo(width: int, height: int) -> Image.Image:
    """Smooth shading, hard edges and a little noise: what a photograph is made of."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [
        127 + 90 * np.sin(x / 37 + shift) * np.cos(y / (51 + 9 * shift)) + 60 * (x % 211 > y % 173)
        for shift in range(3)
    ]
    picture = np.stack(channels, axis=-1) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def assert_equal_to_reference(image: Image.Image, prep: Preprocessing) -> None:
    stage = processor(prep, do_rescale=False, do_normalize=False)(image)["pixel_values"][0]
    whole = processor(prep)(image)["pixel_values"][0]
    assert stage.dtype == np.uint8
    assert whole.dtype == np.float32
    ours = tower_image(load_image(image), prep)
    assert ours.dtype == np.uint8
    assert ours.shape == (prep.image_size, prep.image_size, 3)
    assert np.array_equal(ours.transpose(2, 0, 1), stage)
    values = pixel_values(ours[None], prep)
    assert values.dtype == np.float32
    assert np.array_equal(values[0].view(np.uint32), np.ascontiguousarray(whole).view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("image_size", [112, 224, 336])
@pytest.mark.parametrize("size", ODD_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_odd_sizes(size: tuple[int, int], image_size: int, mode: Mode) -> None:
    assert_equal_to_reference(noise(*size), preprocessing(mode, image_size))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1600, 1067), (1067, 1600), (800, 800), (4000, 3000)])
def test_photographs(size: tuple[int, int], mode: Mode) -> None:
    assert_equal_to_reference(photo(*size), preprocessing(mode, 336))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resample", get_args(Resample))
@pytest.mark.parametrize("size", [(1600, 1067), (107, 1600), (90, 33), (300, 301)])
def test_filters(size: tuple[int, int], resample: Resample, mode: Mode) -> None:
    assert_equal_to_reference(photo(*size), preprocessing(mode, 112, resample=resample))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_constant_images(value: int, mode: Mode) -> None:
    # Rows of one colour must keep it through the resampling: the padding relies on it.
    image = Image.new("RGB", (613, 205), (value, 255 - value, value))
    assert_equal_to_reference(image, preprocessing(mode, 224))


@pytest.mark.parametrize("mode", CROPPING)
@pytest.mark.parametrize(
    ("shortest_edge", "image_size"),
    [(256, 224), (224, 336), (112, 225), (225, 112), (1, 7), (8, 1), (335, 336)],
)
@pytest.mark.parametrize("size", [(301, 203), (203, 301), (50, 50), (40, 330)])
def test_short_edge_that_is_not_the_crop(
    size: tuple[int, int], shortest_edge: int, image_size: int, mode: Mode
) -> None:
    prep = preprocessing(mode, image_size, shortest_edge=shortest_edge)
    assert_equal_to_reference(noise(*size), prep)


@pytest.mark.parametrize("mode", MODES)
def test_other_means_deviations_and_factors(mode: Mode) -> None:
    siglip = preprocessing(mode, 112, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert_equal_to_reference(noise(200, 150), siglip)
    odd = preprocessing(mode, 112, mean=(0.0, 1.0, 0.3), std=(0.1, 3.0, 1.0), rescale_factor=0.0043)
    assert_equal_to_reference(noise(150, 200), odd)


@settings(max_examples=120, deadline=None)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    image_size=st.sampled_from([112, 224, 336, 97]),
    shortest_edge=st.one_of(st.none(), st.integers(40, 360)),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_size(
    *, width: int, height: int, image_size: int, shortest_edge: int | None, mode: Mode, seed: int
) -> None:
    edge = image_size if mode == "stretch" else shortest_edge or image_size
    prep = preprocessing(mode, image_size, shortest_edge=edge)
    long, short = max(width, height), min(width, height)
    if mode == "resize_crop" and prep.shortest_edge * long // short > 20000:
        # The reference makes the whole strip: keep the test small, the cap has its own.
        height = width = long
    assert_equal_to_reference(noise(width, height, seed), prep)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 6000), (6000, 2)])
def test_padding_of_strips_that_take_many_passes(size: tuple[int, int]) -> None:
    # Taller than one strip of the padded square, with a last strip that is not full.
    assert_equal_to_reference(noise(*size), preprocessing("pad_square", 112))


def test_batch_equals_its_images() -> None:
    prep = preprocessing("resize_crop", 112)
    images = [noise(120, 150, seed) for seed in range(3)]
    reference = np.stack(processor(prep)(images)["pixel_values"])
    ours = pixel_values(np.stack([tower_image(image, prep) for image in images]), prep)
    assert np.array_equal(ours, reference)


@pytest.mark.parametrize("size", [(224, 224), (640, 360), (361, 641), (97, 224), (1920, 1080)])
def test_frames_of_a_video_equal_video_llavas(size: tuple[int, int]) -> None:
    # Sizes of 1 or 3 pixels aren't compared: there it takes an edge for the colour channels.
    prep = preprocessing("resize_crop", 224)
    frames = [noise(*size, seed) for seed in range(3)]
    upstream = VideoLlavaImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    reference = upstream(frames, return_legacy_image_output=False)["pixel_values"]
    ours = pixel_values(np.stack([tower_image(frame, prep) for frame in frames]), prep)
    for frame, expected in zip(ours, reference, strict=True):
        assert expected.dtype == np.float32
        assert np.array_equal(frame.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def odd_mode_images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    rgba = Image.fromarray(rng.integers(0, 256, (41, 57, 4), np.uint8))
    rgb = rgba.convert("RGB")
    grey = rgba.convert("L")
    palette = rgb.quantize(17)
    clear_colour = rgb.quantize(17)
    clear_colour.info["transparency"] = 3
    clear_table = rgb.quantize(17)
    clear_table.info["transparency"] = bytes(range(0, 170, 10))
    clear_rgb = rgb.copy()
    clear_rgb.info["transparency"] = clear_rgb.getpixel((5, 5))
    clear_grey = grey.copy()
    clear_grey.info["transparency"] = grey.getpixel((5, 5))
    return [
        rgba,
        rgb,
        grey,
        palette,
        clear_colour,
        clear_table,
        clear_rgb,
        clear_grey,
        grey.convert("1"),
        rgba.convert("LA"),
        palette.convert("PA"),
        rgb.convert("CMYK"),
        rgb.convert("YCbCr"),
        rgb.convert("HSV"),
        rgb.convert("RGBX"),
    ]


def mode_name(image: Image.Image) -> str:
    return image.mode + ("+transparency" if "transparency" in image.info else "")


@pytest.mark.parametrize("image", odd_mode_images(), ids=mode_name)
def test_modes_become_rgb_as_in_the_processor(image: Image.Image) -> None:
    expected = convert_to_rgb(image.copy(), return_numpy=True)
    assert np.array_equal(np.asarray(load_image(image)), expected)
    # Once more changes nothing: no transparent colour or orientation is left behind.
    assert np.array_equal(np.asarray(load_image(load_image(image))), expected)
    assert_equal_to_reference(image, preprocessing("resize_crop", 112))


MODES_OF_FILES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
}


@pytest.mark.parametrize(
    ("name", "image"),
    [
        pytest.param(name, image, id=f"{name}-{mode_name(image)}")
        for name, modes in MODES_OF_FILES.items()
        for image in odd_mode_images()
        if image.mode in modes
        and (name == "PNG" or "transparency" not in image.info)  # the others lose it or fail
    ],
)
def test_files_become_rgb_as_in_the_processor(name: str, image: Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, name)
    opened = Image.open(io.BytesIO(file.getvalue()))
    expected = convert_to_rgb(opened, return_numpy=True)
    assert np.array_equal(np.asarray(load_image(file.getvalue())), expected)
