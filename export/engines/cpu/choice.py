"""Measures the forms of a bundle's graph and says which is the fastest that keeps the tokens.

Each form is opened, run on the bundle's reference pictures and compared with what the untouched
model says of them; those that agree are timed against the fastest so far, call by call in turns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.export.engines.cpu.forms import FORMS, rewrite
from vzip.export.engines.cpu.patterns import array, norms
from vzip.export.graph import smooth
from vzip.export.graph.reading import read_graph
from vzip.runtime.agreement import CPU_FORM, load_reference, prove
from vzip.runtime.backends.onnxruntime import with_output
from vzip.runtime.bundle.manifest import EMBEDS, KEPT
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError
from vzip.runtime.machine.timing import interleaved

Array = NDArray[Any]
Open = Callable[[bytes, Path], Any]

CALIBRATED: Final = "int8"
"""The graph of vzip calibrate that may be faster here; FP8 has no kernels on a CPU."""
OWN: Final = "own"
"""Name of the bundle's graph as it is."""
SECONDS: Final = 2.0
"""That a comparison takes, roughly; a large tower's fewest calls take longer."""
ALPHA: Final = 0.5
"""Share of the outliers that smoothing moves to the weights, SmoothQuant's own default."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What was found out about one form.

    Attributes:
        form: Its name.
        kept_overlap: Mean share of kept tokens that the untouched model keeps too; None where the
            form could not be run.
        min_cosine: Lowest cosine of a token that both keep.
        contextual_cosine: Mean cosine of the merged tokens.
        ms: The fastest of its calls, which other load disturbs least; None where it was not timed.
        against: Name of the form that it was timed against, the fastest until then.
        against_ms: The fastest of that one's calls, in turns with these.
        refused: Why it can't be chosen; None if it could.
    """

    form: str
    kept_overlap: float | None = None
    min_cosine: float | None = None
    contextual_cosine: float | None = None
    ms: float | None = None
    against: str | None = None
    against_ms: float | None = None
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A graph that can be run.

    Attributes:
        name: Of the form.
        model: The serialised model.
        folder: Where its external data lies.
    """

    name: str
    model: bytes
    folder: Path


def choose(bundle: Bundle, opened: Open, work: Path) -> tuple[Candidate, list[Measured]]:
    """Return the fastest form of a bundle's graph that agrees with the untouched model.

    Args:
        bundle: The bundle.
        opened: Makes an ONNX Runtime session of a model and the folder of its weights; raises
            BackendError where it can't.
        work: A folder for the weights of forms; what isn't chosen is removed from it.

    Returns:
        The form, and what was measured of each, in that order.

    Raises:
        InvalidInputError: The bundle was exported without pictures to compare on.
        BundleError: The bundle is damaged.
        BackendError: The bundle's own graph can't be run.
    """
    reference = load_reference(bundle)
    own = Candidate(OWN, bundle.read_model(), bundle.weights_folder)
    batch = _batch(bundle)
    pictures = np.ascontiguousarray(reference.input[np.arange(batch) % len(reference.input)])

    def call(session: Any) -> Callable[[Array], dict[str, Array]]:
        def run(array: Array) -> dict[str, Array]:
            values = _run(session, bundle, (EMBEDS, KEPT), array)
            return dict(zip((EMBEDS, KEPT), values, strict=True))

        return run

    def judged(candidate: Candidate, session: Any) -> Measured:
        try:
            found = prove(call(session), reference, bundle.manifest, [batch], CPU_FORM)
        except BackendError as error:
            return Measured(candidate.name, refused=f"can't be run: {error}")
        values = (found.kept_overlap, found.min_cosine, found.contextual_cosine)
        return Measured(candidate.name, *values, refused="; ".join(found.short) or None)

    best, best_session = own, opened(own.model, own.folder)
    first = judged(own, best_session)
    if first.kept_overlap is None:
        raise BackendError(f"{bundle.path}: the bundle's own graph {first.refused}")
    measured = [replace(first, refused=None)]  # it is what the bundle promises, in any case
    factors = _factors(bundle, own, reference.input, opened)
    calibrated = [name for name in bundle.manifest.precisions if name == CALIBRATED]
    for name in [*(form.name for form in FORMS), *calibrated]:
        start = time.perf_counter()
        try:
            candidate = _candidate(name, bundle, factors, work)
            session = None if candidate is None else opened(candidate.model, candidate.folder)
        except BackendError as error:
            measured.append(Measured(name, refused=f"can't be opened: {error}"))
            continue
        if candidate is None:
            measured.append(Measured(name, refused="nothing of it was found in this graph"))
            continue
        result = judged(candidate, session)
        if result.refused is None:
            runs = {best.name: call(best_session), name: call(session)}
            taken = interleaved(
                {each: (lambda run=run: run(pictures)) for each, run in runs.items()},  # type: ignore[misc]
                seconds=SECONDS,
            )
            mine, other = taken[name].min_ms, taken[best.name].min_ms
            values = (result.kept_overlap, result.min_cosine, result.contextual_cosine)
            result = Measured(name, *values, mine, best.name, other)
            if mine < other:
                best, best_session = candidate, session
        measured.append(result)
        _remove_others(work, best.name)
        _log.info("fastest: %s took %.0f s to measure", result, time.perf_counter() - start)
    _remove_others(work, best.name)  # of forms that were never judged too
    return best, measured


def _batch(bundle: Bundle) -> int:
    """Return how many pictures a call takes here."""
    return 1 if bundle.manifest.batch.dynamic else bundle.manifest.batch.max


def _run(session: Any, bundle: Bundle, names: Sequence[str], array: Array) -> list[Array]:
    """Return values of a graph for one batch of its input.

    Raises:
        BackendError: ONNX Runtime failed.
    """
    try:
        values: list[Array] = session.run([*names], {bundle.manifest.input.name: array})
    except Exception as error:  # ONNX Runtime's errors have no base class of their own
        raise BackendError((str(error).splitlines() or [type(error).__name__])[0]) from error
    return values


def _candidate(
    name: str, bundle: Bundle, factors: Mapping[str, Array], work: Path
) -> Candidate | None:
    """Return a form as a graph that can be run; None where it is nothing but the bundle's own."""
    form = next((each for each in FORMS if each.name == name and each.own_weights), None)
    if form is None:
        return with_bundles_weights(name, bundle)
    graph = read_graph(bundle, "precision='fastest'")
    if not rewrite(graph, form, factors):
        return None
    file = work / f"{name}.onnx"
    ir.save(graph, file, external_data=f"{name}.onnx.data", size_threshold_bytes=1024)
    return Candidate(name, file.read_bytes(), work)


