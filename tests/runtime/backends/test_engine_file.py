from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import engine_record
from tests.refusals import refused, says
from vzip.runtime.backends.tensorrt.bindings import TITLES
from vzip.runtime.backends.tensorrt.engine_file import (
    Machine,
    read_engine,
    rebuild_command,
    unfit,
    versions_agree,
)
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import add_engine
from vzip.runtime.errors import BundleError

# The first 64 bytes of an engine that TensorRT-RTX 1.7.1.116 made of tests/golden/tiny_bundle.
RTX_HEADER = bytes.fromhex(
    "7674727400000000020000000000000074e12600000000000107017476747274"
    "0400000000000000000000000000000000000000000000008413000000000000"
)
# TensorRT's, of 10.3.0.30.
TRT_HEADER = b"ftrt" + bytes(20) + bytes([10, 3, 0, 30]) + bytes(36)

ORIN = Machine("tensorrt", "10.3.0.30", "Orin", "87")


def with_plan(folder: Path, plan: bytes, **changes: Any) -> Bundle:
    """Put an engine into a bundle, whatever it is."""
    bundle = read_bundle(folder)
    return add_engine(bundle, "e", engine_record(bundle, plan, **changes), plan)


RTX = {"stack": "tensorrt_rtx", "version": "1.7.1.116", "gpu": None, "sm": ("86", "89")}


@pytest.mark.parametrize("version", ["10.3", "10.3.0", "10.3.0.30", "10.3.0.286", "rtx"])
def test_reads_what_was_recorded(tiny_bundle: Path, version: str) -> None:
    """A version may have fewer numbers, and a build more than a byte holds."""
    rtx = version == "rtx"
    plan = (RTX_HEADER if rtx else TRT_HEADER) + bytes(range(256)) * 10
    bundle = with_plan(tiny_bundle, plan, **(RTX if rtx else {"version": version}))
    assert read_engine(bundle, "e") == plan


@pytest.mark.parametrize("header", [TRT_HEADER, RTX_HEADER], ids=["tensorrt", "rtx"])
def test_any_flipped_bit_is_refused(tiny_bundle: Path, header: bytes) -> None:
    plan = header + b"code"
    bundle = with_plan(tiny_bundle, plan, **(RTX if header is RTX_HEADER else {}))
    path = tiny_bundle / "engines" / "e.plan"
    for place in range(len(plan)):
        for bit in range(8):
            spoilt = bytearray(plan)
            spoilt[place] ^= 1 << bit
            path.write_bytes(spoilt)
            found = "SHA-256"
            if place in range(4):
                found = f"begins with {bytes(spoilt[:4])!r}"
            elif place in range(24, 28):
                found = f"made by {TITLES[bundle.manifest.engines['e'].stack]}"
            with refused(BundleError, got=found):
                read_engine(bundle, "e")
    path.write_bytes(plan)
    assert read_engine(bundle, "e") == plan


def test_every_truncation_and_every_addition_is_refused(tiny_bundle: Path) -> None:
    plan = TRT_HEADER + b"code"
    bundle = with_plan(tiny_bundle, plan)
    path = tiny_bundle / "engines" / "e.plan"
    for spoilt in (*(plan[:end] for end in range(len(plan))), plan + b"\0"):
        path.write_bytes(spoilt)
        with refused(BundleError, got=f"'e' has {len(spoilt)} bytes", expected="68"):
            read_engine(bundle, "e")


@pytest.mark.parametrize(
    ("plan", "changes", "got", "expected"),
    [
        (b"\x7fELF" + bytes(60), {}, r"b'\x7fELF'", "b'ftrt' as TensorRT's"),
        (b"ftrt", {}, "b'ftrt'", "b'ftrt' as TensorRT's"),
        (RTX_HEADER, {}, "b'vtrt'", "b'ftrt' as TensorRT's"),
        (TRT_HEADER, RTX, "b'ftrt'", "b'vtrt' as TensorRT-RTX's"),
        (TRT_HEADER, {"version": "10.16.0.12"}, "TensorRT 10.3.0.30", "10.16.0.12"),
    ],
)
def test_a_header_that_contradicts_its_record_is_refused(
    request: pytest.FixtureRequest, plan: bytes, changes: dict[str, Any], got: str, expected: str
) -> None:
    folder: Path = request.getfixturevalue("tiny_bundle")
    bundle = with_plan(folder, plan, **changes)  # digest and size are right
    with refused(BundleError, got=got, expected=expected, cure=f"vzip build {folder}"):
        read_engine(bundle, "e")


def test_an_engine_of_another_machine_names_both_sides_and_the_cure(tiny_bundle: Path) -> None:
    bundle = with_plan(tiny_bundle, TRT_HEADER)
    assert unfit(bundle, "e") is None
    assert unfit(bundle, "e", ORIN) is None
    assert unfit(bundle, "e", dataclasses.replace(ORIN, version="10.3.0")) is None
    here = "TensorRT 10.3.0.30"
    for got, expected, change in (
        (here, "TensorRT 10.16.0.12", {"version": "10.16.0.12"}),
        (here, "TensorRT-RTX 10.3.0.30", {"stack": "tensorrt_rtx"}),
        ("SM 87 (Orin)", "SM 110", {"gpu": "NVIDIA Thor", "sm": "110"}),
    ):
        fault = unfit(bundle, "e", dataclasses.replace(ORIN, **change))
        assert fault is not None
        says(fault, got=("'e'", got), expected=expected, cure=f"vzip build {tiny_bundle}")


def test_an_engine_of_another_graph_names_both_digests(tiny_bundle: Path) -> None:
    manifest = with_plan(tiny_bundle, TRT_HEADER).manifest
    digest = manifest.files["model.onnx"].sha256
    record = dataclasses.replace(manifest.engines["e"], model_sha256="a" * 64)
    fault = unfit(Bundle(tiny_bundle, dataclasses.replace(manifest, engines={"e": record})), "e")
    assert fault is not None
    says(fault, got="aaaaaaaaaaaa…", expected=(digest[:12], "model.onnx"), cure="vzip build")


def test_the_command_for_an_engine_made_ahead_of_time(tiny_bundle: Path) -> None:
    bundle = with_plan(tiny_bundle, RTX_HEADER, **RTX)
    record = bundle.manifest.engines["e"]
    assert rebuild_command(bundle, record) == f"vzip build {tiny_bundle} --rtx sm86,sm89"
    fault = unfit(bundle, "e", Machine("tensorrt_rtx", "1.7.1.116", "RTX 5090", "120"))
    assert fault is not None
    cure = f"vzip build {tiny_bundle} --rtx sm120"
    says(fault, got="SM 86, 89 (ahead of time)", expected=("SM 120", "RTX 5090"), cure=cure)


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ("8.6.2", "8.6.2.3", True),
        ("10.3.0.30", "10.3.0.30", True),
        ("10.3.0.30", "10.3.0.26", False),
        ("10.3", "10.30", False),
        ("8.6.1", "8.6.2", False),
    ],
)
def test_versions_agree_as_far_as_both_go(one: str, other: str, agree: bool) -> None:
    assert versions_agree(one, other) is agree
    assert versions_agree(other, one) is agree


@pytest.mark.parametrize("spoil", [lambda p: p.unlink(), lambda p: (p.unlink(), p.mkdir())])
def test_a_missing_engine_is_one_line(tiny_bundle: Path, spoil: Callable[[Path], Any]) -> None:
    bundle = with_plan(tiny_bundle, TRT_HEADER)
    spoil(tiny_bundle / "engines" / "e.plan")
    with refused(BundleError, got="e.plan"):
        read_engine(bundle, "e")
