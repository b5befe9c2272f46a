"""`vzip doctor`: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from vzip.runtime.cli.options import Parser
from vzip.runtime.console import emit, emit_json


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip doctor``.

    Returns:
        0 if at least one backend can run a bundle here, 1 if none can.
    """
    parser = Parser(
        prog,
        "Say what is on this machine, which backends and commands can run on it, and what is "
        "missing for the others. Exit status 1 if no backend can run.",
        table=True,
    )
    arguments = parser.read(argv)
    from vzip.runtime.doctor.environment import environment
    from vzip.runtime.doctor.showing import report
    from vzip.runtime.doctor.verdicts import backends

    record = environment()
    if arguments.json:
        emit_json(record)
    else:
        emit(report(record))
    return 0 if any(verdict.ready for verdict in backends(record)) else 1
