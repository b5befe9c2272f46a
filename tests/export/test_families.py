from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

import vzip.export.families as package
from layouts import CLIP_CONFIG, CONFIG, OLD_PROCESSOR, ORIGINAL_CONFIG, PROCESSOR, TEXT, VISION
from vzip.export import families
from vzip.export.architecture import VisionConfig
from vzip.export.families import llava
from vzip.runtime.errors import CheckpointError


def hf(change: dict[str, Any] | None = None, **processor: Any) -> VisionConfig:
    config = CONFIG | (change or {})
    settings = {k: v for k, v in (PROCESSOR | processor).items() if v != "absent"}
    return families.describe({k: v for k, v in config.items() if v != "absent"}, settings)


def original(change: dict[str, Any] | None = None, tower: Any = CLIP_CONFIG) -> VisionConfig:
    config = {k: v for k, v in (ORIGINAL_CONFIG | (change or {})).items() if v != "absent"}
    return families.describe(config, OLD_PROCESSOR, tower=tower)


def test_names() -> None:
    assert families.names() == ("llava", "llava-original")


def test_every_family_file_is_imported_by_the_registry() -> None:
    families.names()
    for info in pkgutil.iter_modules(package.__path__):
        before = families.names()
        importlib.import_module(f"{package.__name__}.{info.name}")
        assert families.names() == before


def test_hugging_faces_form() -> None:
    config = hf()
    assert config.family == "llava"
    tower = config.tower
    assert (tower.hidden_size, tower.num_heads, tower.num_layers) == (32, 4, 4)
    assert (tower.intermediate_size, tower.image_size, tower.patch_size) == (64, 32, 4)
    assert tower.cls_token is True
    # What the configuration leaves out has transformers' defaults.
    assert (tower.activation, tower.layer_norm_eps) == ("quick_gelu", 1e-5)
    projector = config.projector
    assert (projector.in_features, projector.hidden_features, projector.out_features) == (
        32,
        48,
        48,
    )
    assert (projector.activation, projector.bias) == ("gelu", True)
    assert (config.feature_layer, config.layers_run, config.image_token_id) == (-2, 3, 98)
    assert config.feature_strategy == "default"
    assert config.preprocessing.to_json() == {
        "image_size": 32,
        "mode": "resize_crop",
        "shortest_edge": 32,
        "resample": "bicubic",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 0.00392156862745098,
    }


