"""From a PyTorch checkpoint to a static ONNX graph in a bundle.

Depends on `vzip.runtime` and on the packages of the extra ``export``.
"""
