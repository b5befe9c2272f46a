"""Which form of a bundle's graph is the fastest on this CPU, of those that keep the tokens.

Each form is opened by the runtime's own backend, run on the bundle's reference pictures and
compared with what the untouched model says of them. These are few, and a form may be right on all
of them by chance; so one that agrees is also compared with the bundle's own graph, on mirrored and
zoomed ones. What agrees then is timed against the fastest so far, call by call in turns.
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
from vzip.export.engines.cpu.learning import batches, learn, varied
from vzip.export.graph.unshared import read_own_graph
from vzip.runtime.agreement import (
    CPU_FORM,
    CPU_FORM_VARIED,
    ENGINE,
    Agreement,
    Outputs,
    Proof,
    Reference,
    compare,
    load_reference,
    prove,
)
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
            ``contextual_cosine``, and of a form that agrees means as ``varied_…``, beside the
            bundle's own graph on more pictures; ``ms``, its fastest call, which other load disturbs
            least; ``against_ms``, that of ``against``, the fastest form until then, in turns with
            it; or ``refused``, why it can't be chosen.
    """

    candidate: Candidate
    proof: Proof
    measured: Mapping[str, Mapping[str, Scalar]]


def choose(bundle: Bundle, *, say: Say) -> ChosenForm:  # noqa: PLR0915  one form after another
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
        # A graph that isn't right itself says nothing of its forms.
        more = _varied(bundle, reference)
        expected = _outputs(bundle, running, more) if proof.passed else []
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
                found.update(_numbers(judged))
                short = list(judged.short)
                if expected and not short:
                    got = _outputs(bundle, opened, more)
                    short = _beside(compare(expected, got, bundle.manifest), found)
            except BackendError as error:
                found["refused"] = f"it can't be run: {error}"
                continue
            finally:
                if "refused" in found:
                    say(f"form {form}: {found['refused']}")
            if short:
                found["refused"] = "; ".join(short)
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


def _varied(bundle: Bundle, reference: Reference) -> Array:
    return varied(reference.input, channels_last=bundle.manifest.input.dtype == "uint8")


def _beside(agreement: Agreement, found: dict[str, Scalar]) -> list[str]:
    """Put down how a form agrees with the own graph, and return what falls short."""
    found["varied_overlap"] = agreement.mean_overlap
    found["varied_cosine"] = agreement.kept.mean
    found["varied_contextual_cosine"] = agreement.merged.mean
    return [f"{each} of varied pictures" for each in CPU_FORM_VARIED.judge(agreement)]


def _outputs(bundle: Bundle, opened: OnnxRuntimeCpu, pictures: Array) -> list[Outputs]:
    """Return what a graph gives of pictures, call by call."""
    name = bundle.manifest.input.name
    return [opened.run({name: images}) for images in batches(bundle, pictures)]


def _numbers(proof: Proof) -> dict[str, Scalar]:
    names = ("kept_overlap", "min_cosine", "contextual_cosine")
    return {name: getattr(proof, name) for name in names}


def candidates(
    bundle: Bundle, reference: Reference
) -> Iterator[tuple[str, Callable[[], Candidate | None]]]:
    """Yield each form but the bundle's own, and what makes it: None if nothing of it was found."""
    graph = read_own_graph(bundle, NEEDED_FOR, EXTRA)
    learnt = learn(bundle, graph, _varied(bundle, reference))

    def rewritten(form: Form) -> Candidate | None:
        changed = graph.clone()
        if not rewrite(changed, form, learnt):
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
