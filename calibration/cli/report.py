"""`vzip report`: a bundle in one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.calibration.cli.options import add_images
from vzip.calibration.reporting.report import IMAGES, report
from vzip.runtime.cli.options import Parser, add_bundle, add_output, add_threads
from vzip.runtime.console import emit


def main(argv: Sequence[str], *, prog: str) -> int:
    """Measure a bundle and write its report, and print the path."""
    parser = Parser(
        prog,
        "Write one HTML page about a bundle. It opens without a network and shows the bundle's "
        "facts, parity, the loss in each precision and layer, the kept patches of some images, "
        "latency here, the demo model's accuracy, and the language model's savings.",
    )
    add_bundle(parser)
    add_images(parser, default=" (default: vzip's two photographs; demo for the demo model)")
    parser.add_argument(
        "--count",
        type=int,
        default=IMAGES,
        metavar="N",
        help="how many of the images, at most 12 (default: %(default)s)",
    )
    add_output(parser, "FILE.html", "the page to write")
    add_threads(parser)
    arguments = parser.read(argv)
    page = report(
        arguments.bundle,
        arguments.output,
        images=arguments.images,
        count=arguments.count,
    )
    emit(str(page))
    return 0
