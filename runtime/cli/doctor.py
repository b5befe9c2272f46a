"""The command `vzip doctor`: what is on this machine, what it can run, what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vzip.runtime.console import emit


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip doctor``.

    Args:
        argv: The arguments.
        prog: The command's name, for its help.

    Returns:
        0 if at least one backend can run a bundle here, 1 if none can.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Say what is on this machine, which backends and commands can run on it, and "
        "what is missing for the others. Exit status 1 if no backend can run.",
    )
    parser.add_argument("--json", action="store_true", help="print the record itself, as JSON")
    arguments = parser.parse_args(argv)
    from vzip.runtime.doctor.environment import environment
    from vzip.runtime.doctor.showing import report
    from vzip.runtime.doctor.verdicts import backends

    record = environment()
    emit(json.dumps(record, indent=1) if arguments.json else report(record))
    return 0 if any(verdict.ready for verdict in backends(record)) else 1
