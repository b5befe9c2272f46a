"""LLM servers that nobody has run with vzip yet: each is held to its program's documents alone."""
