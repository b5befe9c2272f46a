"""The exported graph of every family against transformers' own untouched model.

The tiny models of `layouts` are transformers' own classes with seeded values. What a graph in ONNX
Runtime gives is compared with that model's tower, projector and pooling and the slow oracle: kept
tokens equal, values within 1e-4.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.export.layouts import FAMILIES, LAYOUTS, TINY, upstream_model, write_layout
from vzip.export.algorithm import oracle, selections
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.algorithm.rules import GreedySelection, ScoredSelection, Signals
from vzip.export.architecture import Media, VisionConfig
from vzip.export.graph.trace import GraphOptions
from vzip.export.pipeline import WeightSource, export_bundle
from vzip.runtime import VisionEncoder
from vzip.runtime.bundle.manifest import Manifest
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.pictures.preprocess import pixel_values
from vzip.runtime.pictures.tiles import cut

PUBLISHED = [name for name in LAYOUTS if not name.startswith("original")]
CASES: list[tuple[str, Media]] = [
    *((family, "image") for family in FAMILIES),
    ("video-llava", "video"),
    ("llava-onevision", "video"),
]
TOLERANCE = 1e-4  # of the largest magnitude


@dataclass(frozen=True)
class Upstream:
    """What the untouched model gives for some pixel values.

    Attributes:
        hidden: float64 [B, S, F], what is merged: features, or pooled projected ones.
        keys: float64 [B, H, S, d].
        scores: float64 [B, N].
        tokens: float32 [B, S, L], every token as the uncompressed model would hand it on.
        project: From features to tokens.
    """

    hidden: NDArray[np.float64]
    keys: NDArray[np.float64]
    scores: NDArray[np.float64]
    tokens: torch.Tensor
    project: Any


@functools.cache
def model_of(family: str) -> Any:
    return upstream_model(family)


def look(family: str, media: Media, pixels: torch.Tensor) -> Upstream:
    """Run the untouched model's tower, projector and pooling, with hooks alone."""
    model = model_of(family).model
    config = model.config
    tower = {
        ("video-llava", "image"): "image_tower",
        ("video-llava", "video"): "video_tower",
    }.get((family, media), "vision_tower")
    module = getattr(model, tower)
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    count = len(module.encoder.layers) + 1
    deepest = max(layer % count for layer in layers)
    keys: list[torch.Tensor] = []
    hook = module.encoder.layers[deepest - 1].self_attn.k_proj.register_forward_hook(
        lambda _module, _inputs, output: keys.append(output)
    )
    with torch.no_grad():
        output = module(pixels, output_hidden_states=True, output_attentions=True)
        hook.remove()
        features = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
        attention = output.attentions[deepest - 1]  # [B, H, S, S]
        heads = attention.shape[1]
        split = keys[0].unflatten(-1, (heads, -1)).transpose(1, 2)
        if config.vision_config.model_type == "clip_vision_model":
            scores = attention[:, :, 0, 1:].double().sum(dim=1)
        else:
            scores = attention.double().mean(dim=(1, 2))
        tokens = model.multi_modal_projector(features)
        project = model.multi_modal_projector
        if (family, media) == ("llava-onevision", "video"):
            pooled = model.apply_pooling(tokens)
            # The model's own way from a clip of B frames to tokens; a newline ends it.
            whole = model.get_video_features(
                pixels[None],
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
                return_dict=True,
            ).pooler_output
            assert torch.equal(
                whole.flatten(0, -2)[: pooled.shape[0] * pooled.shape[1]], pooled.flatten(0, 1)
            )
            features = tokens = pooled
            project = torch.nn.Identity()
            flat = split.flatten(0, 1)  # [B * H, S, d]
            split = model.apply_pooling(flat).unflatten(0, split.shape[:2])
            scores = model.apply_pooling(scores[..., None])[..., 0]
    return Upstream(
        features.double().numpy(), split.double().numpy(), scores.numpy(), tokens, project
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a family in a layout once."""

    @functools.cache
    def written(family: str, layout: str) -> Path:
        folder = tmp_path_factory.mktemp("family") / family
        write_layout(layout, folder, family=family)
        return folder

    return written


def export(
    folder: Path,
    output: Path,
    media: Media,
    budget: Budget,
    **change: Any,
) -> Bundle:
    options: dict[str, Any] = {
        "budget": budget,
        "precision": "fp32",
        "options": GraphOptions(batch=3, dynamic_batch=True),
        "check_images": (),
        "step": lambda _: None,
    }
    return export_bundle(WeightSource(str(folder), media=media), output, **{**options, **change})


def images(count: int, side: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(3)
    pictures = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    pictures[-1] = 90
    pictures[-1, side // 4 : side // 2, side // 3 :] = [250, 10, 60]
    return pictures


SCORED = tuple(
    name
    for name in selections.names()
    if name != selections.DEFAULT and issubclass(selections.kind_of(name), ScoredSelection)
)


def has_cls(config: VisionConfig) -> bool:
    return config.tower.cls_token


def _scores(there: Any, manifest: Manifest, kept: int) -> NDArray[np.float64]:
    """Return by what patches are kept."""
    rule = selections.get(manifest.selection.method)
    assert isinstance(rule, ScoredSelection)
    signals = Signals(
        keys=torch.from_numpy(there.keys),
        cls_token=manifest.tower.cls_token,
        attention_scores=lambda: torch.from_numpy(there.scores),
        hidden=lambda: torch.from_numpy(there.hidden),
        grid=manifest.tower.grid,
    )
    return rule.scores(signals, kept).expand(len(there.keys), -1).double().numpy()


def compare(bundle: Bundle, family: str, media: Media) -> None:
    """Hold a bundle's graph against the untouched model and the oracle."""
    manifest = bundle.manifest
    pictures = images(3, manifest.tower.image_size)
    pixels = pixel_values(pictures, manifest.preprocessing)
    there = look(family, media, torch.from_numpy(pixels))
    chosen = manifest.selection
    patches = chosen.dominant - chosen.cls_token
    tokens, expected_kept = oracle.compress(
        there.hidden,
        there.keys,
        _scores(there, manifest, patches),
        dominant=chosen.dominant,
        contextual=chosen.contextual,
        merge=chosen.merge,
        cls_token=chosen.cls_token,
    )
    with torch.no_grad():
        expected = there.project(torch.from_numpy(tokens).float()).numpy()
    given = pictures if manifest.input.name == "image" else pixels
    with VisionEncoder.open(bundle, backend="onnxruntime") as encoder:
        got = encoder.run(given)
        assert got.groups.shape == (3, manifest.tower.tokens)
    assert got.kept.tolist() == expected_kept.tolist()
    assert got.embeds.shape == expected.shape
    largest = np.abs(expected).max()
    assert np.abs(got.embeds - expected).max() <= TOLERANCE * largest
    # The kept ones once more, without the oracle: rows of the uncompressed model.
    for image, kept in enumerate(got.kept):
        rows = there.tokens[image, kept].numpy()
        assert np.abs(got.embeds[image, : chosen.dominant] - rows).max() <= TOLERANCE * largest


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, Media]:
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["average", "sum"])
def test_the_graph_is_the_untouched_model(
    case: tuple[str, Media], merge: Merge, checkpoints: Any, tmp_path: Path
) -> None:
    family, media = case
    folder = checkpoints(family, "llava-hf-single")
    config = WeightSource(str(folder), media=media).config()
    assert config.media == media
    bundle = export(folder, tmp_path / "b", media, Budget(7, 3, has_cls(config), merge=merge))
    compare(bundle, family, media)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in PUBLISHED if name != "llava-hf-single"])
