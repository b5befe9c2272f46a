"""The peers by name: what each is, in which precisions it runs where, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from vzip.export.bench.peers import CPU_FORM, PUBLISHED, UNCOMPRESSED, Device, Peer
from vzip.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from vzip.runtime.bundle.reader import Bundle


@dataclass(frozen=True)
class Kind:
    """One entry of the table.

    Attributes:
        make: Opens it: ``(name, precision, bundle, device) → Peer``; imports what it is made of.
        what: What it is, in one line.
        cpu: Precisions in which it runs on a CPU.
        cuda: Precisions in which it runs on an NVIDIA GPU.
        named: Precisions in which it runs on a CPU where one asks for it by name: true half
            precision, for what it does to the tokens; no CPU without kernels for it is fast.
        asked: Whether it is timed only where one asks for it by name: it compiles for minutes.
    """

    make: Callable[[str, str, Bundle, Device], Peer]
    what: str
    cpu: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    asked: bool = False

    def precisions(self, device: Device) -> tuple[str, ...]:
        """Return those for a device."""
        return self.cpu if device == "cpu" else self.cuda


def _torch(name: str, precision: str, bundle: Bundle, device: Device) -> Peer:
    from vzip.export.bench.peers.torch_forms import TorchEncoder

    return TorchEncoder(name, precision, bundle, device)


def _onnxruntime(name: str, precision: str, bundle: Bundle, device: Device) -> Peer:
    from vzip.export.bench.peers.onnx_engines import OnnxRuntime

    return OnnxRuntime(name, precision, bundle, device)


def _cpu_form(_name: str, form: str, bundle: Bundle, _device: Device) -> Peer:
    from vzip.export.bench.peers.onnx_engines import CpuForm

    return CpuForm(form, bundle)


def _openvino(name: str, precision: str, bundle: Bundle, device: Device) -> Peer:
    from vzip.export.bench.peers.onnx_engines import OpenVino

    return OpenVino(name, precision, bundle, device)


PEERS: Mapping[str, Kind] = MappingProxyType(
    {
        PUBLISHED: Kind(
            _torch,
            "VisionZip as published: eager attention, output_attentions, all layers",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
            named=("fp16",),
        ),
        "torch-sdpa": Kind(
            _torch,
            "PyTorch with scaled_dot_product_attention and without the dead layer",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
            named=("fp16",),
        ),
        "torch-dynamic": Kind(
            _torch,
            "the same with its linear layers through PyTorch's quantize_dynamic",
            cpu=("int8",),
        ),
        "torch-compile": Kind(
            _torch,
            "torch-sdpa under torch.compile",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
            asked=True,
        ),
        UNCOMPRESSED: Kind(
            _torch,
            "the same tower, projector on all patches, nothing selected",
            cpu=("fp32", "bf16"),
            cuda=("fp16",),
        ),
        "onnxruntime-plain": Kind(
            _onnxruntime,
            "the bundle's graph in ONNX Runtime, default options",
            cpu=("fp32",),
        ),
        "onnxruntime-dynamic": Kind(
            _onnxruntime,
            "the bundle's graph through ONNX Runtime's quantize_dynamic",
            cpu=("int8",),
        ),
        CPU_FORM: Kind(
            _cpu_form,
            "a form of the graph that vzip build --cpu tries, chosen or not",
            named=("fused", "dynamic", "tokens", "mixed", "blocks"),
        ),
        "openvino": Kind(
            _openvino,
            "the bundle's graph in OpenVINO; int8: that of vzip calibrate",
            cpu=("fp32", "bf16", "int8"),
        ),
        # With BF16 around them, which OpenVINO takes by itself, it merges other tokens.
        "openvino-f32": Kind(
            _openvino,
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
    named = kind.named if device == "cpu" else ()
    if precision not in (*kind.precisions(device), *named):
        raise InvalidInputError(
            f"the precision of {name} on {device} is {precision!r}",
            expected=" or ".join(kind.precisions(device)) or "none: it doesn't run there",
        )
    return kind.make(name, precision, bundle, device)
