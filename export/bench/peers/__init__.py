"""What a bundle is benchmarked against: the same encoder, of the same weights, in other engines.

All take what the bundle's graph takes, on the host, and give what it gives, on the host. Nothing
heavy is imported before a peer is opened. To add one: a module here and an entry in `catalogue`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vzip.runtime.agreement import COARSER_PEER, ENGINE, Reference, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.bundle.reader import Bundle

Device = Literal["cpu", "cuda"]
Outputs = dict[str, "NDArray[Any]"]


class Peer(Protocol):
    """An encoder that is ready to run."""

    def run(self, images: NDArray[Any]) -> Outputs:
        """Return the graph's outputs for its input, whose batch is 1 … the bundle's largest."""
        ...

    def prove(
        self, reference: Reference, batches: Sequence[int], keys: NDArray[Any] | None = None
    ) -> Mapping[str, Any]:
        """Compare with the untouched model, in each batch size.

        Args:
            reference: The pictures and what is right.
            batches: Sizes of batches.
            keys: See `vzip.export.bench.judging.JudgedBy`.

        Returns:
            Numbers as `vzip.export.bench.judging.judged` has them, ``passed`` among them.
        """
        ...

    def about(self, batch: int) -> Mapping[str, Any]:
        """Return what is known after some calls.

        Returns:
            ``torch_reserved_mib``, the most that PyTorch held on a GPU; ``flops`` of a batch, where
            they are not those of the bundle's encoder.
        """
        ...


PUBLISHED = "torch-published"
UNCOMPRESSED = "torch-uncompressed"
CPU_FORM = "onnxruntime-form"


def prove(
    run: Run,
    reference: Reference,
    bundle: Bundle,
    batches: Sequence[int],
    within: str,
    *,
    keys: NDArray[Any] | None = None,
    merging: Run | None = None,
) -> dict[str, Any]:
    """Compare an encoder with the untouched model, by the gate of its precision.

    Args:
        run: The encoder.
        reference: Of the bundle.
        bundle: The bundle.
        batches: Sizes of batches to run.
        within: Precision of the encoder; what is coarser than the bundle's own graph has a gate of
            its own.
        keys: The untouched model's; see `vzip.export.bench.judging.JudgedBy`.
        merging: See `vzip.export.bench.judging.judged`.
    """
    from vzip.export.bench.judging import JudgedBy, judged

    manifest = bundle.manifest
    own = within in ("fp32", manifest.precision)
    gate = ENGINE[manifest.precision] if own else COARSER_PEER
    judge = JudgedBy(reference, keys)
    return judged(run, judge, manifest, batches, gate, merging=merging)
