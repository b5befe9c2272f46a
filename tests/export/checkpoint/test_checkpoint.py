from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.layouts import (
    FAMILIES,
    LAYOUTS,
    TINY,
    TOWER_FOLDER,
    layouts_of,
    upstream_model,
    write_layout,
)
from tests.refusals import Said, refused
from vzip.export.architecture import needed_tensors, tensor_shapes
from vzip.export.checkpoint import store
from vzip.export.checkpoint.folders import HubFolder
from vzip.export.checkpoint.reader import Checkpoint, read_projector, read_vision, vision_config
from vzip.export.pipeline import WeightSource
from vzip.runtime.errors import CheckpointError, InvalidInputError

SHARDED = tuple(name for name in LAYOUTS if "single" not in name and "file" not in name)
LAST_LAYER = "tower.encoder.layers.3."
Q0 = "tower.encoder.layers.0.self_attn.q_proj.weight"


def dead(name: str) -> bool:
    return name.startswith((LAST_LAYER, "tower.post_layernorm."))


def edit_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def faulty(folder: Path, got: Said = (), **said: Said) -> None:
    """Expect that a checkpoint is refused, by an error whose fields say this."""
    with refused(CheckpointError, got=got, **said):
        read_vision(Checkpoint.open(folder))


def same(tensors: dict[str, torch.Tensor], expected: Any) -> bool:
    return all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HubFolder, "open", forbidden)


# Every layout


OTHERS = tuple(family for family in FAMILIES if family != "llava")
EVERY = [("llava", name, llm) for name in LAYOUTS for llm in ("absent", "corrupt", "written")]
EVERY += [(family, name, "absent") for family in OTHERS for name in layouts_of(family)]


