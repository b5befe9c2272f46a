"""The commands of the exporting side."""
