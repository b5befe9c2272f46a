"""The untouched model, and what a graph's tokens are judged by beside it."""
