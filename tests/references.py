"""The reference of a golden bundle: what it must compute, which a real proof can be held to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import bundle_writer

Arrays = Mapping[str, NDArray[Any]]


def with_reference(path: Path, golden: Arrays, **other: NDArray[Any]) -> Bundle:
    """Give a golden bundle a reference.npz, in which `other` stands in the place of what is right.

    The scores are such that what is kept is what must be.
    """
    manifest = read_bundle(path).manifest
    scores = np.ones((len(golden["kept"]), manifest.tower.tokens - 1), np.float32)
    for row, kept in zip(scores, golden["kept"], strict=True):
        row[kept[1:] - 1] = 9.0
    arrays = {
        "input": golden["images" if manifest.input.name == "image" else "pixel_values"],
        "kept": golden["kept"],
        "scores": scores,
        "embeds": golden["embeds"].astype(np.float32),
        **other,
    }
    with bundle_writer(path, replace=True) as writer:
        for name in manifest.files:
            (writer.folder / name).write_bytes((path / name).read_bytes())
        np.savez(writer.folder / "reference.npz", **arrays)  # type: ignore[arg-type]
        return writer.publish(manifest)


def answers(golden: Arrays, feeds: Arrays, embeds: NDArray[Any] | None = None) -> dict[str, Any]:
    """Return what a graph must give for some of the golden images; `embeds` in place of theirs."""
    (array,), images = feeds.values(), golden["images"]
    places = [[np.array_equal(x, image) for x in images].index(True) for image in array]
    embeds = golden["embeds"] if embeds is None else embeds
    return {EMBEDS: embeds[places].astype(np.float32), KEPT: golden["kept"][places]}
