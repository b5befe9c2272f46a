from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import time
from typing import Any

import pytest

from tests.places import GOLDEN
from tests.refusals import refused, says
from vzip.runtime.bundle.engine_record import EngineBatch
from vzip.runtime.bundle.manifest import TOKEN_ORDER, Manifest, Selection, Tensor, Tiling
from vzip.runtime.errors import BundleError, VzipError
from vzip.runtime.files.codec import MisfitError

ENGINE: dict[str, Any] = {
    "sha256": "a" * 64,
    "bytes": 28,
    "stack": "tensorrt",
    "version": "10.3.0.30",
    "gpu": "Orin",
    "sm": ["87"],
    "jetpack": "6.2",
    "precision": "fp16",
    "batch": {"min": 1, "opt": 2, "max": 3},
    "model_sha256": "b" * 64,
    "settings": {"workspace_mib": 1024, "low_memory": False},
    "seconds": 431.5,
    "fused_attention": 23,
    "proof": {"passed": True, "cosine_min": 0.9997},
}
PRECISION: dict[str, Any] = {
    "opset": 18,
    "samples_sha256": "c" * 64,
    "images": 80,
    "recipe": {"method": "minmax", "smoothing": 0.5},
    "agreement": {"images": 16, "mean_cosine": 0.9981},
}
ENTRY: dict[str, Any] = {"sha256": "d" * 64, "bytes": 1}


def values(name: str = "tiny_bundle") -> dict[str, Any]:
    """Return the JSON of a good manifest, as it is exported."""
    parsed: dict[str, Any] = json.loads((GOLDEN / name / "manifest.json").read_text("utf-8"))
    return parsed


