"""PyTorch as a second opinion: the module that the export traces, with the bundle's weights.

Not a fast backend and not meant to be one. It shares the weights and the algorithm with the graph,
and neither the exporter nor a runtime's kernels: a result that it and ONNX Runtime agree on is no
defect of those. It needs torch and onnx_ir, and takes the GPU where there is one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.export.graph.reading import read_graph
from vzip.runtime.bundle.manifest import TOKEN_WEIGHTS, graph_outputs
from vzip.runtime.bundle.reader import Bundle
from vzip.runtime.errors import BackendError, VzipError, missing

_CUDNN = threading.Lock()


class PyTorch:
    """The traced module, rebuilt; see `Backend`.

    Attributes:
        name: The backend's name.
        device: ``cuda`` where PyTorch can use a GPU, ``cpu`` elsewhere.
    """

    name = "pytorch"
    engine: str | None = None

    def __init__(
        self,
        bundle: Bundle,
        extra_outputs: tuple[str, ...] = (),
        *,
        threads: int | None = None,
    ) -> None:
        model = read_graph(bundle, f"the backend '{self.name}'")
        try:
            import torch
        except ImportError as error:
            package = error.name or "torch"
            raise missing(package, needed_for="the backend 'pytorch'", extra="export") from error
        from vzip.export.graph.rebuilt import ForeignGraphError, rebuild
        from vzip.export.graph.unshared import OwnLayers

        graph = OwnLayers()(model).model.graph
        given = {TOKEN_WEIGHTS} & {value.name for node in graph for value in node.outputs}
        if unknown := sorted(set(extra_outputs) - given):
            raise BackendError(
                f"the backend '{self.name}' can't give {', '.join(unknown)}",
                expected=f"{TOKEN_WEIGHTS}, of a graph that has a value of that name",
                cause="the graph was made by another version",
                cure="export the bundle again",
            )
        try:
            encoder = rebuild(bundle.manifest, graph)
        except (ForeignGraphError, VzipError) as error:
            raise BackendError(
                f"{bundle.path}: this graph is not one that vzip export writes: {error}",
                cause="it was made by another tool or version",
                cure="run it with backend='onnxruntime'",
            ) from error
        if threads is not None:
            torch.set_num_threads(threads)  # which the whole process has in common
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoder: Any = encoder.to(self.device)
        self._made = graph_outputs(ranked=bundle.manifest.has_rank)
        self._outputs = (*(each.name for each in bundle.manifest.outputs), *extra_outputs)
        self._input = bundle.manifest.input.name

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
        """See `Backend.run`."""
        import torch

        encoder = self._encoder  # another thread may close: this one then still ends its run
        if encoder is None:
            raise BackendError(f"the backend '{self.name}' is closed")
        try:
            with torch.inference_mode(), self._exact():
                made = encoder(torch.tensor(feeds[self._input], device=self.device))
                values = dict(zip((*self._made, TOKEN_WEIGHTS), made, strict=True))
                return {name: values[name].contiguous().cpu().numpy() for name in self._outputs}
        except RuntimeError as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"{self.name} failed: {line}",
                cause="memory is short, or the bundle is damaged",
                cure="try again, or check the bundle with vzip check",
            ) from error

    @contextlib.contextmanager
    def _exact(self) -> Iterator[None]:
        """Keep cuDNN's convolution from TF32, which it would use on its own accord."""
        if self.device == "cpu":
            yield
            return
        import torch

        with _CUDNN, torch.backends.cudnn.flags(allow_tf32=False):
            yield

    def close(self) -> None:
        """See `Backend.close`."""
        self._encoder = None