def test_every_layout_gives_the_same_graph(
    case: tuple[str, Media], layout: str, checkpoints: Any, tmp_path: Path
) -> None:
    family, media = case
    files = []
    for name in ("llava-hf-single", layout):
        source = WeightSource(str(checkpoints(family, name)), media=media)
        weights, _ = source.load()
        files.append(
            {key: tensor.double().numpy().tobytes() for key, tensor in weights.tensors.items()}
        )
        config = weights.config
    assert files[0] == files[1]
    assert config == WeightSource(str(checkpoints(family, layout)), media=media).config()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["nocls", "one-layer-of-input", "contextual-0", *SCORED])
def test_other_options(
    case: tuple[str, Media], change: str, checkpoints: Any, tmp_path: Path
) -> None:
    family, media = case
    folder = checkpoints(family, "llava-hf-single")
    cls_token = has_cls(WeightSource(str(folder), media=media).config()) and change != "nocls"
    options: dict[str, Any] = {}
    method = change if change in selections.names() else selections.DEFAULT
    if change == "one-layer-of-input":
        options["options"] = GraphOptions("pixel_values", 3, opset=17)
    budget = Budget(7, 0 if change == "contextual-0" else 3, cls_token, method=method)
    bundle = export(folder, tmp_path / "b", media, budget, **options)
    compare(bundle, family, media)


