"""What learns from representative data: quantisation, projector, budgets, and the demo model."""
