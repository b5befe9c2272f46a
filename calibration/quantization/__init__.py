"""`vzip calibrate`: INT8 and FP8 graphs that keep the same tokens, in Q/DQ form."""