@pytest.mark.slow
def test_check_passes_for_both_precisions(
    case: tuple[str, Media], checkpoints: Any, tmp_path: Path
) -> None:
    from vzip.export.pictures import reference_images

    family, media = case
    folder = checkpoints(family, "llava-hf-single")
    cls_token = has_cls(WeightSource(str(folder), media=media).config())
    for precision in ("fp32", "fp16"):
        bundle = export(
            folder,
            tmp_path / precision,
            media,
            Budget(7, 3, cls_token),
            precision=precision,
            check_images=reference_images()[:2],
        )
        assert bundle.manifest.parity is not None
        assert bundle.manifest.parity["passed"] is True
        assert "reference.npz" in bundle.manifest.files
        newline = family in ("llava-next", "llava-onevision")
        assert ("image_newline.npy" in bundle.manifest.files) == newline


GREEDY = tuple(
    name for name in selections.names() if issubclass(selections.kind_of(name), GreedySelection)
)


@pytest.mark.slow
def test_greedy_picks_are_the_untouched_model_s(
    case: tuple[str, Media], checkpoints: Any, tmp_path: Path
) -> None:
    """Every family and media with one selection and one form, so that all come with each other."""
    from vzip.export.pictures import reference_images

    family, media = case
    number = CASES.index(case)
    name = GREEDY[number % len(GREEDY)]
    place = (number + number // len(GREEDY)) % 3
    options = [GraphOptions(), GraphOptions("pixel_values", 3, opset=17), GraphOptions("image", 2)]
    folder = checkpoints(family, "llava-hf-single")
    config = WeightSource(str(folder), media=media).config()
    budget = selections.budget_of(config, selection=name, tokens=9, cls_token=False)
    bundle = export(
        folder,
        tmp_path / "b",
        media,
        budget,
        precision="fp16" if place == 2 else "fp32",
        options=options[place],
        tiles="newline" if config.tiling else "reference",
        check_images=reference_images()[:2],
    )
    manifest = bundle.manifest
    assert manifest.selection.ranked
    assert manifest.selection.options == budget.options
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    assert float(manifest.parity["objective"]) >= (1.0 - 1e-6 if place != 2 else 0.99)
    assert manifest.opset == options[place].opset
    assert [each.name for each in manifest.outputs][-1] == "rank"


SIZES = ((501, 333), (97, 300), (300, 40), (64, 64), (33, 200), (5, 5))  # width, height


def picture(size: tuple[int, int]) -> Image.Image:
    """Return noise without black, so that padding alone is black all over."""
    rng = np.random.default_rng(sum(size))
    return Image.fromarray(rng.integers(40, 256, (size[1], size[0], 3), dtype=np.uint8))


def processor(family: str) -> Any:
    """Return the family's own image processor with the tiny model's settings."""
    from transformers.models.llava_next import image_processing_pil_llava_next as following
    from transformers.models.llava_onevision import image_processing_pil_llava_onevision as one

    settings = {k: v for k, v in TINY[family].processor.items() if k != "image_processor_type"}
    if family == "llava-next":
        return following.LlavaNextImageProcessorPil(**settings)
    return one.LlavaOnevisionImageProcessorPil(**settings)


def found_in_order(rows: NDArray[Any], whole: torch.Tensor) -> int:
    """Return how many rows are met in `whole`, from the first on, each behind the one before."""
    place, met = 0, 0
    tolerance = TOLERANCE * float(whole.abs().max())
    for row in rows:
        far = (whole[place:] - torch.from_numpy(row)).abs().amax(dim=1) > tolerance
        if bool(far.all()):
            return met
        place += int((~far).nonzero()[0]) + 1
        met += 1
    return met


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
def test_tiles_in_rows_are_what_the_model_itself_would_hand_on(
    family: str, checkpoints: Any, tmp_path: Path
) -> None:
    folder = checkpoints(family, "llava-hf-single")
    cls_token = has_cls(WeightSource(str(folder)).config())
    budget = Budget(14 + cls_token, 3, cls_token)
    bundle = export(folder, tmp_path / "b", "image", budget, tiles="newline")
    model, prepare = model_of(family).model, processor(family)
    newline = model.image_newline.detach()
    with VisionEncoder.open(bundle, backend="onnxruntime") as encoder:
        for size in SIZES:
            inputs = prepare(images=[picture(size)], return_tensors="pt")
            with torch.no_grad():
                pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
                (whole,) = model.get_image_features(
                    pixels, image_sizes=sizes, return_dict=True
                ).pooler_output
            got = encoder.image_embeds(picture(size))
            base = bundle.manifest.tower.grid[0] ** 2
            kept = got[int(cls_token) : budget.dominant]
            assert found_in_order(kept, whole[:base]) == 14
            behind = (pixels.shape[1] - 1) * (int(cls_token) + budget.contextual)
            lines = got[budget.tokens : len(got) - behind]
            assert found_in_order(lines, whole[base:]) == len(lines)
            ends = int((torch.from_numpy(got) - newline).abs().amax(dim=1).lt(1e-6).sum())
            assert ends == int((whole - newline).abs().amax(dim=1).lt(1e-6).sum())
            # Padding takes no place in a budget as long as there is enough picture.
            tiles = cut(picture(size), bundle.manifest.preprocessing, bundle.manifest.tiling)
            assert not kept_black(encoder, tiles.images)


def prepared(family: str, pictures: list[Image.Image]) -> Any:
    """Return what the family's own processor makes of the pictures of one prompt."""
    import transformers

    settings = {k: v for k, v in TINY[family].processor.items() if k != "image_processor_type"}
    if family in ("llava-next", "llava-onevision"):
        return processor(family)(images=[pictures], return_tensors="pt")
    kind = "Siglip" if family == "llava-siglip" else "CLIP"
    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)(
        images=pictures, return_tensors="pt"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_has_the_rows_of_the_untouched_model_alone_and_among_others(
    family: str, checkpoints: Any, tmp_path: Path
) -> None:
    """With all patches but one of each tile; pictures fill their canvas, so none is padding."""
    folder = checkpoints(family, "llava-hf-single")
    config = WeightSource(str(folder), media="image").config()
    patches = config.tokens - has_cls(config)
    budget = Budget(patches - 2, 1, cls_token=False)
    tiles = "newline" if config.tiling else "reference"
    bundle = export(folder, tmp_path / "b", "image", budget, tiles=tiles)
    side, model = config.tower.image_size, model_of(family)
    pictures = [picture((2 * side, 2 * side)), picture((2 * side, side)), picture((side, 2 * side))]
    with VisionEncoder.open(bundle, backend="onnxruntime") as encoder:
        for prompt in ([pictures[0]], [pictures[1]], pictures[1:], pictures):
            inputs = dict(prepared(family, prompt))
            if family == "video-llava":
                inputs = {"pixel_values_images": inputs["pixel_values"]}
            inputs.pop("patch_attention_mask", None)
            with torch.no_grad():
                expected = model.get_image_features(**inputs, return_dict=True).pooler_output
            several = len(prompt) > 1
            got = [encoder.image_tokens(each, several=several) for each in prompt]
            rows = [len(each.embeds) + len(each.kept) for each in got]
            assert rows == [len(each) for each in expected]
            for each, whole in zip(got, expected, strict=True):
                kept = each.embeds[: patches - 2]
                assert found_in_order(kept, whole[:patches]) == patches - 2
                # Each row is what stands at its place in the untouched model's sequence; all but
                # the merged ones, which are at that of their target.
                places = each.where.places
                assert each.where.span == len(whole)
                assert len(set(places.tolist())) == len(places)
                apart = np.abs(each.embeds - whole.numpy()[places]).max(axis=1) > 1e-4
                assert apart.sum() <= len(each.kept)


def kept_black(encoder: VisionEncoder, images: NDArray[np.uint8]) -> int:
    """Return how many patches are kept that are black all over, where others were to be had."""
    manifest = encoder.manifest
    (rows, columns), side = manifest.tower.grid, manifest.tower.patch_size
    first, wasted = int(manifest.tower.cls_token), 0
    for image in images:
        kept = encoder.run(image[None]).kept[0]
        patches = image[: rows * side, : columns * side].reshape(rows, side, columns, side * 3)
        black = ~patches.any(axis=(1, 3)).ravel()
        chosen = kept[kept >= first] - first
        wasted += int(black[chosen].sum()) - max(0, len(chosen) - int((~black).sum()))
    return wasted


@pytest.mark.slow
@pytest.mark.parametrize("graph_input", ["image", "pixel_values"])
@pytest.mark.parametrize("order", ["newline", "reference"])
def test_padding_is_kept_in_the_published_order_alone(
    graph_input: Any, order: Any, checkpoints: Any, tmp_path: Path
) -> None:
    folder = checkpoints("llava-next", "llava-hf-single")
    bundle = export(
        folder,
        tmp_path / "b",
        "image",
        Budget(15, 3),
        tiles=order,
        options=GraphOptions(graph_input, 3, dynamic_batch=True),
    )
    prep, (rows, columns) = bundle.manifest.preprocessing, bundle.manifest.tower.grid
    image = images(1, prep.image_size)[0] // 2 + 100
    image[: prep.image_size // 2] = 0
    given = image[None] if graph_input == "image" else pixel_values(image[None], prep)
    with VisionEncoder.open(bundle, backend="onnxruntime") as encoder:
        patches = encoder.run(given).kept[0, 1:] - 1
    in_the_dark = int((patches < rows * columns // 2).sum())
    assert in_the_dark == 0 if order == "newline" else in_the_dark > 0