def full() -> dict[str, Any]:
    """Return the JSON of a good manifest with all that it may have."""
    exported = values()
    place = list(exported).index("files")
    parts = list(exported.items())
    result = dict([*parts[:place], ("precisions", {"int8": PRECISION}), *parts[place:]])
    result["files"] |= {"model.int8.onnx": ENTRY, "calibration.int8.json": ENTRY}
    result["engines"] = {"orin-fp16": ENGINE}
    result["model"]["dequantised"] = "compressed-tensors float-quantized"
    return copy.deepcopy(result)


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the JSON of a good manifest with one value changed."""
    result = place = full()
    *way, last = (int(step) if step.isdigit() else step for step in path.split("/"))
    for step in way:
        place = place[step]  # type: ignore[index]
    place[last] = value  # type: ignore[index]
    return result


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_static_bundle"])
def test_reads_and_writes_the_same_bytes(name):
    data = (GOLDEN / name / "manifest.json").read_bytes()
    assert Manifest.from_bytes(data).to_bytes() == data


def test_reads_and_writes_the_same_json_in_the_same_order():
    manifest = Manifest.from_json(full())
    assert json.dumps(manifest.to_json()) == json.dumps(full())
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    engine = manifest.engines["orin-fp16"]
    assert (engine.sm, engine.batch) == (("87",), EngineBatch(1, 2, 3))


def test_keys_are_those_of_the_specification() -> None:
    # Written out, so that a renamed field can't rename a key of the format.
    keys = {key: list(each) if isinstance(each, dict) else None for key, each in values().items()}
    assert keys == {
        "format": None,
        "schema_version": None,
        "model": ["id", "revision", "family", "weights", "seed", "projector"],
        "selection": ["method", "dominant", "contextual", "merge", "cls_token"],
        "tower": ["tokens", "grid", "cls_token", "image_size", "patch_size", "pool"],
        "token_order": None,
        "inputs": None,
        "outputs": None,
        "batch": ["max", "dynamic"],
        "preprocessing": [
            *("image_size", "mode", "shortest_edge", "resample", "mean", "std", "rescale_factor")
        ],
        "tiling": None,
        "media": None,
        "llm": ["hidden_size", "image_token_id", "video_token_id"],
        "precision": None,
        "opset": None,
        "files": ["model.onnx", "model.onnx.data"],
        "engines": [],
        "parity": None,
        "versions": ["onnx"],
    }
    assert list(values()["inputs"][0]) == ["name", "dtype", "shape"]
    assert list(values()["files"]["model.onnx"]) == ["sha256", "bytes"]


def test_fields_hold_what_the_file_says():
    manifest = Manifest.from_json(values())
    assert manifest.selection.tokens == 7
    assert manifest.tower.grid == (4, 4)
    assert manifest.input == Tensor("image", "uint8", ("batch", 16, 16, 3))
    assert manifest.embeds.shape == ("batch", 7, 6)
    assert manifest.kept.shape == ("batch", 4)
    assert manifest.token_order == TOKEN_ORDER
    assert manifest.parity is None


def test_what_may_be_otherwise():
    tiling = {"pinpoints": [[16, 32], [32, 16]], "order": "newline"}
    manifest = Manifest.from_json(changed("tiling", tiling))
    assert manifest.tiling == Tiling(((16, 32), (32, 16)), "newline")
    assert manifest.to_json()["tiling"] == tiling

    pooled = values()
    pooled["selection"] |= {"cls_token": False, "dominant": 2, "contextual": 1}
    pooled["tower"] |= {"cls_token": False, "patch_size": 3, "pool": 2, "grid": [3, 3], "tokens": 9}
    pooled["outputs"][0]["shape"][1] = 3
    pooled["outputs"][1]["shape"][1] = 2
    pooled["media"] = ["video"]
    assert Manifest.from_json(pooled).tower.tokens == 9  # 16 / 3 / 2, rounded down and up
    for media in (["image"], ["image", "video"]):
        with refused(BundleError, got="'media'", expected=("['video']", "tower.pool")):
            Manifest.from_json({**pooled, "media": media})

    dropped = values()  # a CLS that is dropped is no token to select
    dropped["selection"].update(cls_token=False, dominant=12, contextual=3)
    dropped["outputs"][0]["shape"][1] = 15
    dropped["outputs"][1]["shape"][1] = 12
    assert Manifest.from_json(dropped).selection.tokens == 15
    dropped["selection"]["contextual"] = 4
    with refused(BundleError, got="'12+4'", expected="below the 16"):
        Manifest.from_json(dropped)

    without = values()
    without["tower"].update(cls_token=False, tokens=16)
    with refused(BundleError, got=("'selection.cls_token'", "True"), expected="false"):
        Manifest.from_json(without)
    without["selection"]["cls_token"] = False
    assert Manifest.from_json(without).tower.tokens == 16

    half = values("tiny_static_bundle")
    assert Manifest.from_json(half).embeds.dtype == "float16"
    half["outputs"][0]["dtype"] = "float32"
    assert Manifest.from_json(half).embeds.dtype == "float32"

    parity = {"passed": True, "cosine_min": 0.99999999, "images": 3, "gate": "fp32"}
    assert Manifest.from_json(changed("parity", parity)).parity == parity

    ahead = ENGINE | {"gpu": None, "jetpack": None, "proof": None, "fused_attention": None}
    engines = {"x": ahead | {"sm": ["86", "120"], "seconds": 431}}
    assert Manifest.from_json(changed("engines", engines)).engines["x"].sm == ("86", "120")


def test_schema_2_is_where_the_graph_says_positions() -> None:
    assert not Manifest.from_json(values()).has_positions
    told = values()
    positions = {"name": "token_positions", "dtype": "int64", "shape": ["batch", 7]}
    told["outputs"].append(positions)
    with refused(BundleError, got="'outputs' is", expected="not in schema 1"):
        Manifest.from_json(told)
    manifest = Manifest.from_json(told | {"schema_version": 2})
    assert manifest.has_positions
    assert manifest.to_json()["schema_version"] == 2
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    with refused(BundleError, got="'outputs' is", expected="token_positions among them"):
        Manifest.from_json(values() | {"schema_version": 2})
    for wrong in ({"dtype": "float32"}, {"shape": ["batch", 4]}, {"name": "positions"}):
        told["outputs"][-1] = positions | wrong
        with refused(BundleError, got="'outputs' is", expected="token_positions int64 [batch, 7]"):
            Manifest.from_json(told | {"schema_version": 2})


def ranked_values() -> dict[str, Any]:
    """Return a manifest whose graph gives ranks: 7 of 16 patches, without CLS."""
    told = values() | {"schema_version": 2}
    told["selection"] |= {"method": "coverage", "dominant": 7, "contextual": 0, "ranked": True}
    told["selection"] |= {"cls_token": False, "options": {"place": 0, "features": "keys"}}
    told["outputs"][1]["shape"] = ["batch", 7]
    told["outputs"] += [
        {"name": name, "dtype": "int64", "shape": ["batch", 7]}
        for name in ("token_positions", "rank")
    ]
    return told


def test_a_ranked_selection_has_one_more_output() -> None:
    manifest = Manifest.from_json(ranked_values())
    assert manifest.has_rank
    assert manifest.has_positions
    assert manifest.selection.options == {"place": 0.0, "features": "keys"}
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    for outputs in (slice(2), slice(3)):
        told = ranked_values()
        told["outputs"] = told["outputs"][outputs]
        with refused(BundleError, got="'outputs' is", expected="rank int64 [batch, 7]"):
            Manifest.from_json(told)
    told = ranked_values()
    del told["selection"]["ranked"]
    with refused(BundleError, got="'outputs' is", expected="token_positions int64 [batch, 7]"):
        Manifest.from_json(told)
    told = ranked_values()
    told["selection"]["cls_token"] = True
    with refused(BundleError, got="'selection.cls_token'", expected="false"):
        Manifest.from_json(told)


def test_what_a_selection_lacks_is_not_written() -> None:
    written = Manifest.from_json(values()).to_json()["selection"]
    assert not {"ranked", "options"} & set(written)
    assert Manifest.from_json(ranked_values()).to_json()["selection"]["ranked"] is True


def test_all_patches_may_be_kept_where_nothing_is_merged() -> None:
    told = ranked_values()
    told["selection"]["dominant"] = 16
    for each, width in zip(told["outputs"], ([16, 6], [16], [16], [16]), strict=True):
        each["shape"] = ["batch", *width]
    assert Manifest.from_json(told).selection.tokens == 16
    told["selection"]["dominant"] = 17
    with refused(BundleError, got="'17+0'", expected="at most the 16"):
        Manifest.from_json(told)


def test_the_span_is_the_patches_with_cls_or_without() -> None:
    told = values() | {"schema_version": 2}
    told["outputs"].append({"name": "token_positions", "dtype": "int64", "shape": ["batch", 7]})
    tower = Manifest.from_json(told).tower
    assert Manifest.from_json(told).span is None
    patches = tower.tokens - tower.cls_token
    for span in (patches, patches + tower.cls_token):
        told["selection"]["span"] = span
        assert Manifest.from_json(told).span == span
    told["selection"]["span"] = patches - 1
    with refused(BundleError, got=f"'selection.span' is {patches - 1}", expected=str(patches)):
        Manifest.from_json(told)
    before = values()
    before["selection"]["span"] = patches
    with refused(BundleError, got="'selection.span'", expected="without token_positions"):
        Manifest.from_json(before)


TILING: dict[str, Any] = {"pinpoints": [[16, 32]], "order": "reference"}
DAMAGED: list[tuple[str, object, str, str]] = [
    # path, value → place in the message, what is expected there
    ("model", None, "model' is None", "an object"),
    ("model/id", "", "model.id' is ''", "a printable text"),
    ("model/id", "a\nb", r"model.id' is 'a\nb'", "a printable text"),
    ("model/revision", 1, "model.revision' is 1", "a printable text"),
    ("model/weights", "stolen", "model.weights' is 'stolen'", "'checkpoint', 'random'"),
    ("model/weights", "checkpoint", "model.seed' is 20261121", "null"),
    ("model/seed", None, "model.seed' is None", "an integer at least 0"),
    ("model/projector", "abc", "model.projector' is 'abc'", "64 lower-case"),
    ("model/extra", 1, "model' has the unknown ['extra']", "exactly ["),
    ("selection/method", "", "selection.method' is ''", "a printable text"),
    ("selection/dominant", 0, "selection.dominant' is 0", "an integer at least 1"),
    ("selection/dominant", True, "selection.dominant' is True", "an integer at least 1"),
    ("selection/dominant", 4.0, "selection.dominant' is 4.0", "an integer at least 1"),
    ("selection/dominant", 2**53 + 1, "selection.dominant' is 9007", "an integer at least 1"),
    ("selection/contextual", -1, "selection.contextual' is -1", "an integer at least 0"),
    ("selection/ranked", 1, "selection.ranked' is 1", "true or false"),
    ("selection/ranked", True, "selection.contextual' is 3", "0 where every token has a rank"),
    ("selection/options", [], "selection.options' is []", "an object"),
    ("selection/options", {"alpha": True}, "selection.options.alpha' is True", "a finite number"),
    ("selection/options", {"features": ""}, "selection.options.features' is ''", "a printable"),
    ("selection/contextual", 13, "selection' is '4+13'", "below the 17"),
    ("selection/merge", "mean", "selection.merge' is 'mean'", "'average', 'sum'"),
    ("selection/cls_token", 1, "selection.cls_token' is 1", "true or false"),
    ("tower/tokens", 16, "tower.tokens' is 16", "17"),
    ("tower/grid", [2, 8], "tower.grid' is [2, 8]", "[4, 4]"),
    ("tower/grid", [4], "tower.grid' is [4]", "a list of 2"),
    ("tower/grid", 4, "tower.grid' is 4", "a list of 2"),
    ("tower/grid", [4, "4"], "tower.grid[1]' is '4'", "an integer"),
    ("tower/cls_token", "yes", "tower.cls_token' is 'yes'", "true or false"),
    ("tower/image_size", 0, "tower.image_size' is 0", "from 1 to 65536"),
    ("tower/patch_size", 17, "tower.patch_size' is 17", "at most the image_size 16"),
    ("tower/pool", 2, "tower.pool' is 2", "1, since the tower has a CLS token"),
    ("tower/pool", 3, "tower.pool' is 3", "1, 2"),
    ("media", [], "media' is []", "['image'], ['video'] or"),
    ("media", ["video", "image"], "media' is ['video', 'image']", "['image'], ['video'] or"),
    ("media", "image", "media' is 'image'", "a list"),
    ("tiling", [], "tiling' is []", "an object"),
    ("tiling", {"order": "newline"}, "tiling' lacks ['pinpoints']", "exactly ["),
    ("tiling", TILING | {"pinpoints": []}, "tiling.pinpoints' is []", "[height, width]"),
    ("tiling", TILING | {"pinpoints": [[16]]}, "tiling.pinpoints[0]' is [16]", "a list of 2"),
    ("tiling", TILING | {"pinpoints": [[16, 0]]}, "tiling.pinpoints[0][1]' is 0", "from 1"),
    ("tiling", TILING | {"pinpoints": [[16, 24]]}, "tiling.pinpoints' is [16, 24]", "size 16"),
    ("tiling", TILING | {"order": "rows"}, "tiling.order' is 'rows'", "'reference', 'newline'"),
    ("token_order", "by score", "token_order' is 'by score'", "dominant ascending"),
    ("inputs", [], "inputs' is ''", "image uint8 [batch, 16, 16, 3] or pixel_values float32"),
    ("inputs", {}, "inputs' is {}", "a list"),
    ("inputs/0/dtype", "int8", "inputs[0].dtype' is 'int8'", "'uint8', 'float32'"),
    ("inputs/0/dtype", "float32", "'image float32 [batch, 16, 16, 3]'", "image uint8"),
    ("inputs/0/shape", ["batch", 3, 16, 16], "inputs' is 'image", "[batch, 16, 16, 3]"),
    ("inputs/0/shape", [1, 16, 16, 3], "inputs' is 'image", "[batch, 16, 16, 3]"),
    ("inputs/0/shape", ["n", 16, 16, 3], "inputs[0].shape[0]' is 'n'", "'batch'"),
    ("inputs/0/shape", [1, "batch", 16, 3], "inputs[0].shape' is [1, 'batch'", "'batch'"),
    ("inputs/0/shape", [], "inputs[0].shape' is []", "extents"),
    ("outputs/0/shape", ["batch", 8, 6], "outputs' is", "image_embeds float32 [batch, 7, 6]"),
    ("outputs/0/shape", ["batch", 7, 5], "outputs' is", "image_embeds float32 [batch, 7, 6]"),
    ("outputs/0/dtype", "float16", "outputs' is", "image_embeds float32 [batch, 7, 6]"),
    ("outputs/1/shape", ["batch", 7], "outputs' is", "kept_indices int64 [batch, 4]"),
    ("batch/max", 0, "batch.max' is 0", "from 1 to 65536"),
    ("batch/dynamic", False, "inputs' is", "image uint8 [3, 16, 16, 3]"),
    ("preprocessing", [], "preprocessing' is []", "an object"),
    ("preprocessing/mode", "squeeze", "preprocessing.mode' is 'squeeze'", "'resize_crop'"),
    ("preprocessing/image_size", 32, "preprocessing.image_size' is 32", "the tower's 16"),
    ("preprocessing/colour", "BGR", "preprocessing' has the unknown ['colour']", "exactly ["),
    ("llm/hidden_size", 0, "llm.hidden_size' is 0", "an integer at least 1"),
    ("llm/hidden_size", 7, "outputs' is", "image_embeds float32 [batch, 7, 7]"),
    ("llm/image_token_id", None, "llm.image_token_id' is None", "an integer"),
    ("llm/video_token_id", -1, "llm.video_token_id' is -1", "an integer at least 0"),
    ("precision", "int8", "precision' is 'int8'", "'fp32', 'fp16'"),
    ("opset", 16, "opset' is 16", "17, 18"),
    ("opset", 18.0, "opset' is 18.0", "17, 18"),
    ("precisions", None, "precisions' is None", "an object"),
    ("precisions", {"int8": None}, "precisions.int8' is None", "an object"),
    ("precisions", {"int4": PRECISION}, "precisions' has the key 'int4'", "'int8', 'fp8'"),
    ("precisions", {}, "precisions' is []", "'int8'"),
    ("files", {"model.int8.onnx": ENTRY}, "files' is ['model.int8.onnx']", "calibration.int8.json"),
    ("files", {"calibration.int8.json": ENTRY}, "files' is ['calib", "model.int8.onnx"),
    ("precisions/int8", {"opset": 18}, "precisions.int8' lacks ['agreement'", "exactly ["),
    ("precisions/int8/x", 1, "precisions.int8' has the unknown ['x']", "exactly ["),
    ("precisions/int8/opset", 16, "precisions.int8.opset' is 16", "from 17 to 21"),
    ("precisions/int8/samples_sha256", "a", "precisions.int8.samples_sha256' is 'a'", "64"),
    ("precisions/int8/images", 0, "precisions.int8.images' is 0", "an integer at least 1"),
    ("precisions/int8/recipe", [], "precisions.int8.recipe' is []", "an object"),
    ("precisions/int8/recipe", {"": 1}, "precisions.int8.recipe' has the key ''", "printable"),
    ("precisions/int8/agreement", {"a": None}, "precisions.int8.agreement.a' is None", "finite"),
    ("files", [], "files' is []", "an object"),
    ("files/model.onnx", {"bytes": 1}, "files.model.onnx' lacks ['sha256']", "exactly ["),
    ("files/model.onnx/sha256", "A" * 64, "files.model.onnx.sha256' is 'AA", "64 lower-case"),
    ("files/model.onnx/sha256", "a" * 63, "files.model.onnx.sha256' is 'aa", "64 lower-case"),
    ("files/model.onnx/sha256", "a" * 64 + "\n", "files.model.onnx.sha256'", "64 lower-case"),
    ("files/model.onnx/bytes", -1, "files.model.onnx.bytes' is -1", "an integer at least 1"),
    *(
        (f"files/{name}", ENTRY, "files' has the key", "'model.onnx', 'model.onnx.data'")
        for name in ("..%2Fmodel.onnx", "a\\b", "model.onnx\0", "MODEL.ONNX", "..")
    ),
    ("parity", [], "parity' is []", "an object"),
    ("parity", {"cosine": 1.0}, "parity' is {'cosine': 1.0}", "'passed'"),
    ("parity", {"passed": 1}, "parity' is {'passed': 1}", "'passed'"),
    ("parity", {"passed": True, "cosine": None}, "parity.cosine' is None", "a finite number"),
    ("versions", [], "versions' is []", "an object"),
    ("versions/onnx", 1, "versions.onnx' is 1", "a printable text"),
    ("hmac", "00", "it has the unknown ['hmac']", "exactly ["),
    ("engines", None, "engines' is None", "an object"),
    ("engines/orin-fp16/extra", 1, "engines.orin-fp16' has the unknown ['extra']", "exactly ["),
    ("engines", {"x": None}, "engines.x' is None", "an object"),
    *(
        ("engines", {name: ENGINE}, "engines' has the key", "letters, digits")
        for name in ("", "../x", "a/b", ".hidden", "a\0", "é", "a b", "x" * 101)
    ),
    *(
        (f"engines/orin-fp16/{key}", value, f"engines.orin-fp16.{place}", expected)
        for key, value, place, expected in [
            ("sha256", "A" * 64, "sha256' is 'AA", "64 lower-case"),
            ("bytes", 0, "bytes' is 0", "an integer at least 1"),
            ("stack", "onnx", "stack' is 'onnx'", "'tensorrt', 'tensorrt_rtx'"),
            ("version", "10", "version' is '10'", "a version"),
            ("version", "10.3;", "version' is '10.3;'", "a version"),
            ("version", 10.3, "version' is 10.3", "a version"),
            ("gpu", "", "gpu' is ''", "a printable text"),
            ("sm", [], "sm' is []", "a list"),
            ("sm", "87", "sm' is '87'", "a list"),
            ("sm", ["8.7"], "sm[0]' is '8.7'", "'87'"),
            ("sm", [87], "sm[0]' is 87", "'87'"),
            ("jetpack", 6.2, "jetpack' is 6.2", "a printable text"),
            ("precision", "int4", "precision' is 'int4'", "'fp32', 'fp16', 'int8', 'fp8'"),
            ("batch", [1, 2], "batch' is [1, 2]", "an object"),
            ("batch", {"min": 1, "max": 1}, "batch' lacks ['opt']", "exactly ["),
            ("batch", {"min": 0, "opt": 1, "max": 1}, "batch.min' is 0", "from 1 to 65536"),
            ("batch", {"min": 2, "opt": 1, "max": 3}, "batch.opt' is 1", "at least"),
            ("batch", {"min": 1, "opt": 2, "max": 1}, "batch.max' is 1", "at least"),
            ("model_sha256", None, "model_sha256' is None", "64 lower-case"),
            ("settings", None, "settings' is None", "an object"),
            ("settings", {"a": [1]}, "settings.a' is [1]", "true or false"),
            ("seconds", -1, "seconds' is -1", "a number of at least 0"),
            ("seconds", True, "seconds' is True", "a number of at least 0"),
            ("seconds", "1", "seconds' is '1'", "a number of at least 0"),
            ("fused_attention", -1, "fused_attention' is -1", "an integer at least 0"),
            ("proof", {}, "proof' is {}", "'passed'"),
            ("proof", {"passed": 1}, "proof' is {'passed': 1}", "'passed'"),
            ("proof", {"passed": True, "": 1}, "proof' has the key ''", "a printable text"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "got", "expected"), DAMAGED)
def test_refuses_damaged_values(path, value, got, expected):
    with refused(BundleError, got=("manifest.json: ", got), expected=expected) as raised:
        Manifest.from_json(changed(path, value))
    says(raised.value, cause="edited", cure="export the bundle again")
    assert "\n" not in str(raised.value)


def test_refuses_every_missing_key():
    def places(value: object, *way: str) -> list[tuple[str, ...]]:
        if not isinstance(value, dict) or way[-1:] in {("settings",), ("recipe",), ("versions",)}:
            return []
        return [
            each
            for key, inner in value.items()
            for each in ((*way, key), *places(inner, *way, key))
        ]

    checked = 0
    free = {"files", "engines", "precisions", "proof", "agreement"}  # what is in them has no names
    for *way, key in places(full()):
        if (way and way[-1] in free) or key in ("precisions", "dequantised"):
            continue
        broken = holder = full()
        for step in way:
            holder = holder[step]
        del holder[key]
        with pytest.raises(BundleError) as raised:
            Manifest.from_json(broken)
        if key not in ("format", "schema_version"):
            says(raised.value, got=f"lacks ['{key}']")
        checked += 1
    assert checked > 60
    unrecorded = full()
    del unrecorded["precisions"]  # may be absent, but not where there is such a graph
    with refused(BundleError, got="precisions' is []", expected="'int8'"):
        Manifest.from_json(unrecorded)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("format", "zip", {"cure": "vzip export -o"}),
        ("schema_version", 3, {"got": "is 3", "expected": "1 to 2", "cure": "export it again"}),
        ("schema_version", True, {"got": "is True", "expected": "1 to 2"}),
        ("schema_version", 1.0, {"got": "is 1.0", "expected": "1 to 2"}),
    ],
)
def test_refuses_other_formats_and_versions(path, value, field):
    with refused(BundleError, **field):
        Manifest.from_json(changed(path, value) | {"unknown": 1})  # of a later version, perhaps


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"\xff{}", "malformed"),
        (b"[]", "no manifest"),
        (b"null", "no manifest"),
        (b'{"format": NaN}', "NaN"),
        (b'{"format": -Infinity}', "-Infinity"),
        (b'{"a": 1, "format": "x", "a": 2}', "the key 'a' stands twice"),
        (b"[" * 100_000, "malformed"),
        (b'{"format": ' + b"9" * 5000 + b"}", "malformed"),
    ],
)
def test_refuses_what_is_no_strict_json(data, got):
    with refused(BundleError, got=("manifest.json", got)):
        Manifest.from_bytes(data)


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    keys = ", ".join(f'"{number:x}": 1' for number in range(60_000))
    start = time.process_time()
    with refused(BundleError, got="'7' stands twice"):
        Manifest.from_bytes(f'{{{keys}, "7": 1}}'.encode())
    assert time.process_time() - start < 5  # a minute and a half where each is counted


def test_a_static_batch_has_so_many_pixels_and_no_more() -> None:
    parsed = values("tiny_static_bundle")
    parsed["batch"]["max"] = 2**16
    for each in (*parsed["inputs"], *parsed["outputs"]):
        each["shape"][0] = 2**16
    Manifest.from_json(parsed)
    shown = copy.deepcopy(parsed)
    side = shown["tower"]["image_size"] = shown["preprocessing"]["image_size"] = 256
    shown["preprocessing"]["shortest_edge"] = side
    shown["tower"] |= {"patch_size": 64, "grid": [4, 4]}
    shown["inputs"][0]["shape"][2:] = [side, side]
    with refused(BundleError, got="'batch.max' is 65536", expected=f"at most {2**14}"):
        Manifest.from_json(shown)


def test_every_truncation_is_refused():
    data = (GOLDEN / "tiny_bundle" / "manifest.json").read_bytes().rstrip()
    for end in range(len(data)):
        with pytest.raises(BundleError):
            Manifest.from_bytes(data[:end])


def test_checks_what_is_made_in_python_too():
    manifest = Manifest.from_json(full())
    engine = manifest.engines["orin-fp16"]
    larger = Selection("visionzip", 5, 3, "average", cls_token=True)
    changes: list[tuple[str, Any, str]] = [
        ("selection", None, "Manifest: 'selection' is None"),
        ("selection", larger, "Manifest: 'outputs' is"),
        ("files", {"model.onnx": "x"}, "Manifest: 'files.model.onnx' is 'x'"),
        ("engines", {"x": 1}, "Manifest: 'engines.x' is 1"),
        ("parity", {"passed": True, "error": math.nan}, "Manifest: 'parity.error' is nan"),
    ]
    for field, value, got in changes:
        with refused(MisfitError, got=got):
            dataclasses.replace(manifest, **{field: value})
    with refused(MisfitError, got="EngineRecord: 'seconds' is nan") as raised:
        dataclasses.replace(engine, seconds=math.nan)
    again: VzipError = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)
    assert dataclasses.replace(manifest, inputs=list(manifest.inputs)) == manifest  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.opset = 17  # type: ignore[misc]
