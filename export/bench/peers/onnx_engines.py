"""The bundle's graph in other engines: ONNX Runtime as it comes, quantised by itself, OpenVINO."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.export.bench.peers import Device, Outputs, prove
from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS
from vzip.runtime.errors import InvalidInputError, missing
from vzip.runtime.machine import process

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vzip.runtime.agreement import Reference
    from vzip.runtime.bundle.reader import Bundle

# Inference precision by ours; INT8 graphs leave the rest to OpenVINO, which takes BF16 where the
# CPU has it.
_HINT = "INFERENCE_PRECISION_HINT"
_OPENVINO: Mapping[str, dict[str, str]] = {
    "fp32": {_HINT: "f32"},
    "bf16": {_HINT: "bf16"},
    "int8": {},
}


class _Graph:
    """What the peers of this file share: the outputs' names, and how they are compared."""

    def __init__(self, precision: str, bundle: Bundle) -> None:
        self._precision, self._bundle = precision, bundle
        self._names = [each.name for each in bundle.manifest.outputs]

    def run(self, images: NDArray[Any]) -> Outputs:
        raise NotImplementedError

    def prove(
        self, reference: Reference, batches: Sequence[int], _keys: NDArray[Any] | None = None
    ) -> Mapping[str, Any]:
        """See `Peer`; what goes into which merged token can't be seen."""
        return prove(self.run, reference, self._bundle, batches, self._precision)

    def about(self, _batch: int) -> Mapping[str, Any]:
        """See `Peer`."""
        return {}


class OnnxRuntime(_Graph):
    """ONNX Runtime with default options; in INT8, of what its own ``quantize_dynamic`` makes.

    INT8 weights for each output channel, 8-bit activations scaled anew in every call. Linear layers
    alone; ONNX Runtime has no faster one for the products of two activations.
    """

    def __init__(self, _name: str, precision: str, bundle: Bundle, _device: Device) -> None:
        super().__init__(precision, bundle)
        from vzip.runtime.backends.onnxruntime import session_options
        from vzip.runtime.backends.packages import import_onnxruntime

        if precision not in ("int8", bundle.manifest.precision):
            raise InvalidInputError(
                f"the bundle's graph is in {bundle.manifest.precision}",
                expected=f"{precision}",
            )
        onnxruntime = import_onnxruntime(f"the peer in {precision}", "export")
        bundle.read_model()  # the digests: what is compared is what was exported
        graph = bundle.path / bundle.graph_file
        with tempfile.TemporaryDirectory() as folder:
            if precision == "int8":
                quantised = Path(folder) / "model.onnx"
                # In a process of its own: the memory it takes is not the session's.
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    pool.submit(_quantise, graph, quantised).result()
                graph = quantised
            # As it comes, but for threads: in a container both have those that the quota pays for.
            self._session = onnxruntime.InferenceSession(
                graph, session_options(onnxruntime), providers=["CPUExecutionProvider"]
            )

    def run(self, images: NDArray[Any]) -> Outputs:
        """See `Peer`."""
        feeds = {self._bundle.manifest.input.name: images}
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))


class CpuForm(_Graph):
    """A form of the graph as `vzip.export.engines.cpu` makes it, whether or not it would be chosen.

    Raises:
        InvalidInputError: There is no such form, or nothing of it in this graph.
    """

    def __init__(self, form: str, bundle: Bundle) -> None:
        super().__init__(form, bundle)
        from vzip.export.engines.cpu import choice
        from vzip.runtime.agreement import load_reference

        made = dict(choice.candidates(bundle, load_reference(bundle)))
        candidate = made[form]() if form in made else None
        if candidate is None:
            raise InvalidInputError(
                f"the form {form!r} has nothing in this graph", expected=f"one of {', '.join(made)}"
            )
        self._candidate, self._opened = candidate, candidate.open()

    def run(self, images: NDArray[Any]) -> Outputs:
        """See `Peer`."""
        return dict(self._opened.run({self._bundle.manifest.input.name: images}))

    def prove(
        self, reference: Reference, batches: Sequence[int], keys: NDArray[Any] | None = None
    ) -> Mapping[str, Any]:
        """See `Peer`."""
        if keys is None:
            return prove(self.run, reference, self._bundle, batches, self._precision)
        name, made = self._bundle.manifest.input.name, self._candidate
        with contextlib.closing(made.open((TOKEN_WEIGHTS,))) as opened:
            return prove(
                self.run, reference, self._bundle, batches, self._precision,
                keys=keys, merging=lambda images: opened.run({name: images}),
            )  # fmt: skip


class OpenVino(_Graph):
    """OpenVINO for latency, in one stream; by the name, in FP32 around an INT8 graph's products."""

    def __init__(self, name: str, precision: str, bundle: Bundle, _device: Device) -> None:
        super().__init__(precision, bundle)
        from vzip.runtime.backends.packages import import_openvino

        openvino = import_openvino(f"the peer {name}", "openvino")
        if precision == "int8":
            if "int8" not in bundle.manifest.precisions:
                raise InvalidInputError(
                    f"the bundle has no INT8 graph for {name}",
                    cure=(
                        f"make it with: vzip calibrate {bundle.path.name} --images FOLDER "
                        "--precision int8"
                    ),
                )
            bundle = bundle.at("int8")
        bundle.read_model()
        core = openvino.Core()
        model = core.read_model(bundle.weights_folder / Path(bundle.graph_file).name)
        rest = {_HINT: "f32"} if name.endswith("-f32") else _OPENVINO[precision]
        settings = {"PERFORMANCE_HINT": "LATENCY", **rest}
        if (limit := process.thread_limit()) is not None:
            settings["INFERENCE_NUM_THREADS"] = str(limit)
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, images: NDArray[Any]) -> Outputs:
        """See `Peer`. The outputs are copies, as the caller may keep them."""
        self._request.infer({0: images}, share_inputs=True)
        return {name: self._request.get_tensor(name).data.copy() for name in self._names}


def _quantise(graph: Path, target: Path) -> None:
    """Write the quantised graph; runs in a child process."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise missing("onnx", needed_for="quantize_dynamic", extra="export") from error
    quantize_dynamic(
        graph,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )
