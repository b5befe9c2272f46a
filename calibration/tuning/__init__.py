"""`vzip tune`: the projector, trained alone on compressed tokens."""
