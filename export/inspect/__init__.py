"""What graphs and engines consist of, and where an engine's time goes."""