def test_values_are_read_not_assumed() -> None:
    vision = VISION | {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
    config = hf(
        {
            "vision_config": vision,
            "vision_feature_layer": 2,
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
            "image_token_index": 7,
        },
        size={"shortest_edge": 40},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        rescale_factor=0.5,
    )
    assert (config.tower.activation, config.tower.layer_norm_eps) == ("gelu", 1e-6)
    assert (config.feature_layer, config.feature_strategy) == (2, "full")
    assert (config.projector.bias, config.image_token_id) == (False, 7)
    assert config.preprocessing.shortest_edge == 40
    assert config.preprocessing.mean == (0.1, 0.2, 0.3)
    assert config.preprocessing.std == (0.4, 0.5, 0.6)
    assert config.preprocessing.rescale_factor == 0.5


def test_original_form() -> None:
    config = original()
    assert config.family == "llava-original"
    assert config.tower == hf().tower
    assert config.projector == hf().projector
    assert (config.feature_layer, config.image_token_id) == (-2, -200)
    assert (config.preprocessing.mode, config.preprocessing.image_size) == ("pad_square", 32)
    assert config.preprocessing.rescale_factor == 1 / 255


@pytest.mark.parametrize("ratio", ["square", None, "absent"])
def test_original_crops_unless_it_pads(ratio: Any) -> None:
    assert original({"image_aspect_ratio": ratio}).preprocessing.mode == "resize_crop"


def test_original_may_keep_cls() -> None:
    assert original({"mm_vision_select_feature": "cls_patch"}).feature_strategy == "full"
    assert original({"mm_vision_select_feature": "absent"}).feature_strategy == "default"


def test_original_takes_a_bare_vision_model_as_tower() -> None:
    assert original(tower=VISION).tower == original().tower


def test_only_original_names_a_tower() -> None:
    assert families.tower_reference(CONFIG) is None
    assert families.tower_reference(ORIGINAL_CONFIG) == "openai/clip-tiny"


def test_published_repositories_are_those_of_the_aliases() -> None:
    from vzip.runtime.models import ALIASES

    assert set(llava.Llava.published) == {ALIASES["llava-1.5-7b"], ALIASES["llava-1.5-13b"]}
    assert families.published("llava-hf/another") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer = [-2, -5], expected one layer"),
        ({"vision_config": VISION | {"model_type": "siglip_vision_model"}}, "vision_config.model_type = 'siglip_vision_model', expected 'clip_vision_model'"),  # noqa: E501 - the message
        ({"vision_config": None}, "vision_config.model_type = None, expected"),
        ({"vision_config": VISION | {"hidden_act": "relu"}}, "tower activation is 'relu'"),
        ({"vision_config": VISION | {"num_channels": 1}}, "num_channels = 1, expected 3"),
        ({"vision_config": VISION | {"patch_size": [4, 4]}}, "tower patch_size is [4, 4]"),
        ({"vision_config": VISION | {"hidden_size": "wide"}}, "config.json is no LlavaConfig: "),
        ({"text_config": TEXT | {"model_type": "nonsense"}}, "config.json is no LlavaConfig: U"),
        ({"projector_hidden_act": "silu"}, "projector activation is 'silu', expected one of gelu"),
        ({"vision_feature_layer": -9}, "feature_layer is -9, expected the output of one of"),
        ({"vision_feature_select_strategy": "cls"}, "config.json is no LlavaConfig: "),
        ({"model_type": "llava_next"}, "which no family of vzip knows; expected one of: llava ("),
        ({"model_type": "absent", "architectures": "absent"}, "has {} and the vision keys"),
        ({"vision_config": "absent"}, "the vision keys [], which no family of vzip knows"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf(change)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear', expected 'mlp2x_gelu'"),
        ({"mm_projector_type": "absent"}, "mm_projector_type = 'linear', expected 'mlp2x_gelu'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type = 'mlp3x_gelu', expected"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres', expected 'pad'"),
        ({"mm_hidden_size": 64}, "mm_hidden_size = 64, expected 32, the tower's width"),
        ({"mm_hidden_size": "absent"}, "mm_hidden_size = None, expected an integer"),
        ({"hidden_size": "absent"}, "hidden_size = None, expected an integer"),
        (
            {"mm_vision_select_layer": "absent"},
            "mm_vision_select_layer = None, expected an integer",
        ),
        (
            {"mm_vision_select_layer": [-2, -5]},
            "mm_vision_select_layer = [-2, -5], expected an int",
        ),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature = 'cls', expected 'patch'"),
        ({"mm_vision_select_feature": ["patch"]}, "mm_vision_select_feature = ['patch'], expected"),
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio = ['pad'], expected 'pad'"),
    ],
)
def test_original_configurations_that_are_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        original(change)
    assert expected in str(caught.value)


@pytest.mark.parametrize("reference", [["a/b"], None, ""])
def test_a_tower_reference_is_a_text(reference: Any) -> None:
    with pytest.raises(CheckpointError, match=r"mm_vision_tower = .*, expected a hub id or a fol"):
        families.tower_reference(ORIGINAL_CONFIG | {"mm_vision_tower": reference})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type = 'SiglipImagePr"),
        ({"image_processor_type": "absent"}, "image_processor_type = None, expected one of CLIP"),
        ({"resample": 2}, "resample = 2, expected 3"),
        ({"do_resize": False}, "do_resize = False, expected True"),
        ({"do_center_crop": False}, "do_center_crop = False, expected True"),
        ({"do_normalize": False}, "do_normalize = False, expected True"),
        ({"do_rescale": None}, "do_rescale = None, expected True"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False, expected True"),
        ({"do_pad": True}, "do_pad = True, expected false with CLIPImageProcessor"),
        ({"crop_size": {"height": 32, "width": 28}}, "crop_size = {'height': 32, 'width': 28}"),
        ({"crop_size": {"height": 28, "width": 28}}, "crop_size = 28, expected 32, the tower's"),
        ({"crop_size": "absent"}, "crop_size = None, expected one number of pixels"),
        ({"size": {"height": 32, "width": 32}}, "size = {'height': 32, 'width': 32}, expected one"),
        ({"size": {"shortest_edge": 16}}, "size = 16, expected at least crop_size 32"),
        ({"size": {"shortest_edge": 32.0}}, "size = {'shortest_edge': 32.0}, expected one number"),
        ({"image_mean": [0.5, 0.5]}, "image_mean = [0.5, 0.5], expected three numbers"),
        ({"image_std": [0.5, "a", 0.5]}, "image_std = 'a', expected a number"),
        ({"rescale_factor": True}, "rescale_factor = True, expected a number"),
        ({"default_to_square": True}, "default_to_square = True, expected False"),
    ],
)
def test_processor_settings_that_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf(**settings)
    assert expected in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_llavas_own_processor_pads_when_it_says_so(suffix: str) -> None:
    kind = f"LlavaImageProcessor{suffix}"
    assert hf(image_processor_type=kind, do_pad=True).preprocessing.mode == "pad_square"
    assert hf(image_processor_type=kind).preprocessing.mode == "resize_crop"
    assert hf(image_processor_type=kind, do_pad=False).preprocessing.mode == "resize_crop"


def test_absent_settings_have_the_defaults_of_transformers() -> None:
    from transformers import CLIPImageProcessorPil

    absent = (
        "do_convert_rgb",
        "do_rescale",
        "rescale_factor",
        "image_mean",
        "image_std",
        "resample",
    )
    preprocessing = hf(**dict.fromkeys(absent, "absent")).preprocessing
    upstream = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    assert list(preprocessing.mean) == list(upstream.image_mean)
    assert list(preprocessing.std) == list(upstream.image_std)
    assert preprocessing.rescale_factor == upstream.rescale_factor
    assert upstream.do_rescale
    assert upstream.do_convert_rgb
    assert upstream.resample == 3


def test_no_settings() -> None:
    with pytest.raises(CheckpointError, match=r"no settings of an image processor, expected prep"):
        families.describe(CONFIG, None)
