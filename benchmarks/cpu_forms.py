"""Forms for the CPU on real trained towers: ``python -m benchmarks.cpu_forms``.

Each form that ``vzip build --cpu`` tries, chosen or not, beside the bundle's own graph, on
photographs that the bundle's reference pictures aren't among; and times beside the own graph and
the published PyTorch form in the same turns. All of it in BF16 in OpenVINO is a peer. Under eight
minutes on two cores that do nothing else.

Writes benchmarks/results/cpu_forms.json and .md, anew after every tower.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.harness import results
from benchmarks.real.pictures import HELD_APART, LEARNT_FROM, pictures
from benchmarks.real.towers import TOWERS, checkpoint
from vzip.export import export
from vzip.export.bench.peers import PUBLISHED
from vzip.export.bench.peers.catalogue import open_peer
from vzip.export.engines.cpu import choice
from vzip.export.pages import markdown
from vzip.export.pictures import reference_images
from vzip.runtime.agreement import Agreement, Outputs, compare, load_reference
from vzip.runtime.backends.onnxruntime import OnnxRuntimeCpu
from vzip.runtime.backends.protocol import Backend
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.console import say
from vzip.runtime.errors import VzipError
from vzip.runtime.machine.record import machine
from vzip.runtime.machine.timing import interleaved
from vzip.runtime.pictures.images import load_image
from vzip.runtime.pictures.preprocess import tower_image

Array = NDArray[Any]
Call = Callable[[Array], Outputs]

NAMES: Final = ("clip-b16-224", "clip-b16-384", "clip-b16-384-noise", "dinov2-s14-336")
OPENVINO: Final = ("bf16",)
SECONDS: Final = 20.0
"""Of timed calls of a tower, roughly."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = results.parser(__doc__)
    parser.add_argument("towers", nargs="*", metavar="TOWER", help=f"of {', '.join(TOWERS)}")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": machine(), "towers": {}}
    for name in options.towers or NAMES:
        found["towers"][name] = _tower(name)
        results.write(options.output, "cpu_forms", found, page)
    return 0


def page(found: dict[str, Any]) -> str:
    """Return the table."""
    heads = ("tower", "form", "kept overlap", "cosine: mean", "1st percentile", "lowest",
             "merged: mean", "compared", "in 8 bits", "ms", "of FP32", "of published")  # fmt: skip
    rows = []
    for name, tower in found["towers"].items():
        own, published = (tower["ms"][each] for each in (choice.OWN, PUBLISHED))
        for form, each in tower["forms"].items():
            took = tower["ms"][form]
            rows.append(
                (name, form, f"{each['kept_overlap']:.4f}", f"{each['mean_cosine']:.5f}",
                 f"{each['cosine_p1']:.4f}", f"{each['min_cosine']:.4f}",
                 f"{each['contextual_cosine']:.4f}", f"{each['contextual_share']:.2f}",
                 f"{each['in_8_bits']:.3f}", f"{took:.0f}", f"{took / own:.2f}",
                 f"{took / published:.2f}")
            )  # fmt: skip
        rows.append((name, PUBLISHED, *("",) * 7, f"{published:.0f}", f"{published / own:.2f}", ""))
    table = "\n".join(markdown.table(heads, rows))
    return (
        f"{table}\n\nBeside the bundle's own graph on {found['towers'][rows[0][0]]['pictures']} "
        "photographs that aren't among its reference pictures. Merged tokens are compared where "
        "their target is the same; *compared* is the share of those. *In 8 bits*: of the linear "
        "layers' multiplications. Times are the fastest of calls in turns.\n"
    )


def _tower(name: str) -> dict[str, Any]:
    seen = {path.name for path in reference_images()}
    chosen = [each for each in (*HELD_APART, *LEARNT_FROM) if each not in seen]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        say(f"{name}: exporting")
        bundle = export(checkpoint(name), Path(folder) / "bundle", say=lambda _: None)
        images = np.stack(
            [
                tower_image(load_image(path), bundle.manifest.preprocessing)
                for path in pictures(tuple(chosen))
            ]
        )
        calls: dict[str, Call] = {}
        shares = {choice.OWN: 0.0}
        own = OnnxRuntimeCpu.of_model(bundle.read_model(), bundle.weights_folder)
        calls[choice.OWN] = _call(bundle, stack.enter_context(contextlib.closing(own)))
        for form, make in choice.candidates(bundle, load_reference(bundle)):
            candidate = make()
            if candidate is None:
                continue
            opened = stack.enter_context(contextlib.closing(candidate.open()))
            calls[form], shares[form] = _call(bundle, opened), _in_8_bits(candidate.model)
        for precision in OPENVINO:
            try:
                peer = open_peer("openvino", precision, bundle, "cpu")
            except VzipError as error:
                say(f"openvino in {precision}: {error}")
                continue
            calls[f"openvino:{precision}"], shares[f"openvino:{precision}"] = peer.run, 0.0
        expected = _run(calls[choice.OWN], images)
        forms = {
            form: {
                **_numbers(compare(expected, _run(call, images), bundle.manifest), bundle),
                "in_8_bits": shares[form],
            }
            for form, call in calls.items()
        }
        say(f"{name}: timing {', '.join(calls)}")
        calls[PUBLISHED] = open_peer(PUBLISHED, "fp32", bundle, "cpu").run
        timed = {form: partial(call, images[:1]) for form, call in calls.items()}
        taken = interleaved(timed, seconds=SECONDS, settle_s=choice.SETTLE_S)
    return {
        "about": TOWERS[name].about,
        "pictures": len(images),
        "forms": forms,
        "ms": {form: each.min_ms for form, each in taken.items()},
    }


def _call(bundle: Bundle, opened: Backend) -> Call:
    return lambda images: dict(opened.run({bundle.manifest.input.name: images}))


def _run(call: Call, images: Array) -> list[Outputs]:
    return [call(images[row : row + 1]) for row in range(len(images))]


def _numbers(agreement: Agreement, bundle: Bundle) -> dict[str, float]:
    kept, merged = agreement.kept, agreement.merged
    made = max(1, len(agreement.overlaps) * bundle.manifest.selection.contextual)
    return {
        "kept_overlap": agreement.mean_overlap,
        "mean_cosine": kept.mean,
        "cosine_p1": float(np.quantile(kept.cosines, 0.01)),
        "min_cosine": kept.lowest,
        "contextual_cosine": merged.mean,
        "contextual_share": len(merged.cosines) / made,
    }


def _in_8_bits(model: bytes) -> float:
    """Return the share of a form's multiplications by constant weights that are in 8 bits.

    A token of the tower counts as one behind the projector: that share is of the weights, of which
    the tower has nearly all. The Hadamard matrices of ``tokens`` and the patches' convolution are
    no linear layers.
    """
    import onnx

    graph, small, large = ir.from_proto(onnx.load_model_from_string(model)).graph, 0, 0
    for node in graph:
        if node.op_type not in {"MatMul", "MatMulIntegerToFloat", "MatMulNBits"}:
            continue
        weights = node.inputs[1]
        if weights is None or weights.const_value is None or weights.shape is None:
            continue
        if "turn" in str(weights.name):
            continue
        count = int(np.prod(weights.shape.numpy()))
        if node.op_type == "MatMul":
            large += count
        else:
            small += count
    return small / max(1, small + large)


if __name__ == "__main__":
    sys.exit(main())
