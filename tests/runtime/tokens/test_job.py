"""`vzip encode`: what it finds, writes and says, and what is left when it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import tiled, with_newline
from tests.places import GOLDEN
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.fingerprint import fingerprint
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.cli.main import main
from vzip.runtime.machine import process
from vzip.runtime.tokens import job as encode_job
from vzip.runtime.tokens.cache import origin_of
from vzip.runtime.tokens.file import TokenFile
from vzip.runtime.tokens.job import work_store


def draw(path: Path, seed: int, size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images; the last is in a folder of its own."""
    for seed, name in enumerate(("b.png", "a.png", "c.jpg", "sub/a.png")):
        draw(tmp_path / "images" / name, seed)
    return tmp_path / "images"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images or tiles went through a graph in one go; two batches go at once."""
    sizes: list[int] = []
    encode = VisionEncoder._encode_batches  # what images and tiles have in common

    def counted(self: VisionEncoder, batches: Any, count: int, on_device: bool) -> Any:
        sizes.append(count)
        return encode(self, batches, count, on_device)

    monkeypatch.setattr(VisionEncoder, "_encode_batches", counted)
    return sizes


TINY, STATIC = GOLDEN / "tiny_bundle", GOLDEN / "tiny_static_bundle"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "t.safetensors"


def encode(bundle: Path, *arguments: object) -> int:
    return main(["encode", str(bundle), *map(str, arguments), "--backend", "onnxruntime"])


def stderr(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def contents(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with TokenFile.open(path) as file:
        images = [file.read(name) for name in file.records]
        return {each.name: (each.tokens, each.kept) for each in images}


def fingerprint_of(name: str) -> str:
    return fingerprint(read_bundle(GOLDEN / name).manifest)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when an output is written anew; its last reading does not count."""
    found = {path.name: path.stat() for path in folder.glob("t*")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def assert_encodes(bundle: Path, found: dict[str, Any], folder: Path) -> None:
    """Every image's tokens are those that an encoder gives it alone."""
    with VisionEncoder.open(bundle, "onnxruntime") as encoder:
        for name, (tokens, kept) in found.items():
            expected = encoder.encode([folder / name])
            assert tokens.dtype == np.dtype(encoder.manifest.embeds.dtype)
            rtol, atol = (1e-3, 1e-3) if tokens.dtype == np.float16 else (1e-4, 1e-5)
            np.testing.assert_allclose(tokens, expected.embeds[0], rtol=rtol, atol=atol)
            np.testing.assert_array_equal(kept, expected.kept)  # [1, dominant]


# What is written


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_static_bundle"])
def test_a_folder_becomes_a_file(tmp_path, output, folder, name, capsys):
    bundle = GOLDEN / name
    assert encode(bundle, folder, "-o", output) == 0
    assert capsys.readouterr() == (f"{output}\n", "")
    found = contents(output)
    assert list(found) == ["a.png", "b.png", "c.jpg", "sub/a.png"]
    assert_encodes(bundle, found, folder)
    manifest = read_bundle(bundle).manifest
    with TokenFile.open(output) as file:
        assert file.origin == origin_of(manifest)
        assert file.origin.fingerprint == fingerprint(manifest)
    assert names(tmp_path) == ["images", "t.safetensors"]


def test_batches_are_filled_across_shards(tmp_path, output, folder, encoded, capsys):
    for seed in range(10, 13):
        draw(folder / f"{seed}.png", seed)
    bundle = TINY
    assert encode(bundle, folder, "-o", output, "--shard-size", 2) == 0
    assert sorted(encoded) == [1, 3, 3]
    shards = [f"t-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in shards]
    assert names(tmp_path) == ["images", *shards]
    assert [list(contents(tmp_path / name)) for name in shards] == [
        ["10.png", "11.png"],
        ["12.png", "a.png"],
        ["b.png", "c.jpg"],
        ["sub/a.png"],
    ]
    assert encode(bundle, folder, "-o", tmp_path / "one.safetensors") == 0
    one = contents(tmp_path / "one.safetensors")
    for name in shards:
        for image, (tokens, _) in contents(tmp_path / name).items():
            np.testing.assert_array_equal(tokens, one[image][0])


@pytest.mark.parametrize("threads", [2, 1])
def test_a_batch_is_decoded_while_the_one_before_is_encoded(output, folder, monkeypatch, threads):
    """Unless one thread was asked for; then nothing is done meanwhile."""
    monkeypatch.setattr(process, "_limit", None)
    begun, seen = [threading.Event() for _ in range(2)], []
    encode_batch, lock = encode_job.encode_images, threading.Lock()

    def watched(encoder: VisionEncoder, images: list[bytes], **options: Any) -> Any:
        with lock:
            number = len(seen)
            seen.append(False)
        begun[number].set()
        if number == 0:
            seen[0] = begun[1].wait(10 if threads > 1 else 0.05)
        return encode_batch(encoder, images, **options)

    monkeypatch.setattr(encode_job, "encode_images", watched)
    assert encode(TINY, folder, "-o", output, "--threads", threads) == 0
    assert seen == [threads > 1, False]
    assert_encodes(TINY, contents(output), folder)


def test_files_go_by_their_last_name_in_the_order_given(output, folder, encoded):
    paths = [folder / "sub" / "a.png", folder / "c.jpg", folder / "sub" / "a.png"]
    assert encode(TINY, *paths, "-o", output) == 0
    assert list(contents(output)) == ["a.png", "c.jpg"]
    assert encoded == [2]


def test_one_picture_under_two_names_is_encoded_once(tmp_path, output, folder, encoded):
    shutil.copyfile(folder / "a.png", folder / "a-twin.png")
    assert encode(TINY, folder, "-o", output) == 0
    assert sorted(encoded) == [1, 3]
    tokens = contents(output)["a.png"][0]
    np.testing.assert_array_equal(contents(output)["a-twin.png"][0], tokens)
    assert encode(TINY, folder, "-o", output, "--shard-size", 1) == 0
    for number, name in ((1, "a-twin.png"), (2, "a.png")):
        found = contents(tmp_path / f"t-0000{number}-of-00005.safetensors")[name][0]
        np.testing.assert_allclose(found, tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["reference", "newline"])
def test_tiles_are_those_of_image_embeds(tmp_path, output, tiny_bundle, order):
    bundle = with_newline(tmp_path / "tiled", tiny_bundle, tiled(order))
    images = [draw(tmp_path / f"{side}.png", side, (side, 90)) for side in (20, 60, 200)]
    assert encode(bundle, *images, "-o", output) == 0
    found = contents(output)
    with VisionEncoder.open(bundle, "onnxruntime") as encoder:
        for image in images:
            expected = encoder.image_tokens(image)
            assert len(expected.kept) > 1
            for one, other in zip(found[image.name], expected, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("only_alone", [False, True])
def test_tokens_for_prompts_with_several_images(tmp_path, output, tiny_bundle, only_alone):
    change = tiled("newline", only_alone=only_alone)
    bundle = with_newline(tmp_path / "tiled", tiny_bundle, change)
    image = draw(tmp_path / "a.png", 3, (40, 33))
    prints = set()
    with VisionEncoder.open(bundle, "onnxruntime") as encoder:
        for several in (False, True):
            path = output.with_name(f"{several}.safetensors")
            assert encode(bundle, image, "-o", path, *["--several"] * several) == 0
            expected = encoder.image_tokens(image, several=several)
            for one, other in zip(contents(path)["a.png"], expected, strict=True):
                np.testing.assert_array_equal(one, other)
            with TokenFile.open(path) as file:
                prints.add(file.origin.fingerprint)
    assert len(prints) == 1 + only_alone


@pytest.mark.parametrize("whole", [True, False])
def test_arrays(tmp_path, folder, whole):
    output = tmp_path / "t.npy"
    assert encode(TINY, folder if whole else folder / "a.png", "-o", output) == 0
    found = np.load(output, allow_pickle=False)
    images = sorted(folder.rglob("*.*")) if whole else [folder / "a.png"]
    with VisionEncoder.open(TINY, "onnxruntime") as encoder:
        expected = encoder.encode(images).embeds
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_arrays_of_unequal_lengths_are_refused_and_the_cure_costs_nothing(
    tmp_path, output, tiny_bundle, encoded, capsys
):
    bundle = with_newline(tmp_path / "tiled", tiny_bundle, tiled("reference"))
    images = [draw(tmp_path / f"{side}.png", side, (side, 90)) for side in (20, 90)]
    assert encode(bundle, *images, "-o", tmp_path / "t.npy") == 2
    assert ".safetensors" in stderr(capsys)
    assert not (tmp_path / "t.npy").exists()
    encoded.clear()
    assert encode(bundle, *images, "-o", output) == 0
    assert encoded == []


# What is left out


def test_what_is_no_image_is_named_and_the_others_go_on(tmp_path, output, folder, capsys):
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").write_text("x")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path)
    assert encode(TINY, folder, "-o", output) == 1
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    assert list(contents(output)) == ["a.png", "b.png", "c.jpg", "sub/a.png"]
    lines = err.splitlines()
    assert lines[-1] == "encode: left out 3 of 7 images (1 hidden passed over)"
    starts = [
        "encode: left out 'cut.png': the encoded image can't be decoded as PNG",
        "encode: left out 'link': is a link to a folder",
        "encode: left out 'pipe': ",
        "encode: passed over 1 file that is no image, such as 'notes.txt'",
    ]
    for line, start in zip(sorted(lines[:-1]), starts, strict=True):
        assert line.startswith(start)
    assert_encodes(TINY, contents(output), folder)


def test_other_files_of_a_folder_are_no_fault(tmp_path, folder, capsys):
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "captions.json").write_text("{}")
    (folder / "a.png").rename(folder / "no ending")  # is an image all the same
    for output in (tmp_path / "t.safetensors", tmp_path / "t.npy"):
        assert encode(TINY, folder, "-o", output) == 0
        out, err = capsys.readouterr()
        assert out == f"{output}\n"
        assert "2 files that are no images" in err
    assert list(contents(tmp_path / "t.safetensors")) == [
        "b.png",
        "c.jpg",
        "no ending",
        "sub/a.png",
    ]
    # Given by name it was meant, and so is an image in a format that isn't read.
    (folder / "scan.tiff").write_bytes(b"II*\0")
    assert encode(TINY, folder / "captions.json", "-o", tmp_path / "u.safetensors") == 1
    assert encode(TINY, folder, "-o", tmp_path / "v.safetensors") == 1
    assert "'scan.tiff'" in stderr(capsys)


def test_without_a_single_image_nothing_is_written(tmp_path, output, capsys):
    (tmp_path / "a.png").write_bytes(b"no")
    assert encode(TINY, tmp_path / "a.png", "-o", output) == 1
    assert capsys.readouterr().out == ""
    assert names(tmp_path) == ["a.png"]


def test_shards_keep_their_numbers_when_images_are_left_out(tmp_path, output, folder):
    (folder / "a.png").write_bytes(b"no")
    assert encode(TINY, folder, "-o", output, "--shard-size", 1) == 1
    shards = sorted(tmp_path.glob("t-*"))
    assert [list(contents(path)) for path in shards] == [[], ["b.png"], ["c.jpg"], ["sub/a.png"]]


def test_an_array_is_written_whole_or_not_at_all(tmp_path, folder, encoded, capsys):
    good = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(b"no")
    output = tmp_path / "t.npy"
    assert encode(TINY, folder, "-o", output) == 2
    err = stderr(capsys).splitlines()
    assert err[0].startswith("encode: left out 'a.png': ")
    assert err[-1].startswith("vzip: error: encode: nothing was written")
    assert not output.exists()
    (folder / "a.png").write_bytes(good)
    encoded.clear()
    assert encode(TINY, folder, "-o", output) == 0
    assert encoded == [1]
    assert names(tmp_path) == ["images", "t.npy"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["images", "-o", "t.pt"], "expected a file name that ends with .safetensors or .npy"),
        (["images", "-o", "no/t.npy"], "the folder 'no' does not exist"),
        (["images", "-o", "empty/../images.npy/t.npy"], "does not exist; create"),
        (["images", "-o", "t.npy", "--shard-size", "2"], "can't say which images its rows are"),
        (["images", "-o", "t.safetensors", "--shard-size", "0"], "expected 1 or more images"),
        (["nowhere", "-o", "t.safetensors"], "got 'nowhere', which does not exist"),
        (["empty", "-o", "t.safetensors"], "found no images in empty, expected"),
        (["images/a.png", "images/sub/a.png", "-o", "t.npy"], "both be called 'a.png'"),
        (["images", "images/a.png", "-o", "t.npy", "--backend", "x"], "'x'"),
    ],
)
def test_what_is_refused(folder, arguments, text, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    assert main(["encode", str(TINY), *arguments]) == 2
    err = stderr(capsys)
    assert text in err
    assert err.count("\n") == 1
    assert names(Path()) == ["empty", "images"]


def test_a_bundle_for_videos_takes_no_images(output, tiny_bundle, folder, capsys):
    path = tiny_bundle / "manifest.json"
    text = path.read_text().replace('"image",\n    "video"', '"video"')
    path.write_text(text)
    assert read_bundle(tiny_bundle).manifest.media == ("video",)
    assert encode(tiny_bundle, folder, "-o", output) == 2
    assert "video" in stderr(capsys)


# Going on


def test_a_second_run_encodes_nothing(tmp_path, output, folder, encoded, capsys):
    for options in ([], ["--shard-size", 3]):
        encode(TINY, folder, "-o", output, *options)
        first, before = encoded[:], versions(tmp_path)
        encoded.clear()
        assert encode(TINY, folder, "-o", output, *options) == 0
        assert (sorted(first), encoded) == ([1, 3], [])
        assert versions(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--shard-size", 2]])
def test_only_images_that_changed_are_encoded_again(tmp_path, output, folder, encoded, options):
    encode(TINY, folder, "-o", output, *options)
    encoded.clear()
    draw(folder / "b.png", 99)
    assert encode(TINY, folder, "-o", output, *options) == 0
    assert encoded == [1]
    found: dict[str, Any] = {}
    for path in sorted(tmp_path.glob("t*")):
        found |= contents(path)
    assert_encodes(TINY, found, folder)
    assert len(found) == 4


def test_a_file_that_is_open_elsewhere_stays_what_it_was(tmp_path, output, folder):
    link = tmp_path / "link"
    encode(TINY, folder, "-o", output)
    before = output.read_bytes()
    link.hardlink_to(output)
    draw(folder / "b.png", 99)
    assert encode(TINY, folder, "-o", output) == 0
    assert link.read_bytes() == before != output.read_bytes()


def test_images_come_and_go_in_one_file(tmp_path, folder, encoded):
    output = folder / "t.safetensors"  # in the folder itself: it is no image of it
    assert encode(TINY, folder, "-o", output) == 0
    encoded.clear()
    (folder / "c.jpg").unlink()
    draw(folder / "0.png", 50)
    assert encode(TINY, folder, "-o", output) == 0
    assert encoded == [1]
    assert list(contents(output)) == ["0.png", "a.png", "b.png", "sub/a.png"]


def test_shards_of_another_number_of_images(tmp_path, output, folder, capsys):
    encode(TINY, folder, "-o", output, "--shard-size", 2)
    before = names(tmp_path)
    # As many files, but not with the same images.
    assert encode(TINY, folder, "-o", output, "--shard-size", 3) == 0
    assert names(tmp_path) == before
    assert [list(contents(path)) for path in sorted(tmp_path.glob("t-*"))] == [
        ["a.png", "b.png", "c.jpg"],
        ["sub/a.png"],
    ]
    capsys.readouterr()
    assert encode(TINY, folder, "-o", output, "--shard-size", 1) == 2
    assert "of-00002" in stderr(capsys)
    assert names(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--shard-size", 2]])
def test_what_another_bundle_made_is_refused(tmp_path, output, folder, options, capsys):
    encode(TINY, folder, "-o", output, *options)
    before = {path: path.read_bytes() for path in tmp_path.glob("t*")}
    capsys.readouterr()
    assert encode(STATIC, folder, "-o", output, *options) == 2
    assert fingerprint_of("tiny_bundle")[:12] in stderr(capsys)
    assert {path: path.read_bytes() for path in tmp_path.glob("t*")} == before


def test_a_file_of_somebody_else_is_not_replaced(output, folder, capsys):
    output.write_bytes(b"a model of weeks of training")
    assert encode(TINY, folder, "-o", output) == 2
    assert str(output) in stderr(capsys)
    assert output.read_bytes() == b"a model of weeks of training"


def test_two_at_once_don_t_mix(output, folder, capsys):
    origin = origin_of(read_bundle(TINY).manifest)
    with work_store(output, origin):
        assert encode(TINY, folder, "-o", output) == 2
        assert f"{output}: another process" in stderr(capsys)
    assert encode(TINY, folder, "-o", output) == 0


def test_so_many_images_that_a_header_can_t_name_them(output, folder, monkeypatch, capsys):
    monkeypatch.setattr(encode_job, "LARGEST_HEADER", 1800)
    assert encode(TINY, folder, "-o", output) == 2
    assert "--shard-size" in stderr(capsys)
    assert encode(TINY, folder, "-o", output, "--shard-size", 2) == 0


# Killed


CHILD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
left = [int(sys.argv[1])]
class counting:  # no function: Python 3.10's pathlib would bind it to an object
    def __init__(self, call):
        self.call = call
    def __call__(self, *args, **options):
        if left[0] == 0:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        left[0] -= 1
        return self.call(*args, **options)
for name in ("fsync", "replace", "unlink"):
    setattr(os, name, counting(getattr(os, name)))
from vzip.runtime.cli.main import main
from vzip.runtime.machine import process
sys.exit(main(["encode", *sys.argv[3:], "--backend", "onnxruntime"]))
"""


def child(step: int, kind: str, *arguments: object) -> int:
    """Return how a process ended that got a signal at a step of its writing."""
    command = [sys.executable, "-c", CHILD, str(step), kind, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shard-size", 2]])
def test_sigkill_at_any_step_leaves_whole_files_and_the_next_run_goes_on(
    tmp_path, folder, encoded, options
):
    bundle = STATIC
    (tmp_path / "good").mkdir()
    encode(bundle, folder, "-o", tmp_path / "good" / "t.safetensors", *options)
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    again = []
    for step in range(0, 100, 2):
        place = tmp_path / str(step)
        place.mkdir()
        arguments = (bundle, folder, "-o", place / "t.safetensors", *options)
        ended = child(step, "SIGKILL", *arguments)
        for path in place.glob("t*"):  # whole, whenever it was
            assert path.read_bytes() == good[path.name]
        encoded.clear()
        assert encode(*arguments) == 0
        assert {path.name: path.read_bytes() for path in place.iterdir()} == good
        again.append(sum(encoded))
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert again[0] == 4
    assert again[-1] == 0
    assert again == sorted(again, reverse=True)
    assert len(again) >= 8
    assert len(set(again)) >= 4


def test_an_interrupt_ends_with_its_status_and_loses_nothing(tmp_path, output, folder, encoded):
    arguments = (STATIC, folder, "-o", output)
    assert child(7, "SIGINT", *arguments) == 130
    assert not (output).exists()
    assert encode(*arguments) == 0
    assert 0 < sum(encoded) < 4
    assert names(tmp_path) == ["images", "t.safetensors"]


def test_a_run_that_another_bundle_began_is_refused(output, folder, capsys):
    assert child(7, "SIGKILL", STATIC, folder, "-o", output) < 0
    assert encode(TINY, folder, "-o", output) == 2
    assert fingerprint_of("tiny_static_bundle")[:12] in stderr(capsys)
    assert encode(STATIC, folder, "-o", output) == 0
