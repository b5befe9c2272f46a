"""`vzip calibrate`: a quantised graph beside a bundle's own; nothing heavy is imported for `-h`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vzip.calibration.cli.options import add_images
from vzip.runtime.bundle.manifest import DATA_FILE, MODEL_FILE
from vzip.runtime.bundle.precision_record import QUANTISED, files_of
from vzip.runtime.cli.options import Parser, add_bundle, add_threads
from vzip.runtime.console import emit, emit_json
from vzip.runtime.wording import counted

if TYPE_CHECKING:
    from vzip.calibration.quantization.quantize import LayerReport, Report
    from vzip.runtime.bundle.reader import Bundle

_NONE = "none"


RENAMED = {
    "--keep-agreement": "--min-agreement",
    "--keep-cosine": "--min-cosine",
}
"""Old name of an option → its name today."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Quantise a bundle's linear layers, put the graph into the bundle, and print what it lost."""
    arguments = _parser(prog).read(argv)
    from vzip.calibration import calibrate

    bundle, report = calibrate(
        arguments.bundle,
        arguments.images,
        precision=arguments.precision,
        count=arguments.count,
        method=arguments.method,
        smooth=arguments.smooth,
        min_agreement=arguments.min_agreement,
        min_cosine=arguments.min_cosine,
    )
    if arguments.json:
        emit_json(report.to_json())
    else:
        for line in table(bundle, report):
            emit(line)
    return 0


def table(bundle: Bundle, report: Report) -> Iterator[str]:
    """Yield what `vzip calibrate` prints: what stays in high precision and why, and what was lost.

    Args:
        bundle: With the quantised graph, at its precision.
        report: Of the calibration.
    """
    own, agreement = bundle.manifest.precision, report.agreement
    high = [layer for layer in report.layers if not layer.quantised]
    graph = f"{bundle.graph_file}: {_mib(bundle, bundle.precision)} MiB, opset {report.opset}"
    apart = counted(report.held_apart, "other")
    images = f"{counted(report.calibrated, 'image')} calibrated on, {apart} to judge by"
    least, lowest = f"{agreement.min_overlap:.4f}", f"{agreement.every.lowest:.6f}"
    memory = f"at most {report.peak_bytes / 2**30:.1f} GiB of memory"
    rows = [
        ("graph", f"{graph}; in {own} it has {_mib(bundle, None)} MiB"),
        ("samples", images),
        ("recipe", _recipe(report)),
        (
            "quantised",
            f"{len(report.layers) - len(high)} of {counted(len(report.layers), 'linear layer')}",
        ),
        ("8 bits", f"{report.eight_bits:.1%} of the linear layers' multiplications"),
        *_without_limits(report, high),
        *((f"in {own}", f"{layer.name}: {layer.reason}") for layer in high),
        ("overlap", f"{agreement.mean_overlap:.4f} of the kept tokens stay (at worst {least})"),
        ("cosine", f"{agreement.every.mean:.6f} on average (at worst {lowest})"),
        ("took", f"{report.seconds:.0f} s on {counted(report.threads, 'core')}, {memory}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        yield f"{name:<{width}}{value}"


def _without_limits(report: Report, high: Sequence[LayerReport]) -> Iterator[tuple[str, str]]:
    """Yield what all layers quantised would lose, which is why some are not."""
    if high and report.unrefined is not None:
        overlap, cosine = report.unrefined.mean_overlap, report.unrefined.every.mean
        yield "all of them", f"would have an overlap of {overlap:.4f} and a cosine of {cosine:.6f}"


def _recipe(report: Report) -> str:
    recipe = report.recipe
    smoothing = "no smoothing" if recipe.smoothing is None else f"smoothing {recipe.smoothing}"
    limits = [
        f"{name} of at least {limit}"
        for name, limit in (("overlap", recipe.keep_agreement), ("cosine", recipe.keep_cosine))
        if limit is not None
    ]
    return f"{recipe.precision}, {recipe.method}, {smoothing}, {' and '.join(limits) or 'no limit'}"


def _mib(bundle: Bundle, precision: str | None) -> str:
    """Return the size of a graph with its weights."""
    at, files = bundle.at(precision), bundle.manifest.files
    names = (MODEL_FILE, DATA_FILE) if at.quantised is None else files_of(at.quantised)[:2]
    size = sum(files[name].bytes for name in names if name in files)
    return f"{size / 2**20:.1f}"


def number(text: str) -> float | None:
    """Return a number that an option takes, or None where it says so."""
    return None if text == _NONE else float(text)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Quantise the linear layers of a bundle's graph by what representative images "
        "show, leave in high precision just the layers that must stay so, and put the graph into "
        "the bundle, beside its own.",
        table=True,
        renamed=RENAMED,
    )
    add_bundle(parser)
    add_images(parser, required=True)
    parser.add_argument(
        "--precision",
        required=True,
        choices=QUANTISED,
        help="int8; or fp8, for GPUs from SM 8.9 (Ada, Hopper) on",
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="how many of the images, chosen at random but always the same; one in five is held "
        "apart to judge by, and 80 are mostly enough (default: all)",
    )
    parser.add_argument(
        "--method",
        default="error",
        choices=("error", "minmax", "percentile", "entropy", "mse"),
        help="error: each layer's form and range are searched for by the error of its output; with "
        "the others all have one form, and this is how ranges are chosen (default: %(default)s)",
    )
    parser.add_argument(
        "--smooth",
        type=number,
        default=0.5,
        metavar="A",
        help="how much of the difficulty of outliers goes from inputs into weights, above 0 and "
        "below 1, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--min-agreement",
        type=number,
        default=0.95,
        metavar="X",
        help="mean share of the kept tokens that must stay, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--min-cosine",
        type=number,
        default=0.995,
        metavar="X",
        help="mean cosine that the tokens must keep, or none (default: %(default)s)",
    )
    add_threads(parser)
    return parser
