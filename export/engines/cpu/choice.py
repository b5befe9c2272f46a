"""Which form of a bundle's graph is the fastest on this CPU, of those that keep the tokens.

Each form is opened by the runtime's own backend, run on the bundle's reference pictures and
compared with what the untouched model says of them. What agrees is timed against the fastest so
far, call by call in turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vzip.export.engines.cpu.forms import FORMS, Form, rewrite
from vzip.export.engines.cpu.patterns import array, norms
from vzip.export.graph import smooth
from vzip.export.graph.unshared import read_own_graph
from vzip.runtime.agreement import CPU_FORM, ENGINE, Proof, Reference, load_reference, prove
from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu
from vzip.runtime.bundle.precision_record import Precision
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, ParityError
from vzip.runtime.files.codec import Scalar
from vzip.runtime.machine.timing import interleaved

Array = NDArray[Any]
Say = Callable[[str], None]

CALIBRATED: Final = "int8"
"""The graph of vzip calibrate that may be faster here; FP8 has no kernels on a CPU."""
OWN: Final = "own"
"""Name of the bundle's graph as it is."""
NEEDED_FOR: Final = "an engine for the CPU"
EXTRA: Final = "cpu-build"
SECONDS: Final = 2.0
"""That a comparison takes, roughly; a large tower's fewest calls take longer."""
ALPHA: Final = 0.5
"""Share of the outliers that smoothing moves to the weights, SmoothQuant's own default."""


@dataclass(frozen=True)
class Candidate:
    """A graph that can be run.

    Attributes:
        form: Name of its form.
        precision: Precision of the bundle's graph that it was made from.
        model: The serialised model.
        folder: Where external data of it lies, which is the bundle's own.
    """

    form: str
    precision: Precision
    model: bytes
    folder: Path

    def open(self) -> OnnxRuntimeCpu:
        """Open it with the runtime's own backend."""
        return OnnxRuntimeCpu.of_model(self.model, self.folder)


@dataclass(frozen=True)
class ChosenForm:
    """The fastest form that agrees.

    Attributes:
        candidate: The form.
        proof: How it agrees.
        measured: Form → what was measured of it, in that order: ``kept_overlap``, ``min_cosine``,
            ``contextual_cosine``; ``ms``, its fastest call, which other load disturbs least;
            ``against_ms``, that of ``against``, the fastest form until then, in turns with it; or
            ``refused``, why it can't be chosen.
    """

    candidate: Candidate
    proof: Proof
    measured: Mapping[str, Mapping[str, Scalar]]


def choose(bundle: Bundle, *, say: Say) -> ChosenForm:
    """Return the fastest form of a bundle's graph that agrees with the untouched model.

    Args:
        bundle: The bundle; it has a `reference.npz`.
        say: Told a line about each form.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: The bundle's own graph can't be run.
        ParityError: No form agrees, nor does the bundle's own graph.
    """
    reference = load_reference(bundle)
    rows = 1 if bundle.manifest.batch.dynamic else bundle.manifest.batch.max
    pictures = np.ascontiguousarray(reference.input[np.arange(rows) % len(reference.input)])
    feeds = {bundle.manifest.input.name: pictures}
    own = Candidate(OWN, bundle.precision, bundle.read_model(), bundle.weights_folder)
    measured: dict[str, dict[str, Scalar]] = {}
    with contextlib.ExitStack() as stack:
        best, running = own, stack.enter_context(contextlib.closing(own.open()))
        proof = _judged(bundle, own, running, reference)
        measured[OWN] = _numbers(proof)
        for form, made in candidates(bundle, reference):
            found: dict[str, Scalar] = {}
            measured[form] = found
            try:
                candidate = made()
                if candidate is None:
                    found["refused"] = "nothing of it was found in this graph"
                    continue
                opened = stack.enter_context(contextlib.closing(candidate.open()))
                judged = _judged(bundle, candidate, opened, reference)
            except BackendError as error:
                found["refused"] = f"it can't be run: {error}"
                continue
            finally:
                if "refused" in found:
                    say(f"form {form}: {found['refused']}")
            found.update(_numbers(judged))
            if not judged.passed:
                found["refused"] = "; ".join(judged.short)
                opened.close()
                say(f"form {form}: its tokens differ: {found['refused']}")
                continue
            backends = {best.form: running, form: opened}
            calls = {name: partial(each.run, feeds) for name, each in backends.items()}
            taken = interleaved(calls, seconds=SECONDS)
            mine, other = taken[form].min_ms, taken[best.form].min_ms
            found.update(ms=mine, against=best.form, against_ms=other)
            say(f"form {form}: {mine:.2f} ms, {best.form} beside it {other:.2f} ms")
            if mine < other or not proof.passed:
                running.close()
                best, running, proof = candidate, opened, judged
            else:
                opened.close()
    if not proof.passed:
        raise ParityError(
            f"{bundle.path}: no form of the graph agrees with PyTorch's tokens on this CPU "
            f"({proof})",
            cause="this ONNX Runtime miscompiles the graph, or the weights are damaged",
            cure="check the bundle with vzip check, or install another version of onnxruntime",
        )
    return ChosenForm(best, proof, measured)


