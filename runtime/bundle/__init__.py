"""The bundle, vzip's format: its manifest, its records, and who reads and writes them."""
