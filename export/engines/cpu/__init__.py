"""Forms of a graph for ONNX Runtime's CPU, and the choice of the fastest that agrees."""
