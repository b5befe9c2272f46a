"""What a bundle is benchmarked against: the same encoder, of the same weights, in other engines.

All take what the bundle's graph takes, on the host, and give what it gives, on the host. Nothing
heavy is imported before a peer is opened. To add one: a module here and an entry in `catalogue`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vzip.runtime import agreement as proof

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

    def prove(self, reference: proof.Reference, batches: Sequence[int]) -> Mapping[str, Any]:
        """Compare with the untouched model, in each batch size.

        Returns:
            Numbers as `proof.Proof` has them, ``passed`` among them.
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


def prove(
    run: proof.Run, reference: proof.Reference, bundle: Bundle, batches: Sequence[int], within: str
) -> dict[str, Any]:
    """Compare an encoder with the untouched model, by the gate of its precision.

    Args:
        run: The encoder.
        reference: Of the bundle.
        bundle: The bundle.
        batches: Sizes of batches to run.
        within: Precision of the encoder; what is coarser than the bundle's own graph is held to
            the gate of quantised graphs, for the tokens that both keep: merged tokens are shown and
            exclude nobody, as rounding decides into which a token goes where keys are much alike.
    """
    manifest, gate = bundle.manifest, proof.QUANTISED_GATE
    coarser = within not in ("fp32", manifest.precision)
    found: dict[str, Any] = proof.prove(
        run, reference, manifest, batches, quantised="int8" if coarser else None
    ).to_json()
    if coarser:
        found["passed"] = (
            not found["kept_disagreements"]
            and found["kept_overlap"] >= gate.kept_overlap
            and found["min_cosine"] >= gate.cosine
            and 0 <= found["max_error"] <= gate.error  # negative: not finite
        )
    return found
