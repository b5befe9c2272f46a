"""`vzip check`: the parity check of a bundle that is already on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vzip.export import EXPORT_PACKAGES
from vzip.export.architecture import Media
from vzip.export.pictures import reference_images
from vzip.export.pictures.glance import Glance
from vzip.export.pipeline import WeightSource
from vzip.runtime import console
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.bundle.writer import check_writable, update_manifest
from vzip.runtime.errors import BundleError, CheckpointError, require
from vzip.runtime.guard import door
from vzip.runtime.pictures.images import ImageSource, load_image


@door(BundleError, "the bundle '{bundle}' can't be checked", reads=False)
def check(
    bundle: str | os.PathLike[str],
    images: Sequence[ImageSource] | None = None,
    *,
    projector: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = console.say,
) -> Bundle:
    """Compare a bundle's graph with the model that its manifest names, as ``vzip check`` does.

    The graph runs beside the untouched Hugging Face tower and projector and a slow oracle of
    VisionZip. The numbers go into the bundle's manifest, whatever the verdict.

    Args:
        bundle: The folder.
        images: Pictures to compare on, arrays red first; None takes vzip's own.
        projector: The file with the tuned projector, if the bundle was made with one.
        say: Told, in a line, which limits were missed and by what, if any was; and of pictures
            that prove little.

    Returns:
        The bundle; ``manifest.parity`` has the numbers and the verdict ``passed``.

    Raises:
        CheckpointError: The model can't be found, or the projector is not the bundle's.
        BundleError: The bundle is not whole, or can't be written to.
        InvalidInputError: An image can't be used.
        MissingDependencyError: A package of the extra ``export`` is not installed.
    """
    require(*EXPORT_PACKAGES, needed_for="a parity check", extra="export")
    from vzip.export.parity.compare import UntouchedModel

    path, found = Path(bundle), read_bundle(bundle)
    model = found.manifest.model
    if model.projector is not None and projector is None:
        raise CheckpointError(
            "no projector was given",
            expected=f"the tuned one, SHA-256 {model.projector[:12]}…, that {path} was made with",
            cure="give that file with --projector FILE",
        )
    if model.projector is None and projector is not None:
        raise CheckpointError(
            f"the projector {projector} was given",
            expected=f"none, since {path} was made with the model's own",
            cure="leave out --projector",
        )
    check_writable(found)
    media: Media = "image" if "image" in found.manifest.media else "video"
    file = None if projector is None else Path(projector)
    weights, read = WeightSource.of(model, projector=file, media=media).load()
    if read.projector != model.projector:
        raise CheckpointError(
            f"the projector {projector} has SHA-256 {str(read.projector)[:12]}…",
            expected=f"{str(model.projector)[:12]}…, with which {path} was made",
            cure="give that file",
        )
    pictures = reference_images() if images is None else images
    if images and all(Glance.of(load_image(image)).flat for image in images):
        say(f"{path} is checked on flat pictures alone, one colour all over: it proves little")
    result = UntouchedModel(weights, pictures, found.manifest.precision).compare(found)
    checked = update_manifest(found, parity=result.to_json())
    if not result.passed:
        say(f"{path} misses the gate of {found.manifest.precision}: {'; '.join(result.short)}")
    return checked
