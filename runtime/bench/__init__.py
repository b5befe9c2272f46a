"""`vzip bench`: what an encoder takes on this machine, beside everything else that could run it."""
