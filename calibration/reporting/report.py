"""A bundle in one HTML page: `vzip.calibration.report`, and `vzip report`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vzip.calibration.demo.digits import lacking
from vzip.calibration.reporting import MOST_IMAGES
from vzip.calibration.samples import images_of
from vzip.export.pages import rendering
from vzip.runtime import console
from vzip.runtime.errors import BundleError, InvalidInputError, require
from vzip.runtime.files import outputs
from vzip.runtime.guard import door
from vzip.runtime.models import DEMO
from vzip.runtime.wording import counted

IMAGES: Final = 4
"""Images in a report where nothing else is asked for."""


@door(BundleError, "no report of the bundle '{bundle}' can be made", reads=False)
def report(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    images: str | None = None,
    count: int = IMAGES,
    say: Callable[[str], None] = console.say,
) -> Path:
    """Measure a bundle and write one HTML page about it, which opens without a network.

    Args:
        bundle: The bundle's folder.
        output: The page to write, ``….html``.
        images: Images to show and to compare precisions on: a folder, a text file with one path a
            line, or ``demo`` for the demo's generator. None for the demo's generator where the
            bundle is the demo model's, else for vzip's two photographs.
        count: How many of the images, at most 12.
        say: Told, in lines, what goes on.

    Returns:
        The page's path.

    Raises:
        InvalidInputError: The output can't be written, or the images can't be used.
        BundleError: The bundle is damaged.
        BackendError: A precision can't be run.
        MissingDependencyError: The extra ``export`` is not installed.
    """
    page_file = outputs.check_file(output, ".html", ".htm")
    if not 1 <= count <= MOST_IMAGES:
        raise InvalidInputError(
            f"count (--count) asks for {counted(count, 'image')}",
            expected=f"1 to {MOST_IMAGES}: each is in the page once for every precision",
        )
    require("torch", "transformers", "onnxruntime", needed_for="'vzip report'", extra="export")
    if (error := rendering.lacking("'vzip report'")) is not None:
        raise error
    from vzip.calibration.reporting.content import gather
    from vzip.calibration.reporting.page import page
    from vzip.runtime.bundle.reader import read_bundle

    opened = read_bundle(bundle, verify=False)  # what runs is verified when it is opened
    model = opened.manifest.model
    asked = model.id == DEMO and model.weights == "checkpoint"
    unasked = ""
    if asked and (error := lacking("the accuracy on the demo's questions")) is not None:
        unasked = str(error)
        say(f"warning: no accuracy is measured: {error}")
    source, shown = images_of(
        images,
        model=model.id,
        count=count,
        say=say,
        shuffled=False,
        written=[page_file],
        prep=opened.manifest.preprocessing,
    )
    content = gather(
        opened, shown, source=source, unasked=unasked, step=lambda name: say(f"{name} …")
    )
    outputs.write_file(page_file, page(content))
    return page_file
