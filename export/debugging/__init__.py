"""`vzip debug`: where an engine first differs from ONNX Runtime, found by Polygraphy."""
