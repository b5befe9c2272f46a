"""The contract of backends: a new one is accepted by passing this, unchanged.

Everything is asked through `VisionEncoder`, as users ask it. Which backends run is said by
VZIP_TEST_BACKENDS (see `tests/conftest.py`); what they must give was computed by the loop in
`tests/golden/make_tiny_bundle.py`, which shares no code with graphs or backends.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.refusals import refused
from vzip.runtime import CompressedTokens, VisionEncoder
from vzip.runtime.backends import BACKENDS
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import BackendError, BundleError, InvalidInputError

Golden = dict[str, np.ndarray]

# An engine has the graph's outputs and no others, so it can't tell where tokens went.
WITHOUT_GROUPS = {"tensorrt"}


def check(tokens: CompressedTokens, golden: Golden, rows: slice, *, half: bool) -> None:
    """Compare tokens with the golden rows."""
    assert tokens.embeds.dtype == (np.float16 if half else np.float32)
    assert tokens.kept.dtype == np.int64
    assert np.array_equal(tokens.kept, golden["kept"][rows])
    expected = golden["embeds"][rows]
    assert tokens.embeds.shape == expected.shape
    error = np.abs(tokens.embeds.astype(np.float64) - expected).max()
    assert error <= (1e-2 if half else 1e-5) * np.abs(golden["embeds"]).max()


class TestContract:
    """What every backend does."""

    def test_is_registered_and_opens(self, tiny_bundle: Path, backend: str) -> None:
        assert backend in BACKENDS
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            assert encoder.backend == backend
            assert encoder.manifest == read_bundle(tiny_bundle).manifest

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_computes_every_batch_of_a_dynamic_graph(
        self, tiny_bundle: Path, golden: Golden, backend: str, count: int
    ) -> None:
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            check(encoder.run(golden["images"][:count]), golden, slice(count), half=False)

    def test_computes_a_static_fp16_graph(
        self, tiny_static_bundle: Path, golden: Golden, backend: str
    ) -> None:
        with VisionEncoder.open(tiny_static_bundle, backend=backend) as encoder:
            tokens = encoder.run(golden["pixel_values"][1:3])
            check(tokens, golden, slice(1, 3), half=True)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_encodes_any_number_of_images(
        self,
        tiny_bundle: Path,
        tiny_static_bundle: Path,
        golden: Golden,
        backend: str,
        count: int,
    ) -> None:
        images = list(golden["images"][:count])
        for bundle, half in ((tiny_bundle, False), (tiny_static_bundle, True)):
            with VisionEncoder.open(bundle, backend=backend) as encoder:
                check(encoder.encode(images), golden, slice(count), half=half)

    def test_tells_the_groups(
        self, tiny_bundle: Path, tiny_static_bundle: Path, golden: Golden, backend: str
    ) -> None:
        for bundle in (tiny_bundle, tiny_static_bundle):
            with VisionEncoder.open(bundle, backend=backend) as encoder:
                tokens = encoder.encode(list(golden["images"]))  # chunks, the last one padded
                if backend in WITHOUT_GROUPS:
                    with refused(BackendError, got="token_weights", cure="--backend onnxruntime"):
                        _ = tokens.groups
                    continue
                assert tokens.groups.dtype == np.int64
                assert np.array_equal(tokens.groups, golden["groups"])

    def test_constant_images_tie_and_the_lower_index_wins(
        self, tiny_bundle: Path, backend: str
    ) -> None:
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            tokens = [encoder.run(np.full((2, 16, 16, 3), 255, np.uint8)) for _ in range(3)]
            for each in tokens:
                assert each.kept.tolist() == [[0, 1, 2, 3]] * 2
                assert np.array_equal(each.embeds, tokens[0].embeds)
                if backend in WITHOUT_GROUPS:
                    continue
                # Targets are tokens 4, 8 and 12 of the rest; the first wins every tie.
                groups = [-1] * 4 + [0] * 13
                groups[8], groups[12] = 1, 2
                assert each.groups.tolist() == [groups] * 2

    def test_takes_arrays_that_are_neither_contiguous_nor_writable(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        turned = np.asfortranarray(golden["images"][:3])
        turned.flags.writeable = False
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            check(encoder.run(turned), golden, slice(3), half=False)

    def test_results_are_the_callers_own(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            first = encoder.run(golden["images"][:2])
            first.embeds[:] = 0
            first.kept[:] = 0
            check(encoder.run(golden["images"][:2]), golden, slice(2), half=False)

    @pytest.mark.parametrize(
        "array",
        [
            pytest.param(np.zeros((1, 16, 16, 3), np.float32), id="dtype"),
            pytest.param(np.zeros((1, 3, 16, 16), np.uint8), id="layout"),
            pytest.param(np.zeros((1, 15, 16, 3), np.uint8), id="shape"),
            pytest.param(np.zeros((16, 16, 3), np.uint8), id="no batch"),
            pytest.param(np.zeros((0, 16, 16, 3), np.uint8), id="empty batch"),
            pytest.param(np.zeros((4, 16, 16, 3), np.uint8), id="large batch"),
        ],
    )
    def test_refuses_a_wrong_array_and_the_next_call_is_clean(
        self, tiny_bundle: Path, golden: Golden, backend: str, array: np.ndarray
    ) -> None:
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            with refused(InvalidInputError, got="got "):
                encoder.run(array)
            check(encoder.run(golden["images"][:1]), golden, slice(1), half=False)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_refuses_numbers_that_are_not_finite_and_the_next_call_is_clean(
        self, tiny_static_bundle: Path, golden: Golden, backend: str, value: float
    ) -> None:
        good = golden["pixel_values"][:2]
        bad = good.copy()
        bad[1, 2, 15, 15] = value
        with VisionEncoder.open(tiny_static_bundle, backend=backend) as encoder:
            with refused(InvalidInputError, got=("1", "pixel_values")):
                encoder.run(bad)
            check(encoder.run(good), golden, slice(2), half=True)

    def test_reports_overflow_and_the_next_call_is_clean(
        self, tiny_static_bundle: Path, golden: Golden, backend: str
    ) -> None:
        good = golden["pixel_values"][:2]
        with VisionEncoder.open(tiny_static_bundle, backend=backend) as encoder:
            with refused(BackendError, got="NaN", cure="--dtype fp32"):
                encoder.run(good * np.float32(60000))
            check(encoder.run(good), golden, slice(2), half=True)

    def test_eight_threads_get_what_one_gets(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            alone = [encoder.run(golden["images"][k : k + 1]) for k in range(5)]

            def work(thread: int) -> None:
                for turn in range(20):
                    k = (thread + turn) % 5
                    tokens = encoder.run(golden["images"][k : k + 1])
                    assert np.array_equal(tokens.embeds, alone[k].embeds)
                    assert np.array_equal(tokens.kept, alone[k].kept)
                    if (
                        turn == thread and backend not in WITHOUT_GROUPS
                    ):  # eight threads open the second session at once
                        assert np.array_equal(tokens.groups[0], golden["groups"][k])

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))

    def test_use_after_close_is_an_error_and_closing_twice_is_none(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        encoder = VisionEncoder.open(tiny_bundle, backend=backend)
        tokens = encoder.run(golden["images"][:1])
        told = encoder.run(golden["images"][:1])
        groups = None if backend in WITHOUT_GROUPS else told.groups
        encoder.close()
        encoder.close()
        with refused(BackendError, got="the encoder is closed", expected="open"):
            encoder.run(golden["images"][:1])
        with refused(BackendError, got="the encoder is closed"):
            encoder.encode(Path("/no/such/image.png"))  # before the image is looked at
        with refused(BackendError, got="the encoder is closed"):
            _ = tokens.groups
        if groups is not None:
            assert told.groups is groups  # computed in time, it stays

    def test_closing_while_others_encode_is_an_error_at_worst(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        encoder = VisionEncoder.open(tiny_bundle, backend=backend)
        encoder.run(golden["images"][:1])

        def work(thread: int) -> int:
            for turn in range(10**6):
                if thread == 0 and turn == 5:
                    encoder.close()
                try:
                    tokens = encoder.run(golden["images"][:2])
                except BackendError as error:
                    if "closed" in str(error):
                        return turn
                    raise
                check(tokens, golden, slice(2), half=False)
            raise AssertionError("never closed")

        with ThreadPoolExecutor(4) as pool:
            turns = list(pool.map(work, range(4)))
        assert turns[0] == 5

    def test_a_fork_is_told_and_neither_hangs_nor_crashes(
        self, tiny_bundle: Path, backend: str
    ) -> None:
        script = Path(__file__).parent / "fork_child.py"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(tiny_bundle), backend],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ},
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:2] == ["BackendError", "BackendError"]
        assert "sessions don't survive a fork; open the bundle in this process" in lines[2]
        assert lines[3:] == ["child ends", "0", "parent works"]

    def test_many_runs_give_one_result_and_take_no_memory(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            images = golden["images"][:3]
            first = encoder.run(images)
            for _ in range(100):
                encoder.run(images)
            gc.collect()
            before = resident()
            for _ in range(300):
                tokens = encoder.run(images)
                assert np.array_equal(tokens.embeds, first.embeds)
                assert np.array_equal(tokens.kept, first.kept)
            gc.collect()
            # A leak of the input alone would be 700 kB, of anything a session holds far more.
            assert resident() - before < 400_000

    def test_a_graph_without_token_weights_says_so(
        self, tiny_bundle: Path, golden: Golden, backend: str
    ) -> None:
        if backend in WITHOUT_GROUPS:
            return  # said of every graph, see above
        path = tiny_bundle / "model.onnx"
        path.write_bytes(path.read_bytes().replace(b"token_weights", b"other_weights"))
        sign(tiny_bundle)
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            tokens = encoder.run(golden["images"][:1])
            with refused(BackendError, got="token_weights"):
                _ = tokens.groups

    def test_an_unknown_operator_is_refused_before_a_backend_sees_it(
        self, tiny_bundle: Path, backend: str
    ) -> None:
        path = tiny_bundle / "model.onnx"
        path.write_bytes(path.read_bytes().replace(b"MatMul", b"NoSuch"))
        sign(tiny_bundle)
        with refused(BundleError, got=("model.onnx", "NoSuch"), cure="export") as raised:
            VisionEncoder.open(tiny_bundle, backend=backend)
        assert "\n" not in str(raised.value)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def sign(bundle: Path) -> None:
    """Write the digests of the files as they are into the manifest."""
    import hashlib
    import json

    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for name, entry in manifest["files"].items():
        data = (bundle / name).read_bytes()
        entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
