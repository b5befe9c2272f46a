"""The machine: what it is, what it has, what it can run, and time measured on it."""
