"""What many photographs are timed with does what its names say; the page says what was found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import many_pictures
from benchmarks.many_pictures import DRAFTS, ONE, TOGETHER
from vzip.runtime import VisionEncoder
from vzip.runtime.pictures.images import load_image


def times(median: float) -> dict[str, float]:
    return {"median_ms": median, "min_ms": median, "iqr_ms": median / 10, "calls": 7}


RESULT: dict[str, Any] = {
    "command": "python -m benchmarks.many_pictures",
    "environment": {"cores": 2, "processor": "P", "packages": {"pillow": "13.0"}},
    "before": {"others_cores": 0.1},
    "aim": 1.6,
    "encode": [
        {
            "tower": tower, "pictures": "as they are", "threads": 2,
            "ms": {ONE: times(one), TOGETHER: times(3200.0), DRAFTS: times(1600.0)},
        }
        for tower, one in (("demo", 6400.0), ("clip", 4800.0))
    ],
    "drafts": [
        {"tower": "clip", "draft": 448, "mean_overlap": 0.987, "min_overlap": 0.9,
         "mean_cosine": 0.9991, "min_cosine": 0.97},
    ],
    "decoders": [{"picture": "p", "megabytes": 3.2, "ms": {"Pillow": times(40.0)}}],
}  # fmt: skip


def test_the_page_has_ratios_and_says_where_the_aim_is_reached() -> None:
    page = many_pictures.table(copy.deepcopy(RESULT))
    assert "| demo | as they are | 200.0 | 100.0 | 2.00× | 50.0 | 4.00× | 10% |" in page
    assert "| clip | as they are | 150.0 | 100.0 | 1.50× | 50.0 | 3.00× | 10% |" in page
    assert "1.6 times one at a time, is reached in 1 of 2 rows" in page
    assert "98.7% of the kept tokens are the same (90.0% at least)" in page
    assert "| p, 3.2 MB | 40.0 |" in page


def test_what_was_not_timed_is_said_not_to_be() -> None:
    page = many_pictures.table({**RESULT, "encode": [], "decoders": []})
    assert "Times: not measured yet." in page
    assert "98.7% of the kept tokens" in page
    assert "one at a time" not in page


def test_photographs_are_enlarged_to_the_pixels_that_are_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(many_pictures, "PIXELS", 30_000)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    (made,) = many_pictures.enlarged([tmp_path / "a.png"], tmp_path)
    image = load_image(made)
    assert image.width * image.height == pytest.approx(30_000, rel=0.02)
    assert image.width / image.height == pytest.approx(1.5, rel=0.02)
    assert len(many_pictures.cycled([made])) == many_pictures.COUNT


def test_ways_are_asserted_to_give_the_same_tokens(tiny_bundle, golden, tmp_path, monkeypatch):
    files = []
    for number, array in enumerate(golden["images"]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(array).save(files[-1])
    with VisionEncoder.open(tiny_bundle, "onnxruntime") as encoder:
        found = many_pictures.ways(encoder, files)
        assert list(found) == [ONE, TOGETHER, DRAFTS]
        for way in found.values():
            way()
        agreement = many_pictures.drafts_agree(encoder, files)  # PNGs have no drafts
        assert (agreement["mean_overlap"], agreement["images"]) == (1.0, 5)
        encode = VisionEncoder.encode

        def shuffled(self: VisionEncoder, images: Any, **options: Any) -> Any:
            some = images[::-1] if isinstance(images, list) else images
            return encode(self, some, **options)

        monkeypatch.setattr(VisionEncoder, "encode", shuffled)
        with pytest.raises(AssertionError):
            many_pictures.ways(encoder, files)
