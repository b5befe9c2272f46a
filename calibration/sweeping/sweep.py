"""Budgets side by side: `vzip.calibration.sweep`, and `vzip sweep`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vzip.calibration.demo.digits import lacking
from vzip.calibration.samples import images_of
from vzip.calibration.sweeping.advice import Advice, SweepLimits, advise
from vzip.export import EXPORT_PACKAGES
from vzip.export.algorithm.budget import Budget, Merge
from vzip.export.pages import figures
from vzip.runtime import console
from vzip.runtime.errors import BackendError, InvalidInputError, require
from vzip.runtime.files import outputs
from vzip.runtime.guard import door
from vzip.runtime.models import DEMO, locate

if TYPE_CHECKING:
    from vzip.calibration.sweeping.measure import Sweep
    from vzip.export.architecture import VisionConfig

TEXT_TOKENS: Final = 64
"""LLaVA-1.5's prompt without its image has about forty tokens, a question some twenty."""

FILES: Final = ("sweep.md", "sweep.json", "sweep.svg", "sweep.png")
"""What is written into the folder, in this order."""

PLOT: Final = "the plot of a sweep"


@dataclass(frozen=True)
class Swept:
    """What `sweep` found.

    Attributes:
        result: Everything that was measured.
        advice: The budget that meets the limits; None where there are no limits.
        files: What was written.
    """

    result: Sweep
    advice: Advice | None
    files: Sequence[Path]

    def to_json(self) -> dict[str, Any]:
        """Return what was measured, with the advice, as values that `json` writes."""
        advice = None if self.advice is None else self.advice.to_json()
        return {**self.result.to_json(), "advice": advice}


@door(BackendError, "'{model}' can't be swept", reads=False)
def sweep(
    model: str,
    tokens: Sequence[int],
    *,
    merges: Sequence[Merge] = ("average",),
    images: str | None = None,
    count: int | None = None,
    text_tokens: int = TEXT_TOKENS,
    max_latency_ms: float | None = None,
    max_prefill_gflops: float | None = None,
    min_accuracy: float | None = None,
    min_agreement: float | None = None,
    output: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    say: Callable[[str], None] = console.say,
) -> Swept:
    """Measure several budgets and merges of a model side by side, and recommend one.

    Args:
        model: An alias, a hub id, or a local folder.
        tokens: Budgets, each of an image, a tile or a frame, split 27:5 as in the paper.
        merges: How contextual tokens are formed; each budget is measured with each.
        images: Images like those that will be asked about: a folder, a text file with one path a
            line, or ``demo`` for the demo's generator. None for the demo's generator where the
            model is the demo, else for vzip's two photographs.
        count: How many of the images; None for all, and for 16 of the demo's generator.
        text_tokens: Tokens of prompt and question beside the image's.
        max_latency_ms: Limit of the encoder's median latency on this machine, milliseconds.
        max_prefill_gflops: Limit of the LLM's predicted prefill, 10⁹ operations.
        min_accuracy: Least share of the demo's questions answered right, from 0 to 1.
        min_agreement: Least agreement with all tokens, from 0 to 1.
        output: A folder for sweep.md, sweep.json, sweep.svg and sweep.png; None to write nothing.
        revision: Commit, branch or tag of a hub id.
        say: Told, in lines, what goes on.

    Returns:
        What was measured, the advice that follows from the limits, and the files.

    Raises:
        InvalidInputError: A limit, an image or the output can't be used.
        BudgetError: A budget doesn't fit the tower.
        CheckpointError: The checkpoint isn't there, isn't known, or lacks the LLM's sizes.
        BackendError: ONNX Runtime failed.
        MissingDependencyError: The extra ``export`` is not installed.
    """
    limits = SweepLimits(max_latency_ms, max_prefill_gflops, min_accuracy, min_agreement)
    model_id = locate(model).model_id
    if min_accuracy is not None and model_id != DEMO:
        raise InvalidInputError(
            f"min_accuracy (--min-accuracy) is {min_accuracy:g} for '{model}'",
            cause=f"only the model '{DEMO}' comes with questions to answer",
            cure="give min_agreement (--min-agreement) instead",
        )
    if not tokens:
        raise InvalidInputError("got no tokens", expected="one budget or more (--tokens)")
    if not merges:
        raise InvalidInputError("got no merges", expected="average, sum or both (--merges)")
    if text_tokens < 0:
        raise InvalidInputError(
            f"text_tokens (--text-tokens) is {text_tokens}", expected="0 or more"
        )
    folder = None if output is None else outputs.check_folder(output)
    require(*EXPORT_PACKAGES, needed_for="'vzip sweep'", extra="export")
    asked = model_id == DEMO
    if asked and (error := lacking("the accuracy on the demo's questions")) is not None:
        if min_accuracy is not None:
            raise error
        asked = False
        say(f"warning: no accuracy is measured: {error}")
    if folder is not None and (error := figures.lacking(PLOT)) is not None:
        say(f"warning: no plot will be drawn: {error}")
    from vzip.calibration.sweeping.measure import measure
    from vzip.export.checkpoint.reader import Checkpoint

    config = Checkpoint.open(model, revision=revision).vision()
    budgets = _budgets(config, tokens, merges)
    written = [] if folder is None else [folder / name for name in FILES]
    source, shown = images_of(
        images,
        model=model_id,
        count=count,
        say=say,
        written=written,
        prep=config.preprocessing,
    )
    result = measure(
        model,
        budgets,
        shown,
        revision=revision,
        source=source,
        text_tokens=text_tokens,
        asked=asked,
        step=lambda name: say(f"{name} …"),
    )
    advice = advise(result.rows, limits) if limits.any else None
    found = Swept(result, advice, ())
    return found if folder is None else Swept(result, advice, _write(found, folder, say))


def _budgets(config: VisionConfig, tokens: Sequence[int], merges: Sequence[Merge]) -> list[Budget]:
    """Return the budgets by size, each with every merge, as far as the tower takes CLS along."""
    return [
        Budget.from_options(config, tokens=each, merge=merge)
        for each in sorted(set(tokens))
        for merge in dict.fromkeys(merges)
    ]


def _write(found: Swept, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Write table and JSON first, and then plots, where matplotlib is installed."""
    from vzip.calibration.sweeping.output import plot, table

    record = json.dumps(found.to_json(), indent=1, allow_nan=False)
    shown = table(found.result, found.advice)
    try:
        written = outputs.write_folder(folder, {FILES[0]: shown, FILES[1]: record + "\n"})
    except InvalidInputError:
        say(shown)  # it took minutes, and is lost otherwise
        raise
    if figures.lacking(PLOT) is None:
        for name in FILES[2:]:
            drawn = plot(found.result, found.advice, "svg" if name.endswith("svg") else "png")
            written += outputs.write_folder(folder, {name: drawn})
    return written
