"""The static ONNX graph: the module that is traced, the trace, and the graph passes."""
