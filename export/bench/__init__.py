"""`vzip bench`: a bundle timed on this machine, beside its peers."""
