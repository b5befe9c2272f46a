"""`vzip inspect`: what a graph or an engine consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vzip.runtime.cli.options import Parser, add_bundle
from vzip.runtime.console import emit, emit_json


def main(argv: Sequence[str], *, prog: str) -> int:
    """Print what a bundle's graph, or one of its engines, consists of."""
    parser = Parser(
        prog,
        "Print what a bundle's graph consists of: operators, datatypes, work, weights and the "
        "parts that stay FP32; or, with --engine, what an engine consists of.",
        table=True,
    )
    add_bundle(parser)
    parser.add_argument("--engine", metavar="NAME", help="an engine that 'vzip build' made")
    arguments = parser.read(argv)
    from vzip.export.inspect.describe import describe_engine, describe_graph

    lines = (
        describe_graph(arguments.bundle)
        if arguments.engine is None
        else describe_engine(arguments.bundle, arguments.engine)
    )
    if arguments.json:
        emit_json(_record(lines))
    else:
        for line in lines:
            emit(line)
    return 0


def _record(lines: Iterable[str]) -> dict[str, Any]:
    """Return lines ``name: value`` as a record; those without a name are the engine's layers."""
    record: dict[str, Any] = {}
    for line in lines:
        if line.startswith(" "):
            record.setdefault("each layer", []).append(line.split("  ")[1:])
        else:
            name, _, value = line.partition(": ")
            record[name] = value
    return record
