"""The contract of backends: a new one is accepted by passing this, unchanged.

Everything is asked through `VisionEncoder`, as users ask it. Which backends run is said by
VZIP_TEST_BACKENDS (see `tests/conftest.py`); what they must give was computed by the loop in
`tests/golden/make_tiny_bundle.py`, which shares no code with graphs or backends.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
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


def check(tokens: CompressedTokens, golden: Golden, rows: slice, *, half: bool = False) -> None:
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

    @pytest.fixture
    def encoder(self, tiny_bundle: Path, backend: str) -> Iterator[VisionEncoder]:
        """Of a dynamic FP32 graph that takes images."""
        with VisionEncoder.open(tiny_bundle, backend=backend) as opened:
            yield opened

    @pytest.fixture
    def static(self, tiny_static_bundle: Path, backend: str) -> Iterator[VisionEncoder]:
        """Of a static FP16 graph that takes pixel_values."""
        with VisionEncoder.open(tiny_static_bundle, backend=backend) as opened:
            yield opened

    @pytest.mark.slow
    def test_is_registered_and_opens(
        self, tiny_bundle: Path, encoder: VisionEncoder, backend: str
    ) -> None:
        assert backend in BACKENDS
        assert encoder.backend == backend
        assert encoder.manifest == read_bundle(tiny_bundle).manifest

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_computes_every_batch_of_a_dynamic_graph(
        self, encoder: VisionEncoder, golden: Golden, count: int
    ) -> None:
        check(encoder.run(golden["images"][:count]), golden, slice(count))

    def test_computes_a_static_fp16_graph(self, static: VisionEncoder, golden: Golden) -> None:
        check(static.run(golden["pixel_values"][1:3]), golden, slice(1, 3), half=True)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_encodes_any_number_of_images(
        self, encoder: VisionEncoder, static: VisionEncoder, golden: Golden, count: int
    ) -> None:
        for each in (encoder, static):
            tokens = each.encode(list(golden["images"][:count]))
            check(tokens, golden, slice(count), half=each is static)

    def test_tells_the_groups(
        self, encoder: VisionEncoder, static: VisionEncoder, golden: Golden, backend: str
    ) -> None:
        for each in (encoder, static):
            tokens = each.encode(list(golden["images"]))  # chunks, the last one padded
            if backend in WITHOUT_GROUPS:
                with refused(BackendError, got="token_weights", cure="--backend onnxruntime"):
                    _ = tokens.groups
                continue
            assert tokens.groups.dtype == np.int64
            assert np.array_equal(tokens.groups, golden["groups"])

    def test_constant_images_tie_and_the_lower_index_wins(
        self, encoder: VisionEncoder, backend: str
    ) -> None:
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
        self, encoder: VisionEncoder, golden: Golden
    ) -> None:
        turned = np.asfortranarray(golden["images"][:3])
        turned.flags.writeable = False
        check(encoder.run(turned), golden, slice(3))

    def test_results_are_the_callers_own(self, encoder: VisionEncoder, golden: Golden) -> None:
        first = encoder.run(golden["images"][:2])
        first.embeds[:] = 0
        first.kept[:] = 0
        check(encoder.run(golden["images"][:2]), golden, slice(2))

    def test_refuses_a_wrong_array_and_the_next_call_is_clean(
        self, encoder: VisionEncoder, golden: Golden
    ) -> None:
        for shape, dtype in (
            ((1, 16, 16, 3), np.float32),
            ((1, 3, 16, 16), np.uint8),  # another layout
            ((1, 15, 16, 3), np.uint8),
            ((16, 16, 3), np.uint8),  # no batch
            ((0, 16, 16, 3), np.uint8),
            ((4, 16, 16, 3), np.uint8),  # a larger batch than the graph takes
        ):
            with refused(InvalidInputError, got="got "):
                encoder.run(np.zeros(shape, dtype))
            check(encoder.run(golden["images"][:1]), golden, slice(1))

    def test_refuses_or_reports_what_is_not_finite_and_the_next_call_is_clean(
        self, static: VisionEncoder, golden: Golden
    ) -> None:
        good = golden["pixel_values"][:2]
        for value in (np.nan, np.inf, -np.inf):
            bad = good.copy()
            bad[1, 2, 15, 15] = value
            with refused(InvalidInputError, got=("1", "pixel_values")):
                static.run(bad)
            check(static.run(good), golden, slice(2), half=True)
        with refused(BackendError, got="NaN", cure="--dtype fp32"):
            static.run(good * np.float32(60000))  # which overflows on the way
        check(static.run(good), golden, slice(2), half=True)

    def test_eight_threads_get_what_one_gets(
        self, encoder: VisionEncoder, golden: Golden, backend: str
    ) -> None:
        alone = [encoder.run(golden["images"][k : k + 1]) for k in range(5)]

        def work(thread: int) -> None:
            for turn in range(20):
                k = (thread + turn) % 5
                tokens = encoder.run(golden["images"][k : k + 1])
                assert np.array_equal(tokens.embeds, alone[k].embeds)
                assert np.array_equal(tokens.kept, alone[k].kept)
                # Eight threads open the second session at once.
                if turn == thread and backend not in WITHOUT_GROUPS:
                    assert np.array_equal(tokens.groups[0], golden["groups"][k])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

    def test_use_after_close_is_an_error_and_closing_twice_is_none(
        self, encoder: VisionEncoder, golden: Golden, backend: str
    ) -> None:
        tokens = encoder.run(golden["images"][:1])
        told = encoder.run(golden["images"][:1])
        groups = None if backend in WITHOUT_GROUPS else told.groups
        encoder.close()
        encoder.close()
        for use in (
            lambda: encoder.run(golden["images"][:1]),
            lambda: encoder.encode(Path("/no/such/image.png")),  # before the image is looked at
            lambda: tokens.groups,
        ):
            with refused(BackendError, got="the encoder is closed"):
                use()
        if groups is not None:
            assert told.groups is groups  # computed in time, it stays

    def test_closing_while_others_encode_is_an_error_at_worst(
        self, encoder: VisionEncoder, golden: Golden
    ) -> None:
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
                check(tokens, golden, slice(2))
            raise AssertionError("never closed")

        with ThreadPoolExecutor(4) as pool:
            turns = list(pool.map(work, range(4)))
        assert turns[0] == 5

    @pytest.mark.slow
    def test_a_fork_is_told_and_neither_hangs_nor_crashes(
        self, tiny_bundle: Path, backend: str
    ) -> None:
        script = Path(__file__).parent / "fork_child.py"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(tiny_bundle), backend],
            check=False, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[:2] == ["BackendError", "BackendError"]
        assert "sessions don't survive a fork; open the bundle in this process" in lines[2]
        assert lines[3:] == ["child ends", "0", "parent works"]

    @pytest.mark.slow
    def test_many_runs_give_one_result_and_take_no_memory(
        self, encoder: VisionEncoder, golden: Golden
    ) -> None:
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
        rename(tiny_bundle, b"token_weights", b"other_weights")
        with VisionEncoder.open(tiny_bundle, backend=backend) as encoder:
            tokens = encoder.run(golden["images"][:1])
            with refused(BackendError, got="token_weights"):
                _ = tokens.groups

    def test_an_unknown_operator_is_refused_before_a_backend_sees_it(
        self, tiny_bundle: Path, backend: str
    ) -> None:
        rename(tiny_bundle, b"MatMul", b"NoSuch")
        with refused(BundleError, got=("model.onnx", "NoSuch"), cure="export") as raised:
            VisionEncoder.open(tiny_bundle, backend=backend)
        assert "\n" not in str(raised.value)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rename(bundle: Path, name: bytes, other: bytes) -> None:
    """Rename something in a bundle's graph, and write its digest into the manifest."""
    graph, manifest = bundle / "model.onnx", bundle / "manifest.json"
    graph.write_bytes(data := graph.read_bytes().replace(name, other))
    written = json.loads(manifest.read_text("utf-8"))
    written["files"]["model.onnx"]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps(written), "utf-8")
