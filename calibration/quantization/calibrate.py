"""A bundle quantised from its own graph: `vzip.calibration.calibrate`, and `vzip calibrate`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from vzip.runtime import console
from vzip.runtime.agreement import missed_shown
from vzip.runtime.bundle.manifest import DATA_FILE, MODEL_FILE, FileEntry
from vzip.runtime.bundle.precision_record import PrecisionRecord, report_file
from vzip.runtime.errors import BackendError, BundleError, require
from vzip.runtime.guard import door

if TYPE_CHECKING:
    from vzip.calibration.quantization.quantize import Quantised, Report
    from vzip.calibration.samples import Samples
    from vzip.runtime.bundle.reader import Bundle


@door(BackendError, "the bundle '{bundle}' can't be calibrated", reads=False)
def calibrate(
    bundle: str | os.PathLike[str],
    images: str,
    *,
    precision: Literal["int8", "fp8"],
    count: int | None = None,
    method: Literal["error", "minmax", "percentile", "entropy", "mse"] = "error",
    smooth: float | None = 0.5,
    min_agreement: float | None = 0.95,
    min_cosine: float | None = 0.995,
    say: Callable[[str], None] = console.say,
) -> tuple[Bundle, Report]:
    """Quantise a bundle's linear layers, and put the graph into the bundle beside its own.

    Args:
        bundle: The bundle's folder.
        images: Images like those that will be asked about: a folder, a text file with one path a
            line, or ``demo`` for the demo's generator. One in five is held apart to judge by.
        precision: ``int8``; or ``fp8``, for GPUs from SM 8.9 on.
        count: How many of the images; None for all.
        method: ``error``: each layer's form and range are searched for by the error of its output.
            Otherwise all have one form, and this is how the range of a layer's input is chosen.
        smooth: How much of the difficulty of outliers goes from inputs into weights, above 0 and
            below 1; None for nothing.
        min_agreement: Mean share of the kept tokens that must stay, above 0 and at most 1; None for
            no limit. As many layers as that takes stay in high precision.
        min_cosine: Mean cosine with the own graph's tokens, likewise.
        say: Told, in lines, what goes on.

    Returns:
        The bundle at the new precision, and what was lost and where.

    Raises:
        InvalidInputError: Images or options can't be used: all images are flat or show the same.
        ParityError: The limits can't be kept.
        BundleError: The bundle is damaged, can't be written, or was exported anew meanwhile.
        BackendError: The quantised graph can't be run.
        MissingDependencyError: The extra ``export`` is not installed.
    """
    from vzip.runtime.bundle.reader import read_bundle

    opened = read_bundle(bundle, verify=False)  # what reads the graph verifies it
    parity = opened.manifest.parity
    if parity is not None and parity["passed"] is not True:
        say(
            f"warning: {opened.path}: its graph failed its parity check "
            f"({missed_shown(parity, opened.manifest)}); what is made of it is as wrong"
        )
    if not os.access(opened.path, os.W_OK):
        raise BundleError(
            f"{opened.path}: the folder is read-only for this user, and the quantised graph "
            "goes there",
            cure="copy the bundle to a folder that you may write to",
        )
    require(
        "ml_dtypes", "onnx", "onnx_ir", "onnxruntime", needed_for="'vzip calibrate'", extra="export"
    )
    from vzip.export.engines.published import check_changeable

    check_changeable(opened)
    from vzip.calibration.quantization.quantize import quantize
    from vzip.calibration.quantization.recipe import Recipe
    from vzip.calibration.samples import Samples
    from vzip.calibration.variety import check_variety

    recipe = Recipe(
        precision=precision,
        method=method,
        smoothing=smooth,
        keep_agreement=min_agreement,
        keep_cosine=min_cosine,
    )
    samples = Samples.open(images, count=count, prep=opened.manifest.preprocessing)
    if samples.left_out:
        say(samples.describe_left_out())
    check_variety(*samples.split(), say)
    made = quantize(opened, samples, recipe, step=say)
    return publish(opened, made, samples), made.report


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
    from vzip.export.engines.published import build_lock
    from vzip.runtime.bundle.precision_writer import precision_writer
    from vzip.runtime.bundle.reader import read_bundle
    from vzip.runtime.encoder import VisionEncoder

    with build_lock(bundle, console.say):
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
            file = writer.folder / report_file(made.precision)
            file.write_text(report + "\n", encoding="utf-8")
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


def _own(bundle: Bundle) -> Mapping[str, FileEntry]:
    """Return the entries of a bundle's own graph."""
    files = bundle.manifest.files
    return {name: files[name] for name in (MODEL_FILE, DATA_FILE) if name in files}
