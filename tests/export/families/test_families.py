from __future__ import annotations

import copy
import importlib
import json
import pkgutil
from collections.abc import Mapping
from typing import Any

import pytest

import vzip.export.families as package
from tests.export.layouts import (
    CLIP_CONFIG,
    CONFIG,
    FAMILIES,
    OLD_PROCESSOR,
    ORIGINAL_CONFIG,
    PINPOINTS,
    SIGLIP,
    TEXT,
    TINY,
    VISION,
)
from vzip.export import families
from vzip.export.architecture import Media, VisionConfig
from vzip.export.families import configs
from vzip.runtime.errors import CheckpointError, InvalidInputError
from vzip.runtime.files.codec import write
from vzip.runtime.models import ALIASES


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value != "absent"}


def tiny(
    family: str, change: dict[str, Any] | None = None, media: Media | None = None, **processor: Any
) -> VisionConfig:
    model = TINY[family]
    config = present({**model.config, **(change or {})})
    return families.describe(config, present({**model.processor, **processor}), media=media)


def hf(change: dict[str, Any] | None = None, **processor: Any) -> VisionConfig:
    return tiny("llava", change, **processor)


def original(change: dict[str, Any] | None = None, tower: Any = CLIP_CONFIG) -> VisionConfig:
    config = present(ORIGINAL_CONFIG | (change or {}))
    return families.describe(config, OLD_PROCESSOR, tower=tower)


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        tiny(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The registry


def test_names() -> None:
    assert set(families.families()) == {
        "llava",
        "llava-original",
        "llava-next",
        "llava-onevision",
        "video-llava",
        "vip-llava",
    }


def test_every_family_file_is_imported_by_the_registry() -> None:
    before = dict(families.families())
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{info.name}")
    assert dict(families.families()) == before


def test_a_new_file_is_a_new_family(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, restored_registry: None
) -> None:
    (tmp_path / "dream.py").write_text(
        "from vzip.export.families import View, register\n"
        "@register('dream')\n"
        "class Dream:\n"
        "    claimed_by, media, published = \"model_type 'dream'\", {'image': View('image')}, {}\n"
        "    def claims(self, config): return config.get('model_type') == 'dream'\n"
        "    def tower_reference(self, config): return 'a/tower'\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    package._known.cache_clear()
    assert families.tower_reference({"model_type": "dream"}) == "a/tower"
    with pytest.raises(CheckpointError, match=r"; dream \(model_type 'dream'\)"):
        families.family_of({})


@pytest.fixture
def restored_registry() -> Any:
    before = dict(families.families())
    yield
    package._REGISTRY.clear()
    package._REGISTRY.update(before)
    package._known.cache_clear()
    vars(package).pop("dream", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_claims_a_configuration(family: str) -> None:
    claims = [n for n, each in families.families().items() if each.claims(TINY[family].config)]
    assert claims == [family.removesuffix("-siglip").removesuffix("-multilayer")]


def test_one_family_claims_originals_configuration() -> None:
    claims = [n for n, each in families.families().items() if each.claims(ORIGINAL_CONFIG)]
    assert claims == ["llava-original"]


def test_reading_changes_nothing_of_what_was_read() -> None:
    """Whatever transformers' class does to it: `published` files are read again and again."""

    class Greedy:
        @staticmethod
        def from_dict(config: dict[str, Any]) -> Any:
            return config["vision_config"].pop("model_type")

    before = copy.deepcopy(CONFIG)
    assert configs.complete(Greedy, CONFIG) == "clip_vision_model"
    assert before == CONFIG


# LLaVA


def test_hugging_faces_form() -> None:
    config = hf()
    assert config.family == "llava"
    tower = config.tower
    assert (tower.kind, tower.cls_token, config.tower_module) == ("clip", True, "vision_tower")
    assert (tower.hidden_size, tower.num_heads, tower.num_layers) == (32, 4, 4)
    assert (tower.intermediate_size, tower.image_size, tower.patch_size) == (64, 32, 4)
    # What the configuration leaves out has transformers' defaults.
    assert (tower.activation, tower.layer_norm_eps) == ("quick_gelu", 1e-5)
    projector = config.projector
    assert (projector.in_features, projector.hidden_features, projector.out_features) == (
        32,
        48,
        48,
    )
    assert (projector.activation, projector.bias, projector.norm_eps) == ("gelu", True, None)
    assert (config.feature_layers, config.layers_run, config.image_token_id) == ((-2,), 3, 98)
    assert (config.feature_strategy, config.video_token_id) == ("default", None)
    assert (config.media, config.takes, config.pool) == ("image", ("image", "video"), 1)
    assert (config.tiling, config.newline) == (None, False)
    assert write(config.preprocessing) == {
        "image_size": 32,
        "mode": "resize_crop",
        "shortest_edge": 32,
        "resample": "bicubic",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 0.00392156862745098,
    }


def test_a_siglip_tower() -> None:
    config = tiny("llava-siglip")
    tower = config.tower
    assert (tower.kind, tower.cls_token, config.tokens) == ("siglip", False, 64)
    assert (tower.image_size, tower.patch_size, tower.grid) == (34, 4, (8, 8))
    assert (tower.activation, tower.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert (config.feature_layers, config.layers_run) == ((-1,), 4)
    assert config.feature_strategy == "full"
    assert config.projector.out_features == 48
    assert write(config.preprocessing) == {
        "image_size": 34,
        "mode": "stretch",
        "shortest_edge": 34,
        "resample": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "rescale_factor": 0.00392156862745098,
    }


def test_several_feature_layers() -> None:
    config = tiny("llava-multilayer")
    assert (config.feature_layers, config.states, config.layers_run) == ((1, -2), (1, 3), 3)
    assert config.projector.in_features == 64


def test_a_list_of_one_layer_is_one_layer() -> None:
    assert hf({"vision_feature_layer": [-2]}) == hf()


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
    assert (config.feature_layers, config.feature_strategy) == ((2,), "full")
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
    assert (config.feature_layers, config.image_token_id) == ((-2,), -200)
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


# The other families


def test_vip_llava() -> None:
    config = tiny("vip-llava")
    assert (config.family, config.media, config.takes) == ("vip-llava", "image", ("image", "video"))
    assert (config.feature_layers, config.states, config.layers_run) == ((-2, -4, 2), (3, 1, 2), 3)
    assert (config.projector.in_features, config.projector.norm_eps) == (96, 1e-3)
    assert (config.projector.bias, config.feature_strategy) == (True, "default")
    assert config.preprocessing == hf().preprocessing
    assert config.tower == hf().tower
    assert (config.image_token_id, config.newline, config.tiling) == (98, False, None)


def test_vip_llavas_older_key_and_its_default() -> None:
    older = {"vision_feature_layer": "absent", "vision_feature_layers": [1, -2]}
    assert tiny("vip-llava", older).feature_layers == (1, -2)
    vision = {"vision_config": VISION | {"num_hidden_layers": 12}}
    layers = tiny("vip-llava", vision | {"vision_feature_layer": "absent"}).feature_layers
    assert layers == (-2, -5, -8, -11, 6)
    assert tiny("vip-llava", {"projector_layernorm_eps": "absent"}).projector.norm_eps == 1e-5


def test_llava_next() -> None:
    config = tiny("llava-next")
    assert (config.family, config.media, config.takes) == (
        "llava-next",
        "image",
        ("image", "video"),
    )
    assert (config.tower, config.projector) == (hf().tower, hf().projector)
    assert config.feature_strategy == "default"
    assert config.tiling is not None
    assert write(config.tiling) == {"pinpoints": PINPOINTS, "order": "reference"}
    assert config.newline is True
    assert (config.preprocessing.mode, config.preprocessing.shortest_edge) == ("stretch", 32)
    assert config.preprocessing.mean == hf().preprocessing.mean


def test_llava_next_with_a_siglip_tower_and_several_layers() -> None:
    """As Granite Vision, which is built as LLaVA-NeXT."""
    points = [[34, 68], [68, 34]]
    change = {
        "vision_config": SIGLIP,
        "vision_feature_layer": [1, 2, -1],
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": points,
    }
    config = tiny(
        "llava-next",
        change,
        image_grid_pinpoints=points,
        crop_size={"height": 34, "width": 34},
        size={"shortest_edge": 34},
    )
    assert (config.tower.kind, config.states, config.projector.in_features) == (
        "siglip",
        (1, 2, 4),
        96,
    )


def test_pinpoints_that_are_left_out_are_those_of_transformers() -> None:
    """Of class and processor alike, so leaving out one of the two is no contradiction."""
    import transformers

    sides = {"llava-next": 336, "llava-onevision": 384}
    for family, side in sides.items():
        model = TINY[family]
        vision = {**model.config["vision_config"], "image_size": side}
        size = {"shortest_edge": side} if side == 336 else {"height": side, "width": side}
        settings = {"size": size, "crop_size": side if side == 336 else "absent"}
        upstream = getattr(transformers, model.model).config_class().image_grid_pinpoints
        for points in ({"image_grid_pinpoints": "absent"}, {"image_grid_pinpoints": upstream}):
            config = tiny(
                family,
                {"vision_config": vision, "image_grid_pinpoints": "absent"},
                **settings,
                **points,
            )
            assert config.tiling is not None
            assert write(config.tiling)["pinpoints"] == upstream


def test_video_llavas_two_towers() -> None:
    video, image = tiny("video-llava"), tiny("video-llava", media="image")
    assert video == tiny("video-llava", media="video")
    assert (video.family, video.media, video.takes) == ("video-llava", "video", ("video",))
    assert (video.tower_module, image.tower_module) == ("video_tower", "image_tower")
    assert (image.media, image.takes) == ("image", ("image",))
    # Upstream keeps the CLS token of frames, and that of images as the configuration says.
    assert (video.feature_strategy, image.feature_strategy) == ("full", "default")
    for config in (video, image):
        assert (config.image_token_id, config.video_token_id) == (98, 97)
        assert (config.tower, config.projector) == (hf().tower, hf().projector)
        assert config.preprocessing == hf().preprocessing
        assert (config.pool, config.tiling, config.newline) == (1, None, False)


def test_onevisions_two_views() -> None:
    image, video = tiny("llava-onevision"), tiny("llava-onevision", media="video")
    assert image == tiny("llava-onevision", media="image")
    assert (image.family, image.media, image.takes) == (
        "llava-onevision",
        "image",
        ("image", "video"),
    )
    assert (image.pool, image.tokens, image.grid) == (1, 81, (9, 9))
    assert image.tiling is not None
    assert len(image.tiling.pinpoints) == 6
    assert (video.media, video.takes, video.tiling) == ("video", ("video",), None)
    assert (video.pool, video.tokens, video.grid) == (2, 25, (5, 5))
    for config in (image, video):
        assert (config.image_token_id, config.video_token_id) == (98, 97)
        assert (config.newline, config.tower_module) == (True, "vision_tower")
        assert (config.preprocessing.mode, config.preprocessing.mean) == ("stretch", (0.5,) * 3)
        assert (config.feature_layers, config.feature_strategy) == ((-1,), "full")
        assert config.tower.kind == "siglip"


def test_onevisions_processor_may_name_the_short_edge() -> None:
    assert tiny("llava-onevision", size={"shortest_edge": 38}) == tiny("llava-onevision")


def test_multimodal_projector_bias_is_read_where_the_family_has_it() -> None:
    for family in ("llava", "llava-next", "video-llava", "llava-onevision"):
        assert tiny(family, {"multimodal_projector_bias": False}).projector.bias is False


@pytest.mark.parametrize("family", ["llava", "llava-siglip", "vip-llava", "llava-next"])
def test_a_family_without_a_view_of_video_says_so(family: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tiny(family, media="video")
    name = "llava" if family == "llava-siglip" else family
    assert str(caught.value) == (
        f"media is 'video', and the family '{name}' has a graph for image alone, expected 'image'; "
        "its towers see the frames of a clip as images; leave media out"
    )


def test_unknown_media() -> None:
    with pytest.raises(InvalidInputError, match=r"for video and image alone, expected 'video' or"):
        tiny("video-llava", media="sound")  # type: ignore[arg-type]


# Published repositories


def test_published_repositories_are_those_of_the_aliases() -> None:
    published = [hub_id for each in families.families().values() for hub_id in each.published]
    assert sorted(published) == sorted(set(ALIASES.values()) - {ALIASES["demo"]})
    assert families.published("llava-hf/another") is None


def test_published_budgets_fit() -> None:
    for each in families.families().values():
        for hub_id, known in each.published.items():
            for budget in known.budgets.split(", ") if "+" in known.budgets else ():
                dominant, contextual = map(int, budget.split("+"))
                config = families.published(hub_id)
                assert config is not None
                assert dominant + contextual < config.tokens / 2


@pytest.mark.parametrize(
    ("alias", "numbers"),
    [
        # family, tokens, layers run, widths of tower, projector's input and LLM
        ("llava-1.5-7b", ("llava", 577, 23, 1024, 1024, 4096)),
        ("llava-1.5-13b", ("llava", 577, 23, 1024, 1024, 5120)),
        ("bakllava", ("llava", 577, 23, 1024, 1024, 4096)),
        ("vip-llava-7b", ("vip-llava", 577, 23, 1024, 5120, 4096)),
        ("vip-llava-13b", ("vip-llava", 577, 23, 1024, 5120, 5120)),
        ("llava-next-vicuna-7b", ("llava-next", 577, 23, 1024, 1024, 4096)),
        ("llava-next-vicuna-13b", ("llava-next", 577, 23, 1024, 1024, 5120)),
        ("llava-next-mistral-7b", ("llava-next", 577, 23, 1024, 1024, 4096)),
        ("video-llava-7b", ("video-llava", 257, 23, 1024, 1024, 4096)),
        ("llava-onevision-0.5b", ("llava-onevision", 729, 26, 1152, 1152, 896)),
        ("llava-onevision-7b", ("llava-onevision", 729, 26, 1152, 1152, 3584)),
        ("llava-interleave-0.5b", ("llava", 729, 26, 1152, 1152, 1024)),
        ("llava-interleave-7b", ("llava", 729, 26, 1152, 1152, 4096)),
    ],
)
def test_published_numbers(alias: str, numbers: tuple[Any, ...]) -> None:
    """Against `models.md`, not against the files that the numbers are read from."""
    config = families.published(ALIASES[alias])
    assert config is not None
    tower, projector = config.tower, config.projector
    assert numbers == (
        config.family,
        config.tokens,
        config.layers_run,
        tower.hidden_size,
        projector.in_features,
        projector.out_features,
    )
    assert (tower.num_heads, tower.patch_size) == (16, 14)
    clip = tower.kind == "clip"
    assert (tower.intermediate_size, tower.num_layers) == ((4096, 24) if clip else (4304, 26))
    assert tower.activation == ("quick_gelu" if clip else "gelu_pytorch_tanh")
    assert config.image_token_id == (32000 if clip else 151646)


def test_published_views_of_video() -> None:
    video = families.published(ALIASES["llava-onevision-7b"], "video")
    assert video is not None
    assert (video.tokens, video.pool, video.video_token_id) == (196, 2, 151647)
    image = families.published(ALIASES["video-llava-7b"], "image")
    assert image is not None
    assert (image.tower_module, image.video_token_id) == ("image_tower", 32001)
    with pytest.raises(InvalidInputError, match="has a graph for image alone"):
        families.published(ALIASES["llava-1.5-7b"], "video")


# Refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_feature_layer": [-2, "5"]}, "vision_feature_layer = [-2, '5'], expected a layer"),
        ({"vision_feature_layer": []}, "vision_feature_layer = [], expected a layer or a list"),
        ({"vision_feature_layer": [-2, -9]}, "feature_layer is -9, expected the output of one of"),
        ({"vision_feature_layer": True}, "vision_feature_layer = True, expected a layer"),
        ({"vision_config": VISION | {"model_type": "vit"}}, "vision_config.model_type = 'vit', expected 'clip_vision_model' or 'siglip_vision_model'"),  # noqa: E501 - the message
        ({"vision_config": VISION | {"model_type": ["vit"]}}, "vision_config.model_type = ['vit']"),
        ({"vision_config": None}, "vision_config.model_type = None, expected"),
        ({"vision_config": VISION | {"hidden_act": "relu"}}, "tower activation is 'relu'"),
        ({"vision_config": VISION | {"num_channels": 1}}, "num_channels = 1, expected 3"),
        ({"vision_config": VISION | {"patch_size": [4, 4]}}, "tower patch_size is [4, 4]"),
        ({"vision_config": VISION | {"hidden_size": "wide"}}, "config.json is no LlavaConfig: "),
        ({"text_config": TEXT | {"model_type": "nonsense"}}, "config.json is no LlavaConfig: U"),
        ({"projector_hidden_act": "silu"}, "projector activation is 'silu', expected one of gelu"),
        ({"vision_feature_layer": -9}, "feature_layer is -9, expected the output of one of"),
        ({"vision_feature_select_strategy": "cls"}, "config.json is no LlavaConfig: "),
        ({"model_type": "llava_nextt"}, "which no family of vzip knows, expected one of: llava ("),
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
        ({"image_aspect_ratio": "padded"}, "image_aspect_ratio = 'padded', expected 'pad'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres', expected 'pad'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "= 'anyres_max_9', expected 'pad'"),
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


def test_originals_variants_are_refused_before_their_tower_is_looked_for() -> None:
    with pytest.raises(CheckpointError, match="read in Hugging Face's form alone, such as"):
        families.tower_reference(ORIGINAL_CONFIG | {"image_aspect_ratio": "anyres"})


@pytest.mark.parametrize(
    ("family", "change", "expected"),
    [
        ("llava-siglip", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy = 'default', expected 'full', since a SigLIP tower has no CLS token"),  # noqa: E501 - the message
        ("llava-siglip", {"vision_feature_select_strategy": "absent"}, "= 'default', expected 'fu"),
        ("vip-llava", {"vision_config": SIGLIP}, "= 'siglip_vision_model', expected 'clip_vision_"),
        ("vip-llava", {"vision_config": "absent"}, "vision_config.model_type = None, expected 'cl"),
        ("vip-llava", {"vision_feature_layer": "last"}, "vision_feature_layer = 'last', expected "),
        ("video-llava", {"vision_config": SIGLIP}, "'siglip_vision_model', expected 'clip_vision_"),
        ("video-llava", {"video_token_index": -1}, "video_token_index = -1, expected an integer o"),
        ("llava-onevision", {"vision_config": VISION}, "'clip_vision_model', expected 'siglip_vis"),
        ("llava-onevision", {"video_token_index": None}, "config.json is no LlavaOnevisionConfig:"),
        ("llava-next", {"image_grid_pinpoints": PINPOINTS[1:]}, "expected those of the image processor, [(32, 64), (64, 32)"),  # noqa: E501 - the message
        ("llava-next", {"image_grid_pinpoints": "absent"}, "image_grid_pinpoints = [[336, 672], ["),
        ("llava-next", {"text_config": TEXT | {"model_type": "nonsense"}}, "is no LlavaNextConfig"),
    ],
)  # fmt: skip
def test_configurations_of_other_families_that_are_refused(
    family: str, change: dict[str, Any], expected: str
) -> None:
    assert expected in message(family, change)


@pytest.mark.parametrize("reference", [["a/b"], None, ""])
def test_a_tower_reference_is_a_text(reference: Any) -> None:
    with pytest.raises(CheckpointError, match=r"mm_vision_tower = .*, expected a hub id or a fol"):
        families.tower_reference(ORIGINAL_CONFIG | {"mm_vision_tower": reference})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcesso"),
        (
            {"image_processor_type": "LlavaNextImageProcessor"},
            "expected one of CLIPImageProcessor,",
        ),
        (
            {"image_processor_type": ["CLIPImageProcessor"]},
            "= ['CLIPImageProcessor'], expected one",
        ),
        ({"image_processor_type": "absent"}, "image_processor_type = None, expected one of CLIP"),
        ({"resample": 2}, "resample = 2, expected 3"),
        ({"do_resize": False}, "do_resize = False, expected True"),
        ({"do_center_crop": False}, "do_center_crop = False, expected True with CLIPImageProces"),
        ({"do_normalize": False}, "do_normalize = False, expected True"),
        ({"do_rescale": None}, "do_rescale = None, expected True"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False, expected True"),
        ({"do_pad": True}, "do_pad = True, expected False with CLIPImageProcessor"),
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


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llava-siglip", {"do_center_crop": True}, "do_center_crop = True, expected False with Si"),
        ("llava-siglip", {"size": {"height": 32, "width": 32}}, "size = 32, expected 34, the towe"),
        ("llava-siglip", {"size": {"height": 34, "width": 30}}, "size = {'height': 34, 'width': 3"),
        ("llava-siglip", {"size": {"shortest_edge": 34}}, "one number of pixels, or height and wi"),
        ("llava-siglip", {"do_pad": True}, "do_pad = True, expected False with SiglipImageProcess"),
        ("llava-next", {"image_processor_type": "CLIPImageProcessor"}, "expected one of LlavaNext"),
        ("llava-next", {"size": {"shortest_edge": 40}}, "size = 40, expected 32, the tower's imag"),
        ("llava-next", {"crop_size": 28}, "crop_size = 28, expected 32, the tower's image_size"),
        ("llava-next", {"image_grid_pinpoints": [[32, 48]]}, "expected those of the image process"),
        ("llava-next", {"image_grid_pinpoints": []}, "image_grid_pinpoints = [], expected a list "),
        ("llava-next", {"image_grid_pinpoints": [[32, 64], 64]}, "[[32, 64], 64], expected a list"),
        ("llava-next", {"image_grid_pinpoints": [[32, 0]]}, "[[32, 0]], expected a list of [heigh"),
        ("llava-next", {"image_grid_pinpoints": [[32, 64, 3]]}, "[[32, 64, 3]], expected a list o"),
        ("llava-onevision", {"image_processor_type": "SiglipImageProcessor"}, "one of LlavaOnevis"),
        ("llava-onevision", {"do_center_crop": True}, "do_center_crop = True, expected False with"),
        ("video-llava", {"image_processor_type": "LlavaImageProcessor"}, "one of VideoLlavaImageP"),
        ("vip-llava", {"image_processor_type": "SiglipImageProcessor"}, "one of CLIPImageProcesso"),
    ],
)  # fmt: skip
def test_processor_settings_of_other_families_that_are_refused(
    family: str, settings: dict[str, Any], expected: str
) -> None:
    text = message(family, **settings)
    assert expected in text


def test_pinpoints_are_whole_tiles() -> None:
    points = {"image_grid_pinpoints": [[32, 64], [32, 48]]}
    text = message("llava-next", points, **points)
    assert "image_grid_pinpoints = [32, 48], expected multiples of image_size 32" in text


def test_a_picture_that_is_taken_to_be_rgb() -> None:
    """As SigLIP's processor was saved before transformers 5: null, not true."""
    assert tiny("llava-siglip", do_convert_rgb=None) == tiny("llava-siglip")


SHORT = {"size": {"shortest_edge": 32}, "crop_size": 32}


# Not as `transformers.Name`: there the video processors ask for torchvision first.
@pytest.mark.parametrize(
    ("module", "name", "family", "settings"),
    [
        ("clip.image_processing_pil_clip", "CLIPImageProcessorPil", "llava", SHORT),
        ("llava.image_processing_pil_llava", "LlavaImageProcessorPil", "vip-llava", SHORT),
        (
            "siglip.image_processing_pil_siglip",
            "SiglipImageProcessorPil",
            "llava-siglip",
            {"size": {"height": 34, "width": 34}},
        ),
        (
            "llava_next.image_processing_pil_llava_next",
            "LlavaNextImageProcessorPil",
            "llava-next",
            {**SHORT, "image_grid_pinpoints": PINPOINTS},
        ),
        (
            "llava_onevision.image_processing_pil_llava_onevision",
            "LlavaOnevisionImageProcessorPil",
            "llava-onevision",
            {
                "size": {"height": 38, "width": 38},
                "image_grid_pinpoints": TINY["llava-onevision"].config["image_grid_pinpoints"],
            },
        ),
        (
            "video_llava.image_processing_video_llava",
            "VideoLlavaImageProcessor",
            "video-llava",
            SHORT,
        ),
        (
            "video_llava.video_processing_video_llava",
            "VideoLlavaVideoProcessor",
            "video-llava",
            SHORT,
        ),
        (
            "llava_onevision.video_processing_llava_onevision",
            "LlavaOnevisionVideoProcessor",
            "llava-onevision",
            {"size": {"height": 38, "width": 38}},
        ),
    ],
)
def test_what_transformers_saves_is_read(
    module: str, name: str, family: str, settings: dict[str, Any]
) -> None:
    """Its processors' own settings, with their own defaults of mean and deviation."""
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)(**settings)
    model = TINY[family]
    media: Media | None = "video" if "Video" in name and "ImageP" not in name else None
    saved = json.loads(processor.to_json_string())
    config = families.describe(model.config, saved, media=media)
    assert list(config.preprocessing.mean) == list(processor.image_mean)
    assert list(config.preprocessing.std) == list(processor.image_std)
    assert config.preprocessing.rescale_factor == processor.rescale_factor
    # Left out, they are the same: our defaults are its.
    bare = {k: v for k, v in saved.items() if k not in ("image_mean", "image_std")}
    assert families.describe(model.config, bare, media=media) == config


def test_no_settings() -> None:
    with pytest.raises(CheckpointError, match=r"no settings of an image processor, expected prep"):
        families.describe(CONFIG, None)
