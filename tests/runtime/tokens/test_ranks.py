"""Smaller budgets of a nested selection: the same tokens as of a graph that has that budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import tiled, with_newline
from tests.places import GOLDEN
from tests.refusals import refused
from vzip.runtime.bundle.manifest import Manifest, Tensor
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.encoder import VisionEncoder
from vzip.runtime.errors import BudgetError, InvalidInputError
from vzip.runtime.llm.shown import TokenSpec, check_shown
from vzip.runtime.tokens.cached import CachedImages
from vzip.runtime.tokens.file import ImageTokens, Origin, TokenFile, to_bytes
from vzip.runtime.tokens.job import encode_images
from vzip.runtime.tokens.positions import EncodedImage, Places
from vzip.runtime.tokens.ranks import Ranks

PATCHES, MOST = 16, 7


class Greedy:
    """A backend that picks an image's patches in an order of its own; K is the manifest's."""

    engine, device = None, "nothing"

    def __init__(self, manifest: Manifest) -> None:
        self.tokens = manifest.selection.tokens

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (images,) = feeds.values()
        rows = [self._one(int(image.astype(np.int64).sum())) for image in images]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _one(self, seed: int) -> dict[str, np.ndarray]:
        picks = np.random.default_rng(seed).permutation(PATCHES)[: self.tokens]
        places = np.sort(picks)
        rank = np.argsort(picks)  # of each place, the step at which it was picked
        embeds = np.repeat((seed % 999 + places / 100)[:, None], 6, axis=1).astype(np.float32)
        return {
            "image_embeds": embeds,
            "kept_indices": places + 1,
            "token_positions": places,
            "rank": rank,
        }

    def close(self) -> None:
        pass


def ranked(manifest: Manifest, tokens: int) -> Manifest:
    extent = manifest.kept.shape[0]
    names = ("kept_indices", "token_positions", "rank")
    selection = dataclasses.replace(
        manifest.selection,
        dominant=tokens,
        contextual=0,
        cls_token=False,
        span=PATCHES,
        ranked=True,
    )
    outputs = (
        dataclasses.replace(manifest.embeds, shape=(extent, tokens, 6)),
        *(Tensor(name, "int64", (extent, tokens)) for name in names),
    )
    return dataclasses.replace(
        manifest, selection=selection, outputs=outputs, media=("image", "video")
    )


def opened(folder: Path, tokens: int = MOST) -> VisionEncoder:
    manifest = ranked(read_bundle(folder).manifest, tokens)
    return VisionEncoder(Bundle(folder, manifest), "fake", Greedy(manifest))


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [
        Image.fromarray(rng.integers(0, 256, (40 + 30 * n, 90, 3), dtype=np.uint8))
        for n in range(count)
    ]


def same(one: EncodedImage, other: EncodedImage) -> None:
    np.testing.assert_array_equal(one.embeds, other.embeds)
    np.testing.assert_array_equal(one.kept, other.kept)
    np.testing.assert_array_equal(one.positions, other.positions)
    np.testing.assert_array_equal(one.where.places, other.where.places)
    assert one.where.span == other.where.span
    assert one.ranks is not None
    assert other.ranks is not None
    for mine, theirs in zip(one.ranks, other.ranks, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(params=["whole", "reference", "newline", "only alone"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, tiny_bundle: Path) -> Path:
    """Bundles of every way in which an image's rows are arranged."""
    if request.param == "whole":
        return tiny_bundle
    order = "reference" if request.param == "reference" else "newline"
    change = tiled(order, only_alone=request.param == "only alone")
    return with_newline(tmp_path / "tiled", tiny_bundle, change)


@pytest.mark.parametrize("tokens", [1, 3, MOST])
@pytest.mark.parametrize("several", [False, True])
def test_a_smaller_budget_is_what_its_own_graph_gives(folder, tokens, several) -> None:
    large, small = opened(folder), opened(folder, tokens)
    for image in pictures():
        wanted = small.image_tokens(image, several=several)
        same(large.image_tokens(image, several=several, tokens=tokens), wanted)
        same(large.image_tokens(image, several=several).first(tokens), wanted)


@pytest.mark.parametrize("tokens", [1, 3, MOST])
def test_of_a_batch_and_of_a_clip_too(tiny_bundle, tokens) -> None:
    large, small = opened(tiny_bundle), opened(tiny_bundle, tokens)
    images = pictures()
    got, wanted = large.encode(images, tokens=tokens), small.encode(images)
    for name in ("embeds", "kept", "positions", "rank"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    same(large.video_tokens(images, tokens=tokens), small.video_tokens(images))
    data = [encoded(image) for image in images]
    for one, other in zip(encode_images(large, data), encode_images(small, data), strict=True):
        assert isinstance(one, EncodedImage)
        assert isinstance(other, EncodedImage)
        same(one.first(tokens), other)


def encoded(image: Image.Image) -> bytes:
    import io

    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_a_cache_holds_the_largest_and_hands_out_less(tmp_path, tiny_bundle) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pictures(1)[0]))
    large = opened(tiny_bundle)
    first = CachedImages([path], large.bundle, tmp_path / "cache", tokens=2)
    (small,) = first.encoded(large)
    assert len(small.embeds) == 2
    for tokens in (None, 5, 2):
        again = CachedImages([path], large.bundle, tmp_path / "cache", tokens=tokens)
        assert not again.missing
        (got,) = again.encoded(None)
        same(got, large.image_tokens(path, tokens=tokens))
    with refused(BudgetError, got="tokens is 8", expected="1 to 7"):
        CachedImages([path], large.bundle, tmp_path / "cache", tokens=8)


