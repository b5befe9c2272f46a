"""What a budget would cost on a machine, predicted."""
