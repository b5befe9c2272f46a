from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from tests.places import GOLDEN
from vzip.runtime.bundle.engine_record import EngineBatch, EngineRecord
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.errors import BundleError

RECORD: dict[str, Any] = {
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


def values(**changes: object) -> dict[str, Any]:
    """Return the JSON of a good manifest with one engine, some of whose values are changed."""
    parsed: dict[str, Any] = json.loads(
        (GOLDEN / "tiny_bundle" / "manifest.json").read_text("utf-8")
    )
    parsed["engines"] = {"orin-fp16": {**copy.deepcopy(RECORD), **changes}}
    return parsed


def test_reads_and_writes_the_same_json() -> None:
    manifest = Manifest.from_json(values())
    assert manifest.to_json() == values()
    assert list(manifest.to_json()["engines"]["orin-fp16"]) == list(RECORD)  # the order too
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    record = manifest.engines["orin-fp16"]
    assert record.sm == ("87",)
    assert record.batch == EngineBatch(1, 2, 3)


def test_an_engine_made_ahead_of_time_knows_no_gpu_and_has_no_proof() -> None:
    ahead = values(gpu=None, jetpack=None, proof=None, fused_attention=None, sm=["86", "120"])
    assert Manifest.from_json(ahead).engines["orin-fp16"].sm == ("86", "120")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\0", "é", "a b", "x" * 101])
def test_refuses_names_that_are_no_part_of_a_file_name(name: str) -> None:
    broken = values()
    broken["engines"][name] = RECORD
    with pytest.raises(BundleError, match=r"'engines' is .*, expected names of letters, digits"):
        Manifest.from_json(broken)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sha256", "A" * 64, "'engines.sha256' is .*, expected 64 lower-case"),
        ("bytes", 0, "'engines.bytes' is 0, expected an integer at least 1"),
        ("stack", "onnx", "'engines.stack' is 'onnx', expected one of 'tensorrt', 'tensorrt_rtx'"),
        ("version", "10", "'engines.version' is '10', expected a version such as"),
        ("version", "10.3;", "'engines.version' is '10.3;', expected a version such as"),
        ("version", 10.3, "'engines.version' is 10.3, expected a version such as"),
        ("gpu", "", "'engines.gpu' is '', expected a printable text"),
        ("sm", [], r"'engines.sm' is \(\), expected a list"),
        ("sm", "87", "'engines.sm' is '87', expected a list"),
        ("sm", ["8.7"], "'engines.sm' is '8.7', expected compute capabilities such as '87'"),
        ("sm", [87], "'engines.sm' is 87, expected compute capabilities"),
        ("jetpack", 6.2, "'engines.jetpack' is 6.2, expected a printable text"),
        ("precision", "int4", "'engines.precision' is 'int4', expected one of"),
        ("batch", [1, 2], r"'engines.orin-fp16.batch' is \[1, 2\], expected an object"),
        ("batch", {"min": 1, "max": 1}, r"'engines.orin-fp16.batch' lacks \['opt'\]"),
        ("batch", {"min": 0, "opt": 1, "max": 1}, "'engines.batch.min' is 0, expected"),
        ("batch", {"min": 2, "opt": 1, "max": 3}, "'engines.batch.opt' is 1, expected"),
        ("batch", {"min": 1, "opt": 2, "max": 1}, "'engines.batch.max' is 1, expected"),
        ("model_sha256", None, "'engines.model_sha256' is None, expected 64"),
        ("settings", None, "'engines.settings' is None, expected an object"),
        ("settings", {"a": [1]}, r"'engines.settings.a' is \[1\], expected true, false"),
        ("seconds", -1, "'engines.seconds' is -1, expected a number of at least 0"),
        ("seconds", True, "'engines.seconds' is True, expected a number of at least 0"),
        ("seconds", "1", "'engines.seconds' is '1', expected a number of at least 0"),
        ("fused_attention", -1, "'engines.fused_attention' is -1, expected an integer"),
        ("proof", {}, "'engines.proof.passed' is None, expected true or false"),
        ("proof", {"passed": 1}, "'engines.proof.passed' is 1, expected true or false"),
        ("extra", 1, r"'engines.orin-fp16' has the unknown \['extra'\]"),
    ],
)
def test_refuses_wrong_values(key: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message) as raised:
        Manifest.from_json(values(**{key: value}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", RECORD)
def test_refuses_every_missing_key(key: str) -> None:
    broken = values()
    del broken["engines"]["orin-fp16"][key]
    with pytest.raises(BundleError, match=rf"'engines.orin-fp16' lacks \['{key}'\]"):
        Manifest.from_json(broken)


@pytest.mark.parametrize("engines", [None, [], {"x": None}, {"x": []}])
def test_refuses_what_is_no_table_of_records(engines: object) -> None:
    with pytest.raises(BundleError, match=r"'engines(\.x)?' is .*, expected an object"):
        Manifest.from_json({**values(), "engines": engines})


def test_checks_what_is_made_in_python_too() -> None:
    record = Manifest.from_json(values()).engines["orin-fp16"]
    with pytest.raises(BundleError, match=r"'engines.batch' is None, expected an EngineBatch"):
        dataclasses.replace(record, batch=None)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"'engines.seconds' is nan"):
        dataclasses.replace(record, seconds=math.nan)
    manifest = Manifest.from_json(values())
    with pytest.raises(BundleError, match=r"'engines.x' is 1, expected an EngineRecord"):
        dataclasses.replace(manifest, engines={"x": 1})  # type: ignore[dict-item]
    assert EngineRecord.from_json("x", record.to_json()) == record
