"""`vzip calibrate`: a quantised graph beside a bundle's own; nothing heavy is imported for `-h`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vzip.runtime.bundle.manifest import DATA_FILE, MODEL_FILE, FileEntry
from vzip.runtime.bundle.precision_record import QUANTISED, PrecisionRecord, files_of, report_file
from vzip.runtime.cli.options import Parser, add_bundle
from vzip.runtime.console import emit, emit_json, say
from vzip.runtime.errors import BundleError, require

if TYPE_CHECKING:
    from vzip.calibration.quantization.quantize import LayerReport, Quantised, Report
    from vzip.calibration.samples import Samples
    from vzip.runtime.bundle.reader import Bundle

_NONE = "none"


def main(argv: Sequence[str], *, prog: str) -> int:
    """Quantise a bundle's linear layers, put the graph into the bundle, and print what it lost.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        The exit status.
    """
    arguments = _parser(prog).read(argv)
    from vzip.runtime.bundle.reader import read_bundle

    bundle = read_bundle(arguments.bundle, verify=False)  # what reads the graph verifies it
    if not os.access(bundle.path, os.W_OK):
        raise BundleError(
            f"{bundle.path}: the folder is read-only for this user, and the quantised graph "
            "goes there",
            cure="copy the bundle to a folder that you may write to",
        )
    require("ml_dtypes", "onnx", "onnxruntime", needed_for=f"'{prog}'", extra="export")
    from vzip.calibration.quantization.quantize import quantize
    from vzip.calibration.quantization.recipe import Recipe
    from vzip.calibration.samples import Samples

    recipe = Recipe(
        precision=arguments.precision,
        method=arguments.method,
        smoothing=arguments.smooth,
        keep_agreement=arguments.keep_agreement,
        keep_cosine=arguments.keep_cosine,
    )
    samples = Samples.open(arguments.images, count=arguments.count)
    if samples.left_out:
        say(samples.describe_left_out())
    made = quantize(bundle, samples, recipe, step=say)
    bundle = publish(bundle, made, samples)
    if arguments.json:
        emit_json(made.report.to_json())
    else:
        for line in table(bundle, made.report):
            emit(line)
    return 0


def publish(bundle: Bundle, made: Quantised, samples: Samples) -> Bundle:
    """Put a quantised graph and its report into the bundle that it was made from.

    It is run once from the files as they are written, on one batch of the samples, before the
    bundle has it. One process at a time changes a bundle; a second one waits.

    Args:
        bundle: The bundle that was quantised.
        made: What `quantize` returned.
        samples: What it was given.

    Returns:
        The bundle with the graph, at its precision.

    Raises:
        BundleError: The bundle was exported anew meanwhile, or can't be written; it is as it was.
        BackendError: The graph can't be run.
    """
    from vzip.export.engines.tensorrt.publish import build_lock
    from vzip.runtime.bundle.precision_writer import precision_writer
    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.encoder import VisionEncoder

    with build_lock(bundle, say):
        now = read_bundle(bundle.path, verify=False)
        if _own(now) != _own(bundle):
            raise BundleError(
                f"{bundle.path}: the bundle was exported anew while it was calibrated, so the "
                "quantised graph isn't of it any more",
                cure="calibrate it again",
            )
        with precision_writer(now, made.precision) as writer:
            made.save(writer.folder)
            report = json.dumps(made.report.to_json(), indent=2, allow_nan=False)
            (writer.folder / report_file(made.precision)).write_text(report + "\n")
            record = record_of(made)
            with VisionEncoder.open(writer.stage(record), backend="onnxruntime") as encoder:
                size = 1 if now.manifest.batch.dynamic else now.manifest.batch.max
                images = next(samples.batches(now.manifest, size))
                encoder.run(np.resize(images, (size, *images.shape[1:])))  # begins anew if short
            return writer.publish(record)


def record_of(made: Quantised) -> PrecisionRecord:
    """Return what the bundle's manifest says of a quantised graph."""
    report = made.report
    recipe = {name: value for name, value in report.recipe.to_json().items() if value is not None}
    agreement = report.agreement.to_json()
    return PrecisionRecord(
        opset=made.opset,
        samples_sha256=report.samples["digest"],
        images=report.samples["count"],
        recipe=recipe,
        agreement={name: value for name, value in agreement.items() if value is not None},
    )


def table(bundle: Bundle, report: Report) -> Iterator[str]:
    """Yield what `vzip calibrate` prints: what stays in high precision and why, and what was lost.

    Args:
        bundle: With the quantised graph, at its precision.
        report: Of the calibration.
    """
    own, agreement = bundle.manifest.precision, report.agreement
    high = [layer for layer in report.layers if not layer.quantised]
    graph = f"{bundle.graph_file}: {_mib(bundle, bundle.precision)} MiB, opset {report.opset}"
    images = f"{report.calibrated} images calibrated on, {report.held_apart} others to judge by"
    least, lowest = f"{agreement.min_overlap:.4f}", f"{agreement.every.lowest:.6f}"
    memory = f"at most {report.peak_bytes / 2**30:.1f} GiB of memory"
    rows = [
        ("graph", f"{graph}; in {own} it has {_mib(bundle, None)} MiB"),
        ("samples", images),
        ("recipe", _recipe(report)),
        ("quantised", f"{len(report.layers) - len(high)} of {len(report.layers)} linear layers"),
        *_without_limits(report, high),
        *((f"in {own}", f"{layer.name}: {layer.reason}") for layer in high),
        ("overlap", f"{agreement.mean_overlap:.4f} of the kept tokens stay (at worst {least})"),
        ("cosine", f"{agreement.every.mean:.6f} on average (at worst {lowest})"),
        ("took", f"{report.seconds:.0f} s on {report.threads} cores, {memory}"),
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


def _own(bundle: Bundle) -> Mapping[str, FileEntry]:
    """Return the entries of a bundle's own graph."""
    files = bundle.manifest.files
    return {name: files[name] for name in (MODEL_FILE, DATA_FILE) if name in files}


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
    )
    add_bundle(parser)
    parser.add_argument(
        "--images",
        required=True,
        metavar="FOLDER|LIST|demo",
        help="images like those that will be asked about: a folder, a text file with one path a "
        "line, or the demo's generator",
    )
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
        "apart to judge by, and 80 will mostly do (default: all)",
    )
    parser.add_argument(
        "--method",
        default="minmax",
        choices=("minmax", "percentile", "entropy", "mse"),
        help="how the range of a layer's input is chosen (default: %(default)s)",
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
        "--keep-agreement",
        type=number,
        default=0.95,
        metavar="X",
        help="mean share of the kept tokens that must stay, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-cosine",
        type=number,
        default=0.995,
        metavar="X",
        help="mean cosine that the tokens must keep, or none (default: %(default)s)",
    )
    return parser