@pytest.mark.parametrize(("family", "name", "llm"), EVERY)
def test_every_layout_gives_the_same_tensors(
    family: str, name: str, llm: Any, tmp_path: Path
) -> None:
    expected = write_layout(name, tmp_path, seed=5, llm=llm, family=family)
    weights = read_vision(Checkpoint.open(tmp_path))
    assert list(weights.tensors) == list(tensor_shapes(weights.config))
    assert same(weights.tensors, expected)
    # The other tower of Video-LLaVA is all that is left over.
    left = {key.partition(".")[0] for key in set(expected) - set(weights.tensors)}
    assert left == ({"image_tower"} if family == "video-llava" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_upstream_model_has_the_weights_that_are_written(family: str, tmp_path: Path) -> None:
    """So what is compared with it was not mixed up in writing: names by hand, not `layouts`'."""
    write_layout("llava-hf", tmp_path, seed=3, family=family)
    weights = read_vision(Checkpoint.open(tmp_path))
    model = upstream_model(family, 3).model
    tower = getattr(model, weights.config.tower_module).state_dict()
    projector = model.multi_modal_projector.state_dict()
    compared = 0
    for key, tensor in weights.tensors.items():
        part, _, name = key.partition(".")
        if part == "image_newline":
            assert torch.equal(tensor, model.image_newline)
        else:
            assert torch.equal(tensor, {"tower": tower, "projector": projector}[part].pop(name))
        compared += 1
    assert compared == len(weights.tensors)
    assert not projector
    assert not [name for name in tower if not name.startswith("head.")]


@pytest.mark.parametrize("name", layouts_of("video-llava"))
def test_media_says_which_tower_is_read(name: str, tmp_path: Path) -> None:
    written = write_layout(name, tmp_path, family="video-llava")
    checkpoint = Checkpoint.open(tmp_path)
    image, video = read_vision(checkpoint, "image"), read_vision(checkpoint, "video")
    assert (image.config.tower_module, video.config.tower_module) == ("image_tower", "video_tower")
    for key, tensor in image.tensors.items():
        module = key.replace("tower.", "image_tower.", 1) if key.startswith("tower.") else key
        assert torch.equal(tensor, written[module])
    assert not torch.equal(image.tensors[Q0], video.tensors[Q0])
    assert torch.equal(
        image.tensors["projector.linear_1.weight"], video.tensors["projector.linear_1.weight"]
    )


def test_onevisions_views_have_the_same_tensors(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path, family="llava-onevision")
    checkpoint = Checkpoint.open(tmp_path)
    image, video = read_vision(checkpoint), read_vision(checkpoint, "video")
    assert (image.config.pool, video.config.pool) == (1, 2)
    assert list(image.tensors) == list(video.tensors)
    assert all(torch.equal(image.tensors[key], video.tensors[key]) for key in image.tensors)


def test_media_that_a_family_has_no_graph_for(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    for ask in (
        lambda: read_vision(Checkpoint.open(tmp_path), "video"),
        lambda: vision_config(tmp_path, media="video"),
    ):
        with refused(InvalidInputError, got=("'video'", "'llava'")):
            ask()


def test_a_missing_tower_of_video_llava(tmp_path: Path) -> None:
    write_layout(
        "llava-hf", tmp_path, family="video-llava", keep=lambda key: not key.startswith("tower.")
    )
    faulty(tmp_path, cause="video_tower.vision_model.embeddings.")
    read_vision(Checkpoint.open(tmp_path), "image")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_saving_reads(family: str, tmp_path: Path) -> None:
    model = upstream_model(family, 2)
    expected = write_layout("llava-hf", tmp_path / "written", seed=2, family=family)
    for original_format in (True, False):
        folder = tmp_path / str(original_format)
        model.save_pretrained(folder, save_original_format=original_format)
        processor = dict(TINY[family].processor)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        weights = read_vision(Checkpoint.open(folder))
        assert list(weights.tensors) == list(tensor_shapes(weights.config))
        assert same(weights.tensors, expected)
        assert weights.config == read_vision(Checkpoint.open(tmp_path / "written")).config


@pytest.mark.parametrize("name", SHARDED)
def test_only_the_needed_files_and_tensors_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(name, tmp_path, llm="written")
    read: dict[str, set[str]] = {}

    def record(path: Path, names: Any) -> dict[str, torch.Tensor]:
        read.setdefault(path.name, set()).update(names)
        return original(path, names)

    original = store.read_tensors
    monkeypatch.setattr(store, "read_tensors", record)
    read_vision(Checkpoint.open(tmp_path))
    assert not [file for file in read if "-00001-of-" in file or "-00004-of-" in file]
    words = ("vision", "projector", "embeddings", "encoder", "norm")
    assert all(any(word in tensor for word in words) for names in read.values() for tensor in names)


def test_a_shard_that_also_holds_the_llm_gives_only_its_vision_tensors(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    shard = tmp_path / "model-00003-of-00004.safetensors"
    state = load_file(shard) | {"language_model.model.norm.weight": torch.ones(48)}
    save_file(state, shard)
    tensors = read_vision(Checkpoint.open(tmp_path)).tensors
    assert not [name for name in tensors if "language" in name]


def test_dtypes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_layout("llava-hf-single", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    tensors = read_vision(Checkpoint.open(tmp_path)).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


# Dead and missing tensors


@pytest.mark.parametrize("name", ["llava-hf", "original", "original-copy"])
def test_dead_tensors_may_be_absent(name: str, tmp_path: Path) -> None:
    write_layout(name, tmp_path, keep=lambda key: not dead(key))
    weights = read_vision(Checkpoint.open(tmp_path))
    assert set(weights.tensors) == needed_tensors(weights.config)


def test_a_missing_tensor_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path, keep=lambda key: key != Q0)
    faulty(
        tmp_path,
        (f"'{Q0}'", str(tmp_path / "model.safetensors.index.json")),
        cause=(
            "looked for vision_tower.vision_model",
            ", model.vision_tower.encoder.layers.0.self_attn.q_proj.weight,",
            "similar names there: vision_tower.vision_model.encoder.layers.",
        ),
    )


NEWLINE = ("image_newline", "image_newline, model.image_newline;")
NORM = "projector.projector_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "family", "key", "looked_for"),
    [
        *(
            (name, "llava", key, "")
            for name in LAYOUTS
            for key in ("projector.linear_2.bias", "tower.pre_layrnorm.weight")
        ),
        ("llava-hf", "llava-next", *NEWLINE),
        ("transformers-5-model", "llava-next", *NEWLINE),
        ("llava-hf", "llava-onevision", *NEWLINE),
        ("transformers-5-model", "llava-onevision", *NEWLINE),
        ("llava-hf", "vip-llava", NORM, ""),
    ],
)
def test_every_layout_misses_needed_tensors(
    name: str, family: str, key: str, looked_for: str, tmp_path: Path
) -> None:
    write_layout(name, tmp_path, family=family, keep=lambda other: other != key)
    faulty(tmp_path, f"'{key}'", cause=looked_for)


FC1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
DEAD = "vision_tower.vision_model.post_layernorm.weight"
NORM1 = "vision_tower.vision_model.pre_layrnorm.weight"
LINEAR = "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    ("name", "change", "got", "expected"),
    [
        ("model.vision_tower.pre_layrnorm.weight", lambda s: s[NORM1] + 1, NORM1, "one"),
        (LINEAR, lambda s: torch.zeros(48, 31), (f"'{LINEAR}'", "[48, 31]"), "[48, 32]"),
        (FC1, lambda s: s[FC1].t().contiguous(), "[32, 64]", "[64, 32]"),
        (DEAD, lambda s: torch.ones(31), "[31]", "[32]"),  # even a dead one has its shape
        (FC1, lambda s: s[FC1].to(torch.int8), "int8", "floating point"),
    ],
)
def test_a_tensor_that_is_wrong(
    name: str, change: Any, got: Said, expected: str, tmp_path: Path
) -> None:
    write_layout("llava-hf-single", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file(state | {name: change(state)}, file)
    faulty(tmp_path, got, expected=expected)


UNFREEZE, PARTS = "unfreeze_mm_vision_tower", "mm_tunable_parts"


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({UNFREEZE: True}, True),
        ({UNFREEZE: None, PARTS: "mm_vision_tower,mm_mlp_adapter"}, True),
        ({UNFREEZE: False}, False),
        ({UNFREEZE: None}, False),
        ({UNFREEZE: None, PARTS: "mm_mlp_adapter"}, False),
    ],
)
def test_the_tower_s_copy_counts_where_it_was_trained(
    change: dict[str, Any], own: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the original code: a tower that was frozen is the one that the checkpoint names."""
    copied = write_layout("original-copy", tmp_path, seed=1, change=change)
    named = write_layout("original", tmp_path / "other", seed=2)
    (tmp_path / TOWER_FOLDER / "pytorch_model.bin").write_bytes(
        (tmp_path / "other" / TOWER_FOLDER / "pytorch_model.bin").read_bytes()
    )
    weights = read_vision(Checkpoint.open(tmp_path))
    assert torch.equal(weights.tensors[Q0], (copied if own else named)[Q0])
    assert not torch.equal(copied[Q0], named[Q0])
    assert (TOWER_FOLDER in weights.tower_source) == (not own)
    assert (UNFREEZE in caplog.text) == (not own)


def test_a_trained_tower_without_a_copy_is_the_one_that_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = write_layout("original", tmp_path, change={UNFREEZE: True})
    assert torch.equal(read_vision(Checkpoint.open(tmp_path)).tensors[Q0], named[Q0])
    assert "has no copy of it" in caplog.text
    with refused(CheckpointError, got=f"{UNFREEZE} = 'yes'"):
        edit_json(tmp_path / "config.json", **{UNFREEZE: "yes"})
        Checkpoint.open(tmp_path).vision()


def test_a_tower_that_is_given_stands_in_the_place_of_the_one_that_is_named(
    no_hub: None, tmp_path: Path
) -> None:
    write_layout("original", tmp_path / "model", change={"mm_vision_tower": "/data/clip"})
    expected = write_layout("original", tmp_path / "other", seed=2)
    tower = tmp_path / "other" / TOWER_FOLDER
    checkpoint = Checkpoint.open(tmp_path / "model", vision_tower=tower)
    weights = read_vision(checkpoint)
    assert torch.equal(weights.tensors[Q0], expected[Q0])
    assert str(tower) in weights.tower_source
    _, model = WeightSource(str(tmp_path / "model"), vision_tower=str(tower)).load()
    assert model.vision_tower == str(tower)
    again = Checkpoint.open(model.id, vision_tower=model.vision_tower)
    assert torch.equal(read_vision(again).tensors[Q0], expected[Q0])
    with refused(CheckpointError, got="nowhere", expected="CLIP checkpoint"):
        Checkpoint.open(tmp_path / "model", vision_tower="./nowhere").vision()
    write_layout("llava-hf", tmp_path / "hf")
    with refused(InvalidInputError, got=str(tower), cure="--vision-tower"):
        Checkpoint.open(tmp_path / "hf", vision_tower=tower).vision()


@pytest.mark.parametrize("style", ["/data/models/{}", "C:\\models\\{}", "~/models/{}"])
def test_a_tower_s_path_on_another_machine_has_a_hint_that_can_be_followed(
    style: str, no_hub: None, tmp_path: Path
) -> None:
    name = "clip-tiny"
    reference = style.format(name)
    write_layout("original", tmp_path / "model", change={"mm_vision_tower": reference})
    missing = ("--vision-tower openai/clip-vit-large-patch14-336", "mm_vision_tower")
    faulty(tmp_path / "model", reference, cause="machine", cure=missing)
    # In the checkpoint's folder, or beside it.
    for place in (tmp_path / "model" / name, tmp_path / name):
        (tmp_path / "model" / TOWER_FOLDER).rename(place)
        faulty(tmp_path / "model", reference, cure=f"--vision-tower {place}")
        checkpoint = Checkpoint.open(tmp_path / "model", vision_tower=place)
        assert read_vision(checkpoint).config.family == "llava-original"
        place.rename(tmp_path / "model" / TOWER_FOLDER)
    reference = style.format("clip-vit-base-patch16")
    edit_json(tmp_path / "model" / "config.json", mm_vision_tower=reference)
    faulty(tmp_path / "model", reference, cure="--vision-tower openai/clip-vit-base-patch16 (")


def test_vip_llavas_first_form_is_refused_by_its_tower(no_hub: None, tmp_path: Path) -> None:
    write_layout("original", tmp_path, change={"mm_vision_tower": "clip_4layer_336"})
    faulty(tmp_path, "mm_vision_tower = 'clip_4layer_336'", expected="llava-hf/vip-llava-7b-hf")


def test_the_checkpoints_own_projector_comes_before_the_separate_file(tmp_path: Path) -> None:
    own = write_layout("original", tmp_path, seed=1)
    write_layout("original-projector-file", tmp_path / "other", seed=2)
    (tmp_path / "mm_projector.bin").write_bytes(
        (tmp_path / "other" / "mm_projector.bin").read_bytes()
    )
    tensors = read_vision(Checkpoint.open(tmp_path)).tensors
    assert torch.equal(tensors["projector.linear_1.weight"], own["projector.linear_1.weight"])


# Damage


SHARD = "model-00002-of-00004.safetensors"


def without_norm(shard: Path) -> None:
    state = load_file(shard)
    del state[NORM1]
    save_file(state, shard)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (SHARD, Path.unlink, {"got": ("{0}", SHARD), "cause": "config.json"}),
        (SHARD, without_norm, {"got": ("{0}", SHARD, f"'{NORM1}'")}),
        (
            SHARD,
            lambda path: path.write_bytes(path.read_bytes()[:-10]),
            {"got": ("{0}", SHARD), "cause": "truncated", "cure": "download"},
        ),
        (
            "model.safetensors.index.json",
            Path.unlink,
            {
                "got": "model.safetensors or pytorch_model.bin or model.safetensors.index.json",
                "expected": "'tower.…'",
            },
        ),
        ("config.json", Path.unlink, {"got": ("{0}", "config.json"), "cause": SHARD}),
        ("config.json", lambda path: path.write_text("{"), {"got": ("{0}", "valid JSON")}),
        ("preprocessor_config.json", Path.unlink, {"got": ("{0}", "preprocessor_config.json")}),
    ],
)
def test_a_file_that_is_wrong(
    file: str, damage: Any, said: dict[str, Said], tmp_path: Path
) -> None:
    write_layout("llava-hf", tmp_path)
    damage(tmp_path / file)
    got = said["got"]
    parts = (got,) if isinstance(got, str) else got
    faulty(tmp_path, **{**said, "got": tuple(part.format(tmp_path) for part in parts)})


def test_an_unknown_family_says_which_there_are_and_what_decided(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path, change={"model_type": "qwen2_vl"})
    families = ("llava", "vipllava", "llava_next", "video_llava", "llava_onevision")
    faulty(
        tmp_path,
        ("'qwen2_vl'", "['LlavaForConditionalGeneration']", "['vision_config']"),
        expected=("llava-original (", *(f"model_type '{family}'" for family in families)),
    )


def test_a_revision_of_a_local_folder(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    with refused(CheckpointError, got=("'main'", str(tmp_path)), expected="hub id"):
        Checkpoint.open(tmp_path, revision="main")


# What it says of itself


def test_identity_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout("llava-hf", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    opened = Checkpoint.open("mine")
    assert (opened.model_id, opened.revision) == (str((tmp_path / "mine").resolve()), None)
    assert opened.config["model_type"] == "llava"


# Preprocessing settings


def test_nested_settings_come_before_the_older_file(tmp_path: Path) -> None:
    write_layout("transformers-5", tmp_path)
    nested = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    older = nested | {"image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    assert Checkpoint.open(tmp_path).vision().preprocessing.mean == tuple(nested["image_mean"])


def test_a_processor_without_image_settings_leaves_the_older_file(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    assert Checkpoint.open(tmp_path).vision().preprocessing.image_size == 32


def test_original_takes_its_towers_settings(tmp_path: Path) -> None:
    write_layout("original", tmp_path)
    preprocessing = Checkpoint.open(tmp_path).vision().preprocessing
    assert (preprocessing.mode, preprocessing.image_size) == ("pad_square", 32)
    (tmp_path / TOWER_FOLDER / "preprocessor_config.json").unlink()
    faulty(tmp_path, f"{TOWER_FOLDER} has no preprocessor_config.json")


def test_originals_own_settings_count_where_its_tower_has_none(tmp_path: Path) -> None:
    # The original code makes its processor from the tower's checkpoint, whatever lies beside it.
    write_layout("original", tmp_path)
    towers = tmp_path / TOWER_FOLDER / "preprocessor_config.json"
    settings = json.loads(towers.read_text())
    own = settings | {"image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    mean = Checkpoint.open(tmp_path).vision().preprocessing.mean
    assert mean == tuple(settings["image_mean"])
    towers.unlink()
    assert Checkpoint.open(tmp_path).vision().preprocessing.mean == (0.1, 0.2, 0.3)


def test_video_has_settings_of_its_own(tmp_path: Path) -> None:
    write_layout("transformers-5", tmp_path, family="llava-onevision")
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())

    def mean(media: Any) -> tuple[float, ...]:
        return Checkpoint.open(tmp_path).vision(media).preprocessing.mean

    edit_json(file, video_processor=saved["video_processor"] | {"image_mean": [0.1, 0.2, 0.3]})
    assert (mean("video"), mean("image")) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    # A file of its own comes after the part, and before the image processor's settings.
    own = saved["video_processor"] | {"image_mean": [0.4, 0.5, 0.6]}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    assert mean("video") == (0.1, 0.2, 0.3)
    edit_json(file, video_processor=None)
    assert (mean("video"), mean("image")) == ((0.4, 0.5, 0.6), (0.5, 0.5, 0.5))
    (tmp_path / "video_preprocessor_config.json").unlink()
    assert mean("video") == (0.5, 0.5, 0.5)


def test_a_bundle_where_a_checkpoint_is_expected_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    faulty(tmp_path, "holds a bundle", expected="checkpoint", cure="model.id")


# Original LLaVA's tower


def test_original_llava_next_is_refused_before_its_tower_is_looked_for(
    no_hub: None, tmp_path: Path
) -> None:
    write_layout("original", tmp_path, change={"image_aspect_ratio": "anyres"})
    (tmp_path / TOWER_FOLDER).rename(tmp_path / "elsewhere")
    hint = ("'pad', 'square'", "llava-hf/llava-v1.6-vicuna-7b-hf")
    faulty(tmp_path, "'anyres'", expected=hint, cure="vzip models")  # it is the published file


def test_a_tower_beside_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_layout("original", tmp_path / "llava")
    (tmp_path / "llava" / "openai").rename(tmp_path / "openai")
    monkeypatch.chdir(tmp_path)
    tensors = read_vision(Checkpoint.open("llava")).tensors
    assert torch.equal(tensors[Q0], expected[Q0])


def test_a_tower_that_is_not_there(tmp_path: Path) -> None:
    write_layout("original", tmp_path, change={"mm_vision_tower": "./clip/nowhere"})
    said = ("'./clip/nowhere'", str(tmp_path), "mm_vision_tower", "does not exist")
    faulty(tmp_path, said, cause="a folder of that name")


def test_a_tower_that_is_no_clip(tmp_path: Path) -> None:
    write_layout("original", tmp_path)
    edit_json(tmp_path / TOWER_FOLDER / "config.json", model_type="siglip")
    faulty(tmp_path, ("mm_vision_tower", "'siglip'"), expected="'clip'")


# Random weights


def test_aliases_need_no_hub(no_hub: None) -> None:
    config = vision_config("llava-1.5-7b")
    assert (config.tower.tokens, config.tower.num_layers, config.layers_run) == (577, 24, 23)
    assert (config.tower.hidden_size, config.tower.intermediate_size) == (1024, 4096)
    assert (config.tower.num_heads, config.tower.activation) == (16, "quick_gelu")
    assert (config.llm_hidden_size, config.image_token_id) == (4096, 32000)
    assert config.preprocessing.image_size == config.preprocessing.shortest_edge == 336
    assert vision_config("llava-hf/llava-1.5-7b-hf") == config
    assert vision_config("llava-1.5-13b").llm_hidden_size == 5120
    assert vision_config("video-llava-7b").tower_module == "video_tower"
    assert vision_config("video-llava-7b", media="image").tower_module == "image_tower"
    with refused(CheckpointError, cause="the hub was asked"):
        vision_config("llava-1.5-7b", revision="main")  # another revision may differ
    with refused(CheckpointError, cause="the hub was asked"):
        vision_config("someone/llava")


def test_a_folder_needs_only_its_configuration(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    assert vision_config(tmp_path).tower.tokens == 65


# A tuned projector


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "names",
    [
        "linear_{}",
        "projector.linear_{}",
        "multi_modal_projector.linear_{}",
        "model.multi_modal_projector.linear_{}",
        "model.mm_projector.{}",
        "mm_projector.{}",
    ],
)
def test_a_projector_reads_under_any_name(names: str, suffix: str, tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    config = Checkpoint.open(tmp_path).vision().projector
    numbers = ("0", "2") if "mm_projector" in names else ("1", "2")
    first, second = (names.format(number) for number in numbers)
    state = {
        f"{first}.weight": torch.randn(48, 32),
        f"{first}.bias": torch.randn(48),
        f"{second}.weight": torch.randn(48, 48),
        f"{second}.bias": torch.randn(48),
    }
    file = tmp_path / f"tuned{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    tensors = read_projector(file, config)
    assert list(tensors) == [
        f"projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")
    ]
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), state.values(), strict=True))


def test_projector_faults(tmp_path: Path) -> None:
    write_layout("llava-hf", tmp_path)
    config = Checkpoint.open(tmp_path).vision().projector
    first = {"linear_1.weight": torch.zeros(48, 32), "linear_1.bias": torch.zeros(48)}
    second = {"linear_2.weight": torch.zeros(32, 48), "linear_2.bias": torch.zeros(32)}
    save_file(first, tmp_path / "first.safetensors")
    save_file(first | second, tmp_path / "both.safetensors")
    (tmp_path / "tuned.pt").touch()
    cases: dict[str, dict[str, Said]] = {
        "absent.safetensors": {"got": "absent.safetensors", "cure": "path"},
        "first.safetensors": {"got": ("'projector.linear_2.weight'", "first.safetensors")},
        "both.safetensors": {"got": "[32, 48]", "expected": "[48, 48]"},
        "tuned.pt": {"expected": ".safetensors or .bin"},
    }
    for name, said in cases.items():
        with refused(CheckpointError, **said):
            read_projector(tmp_path / name, config)
