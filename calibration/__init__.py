"""What learns from representative data; so far, the demo model."""
