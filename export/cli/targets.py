"""`vzip targets`: the machines that an export can be made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vzip.export.hardware import TARGETS, table
from vzip.runtime.cli.options import Parser
from vzip.runtime.console import emit, emit_json


def main(argv: Sequence[str], *, prog: str) -> int:
    """Print the table of targets."""
    parser = Parser(
        prog,
        "Print the machines that 'vzip export --target' knows, and the defaults it sets for each.",
        table=True,
    )
    arguments = parser.read(argv)
    if arguments.json:
        emit_json(
            [
                {
                    **dataclasses.asdict(target),
                    "opset": target.opset,
                    "precision": target.precision,
                    "hardware_precisions": target.hardware_precisions,
                    "largest_batch": target.largest_batch("fp16"),
                }
                for target in TARGETS.values()
            ]
        )
    else:
        emit(table())
    return 0