def _judged(
    bundle: Bundle, candidate: Candidate, opened: OnnxRuntimeCpu, reference: Reference
) -> Proof:
    """Run a form in the smallest and the largest batch that the graph takes, and judge it."""
    manifest = bundle.manifest
    sizes = sorted({1 if manifest.batch.dynamic else manifest.batch.max, manifest.batch.max})
    name = manifest.input.name
    # What the bundle promises is held to its own gate, what is made of it to a wider one.
    gate = ENGINE[manifest.precision] if candidate.form == OWN else CPU_FORM
    return prove(lambda images: opened.run({name: images}), reference, manifest, sizes, gate)


def _numbers(proof: Proof) -> dict[str, Scalar]:
    names = ("kept_overlap", "min_cosine", "contextual_cosine")
    return {name: getattr(proof, name) for name in names}


def candidates(
    bundle: Bundle, reference: Reference
) -> Iterator[tuple[str, Callable[[], Candidate | None]]]:
    """Yield each form but the bundle's own, and what makes it: None if nothing of it was found."""
    graph = read_own_graph(bundle, NEEDED_FOR, EXTRA)
    factors = _factors(bundle, graph, reference.input)

    def rewritten(form: Form) -> Candidate | None:
        changed = graph.clone()
        if not rewrite(changed, form, factors):
            return None
        if form.own_weights:  # what little is left of the bundle's is taken along: 6 % of a ViT-L
            ir.external_data.load_to_model(changed)
        try:
            model = ir.to_proto(changed).SerializeToString()
        except Exception as error:  # protobuf's own, at 2 GiB
            raise BackendError(
                f"the form {form.name!r} can't be serialised ({error})",
                cause="its weights have more than 2 GiB",
            ) from error
        return Candidate(form.name, bundle.precision, model, bundle.weights_folder)

    def calibrated() -> Candidate:
        at = bundle.at(CALIBRATED)
        return Candidate(CALIBRATED, at.precision, at.read_model(), at.weights_folder)

    for form in FORMS:
        yield form.name, partial(rewritten, form)
    if CALIBRATED in bundle.manifest.precisions:
        yield CALIBRATED, calibrated


def _factors(bundle: Bundle, graph: ir.Model, pictures: Array) -> dict[str, Array]:
    """Return what the channels of LayerNorms' results are divided by, from the bundle's pictures.

    Args:
        bundle: The bundle.
        graph: Its graph.
        pictures: The graph's input, [n, …].

    Returns:
        Name of the result → float32 [in], powers of two.
    """
    found = {
        str(norm.outputs[0].name): [array(linear.weight) for linear in fed]
        for norm, fed in norms(graph.graph).items()
    }
    if not found:
        return {}
    model, folder = bundle.read_model(), bundle.weights_folder
    largest: dict[str, Array] = {}
    rows = 1 if bundle.manifest.batch.dynamic else bundle.manifest.batch.max
    with contextlib.closing(OnnxRuntimeCpu.of_model(model, folder, tuple(found))) as opened:
        for start in range(0, len(pictures), rows):
            chosen = np.arange(start, start + rows) % len(pictures)
            images = np.ascontiguousarray(pictures[chosen])
            results = opened.run({bundle.manifest.input.name: images})
            for value in found:
                result = results[value]
                most = np.abs(result).max(axis=tuple(range(result.ndim - 1)))
                largest[value] = np.maximum(largest.get(value, 0), most)
    return {value: smooth.factors(largest[value], fed, ALPHA) for value, fed in found.items()}
