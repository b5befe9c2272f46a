"""Which form of a bundle's graph is the fastest on this CPU, of those that keep the tokens.

Each form is opened by the runtime's own backend, ONNX Runtime's or OpenVINO's, run on the bundle's
reference pictures and compared with what the untouched model says of them. These are few, and a
form may be right on all of them by chance; so one that agrees is also compared with the bundle's
own graph, on mirrored and zoomed ones. What agrees then is timed against the fastest so far, call
by call in turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

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
    Gate,
    Outputs,
    Proof,
    Reference,
    compare,
    load_reference,
    prove,
)
from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu
from vzip.runtime.backends.openvino import FP32, OpenVinoCpu, capabilities
from vzip.runtime.backends.packages import import_openvino
from vzip.runtime.backends.protocol import Backend
from vzip.runtime.bundle.manifest import EMBEDS, KEPT, Manifest
from vzip.runtime.bundle.precision_record import Precision
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, MissingDependencyError, ParityError
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
"""That the timed calls of a comparison take, roughly; a large tower's fewest take longer."""
SETTLE_S: Final = 0.05
"""Before each timed call, for the threads of the library that was called before to end spinning."""


@dataclass(frozen=True)
class Candidate:
    """A graph that can be run.

    Attributes:
        form: Name of its form.
        precision: Precision of the bundle's graph that it was made from.
        model: The serialised model.
        folder: Where external data of it lies, which is the bundle's own.
        tower: What OpenVINO computes the tower in, as it calls it; None for ONNX Runtime.
    """

    form: str
    precision: Precision
    model: bytes
    folder: Path
    tower: str | None = None

    @property
    def stack(self) -> Literal["onnxruntime", "openvino"]:
        """Whose it is."""
        return "onnxruntime" if self.tower is None else "openvino"

    def open(self, extra_outputs: tuple[str, ...] = ()) -> Backend:
        """Open it with the runtime's own backend."""
        if self.tower is None:
            return OnnxRuntimeCpu.of_model(self.model, self.folder, extra_outputs)
        return self._compiled(extra_outputs)

    def engine(self) -> bytes:
        """Return the engine's file."""
        if self.tower is None:
            return self.model
        with contextlib.closing(self._compiled()) as opened:
            return opened.exported()

    def _compiled(self, extra_outputs: tuple[str, ...] = ()) -> OpenVinoCpu:
        assert self.tower is not None
        names = (EMBEDS, KEPT, *extra_outputs)
        return OpenVinoCpu.of_graph(self.model, self.folder, self.tower, names)


@dataclass(frozen=True)
class Compiled:
    """How OpenVINO computes a graph; what follows the tower it computes in FP32 in any case.

    Attributes:
        name: Of the form, for records and messages.
        tower: What the tower is computed in, as OpenVINO calls it.
        needs: What it says to have kernels for, where a CPU has them.
        calibrated: Whether the graph is that of ``vzip calibrate``, in 8 bits, or the bundle's own.
    """

    name: str
    tower: str
    needs: str
    calibrated: bool = False


