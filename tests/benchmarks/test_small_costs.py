"""What the small costs are measured with does what its names say; the table says what was found."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import small_costs
from benchmarks.harness import photographs
from tests import exported
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.reader import read_bundle

TIMES = {"median_ms": 7.25, "p90_ms": 8.0, "p99_ms": 9.0, "min_ms": 7.0, "iqr_ms": 0.5, "calls": 7}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "WIDTH", 800)
    monkeypatch.setattr(photographs, "HEIGHT", 700)


@pytest.mark.usefixtures("small")
def test_photographs_differ_in_what_they_cost_to_decode() -> None:
    sizes = []
    for kind in photographs.KINDS:
        picture = photographs.photograph(kind)
        assert (picture.mode, picture.size) == ("RGB", (800, 700))
        assert np.array_equal(np.asarray(photographs.photograph(kind)), np.asarray(picture))
        sizes += [len(photographs.jpeg(picture, quality)) for quality in (75, 95)]
    smooth, _, textured, _, noisy, _ = sizes
    assert 1.3 * smooth < textured < noisy
    assert all(high > 1.3 * low for low, high in zip(sizes[::2], sizes[1::2], strict=True))


@pytest.mark.usefixtures("small")
def test_preprocessing_is_asserted_to_be_exact_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = photographs.jpeg(photographs.photograph("noisy"), 85)
    times = small_costs.preprocessing(data, seconds=0.01)
    assert set(times) == {
        "transformers", "Pillow, one call each", "exact", "decode", "draft", "coefficients"
    }  # fmt: skip
    monkeypatch.setattr(small_costs, "exact", lambda _: np.zeros((3, 336, 336), np.float32))
    with pytest.raises(AssertionError):
        small_costs.preprocessing(data, seconds=0.01)


@pytest.mark.usefixtures("small")
def test_a_draft_differs_a_little() -> None:
    monotone = photographs.jpeg(Image.new("RGB", (1400, 1400), (10, 200, 90)), 95)
    assert small_costs.draft_difference(monotone, small_costs.CLIP) == (0.0, 0)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (1400, 1400, 3), np.uint8))
    mean, largest = small_costs.draft_difference(photographs.jpeg(noise, 95), small_costs.CLIP)
    assert 0 < mean < largest


def test_the_agreement_of_drafts_is_of_the_tokens(tiny_bundle: Path) -> None:
    with VisionEncoder.open(tiny_bundle, backend="onnxruntime") as encoder:
        small_costs.SCENE_SIDE, side = 300, small_costs.SCENE_SIDE
        try:
            agreement = small_costs.draft_agreement(encoder, count=2)
        finally:
            small_costs.SCENE_SIDE = side
    assert (agreement["side"], agreement["images"]) == (300, 2)
    assert 0 <= agreement["min_overlap"] <= agreement["mean_overlap"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_static_bundle", "exported"])
def test_opening_and_host_time_of_any_bundle(name: str, request: pytest.FixtureRequest) -> None:
    new = name == "exported"  # says where its tokens stand, which the older ones don't
    bundle = read_bundle(
        exported.bundles() / "tiny_bundle" if new else request.getfixturevalue(name)
    )
    assert bundle.manifest.has_positions == new
    opened = small_costs.opening(bundle, seconds=0.01)
    assert list(opened)[:2] == ["ONNX Runtime alone", "VisionEncoder.open"]
    times = small_costs.host(bundle, seconds=0.01)  # the encoder's checks take what it gives
    assert all(timing.median_ms > 0 for timing in times.values())


def test_imports_are_of_pythons_that_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_costs, "IMPORTS", {"python": "pass"})
    assert small_costs.imports(seconds=0.01)["python"].median_ms > 1
    monkeypatch.setattr(small_costs, "IMPORTS", {"python": "import no_such_package"})
    with pytest.raises(small_costs.subprocess.CalledProcessError):
        small_costs.imports(seconds=0.01)


def result() -> dict[str, Any]:
    ways = ("transformers", "exact", "decode", "draft", "coefficients")
    agreement = {"side": 3000, "images": 8, "mean_overlap": 0.98, "min_overlap": 0.9}
    return {
        "command": "python -m benchmarks.small_costs",
        "environment": {"cores": 2, "processor": "P", "packages": {"pillow": "13.0.0"}},
        "aim_ms": 5.0,
        "preprocessing": [
            {
                "picture": "noisy",
                "quality": 95,
                "megabytes": 7.25,
                "ms": {way: TIMES | {"median_ms": 10.0 * n + 1} for n, way in enumerate(ways)},
                "draft_mean_difference": 0.53,
                "draft_largest_difference": 6,
            }
        ],
        "draft_agreement": agreement | {"mean_cosine": 0.9999, "min_cosine": 0.99},
        "import": {"python": TIMES},
        "open": [{"bundle": "demo", "megabytes": 4.3, "ms": {"alone": TIMES}}],
        "host": {"bundle": "full", "ms": {"run": TIMES}},
        "empty": [{"cell": "a Jetson", "why": "there was none"}],
    }


def test_the_table_says_what_was_found() -> None:
    text = small_costs.table(result())
    assert (
        "| noisy, quality 95 | 7.2 | 1 ms | 11 ms | 21 ms | 31 ms | 41 ms | 0.53 on average, 6 at "
        "most |"
    ) in text
    assert "reached for 0 of 1 pictures with a draft and for 0 without" in text
    assert "98.0% of the kept tokens are the same (90.0% at least), cosine 0.9999" in text
    assert "| python | 7 |" in text
    assert "| demo | 4.3 | 7 ms |" in text
    assert "| run | 7250 |" in text
    assert "Empty: a Jetson: there was none." in text


def test_an_aim_that_is_reached_is_said_to_be() -> None:
    fast = copy.deepcopy(result())
    fast["preprocessing"][0]["ms"]["draft"]["median_ms"] = 4.9
    text = small_costs.table(fast)
    assert re.search(r"5 ms, is reached for 1 of 1 pictures with a draft and for 0 without", text)
