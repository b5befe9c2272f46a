"""What speaks a protocol, or runs in another program: each needs what its extra brings."""
