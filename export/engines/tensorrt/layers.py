"""What a built engine consists of, from TensorRT's engine inspector: layers, precisions, fusion."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vzip.export.engines.tensorrt.api import Bindings
from vzip.runtime.backends.tensorrt import cuda
from vzip.runtime.backends.tensorrt.engine import not_started
from vzip.runtime.backends.tensorrt.logger import logger
from vzip.runtime.errors import BackendError

# How fused attention shows in names of layers and tactics: `_gemm_mha_v2`, `fmha`, `flash_attn`.
FUSED: Final = re.compile(r"mha|flash_?att|fused_?attention|_attention_kernel", re.IGNORECASE)

OPAQUE: Final = re.compile(r"ForeignNode\[")
"""TensorRT 8.6's name of what Myelin compiled: often the whole transformer in one layer."""

_ORIGIN: Final = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class EngineLayers:
    """What the inspector said.

    Attributes:
        layers: Each layer: name, kind (empty where the inspector gives names alone) and the format
            and datatype of its first output.
        origins: Of each layer, the graph's nodes that it computes; empty where TensorRT doesn't
            tell.
        memory: Bytes of scratch memory that a run needs on the GPU; None where it isn't told.
        fused_attention: Layers that run attention as one kernel; None where there are no layers to
            look at, or where some are `opaque`.
        opaque: Layers that hold many nodes each and don't tell which kernels run them.
    """

    layers: tuple[tuple[str, str, str], ...]
    origins: tuple[tuple[str, ...], ...]
    memory: int | None
    fused_attention: int | None
    opaque: int = 0

    def kinds(self) -> dict[str, int]:
        """Return how many layers there are of each kind, the most frequent first."""
        return dict(Counter(kind or "unknown" for _, kind, _ in self.layers).most_common())

    def precisions(self) -> dict[str, int]:
        """Return how many layers give each datatype, the most frequent first."""
        return dict(Counter(dtype or "unknown" for _, _, dtype in self.layers).most_common())

    @property
    def int8(self) -> int | None:
        """How many layers give INT8; None where the inspector doesn't tell."""
        if self.opaque or not any(dtype for _, _, dtype in self.layers):
            return None
        return sum("int8" in dtype.lower() for _, _, dtype in self.layers)


def inspect_engine(bindings: Bindings, plan: memoryview | bytes | bytearray) -> EngineLayers:
    """Return what TensorRT's inspector says of an engine; arguments as of `inspector_says`.

    Raises:
        BackendError: As `inspector_says`; or what it says is no JSON with layers.
    """
    return read_layers(*inspector_says(bindings, plan))


def inspector_says(
    bindings: Bindings, plan: memoryview | bytes | bytearray
) -> tuple[str, int | None]:
    """Deserialize an engine, ask TensorRT's inspector about it and free it.

    Args:
        bindings: The TensorRT that built it, on a machine with the GPU that it is for.
        plan: The engine, whose digest was checked.

    Returns:
        The inspector's JSON, and the bytes of scratch memory that a run needs.

    Raises:
        BackendError: There is no GPU, or it isn't an engine for this GPU and version.
    """
    cuda.load()  # without a GPU, TensorRT 8.6.0 ends the process with a segmentation fault here
    trt = bindings.module
    said = logger(trt)
    said.said = ""
    try:
        runtime = trt.Runtime(said)
    except TypeError as error:  # pybind: the factory returned nullptr
        raise not_started(trt, said.said) from error
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"{bindings} can't load the engine to look into it",
            cause="it is for another GPU or version",
            cure="'vzip doctor' says what is here",
        )
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    memory = getattr(engine, "device_memory_size_v2", getattr(engine, "device_memory_size", None))
    return str(text), memory


def read_layers(text: str, memory: int | None) -> EngineLayers:
    """Read the inspector's JSON: objects with details, or names alone."""
    try:
        found = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError) as error:
        raise BackendError(
            f"the inspector's answer of {len(text)} characters can't be read ({error})",
            expected="JSON with a list of layers",
            cause="this TensorRT has another form of it",
        ) from error
    layers = tuple(_layer(each) for each in found)
    # One name a fused kernel; a layer's tactic names it where the layer's name doesn't.
    fused = sum(bool(FUSED.search(_said(each))) for each in found)
    opaque = sum(is_opaque(name, kind) for name, kind, _ in layers)
    told = fused if layers and not opaque else None
    return EngineLayers(layers, tuple(map(_origins, found)), memory, told, opaque)


def is_opaque(name: str, kind: str) -> bool:
    """Say whether a layer holds many nodes and doesn't tell which kernels run them."""
    return OPAQUE.search(name) is not None or kind.lower() == "myelin"


def _layer(each: Any) -> tuple[str, str, str]:
    if not isinstance(each, Mapping):
        return str(each), "", ""
    outputs = each.get("Outputs") or [{}]
    dtype = str(outputs[0].get("Format/Datatype", outputs[0].get("Datatype", "")))
    return str(each.get("Name", "")), str(each.get("LayerType", "")), dtype


def _origins(each: Any) -> tuple[str, ...]:
    """Return the nodes in a layer's metadata: ``[ONNX Layer: a][ONNX Layer: b]``."""
    if not isinstance(each, Mapping):
        return ()
    return tuple(_ORIGIN.findall(str(each.get("Metadata", ""))))


def _said(each: Any) -> str:
    """Return the parts of a layer that may name a fused kernel."""
    if not isinstance(each, Mapping):
        return str(each)
    return " ".join(str(each.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
