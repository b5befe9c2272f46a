"""What a bundle is benchmarked against: the same encoder, of the same weights, in other engines.

All take what the bundle's graph takes, on the host, and give what it gives, on the host. Nothing
heavy is imported before a peer is opened. To add one: a module here and a line in `PEERS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vzip.runtime import agreement as proof
from vzip.runtime.errors import InvalidInputError

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


@dataclass(frozen=True)
class Kind:
    """One entry of the table.

    Attributes:
        target: Where the function ``(name, precision, bundle, device) → Peer`` is.
        what: What it is, in one line.
        cpu: Precisions in which it runs on a CPU.
        cuda: Precisions in which it runs on an NVIDIA GPU.
    """

    target: str
    what: str
    cpu: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()

    def precisions(self, device: Device) -> tuple[str, ...]:
        """Return those for a device."""
        return self.cpu if device == "cpu" else self.cuda


_TORCH = "vzip.export.bench.peers.torch_forms:TorchEncoder"
PUBLISHED = "torch-published"
UNCOMPRESSED = "torch-uncompressed"

PEERS: Mapping[str, Kind] = MappingProxyType(
    {
        PUBLISHED: Kind(
            _TORCH,
            "VisionZip as published: eager attention, output_attentions, all layers",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
        ),
        "torch-sdpa": Kind(
            _TORCH,
            "PyTorch with scaled_dot_product_attention and without the dead layer",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
        ),
        "torch-dynamic": Kind(
            _TORCH,
            "the same with its linear layers through PyTorch's quantize_dynamic",
            cpu=("int8",),
        ),
        "torch-compile": Kind(
            _TORCH,
            "torch-sdpa under torch.compile",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
        ),
        UNCOMPRESSED: Kind(
            _TORCH,
            "the same tower, projector on all patches, nothing selected",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
        ),
        "onnxruntime-plain": Kind(
            "vzip.export.bench.peers.onnx_engines:OnnxRuntime",
            "the bundle's graph in ONNX Runtime, default options",
            cpu=("fp32",),
        ),
        "onnxruntime-dynamic": Kind(
            "vzip.export.bench.peers.onnx_engines:OnnxRuntime",
            "the bundle's graph through ONNX Runtime's quantize_dynamic",
            cpu=("int8",),
        ),
        "openvino": Kind(
            "vzip.export.bench.peers.onnx_engines:OpenVino",
            "the bundle's graph in OpenVINO; int8: that of vzip calibrate",
            cpu=("fp32", "bf16", "int8"),
        ),
        # With BF16 around them, which OpenVINO takes by itself, it merges other tokens.
        "openvino-f32": Kind(
            "vzip.export.bench.peers.onnx_engines:OpenVino",
            "the same graph of vzip calibrate in OpenVINO, FP32 around its 8-bit products",
            cpu=("int8",),
        ),
    }
)


def open_peer(name: str, precision: str, bundle: Bundle, device: Device) -> Peer:
    """Open one of `PEERS`.

    Raises:
        VzipError: Its package is not installed, or it can't be what the bundle is.
    """
    kind = PEERS[name]
    if precision not in kind.precisions(device):
        raise InvalidInputError(
            f"{name} runs in {', '.join(kind.precisions(device)) or 'nothing'} on {device}, got "
            f"{precision!r}"
        )
    module, _, attribute = kind.target.partition(":")
    opened: Callable[..., Peer] = getattr(importlib.import_module(module), attribute)
    return opened(name, precision, bundle, device)


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
