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
from tests.refusals import Said, refused
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
    with refused(CheckpointError, expected="dream (model_type 'dream')"):
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
    assert (image.tiling.only_alone, image.tiling.max_tiles) == (True, 9)
    fewer = tiny("llava-onevision", {"vision_aspect_ratio": "anyres_max_4"}).tiling
    assert fewer is not None
    assert fewer.max_tiles == 4
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


@pytest.mark.parametrize(
    ("family", "media", "name", "has"),
    [
        *(("llava", "video", "llava", "'image'"), ("llava-siglip", "video", "llava", "'image'")),
        ("vip-llava", "video", "vip-llava", "'image'"),
        ("llava-next", "video", "llava-next", "'image'"),
        ("video-llava", "sound", "video-llava", "'video' or 'image'"),
    ],
)
def test_a_family_without_a_view_of_media_says_so(
    family: str, media: Any, name: str, has: str
) -> None:
    got = (f"'{media}'", f"'{name}'")
    with refused(InvalidInputError, got=got, expected=has, cure="media"):
        tiny(family, media=media)


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
    with refused(InvalidInputError, got="image alone"):
        families.published(ALIASES["llava-1.5-7b"], "video")


# Refusals


FULL = "vision_feature_select_strategy"
LAYER = "vision_feature_layer"
NONSENSE = TEXT | {"model_type": "nonsense"}
POINTS = "image_grid_pinpoints"
CLIP_OR = "'clip_vision_model' or 'siglip_vision_model'"


@pytest.mark.parametrize(
    ("family", "key", "value", "got", "expected"),
    [
        ("llava", LAYER, [-2, "5"], "[-2, '5']", "a list of layers"),
        ("llava", LAYER, [], "[]", "a list of layers"),
        ("llava", LAYER, [-2, -9], "-9", ""),
        ("llava", LAYER, -9, "-9", ""),
        ("llava", LAYER, True, "True", "a list of layers"),
        ("llava", "vision_config", VISION | {"model_type": "vit"}, "model_type = 'vit'", CLIP_OR),
        ("llava", "vision_config", VISION | {"model_type": ["vit"]}, "['vit']", CLIP_OR),
        ("llava", "vision_config", None, "vision_config.model_type = None", CLIP_OR),
        ("llava", "vision_config", VISION | {"hidden_act": "relu"}, "activation is 'relu'", ""),
        ("llava", "vision_config", VISION | {"num_channels": 1}, "num_channels = 1", "3"),
        ("llava", "vision_config", VISION | {"patch_size": [4, 4]}, "patch_size is [4, 4]", ""),
        ("llava", "vision_config", VISION | {"layer_norm_eps": "x"}, "no LlavaConfig", ""),
        ("llava", "text_config", NONSENSE, "text_config.model_type = 'nonsense'", "'qwen2'"),
        ("llava", "projector_hidden_act", "silu", "activation is 'silu'", "gelu"),
        ("llava", FULL, "cls", "no LlavaConfig", ""),
        ("llava", "model_type", "llava_nextt", "'llava_nextt'", "llava ("),
        ("llava", "vision_config", "absent", "vision keys []", "llava ("),
        ("llava-siglip", FULL, "default", f"{FULL} = 'default'", ("'full'", "SigLIP")),
        ("llava-siglip", FULL, "absent", f"{FULL} = 'default'", "'full'"),
        ("vip-llava", "vision_config", SIGLIP, "'siglip_vision_model'", "'clip_vision_model'"),
        ("vip-llava", "vision_config", "absent", "model_type = None", "'clip_vision_model'"),
        ("vip-llava", LAYER, "last", f"{LAYER} = 'last'", "a list of layers"),
        ("video-llava", "vision_config", SIGLIP, "'siglip_vision_model'", "'clip_vision_model'"),
        ("video-llava", "video_token_index", -1, "video_token_index = -1", "an integer of 0"),
        *(
            (family, "image_token_index", value, "image_token_index", "an integer of 0")
            for family in ("llava", "vip-llava", "llava-next", "video-llava", "llava-onevision")
            for value in (-1, 2**31)
        ),
        ("llava-next", FULL, "full", f"{FULL} = 'full'", "'default'"),
        ("llava-next", POINTS, [[32, 32 * n] for n in range(1, 1100)], POINTS, "at most 1024"),
        ("llava-next", POINTS, [[32, 32], [32 * 512, 32 * 512]], POINTS, "pixels"),
        ("llava-onevision", "vision_config", VISION, "'clip_vision_model'", "'siglip_vision_mo"),
        ("llava-onevision", "video_token_index", None, "no LlavaOnevisionConfig", ""),
        *(
            ("llava-onevision", "vision_aspect_ratio", ratio, repr(ratio), "'anyres_max_9'")
            for ratio in ("anyres", "anyres_max_0", "pad", "anyres_max_", "anyres_max_9x")
        ),
        ("llava-next", POINTS, PINPOINTS[1:], POINTS, "[(32, 64), (64, 32)"),
        ("llava-next", POINTS, "absent", f"{POINTS} = [[336, 672], [", ""),
        ("llava-next", "text_config", TEXT | {"model_type": "qwen2_"}, "'qwen2_'", "'qwen2'"),
    ],
)
def test_configurations_that_are_refused(
    family: str, key: str, value: Any, got: str, expected: Said
) -> None:
    points = {POINTS: value} if key == POINTS and expected in ("at most 1024", "pixels") else {}
    with refused(CheckpointError, got=got, expected=expected):
        tiny(family, {key: value}, **points)


