"""The encoder's matrix multiplications and nothing between them, as PyTorch makes them.

On a CPU in FP32 as ONNX Runtime makes them, where that is faster: on some of AMD's processors
PyTorch's take twice as long. No engine can be much faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vzip.export.architecture import VisionConfig
from vzip.export.bench.peers import Device
from vzip.export.checkpoint.reader import vision_config
from vzip.runtime.bundle.manifest import Manifest

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
_TRIES = 3  # of each way, before the faster one is taken


def multiplications(
    config: VisionConfig, tokens: int, batch: int
) -> list[tuple[int, int, int, int, int]]:
    """Return the matrix multiplications of the encoder, without its dead layers and side branch.

    Args:
        config: The architecture.
        tokens: K, which the projector runs on.
        batch: B.

    Returns:
        (times, matrices at once, M, K, N) each; FLOPs are 2 · product.
    """
    tower, projector, layers = config.tower, config.projector, config.layers_run
    size, width, inner = tower.tokens, tower.hidden_size, tower.intermediate_size
    heads, rows = tower.num_heads, batch * tower.tokens
    return [
        (1, 1, batch * tower.patches, 3 * tower.patch_size**2, width),
        (4 * layers, 1, rows, width, width),
        (layers, batch * heads, size, width // heads, size),
        (layers, batch * heads, size, size, width // heads),
        (layers, 1, rows, width, inner),
        (layers, 1, rows, inner, width),
        (1, 1, batch * tokens, projector.in_features, projector.hidden_features),
        (1, 1, batch * tokens, projector.hidden_features, projector.out_features),
    ]


def flops(config: VisionConfig, tokens: int, batch: int) -> int:
    """Return the FLOPs of `multiplications`, a multiply-add counted as two."""
    return sum(
        2 * times * many * m * k * n
        for times, many, m, k, n in multiplications(config, tokens, batch)
    )


class Ceiling:
    """The multiplications of one batch, as fast as PyTorch has them, or ONNX Runtime.

    Outputs in place. On a GPU all launches are in one CUDA graph; on a CPU the right side is laid
    out by rows or by columns, or in FP32 as ONNX Runtime packs weights, whichever was faster a
    moment before. In INT8 the linear layers are
    (int32 sums, nothing rescaled), and the attention's products are in BF16: PyTorch multiplies no
    batches of INT8 matrices.

    Args:
        manifest: Of the bundle.
        precision: A key of `DTYPES`.
        batch: B.
        device: ``cuda`` or ``cpu``.

    Attributes:
        flops: Of one call, a multiply-add counted as two.
        work: How often each product is made, and the product.
    """

    def __init__(self, manifest: Manifest, precision: str, batch: int, device: Device) -> None:
        model = manifest.model
        config = vision_config(model.id, revision=model.revision, vision_tower=model.vision_tower)
        tokens = manifest.selection.tokens
        self.flops = flops(config, tokens, batch)
        self.work: list[tuple[int, Product | Packed]] = []
        for times, many, m, k, n in multiplications(config, tokens, batch):
            kind = "bf16" if precision == "int8" and many > 1 else precision
            self.work.append((times, fastest_product(DTYPES[kind], (many, m, k, n), device)))
        self._graph: Any = None
        if device == "cuda":
            self._multiply()  # cuBLAS chooses and allocates outside the graph
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._multiply()

    def _multiply(self) -> None:
        for times, product in self.work:
            for _ in range(times):
                product.multiply()

    def call(self) -> None:
        """Run them once and wait."""
        if self._graph is None:
            self._multiply()
            return
        self._graph.replay()
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Product:
    """One multiplication, into its own output.

    Attributes:
        left: [many, M, K]; INT8 [M, K].
        right: [many, K, N]; INT8 [K, N].
        out: [many, M, N]; INT8's is int32 [M, N].
    """

    left: Tensor
    right: Tensor
    out: Tensor

    def multiply(self) -> None:
        """Do it."""
        if self.left.dtype == torch.int8:
            torch._int_mm(self.left, self.right, out=self.out)
        else:
            torch.matmul(self.left, self.right, out=self.out)

    def seconds(self) -> float:
        """Return the time of the fastest of some tries."""
        return _fastest(self.multiply)


class Packed:
    """One FP32 multiplication in ONNX Runtime; a single right side is constant, as weights are.

    Args:
        left: float32 [many, M, K].
        right: float32 [many, K, N].
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        from vzip.runtime.backends.onnxruntime import session_options

        arrays, weights = {"left": left.numpy()}, []
        if len(right) == 1:
            weights.append(numpy_helper.from_array(right[0].numpy(), "right"))
        else:
            arrays["right"] = right.numpy()
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["left", "right"], ["out"])],
            "product",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
                for name, array in arrays.items()
            ],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            weights,
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        self._session = onnxruntime.InferenceSession(
            model, session_options(onnxruntime), providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        for name, array in arrays.items():
            self._binding.bind_cpu_input(name, array)
        self.left, self.right = left, right  # which the binding only points to
        self.out = torch.empty((left.shape[0], left.shape[1], right.shape[2]))
        self._binding.bind_output(
            "out", "cpu", 0, np.float32, tuple(self.out.shape), self.out.data_ptr()
        )

    def multiply(self) -> None:
        """Do it."""
        self._session.run_with_iobinding(self._binding)

    def seconds(self) -> float:
        """Return the time of the fastest of some tries."""
        return _fastest(self.multiply)


def _fastest(multiply: Callable[[], None]) -> float:
    """Return the seconds of the fastest of some tries."""
    taken = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        multiply()
        taken.append(time.perf_counter() - start)
    return min(taken)


def fastest_product(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], device: Device
) -> Product | Packed:
    """Return the multiplication in the fastest of the ways that there are.

    Args:
        dtype: Of both sides.
        sizes: Matrices at once, M, K, N.
        device: ``cuda``, where the first way is taken, or ``cpu``.
    """
    many, m, k, n = sizes
    left, right, turned = (
        _filled(shape, dtype, device) for shape in ((many, m, k), (many, k, n), (many, n, k))
    )
    if dtype == torch.int8:
        out = torch.empty((m, n), dtype=torch.int32, device=device)
        ways = [Product(left[0], each, out) for each in (right[0], turned[0].T)]
    else:
        out = torch.empty((many, m, n), dtype=dtype, device=device)
        ways = [Product(left, each, out) for each in (right, turned.mT)]
    if device == "cuda":
        return ways[0]
    # One way at a time: threads of the one wait in a busy loop for a while after its last call.
    every: list[Product | Packed] = [*ways]
    if dtype == torch.float32:
        every.append(Packed(left, right))
    return min(every, key=lambda way: way.seconds())


def _filled(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)
