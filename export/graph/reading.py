"""A bundle's graph as onnx_ir has it: nodes and values in memory, weights in their file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vzip.runtime.errors import BundleError, missing

if TYPE_CHECKING:
    import onnx_ir as ir

    from vzip.runtime.bundle.reader import Bundle


def read_graph(bundle: Bundle, needed_for: str, extra: str = "export") -> ir.Model:
    """Return the graph that a bundle runs, whatever its precision.

    The weights are `onnx_ir.ExternalTensor`: mapped from the bundle's file when their numbers are
    asked for, and never copied.

    Args:
        bundle: Its graph is read with the bundle's own checks (`Bundle.read_model`).
        needed_for: Who asks, for messages.
        extra: The extra of this distribution that brings what is needed.

    Raises:
        MissingDependencyError: The package onnx or onnx_ir is not installed.
        BundleError: The bundle is damaged, or its graph can't be parsed.
    """
    try:
        import onnx
        import onnx_ir as ir
    except ImportError as error:
        raise missing(error.name or "onnx", needed_for=needed_for, extra=extra) from error
    data = bundle.read_model()
    try:
        model: ir.Model = ir.from_proto(onnx.load_model_from_string(data))
    except Exception as error:  # protobuf's own error, of several packages, and onnx_ir's
        raise BundleError(
            f"{bundle.path}: the graph can't be parsed ({str(error).splitlines()[0]})",
            cause="the file was edited or made by another tool",
            cure="export the bundle again",
        ) from error
    ir.external_data.set_base_dir(model.graph, bundle.weights_folder)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.length != tensor.nbytes:
            raise BundleError(
                f"{bundle.path}: the tensor {name!r} takes {tensor.length} bytes",
                expected=f"{tensor.nbytes}, those of {tensor.dtype.name} {tensor.shape}",
                cause="the graph is damaged",
                cure="export the bundle again",
            )
    return model
