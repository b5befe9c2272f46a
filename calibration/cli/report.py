"""`vzip report`: a bundle in one HTML page; nothing heavy is imported for `-h`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzip.runtime.cli.options import Parser, add_bundle, add_output
from vzip.runtime.console import emit, say
from vzip.runtime.errors import require
from vzip.runtime.files import outputs
from vzip.runtime.models import DEMO

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle
    from vzip.runtime.pictures.images import ImageSource

IMAGES = 4
"""Images in a report where nothing else is asked for."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure a bundle and write its report, and print the path.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        The exit status.
    """
    arguments = _parser(prog).read(argv)
    output = outputs.check_file(arguments.output, ".html", ".htm")
    require("torch", "transformers", "onnxruntime", needed_for=f"'{prog}'", extra="export")
    from vzip.calibration.reporting.page import page
    from vzip.calibration.reporting.report import gather
    from vzip.runtime.bundle.reader import read_bundle

    bundle = read_bundle(arguments.bundle, verify=False)  # what runs is verified when it is opened
    source, images = _images(bundle, arguments.images, arguments.count)
    content = gather(bundle, images, source=source, step=lambda name: say(f"{name} …"))
    outputs.write_file(output, page(content).encode())
    emit(str(output))
    return 0


def _images(
    bundle: Bundle, source: str | None, count: int
) -> tuple[str, list[tuple[str, Callable[[], ImageSource]]]]:
    """Return what the images are, and each one's name and reader."""
    from vzip.calibration.samples import Samples

    if source is None and bundle.manifest.model.id == DEMO:
        source = DEMO
    if source is None:
        from vzip.export.pictures import reference_images

        return "vzip's own photographs", [(p.name, _opened(p)) for p in reference_images()]
    samples = Samples.open(source, count=count)
    if samples.left_out:
        say(samples.describe_left_out())
    return source, [(each.name, each.read) for each in samples]


def _opened(path: Path) -> Callable[[], ImageSource]:
    return lambda: path


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Write one HTML page about a bundle that opens without a network: its facts, "
        "parity, what each precision and layer costs, what is kept of some images, latency here, "
        "accuracy for the demo model, and what the language model is saved.",
    )
    add_bundle(parser)
    parser.add_argument(
        "--images",
        metavar="FOLDER|LIST|demo",
        help="images to show and compare precisions on: a folder, a text file with one path a "
        "line, or the demo's generator (default: vzip's two photographs; demo for the demo model)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=IMAGES,
        metavar="N",
        help="how many of the images, at most 12 (default: %(default)s)",
    )
    add_output(parser, "FILE.html", "the page to write")
    return parser
