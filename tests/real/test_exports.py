"""Real towers become graphs whose tokens are the untouched model's, on photographs from files."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.real.towers import checkpoint
from tests.real import untouched
from tests.real.tier import ALL_TOWERS, TOWER_OF_SLICE, Exported, Saw
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.cli.main import main

CLOSE = 1e-4  # of a score, or of a cosine: what is closer ties in FP32
slice_of = partial(pytest.param, marks=pytest.mark.real_slice)


def cosines(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(axis=-1) / lengths


def compare(
    bundle: Bundle, tower: str, seen: list[untouched.Seen], photographs: list[Path]
) -> tuple[float, np.ndarray[Any, Any]]:
    """Encode from files; check choices where the dtype decides them, and return how near all is.

    Returns:
        The mean overlap of kept tokens, and the cosine of each token [pictures, K] with what the
        untouched model and projector make of the same choices.
    """
    selection = bundle.manifest.selection
    with VisionEncoder.open(bundle, backend="onnxruntime") as encoder:
        given = encoder.encode(photographs)
        groups = given.groups
    project, overlaps, near = untouched.projector(checkpoint(tower)), [], []
    exact = bundle.manifest.precision == "fp32"
    for each, embeds, kept, group in zip(seen, given.embeds, given.kept, groups, strict=True):
        patches = kept[each.cls :] - each.cls
        assert not each.cls or kept[0] == 0
        count = selection.dominant - each.cls
        best = np.argsort(-each.scores, kind="stable")[:count]
        lost, new = np.setdiff1d(best, patches), np.setdiff1d(patches, best)
        overlaps.append(1 - len(lost) / selection.dominant)
        right = each.groups(kept, selection.contextual)
        if exact:
            spread = each.scores[lost].max(initial=0) - each.scores[new].min(initial=np.inf)
            assert not len(lost) or spread <= CLOSE * each.scores[lost].max()
            assert np.array_equal(group < 0, right < 0)
            rest = np.flatnonzero(right >= 0)
            targets = rest[:: len(rest) // selection.contextual][: selection.contextual]
            for token in np.flatnonzero(group != right):
                mine, best_one = targets[group[token]], targets[right[token]]
                assert each.keys[token] @ (each.keys[best_one] - each.keys[mine]) <= CLOSE
        with torch.no_grad():
            expected = project(torch.from_numpy(each.tokens(kept, group))).numpy()
        near.append(cosines(embeds, expected))
    return float(np.mean(overlaps)), np.stack(near)


@pytest.mark.parametrize(
    ("tower", "dtype", "count"),
    [
        slice_of(TOWER_OF_SLICE, "fp32", 4),
        *((tower, dtype, 18) for tower in ALL_TOWERS for dtype in ("fp32", "fp16")),
    ],
)
def test_tokens_are_the_untouched_model_s(
    tower: str, dtype: str, count: int, *, exported: Exported, saw: Saw, photographs: list[Path]
) -> None:
    bundle = exported(tower, dtype=dtype)
    parity = bundle.manifest.parity
    assert parity is not None
    assert parity["passed"] is True
    overlap, near = compare(bundle, tower, saw(tower, count), photographs[:count])
    assert near.shape == (count, 64)
    if dtype == "fp32":
        assert overlap >= 0.999
        assert near.min() >= 0.99999
    else:
        assert overlap >= 0.98
        assert near.mean() >= 0.9999
        assert np.quantile(near, 0.01) >= 0.999


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ("clip-b16-224", {"tokens": 128, "opset": 17}),
        ("clip-b16-224", {"tokens": 192, "merge": "average", "dtype": "fp16"}),
        ("clip-b16-384", {"tokens": 192, "opset": 17}),
        ("dinov2-s14-336", {"tokens": 128}),
        ("dinov2-s14-336-siglip", {"tokens": 192, "opset": 17, "dtype": "fp16"}),
    ],
)
def test_other_budgets_and_opsets(
    tower: str, options: dict[str, Any], exported: Exported, saw: Saw, photographs: list[Path]
) -> None:
    bundle = exported(tower, check_images=(), **options)
    assert bundle.manifest.opset == options.get("opset", 18)
    assert bundle.manifest.selection.tokens == options["tokens"]
    overlap, near = compare(bundle, tower, saw(tower, 18), photographs)
    assert overlap >= 0.99
    assert near.mean() >= 0.9999


@pytest.mark.parametrize(
    ("tower", "dtype"),
    [
        *(("clip-b16-224", dtype) for dtype in ("fp32", "fp16")),
        ("clip-b16-384", "fp32"),
        ("dinov2-s14-336", "fp16"),
        ("dinov2-s14-336-siglip", "fp32"),
    ],
)
def test_vzip_check_passes_on_photographs(
    tower: str,
    dtype: str,
    *,
    exported: Exported,
    photographs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = exported(tower, dtype=dtype)
    copy = shutil.copytree(bundle.path, tmp_path / "copy", copy_function=shutil.copyfile)
    assert main(["check", str(copy), *map(str, photographs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 18
