"""A checkpoint, from a name to the tensors of tower and projector."""
