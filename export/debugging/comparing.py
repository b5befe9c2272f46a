"""`vzip debug`: an engine whose proof failed, traced to the tensor and operator that differ first.

The work is Polygraphy's, in `script.py`, which is copied beside what it needs into a folder that
can be sent to others. Each stage is a process of its own. No engine of vzip's is loaded, since
Polygraphy's loaders allow host code in engines: the right side is built anew from the graph.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from vzip.export.debugging import script
from vzip.runtime import console
from vzip.runtime.agreement.reference_file import load_reference
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.doctor.environment import gpus
from vzip.runtime.errors import BackendError, BundleError, InvalidInputError, require
from vzip.runtime.files import outputs
from vzip.runtime.guard import door
from vzip.runtime.machine.children import Ended, run_child

Side = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]

SIDES: Final[Mapping[Side, str]] = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "onnxruntime": "onnxruntime",
}
"""What the graph can be compared with → the module that it needs."""

PACKAGES: Final = ("polygraphy", "onnx_graphsurgeon", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Apart:
    """How far apart two sides may be and still agree; see `script.apart` and `script.beyond`.

    Not an engine's gate: what is judged here is not published, and rounding must not be hunted.

    Attributes:
        tolerance: Largest difference of a tensor, or of a token, relative to the magnitude.
        most_beyond: Share of the tokens that may be beyond it: in FP16 one or two of a picture are.
        least_overlap: Mean share of the kept tokens that both keep.
        least_cosine: Mean cosine of these.
        least_merged_cosine: Mean cosine of merged tokens.
    """

    tolerance: float
    most_beyond: float
    least_overlap: float
    least_cosine: float
    least_merged_cosine: float


_COARSE: Final = Apart(0.3, 0.05, 0.85, 0.98, 0.95)
APART: Final[Mapping[str, Apart]] = {
    "fp32": Apart(1e-3, 0.0, 0.99, 0.9999, 0.999),
    "fp16": Apart(0.05, 0.05, 0.85, 0.999, 0.98),
    "bf16": _COARSE,
    "int8": _COARSE,
    "fp8": _COARSE,
}
"""By the precision of the graph."""

STAGE_LIMIT_S: Final = 3600.0  # a Jetson compiles a 7B's tower for many minutes
REDUCE_LIMIT_S: Final = 12 * 3600.0  # and does so a dozen times or more

SCRIPT: Final = "debug.py"


@dataclass(frozen=True)
class Debugged:
    """What a comparison found.

    Attributes:
        folder: Where everything is.
        stages: Each stage that was asked for → what it found; or ``failed``, or ``not_here``, with
            the reason.
        differs: Whether the two sides differ; None where they could not be compared.
    """

    folder: Path
    stages: Mapping[str, Mapping[str, Any]]
    differs: bool | None


@door(BundleError, "the bundle '{bundle}' can't be debugged", reads=False)
def debug(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str | None = None,
    side: Side | None = None,
    layer: str | None = None,
    say: Callable[[str], None] = console.say,
) -> Debugged:
    """Compare a bundle's graph in ONNX Runtime with the same graph in TensorRT, tensor by tensor.

    The pictures are the bundle's own. Where the outputs differ, Polygraphy looks for the smallest
    part of the graph that still does. Without a GPU, TensorRT's part ends after the build, and ONNX
    Runtime is compared with itself, its optimisations switched off.

    Args:
        bundle: The folder of the bundle.
        output: A folder for inputs, script, graph and results; it is empty or not there.
        precision: Of the graph: ``int8`` or ``fp8``, which `vzip calibrate` made; None for the
            bundle's own.
        side: What ONNX Runtime is compared with; None for the first of `SIDES` that is installed.
        layer: An operator to cut out, by its name or a tensor's that it makes; None for the one
            that differs first.
        say: Told, in lines, what goes on and what was found.

    Returns:
        What was found.

    Raises:
        InvalidInputError: An option that doesn't fit, or a folder that isn't empty.
        BundleError: The bundle is damaged, or holds no reference.
        MissingDependencyError: A package of the extra ``debug`` is not installed.
    """
    folder = outputs.check_folder(output)
    if folder.is_dir() and any(folder.iterdir()):
        raise InvalidInputError(
            f"the output '{folder}' holds files", expected="an empty folder", cure="name a new one"
        )
    opened = read_bundle(bundle).at(precision)
    require(*PACKAGES, needed_for="vzip debug", extra="debug")
    chosen = _side(side)
    _write(opened, folder, chosen, layer)
    stages: dict[str, Mapping[str, Any]] = {}
    if chosen != "onnxruntime":
        say(f"building with {chosen}, as Polygraphy does")
        stages["build"] = _stage(folder, "build", say)
        reason = gpus()
        if isinstance(reason, str):
            stages[chosen] = {"not_here": reason}
            say(f"{chosen} was not run: {reason}")
            say("instead: ONNX Runtime with its optimisations, beside the graph as it is")
            _settings(folder, right="onnxruntime")
    for name in ("compare", "tensors"):
        say(f"{name} …")
        stages[name] = _stage(folder, name, say)
    differs = stages["compare"].get("differs")
    if differs:
        say("looking for the smallest part that differs …")
        stages["reduce"] = _stage(folder, "reduce", say, REDUCE_LIMIT_S)
    if layer is not None or "tensors" in stages["tensors"]:
        stages["extract"] = _stage(folder, "extract", say)
    outputs.write_file(folder / "result.json", json.dumps(stages, indent=1) + "\n")
    return Debugged(folder, stages, differs)


def findings(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what the stages found, in lines."""
    lines = []
    if "version" in (built := stages.get("build", {})):
        lines.append(f"build: {built['version']} takes the graph, {built['bytes'] / 2**20:.1f} MiB")
    if "right_beside_left" in (found := stages.get("compare", {})):
        for pair in ("left_beside_pytorch", "right_beside_pytorch", "right_beside_left"):
            one = found[pair]
            lines.append(
                f"{pair.replace('_', ' ')}: kept overlap {one['kept_overlap']:.4f}, "
                f"{one['tokens']} tokens: mean cosine {one['mean_cosine']:.6f}, lowest "
                f"{one['lowest_cosine']:.6f}; error median {one['median_error']:.1e}, largest "
                f"{one['largest_error']:.1e}, {one['share_beyond']:.1%} beyond the tolerance"
            )
    if "tensors" in (found := stages.get("tensors", {})):
        first, behind, worst = (found[k] for k in ("first", "first_behind_choice", "worst"))
        lines.append(f"tensors: {found['compared']} compared")
        lines.append(f"first that differs: {_row(first) if first else 'none before any choice'}")
        if behind:
            lines.append(f"first behind a choice, which rounding may flip: {_row(behind)}")
        if worst and worst["difference"] > 0:
            lines.append(f"adds most: {_row(worst)}")
    if "nodes" in (found := stages.get("reduce", {})):
        shown = ", ".join(found["operators"][:12])
        lines.append(f"smallest part that differs: {len(found['nodes'])} operators ({shown})")
    if "node" in (found := stages.get("extract", {})):
        alone = "differs" if found["differs"] else "doesn't differ"
        lines.append(f"cut out: {found['operator']} '{found['node']}'; alone it {alone}")
    return lines


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"'{row['tensor']}' of {row['operator']} '{row['node']}', {row['dtype']} {row['shape']}: "
        f"{row['difference']:.1e} (its inputs: {row['of_inputs']:.1e})"
    )


