"""One step of first contact, in the process that the parent started for it.

    python -c "from vzip.export.contact.child import main; main()" RESULT STEP ARGUMENTS

RESULT is the file of the step's `Notes`; ARGUMENTS are JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from vzip.export.contact import engine_steps, machine_steps
from vzip.export.contact.notes import Notes, NotHereError
from vzip.runtime.errors import VzipError, first_line

STEPS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {
        "doctor": machine_steps.doctor,
        "system": machine_steps.system,
        "names": machine_steps.names,
        "cuda": machine_steps.cuda,
        "build": engine_steps.build,
        "run": engine_steps.run,
        "cpu": engine_steps.cpu,
        "command": engine_steps.command,
        "killed": engine_steps.killed,
        "reopened": engine_steps.reopened,
    }
)
"""Name → what is done; the parent names them."""


def main() -> None:
    """Take the step that the command line names."""
    result, name, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    notes = Notes(result)
    try:
        STEPS[name](notes, **arguments)
        notes.note(status="ok")
    except NotHereError as error:
        notes.note(status="not here", why=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the step found
        traceback.print_exc()
        shown = str(error) if isinstance(error, VzipError) else first_line(error)
        notes.note(status="failed", why=f"{type(error).__name__}: {shown}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a library may crash as it is unloaded; the step has ended
