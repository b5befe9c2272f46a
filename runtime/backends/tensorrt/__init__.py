"""The TensorRT backend, and the CUDA and engine files that it stands on."""