OPENVINO_FORMS: Final = (
    Compiled("openvino", FP32, "FP32"),
    Compiled("openvino-bf16", "bf16", "BF16"),
    Compiled("openvino-fp16", "f16", "FP16"),
    Compiled("openvino-int8", FP32, "INT8", calibrated=True),
    Compiled("openvino-int8-bf16", "bf16", "BF16", calibrated=True),
    Compiled("openvino-int8-fp16", "f16", "FP16", calibrated=True),
)
"""Those with FP16 are for ARM, and for x86 with AMX's: other x86 has no such kernels."""
OPENVINO_EXTRA: Final = "openvino"
MANY: Final = 8
"""The batch that forms are timed in beside that of one picture, where the graph takes it."""


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
            it; the same in a larger batch of N as ``ms_N`` and ``against_ms_N``; or ``refused``,
            why it can't be chosen.
    """

    candidate: Candidate
    proof: Proof
    measured: Mapping[str, Mapping[str, Scalar]]


def choose(bundle: Bundle, *, say: Say, batch: int | None = None) -> ChosenForm:
    """Return the fastest form of a bundle's graph that agrees with the untouched model.

    Where the batch is open, forms are timed with one picture and with `MANY`, and what counts is
    the geometric mean of the two ratios: there is one form for all batches, so that a picture's
    tokens don't depend on how many came with it.

    Args:
        bundle: The bundle; it has a `reference.npz`.
        say: Told a line about each form.
        batch: The only batch that forms are timed in; None for those above.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: The bundle's own graph can't be run.
        ParityError: No form agrees, nor does the bundle's own graph.
    """
    reference = load_reference(bundle)
    sizes = [batch] if batch is not None else timed_sizes(bundle.manifest)
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
                    gate = _varied_gate(bundle)
                    short = _beside(compare(expected, got, bundle.manifest), gate, found)
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
            share = _timed(bundle, reference, backends, sizes, found)
            say(f"form {form}: {_times(found, sizes)}")
            if share < 1 or not proof.passed:
                running.close()
                best, running, proof = candidate, opened, judged
            else:
                opened.close()
    if not proof.passed:
        raise ParityError(
            f"{bundle.path}: no form of the graph agrees with PyTorch's tokens on this CPU "
            f"({proof})",
            cause="the installed libraries miscompile the graph, or the weights are damaged",
            cure="check the bundle with vzip check, or install another version of onnxruntime",
        )
    return ChosenForm(best, proof, measured)


def timed_sizes(manifest: Manifest) -> list[int]:
    """Return the batches that forms are timed in."""
    if not manifest.batch.dynamic:
        return [manifest.batch.max]
    return sorted({1, min(MANY, manifest.batch.max)})


def _timed(
    bundle: Bundle,
    reference: Reference,
    backends: Mapping[str, Backend],
    sizes: Sequence[int],
    found: dict[str, Scalar],
) -> float:
    """Time the fastest form until now and another in turns, and put down what they take.

    Args:
        bundle: The bundle.
        reference: Its pictures.
        backends: The two, by their forms; the other one last.
        sizes: Batches.
        found: What is known of the other one.

    Returns:
        What share of the former's time the latter takes, the geometric mean over the batches.
    """
    best, form = backends
    ratios = []
    for place, size in enumerate(sizes):
        pictures = np.ascontiguousarray(reference.input[np.arange(size) % len(reference.input)])
        feeds = {bundle.manifest.input.name: pictures}
        calls = {name: partial(each.run, feeds) for name, each in backends.items()}
        taken = interleaved(calls, seconds=SECONDS, settle_s=SETTLE_S)
        mine, other = taken[form].min_ms, taken[best].min_ms
        many = "" if place == 0 else f"_{size}"
        found.update({f"ms{many}": mine, "against": best, f"against_ms{many}": other})
        ratios.append(mine / other)
    return float(np.prod(ratios) ** (1 / len(ratios)))


def _times(found: Mapping[str, Scalar], sizes: Sequence[int]) -> str:
    """Return what `_timed` put down, in words."""
    parts = []
    for place, size in enumerate(sizes):
        many = "" if place == 0 else f"_{size}"
        batch = f" in batches of {size}" if len(sizes) > 1 else ""
        mine, other = found[f"ms{many}"], found[f"against_ms{many}"]
        parts.append(f"{mine:.2f} ms{batch}, {found['against']} beside it {other:.2f} ms")
    return "; ".join(parts)


def _judged(bundle: Bundle, candidate: Candidate, opened: Backend, reference: Reference) -> Proof:
    """Run a form in the smallest and the largest batch that the graph takes, and judge it."""
    manifest = bundle.manifest
    sizes = sorted({1 if manifest.batch.dynamic else manifest.batch.max, manifest.batch.max})
    name = manifest.input.name
    # What the bundle promises is held to its own gate, what is made of it to a wider one.
    gate = ENGINE[manifest.precision] if candidate.form == OWN else CPU_FORM
    return prove(lambda images: opened.run({name: images}), reference, manifest, sizes, gate)


def _varied(bundle: Bundle, reference: Reference) -> Array:
    return varied(reference.input, channels_last=bundle.manifest.input.dtype == "uint8")


def _varied_gate(bundle: Bundle) -> Gate:
    """Return what a form must reach beside the own graph.

    Greedy picks may be others that are as good. What they reach is judged on the reference's
    pictures: of these nobody knows how the untouched model relates patches.
    """
    if bundle.manifest.has_rank:
        return dataclasses.replace(CPU_FORM_VARIED, overlap=None)
    return CPU_FORM_VARIED


def _beside(agreement: Agreement, gate: Gate, found: dict[str, Scalar]) -> list[str]:
    """Put down how a form agrees with the own graph, and return what falls short."""
    found["varied_overlap"] = agreement.mean_overlap
    found["varied_cosine"] = agreement.kept.mean
    found["varied_contextual_cosine"] = agreement.merged.mean
    return [f"{each} of varied pictures" for each in gate.judge(agreement)]


def _outputs(bundle: Bundle, opened: Backend, pictures: Array) -> list[Outputs]:
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

    def compiled(form: Compiled) -> Candidate:
        at = calibrated() if form.calibrated else own
        return dataclasses.replace(at, form=form.name, tower=form.tower)

    for form in FORMS:
        yield form.name, partial(rewritten, form)
    there = CALIBRATED in bundle.manifest.precisions
    if there:
        yield CALIBRATED, calibrated
    own = Candidate(OWN, bundle.precision, bundle.read_model(), bundle.weights_folder)
    for each in openvino_forms():
        if there or not each.calibrated:
            yield each.name, partial(compiled, each)


def openvino_forms() -> list[Compiled]:
    """Return the forms that OpenVINO has kernels for on this CPU; none where it isn't installed."""
    try:
        has = capabilities(import_openvino(NEEDED_FOR, OPENVINO_EXTRA))
    except MissingDependencyError:
        return []
    return [each for each in OPENVINO_FORMS if each.needs in has]
