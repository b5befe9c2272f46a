"""TensorRT and TensorRT-RTX engines: built, proven and published."""
