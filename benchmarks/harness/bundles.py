"""Bundles for benchmarks, kept in a folder under a name that tells what they were made by.

A bundle of older code, other pictures or other packages has another name, so it is never taken for
a new one; it may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import vzip.calibration
import vzip.export
import vzip.runtime
from benchmarks.real.pictures import crops
from vzip.runtime.bundle.engine_record import CPU_STACKS
from vzip.runtime.bundle.origin import Weights
from vzip.runtime.bundle.reader import Bundle, read_bundle
from vzip.runtime.files import locks
from vzip.runtime.machine.record import versions

CPU_ENGINE: Final = "fastest"
"""Name of the engine that `vzip build --cpu` makes."""
CPU_ENGINE_STACKS: Final = tuple(f"{stack}:{CPU_ENGINE}" for stack in CPU_STACKS)
"""What it is called as a stack: after the library that was measured to be the fastest."""
_PACKAGES: Final = (
    "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a bundle is made by.

    Attributes:
        name: Of the encoder.
        model: As ``vzip export`` takes it.
        weights: Of the same.
        tokens: K.
        learnt: Pictures that the graph is checked on, an engine chosen by and scales learnt from.
        judged: Others, for `vzip.export.bench.judging`.
        all_layers: Quantise every linear layer to INT8, whatever that costs, instead of as many as
            `vzip calibrate` by itself finds that the tokens bear.
        measured: Pictures, the first of `judged`, that outliers are measured on.
    """

    name: str
    model: str
    weights: Weights
    tokens: int
    learnt: tuple[Path, ...]
    judged: tuple[Path, ...]
    all_layers: bool = False
    measured: int = 4

    @property
    def key(self) -> str:
        """What tells this bundle from others: a digest of all that it depends on."""
        told = dataclasses.asdict(self)
        told |= {"model": Path(self.model).name}
        told |= {name: [each.name for each in told[name]] for name in ("learnt", "judged")}
        text = json.dumps([told, sources(), versions(*_PACKAGES)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        bundle: With an INT8 graph and an engine for this CPU, as far as they could be made.
        judge: Of `vzip.export.bench.judging.write_judge`.
        outliers: Of `benchmarks.harness.outliers`; None of a tower without CLS.
        lacking: What could not be made → why.
    """

    bundle: Bundle
    judge: Path
    outliers: dict[str, float] | None
    lacking: dict[str, str]


def with_cpu_engine(names: Sequence[str], bundle: Bundle) -> tuple[str, ...]:
    """Return names of stacks with the bundle's CPU engine under its own name, where it has one.

    Args:
        names: Stacks, in which one of `CPU_ENGINE_STACKS` stands for it.
        bundle: The bundle.
    """
    record = bundle.manifest.engines.get(CPU_ENGINE)
    if record is None:
        return tuple(names)
    own = f"{record.stack}:{CPU_ENGINE}"
    return tuple(dict.fromkeys(own if each in CPU_ENGINE_STACKS else each for each in names))


def sources() -> str:
    """Return a digest of vzip's own code, and of what makes the real towers."""
    roots = [Path(str(each.__file__)).parent for each in (vzip.export, vzip.runtime)]
    roots += [Path(str(vzip.calibration.__file__)).parent, Path(__file__).parents[1] / "real"]
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def made(folder: Path, recipe: Recipe) -> Made:
    """Return a bundle, making what of it isn't there in a process of its own.

    Args:
        folder: Where bundles are kept.
        recipe: What it is made by.

    Raises:
        VzipError: It can't be exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe.name}-{recipe.tokens}-{recipe.key}"
    notes = path.with_name(f"{path.name}.json")
    with locks.on_file(path.with_name(f"{path.name}.lock"), lambda: None):
        if not notes.exists():
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found = pool.submit(_make, recipe, path).result()
            notes.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(notes.read_text(encoding="utf-8"))
    return Made(read_bundle(path, verify=False), _judge(path), **found)


def _judge(path: Path) -> Path:
    return path.with_name(f"{path.name}.npz")


def _make(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Make a bundle and what judges it, step by step; runs in a child process."""
    from benchmarks.harness.outliers import measured
    from vzip.calibration import calibrate
    from vzip.export import build, export
    from vzip.export.bench.judging import write_judge
    from vzip.export.pipeline import WeightSource
    from vzip.runtime.console import say
    from vzip.runtime.errors import VzipError
    from vzip.runtime.pictures.images import load_image

    lacking = {}
    if not path.exists():
        say(f"{recipe.name}: exporting to {path.name}")
        export(
            recipe.model, path, tokens=recipe.tokens, weights=recipe.weights, dtype="fp32",
            batch=1, check_images=recipe.learnt,
        )  # fmt: skip
    bundle = read_bundle(path)
    if "int8" not in bundle.manifest.precisions:
        say(f"{recipe.name}: calibrating")
        limits: dict[str, Any] = (
            {"min_agreement": None, "min_cosine": None} if recipe.all_layers else {}
        )
        try:
            with tempfile.TemporaryDirectory() as folder:
                samples = crops(Path(folder), recipe.learnt, 0 if recipe.all_layers else 4)
                calibrate(path, str(samples), precision="int8", **limits)
        except VzipError as error:
            lacking["onnxruntime:int8"] = str(error)
    if CPU_ENGINE not in bundle.manifest.engines:
        say(f"{recipe.name}: making an engine for this CPU")
        try:
            build(path, cpu=True, name=CPU_ENGINE)
        except VzipError as error:
            lacking.update(dict.fromkeys(CPU_ENGINE_STACKS, str(error)))
    say(f"{recipe.name}: asking the untouched model")
    manifest = bundle.manifest
    weights, _ = WeightSource.of(manifest.model).load()
    write_judge(_judge(path), manifest, weights, recipe.judged)
    outliers = None
    if manifest.tower.cls_token:
        pictures = [load_image(each) for each in recipe.judged[: recipe.measured]]
        outliers = measured(weights, pictures)
    return {"outliers": outliers, "lacking": lacking}
