"""Samples: deterministic, distinct, hashed; what is not used is named and counted."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused, says
from vzip.calibration.samples import LEAST, Samples
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.pictures.preprocess import pixel_values, tower_image


def paint(path: Path, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        paint(tmp_path / "images" / f"sub{number % 2}" / f"{number}.png", number)
    return tmp_path / "images"


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return read_bundle(tiny_bundle).manifest


def names(samples: Samples) -> list[str]:
    return [each.name for each in samples]


def test_the_file_system_s_order_has_no_part_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = names(Samples.open(str(folder), count=None))
    found = sorted(folder.rglob("*"))
    for order in (found, found[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda _, __, order=order: iter(order))
        assert names(Samples.open(str(folder), count=None)) == expected


def test_a_folder_gives_all_its_images_in_a_fixed_order(folder: Path, tmp_path: Path) -> None:
    samples = Samples.open(str(folder), count=None, seed=3)
    assert sorted(names(samples)) == sorted(f"sub{n % 2}/{n}.png" for n in range(8))
    copy = tmp_path / "elsewhere"
    for name in reversed(names(samples)):  # written in another order, at another place
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((folder / name).read_bytes())
    again = Samples.open(str(copy), count=None, seed=3)
    assert names(again) == names(samples)
    assert again.digest == samples.digest
    other = Samples.open(str(folder), count=None, seed=4)
    assert sorted(names(other)) == sorted(names(samples))
    assert names(other) != names(samples)
    assert other.digest != samples.digest


def test_the_digest_is_of_the_bytes(folder: Path) -> None:
    samples = Samples.open(str(folder), count=3)
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names(samples)]
    assert [each.sha256 for each in samples] == digests
    assert samples.digest == hashlib.sha256("".join(digests).encode()).hexdigest()


def test_a_count_takes_the_first_of_the_order(folder: Path) -> None:
    assert (
        names(Samples.open(str(folder), count=5))
        == names(Samples.open(str(folder), count=None))[:5]
    )


def test_a_list_is_relative_to_its_own_folder(folder: Path) -> None:
    listing = folder / "list.txt"
    listing.write_text("# chosen\nsub0/0.png\n\n  sub1/3.png  \nsub0/2.png\n")
    samples = Samples.open(str(listing), count=None)
    assert sorted(names(samples)) == ["sub0/0.png", "sub0/2.png", "sub1/3.png"]


def test_unreadable_and_duplicate_images_are_named_and_counted(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_bytes((folder / "sub0" / "0.png").read_bytes()[:60])
    (folder / "twin.png").write_bytes((folder / "sub0" / "0.png").read_bytes())
    (folder / ".hidden.png").write_bytes(b"not looked at")
    samples = Samples.open(str(folder), count=None)
    assert len(samples) == 8
    left = {each.name: each for each in samples.left_out}
    twins = {"twin.png", "sub0/0.png"} & set(left)
    assert set(left) == {"notes.txt", "broken.png", *twins}
    assert len(twins) == 1
    (twin,) = twins
    (other,) = {"twin.png", "sub0/0.png"} - twins
    assert left[twin].duplicate
    assert left[twin].reason == f"has the same bytes as {other}"
    assert "is not in a format read here" in left["notes.txt"].reason
    assert "can't be decoded as PNG" in left["broken.png"].reason
    assert samples.duplicates == 1
    said = samples.describe_left_out()
    assert said.startswith("left out: 2 that can't be read and 1 duplicate (")
    assert all(name in said for name in left)
    report = samples.to_json()
    assert (report["count"], report["unreadable"], report["duplicates"]) == (8, 2, 1)
    assert {each["name"] for each in report["left_out"]} == set(left)


def test_too_few_readable_images_are_an_error_that_names_them(folder: Path) -> None:
    for number in range(7):
        (folder / f"sub{number % 2}" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with refused(InvalidInputError, got=("1 image of", "8 files"), expected="4") as caught:
        Samples.open(str(folder), count=4)
    says(caught.value, cause=("7 that can't be read", "sub"))
    with refused(InvalidInputError, got=("1 image of", "8 files"), expected=f"{LEAST}"):
        Samples.open(str(folder), count=None)


def test_a_path_in_a_list_that_is_not_there_is_left_out_by_name(folder: Path) -> None:
    listing = folder / "list.txt"
    listing.write_text("sub0/0.png\ngone.png\nsub1/3.png\n")
    samples = Samples.open(str(listing), count=None)
    assert [(each.name, each.reason) for each in samples.left_out] == [("gone.png", "is no file")]


@pytest.mark.parametrize("missing", ["nowhere", "images/sub0/0.png"])
def test_what_is_neither_folder_nor_list_is_refused(
    folder: Path, tmp_path: Path, missing: str
) -> None:
    with refused(InvalidInputError, got=missing, expected="text file"):
        Samples.open(str(tmp_path / missing), count=None)


def test_counts_and_seeds_out_of_range_are_refused(folder: Path) -> None:
    for count in (0, 1, -3, True):
        with refused(InvalidInputError, got=f"count={count}", expected=f"{LEAST}"):
            Samples.open(str(folder), count=count)
    with refused(InvalidInputError, got="seed=-1"):
        Samples.open(str(folder), count=None, seed=-1)
    with refused(InvalidInputError, cure="--count"):
        Samples.open("demo", count=None)


def test_the_demo_s_scenes_follow_from_the_seed(manifest: Manifest) -> None:
    samples = Samples.open("demo", count=4, seed=5)
    assert len({each.sha256 for each in samples}) == 4
    assert Samples.open("demo", count=4, seed=5).digest == samples.digest
    assert Samples.open("demo", count=4, seed=6).digest != samples.digest
    # More scenes begin with the same ones.
    assert names(Samples.open("demo", count=6, seed=5)[:4]) == names(samples)
    assert Samples.open("demo", count=6, seed=5)[:4].digest == samples.digest


def test_split_holds_one_in_five_apart(folder: Path) -> None:
    for count, apart in ((2, 1), (5, 1), (8, 1)):
        calibrate, held = Samples.open(str(folder), count=count).split()
        assert (len(calibrate), len(held)) == (count - apart, apart)
        assert not set(names(calibrate)) & set(names(held))
    calibrate, held = Samples.open("demo", count=20).split()
    assert (len(calibrate), len(held)) == (16, 4)


@pytest.mark.parametrize("kind", ["image", "pixel_values"])
def test_batches_are_the_graph_s_input_and_all_distinct(
    folder: Path, tiny_bundle: Path, tiny_static_bundle: Path, kind: str
) -> None:
    chosen = [read_bundle(each).manifest for each in (tiny_bundle, tiny_static_bundle)]
    manifest = next(each for each in chosen if each.input.name == kind)
    samples = Samples.open(str(folder), count=None)
    batches = list(samples.batches(manifest, 3))
    assert [len(each) for each in batches] == [3, 3, 2]
    every = np.concatenate(batches)
    assert len({each.tobytes() for each in every}) == 8
    prep = manifest.preprocessing
    for name, got in zip(names(samples), every, strict=True):
        expected = tower_image(Image.open(folder / name).convert("RGB"), prep)
        if kind == "pixel_values":
            assert np.array_equal(got, pixel_values(expected[None], prep)[0])
        else:
            assert np.array_equal(got, expected)


def test_a_file_that_changes_meanwhile_is_an_error(folder: Path, manifest: Manifest) -> None:
    samples = Samples.open(str(folder), count=None)
    paint(folder / samples[0].name, 99)
    with refused(InvalidInputError, got=samples[0].name):
        list(samples.batches(manifest, 8))


def test_a_list_has_lines_of_paths(tmp_path):
    source = tmp_path / "list.txt"
    source.write_text("x" * 5000 + ".png\n")
    with refused(
        InvalidInputError, got=("list.txt", "5004 characters"), expected="one path a line"
    ):
        Samples.open(str(source), count=None)
    with source.open("wb") as file:
        file.truncate(2**40)
    with refused(InvalidInputError, got="too large", expected="one path a line"):
        Samples.open(str(source), count=None)


def test_an_image_that_no_tower_can_be_given_is_left_out(folder: Path, manifest: Manifest) -> None:
    thin = Image.new("RGB", (65000, 2))
    thin.save(folder / "thin.png")
    prep = dataclasses.replace(manifest.preprocessing, mode="resize_crop", shortest_edge=336)
    with refused(InvalidInputError, got="65000×2", cure="crop"):
        tower_image(thin, prep)
    samples = Samples.open(str(folder), count=None, prep=prep)
    assert len(samples) == 8
    (left,) = samples.left_out
    assert left.name == "thin.png"
    assert "65000×2" in left.reason
    assert len(Samples.open(str(folder), count=None)) == 9
