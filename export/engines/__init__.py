"""Engines: a bundle's graph compiled for one machine."""
