"""The language model of a checkpoint, written for ONNX Runtime and for llama.cpp."""
