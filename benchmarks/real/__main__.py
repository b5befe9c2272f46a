"""Fetch and make every real tower and photograph: ``python -m benchmarks.real [TOWER …]``."""

from __future__ import annotations

import argparse
import sys

from benchmarks.real.pictures import pictures
from benchmarks.real.towers import TOWERS, checkpoint
from vzip.runtime.errors import VzipError


def main() -> int:
    """Command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("towers", nargs="*", metavar="TOWER", help=f"of {', '.join(TOWERS)}")
    options = parser.parse_args()
    try:
        for name in options.towers or TOWERS:
            print(f"{checkpoint(name)}: {TOWERS[name].about}")
        print(f"{pictures()[0].parent}: {len(pictures())} photographs")
    except VzipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
