"""Where tokens stand: the places of every kind of picture, and the positions of prompts."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.llm.shown import TokenSpec, check_shown, say_consecutive
from vzip.runtime.tokens.positions import (
    UNKNOWN,
    EncodedImage,
    Places,
    along,
    check_ascending,
    clip_places,
    frame_places,
    image_places,
    left_out,
    several_places,
    tile_places,
)

IMAGE, WIDTH = 9, 3


def manifest(
    side: int = 4,
    *,
    span: int | None = 16,
    cls_tower: bool = True,
    cls_kept: bool = False,
    order: str = "newline",
    max_tiles: int | None = None,
) -> Any:
    """What of a manifest the places depend on."""
    return SimpleNamespace(
        span=span,
        tower=SimpleNamespace(grid=(side, side), cls_token=cls_tower),
        selection=SimpleNamespace(cls_token=cls_kept),
        tiling=SimpleNamespace(order=order, max_tiles=max_tiles),
    )


def of(*patches: int) -> np.ndarray:
    return np.array(patches, np.int64)


def test_an_image_s_patches_stand_where_they_are() -> None:
    where = image_places(manifest(), of(3, 7, 15, 1))
    assert where.places is not None
    assert where.places.tolist() == [3, 7, 15, 1]
    assert where.span == 16


def test_where_the_uncompressed_model_hands_on_cls_patches_stand_behind_it() -> None:
    kept = image_places(manifest(span=17, cls_kept=True), of(0, 0, 15))
    assert kept.places is not None
    assert kept.places.tolist() == [0, 1, 16]
    dropped = image_places(manifest(span=17), of(0, 15))
    assert dropped.places is not None
    assert dropped.places.tolist() == [1, 16]
    # Upstream drops it and it was kept all the same: it stands at the first patch.
    extra = image_places(manifest(cls_kept=True), of(0, 0, 15))
    assert extra.places is not None
    assert extra.places.tolist() == [0, 0, 15]


def test_several_images_end_with_a_newline() -> None:
    where = several_places(manifest(cls_tower=False), of(3, 7), newline=True)
    assert where.places is not None
    assert where.places.tolist() == [3, 7, 16]
    assert where.span == 17
    assert several_places(manifest(cls_tower=False), of(3), newline=False).span == 17


def test_a_clip_s_frames_follow_each_other_and_can_be_taken_apart() -> None:
    positions = np.stack([of(1, 2), of(0, 15)])
    where = clip_places(manifest(), positions, closing=False)
    assert where.places is not None
    assert where.places.tolist() == [1, 2, 16, 31]
    assert where.span == 32
    frames = frame_places(where, 2)
    assert [each.places.tolist() for each in frames if each.places is not None] == [[1, 2], [0, 15]]
    assert [each.span for each in frames] == [16, 16]
    closed = clip_places(manifest(cls_tower=False), positions, closing=True)
    assert closed.places is not None
    assert closed.places.tolist() == [1, 2, 16, 31, 32]
    assert closed.span == 33


def test_a_bundle_that_does_not_say_has_no_places() -> None:
    assert image_places(manifest(span=None), None) == UNKNOWN
    assert clip_places(manifest(span=None), None, closing=True) == UNKNOWN
    kept = np.zeros((2, 1), np.int64)
    assert tile_places(manifest(span=None), None, kept, (1, 1), (4, 4)) == UNKNOWN


def test_a_picture_that_is_shrunk_has_no_places_but_a_span() -> None:
    positions = np.zeros((5, 1), np.int64)
    found = manifest(cls_tower=False, max_tiles=1)
    where = tile_places(found, positions, positions, (2, 2), (100, 100))
    assert where.places is None
    assert where.span is not None


def test_positions_of_a_prompt() -> None:
    """Rows at their places, text behind the whole span; images one after the other."""
    ids = [1, 5, IMAGE, IMAGE, 6, IMAGE, 7, 8]
    parts = (Places(of(0, 3), 5), Places(of(2), 4))
    #                               5 places            4 places
    assert along(ids, IMAGE, parts).tolist() == [0, 1, 2, 5, 7, 10, 12, 13]
    assert left_out(parts) == 9 - 3


def test_positions_that_go_back_are_refused() -> None:
    check_ascending("llm", of(0, 2, 2, 5))
    with refused(InvalidInputError, got=("position 1", "behind 2"), cure="sort"):
        check_ascending("llm", of(0, 2, 1))


def shown(*encoded: Any, positions: Any = None, unable: str | None = None, **spec: Any) -> Any:
    tokens = TokenSpec(None, WIDTH, IMAGE, **{"placed": True, "positions": "original", **spec})
    return check_shown(
        "llm",
        list(encoded),
        frames=None,
        tokens=tokens,
        hidden_size=WIDTH,
        takes_videos=False,
        positions=positions,
        unable=unable,
    )


def encoded(places: Any, span: Any = 16, rows: int = 3) -> EncodedImage:
    embeds = np.arange(rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH)
    return EncodedImage(embeds, np.zeros((1, 1), np.int64), where=Places(places, span))


def test_rows_are_sorted_by_place_and_stay_published_where_they_are_consecutive() -> None:
    tokens = encoded(of(7, 2, 2))
    original = shown(tokens)
    assert original.positions == "original"
    assert original.where[0].places.tolist() == [2, 2, 7]
    np.testing.assert_array_equal(original.parts[0], tokens.embeds[[1, 2, 0]])
    for consecutive in (shown(tokens, positions="consecutive"), original.published):
        assert consecutive.positions == "consecutive"
        assert consecutive.where is None
        np.testing.assert_array_equal(consecutive.parts[0], tokens.embeds)


@pytest.mark.parametrize(
    ("places", "span", "got"),
    [
        (of(0, 1, 16), 16, "place 16 for row 2"),
        (of(0, -1, 2), 16, "place -1 for row 1"),
        (of(0, 1), 16, "int64 [2]"),
        (of(0, 1, 2).astype(np.int32), 16, "int32 [3]"),
        ([0, 1, 2], 16, "list [3]"),
        (of(0, 1, 2), 0, "span of 0"),
        (of(0, 1, 2), None, "span of None"),
    ],
)
def test_places_that_are_none_are_refused(places: Any, span: Any, got: str) -> None:
    for positions in (None, "original", "consecutive"):
        with refused(InvalidInputError, got=("image 1", got)):
            shown(encoded(of(0, 1, 2)), encoded(places, span), positions=positions)


def test_original_positions_of_rows_alone_are_refused_and_by_default_they_are_consecutive() -> None:
    rows = encoded(of(0, 1, 2)).embeds
    assert shown(rows).positions == "consecutive"
    with refused(InvalidInputError, got="without their places", cure="embeds alone"):
        shown(rows, positions="original")
    old = encoded(None, None)
    assert shown(old, placed=False).positions == "consecutive"
    with refused(InvalidInputError, expected="token_positions", cure="export it again"):
        shown(old, placed=False, positions="original")
    with refused(InvalidInputError, got="'both'", expected="'consecutive'"):
        shown(rows, positions="both")


def test_an_llm_that_cannot_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    say_consecutive.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert shown(encoded(of(0, 1, 2)), unable="it is a server").positions == "consecutive"
    assert [record.getMessage().count("it is a server") for record in caplog.records] == [1]
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # a picture without places: said, and not refused
        found = shown(encoded(None, 16), positions="original")
    assert found.positions == "consecutive"
    assert "shrinks" in caplog.text
    caplog.clear()
    other = shown(encoded(of(0, 1, 2)), positions="consecutive", unable="it is a server")
    assert other.positions == "consecutive"
    assert not caplog.records
