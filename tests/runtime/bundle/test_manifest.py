from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from tests.places import GOLDEN
from vzip.runtime.bundle.manifest import TOKEN_ORDER, FileEntry, Manifest, Selection, Tensor, Tiling
from vzip.runtime.errors import BundleError


def values(name: str = "tiny_bundle") -> dict[str, Any]:
    """Return the JSON of a good manifest."""
    parsed: dict[str, Any] = json.loads((GOLDEN / name / "manifest.json").read_text("utf-8"))
    return parsed


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the JSON of a good manifest with one value changed."""
    result = place = copy.deepcopy(values())
    *way, last = (int(step) if step.isdigit() else step for step in path.split("/"))
    for step in way:
        place = place[step]  # type: ignore[index]
    place[last] = value  # type: ignore[index]
    return result


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_static_bundle"])
def test_reads_and_writes_the_same_bytes(name: str) -> None:
    data = (GOLDEN / name / "manifest.json").read_bytes()
    assert Manifest.from_bytes(data).to_bytes() == data


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


def test_a_tiled_model_for_images_alone() -> None:
    tiling = {"pinpoints": [[16, 32], [32, 16]], "order": "newline"}
    tiled = changed("tiling", tiling)
    manifest = Manifest.from_json(tiled)
    assert manifest.tiling == Tiling(((16, 32), (32, 16)), "newline")
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.to_json() == tiled
    tiled["media"] = ["video"]
    with pytest.raises(BundleError, match="expected null, since the bundle takes no image"):
        Manifest.from_json(tiled)


def test_a_tower_without_cls_may_be_pooled() -> None:
    pooled = values()
    pooled["selection"] |= {"cls_token": False, "dominant": 2, "contextual": 1}
    pooled["tower"] |= {"cls_token": False, "patch_size": 3, "pool": 2, "grid": [3, 3], "tokens": 9}
    pooled["outputs"][0]["shape"][1] = 3
    pooled["outputs"][1]["shape"][1] = 2
    pooled["media"] = ["video"]
    assert Manifest.from_json(pooled).tower.tokens == 9  # 16 / 3 / 2, rounded down and up
    for media in (["image"], ["image", "video"]):
        pooled["media"] = media
        with pytest.raises(BundleError, match=r"expected \['video'\], since tower.pool is 2"):
            Manifest.from_json(pooled)


def test_fields_hold_what_the_file_says() -> None:
    manifest = Manifest.from_json(values())
    assert manifest.selection.tokens == 7
    assert manifest.tower.grid == (4, 4)
    assert manifest.input == Tensor("image", "uint8", ("batch", 16, 16, 3))
    assert manifest.embeds.shape == ("batch", 7, 6)
    assert manifest.kept.shape == ("batch", 4)
    assert manifest.token_order == TOKEN_ORDER
    assert manifest.parity is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "zip", "not the manifest of a vzip bundle"),
        ("schema_version", 2, "'schema_version' is 2, expected 1; the bundle was made by another"),
        ("schema_version", True, "'schema_version' is True, expected 1"),
        ("schema_version", 1.0, "'schema_version' is 1.0, expected 1"),
        ("model", None, "'model' is None, expected an object"),
        ("model/id", "", "'model.id' is '', expected a printable text"),
        ("model/id", "a\nb", r"'model.id' is 'a\\nb', expected a printable text"),
        ("model/revision", 1, "'model.revision' is 1, expected a printable text"),
        ("model/weights", "stolen", "expected one of 'checkpoint', 'random'"),
        ("model/seed", None, "'model.seed' is None, expected an integer at least 0"),
        ("model/projector", "abc", "'model.projector' is 'abc', expected 64 lower-case"),
        ("model/weights", "checkpoint", "'model.seed' is 20261121, expected null"),
        ("model/extra", 1, r"'model' has the unknown \['extra'\], expected exactly"),
        ("selection/method", "", "'selection.method' is '', expected a printable text"),
        ("selection/dominant", 0, "'selection.dominant' is 0, expected an integer at least 1"),
        ("selection/dominant", True, "'selection.dominant' is True, expected an integer"),
        ("selection/dominant", 4.0, "'selection.dominant' is 4.0, expected an integer"),
        ("selection/contextual", 0, "'selection.contextual' is 0, expected an integer at least 1"),
        (
            "selection/contextual",
            13,
            r"'4\+13', expected dominant\+contextual below the 17",
        ),
        ("selection/merge", "mean", "'selection.merge' is 'mean', expected one of"),
        ("selection/cls_token", 1, "'selection.cls_token' is 1, expected true or false"),
        ("tower/tokens", 16, "'tower.tokens' is 16, expected an integer from 17 to 17"),
        ("tower/grid", [2, 8], r"'tower.grid' is \(2, 8\), expected \[4, 4\]"),
        ("tower/grid", 4, r"'tower.grid' is 4, expected \[4, 4\]"),
        ("tower/cls_token", "yes", "'tower.cls_token' is 'yes', expected true or false"),
        ("tower/image_size", 0, "'tower.image_size' is 0, expected an integer from 1 to 65536"),
        ("tower/patch_size", 17, "'tower.patch_size' is 17, expected an integer from 1 to 16"),
        ("tower/pool", 2, "'tower.pool' is 2, expected an integer from 1 to 1"),
        ("media", [], r"'media' is \(\), expected \['image'\], \['video'\] or"),
        ("media", ["video", "image"], r"'media' is \('video', 'image'\), expected"),
        ("media", "image", "'media' is 'image', expected"),
        ("tiling", [], r"'tiling' is \[\], expected an object"),
        ("tiling", {"order": "newline"}, "'tiling' lacks"),
        ("tiling", {"pinpoints": [], "order": "reference"}, "expected a list of"),
        ("tiling", {"pinpoints": [[16]], "order": "reference"}, r"expected \[height, width\]"),
        ("tiling", {"pinpoints": [[16, 0]], "order": "reference"}, "an integer from 1"),
        (
            "tiling",
            {"pinpoints": [[16, 24]], "order": "reference"},
            r"\[16, 24\], expected multiples of the tower's image_size 16",
        ),
        (
            "tiling",
            {"pinpoints": [[16, 32]], "order": "rows"},
            "'tiling.order' is 'rows', expected one of 'reference', 'newline'",
        ),
        ("llm/video_token_id", -1, "'llm.video_token_id' is -1, expected an integer at least 0"),
        ("token_order", "by score", "'token_order' is 'by score', expected one of"),
        (
            "inputs",
            [],
            r"'inputs' is '', expected image uint8 \[batch, 16, 16, 3\] or pixel",
        ),
        ("inputs", {}, "'inputs' is {}, expected a list"),
        ("inputs/0/dtype", "int8", "'image.dtype' is 'int8', expected one of"),
        (
            "inputs/0/dtype",
            "float32",
            r"'inputs' is 'image float32 \[batch, 16, 16, 3\]', exp",
        ),
        ("inputs/0/shape", ["batch", 3, 16, 16], r"expected image uint8 \[batch, 16, 16, 3\]"),
        ("inputs/0/shape", [1, 16, 16, 3], r"expected image uint8 \[batch, 16, 16, 3\]"),
        ("inputs/0/shape", ["n", 16, 16, 3], r"'image.shape\[0\]' is 'n', expected an integer"),
        ("inputs/0/shape", [1, "batch", 16, 3], r"'image.shape\[1\]' is 'batch', expected"),
        (
            "outputs/0/shape",
            ["batch", 8, 6],
            r"'outputs' is .*, expected image_embeds",
        ),
        (
            "outputs/0/shape",
            ["batch", 7, 5],
            r"'outputs' is .*, expected image_embeds",
        ),
        (
            "outputs/0/dtype",
            "float16",
            r"expected image_embeds float32 \[batch, 7, 6\] and",
        ),
        ("outputs/1/shape", ["batch", 7], r"expected .* and kept_indices int64 \[batch, 4\]"),
        ("batch/max", 0, "'batch.max' is 0, expected an integer from 1 to 65536"),
        ("batch/dynamic", False, r"expected image uint8 \[3, 16, 16, 3\]"),
        ("preprocessing", [], r"'preprocessing' is \[\], expected an object"),
        ("preprocessing/mode", "squeeze", "'preprocessing': .*mode"),
        (
            "preprocessing/image_size",
            32,
            "'preprocessing.image_size' is 32, expected",
        ),
        ("preprocessing/colour", "BGR", "'preprocessing': .*colour"),
        ("llm/hidden_size", 0, "'llm.hidden_size' is 0, expected an integer at least 1"),
        ("llm/hidden_size", 7, r"'outputs' is .*, expected image_embeds float32 \[batch, 7, 7\]"),
        ("llm/image_token_id", None, "'llm.image_token_id' is None, expected an integer"),
        ("precision", "int8", "'precision' is 'int8', expected one of 'fp32', 'fp16'"),
        ("opset", 16, "'opset' is 16, expected an integer from 17 to 18"),
        ("files", [], r"'files' is \[\], expected an object"),
        ("files/..%2Fmodel.onnx", {"sha256": "0" * 64, "bytes": 1}, "'files' is '..%2Fmodel.onnx'"),
        ("files/model.onnx", {"sha256": "0" * 64}, r"'files.model.onnx' lacks \['bytes'\]"),
        ("files/model.onnx/sha256", "A" * 64, "expected 64 lower-case hexadecimal digits"),
        ("files/model.onnx/sha256", "a" * 63, "expected 64 lower-case hexadecimal digits"),
        ("files/model.onnx/sha256", "a" * 64 + "\n", "expected 64 lower-case hexadecimal digits"),
        ("files/model.onnx/bytes", -1, "'files.bytes' is -1, expected an integer at least 1"),
        ("parity", [], r"'parity' is \[\], expected null, or numbers and 'passed'"),
        ("parity", {"cosine": 1.0}, "expected null, or numbers and 'passed'"),
        (
            "parity",
            {"passed": True, "cosine": None},
            "'parity.cosine' is None, expected true",
        ),
        ("versions", [], r"'versions' is \[\], expected a Mapping"),
        ("versions/onnx", 1, "'versions.onnx' is 1, expected a printable text"),
        ("hmac", "00", r"'manifest' has the unknown \['hmac'\], expected exactly"),
    ],
)
def test_refuses_wrong_values(path: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message) as raised:
        Manifest.from_json(changed(path, value))
    assert "\n" not in str(raised.value)


def test_refuses_paths_as_file_names() -> None:
    for name in ("../model.onnx", "/model.onnx", "a/b", "model.onnx\0", "MODEL.ONNX", ".."):
        broken = values()
        broken["files"][name] = {"sha256": "0" * 64, "bytes": 1}
        with pytest.raises(BundleError, match=r"expected one of 'model.onnx', 'model.onnx.data'"):
            Manifest.from_json(broken)


@pytest.mark.parametrize("record", ["model", "selection", "tower", "batch", "llm", None])
def test_refuses_every_missing_key(record: str | None) -> None:
    for key in values()[record] if record else values():
        broken = values()
        del (broken[record] if record else broken)[key]
        with pytest.raises(BundleError, match=r"lacks|not the manifest|'schema_version' is None"):
            Manifest.from_json(broken)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "manifest.json is malformed"),
        (b"{", "manifest.json is malformed"),
        (b"\xff{}", "manifest.json is malformed"),
        (b"[]", "not the manifest of a vzip bundle"),
        (b"null", "not the manifest of a vzip bundle"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b'{"format": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "format": "x", "a": 2}', "the key 'a' stands twice"),
        (b"[" * 100_000, "malformed"),
        (b'{"format": ' + b"9" * 5000 + b"}", "malformed|not the manifest"),
    ],
)
def test_refuses_what_is_no_strict_json(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(data)


def test_every_truncation_is_refused() -> None:
    data = (GOLDEN / "tiny_bundle" / "manifest.json").read_bytes().rstrip()
    for end in range(len(data)):
        with pytest.raises(BundleError):
            Manifest.from_bytes(data[:end])


def test_checks_what_is_made_in_python_too() -> None:
    manifest = Manifest.from_json(values())
    with pytest.raises(BundleError, match=r"'selection' is None, expected a Selection"):
        dataclasses.replace(manifest, selection=None)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"'outputs' is"):
        dataclasses.replace(
            manifest, selection=Selection("visionzip", 5, 3, "average", cls_token=True)
        )
    with pytest.raises(BundleError, match=r"'files.model.onnx' is 'x', expected a FileEntry"):
        dataclasses.replace(manifest, files={"model.onnx": "x"})  # type: ignore[dict-item]
    with pytest.raises(BundleError, match=r"'parity.error' is nan"):
        dataclasses.replace(manifest, parity={"passed": True, "error": math.nan})
    with pytest.raises(BundleError, match=r"'inputs' is"):
        dataclasses.replace(manifest, inputs=list(manifest.inputs))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.opset = 17  # type: ignore[misc]


def test_refuses_cls_of_a_tower_that_has_none() -> None:
    broken = values()
    broken["tower"].update(cls_token=False, tokens=16)
    with pytest.raises(BundleError, match=r"'selection.cls_token' is True, expected false, since"):
        Manifest.from_json(broken)
    broken["selection"]["cls_token"] = False
    assert Manifest.from_json(broken).tower.tokens == 16


def test_a_dropped_cls_is_no_token_to_select() -> None:
    good = values()
    good["selection"].update(cls_token=False, dominant=12, contextual=3)
    good["outputs"][0]["shape"][1] = 15
    good["outputs"][1]["shape"][1] = 12
    assert Manifest.from_json(good).selection.tokens == 15
    good["selection"]["contextual"] = 4
    with pytest.raises(BundleError, match=r"below the 16 tokens that can be selected"):
        Manifest.from_json(good)


def test_fp16_may_give_either_dtype() -> None:
    good = values("tiny_static_bundle")
    assert Manifest.from_json(good).embeds.dtype == "float16"
    good["outputs"][0]["dtype"] = "float32"
    assert Manifest.from_json(good).embeds.dtype == "float32"


def test_parity_survives_the_file() -> None:
    parity = {"passed": True, "cosine_min": 0.99999999, "images": 3, "gate": "fp32"}
    manifest = dataclasses.replace(Manifest.from_json(values()), parity=parity)
    assert Manifest.from_bytes(manifest.to_bytes()).parity == parity
    assert FileEntry(**vars(manifest.files["model.onnx"])) == manifest.files["model.onnx"]
