"""The form ``tokens`` of real towers on photographs that the build doesn't see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.real.tier import ALL_TOWERS, PICTURES_OF_SLICE, TOWER_OF_SLICE, Exported
from vzip.export.engines.cpu import choice
from vzip.export.pictures import reference_images
from vzip.runtime.agreement import Agreement, compare, load_reference
from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import tower_image


def agreements(bundle: Bundle, photographs: list[Path], *forms: str) -> list[Agreement]:
    """Return how forms agree with the bundle's own graph."""
    name, preprocessing = bundle.manifest.input.name, bundle.manifest.preprocessing
    images = [tower_image(load_image(path), preprocessing)[None] for path in photographs]
    own = OnnxRuntimeCpu.of_model(bundle.read_model(), bundle.weights_folder)
    expected, found = [own.run({name: image}) for image in images], []
    made = dict(choice.candidates(bundle, load_reference(bundle)))
    for form in forms:
        candidate = made[form]()
        assert candidate is not None
        opened = candidate.open()
        got = [opened.run({name: image}) for image in images]
        found.append(compare(expected, got, bundle.manifest))
    return found


def unseen(photographs: list[Path]) -> list[Path]:
    seen = {path.name for path in reference_images()}
    return [path for path in photographs if path.name not in seen]


@pytest.mark.real_slice
def test_tokens_survive_outliers_and_a_scale_per_call_does_not(
    exported: Exported, photographs: list[Path]
) -> None:
    bundle, some = exported(TOWER_OF_SLICE), unseen(photographs[: len(PICTURES_OF_SLICE)])
    right, wrong = agreements(bundle, some, "tokens", "dynamic")
    assert right.mean_overlap >= 0.96
    assert right.kept.mean >= 0.995
    assert wrong.mean_overlap < 0.93
    assert wrong.kept.mean < 0.97


@pytest.mark.parametrize("tower", ALL_TOWERS)
def test_tokens_agree_on_photographs_held_apart(
    exported: Exported, photographs: list[Path], tower: str
) -> None:
    some = unseen(photographs)
    assert len(some) >= 10
    (found,) = agreements(exported(tower), some, "tokens")
    # Single runs gave .969 to .983, .9973 to .9996 and .961 to .998.
    assert found.mean_overlap >= 0.965
    assert found.kept.mean >= 0.995
    assert np.quantile(found.kept.cosines, 0.01) >= 0.98
    assert found.merged.mean >= 0.955


def test_openvino_s_bf16_merges_the_tokens(exported: Exported, photographs: list[Path]) -> None:
    """At 577 tokens ranks no longer fit into BF16: all of it in BF16 gave merged tokens .953."""
    bundle, some = exported("dinov2-s14-336"), unseen(photographs[:8])
    offered = {each.name for each in choice.openvino_forms()}
    forms = [form for form in ("openvino", "openvino-bf16", "openvino-fp16") if form in offered]
    assert forms
    for found in agreements(bundle, some, *forms):
        assert found.mean_overlap >= 0.97
        assert found.kept.mean >= 0.999
        assert found.merged.mean >= 0.99
