"""Every layout of LLaVA, without the LLM's shards, becomes the same graph.

The other families' layouts are in `test_family_graphs.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.export.layouts import IMAGE_TOKEN, LAYOUTS, upstream_model, write_layout
from vzip.export.algorithm.budget import Budget
from vzip.export.graph.trace import GraphOptions
from vzip.export.pictures import reference_images
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime.bundle.manifest import DATA_FILE, MODEL_FILE
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.encoder import VisionEncoder
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import pixel_values, tower_image

BASE = "llava-hf"
ORIGINAL = tuple(name for name in LAYOUTS if name.startswith("original"))
IMAGES = reference_images()[:2]  # photographs, which are no squares: padding shows
BUDGET = Budget(12, 4)


Export = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function that exports a layout, once, with the check against the reference."""

    @functools.cache
    def exported(name: str) -> Bundle:
        folder = tmp_path_factory.mktemp(name)
        write_layout(name, folder / "model", llm="absent")
        return export_bundle(
            WeightSource(str(folder / "model")),
            folder / "bundle",
            budget=BUDGET,
            precision="fp32",
            options=GraphOptions(),
            check_images=IMAGES,
            step=lambda _: None,
        )

    return exported


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_graph(export: Export, name: str) -> None:
    bundle, base = export(name), export(BASE)
    for file in (MODEL_FILE, DATA_FILE):
        assert (bundle.path / file).read_bytes() == (base.path / file).read_bytes()
    assert read_bundle(bundle.path).manifest == bundle.manifest


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_passes_parity(export: Export, name: str) -> None:
    numbers = export(name).manifest.parity
    assert numbers is not None
    assert numbers["passed"] is True
    assert numbers["images"] == len(IMAGES)
    assert numbers["kept_overlap"] == numbers["group_agreement"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_manifests_differ_where_the_models_do(export: Export, name: str) -> None:
    manifest, base = export(name).manifest, export(BASE).manifest
    assert Path(manifest.model.id).name == "model"
    # The graph's files are compared above; what is recorded beside them depends on the images.
    same = dataclasses.replace(manifest, model=base.model, parity=base.parity, files=base.files)
    if name in ORIGINAL:
        assert manifest.preprocessing.mode == "pad_square"
        assert manifest.llm.image_token_id != IMAGE_TOKEN
        same = dataclasses.replace(same, preprocessing=base.preprocessing, llm=base.llm)
    else:
        assert manifest.preprocessing.mode == "resize_crop"
        assert manifest.llm.image_token_id == IMAGE_TOKEN
    assert same == base
    family = "llava-original" if name in ORIGINAL else "llava"
    assert manifest.model == dataclasses.replace(base.model, id=manifest.model.id, family=family)


@pytest.mark.parametrize("name", [BASE, "original"])
def test_dominant_tokens_are_those_of_the_untouched_model(export: Export, name: str) -> None:
    """From the image file on, without our oracle or anything of `vzip.export.parity`."""
    model = upstream_model("llava")
    bundle = export(name)
    with VisionEncoder.open(bundle.path, backend="onnxruntime") as encoder:
        tokens = encoder.encode(list(IMAGES))
    preprocessing = bundle.manifest.preprocessing
    for index, image in enumerate(IMAGES):
        pixels = pixel_values(tower_image(load_image(image), preprocessing)[None], preprocessing)
        with torch.no_grad():
            features = model.get_image_features(
                torch.from_numpy(pixels),
                vision_feature_layer=-2,
                vision_feature_select_strategy="full",
                return_dict=True,
            ).pooler_output[0]
        expected = features[tokens.kept[index]].numpy()
        got = tokens.embeds[index, : BUDGET.dominant]
        assert abs(got - expected).max() <= 1e-5 * abs(expected).max()
