"""What `VisionEncoder` checks and does around a backend; the backends are `tests/contract`'s."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from tests.bundles import NEWLINE, Change, as_it_is, patches_alone, pooled, tiled, with_newline
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime import CompressedTokens, VisionEncoder, backends, encoder, open_llm
from vzip.runtime.backends import open_backend
from vzip.runtime.backends.packages import import_onnxruntime
from vzip.runtime.backends.protocol import BackendUnavailableError, NoEngineError
from vzip.runtime.bundle.manifest import Manifest, Tensor
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import update_manifest
from vzip.runtime.cli.main import main
from vzip.runtime.errors import (
    BackendError,
    BundleError,
    InvalidInputError,
    MissingDependencyError,
    VzipError,
)
from vzip.runtime.machine import process
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import tower_image
from vzip.runtime.pictures.tiles import arrange, arrange_rows, cut

Arrays = dict[str, np.ndarray]


class Fake:
    """A backend that gives good outputs for a tiny bundle, or what a test makes of them."""

    engine, device = None, "nothing"

    def __init__(self, bundle: Bundle, spoil: Callable[[Arrays], object] = lambda _: None) -> None:
        self.manifest, self.spoil = bundle.manifest, spoil
        self.fed: list[np.ndarray] = []
        self.closed = 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        (name,) = feeds
        assert name == self.manifest.input.name
        assert feeds[name].flags.c_contiguous, "backends hand the memory on as it is"
        self.fed.append(feeds[name].copy())
        count = len(feeds[name])
        weights = np.zeros((count, 7, 17), np.float32)
        weights[:, range(4), range(4)] = 1
        weights[:, 4, 4:8] = weights[:, 5, 8:12] = weights[:, 6, 12:] = 0.25
        outputs: Arrays = {
            "image_embeds": np.ones((count, 7, 6), self.manifest.embeds.dtype),
            "kept_indices": np.tile(np.arange(4), (count, 1)),
            "token_weights": weights,
        }
        self.spoil(outputs)
        return outputs

    def close(self) -> None:
        self.closed += 1


def opened(
    folder: Path,
    spoil: Callable[[Arrays], object] = lambda _: None,
    *,
    change: Change = as_it_is,
    kind: type[Fake] = Fake,
) -> VisionEncoder:
    """Open a bundle, under another manifest perhaps, with a backend that only seems to run it."""
    bundle = Bundle(folder, change(read_bundle(folder).manifest))
    return VisionEncoder(bundle, "fake", kind(bundle, spoil))


def marked(folder: Path, change: Change = as_it_is) -> VisionEncoder:
    return opened(folder, change=change, kind=Marked)


def fake_of(encoder: VisionEncoder) -> Fake:
    fake = encoder._opened
    assert isinstance(fake, Fake)
    return fake


def set_kept(row: list[int]) -> Callable[[Arrays], object]:
    return lambda outputs: outputs.update(kept_indices=np.array([row]))


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fake], list[dict[str, Any]]]:
    """Let a backend be what is opened for groups; return what it is opened with, which grows."""

    def take(backend: Fake) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def open_second(name: str, *_: object, **options: Any) -> tuple[str, Fake]:
            calls.append({"name": name, **options})
            return name, backend

        monkeypatch.setattr("vzip.runtime.encoder.open_backend", open_second)
        return calls

    return take


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


# Opening


def test_opens_a_folder_a_text_or_a_bundle(tiny_bundle):
    for source in (tiny_bundle, str(tiny_bundle), read_bundle(tiny_bundle)):
        with VisionEncoder.open(source) as encoder:
            assert encoder.backend in {"onnxruntime", "onnxruntime-cuda"}, "which one auto took"
            assert encoder.bundle == read_bundle(tiny_bundle)
            assert encoder.manifest is encoder.bundle.manifest


def test_opening_verifies_the_digests(tiny_bundle):
    read_before = read_bundle(tiny_bundle)
    data = bytearray((tiny_bundle / "model.onnx.data").read_bytes())
    data[5] ^= 1
    (tiny_bundle / "model.onnx.data").write_bytes(data)
    for source in (tiny_bundle, read_before):
        with refused(BundleError, got="model.onnx.data has SHA-256"):
            VisionEncoder.open(source, backend="onnxruntime")


def test_groups_are_not_taken_from_a_bundle_that_was_replaced(tiny_bundle, golden):
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime") as encoder:
        tokens = encoder.run(golden["images"][:1])
        path = tiny_bundle / "model.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with refused(BundleError, got="model.onnx has SHA-256"):
            _ = tokens.groups


def test_parity_numbers_may_change_while_it_is_open(tiny_bundle, golden):
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime") as encoder:
        tokens = encoder.run(golden["images"][:1])
        update_manifest(encoder.bundle, parity={"passed": True})
        assert np.array_equal(tokens.groups, golden["groups"][:1])


def test_refuses_a_backend_that_does_not_exist(tiny_bundle):
    with refused(InvalidInputError, got="'onnx'", expected=("auto", "tensorrt", "pytorch")):
        VisionEncoder.open(tiny_bundle, backend="onnx")


# Choosing a backend


def test_auto_takes_the_first_that_can_be_used_and_hides_no_failure(tiny_bundle, monkeypatch):
    tried: list[str] = []
    outcomes: dict[str, Exception] = {
        "tensorrt": BackendUnavailableError("no GPU"),
        "onnxruntime-cuda": BackendUnavailableError("no GPU"),
        "onnxruntime": MissingDependencyError("no package"),
        "openvino": MissingDependencyError("no package"),
    }

    def load(name: str) -> Callable[..., object]:
        def make(bundle: Bundle, extra: tuple[str, ...]) -> object:
            tried.append(name)
            if name in outcomes:
                raise outcomes[name]
            return name

        return make

    monkeypatch.setattr(backends, "_load", load)
    assert open_backend("auto", read_bundle(tiny_bundle)) == ("pytorch", "pytorch")
    assert tried == ["tensorrt", "onnxruntime-cuda", "onnxruntime", "openvino", "pytorch"]
    outcomes["onnxruntime-cuda"] = BackendError("onnxruntime-cuda is broken")
    with refused(BackendError, got="onnxruntime-cuda"):
        open_backend("auto", read_bundle(tiny_bundle))


@pytest.mark.parametrize(
    ("taken", "kind", "warned"),
    [
        ("onnxruntime", BackendUnavailableError, True),
        ("onnxruntime", MissingDependencyError, True),
        ("pytorch", BackendUnavailableError, True),
        ("onnxruntime-cuda", BackendUnavailableError, False),
        ("onnxruntime", NoEngineError, False),
    ],
)
def test_auto_warns_where_a_cpu_runs_in_tensorrt_s_place(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    taken: str,
    kind: type[VzipError],
    warned: bool,
) -> None:
    def load(name: str) -> Callable[..., object]:
        def make(bundle: Bundle, extra: tuple[str, ...]) -> object:
            if name == taken:
                return SimpleNamespace(device="cpu")
            raise kind(f"{name} is not to be had")

        return make

    monkeypatch.setattr(backends, "_load", load)
    with caplog.at_level("WARNING"):
        open_backend("auto", read_bundle(tiny_bundle))
    said = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(said) == warned
    for part in ("tensorrt is not to be had", taken) if warned else ():
        assert part in said[0]


def intra_op_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of threads of every session that is made from now on."""
    onnxruntime, numbers = import_onnxruntime("a test", "cpu"), []
    made = onnxruntime.InferenceSession

    def make(model: bytes, options: Any, **more: Any) -> Any:
        numbers.append(options.intra_op_num_threads)
        return made(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    return numbers


def test_a_session_has_as_many_threads_as_were_asked_for(tiny_bundle, golden, monkeypatch):
    numbers = intra_op_threads(monkeypatch)
    monkeypatch.setattr(process, "physical_cores", lambda *_: 5)
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime", threads=2) as opened:
        assert opened.threads == 2
        _ = opened.run(golden["images"][:1]).groups
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime") as opened:
        assert opened.threads == 5
    process.limit_threads(3)
    try:
        VisionEncoder.open(tiny_bundle, backend="onnxruntime").close()
    finally:
        process.limit_threads(None)
    assert numbers == [2, 2, 5, 3]
    with refused(InvalidInputError, got="threads=0", expected="1 to"):
        VisionEncoder.open(tiny_bundle, threads=0)
    with refused(InvalidInputError, got=("threads=2", "'vllm'")):
        open_llm(tiny_bundle, "vllm:http://127.0.0.1:9", threads=2)


def test_the_threads_of_a_session_rest_between_calls(tiny_bundle, golden):
    """Those that spin use some 30 ms of another library's cores (benchmarks.beside_torch)."""
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime", threads=4) as opened:
        opened.run(golden["images"][:2])
        used = []
        for _ in range(5):
            opened.run(golden["images"][:2])
            start = time.process_time()
            time.sleep(0.05)
            used.append(1000 * (time.process_time() - start))
    assert min(used) < 3


def test_weights_that_are_cut_behind_an_encoder_stay_whole(tiny_bundle, golden):
    """In a process of its own: where the file is mapped, SIGBUS ends it."""
    code = (
        "import os, sys; import numpy as np; from vzip.runtime import VisionEncoder;"
        "encoder = VisionEncoder.open(sys.argv[1], backend='onnxruntime');"
        "os.truncate(sys.argv[1] + '/model.onnx.data', 0);"
        "print(encoder.run(np.load(sys.argv[2])['images'][:2]).kept.tolist())"
    )
    images = GOLDEN / "tiny_golden.npz"
    command = [sys.executable, "-c", code, str(tiny_bundle), str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{golden['kept'][:2].tolist()}\n"), done.stderr


@pytest.mark.parametrize("command", ["encode", "show"])
def test_a_command_s_threads_are_its_sessions(tiny_bundle, tmp_path, monkeypatch, command):
    numbers = intra_op_threads(monkeypatch)
    picture = tmp_path / "a.png"
    Image.new("RGB", (20, 20)).save(picture)
    output = tmp_path / {"encode": "a.npy", "show": "o.png"}[command]
    given = [command, str(tiny_bundle), str(picture), "-o", str(output), "--threads"]
    assert main([*given, "2"]) == 0
    assert set(numbers) == {2}
    assert process.thread_limit() is None
    assert main([*given, "0"]) == 2


def test_without_any_package_the_error_names_every_reason(tiny_bundle, monkeypatch):
    for package in ("onnxruntime", "openvino", "torch", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    extras = ("vzip[gpu]", "vzip[cpu]", "vzip[openvino]", "vzip[export]")
    reasons = ("onnxruntime-cuda: ", "pytorch: ", *extras)
    with refused(BackendError, expected=tuple(backends.BACKENDS), cause=reasons):
        VisionEncoder.open(tiny_bundle)
    for name, extra in (("onnxruntime", "vzip[cpu]"), ("pytorch", "vzip[export]")):
        with refused(MissingDependencyError, got=name, cure=extra):
            VisionEncoder.open(tiny_bundle, backend=name)


def fake_onnxruntime(monkeypatch: pytest.MonkeyPatch, built: list[str], active: list[str]) -> None:
    """Install an onnxruntime built for some providers whose sessions end up on others."""
    monkeypatch.setitem(
        sys.modules,
        "onnxruntime",
        SimpleNamespace(  # type: ignore[arg-type]
            __version__="0",
            get_available_providers=lambda: built,
            GraphOptimizationLevel=SimpleNamespace(ORT_ENABLE_ALL=99),
            SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda *_: None),
            InferenceSession=lambda *_, **__: SimpleNamespace(
                get_providers=lambda: active, disable_fallback=lambda: None
            ),
        ),
    )


def test_asking_for_cuda_never_gives_the_cpu(tiny_bundle, monkeypatch):
    cpu, both = ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]
    fake_onnxruntime(monkeypatch, cpu, cpu)
    with refused(BackendUnavailableError, expected="CUDAExecutionProvider", cure="vzip[gpu]"):
        VisionEncoder.open(tiny_bundle, backend="onnxruntime-cuda")
    fake_onnxruntime(monkeypatch, both, cpu)
    with refused(BackendUnavailableError, got="CPUExecutionProvider", expected="CUDA"):
        VisionEncoder.open(tiny_bundle, backend="onnxruntime-cuda")


def test_onnxruntime_is_imported_without_its_telemetry(monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    import_onnxruntime("a test", "cpu")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")  # who set it, meant it
    import_onnxruntime("a test", "cpu")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


# What goes in


def test_takes_every_kind_of_image_alone_or_in_a_list(tiny_bundle, tmp_path, golden):
    array = golden["images"][0]
    file = tmp_path / "image.png"
    file.write_bytes(png(array))
    with opened(tiny_bundle) as encoder:
        sources: list[Any] = [array, Image.fromarray(array), png(array), file, str(file)]
        for source in (*sources, [array], (array,)):
            assert encoder.encode(source).embeds.shape == (1, 7, 6)
        assert encoder.encode(sources).embeds.shape == (5, 7, 6)
        for fed in fake_of(encoder).fed:
            assert fed.dtype == np.uint8
            assert all(np.array_equal(each, array) for each in fed)


def test_opencvs_arrays_are_blue_first_at_every_door(tiny_bundle, tmp_path, golden):
    """`channels="bgr"` gives what the same picture gives in RGB; without it, another one."""
    images = [each.copy() for each in golden["images"][:2]]
    blue_first = [np.ascontiguousarray(each[..., ::-1]) for each in images]
    tiling = with_newline(tmp_path / "tiled", tiny_bundle, tiled("newline"))
    with (
        VisionEncoder.open(tiny_bundle, "onnxruntime") as encoder,
        VisionEncoder.open(tiling, "onnxruntime") as with_tiles,
    ):
        doors: list[tuple[Callable[..., Any], Any, Any]] = [
            (lambda *a, **k: encoder.encode(*a, **k).embeds, images[0], blue_first[0]),
            (lambda *a, **k: encoder.encode(*a, **k).embeds, images, blue_first),
            (lambda *a, **k: encoder.image_tokens(*a, **k).embeds, images[0], blue_first[0]),
            (encoder.image_embeds, images[0], blue_first[0]),
            (encoder.video_embeds, images, blue_first),
            (with_tiles.image_embeds, images[0], blue_first[0]),
        ]
        for door, red, blue in doors:
            expected = door(red)
            assert np.array_equal(door(red, channels="rgb"), expected)
            assert np.array_equal(door(blue, channels="bgr"), expected)
            assert not np.array_equal(door(blue), expected)
            with refused(InvalidInputError, got="'BGR'", expected="'bgr'"):
                door(blue, channels="BGR")
        for no_array in (png(images[0]), Image.fromarray(images[0])):
            with refused(InvalidInputError, got="channels='bgr'", expected="array"):
                encoder.encode([blue_first[0], no_array], channels="bgr")


def test_feeds_pixel_values_where_the_graph_takes_them(tiny_static_bundle, golden):
    with opened(tiny_static_bundle) as encoder:
        encoder.encode(list(golden["images"][:2]))
        (fed,) = fake_of(encoder).fed
        assert fed.dtype == np.float32
        assert np.abs(fed - golden["pixel_values"][:2]).max() < 1e-6


def test_splits_into_chunks_and_fills_a_static_batch_with_copies(
    tiny_bundle, tiny_static_bundle, golden
):
    images = list(golden["images"])
    with opened(tiny_bundle) as encoder:
        assert encoder.encode(images).kept.shape == (5, 4)
        assert [len(fed) for fed in fake_of(encoder).fed] == [3, 2]
        assert np.array_equal(np.concatenate(fake_of(encoder).fed), golden["images"])
    with opened(tiny_static_bundle) as encoder:
        assert encoder.encode(images).kept.shape == (5, 4)
        fed = fake_of(encoder).fed
        assert [len(each) for each in fed] == [2, 2, 2]
        assert np.array_equal(fed[2][1], fed[2][0])


@pytest.mark.parametrize("threads", [None, 1])
def test_pictures_are_decoded_while_the_batch_before_runs(
    tiny_bundle, golden, monkeypatch, threads
):
    """Unless one thread was asked for, which then does one thing after the other."""
    monkeypatch.setattr(process, "cores", lambda: 4)
    monkeypatch.setattr(process, "_limit", threads)
    decoded = [threading.Event() for _ in range(6)]
    seen: list[tuple[bool, bool]] = []

    def load(source: int, **_: Any) -> Any:
        image = Image.fromarray(golden["images"][source % 5])
        decoded[source].set()
        return image

    monkeypatch.setattr(encoder, "load_image", load)
    monkeypatch.setattr(encoder, "check_source", lambda _source, *, channels: None)
    with opened(tiny_bundle) as vision:
        fake, run = fake_of(vision), fake_of(vision).run

        def watched(feeds: Any) -> Any:
            if not seen:  # the first of two batches of three
                seen.append((decoded[3].wait(10 if threads is None else 0.05), decoded[5].is_set()))
            return run(feeds)

        monkeypatch.setattr(fake, "run", watched)
        tokens = vision.encode(cast("Any", list(range(6))))
        assert tokens.kept.shape == (6, 4)
        order = [golden["images"][number % 5] for number in range(6)]
        assert np.array_equal(np.concatenate(fake.fed), order)
        assert seen[0][0] is (threads is None)


@pytest.mark.parametrize("place", [0, 4, 11])
def test_one_broken_picture_of_many_is_named_as_it_is_alone(tiny_bundle, tmp_path, golden, place):
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        file.write_bytes(png(golden["images"][number % 5]))
    for broken in files[place:]:  # the first of several counts
        broken.write_bytes(png(golden["images"][0])[:-40])
    with opened(tiny_bundle) as encoder:
        with pytest.raises(InvalidInputError) as alone:
            encoder.encode(files[place])
        with pytest.raises(InvalidInputError) as among:
            encoder.encode(files)
        assert str(files[place]) in str(among.value)
        assert str(among.value) == str(alone.value)
        assert encoder.encode(files[:1] if place else list(golden["images"])).kept.shape[1] == 4


def test_a_draft_is_taken_where_it_is_asked_for(tiny_bundle, tmp_path):
    rng, file = np.random.default_rng(3), tmp_path / "large.jpg"
    Image.fromarray(rng.integers(0, 256, (256, 320, 3), np.uint8)).save(file, quality=95)
    with opened(tiny_bundle) as encoder:
        prep = encoder.manifest.preprocessing
        for draft in (None, 2 * prep.shortest_edge):
            encoder.encode([file, file], draft=draft)
            expected = tower_image(load_image(file, draft=draft), prep)
            assert all(np.array_equal(each, expected) for each in fake_of(encoder).fed[-1])
        exact, drafted = fake_of(encoder).fed
        assert not np.array_equal(exact, drafted)
        for wrong in (0, -1, 1.5, True):
            with refused(InvalidInputError, got=f"draft = {wrong}"):
                encoder.encode(file, draft=cast("Any", wrong))


def test_pil_images_of_one_open_file_do_not_disturb_each_other(tiny_bundle, tmp_path, golden):
    """Nor does one image that stands in the list several times."""
    array = np.random.default_rng(5).integers(0, 256, (400, 400, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(png(array))
    with opened(tiny_bundle) as encoder, (tmp_path / "a.png").open("rb") as file:
        encoder.encode(Image.fromarray(array))
        (expected,) = fake_of(encoder).fed[0]
        for _ in range(5):
            images = [Image.open(file) for _ in range(6)]
            encoder.encode([*images, images[0], images[0]])
        assert all(np.array_equal(each, expected) for fed in fake_of(encoder).fed for each in fed)


def test_refuses_what_is_no_image_before_anything_runs(tiny_bundle, golden):
    good = golden["images"][0]
    absent = "no/such/file.png"
    bad: list[Any] = [b"GIF8 but no more", good.astype(np.float32), None, absent, (n for n in "ab")]
    with opened(tiny_bundle) as encoder:
        for nothing in ([], ()):
            with refused(InvalidInputError, got="empty"):
                encoder.encode(nothing)
        for source in bad:
            with refused(InvalidInputError):
                encoder.encode([good, good, good, source])
            if source is not None:
                with refused(InvalidInputError):
                    encoder.encode(source)
        assert not fake_of(encoder).fed


@pytest.mark.parametrize(
    ("array", "got", "expected"),
    [
        (np.zeros((1, 16, 16, 3)), "float64 [1, 16, 16, 3]", "image uint8 [batch"),
        (np.zeros((1, 16, 16, 3), ">i8"), ">i8 [1, 16, 16, 3]", "image uint8"),
        (np.zeros((1, 3, 16, 16), np.uint8), "[1, 3, 16, 16]", "[batch, 16, 16, 3]"),
        (np.zeros((16, 16, 3), np.uint8), "uint8 [16, 16, 3]", "image uint8"),
        (np.zeros((), np.uint8), "uint8 []", "image uint8"),
        (np.zeros((0, 16, 16, 3), np.uint8), "batch of 0", "1 to 3"),
        (np.zeros((4, 16, 16, 3), np.uint8), "batch of 4", "1 to 3"),
        ([[0]], "list", "image uint8"),
        (None, "NoneType", "image uint8"),
    ],
)
def test_run_refuses_what_is_not_the_graphs_input(tiny_bundle, array, got, expected):
    with opened(tiny_bundle) as encoder:
        with refused(InvalidInputError, got=got, expected=expected):
            encoder.run(array)
        assert not fake_of(encoder).fed


def test_run_refuses_other_batches_of_a_static_graph(tiny_static_bundle):
    with opened(tiny_static_bundle) as encoder:
        for count in (0, 1, 3):
            with refused(InvalidInputError, got=f"batch of {count}", expected="exactly 2"):
                encoder.run(np.zeros((count, 3, 16, 16), np.float32))
        with refused(InvalidInputError, cure="vzip.runtime.pictures.preprocess.pixel_values"):
            encoder.run(np.zeros((2, 3, 16, 16), np.float16))
        with refused(InvalidInputError, cause="[B, 3, H, W]"):
            encoder.run(np.zeros((2, 16, 16, 3), np.float32))
        assert encoder.run(np.zeros((2, 3, 16, 16), np.float32)).kept.shape == (2, 4)


def test_run_hands_on_contiguous_memory(tiny_bundle, golden):
    with opened(tiny_bundle) as encoder:
        encoder.run(np.asfortranarray(golden["images"][:2]))
        assert np.array_equal(fake_of(encoder).fed[0], golden["images"][:2])


# What comes out


@pytest.mark.parametrize(
    ("spoil", "got", "expected"),
    [
        (lambda o: o.pop("image_embeds"), "nothing for image_embeds", "float32 [1, 7, 6]"),
        (
            lambda o: o.update(image_embeds=o["image_embeds"].astype(np.float64)),
            "float64 [1, 7, 6] for image_embeds",
            "float32 [1, 7, 6]",
        ),
        (
            lambda o: o.update(image_embeds=o["image_embeds"][:, :6]),
            "float32 [1, 6, 6] for image_embeds",
            "float32 [1, 7, 6]",
        ),
        (
            lambda o: o.update(kept_indices=o["kept_indices"].astype(np.int32)),
            "int32 [1, 4] for kept_indices",
            "int64 [1, 4]",
        ),
        (lambda o: o["image_embeds"].__setitem__((0, 2, 3), np.nan), "1 number", "finite"),
        (lambda o: o["image_embeds"].__setitem__((0, 2), -np.inf), "6 numbers", "finite"),
        (set_kept([0, 2, 1, 3]), "[0, 2, 1, 3]", "4 ascending tokens"),
        (set_kept([0, 2, 2, 3]), "[0, 2, 2, 3]", "CLS (0)"),
        (set_kept([0, 1, 2, 17]), "[0, 1, 2, 17]", "0 … 16"),
        (set_kept([-1, 0, 1, 2]), "[-1, 0, 1, 2]", "0 … 16"),
        (set_kept([1, 2, 3, 4]), "[1, 2, 3, 4]", "CLS (0)"),
    ],
)
def test_refuses_outputs_that_the_manifest_does_not_promise(
    tiny_bundle, golden, spoil, got, expected
):
    with opened(tiny_bundle, spoil) as encoder:
        with refused(BackendError, got=("fake", got), expected=expected):
            encoder.run(golden["images"][:1])
        fake_of(encoder).spoil = lambda _: None
        assert encoder.run(golden["images"][:1]).kept.tolist() == [[0, 1, 2, 3]]


def test_a_cls_token_that_is_dropped_is_neither_kept_nor_merged(tiny_bundle, golden, again):
    def without_cls(manifest: Manifest) -> Manifest:
        selection = dataclasses.replace(manifest.selection, cls_token=False)
        return dataclasses.replace(manifest, selection=selection)

    def good(outputs: Arrays) -> None:
        outputs["kept_indices"] = np.array([[1, 2, 3, 4]])
        outputs["token_weights"][:, 4, 4] = 0

    with opened(tiny_bundle, good, change=without_cls) as encoder:
        again(fake_of(encoder))
        tokens = encoder.run(golden["images"][:1])
        assert tokens.groups.tolist() == [[-1] * 5 + [0] * 3 + [1] * 4 + [2] * 5]
        fake_of(encoder).spoil = set_kept([0, 1, 2, 3])
        with refused(BackendError, expected="1 … 16"):
            encoder.run(golden["images"][:1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda o: o["token_weights"].__setitem__((0, 5, 5), 0.5), ("token_weights", "13")),
        (lambda o: o["token_weights"].__setitem__((0, 4, 5), 0), ("[12]", "13")),
        (set_kept([0, 1, 2, 16]), ("other tokens", "same")),
    ],
)
def test_refuses_groups_that_make_no_sense(tiny_bundle, golden, again, spoil, said):
    with opened(tiny_bundle) as encoder:
        again(Fake(encoder.bundle, spoil))
        tokens = encoder.run(golden["images"][:1])
        with refused(BackendError, got=said[0], expected=said[1]):
            _ = tokens.groups


def test_groups_cost_nothing_until_they_are_asked_for(tiny_bundle, golden, again):
    encoder = opened(tiny_bundle)
    second = Fake(encoder.bundle)
    calls = again(second)
    tokens = encoder.encode(list(golden["images"]))
    assert not calls
    assert tokens.groups.shape == (5, 17)
    assert tokens.groups is tokens.groups
    assert encoder.encode(golden["images"][0]).groups.shape == (1, 17)
    assert calls == [{"name": "fake", "extra_outputs": ("token_weights",), "engine": None}]
    assert [len(fed) for fed in second.fed] == [3, 2, 1]
    fake = fake_of(encoder)
    encoder.close()
    encoder.close()
    assert (fake.closed, second.closed) == (1, 1)


class Placed(Fake):
    """A backend that says where its tokens belong."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        outputs = super().run(feeds)
        count = len(outputs["kept_indices"])
        outputs["token_positions"] = np.tile([0, 0, 1, 2, 3, 7, 15], (count, 1))
        self.spoil(outputs)
        return outputs


def with_positions(manifest: Manifest) -> Manifest:
    positions = Tensor("token_positions", "int64", (manifest.kept.shape[0], 7))
    return dataclasses.replace(manifest, outputs=(*manifest.outputs, positions))


def test_positions_are_the_patches_that_tokens_stand_for(tiny_bundle, golden) -> None:
    assert opened(tiny_bundle).encode(golden["images"][0]).positions is None  # schema 1
    encoder = opened(tiny_bundle, change=with_positions, kind=Placed)
    positions = encoder.encode(list(golden["images"])).positions
    assert positions is not None
    assert positions.dtype == np.int64
    assert positions.tolist() == [[0, 0, 1, 2, 3, 7, 15]] * 5


@pytest.mark.parametrize(
    ("column", "value"),
    [(6, 16), (5, -1), (1, 1), (0, 1)],
    ids=["beyond the grid", "below it", "another patch's", "not CLS"],
)
def test_positions_that_no_patch_has_are_refused(tiny_bundle, golden, column, value) -> None:
    def spoil(outputs: Arrays) -> None:
        if "token_positions" in outputs:
            outputs["token_positions"][:, column] = value

    encoder = opened(tiny_bundle, spoil, change=with_positions, kind=Placed)
    with refused(BackendError, got="token_positions", expected="patches 0 … 15"):
        encoder.encode(golden["images"][0])


class Ranked(Fake):
    """A backend that keeps the patches of 5 places, without CLS, and says in which order."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        count = len(super().run(feeds)["kept_indices"])
        outputs: Arrays = {
            "image_embeds": np.zeros((count, 7, 6), np.float32),
            "kept_indices": np.tile(np.arange(1, 8), (count, 1)),
            "token_positions": np.tile(np.arange(7), (count, 1)),
            "rank": np.tile([6, 0, 1, 2, 5, 4, 3], (count, 1)),
        }
        self.spoil(outputs)
        return outputs


def with_ranks(manifest: Manifest) -> Manifest:
    extent = manifest.kept.shape[0]
    rows = [
        Tensor(name, "int64", (extent, 7)) for name in ("kept_indices", "token_positions", "rank")
    ]
    selection = dataclasses.replace(
        manifest.selection, dominant=7, contextual=0, cls_token=False, ranked=True
    )
    return dataclasses.replace(manifest, selection=selection, outputs=(manifest.embeds, *rows))


@pytest.mark.parametrize(("column", "value"), [(0, 7), (1, -1), (2, 6)])
def test_ranks_that_are_no_steps_are_refused(tiny_bundle, golden, column, value) -> None:
    encoder = opened(tiny_bundle, change=with_ranks, kind=Ranked)
    tokens = encoder.encode(golden["images"][0])
    assert tokens.embeds.shape == (1, 7, 6)

    def spoil(outputs: Arrays) -> None:
        if "rank" in outputs:
            outputs["rank"][:, column] = value

    encoder = opened(tiny_bundle, spoil, change=with_ranks, kind=Ranked)
    with refused(BackendError, got="gave rank", expected="each of 0 … 6 once"):
        encoder.encode(golden["images"][0])


def test_nothing_is_merged_where_no_token_is_contextual(tiny_bundle, golden, monkeypatch) -> None:
    weights = np.zeros((1, 7, 17), np.float32)
    weights[0, np.arange(7), np.arange(1, 8)] = 1

    def spoil(outputs: Arrays) -> None:
        outputs["token_weights"] = weights

    encoder = opened(tiny_bundle, spoil, change=with_ranks, kind=Ranked)
    again = fake_of(encoder)
    monkeypatch.setattr("vzip.runtime.encoder.open_backend", lambda *_args, **_named: ("x", again))
    assert encoder.encode(golden["images"][0]).groups.tolist() == [[-1] * 17]


def test_tokens_have_a_short_description():
    tokens = CompressedTokens(
        np.zeros((1, 2, 3), np.float32), np.zeros((1, 1), np.int64), lambda: np.zeros((1, 4))
    )
    assert repr(tokens) == "CompressedTokens(embeds float32 [1, 2, 3])"


# Towers without CLS, and pooled ones


class Marked(Fake):
    """A backend whose tokens say which image they are of, and which of its tokens.

    Row k of an image whose first number is m is (m, k, …), and what it keeps depends on m.
    """

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        super().run(feeds)
        (images,) = feeds.values()
        selection, tower = self.manifest.selection, self.manifest.tower
        marks = images.reshape(len(images), -1)[:, 0].astype(np.float64)
        embeds = np.zeros((len(images), selection.tokens, 6), self.manifest.embeds.dtype)
        embeds[..., 0] = marks[:, None]
        embeds[..., 1] = np.arange(selection.tokens)
        kept = np.zeros((len(images), selection.dominant), np.int64)
        patches = selection.dominant - selection.cls_token
        for row, mark in zip(kept, marks, strict=True):
            chosen = (int(abs(mark) * 7) + 3 * np.arange(patches)) % math.prod(tower.grid)
            row[int(selection.cls_token) :] = np.sort(chosen) + tower.cls_token
        weights = np.zeros((len(images), selection.tokens, tower.tokens), np.float32)
        weights[:, selection.dominant] = 0.5  # every token that isn't kept goes into the first
        for weight, row in zip(weights, kept, strict=True):
            weight[selection.dominant, row] = 0
            weight[range(selection.dominant), row] = 1
        outputs = {"image_embeds": embeds, "kept_indices": kept, "token_weights": weights}
        self.spoil(outputs)
        return outputs


@pytest.mark.parametrize(("change", "tokens"), [(patches_alone, 16), (pooled, 4)])
def test_patches_are_counted_from_0_where_there_is_no_cls_token(
    tiny_bundle, golden, again, change, tokens
):
    with marked(tiny_bundle, change) as encoder:
        again(fake_of(encoder))
        result = encoder.encode(list(golden["images"]))
        assert result.groups.shape == (5, tokens)
        for kept, groups in zip(result.kept, result.groups, strict=True):
            assert [j for j in range(tokens) if groups[j] == -1] == kept.tolist()
            assert set(groups.tolist()) == {-1, 0}
        first = result.kept.shape[1]
        for bad in ([*range(first - 1), tokens], [-1, *range(first - 1)], [0] * first):
            fake_of(encoder).spoil = set_kept(bad)
            with refused(BackendError, expected=f"0 … {tokens - 1}"):
                encoder.encode(golden["images"][0])


def test_a_token_without_a_group_is_noticed_where_there_is_no_cls_token(tiny_bundle, golden, again):
    with marked(tiny_bundle, pooled) as encoder:
        again(fake_of(encoder))
        fake_of(encoder).spoil = lambda outputs: outputs["token_weights"][:, 2, :].fill(0)
        tokens = encoder.encode(golden["images"][0])
        with refused(BackendError, got="token_weights", expected="each of the 2 "):
            _ = tokens.groups


# All that the language model gets


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def test_an_image_without_tiles_is_what_encode_gives(tiny_bundle, golden):
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime") as encoder:
        embeds, kept = encoder.image_tokens(golden["images"][1])
        assert embeds.shape == (7, 6)
        assert np.array_equal(kept, golden["kept"][1:2])
        assert np.abs(embeds - golden["embeds"][1]).max() < 1e-5 * np.abs(golden["embeds"]).max()


@pytest.mark.parametrize("order", ["reference", "newline"])
@pytest.mark.parametrize("size", [(40, 33), (90, 20), (20, 90), (5, 8)])
def test_an_image_with_tiles_is_the_base_tile_and_the_others_in_order(
    tmp_path, tiny_bundle, size, order
):
    image = picture(*size)
    bundle = with_newline(tmp_path / "tiled", tiny_bundle, tiled(order))
    with VisionEncoder.open(bundle, backend="onnxruntime") as encoder:
        manifest = encoder.manifest
        assert manifest.tiling is not None
        tiles = cut(Image.fromarray(image), manifest.preprocessing, manifest.tiling)
        alone = [encoder.run(tile[None]) for tile in tiles.images]
        embeds = np.concatenate([tokens.embeds for tokens in alone])
        kept = np.concatenate([tokens.kept for tokens in alone])
        others = (
            arrange(embeds[1:], kept[1:], tiles.grid, patches=(4, 4))
            if order == "reference"
            else arrange_rows(embeds[1:], kept[1:], tiles.grid, NEWLINE, size[::-1], patches=(4, 4))
        )
        result, chosen = encoder.image_tokens(image)
        assert np.array_equal(encoder.image_embeds(image), result)
    assert np.array_equal(chosen, kept)
    assert result.dtype == np.float32
    assert order == "newline" or len(result) == 7 * len(tiles.images)
    assert result.shape == (7 + len(others), 6)
    assert np.abs(result - np.concatenate([embeds[0], others])).max() < 1e-5


@pytest.mark.parametrize("order", ["reference", "newline"])
def test_one_of_several_images_is_not_cut_where_the_model_cuts_one_alone(
    tmp_path, tiny_bundle, order
):
    image = picture(40, 33)
    folders = {
        only_alone: with_newline(
            tmp_path / str(only_alone), tiny_bundle, tiled(order, only_alone=only_alone)
        )
        for only_alone in (False, True)
    }
    with VisionEncoder.open(folders[False], "onnxruntime") as encoder:
        alone = encoder.image_tokens(image)
        assert np.array_equal(encoder.image_embeds(image, several=True), alone.embeds)
    with VisionEncoder.open(folders[True], "onnxruntime") as encoder:
        assert np.array_equal(encoder.image_embeds(image), alone.embeds)
        embeds, kept = encoder.image_tokens(image, several=True)
        preprocessing = dataclasses.replace(encoder.manifest.preprocessing, mode="pad_square")
        base = encoder.run(tower_image(Image.fromarray(image), preprocessing)[None])
    ends = [NEWLINE[None]] if order == "newline" else []
    assert np.array_equal(embeds, np.concatenate([base.embeds[0], *ends]))
    assert np.array_equal(kept, base.kept)


def test_frames_that_the_model_would_pool_are_said_not_to_be(tmp_path, tiny_bundle, caplog):
    for only_alone in (False, True):
        change = tiled("reference", only_alone=only_alone)
        folder = with_newline(tmp_path / str(only_alone), tiny_bundle, change)
        with VisionEncoder.open(folder, "onnxruntime") as encoder:
            caplog.clear()
            assert encoder.video_embeds([picture(20, 20)] * 2).shape == (14, 6)
        assert ("--media video" in caplog.text) == only_alone


@pytest.mark.parametrize("order", ["reference", "newline"])
def test_tiles_of_a_tower_without_cls(tmp_path, tiny_bundle, order):
    image = picture(40, 33)
    folder = with_newline(
        tmp_path / "tiled", tiny_bundle, lambda manifest: tiled(order)(patches_alone(manifest))
    )
    with marked(folder) as encoder:
        result = encoder.image_embeds(image)
        images = np.concatenate(fake_of(encoder).fed)
        tokens = encoder.encode(list(images))
    contextual = [row for tile in tokens.embeds[1:] for row in tile[4:]]
    rows = []
    # 2×2 tiles of 4×4 patches; the picture's 33 rows fill 6.6 of the 8, of which whole ones count.
    for y in range(8) if order == "reference" else range(1, 7):
        for x in range(8):
            tile, patch = y // 4 * 2 + x // 4, y % 4 * 4 + x % 4
            rows += list(tokens.embeds[1 + tile, :4][tokens.kept[1 + tile] == patch])
        rows += [NEWLINE] * (order == "newline")
    assert np.array_equal(result, np.stack([*tokens.embeds[0], *rows, *contextual]))


def test_all_tiles_go_through_as_few_calls_as_the_batch_allows(tiny_bundle, tiny_static_bundle):
    with marked(tiny_bundle, tiled("reference")) as encoder:
        assert encoder.image_embeds(picture(40, 33)).shape == (5 * 7, 6)
        assert [len(fed) for fed in fake_of(encoder).fed] == [3, 2]
        assert encoder.image_embeds(picture(32, 16)).shape == (3 * 7, 6)
        assert [len(fed) for fed in fake_of(encoder).fed[2:]] == [3]
    with marked(tiny_static_bundle, tiled("reference")) as encoder:
        embeds = encoder.image_embeds(picture(40, 33))
        assert (embeds.shape, embeds.dtype) == ((5 * 7, 6), np.float16)
        assert [fed.shape for fed in fake_of(encoder).fed] == [(2, 3, 16, 16)] * 3


def test_a_video_is_its_frames_in_time_order(tiny_bundle, golden):
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime") as encoder:
        for frames in (list(golden["images"]), tuple(Image.fromarray(i) for i in golden["images"])):
            embeds = encoder.video_embeds(frames)
            assert embeds.shape == (5 * 7, 6)
            expected = golden["embeds"].reshape(35, 6)
            assert np.abs(embeds - expected).max() < 1e-5 * np.abs(expected).max()
        assert encoder.video_embeds([golden["images"][0]]).shape == (7, 6)


def test_a_newline_ends_a_video_of_pooled_tokens(tmp_path, tiny_bundle, tiny_static_bundle, golden):
    for source, dtype in ((tiny_bundle, np.float32), (tiny_static_bundle, np.float16)):
        folder = with_newline(tmp_path / "pooled", source, pooled)
        with marked(folder) as encoder:
            frames = list(golden["images"])
            embeds = encoder.video_embeds(frames)
            assert embeds.dtype == dtype
            assert np.array_equal(embeds[:15], encoder.encode(frames).embeds.reshape(15, 6))
            assert np.array_equal(embeds[15:], NEWLINE.astype(dtype)[None])


def test_refuses_media_that_the_bundle_was_not_made_for(tiny_bundle, golden):
    frames = list(golden["images"][:2])

    def takes(*media: Any) -> Callable[[Manifest], Manifest]:
        return lambda manifest: dataclasses.replace(manifest, media=media)

    with marked(tiny_bundle, takes("image")) as encoder:
        with refused(InvalidInputError, got="a video", expected="image", cure="--media video"):
            encoder.video_embeds(frames)
        assert not fake_of(encoder).fed
        assert encoder.image_embeds(frames[0]).shape == (7, 6)
    with marked(tiny_bundle, takes("video")) as encoder:
        with refused(InvalidInputError, got="an image", expected="video", cure="--media image"):
            encoder.image_embeds(frames[0])
        assert not fake_of(encoder).fed
        assert encoder.video_embeds(frames).shape == (14, 6)


def test_refuses_what_is_no_list_of_frames(tiny_bundle, golden):
    array = golden["images"][0]
    with marked(tiny_bundle) as encoder:
        nothing: list[Any] = ["clip.mp4", b"clip", array, golden["images"], iter([array]), None]
        for frames in nothing:
            with refused(InvalidInputError, expected="a list of frames", cure="sample_frames"):
                encoder.video_embeds(frames)
        with refused(InvalidInputError, got="empty"):
            encoder.video_embeds([])
        with refused(InvalidInputError):
            encoder.video_embeds([array, None])  # type: ignore[list-item]
        with refused(InvalidInputError):
            encoder.image_embeds([array])  # type: ignore[arg-type]
        assert not fake_of(encoder).fed


def test_a_damaged_newline_is_found_before_anything_runs(tmp_path, tiny_bundle):
    tiles = with_newline(tmp_path / "tiled", tiny_bundle, tiled("newline"))
    frames = with_newline(tmp_path / "pooled", tiny_bundle, pooled)
    with marked(tiles) as images, marked(frames) as videos:
        for folder in (tiles, frames):
            path = folder / "image_newline.npy"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        with refused(BundleError, got="image_newline.npy has SHA-256"):
            images.image_embeds(picture(40, 33))
        with refused(BundleError, got="image_newline.npy has SHA-256"):
            videos.video_embeds([picture(16, 16)])
        assert not fake_of(images).fed
        assert not fake_of(videos).fed


def test_a_closed_encoder_encodes_neither_images_nor_videos(tiny_bundle):
    encoder = marked(tiny_bundle, tiled("reference"))
    encoder.close()
    for call in (encoder.image_embeds, encoder.video_embeds):
        with refused(BackendError, got="closed"):
            call([])  # type: ignore[operator]


# Importing


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ}
    )
    return done.stdout.strip()


def test_importing_the_runtime_loads_numpy_and_pillow_at_most():
    code = """
import sys
before = set(sys.modules)
from vzip.runtime import CompressedTokens, VisionEncoder
import vzip.runtime.backends, vzip.runtime.bundle.reader
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded - set(sys.stdlib_module_names)))
"""
    allowed = {"numpy", "PIL", "vzip", "cython_runtime"}  # the last one is numpy 1.26's
    loaded = set(eval(run_python(code)))
    # C extensions of numpy show under names of their own in some versions.
    assert {name for name in loaded if not name.startswith("_")} - allowed == set()
    assert "vzip" in loaded


@pytest.mark.slow
def test_importing_the_runtime_is_fast():
    code = """
import time
start = time.perf_counter()
import vzip.runtime
empty = time.perf_counter()
before = time.process_time()
import numpy, PIL.Image
others = time.process_time()
from vzip.runtime import CompressedTokens, VisionEncoder
print(empty - start, time.process_time() - others, others - before)
"""
    # The names behind the package cost what numpy and Pillow cost, and not twice that of their own
    # (CPU time). The best of several: other processes on the machine only ever make it slower.
    runs = [[float(number) for number in run_python(code).split()] for _ in range(5)]
    assert min(run[0] for run in runs) < 0.150
    assert min(run[1] for run in runs) < 2 * min(run[2] for run in runs)


def test_names_that_the_runtime_has_not_are_an_error():
    import vzip.runtime

    with pytest.raises(AttributeError, match=r"module 'vzip\.runtime' has no attribute 'Decoder'"):
        _ = vzip.runtime.Decoder  # type: ignore[attr-defined]
    assert "VisionEncoder" in dir(vzip.runtime)


def test_every_half_is_finite_or_not():
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    for half in halves.reshape(-1, 1, 1, 1)[::7]:
        assert encoder._finite(half) == bool(np.isfinite(half).all())
    edges = np.array([0x7BFF, 0x7C00, 0x7C01, 0xFBFF, 0xFC00, 0xFC01, 0xFFFF, 0x8000], np.uint16)
    for half in edges.view(np.float16):
        row = np.array([[[half, 1.0, -1.0]]], np.float16)
        assert encoder._finite(row) == bool(np.isfinite(half))