def test_a_configuration_of_nothing_is_refused() -> None:
    with refused(CheckpointError, got=("{}", "vision keys"), expected="llava ("):
        hf({"model_type": "absent", "architectures": "absent"})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mm_projector_type", "linear", "'mlp2x_gelu'"),
        ("mm_projector_type", "mlp3x_gelu", "'mlp2x_gelu'"),
        ("image_aspect_ratio", "padded", "'pad'"),
        ("image_aspect_ratio", "anyres", "llava-hf/"),
        ("image_aspect_ratio", "anyres_max_9", "'pad'"),
        ("image_aspect_ratio", ["pad"], "'pad'"),
        ("mm_hidden_size", 64, "32"),
        *((key, "absent", "an integer") for key in ("mm_hidden_size", "hidden_size")),
        ("mm_vision_select_layer", "absent", "an integer"),
        ("mm_vision_select_layer", [-2, -5], "an integer"),
        ("mm_vision_select_feature", "cls", "'patch'"),
        ("mm_vision_select_feature", ["patch"], "'patch'"),
    ],
)
def test_original_configurations_that_are_refused(key: str, value: Any, expected: str) -> None:
    got = f"{key} = {None if value == 'absent' else value!r}"
    with refused(CheckpointError, got=got, expected=expected):
        original({key: value})


def test_original_refuses_before_its_tower_is_looked_for() -> None:
    with refused(CheckpointError, got="mm_projector_type = 'linear'", expected="'mlp2x_gelu'"):
        original({"mm_projector_type": "absent"})
    with refused(CheckpointError, got="'anyres'", expected="llava-hf/"):
        families.tower_reference(ORIGINAL_CONFIG | {"image_aspect_ratio": "anyres"})
    for reference in (["a/b"], None, ""):
        with refused(CheckpointError, got=f"mm_vision_tower = {reference!r}", expected="hub id"):
            families.tower_reference(ORIGINAL_CONFIG | {"mm_vision_tower": reference})


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


TYPE = "image_processor_type"