def _side(side: Side | None) -> Side:
    """Return what to compare with."""
    if side is None:
        return next(each for each, module in SIDES.items() if find_spec(module) is not None)
    if side not in SIDES:
        raise InvalidInputError(f"side (--with) is {side!r}", expected=" or ".join(SIDES))
    if find_spec(SIDES[side]) is None:
        raise InvalidInputError(
            f"side (--with) is '{side}'", cause=f"the package '{SIDES[side]}' is not installed"
        )
    return side


def _write(bundle: Bundle, folder: Path, side: Side, layer: str | None) -> None:
    """Write graph, pictures, script and settings."""
    manifest, reference = bundle.manifest, load_reference(bundle)
    model, data = bundle.read_model(), bundle.data_path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(model)
        if data is not None:
            shutil.copyfile(data, folder / data.name)
        shutil.copyfile(script.__file__, folder / SCRIPT)
        np.savez(
            folder / "pictures.npz",
            input=reference.input,
            kept=reference.kept,
            embeds=reference.embeds,
        )
        settings = {
            "right": side,
            "input": manifest.input.name,
            "kept": KEPT,
            "embeds": EMBEDS,
            "precision": bundle.precision,
            "batch": 1 if manifest.batch.dynamic else manifest.batch.max,
            **dataclasses.asdict(APART[bundle.precision]),
            "layer": layer,
        }
        (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(
            f"the output '{folder}' can't be written ({error.strerror})",
            cure="choose a folder on a disk with room for a copy of the graph",
        ) from error


def _settings(folder: Path, **changed: str) -> None:
    path = folder / "settings.json"
    settings = {**json.loads(path.read_text(encoding="utf-8")), **changed}
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _stage(
    folder: Path, name: str, say: Callable[[str], None], limit_s: float = STAGE_LIMIT_S
) -> Mapping[str, Any]:
    """Run one stage in a process of its own; what it says goes to NAME.log."""
    ended = run_child(
        [sys.executable, SCRIPT, name],
        limit_s,
        folder=folder,
        environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    (folder / f"{name}.log").write_text(ended.output, encoding="utf-8")
    try:
        return _answer(folder / f"{name}.json", ended)
    except BackendError as error:
        say(f"warning: {name}: {error}; see {name}.log")
        return {"failed": str(error)}


def _answer(path: Path, ended: Ended) -> Mapping[str, Any]:
    if ended.how:
        lines = [line for line in ended.output.splitlines() if line.strip()]
        raise BackendError(f"Polygraphy's stage {ended.how}", cause=lines[-1] if lines else "")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError("Polygraphy's stage left no result", cause=str(error)) from error
    return dict(found)
