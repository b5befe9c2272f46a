"""The commands of the exporting side; `main` is that of `vzip-export`."""

from vzip.export.cli.export import main

__all__ = ["main"]