@pytest.mark.parametrize("tokens", [0, -1, 8, 2.0, True, "3"])
def test_budgets_that_the_bundle_has_not_are_refused_before_work(tiny_bundle, tokens: Any) -> None:
    encoder, image = opened(tiny_bundle), pictures(1)[0]
    for call in (encoder.encode, encoder.image_tokens):
        with refused(BudgetError, got=f"tokens is {tokens!r}", expected="1 to 7"):
            call(image, tokens=tokens)
    with refused(BudgetError, expected="1 to 7"):
        encoder.video_tokens([image], tokens=tokens)
    with refused(BudgetError, expected="1 to the 7"):
        encoder.encode(image).first(tokens)
    with refused(BudgetError, expected="1 to the 7"):
        encoder.image_tokens(image).first(tokens)


def test_a_selection_that_is_not_nested_has_one_budget(tiny_bundle) -> None:
    with VisionEncoder.open(tiny_bundle, "onnxruntime") as encoder:
        image, own = pictures(1)[0], encoder.manifest.selection.tokens
        whole = encoder.encode(image)
        np.testing.assert_array_equal(encoder.encode(image, tokens=own).embeds, whole.embeds)
        for call in (encoder.encode, encoder.image_tokens):
            with refused(BudgetError, cause="not nested", cure="coverage"):
                call(image, tokens=own - 1)
        for taken in (whole, encoder.image_tokens(image)):
            with refused(BudgetError, got="no ranks", cure="coverage"):
                taken.first(2)


def test_tokens_on_a_device_are_whole(tiny_bundle) -> None:
    with refused(InvalidInputError, got="on_device", cure="rank"):
        opened(tiny_bundle).encode(pictures(1), tokens=2, on_device=True)


def test_a_file_of_tokens_holds_the_ranks(tmp_path, folder) -> None:
    origin = Origin("ab" * 32, "tests/tiny", "an order", 6, -200)
    whole = opened(folder).image_tokens(pictures(1)[0])
    path = tmp_path / "t.safetensors"
    path.write_bytes(to_bytes(origin, [ImageTokens.of("c" * 64, whole)]))
    with TokenFile.open(path) as file:
        same(file.read("c" * 64).encoded, whole)
        same(file.read("c" * 64).encoded.first(3), whole.first(3))


@pytest.mark.parametrize("change", ["tiles", "rows"])
def test_ranks_of_another_shape_are_neither_written_nor_read(tmp_path, change) -> None:
    origin = Origin("ab" * 32, "tests/tiny", "an order", 6, -200)
    index = np.arange(3, dtype=np.int64)
    ranks = Ranks(index[None], index)._replace(**{change: np.zeros((1, 2), np.int64)[0:1]})
    image = EncodedImage(np.ones((3, 6), np.float32), index[None], index[None], Places(index, 9))
    wrong = ImageTokens.of("c" * 64, dataclasses.replace(image, ranks=ranks))
    with refused(InvalidInputError, cure="image_tokens"):
        to_bytes(origin, [wrong])
    right = ImageTokens.of("c" * 64, dataclasses.replace(image, ranks=Ranks(index[None], index)))
    data = to_bytes(origin, [right])
    path = tmp_path / "t.safetensors"
    name = b'"rank/' if change == "tiles" else b'"row_rank/'
    other = b'"ramk/' if change == "tiles" else b'"row_ramk/'
    assert name in data
    path.write_bytes(data.replace(name, other))
    with refused(InvalidInputError), TokenFile.open(path):
        pass


def test_an_llm_takes_fewer_rows_of_nested_tokens_alone(tiny_bundle) -> None:
    encoder = opened(tiny_bundle)
    for tokens, nested, right in ((3, True, True), (3, False, False), (MOST, False, True)):
        spec = TokenSpec(MOST, 6, -200, nested=nested)
        given = encoder.image_tokens(pictures(1)[0], tokens=tokens)

        def check(given: Any = given, spec: TokenSpec = spec) -> None:
            check_shown("llm", given, frames=None, tokens=spec, hidden_size=6, takes_videos=False)

        if right:
            check()
        else:
            with refused(InvalidInputError, got="[3, 6]", expected="[7, 6]"):
                check()
    with refused(InvalidInputError, got="[8, 6]", expected="[1 … 7, 6]"):
        check_shown(
            "llm",
            np.ones((8, 6), np.float32),
            frames=None,
            tokens=TokenSpec(MOST, 6, -200, nested=True),
            hidden_size=6,
            takes_videos=False,
        )


def test_the_golden_bundles_are_not_nested() -> None:
    assert not read_bundle(GOLDEN / "tiny_bundle").manifest.has_rank