@pytest.mark.parametrize(
    ("family", "key", "value", "expected"),
    [
        ("llava", TYPE, "ViTImageProcessor", "CLIPImageProcessor,"),
        ("llava", TYPE, "LlavaNextImageProcessor", "CLIPImageProcessor,"),
        ("llava", TYPE, ["CLIPImageProcessor"], "CLIPImageProcessor,"),
        ("llava", TYPE, "absent", "CLIPImageProcessor,"),
        *(("llava", "resample", value, "0 to 5") for value in (6, -1, None, 3.0, "bicubic", True)),
        *(("llava", key, False, "True") for key in ("do_resize", "do_normalize")),
        ("llava", "do_convert_rgb", False, "True"),
        ("llava", "do_rescale", None, "True"),
        ("llava", "do_center_crop", False, "True with a short edge"),
        ("llava", "do_pad", True, "False with CLIPImageProcessor"),
        ("llava", "crop_size", {"height": 32, "width": 28}, "one number of pixels"),
        ("llava", "crop_size", 28, "32"),
        ("llava", "crop_size", "absent", "one number of pixels"),
        ("llava", "size", {"height": 40, "width": 40}, "32"),
        ("llava", "size", {"height": 32, "width": 30}, "one number of pixels"),
        ("llava", "size", {"shortest_edge": 32, "longest_edge": 64}, "one number of pixels"),
        ("llava", "size", {"shortest_edge": 32.0}, "one number of pixels"),
        ("llava", "size", 16, "at least crop_size 32"),
        ("llava", "image_mean", [0.5, 0.5], "three numbers"),
        ("llava", "rescale_factor", True, "a number"),
        ("llava-siglip", "do_center_crop", True, "False with SiglipImageProcessor"),
        ("llava-siglip", "size", 32, "34"),
        ("llava-siglip", "size", {"height": 34, "width": 30}, "height and width"),
        ("llava-siglip", "size", {"shortest_edge": 34}, "height and width"),
        ("llava-siglip", "do_pad", True, "False with SiglipImageProcessor"),
        ("llava-next", TYPE, "CLIPImageProcessor", "LlavaNextImageProcessor"),
        ("llava-next", "size", 40, "32"),
        ("llava-next", "crop_size", 28, "32"),
        *(
            ("llava-next", POINTS, points, "a list of [height, width]")
            for points in ([], [[32, 64], 64], [[32, 0]], [[32, 64, 3]])
        ),
        ("llava-onevision", TYPE, "SiglipImageProcessor", "LlavaOnevisionImageProcessor"),
        ("llava-onevision", "crop_size", 36, "38"),
        ("video-llava", TYPE, "LlavaImageProcessor", "VideoLlavaImageProcessor"),
        ("vip-llava", TYPE, "SiglipImageProcessor", "CLIPImageProcessor"),
    ],
)
def test_processor_settings_that_are_refused(
    family: str, key: str, value: Any, expected: str
) -> None:
    got = f"{key} = {None if value == 'absent' else value!r}"
    said: dict[str, Said] = {"expected": expected, "cure": "preprocessor_config.json"}
    if isinstance(value, dict) and value == {"height": 40, "width": 40}:
        got = "size = 40"
    if key == "size" and isinstance(value, int):
        sides = ("height", "width") if family == "llava-siglip" else ("shortest_edge",)
        value = dict.fromkeys(sides, value)
    with refused(CheckpointError, got=got, **said):
        tiny(family, **{key: value})


def test_settings_that_say_the_same_in_other_words() -> None:
    """Granite Vision's among them: whatever is cut has the input's size already."""
    square = {"height": 32, "width": 32}
    for family, changes in (
        ("llava-next", ({"size": square}, {"do_center_crop": False}, {"do_pad": False})),
        (
            "llava-onevision",
            ({"do_center_crop": True, "crop_size": 38}, {"size": {"shortest_edge": 38}}),
        ),
    ):
        for change in changes:
            assert tiny(family, **change) == tiny(family)
    squeezed = hf(size=square).preprocessing
    assert (squeezed.mode, squeezed.shortest_edge) == ("stretch", 32)
    assert hf(size=square, do_center_crop=False).preprocessing == squeezed
    padded = {TYPE: "LlavaImageProcessor", "do_pad": True}
    assert hf(size=square, **padded) == hf(**padded)


def test_filters_are_read() -> None:
    """SigLIP2's is bilinear."""
    names = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
    for number, name in enumerate(names):
        assert tiny("llava-siglip", resample=number).preprocessing.resample == name


def test_other_processor_settings_that_are_refused() -> None:
    with refused(CheckpointError, got="default_to_square = True", expected="False"):
        hf(size=32, default_to_square=True)
    with refused(CheckpointError, got="image_std = 'a'", expected="a number"):
        hf(image_std=[0.5, "a", 0.5])
    with refused(CheckpointError, got=POINTS, expected="those of the image processor"):
        tiny("llava-next", **{POINTS: [[32, 48]]})
    points = {POINTS: [[32, 64], [32, 48]]}  # not whole tiles
    with refused(CheckpointError, got=f"{POINTS} = [32, 48]", expected="multiples of"):
        tiny("llava-next", points, **points)
    with refused(CheckpointError, expected="preprocessor_config.json"):
        families.describe(CONFIG, None)


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