def with_bundles_weights(name: str, bundle: Bundle) -> Candidate | None:
    """Return a form that has no weights of its own; None if there is none of that name.

    Raises:
        BundleError: The bundle is damaged.
    """
    if name == OWN or name in bundle.manifest.precisions:  # vzip calibrate made it
        bundle = bundle if name == OWN else bundle.at(name)
        return Candidate(name, bundle.read_model(), bundle.weights_folder)
    form = next((each for each in FORMS if each.name == name and not each.own_weights), None)
    if form is None:
        return None
    graph = read_graph(bundle, "precision='fastest'")
    if not rewrite(graph, form, {}):
        return None
    return Candidate(name, ir.to_proto(graph).SerializeToString(), bundle.weights_folder)


def _remove_others(work: Path, name: str) -> None:
    """Remove the files of forms that were not the fastest."""
    for path in work.iterdir():
        if path.name not in {f"{name}.onnx", f"{name}.onnx.data"}:
            path.unlink()


def _factors(bundle: Bundle, own: Candidate, pictures: Array, opened: Open) -> dict[str, Array]:
    """Return what the channels of LayerNorms' results are divided by, from the bundle's pictures.

    Args:
        bundle: The bundle.
        own: Its graph.
        pictures: The graph's input, [n, …].
        opened: As `choose` takes it.

    Returns:
        Name of the result → float32 [in], powers of two.
    """
    found = {
        str(norm.outputs[0].name): [array(linear.weight) for linear in fed]
        for norm, fed in norms(read_graph(bundle, "precision='fastest'").graph).items()
    }
    if not found:  # no outputs asked for would be all of them
        return {}
    model = own.model
    for value in found:
        model = with_output(model, value)
    session = opened(model, own.folder)
    largest: dict[str, Array] = {}
    batch = _batch(bundle)
    for start in range(0, len(pictures), batch):
        chosen = np.arange(start, start + batch) % len(pictures)
        values = _run(session, bundle, tuple(found), np.ascontiguousarray(pictures[chosen]))
        for value, result in zip(found, values, strict=True):
            most = np.abs(result).max(axis=tuple(range(result.ndim - 1)))
            largest[value] = np.maximum(largest.get(value, 0), most)
    return {value: smooth.factors(largest[value], fed, ALPHA) for value, fed in found.items()}
