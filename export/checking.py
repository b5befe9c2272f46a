"""`vzip check`: the parity check of a bundle that is already on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vzip.export.architecture import Media
from vzip.export.parity.compare import UntouchedModel
from vzip.export.pipeline import WeightSource
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import update_manifest
from vzip.runtime.errors import CheckpointError
from vzip.runtime.pictures.images import ImageSource


def check_bundle(
    path: str | os.PathLike[str], images: Sequence[ImageSource], *, projector: Path | None
) -> Bundle:
    """Check a bundle against the model that its manifest names, and record the numbers.

    Args:
        path: The bundle.
        images: What to check on.
        projector: The tuned projector, if the bundle was made with one.

    Returns:
        The bundle with the new numbers in its manifest, whatever the verdict.

    Raises:
        CheckpointError: The model can't be found, or the projector is not the bundle's.
        BundleError: The bundle is not whole.
    """
    bundle = read_bundle(path)
    model = bundle.manifest.model
    if model.projector is not None and projector is None:
        raise CheckpointError(
            f"{path} was made with a tuned projector (SHA-256 {model.projector[:12]}…) and "
            "none was given",
            expected="--projector FILE with that file",
        )
    if model.projector is None and projector is not None:
        raise CheckpointError(
            f"{path} was made with the model's own projector, and {projector} was given",
            cure="leave out --projector",
        )
    media: Media = "image" if "image" in bundle.manifest.media else "video"
    weights, found = WeightSource(model.id, model.revision, model.seed, projector, media).load()
    if found.projector != model.projector:
        raise CheckpointError(
            f"the projector {projector} has SHA-256 {str(found.projector)[:12]}…",
            expected=f"{str(model.projector)[:12]}…, with which {path} was made: give that file",
        )
    result = UntouchedModel(weights, images).compare(bundle)
    return update_manifest(bundle, parity=result.to_json())
