"""From a PyTorch checkpoint to a static ONNX graph in a bundle.

Depends on `vzip.runtime` and on the packages of the extra ``export``.
"""

EXPORT_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "onnxruntime")
"""Import names of what an export needs; a command says in one line that one is not installed."""
