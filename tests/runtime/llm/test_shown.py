"""What a bundle promises of the tokens of one image and of one of several."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.bundles import tiled, with_newline
from tests.refusals import refused
from vzip.runtime.bundle.reader import read_bundle
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.llm.shown import TokenSpec, check_shown


def rows(count: int) -> np.ndarray:
    return np.ones((count, 6), np.float32)


@pytest.mark.parametrize(("order", "count"), [("reference", 7), ("newline", 8)])
def test_of_several_images_none_was_cut_where_the_model_cuts_one_alone(
    tmp_path, tiny_bundle, order, count
):
    for only_alone in (False, True):
        folder = tmp_path / str(only_alone)
        with_newline(folder, tiny_bundle, tiled(order, only_alone=only_alone))
        manifest = read_bundle(folder).manifest
        model = dataclasses.replace(manifest.model, weights="checkpoint", seed=None)
        tokens = TokenSpec.of(dataclasses.replace(manifest, model=model))

        def shown(*counts, tokens=tokens):
            parts = [rows(each) for each in counts]
            given = parts if len(parts) > 1 else parts[0]
            return check_shown(
                "x", given, frames=None, tokens=tokens, hidden_size=6, takes_videos=False
            )

        assert len(shown(35).parts[0]) == 35
        assert [len(part) for part in shown(count, count).parts] == [count, count]
        if only_alone:
            with refused(
                InvalidInputError,
                got=("image 1", "[35, 6]"),
                expected=f"[{count}, 6]",
                cure="image_embeds(image, several=True)",
            ):
                shown(count, 35)
        else:
            assert len(shown(count, 35).parts) == 2
