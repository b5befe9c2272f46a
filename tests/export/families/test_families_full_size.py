"""Every family at its true size: random weights, the check, and NVIDIA's compiler, without a GPU.

No language model is built. What that can't show is published weights: no hub can be reached here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vzip.export.architecture import Media
from vzip.export.cli.export import main
from vzip.export.engines.tensorrt.publish import build_engine
from vzip.export.engines.tensorrt.request import BuildRequest
from vzip.runtime.bundle.reader import read_bundle

pytestmark = pytest.mark.full

# Model, media, (S, K, L), inputs of a call. The others differ from one of these in L alone;
# bakllava has the graph of llava-1.5-7b, which test_aot_matrix.py and test_full_size.py build.
MODELS: list[tuple[str, Media, tuple[int, int, int], int]] = [
    ("llava-1.5-13b", "image", (577, 64, 5120), 1),
    ("vip-llava-7b", "image", (577, 64, 4096), 1),
    ("llava-next-mistral-7b", "image", (577, 64, 4096), 5),
    ("video-llava-7b", "video", (257, 17, 4096), 8),
    ("llava-onevision-0.5b", "image", (729, 64, 896), 10),
    ("llava-onevision-7b", "video", (196, 17, 3584), 8),
    ("llava-interleave-0.5b", "image", (729, 64, 1024), 1),
]


@pytest.mark.parametrize(
    ("model", "media", "sizes", "batch"), MODELS, ids=[f"{m}-{media}" for m, media, *_ in MODELS]
)
def test_exports_checks_and_compiles(
    model: str, media: Media, sizes: tuple[int, int, int], batch: int, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    arguments = ["--model", model, "--weights", "random", "--media", media, "--dtype", "fp16"]
    assert main([*arguments, "-o", str(folder)], prog="vzip-export") == 0
    manifest = read_bundle(folder).manifest
    tokens, compressed, width = sizes
    assert manifest.tower.tokens == tokens
    assert manifest.embeds.shape[1:] == (compressed, width)
    assert manifest.batch.max == batch
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    said: list[str] = []
    built = build_engine(folder, BuildRequest(rtx="sm86"), say=said.append)
    record = built.bundle.manifest.engines[built.name]
    assert record.sm == ("86",)
    assert record.bytes > 0.9 * manifest.files["model.onnx.data"].bytes
